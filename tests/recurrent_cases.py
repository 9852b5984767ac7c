"""Cases of the recurrent layers, their inputs, and their results by pyops, by torch and in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from conftest import Target
from oracle import Oracle
from torch import Tensor

from pyops import recurrent
from pyops.recurrent import GATES, HAS_CELLS, Config

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
N_STATES = 17  # where h0, c0, keep, reset, seed and offsets stand among the tensors of a layer


@dataclass(frozen=True)
class Case:
    """One layer, as the kernels see it."""

    cell: str
    steps: int = 5
    batch: int = 3
    hidden: int = 9
    features: int = 4
    directions: int = 1
    dtype: torch.dtype = F64
    packed: bool = False
    batch_first: bool = False
    states: bool = True
    bias: bool = True
    keep: bool = False
    reset: bool = False
    zoneout: float = 0.0  # of h, and of c unless it has its own
    zoneout_c: float | None = None
    eps: float = 1e-5
    training: bool = True
    peephole: bool = False
    norm: bool = False
    proj: bool = False  # to half of the hidden size

    def __str__(self) -> str:
        plain = Case("")
        shown = [f"{n}={v}" for n, v in vars(self).items() if n != "cell" and v != getattr(plain, n)]
        return " ".join([self.cell, *shown]).replace("torch.", "")

    @property
    def config(self) -> Config:
        has_cells = self.cell in HAS_CELLS
        of_c = self.zoneout if self.zoneout_c is None else self.zoneout_c
        return Config(
            self.cell, self.steps, self.batch, self.batch_first, self.zoneout, of_c if has_cells else 0.0, self.eps,
            True, True, "cpu",
        )  # fmt: skip


def valid(case: Case) -> bool:
    lstm = case.cell in HAS_CELLS
    return (lstm or not (case.peephole or case.proj or case.zoneout_c)) and not (case.packed and case.batch_first)


def inputs(case: Case) -> list[Tensor | None]:
    """The tensors of a layer, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(case.steps * 31 + case.hidden)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(case.dtype)

    G, H, D, B, P = (
        GATES[case.cell],
        case.hidden,
        case.directions,
        case.batch,
        case.hidden // 2 if case.proj else case.hidden,
    )
    offsets = None
    N = case.steps * B
    if case.packed:
        lengths = torch.randint(1, case.steps + 1, (B,), generator=generator).sort(descending=True).values
        lengths[0] = case.steps
        sizes = (lengths > torch.arange(case.steps)[:, None]).sum(1)
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        N = int(offsets[-1])
    scale = H**-0.5
    tensors: list[Tensor | None] = [normal(N, case.features)]
    lstm = case.cell in HAS_CELLS
    for d in range(2):
        if d == D:
            tensors += [None] * 8
            continue
        tensors += [
            normal(G * H, case.features) * 0.5, normal(G * H, P) * scale,
            normal(G * H) if case.bias else None, normal(G * H) if case.bias else None,
            normal(P, H) * scale if case.proj else None,
            normal(G - 1, H) * 0.5 if case.peephole else None,
            1 + normal(G * H) * 0.2 if case.norm else None, 1 + normal(2, H) * 0.2 if case.norm and lstm else None,
        ]  # fmt: skip
    keep = (torch.rand(D, B, P, generator=generator) > 0.3).to(case.dtype) / 0.75 if case.keep else None
    reset = torch.rand(N, generator=generator) < 0.2 if case.reset else None
    seed = torch.tensor([3, 5]) if (case.zoneout or case.zoneout_c) and case.training else None
    return [
        *tensors, normal(D, B, P) if case.states else None, normal(D, B, H) if case.states and lstm else None, keep,
        reset, seed, offsets,
    ]  # fmt: skip


def leaves(tensors: list[Tensor | None]) -> list[int]:
    """The tensors that have a gradient; recurrent dropout's mask is a constant."""
    return [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point() and i != N_STATES + 2]


NAMES = ("y", "h_n", "c_n", "gates", "cells")


def results(case: Case, tensors: list[Tensor | None], backend: str) -> dict[str, Tensor]:
    """Outputs and gradients; ``backend`` "definition" computes in the dtype of the tensors."""
    tensors = list(tensors)
    for i in leaves(tensors):
        tensors[i] = tensors[i].detach().requires_grad_()
    if backend == "definition":
        found = recurrent.definition(tensors, case.config)
    else:
        found = recurrent._run(tensors, case.config._replace(backend=backend))
    named = {n: t for n, t in zip(NAMES, found) if t is not None}
    outputs = [t for n, t in named.items() if n != "gates"]
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(t.shape, generator=generator, dtype=F64).to(t) for t in outputs]
    wanted = leaves(tensors)
    gradients = torch.autograd.grad(outputs, [tensors[i] for i in wanted], grads)
    return {n: t.detach() for n, t in named.items()} | {f"d{i}": g for i, g in zip(wanted, gradients)}


def exact(case: Case, tensors: list[Tensor | None]) -> dict[str, Tensor]:
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    return results(replace(case, dtype=F64), wide, "definition")


def on(target: Target, cases: Iterable[Case]) -> list[Case]:
    """The cases that the backend serves. Triton's interpreter multiplies the raw bits of bfloat16."""
    raw = target.name == "triton" and target.device == "cpu"
    return [c for c in cases if valid(c) and not (raw and c.dtype == BF16)]


def torch_own(case: Case, tensors: list[Tensor | None]) -> dict[str, Tensor]:
    """The same formulas by torch's operators in the case's own dtype, as a loop of torch's own cells computes them."""
    acc = recurrent._acc
    recurrent._acc = lambda dtype: dtype
    try:
        found = results(case, tensors, "definition")
    finally:
        recurrent._acc = acc
    return {n: t.to(acc(case.dtype)) if n == "cells" else t for n, t in found.items()}


def judge(oracle: Oracle, case: Case, backend: str) -> None:
    tensors = inputs(case)
    sides = [results(case, tensors, backend), torch_own(case, tensors), exact(case, tensors)]
    if case.cell == "rnn_relu":
        # A gradient jumps where a sum is within rounding of 0; those are compared in float64 alone.
        sides = [{n: side[n] for n in ("y", "h_n", "gates")} for side in sides]
    oracle.check_all(case, *sides)
