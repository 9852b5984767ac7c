"""Proves that the tests' equipment sees what it must: switches off what orders or exchanges in the kernels, in turn.

A mutant is one place (kernel, file, line) that executes, with the barrier, exchange, matrix instruction, or the commit
of or wait for asynchronous copies there doing nothing. It is caught when a run is refused or gives other bits than the
correct kernel under one of a few seeds, or when ThreadSanitizer reports a race. The correct kernels give the same bits
under every seed and no report.

    python tests/simt/mutate.py [--no-tsan]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from simt import SimtBackend, Site, build, load

SEEDS = range(1, 9)

# (kernel, text of the line): why the kernel is right without it.
EQUIVALENT: dict[tuple[str, str], str] = {
    ("attention_fwd_kernel", "sync_warp();  // the tile is free"): (
        "the barrier in front of the last values already stands behind the last ldmatrix of queries; store_rows() is "
        "also for kernels that have none there"
    ),
}


KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "cuda"
PLACES = re.compile(
    r"\b(sync_block|sync_warp|shfl|shfl_down|shfl_xor|warp_reduce_sum|ballot|warp_any|warp_all"
    r"|ldmatrix|stmatrix|mma_16x8x16|mma_16x8x8_tf32|mma_8x8x4_f64|cp_async_commit|cp_async_wait|store_stamped|await_stamped)(<[^;()]*>)?\("
)
WRAPPERS = ("common.cuh", "mma.cuh")
# What orders memory, so that ThreadSanitizer must miss it.
ORDERING = ("sync_block", "sync_warp", "cp_async_commit", "cp_async_wait")


@dataclass(frozen=True)
class LayerNorm:
    """One forward and backward call. The sizes are those where the kernels divide the work differently."""

    R: int
    C: int
    P: int = 1
    dtype: torch.dtype = torch.float32
    rms: bool = False
    p: float = 0.0  # of dropout; with it there are a residual and dsum

    def run(self, backend: SimtBackend) -> list[Tensor]:
        """All outputs of forward and backward; the inputs depend on the case alone."""
        g = torch.Generator().manual_seed(self.R * self.C)
        acc, dropout = torch.float32, self.p > 0

        def data(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(self.dtype)

        shape = (self.R, self.C) if self.P == 1 else (self.R // self.P, self.C, self.P)
        x, dy, weight, bias = data(*shape), data(*shape), data(self.C), data(self.C)
        residual, dsum = (data(*shape), data(*shape)) if dropout else (None, None)
        seed = torch.tensor([5, 7]) if dropout else None
        y, dx, dweight, dbias = (torch.empty_like(t) for t in (x, x, weight, bias))
        total, dresidual = (torch.empty_like(x), torch.empty_like(x)) if dropout else (None, None)
        mean, rstd = (None if self.rms else torch.empty(self.R, dtype=acc)), torch.empty(self.R, dtype=acc)
        workspace = torch.empty(backend.layer_norm_bwd_workspace(x, self.C, self.P), dtype=acc)

        sizes = (self.C, self.P)
        saved = total if dropout else x
        backend.layer_norm_fwd(
            x, residual, weight, bias, seed, y, total, mean, rstd, *sizes, 1e-5, 0.0, self.p, self.rms, 1
        )
        inputs = (dy, dsum, saved, weight, bias, mean, rstd, seed)
        options = (*sizes, 0.0, self.p, self.rms, False, 1)
        backend.layer_norm_bwd(*inputs, dx, dresidual, dweight, dbias, workspace, *options)
        alone = torch.empty_like(x)  # dx without dweight and dbias
        backend.layer_norm_bwd(*inputs, alone, dresidual, None, None, workspace, *options)
        outputs = (y, total, mean, rstd, dx, dresidual, dweight, dbias, alone)
        return [t for t in outputs if t is not None]


@dataclass(frozen=True)
class Attention:
    """One forward and backward call. All heads share their keys."""

    L: int
    S: int
    D: int
    H: int = 2
    p: float = 0.0  # of dropout; with it there is a bias of the keys, and its gradient
    lengths: tuple[tuple[int, int], ...] = ()  # of the queries and keys of packed sequences, which are causal

    def run(self, backend: SimtBackend) -> list[Tensor]:
        """As above."""
        g = torch.Generator().manual_seed(self.L * self.S)

        def data(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(torch.bfloat16)

        q, dout, k, v = (data(1, *shape, self.D) for shape in [(self.H, self.L)] * 2 + [(1, self.S)] * 2)
        bias = data(1, 1, 1, self.S).expand(1, self.H, self.L, self.S) if self.p > 0 else None
        seed = torch.tensor([5, 7]) if self.p > 0 else None
        ends, longest = [None, None], (self.L, self.S)
        if self.lengths:
            ends = [torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in zip(*self.lengths)]
            longest = tuple(max(n) for n in zip(*self.lengths))
        out, stats = torch.empty_like(q), torch.empty(2, 1, self.H, self.L)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        dbias = torch.empty(1, 1, 1, self.S) if self.p > 0 else None

        inputs = (q, k, v, bias, None, None, seed, *ends)
        sizes = (q, k, v, bias, ends[0], *longest)
        options = (self.D**-0.5, -1, 0 if self.lengths else -1, False, 0.0, self.p, *longest, 1)
        workspace = torch.empty(backend.attention_fwd_workspace(*sizes))
        backend.attention_fwd(*inputs, out, None, stats, workspace, *options, True)
        workspace = torch.empty(backend.attention_bwd_workspace(*sizes, dbias is not None))
        backend.attention_bwd(dout, None, *inputs, out, None, stats, dq, dk, dv, dbias, workspace, *options)
        return [t for t in (out, stats, dq, dk, dv, dbias) if t is not None]


@dataclass(frozen=True)
class Recurrent:
    """One forward and backward call of an LSTM layer."""

    T: int
    B: int
    H: int
    dtype: torch.dtype = torch.float32
    everything: bool = False  # peepholes, normalised gates and a projection

    def run(self, backend: SimtBackend) -> list[Tensor]:
        """As above."""
        g = torch.Generator().manual_seed(self.T * self.H)
        backend.set_multiprocessors(8)
        T, B, H, acc = self.T, self.B, self.H, torch.float32
        P = H // 2 if self.everything else H

        def data(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=g) * 0.5).to(self.dtype)

        def option(*shape: int) -> Tensor | None:
            return data(*shape) if self.everything else None

        gx, w_hh, dy = data(T * B, 4 * H), data(4 * H, P) * H**-0.5, data(T * B, P)
        options = (None, option(P, H), option(3, H), option(4 * H), option(2, H))  # b_n first
        call = ("lstm", T, B, False, 0.0, 0.0, 1e-5, 1)
        sizes = (gx, w_hh, options[1], options[3], None, None, *call[:3])
        states = (data(1, B, P), data(1, B, H), None, None, None, None)  # h0 and c0
        inputs = (gx, w_hh, *options, *[None] * 7, *states)  # no second direction

        y, h_n, c_n = (torch.empty(*shape, dtype=self.dtype) for shape in ((T * B, P), (1, B, P), (1, B, H)))
        gates, cells = torch.empty(1, T * B, 4 * H, dtype=self.dtype), torch.empty(1, T * B, H)
        workspace = torch.empty(backend.recurrent_fwd_workspace(*sizes))
        backend.recurrent_fwd(*inputs, y, h_n, c_n, gates, cells, workspace, *call)

        products = data(1, T * B, 4 * H).to(acc) if self.everything else None
        dgx, dm = torch.empty_like(gates), torch.empty(1, T * B, P) if self.everything else None
        dp = torch.empty_like(gates) if self.everything else None
        sums = [torch.empty(1, n, H) if self.everything or n == 4 else None for n in (4, 3)]
        sums += [torch.empty(1, 4 * H), torch.empty(1, 2, H)] if self.everything else [None, None]
        dh0, dc0 = torch.empty(1, B, P), torch.empty(1, B, H)
        outputs = (dgx, dp, dm, *sums, dh0, dc0)
        workspace = torch.empty(backend.recurrent_bwd_workspace(*sizes))
        backend.recurrent_bwd(dy, None, None, None, *inputs, y, gates, cells, products, *outputs, workspace, *call)
        backend.set_multiprocessors(4)
        return [t for t in (y, h_n, c_n, gates, cells, *outputs) if t is not None]


Case = LayerNorm | Attention | Recurrent

CASES: list[Case] = [
    LayerNorm(70, 8),  # several rows to a warp
    LayerNorm(9, 200, p=0.3),  # a warp to a row
    LayerNorm(9, 203, rms=True, p=0.3),  # single elements
    LayerNorm(5, 1536, dtype=torch.bfloat16),  # several warps to a row
    LayerNorm(3, 1537),  # the same, single elements
    LayerNorm(2, 4099),  # longer than the registers of a backward block
    LayerNorm(2, 16387),  # longer than the registers of a forward block
    LayerNorm(75, 40, P=25),  # channels first, few channels
    LayerNorm(50, 900, P=25),  # many channels
    Attention(70, 300, 24),  # several tiles of queries and of keys
    Attention(2, 300, 64),  # few queries: the keys are split
    Attention(70, 72, 72, H=3, p=0.2),  # everything; several tiles of queries and heads share a tile of the bias
    Attention(20, 40, 136),  # dk and dv apart
    Attention(75, 60, 8, lengths=((5, 40), (70, 20))),
    Recurrent(2, 3, 70, everything=True),  # a step at a time
    Recurrent(5, 9, 40, torch.bfloat16),  # one block has all units
    Recurrent(5, 9, 150, torch.bfloat16),  # blocks share the units
    Recurrent(5, 9, 110),  # the same without matrix instructions
]


def written_places() -> set[tuple[str, int]]:
    """File and line of every place that stands in a kernel's source, executed or not."""
    return {
        (path.name, number)
        for path in KERNELS.glob("*.cu*")
        if path.name not in WRAPPERS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PLACES.search(line.split("//")[0])
    }


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b))


@dataclass
class Mutant:
    """A place, and what switching it off did."""

    site: Site
    text: str  # of the line
    results: str = ""  # how the results or a report gave it away
    tsan: bool | None = None  # whether ThreadSanitizer did; None: not asked

    @property
    def equivalent(self) -> str:
        return EQUIVALENT.get((self.site.kernel, self.text), "")

    @property
    def caught(self) -> bool:
        return bool(self.results or self.tsan)

    def __str__(self) -> str:
        place = f"{self.site.kernel} {Path(self.site.file).name}:{self.site.line} {self.site.what}"
        seen = [self.results] if self.results else []
        seen += ["ThreadSanitizer reports it"] if self.tsan else []
        verdict = "; ".join(seen) or (f"equivalent: {self.equivalent}" if self.equivalent else "NOT CAUGHT")
        return f"{place}: {verdict}"


def seen_in_results(backend: SimtBackend, cases: list[tuple[Case, list[Tensor]]]) -> str:
    for seed in SEEDS:
        backend.set_seed(seed)
        for case, correct in cases:
            try:
                if not same_bits(case.run(backend), correct):
                    return f"wrong results of {case}, seed {seed}"
            except RuntimeError as error:
                return f"refused: {error}"
    return ""


def tsan(program: Path, *options: str) -> int:
    """Exit status of the ThreadSanitizer program: 0 is silence, 66 a report."""
    # Its older runtimes refuse the address randomisation of newer kernels.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    if subprocess.run([*fixed, "true"], capture_output=True).returncode != 0:  # some containers forbid it
        fixed = []
    return subprocess.run([*fixed, program, *options], capture_output=True, timeout=300).returncode


def mutants(with_tsan: bool = True) -> Iterator[Mutant]:
    """Every place that executes, switched off. Raises when the correct kernels are not right themselves."""
    backend = load()
    program = build("tsan") if with_tsan else Path()  # now: both are of the same sources
    reached: dict[Site, list[tuple[Case, list[Tensor]]]] = {}
    for case in CASES:
        backend.set_seed(0)
        backend.record_sites(True)
        correct = case.run(backend)
        for site in backend.sites():
            key = Site(site.kernel, site.file, site.line, site.what, calls=0)
            reached.setdefault(key, []).append((case, correct))
        backend.record_sites(False)
        if different := seen_in_results(backend, [(case, correct)]):
            raise AssertionError(f"{case}: without a mutant: {different}")
    if with_tsan and tsan(program) != 0:
        raise AssertionError("ThreadSanitizer reports a race in the kernels as they are")

    for site, cases in sorted(reached.items(), key=lambda item: (item[0].file, item[0].line, item[0].kernel)):
        mutant = Mutant(site, Path(site.file).read_text().splitlines()[site.line - 1].strip())
        backend.disable(site.file, site.line, site.kernel)
        try:
            mutant.results = seen_in_results(backend, cases)
        finally:
            backend.enable_all()
        if with_tsan and site.what in ORDERING:
            mutant.tsan = tsan(program, "--disable", site.kernel, Path(site.file).name, str(site.line)) == 66
        yield mutant
    backend.set_seed(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-tsan", action="store_true", help="judge by results and reports alone")
    survivors = 0
    for found in mutants(with_tsan=not parser.parse_args().no_tsan):
        print(found, flush=True)
        survivors += not (found.caught or found.equivalent)
    sys.exit(1 if survivors else 0)
