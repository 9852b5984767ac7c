"""The gate on the compiled CUDA kernels: every kernels/cuda/*.cu for every architecture, without a GPU.

Fails on register spills, stack frames (local memory is device memory), ptxas warnings that say an instruction lost its
effect, and 16-bit accesses where a kernel meant to move a vector. Registers and shared memory of each kernel go to
build/nvcc_gate/<architecture>-<source>.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "kernels/cuda").glob("*.cu"))
ARCHITECTURES = ["80", "90a", "100", "120"]
FLAGS = ["-std=c++20", "-O3"]  # as in setup.py

# wgmma serialised (C7510, C7511, C7515 and others of its family), setmaxnreg ignored (C7508).
LOST_EFFECT = re.compile(r"C7508|C7510|C7511|C7515")

# (source, architecture, part of the complaint): why it stands.
_WIDE_ROWS = "the widest 16-bit rows in registers; these architectures are not among the default ones and are not tuned"
_HELD_WEIGHTS = "16-bit weights in registers over all steps; likewise not default and not tuned"
_FEW_BYTES = "8 to 24 bytes; likewise not default and not tuned"
ACCEPTED: dict[tuple[str, str, str], str] = {
    ("layer_norm.cu", "100", "layer_norm_fwd_kernel"): _WIDE_ROWS,
    ("layer_norm.cu", "120", "layer_norm_fwd_kernel"): _WIDE_ROWS,
    ("recurrent.cu", "100", "recurrent_fwd_sequence_kernel"): _HELD_WEIGHTS,
    ("recurrent.cu", "120", "recurrent_fwd_sequence_kernel"): _HELD_WEIGHTS,
    ("recurrent.cu", "100", "recurrent_fwd_norm_kernel"): _FEW_BYTES,
    ("recurrent.cu", "120", "recurrent_fwd_norm_kernel"): _FEW_BYTES,
    ("recurrent.cu", "120", "recurrent_bwd_projection_kernel"): _FEW_BYTES,
}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home, "bin/nvcc")] if home else []
    candidates += [Path(path) for path in [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"] if path]
    return next((str(path) for path in candidates if path.exists()), None)


NVCC = find_nvcc()

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.skipif(NVCC is None, reason="nvcc is neither in CUDA_HOME, on PATH nor in /usr/local/cuda"),
]


@dataclass
class Kernel:
    """What ptxas says of one kernel; bytes, and registers per thread."""

    name: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass
class Compiled:
    ptx: str
    messages: str  # of nvcc and ptxas
    kernels: list[Kernel]

    def complaints(self) -> list[str]:
        found = [
            f"{kernel.name}: {kernel.stack} bytes of stack, {kernel.spill_stores} + {kernel.spill_loads} spilled"
            for kernel in self.kernels
            if kernel.stack or kernel.spill_stores or kernel.spill_loads
        ]
        found += [line for line in self.messages.splitlines() if LOST_EFFECT.search(line) or "warning" in line]
        # The compiler splits a vector of 16-bit elements into pairs where it can see the elements.
        split = len(re.findall(r"\b(?:ld|st)\.global\S*\.v2\.\w16\b", self.ptx))
        return found + ([f"{split} accesses to pairs of 16-bit elements"] if split else [])


def demangled(names: list[str]) -> list[str]:
    if not names or shutil.which("c++filt") is None:
        return names
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def parse_ptxas(report: str) -> list[Kernel]:
    """The kernels in the output of `ptxas -v`."""
    kernels = []
    for part in re.split(r"(?=ptxas info\s+: Compiling entry function)", report)[1:]:
        name = re.search(r"entry function '(\S+)'", part)[1]
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        kernels.append(Kernel(name, int(registers[1]), int(shared[1]) if shared else 0, *map(int, memory.groups())))
    for kernel, name in zip(kernels, demangled([kernel.name for kernel in kernels])):
        kernel.name = name
    return kernels


def compile_source(source: Path, arch: str, folder: Path, ptxas_flags: list[str] | None = None) -> Compiled:
    """To machine code of one architecture, by way of PTX."""
    ptx, cubin = folder / f"{source.stem}.ptx", folder / f"{source.stem}.cubin"
    command = [NVCC, *FLAGS, f"-arch=compute_{arch}", "-ptx", str(source), "-o", str(ptx)]
    front = subprocess.run(command, capture_output=True, text=True)
    assert front.returncode == 0, front.stdout + front.stderr
    ptxas = str(Path(NVCC).resolve().parent / "ptxas")
    command = [ptxas, f"-arch=sm_{arch}", "-v", "-warn-spills", *(ptxas_flags or []), str(ptx), "-o", str(cubin)]
    back = subprocess.run(command, capture_output=True, text=True)
    assert back.returncode == 0, back.stdout + back.stderr
    report = back.stdout + back.stderr
    return Compiled(ptx.read_text(), front.stdout + front.stderr + report, parse_ptxas(report))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_keep_to_registers(source: Path, arch: str, tmp_path: Path) -> None:
    compiled = compile_source(source, arch, tmp_path)
    folder = ROOT / "build/nvcc_gate"
    folder.mkdir(parents=True, exist_ok=True)
    report = {"source": source.name, "arch": arch, "kernels": [asdict(kernel) for kernel in compiled.kernels]}
    (folder / f"{arch}-{source.stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    for kernel in compiled.kernels:
        print(f"{kernel.registers:4} registers {kernel.shared:6} B shared  {kernel.name}")

    assert len(compiled.kernels) == compiled.ptx.count(".visible .entry") + compiled.ptx.count(".weak .entry")
    accepted = [part for (name, where, part) in ACCEPTED if (name, where) == (source.name, arch)]
    complaints = compiled.complaints()
    assert not [complaint for complaint in complaints if not any(part in complaint for part in accepted)]
    unused = [part for part in accepted if not any(part in complaint for complaint in complaints)]
    assert not unused, f"no longer needed in ACCEPTED: {unused}"


SPILLING = """
__global__ void hold(float* p) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = p[i * blockDim.x + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) p[i * blockDim.x + threadIdx.x] = v[i] * v[63 - i];
}
"""
INDEXED = """
__global__ void pick(float* p, int k) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = p[i];
  v[k & 63] = 0;
  for (int i = 0; i < 64; ++i) p[i] = v[(i + k) & 63];
}
"""
SPLIT = """
__global__ void add(ushort2* to, const ushort2* from) {
  ushort2 v = from[threadIdx.x];
  v.x += 1;
  to[threadIdx.x] = v;
}
"""
CLEAN = "__global__ void twice(float* p) { p[threadIdx.x] *= 2; }\n"


@pytest.mark.parametrize(
    ("code", "flags", "complaint"),
    [
        (CLEAN, [], None),
        (SPILLING, ["-maxrregcount=32"], "spilled"),
        (INDEXED, [], "bytes of stack"),
        (SPLIT, [], "pairs of 16-bit"),
    ],
    ids=["clean", "spill", "stack", "split"],
)
def test_gate_sees(code: str, flags: list[str], complaint: str | None, tmp_path: Path) -> None:
    source = tmp_path / "seeded.cu"
    source.write_text(code)
    compiled = compile_source(source, "80", tmp_path, flags)
    assert len(compiled.kernels) == 1
    assert compiled.kernels[0].registers > 0
    complaints = compiled.complaints()
    assert any(complaint in line for line in complaints) if complaint else complaints == []


def test_gate_sees_lost_effects() -> None:
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert Compiled("", line, []).complaints() == [line]
