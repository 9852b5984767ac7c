"""Threads, forks, OpenMP runtimes, instruction sets, and imports: what a process can be like."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layer_norm_cases import Case, inputs, judge, ours
from oracle import Oracle

import pyops
from pyops import backend

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
CPU = SimpleNamespace(name="cpu", device="cpu")
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")

# Large enough for two threads, rows and pixels; 3 x 65 leaves a thread without a whole block of rows.
PARALLEL = [
    Case(shape=(700, 70)),
    Case(shape=(3, 20011)),
    Case(op="rms_norm", shape=(700, 70), affine="w", dtype=torch.bfloat16),
    Case(op="add_layer_norm", shape=(300, 300), p=0.1),
    Case(op="layer_norm2d", shape=(3, 40, 33, 31)),
    Case(op="layer_norm2d", shape=(3, 40, 33, 31), layout="channels_last"),
    Case(shape=(700, 70), memory_efficient=True),
]


def run_python(script: str, *, timeout: float = 120, **environment: str | None) -> subprocess.CompletedProcess:
    """A fresh interpreter; a variable of None is removed."""
    variables = {**os.environ, **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=timeout, env=variables
    )


def succeed(script: str, **options: str | None) -> str:
    done = run_python(script, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- threads ----


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", PARALLEL, ids=str)
def test_thread_counts(case: Case, threads: int) -> None:
    """Right for every thread count, also for more threads than cores."""
    torch.set_num_threads(threads)
    with Oracle(f"{threads} threads") as oracle:
        judge(oracle, case, CPU)


def test_two_python_threads() -> None:
    """Several threads at once, each with its own parallel regions: the bits of a run alone."""
    torch.set_num_threads(2)
    alone = [ours(case, inputs(case, "cpu"), "cpu") for case in PARALLEL if case.p == 0]
    problems: list[str] = []

    def work() -> None:
        for _ in range(5):
            for case, expected in zip([c for c in PARALLEL if c.p == 0], alone):
                for name, value in ours(case, inputs(case, "cpu"), "cpu").items():
                    if not torch.equal(value, expected[name]):
                        problems.append(f"{case} {name}")

    torch.set_num_threads(2)
    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems


LONG_CALLS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], object]]] = {
    "layer_norm": ((2**13, 2**12), lambda x: pyops.layer_norm(x, 2**12, backend="cpu")),
    "attention": ((1, 1, 4096, 64), lambda x: pyops.scaled_dot_product_attention(x, x, x, backend="cpu")),
}


@pytest.mark.parametrize("name", LONG_CALLS)
def test_other_threads_run_meanwhile(name: str) -> None:
    """The interpreter lock is released around the work."""
    torch.set_num_threads(1)
    shape, function = LONG_CALLS[name]
    x = torch.zeros(shape)
    running, done = threading.Event(), threading.Event()

    def work() -> None:
        running.set()
        function(x)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    running.wait()
    ticks = 0
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    worker.join()
    assert ticks >= 5, "this thread stood still while the other one computed"


FORK = """
import torch, pyops
from torch.utils.data import DataLoader, Dataset

class Computed(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        torch.manual_seed(i)
        x = torch.randn({shape})
        return {call}

torch.set_num_threads(2)
here = [Computed()[i] for i in range(4)]  # parallel regions before the fork
for i, batch in enumerate(DataLoader(Computed(), batch_size=None, num_workers=2, multiprocessing_context="fork")):
    assert torch.equal(batch, here[i])
Computed()[0]  # and one after it
print("done")
"""


@pytest.mark.parametrize(
    ("shape", "call"),
    [
        ((600, 100), 'pyops.layer_norm(x, 100, backend="cpu")'),
        ((2, 4, 130, 32), 'pyops.scaled_dot_product_attention(x, x, x, is_causal=True, backend="cpu")'),
    ],
    ids=["layer_norm", "attention"],
)
def test_forked_data_loader(shape: tuple[int, ...], call: str) -> None:
    """A worker forked after a parallel region computes, and does not wait for threads that the fork left behind."""
    assert succeed(FORK.format(shape=shape, call=call)) == "done\n"


FRESH = """
import re
import pyops, torch  # in this order: nothing depends on who loads the OpenMP runtime
tiny = torch.full((64,), 1e-40)
assert (tiny / 2).ne(0).all(), "denormal numbers are flushed to zero after the import"
torch.set_num_threads(2)
x = torch.randn(1000, 1000)
pyops.layer_norm(x @ x, 1000, backend="cpu")
assert (tiny / 2).ne(0).all(), "denormal numbers are flushed to zero after a call"
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print("\\n".join(sorted(p for p in paths if re.search(r"lib(gomp|iomp|omp)[^/]*$", p))))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps, which only Linux has")
def test_one_openmp_runtime() -> None:
    """The extension shares torch's thread pool: a second libgomp would bring threads of its own. And loading it flips
    no flush-to-zero bit, as linking with -ffast-math would."""
    found = succeed(FRESH).split()
    assert len(found) == 1, found
    assert "libgomp" in found[0]


# ---- instruction sets ----


def available_levels() -> list[str]:
    return list(LEVELS[: LEVELS.index(backend._C.cpu_isa_best) + 1])


ISA_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from types import SimpleNamespace
import itertools, torch
from layer_norm_cases import Case, judge
from oracle import Oracle
from pyops import backend
assert backend._C.cpu_isa == {level!r}, backend._C.cpu_isa
variants = [dict(), dict(zero_centred=True), dict(memory_efficient=True), dict(op="rms_norm", affine="w"),
            dict(op="add_layer_norm", p=0.1), dict(op="layer_norm2d"), dict(affine="")]
with Oracle({level!r}, mean=True) as oracle:
    for variant, C, dtype in itertools.product(variants, (1, 3, 7, 8, 17, 33, 65, 300),
                                               (torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        shape = (2, C, 3, 7) if variant.get("op") == "layer_norm2d" else (7, C)
        judge(oracle, Case(shape=shape, dtype=dtype, **variant), SimpleNamespace(name="cpu", device="cpu"))
print(oracle.cases)
"""


@pytest.mark.parametrize("level", available_levels())
def test_instruction_set(level: str) -> None:
    """The kernels compiled for every instruction set of this processor are right."""
    script = ISA_SCRIPT.format(tests=str(TESTS), level=level)
    assert int(succeed(script, PYOPS_CPU_ISA=level)) > 500


@pytest.mark.full
@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize(
    ("files", "chosen", "least"),
    [
        (("test_layer_norm.py", "test_layer_norm_contract.py"), "cpu or any_shape", 100),
        (("test_recurrent.py",), "(cpu and (float64 or functions or torchs)) or all_sizes or one_step_of", 15),
    ],
    ids=["layer_norm", "recurrent"],
)
def test_everything_on_instruction_set(files: tuple[str, ...], chosen: str, least: int, level: str) -> None:
    """The numbers of an operation on the CPU kernels of this level."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "full or not full", "-k", chosen]
    done = subprocess.run(
        [*command, *(str(TESTS / file) for file in files)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYOPS_CPU_ISA": level},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= least


BAD_LEVEL = """
import torch, pyops
x = torch.randn(3, 4)
assert torch.equal(pyops.layer_norm(x, 4, backend="eager"), pyops.layer_norm(x, 4, backend="eager"))
try:
    pyops.layer_norm(x, 4, backend="cpu")
except ValueError as error:
    print(error)
"""


def test_unknown_instruction_set() -> None:
    message = succeed(BAD_LEVEL, PYOPS_CPU_ISA="sse9")
    assert "PYOPS_CPU_ISA must be one of baseline, avx2, avx512, avx512_bf16, got sse9" in message


def test_instruction_set_above_the_processors() -> None:
    best = backend._C.cpu_isa_best
    if best == LEVELS[-1]:
        pytest.skip("this processor has every instruction set that there are kernels for")
    message = succeed(BAD_LEVEL, PYOPS_CPU_ISA=LEVELS[LEVELS.index(best) + 1])
    assert f"PYOPS_CPU_ISA must not exceed this processor's level {best}, got" in message


def kernel_objects() -> list[Path]:
    objects = sorted(p for p in (ROOT / "build").rglob("cpu_*.o") if p.stem.removeprefix("cpu_") not in ("isa",))
    if not objects:
        pytest.skip("no object files here: pyops was not built in this folder (`make build`)")
    return objects


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_kernels_share_no_inline_functions() -> None:
    """The linker keeps one copy of a weak symbol; a copy compiled for AVX-512 would crash an older processor."""
    harmless = ("DW.ref.__gxx_personality_v0",)  # a pointer, the same in every object
    for path in kernel_objects():
        symbols = subprocess.run(["nm", "--demangle", path], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.match(r"[0-9a-f ]{16} [WVu] ", line)]
        isa = next(level for level in sorted(LEVELS, key=len, reverse=True) if path.stem.endswith(f"_{level}"))
        shared = [line for line in weak if f"pyops::{isa}::" not in line and not line.endswith(harmless)]
        assert not shared, f"{path.name}: {shared}"
        assert f"pyops::{isa}::" in symbols


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump of binutils")
def test_each_level_uses_only_its_registers() -> None:
    """No AVX in the baseline, no 512-bit registers below AVX-512; and those that should be used are."""
    uses = {"baseline": "", "avx2": "ymm", "avx512": "zmm", "avx512_bf16": "zmm"}
    wider = {"baseline": ("ymm", "zmm"), "avx2": ("zmm",)}
    for path in kernel_objects():
        isa = next(level for level in sorted(LEVELS, key=len, reverse=True) if path.stem.endswith(level))
        code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
        assert uses[isa] in code, path.name
        for register in wider.get(isa, ()):
            assert register not in code, f"{path.name} uses {register}"


# ---- imports ----

HIDDEN = """
import logging, sys
sys.modules["pyops._C"] = None  # what an import finds when the file is not there
import torch, pyops
x = torch.randn(5, 33, requires_grad=True)
expected = torch.nn.functional.layer_norm(x, (33,))
torch.testing.assert_close(pyops.layer_norm(x, 33, backend="eager"), expected)
for name in ("cpu", "cuda"):
    try:
        pyops.layer_norm(x, 33, backend=name)
    except ValueError as error:
        print(error)
torch.testing.assert_close(pyops.layer_norm(x, 33), expected)
pyops.layer_norm(x, 33).sum().backward()
y, total = pyops.add_layer_norm(x, x, p=0.5)
print(pyops.explain("layer_norm", x, 33))
"""


def test_without_the_extension() -> None:
    """eager works, the choice falls to torch's operator and says so once, and `cpu` tells what is missing."""
    done = run_python(HIDDEN)
    assert done.returncode == 0, done.stderr[-3000:]
    messages = done.stdout.splitlines()
    assert messages[0].startswith("layer_norm: backend must be able to serve x, got 'cpu': the extension cannot be")
    assert messages[1].startswith("layer_norm: backend must be able to serve x, got 'cuda': the extension cannot be")
    assert 'use "triton" or "eager"' in messages[1]
    assert messages[2] == "layer_norm runs on torch"
    said = [line for line in done.stderr.splitlines() if "runs torch's own operator" in line]
    assert sum("layer_norm on cpu" in line and "add_" not in line for line in said) == 1
    assert "the extension cannot be loaded" in said[0]


def test_import_is_light() -> None:
    """Neither Triton nor the compiler is loaded, and no CUDA context is made, before they are needed."""
    script = """
import sys, torch
before = "triton" in sys.modules, "torch._dynamo" in sys.modules
import pyops
assert not torch.cuda.is_initialized()
assert ("triton" in sys.modules, "torch._dynamo" in sys.modules) == before == (False, False), sorted(sys.modules)
pyops.layer_norm(torch.randn(5, 33, requires_grad=True), 33).sum().backward()
pyops.explain("layer_norm", torch.randn(5, 33), 33)
assert "triton" not in sys.modules
assert not torch.cuda.is_initialized()
"""
    succeed(script)


def test_spawned_process(tmp_path: Path) -> None:
    """A module on a backend by name travels to a spawned process."""
    script = """
import torch.multiprocessing as mp, torch, pyops
def work(module, x, queue):
    queue.put(module(x).tolist())
if __name__ == "__main__":
    context = mp.get_context("spawn")
    queue, x, module = context.SimpleQueue(), torch.randn(3, 8), pyops.nn.LayerNorm(8, backend="cpu")
    process = context.Process(target=work, args=(module, x, queue))
    process.start()
    assert queue.get() == module(x).tolist()
    process.join()
"""
    path = tmp_path / "main.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
