"""Ahead-of-time compilation of the Triton kernels, for GPUs that need not be present.

What is compiled is what the launchers launch: a stub driver names the architecture, and a launch stops once the kernel
is compiled. Triton decides at import whether it interprets, and the rest of the suite makes it interpret, so this file
runs itself as a program in a process of its own; the tests read the JSON that it prints.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

CAPABILITIES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # of a program; 80 is every 8.x
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = ((F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32))  # of x and of weight
LAYER_NORM_KERNELS = {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_layer_norm_bwd_reduce_kernel"}
ATTENTION_KERNELS = {"_attention_fwd_kernel"} | {
    f"_attention_bwd_{part}_kernel" for part in ("delta", "dkdv", "dq", "dmask", "dmask_reduce")
}
RECURRENT_KERNELS = {
    f"_{part}_{way}_kernel" for part in ("sequence", "step", "rows", "projection") for way in ("fwd", "bwd")
}
SUMS = ("reduce", "delta", "dmask")  # kernels that store sums, an element or a few for each thread
WIDE_LOAD = re.compile(r"ld\.global\S*\.(v4\.[bf]32|v2\.[bf]64)|cp\.async\.cg\.shared\.global[^;]*, 0x10")
WIDE_STORE = re.compile(r"st\.global\S*\.(v4\.[bf]32|v2\.[bf]64)")


class Case:
    """A forward and a backward call."""

    module: str
    wide: bool  # whether all addresses are multiples of 16 bytes
    spill: int = 0  # bytes of stack that are known and borne

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return ", ".join(f"{name}={value}" for name, value in values.items() if value)

    def run(self, module: Any) -> None:
        """Calls the launchers, on tensors that are large enough for full tiles."""
        raise NotImplementedError


@dataclass(frozen=True)
class LayerNorm(Case):
    C: int = 1024
    P: int = 1
    dtype: torch.dtype = BF16
    param_dtype: torch.dtype = F32
    rms: bool = False
    residual: bool = False
    dropout: bool = False
    from_output: bool = False
    module: ClassVar[str] = "layer_norm"

    @property
    def wide(self) -> bool:
        return self.C % 16 == 0 and (self.P == 1 or self.P % 16 == 0)

    def run(self, layer_norm: Any) -> None:
        C, P = self.C, self.P
        R = 2 * P if P > 1 else max(4096 // C, 16)

        def rows() -> torch.Tensor:
            return torch.empty(R * C, dtype=self.dtype).view((R, C) if P == 1 else (2, C, P))

        statistic = torch.empty(R, dtype=F64 if self.dtype == F64 else F32)
        weight = torch.empty(C, dtype=self.param_dtype)
        bias = None if self.rms else weight.clone()
        mean = None if self.rms else statistic
        residual = rows() if self.residual else None
        seed = torch.zeros(2, dtype=torch.int64) if self.dropout else None
        layer_norm.layer_norm_fwd(
            rows(), residual, weight, bias, seed, rows(), residual, mean, statistic, C, P, 1e-5, 0.0, 0.1, self.rms
        )
        workspace = statistic.new_empty(layer_norm.layer_norm_bwd_workspace(rows(), C, P))
        layer_norm.layer_norm_bwd(
            rows(), residual, rows(), weight, bias, None if self.from_output else mean, statistic, seed, rows(),
            rows() if self.dropout else None, weight, bias, workspace, C, P, 0.0, 0.1, self.rms, self.from_output,
        )  # fmt: skip


@dataclass(frozen=True)
class Attention(Case):
    """Causal, 2 sequences of 512 queries and keys, 4 heads."""

    dtype: torch.dtype = BF16
    D: int = 64
    mask: torch.dtype | None = None
    dmask: bool = False
    dropout: bool = False
    softcap: float = 0.0
    slopes: bool = False  # and sinks
    window: bool = False
    packed: bool = False
    grouped: bool = False
    spill: int = 0
    module: ClassVar[str] = "attention"

    @property
    def wide(self) -> bool:
        return self.D * self.dtype.itemsize % 16 == 0

    def run(self, attention: Any) -> None:
        B, H, L = 2, 4, 512
        acc = F64 if self.dtype == F64 else F32

        def rows(H: int) -> torch.Tensor:
            shape = (1, B * L, H, self.D) if self.packed else (B, L, H, self.D)
            return torch.empty(shape, dtype=self.dtype).transpose(1, 2)

        q, out, dq = rows(H), rows(H), rows(H)
        k, v, dk, dv = (rows(1 if self.grouped else H) for _ in range(4))
        stats = torch.empty((2, *q.shape[:3]), dtype=acc)
        mask = torch.empty(1, 1, L, L, dtype=self.mask).expand(B, H, L, L) if self.mask else None
        slopes = torch.empty(B, H, dtype=acc) if self.slopes else None
        sinks = torch.empty(H, dtype=acc) if self.slopes else None
        seed = torch.zeros(2, dtype=torch.int64) if self.dropout else None
        cu = torch.zeros(B + 1, dtype=torch.int32) if self.packed else None
        scalars = (0.1, 128 if self.window else -1, 0, False, self.softcap, 0.1, L, L)
        workspace = stats.new_empty(attention.attention_fwd_workspace(q, k, v, mask, cu, L, L))
        attention.attention_fwd(q, k, v, mask, slopes, sinks, seed, cu, cu, out, None, stats, workspace, *scalars)
        workspace = stats.new_empty(attention.attention_bwd_workspace(q, k, v, mask, cu, L, L, self.dmask))
        dmask = torch.empty(1, 1, L, L, dtype=acc) if self.dmask else None
        attention.attention_bwd(
            out,
            None,
            q,
            k,
            v,
            mask,
            slopes,
            sinks,
            seed,
            cu,
            cu,
            out,
            None,
            stats,
            dq,
            dk,
            dv,
            dmask,
            workspace,
            *scalars,
        )


@dataclass(frozen=True)
class Recurrent(Case):
    """4 steps of 32 sequences, one direction."""

    cell: str = "lstm"
    H: int = 256
    dtype: torch.dtype = BF16
    options: bool = False  # reset, keep, zoneout and, for LSTMs, peepholes
    norms: bool = False
    projected: bool = False
    spill: int = 0
    wide: ClassVar[bool] = False  # tiles of 16 sequences, whose rows are loaded by a few threads each
    module: ClassVar[str] = "recurrent"

    def run(self, recurrent: Any) -> None:
        T, B, H = 4, 32, self.H
        P = H // 2 if self.projected else H
        G, S = {"lstm": (4, 4), "gru": (3, 4), "rnn_tanh": (1, 1)}[self.cell]
        acc = F64 if self.dtype == F64 else F32
        has_cells = self.cell == "lstm"

        def new(*shape: int, dtype: torch.dtype = self.dtype, here: bool = True) -> torch.Tensor | None:
            return torch.zeros(shape, dtype=dtype) if here else None

        N = T * B
        direction = (
            new(N, G * H), new(G * H, P), new(H, here=self.cell == "gru"), new(P, H, here=self.projected),
            new(3, H, here=self.options and has_cells), new(G * H, here=self.norms),
            new(2, H, here=self.norms and has_cells),
        )  # fmt: skip
        states = (
            new(1, B, P), new(1, B, H, here=has_cells), new(1, B, P, here=self.options),
            new(N, dtype=torch.bool, here=self.options), new(2, dtype=torch.int64, here=self.options), None,
        )  # fmt: skip
        inputs = (*direction, *(None,) * 7, *states)
        y, gates, cells = new(N, P), new(1, N, S * H), new(1, N, H, dtype=acc, here=has_cells)
        zoneout = 0.1 if self.options else 0.0
        scalars = (self.cell, T, B, False, zoneout, zoneout if has_cells else 0.0, 1e-5)
        state, dc = new(1, B, P), new(1, B, H, here=has_cells)
        recurrent.recurrent_fwd(*inputs, y, state, dc, gates, cells, None, *scalars)
        recurrent.recurrent_bwd(
            y, state, dc, None, *inputs, y, gates, cells, new(1, N, G * H, dtype=acc, here=self.norms),
            new(1, N, G * H), new(1, N, G * H, here=self.cell == "gru" or self.norms),
            new(1, N, P, here=self.projected),
            new(1, S, H, dtype=acc), new(1, 3, H, dtype=acc, here=self.options and has_cells),
            new(1, G * H, dtype=acc, here=self.norms), new(1, 2, H, dtype=acc, here=self.norms and has_cells),
            new(1, B, P, dtype=acc), new(1, B, H, dtype=acc, here=has_cells), None, *scalars,
        )  # fmt: skip


DTYPE_CASES = [LayerNorm(dtype=T, param_dtype=W, residual=True, dropout=True) for T, W in DTYPES]
PATH_CASES = [LayerNorm(), LayerNorm(C=40000), LayerNorm(C=96, P=3136), LayerNorm(C=1000, rms=True, from_output=True)]
ALL_CASES = [
    LayerNorm(C=C, dtype=T, param_dtype=W, **features)
    for C in (16384, 8191, 64, 3)
    for T, W in ((F64, F64), (F32, F32), (BF16, F32))
    for features in ({}, {"residual": True}, {"residual": True, "dropout": True}, {"from_output": True})
]
ALL_CASES += [
    LayerNorm(C=C, P=P, dtype=T, param_dtype=W, from_output=from_output)
    for C, P in ((96, 3136), (384, 196), (2048, 196))
    for T, W in ((F64, F64), (F32, F32), (BF16, F32))
    for from_output in (False, True)
]
# Every row of the tables in kernels/triton/attention.py up to 128, and the features that weigh most.
ATTENTION_CASES = [Attention(mask=BF16, dmask=True, dropout=True)]
ALL_ATTENTION_CASES = [
    Attention(),
    Attention(dtype=F16, D=128, packed=True, grouped=True),
    Attention(dtype=F16, mask=F16, dmask=True, dropout=True),
    Attention(D=128, mask=BF16, dmask=True, dropout=True),
    Attention(dtype=F32, D=128),
    Attention(dtype=F32, mask=F32, dmask=True, dropout=True),
    Attention(dtype=F32, D=128, softcap=30.0, slopes=True),
    Attention(dtype=F64, mask=F64, dmask=True, dropout=True),
    Attention(dtype=F64, D=128),
]
# Head sizes above 128, an fp32 mask on 16-bit rows, and everything at once: a few registers lie in the stack.
EVERYTHING = {"dmask": True, "dropout": True, "softcap": 30.0, "slopes": True, "window": True, "packed": True}
CROWDED_ATTENTION_CASES = [
    Attention(mask=BF16, spill=64, **EVERYTHING),
    Attention(mask=F32, dmask=True, dropout=True, spill=64),
    Attention(D=256, mask=BF16, dropout=True, spill=64),
    Attention(D=512, spill=64),
    Attention(dtype=F32, D=300, mask=F32, dmask=True, dropout=True, spill=64),
]

RECURRENT_CASES = [Recurrent(H=64), Recurrent(norms=True, projected=True)]
# ptxas gives up to three registers (24 bytes) of a whole sequence with norms, so that two programs fit.
NORMS = {"norms": True, "spill": 24}
ALL_RECURRENT_CASES = [
    Recurrent("lstm", H, dtype, **features)
    for H, dtype in ((64, BF16), (256, F32), (128, F64))
    for features in ({}, {"options": True}, NORMS, NORMS | {"projected": True})
]
ALL_RECURRENT_CASES += [
    Recurrent(cell, H, dtype, options=True) for cell in ("gru", "rnn_tanh") for H, dtype in ((64, BF16), (512, F16))
]


def compile_cases(capability: int, cases: list[Case]) -> list[dict[str, Any]]:
    """What became of every kernel that the cases launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    modules = {
        name: importlib.import_module(f"pyops._triton.{name}") for name in ("layer_norm", "attention", "recurrent")
    }
    for name, module in modules.items():
        module._multiprocessors = lambda _: 132
        if name != "layer_norm":
            module._roomy = lambda _: capability in (90, 100)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found: dict[str, dict[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash in found:
            return
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [cuobjdump, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
        found[kernel.hash] = {
            "kernel": self.__name__,
            "case": str(case),
            "warps": options["num_warps"],
            "registers": int(registers),
            "stack": int(stack) + int(local),
            "shared": kernel.metadata.shared,
            "fp_fusion_set": "enable_fp_fusion" in options,
            "shared_limit": SHARED_LIMIT[capability],
            "spill": case.spill,
            "wide": case.wide,
            "wide_loads": len(WIDE_LOAD.findall(kernel.asm["ptx"])),
            "wide_stores": len(WIDE_STORE.findall(kernel.asm["ptx"])),
        }

    JITFunction.run = compile_only
    for case in cases:
        case.run(modules[case.module])
    return list(found.values())


def compiled(tmp_path: Path, capability: int, cases: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, __file__, str(capability), cases]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def spills(kernel: dict[str, Any]) -> bool:
    """A spill lies in the stack frame; nothing else in these kernels needs one.

    Below the limit on registers, ptxas gives up one register (8 bytes of stack) when one more program then fits a
    multiprocessor. That is its choice, not a shortage.
    """
    limit = min(255, 65536 // (32 * kernel["warps"]))
    return kernel["stack"] > max(kernel["spill"], 8 if kernel["registers"] < limit else 0)


def check(kernels: list[dict[str, Any]], names: set[str]) -> None:
    assert {k["kernel"] for k in kernels} == names
    assert [k for k in kernels if spills(k)] == []
    assert [k for k in kernels if k["shared"] > k["shared_limit"]] == []
    assert [k for k in kernels if not k["fp_fusion_set"]] == []
    wide = [k for k in kernels if k["wide"]]
    assert [k for k in wide if not k["wide_loads"] and "dmask_reduce" not in k["kernel"]] == []
    assert [k for k in wide if not k["wide_stores"] and not any(part in k["kernel"] for part in SUMS)] == []


@pytest.mark.parametrize(
    "capability", [c if c == 90 else pytest.param(c, marks=pytest.mark.full) for c in CAPABILITIES]
)
def test_kernels_compile_well(tmp_path: Path, capability: int) -> None:
    pytest.importorskip("triton")
    kernels = compiled(tmp_path, capability, "DTYPE_CASES")
    assert sum("reduce" not in k["kernel"] for k in kernels) == 2 * len(DTYPES)
    check(kernels, LAYER_NORM_KERNELS)


def test_paths_compile_well(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    check(compiled(tmp_path, 90, "PATH_CASES"), LAYER_NORM_KERNELS)


@pytest.mark.full
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_paths_compile_well(tmp_path: Path, capability: int) -> None:
    pytest.importorskip("triton")
    check(compiled(tmp_path, capability, "ALL_CASES"), LAYER_NORM_KERNELS)


def test_attention_compiles_well(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    check(compiled(tmp_path, 90, "ATTENTION_CASES"), ATTENTION_KERNELS)


@pytest.mark.full
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_of_attention_compiles_well(tmp_path: Path, capability: int) -> None:
    pytest.importorskip("triton")
    check(compiled(tmp_path, capability, "ALL_ATTENTION_CASES"), ATTENTION_KERNELS)


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 120])
def test_crowded_attention_compiles(tmp_path: Path, capability: int) -> None:
    pytest.importorskip("triton")
    check(compiled(tmp_path, capability, "CROWDED_ATTENTION_CASES"), ATTENTION_KERNELS)


def test_recurrent_compiles_well(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    check(compiled(tmp_path, 90, "RECURRENT_CASES"), RECURRENT_KERNELS)


@pytest.mark.full
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_of_recurrent_compiles_well(tmp_path: Path, capability: int) -> None:
    pytest.importorskip("triton")
    check(compiled(tmp_path, capability, "ALL_RECURRENT_CASES"), RECURRENT_KERNELS)


def test_import_of_pyops_leaves_the_kernels_alone() -> None:
    subprocess.run([sys.executable, "-c", "import sys, pyops; assert 'pyops._triton' not in sys.modules"], check=True)


if __name__ == "__main__":
    print(json.dumps(compile_cases(int(sys.argv[1]), globals()[sys.argv[2]])))
