"""What is measured and whether it is right: cases, input sets, providers, and their errors against float64."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A provider is right when the error of every output and gradient, relative in L2 and elementwise relative to
# |value| + rms, is below this, or below twice that of the definition in the same dtype (torch sums bf16 parameter
# gradients in bf16: 5 to 13 % off at these sizes), but never above CEILING. The errors themselves are reported.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CEILING = 0.3, 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one size, and all that has to be known to measure and judge it.

    inputs(generator, device) -> {name: tensor}, in the order of the arguments; gradients are taken with respect to
    those that require them. `eager` is the definition in plain torch, `ours(backend)` a function of the same arguments.
    `nbytes` and `flops` hold, per mode, what must move and be computed. `reference(got, *inputs64)` gives the expected
    outputs where they depend on what was drawn (dropout); `got` holds the outputs and gradients to be judged. A
    `tolerance` of its own is for a case whose reference is right only on average; it bounds the relative error in L2,
    and the results as a whole must not be larger or smaller than the reference by more than 5 %.
    """

    op: str
    function: str
    group: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[[torch.Generator, torch.device], dict[str, Tensor]]
    eager: Callable
    ours: Callable[[str], Callable]
    nbytes: dict[str, int]
    flops: dict[str, int]
    modes: tuple[str, ...] = ("fwd", "bwd", "fwd_bwd")
    outputs: tuple[str, ...] = ("y",)
    label: str = ""
    params: dict = dataclasses.field(default_factory=dict)
    reference: Callable | None = None
    tolerance: float | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.function, "x".join(map(str, self.shape)), self.label)))


@dataclasses.dataclass
class Provider:
    """One implementation of a case: what is called, whether it is ours, and, after timing, what was found."""

    name: str
    fn: Callable
    ours: bool = False
    failure: str = ""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    strides: tuple | None = None
    samples: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason


class InputSet:
    """Inputs of one call and the gradients that flow into its outputs, in whichever layout a provider returned."""

    def __init__(self, case: Case, seed: int, device: torch.device, output_shapes: list[torch.Size] | None = None):
        generator = torch.Generator(device).manual_seed(seed)
        self.named = case.inputs(generator, device)
        self.args = tuple(self.named.values())
        self.wrt = [t for t in self.args if t.requires_grad]
        if output_shapes is None:
            with torch.no_grad():
                output_shapes = [t.shape for t in as_tuple(case.eager(*self.args))]
        self.output_shapes = output_shapes
        self.grads = [
            torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)
            for shape in output_shapes
        ]
        self._laid_out: dict[tuple, list[Tensor]] = {}

    def grads_like(self, strides: tuple) -> list[Tensor]:
        if strides not in self._laid_out:
            self._laid_out[strides] = [
                g if g.stride() == s else torch.empty_strided(g.shape, s, dtype=g.dtype, device=g.device).copy_(g)
                for g, s in zip(self.grads, strides)
            ]
        return self._laid_out[strides]


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _with_gradients(case: Case, named: dict[str, Tensor], outputs, grads: list[Tensor]) -> dict[str, Tensor]:
    wrt = {name: t for name, t in named.items() if t.requires_grad}
    computed = torch.autograd.grad(outputs, list(wrt.values()), grads)
    return dict(zip(case.outputs, outputs)) | {f"d{name}": g for name, g in zip(wrt, computed)}


@contextlib.contextmanager
def _poisoned_allocations(active: bool):
    """torch.empty returns NaN inside: an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if active:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Wrong(Exception):
    """A provider's result cannot be right; the message says why."""


class Judge:
    """Knows what a case must give for one set of random inputs.

    Outputs and gradients are compared with the definition in float64, and allowed twice the error that the definition
    has in the case's own dtype. A provider that writes to its inputs, or returns another shape or dtype, is wrong.
    """

    def __init__(self, case: Case, mode: str, seed: int, device: torch.device):
        self.case, self.forward_only = case, mode.endswith("fwd")
        self.given = InputSet(case, seed, device)
        self._expected: dict[str, Tensor] | None = None
        self.accepted = self.errors(Provider("definition", case.eager))

    def expected(self, got: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs, and gradients unless forward only, of the definition in float64."""
        if self._expected is not None:
            return self._expected
        case = self.case
        named = {
            name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for name, t in self.given.named.items()
        }
        outputs = as_tuple(case.reference(got, *named.values()) if case.reference else case.eager(*named.values()))
        if self.forward_only:
            want = dict(zip(case.outputs, outputs))
        else:
            want = _with_gradients(case, named, outputs, [g.double() for g in self.given.grads])
        want = {name: t.detach() for name, t in want.items()}
        if case.reference is None:
            self._expected = want
        return want

    def errors(self, provider: Provider, poison: bool = False) -> dict[str, tuple[float, float]]:
        """Runs `provider` once: (relative L2, largest elementwise) error of each output and gradient."""
        case, given = self.case, self.given
        watched = [(t, t.detach().clone()) for t in given.args]
        with _poisoned_allocations(poison), torch.set_grad_enabled(not self.forward_only):
            outputs = as_tuple(provider.fn(*given.args))
            provider.strides = tuple(t.stride() for t in outputs)
            if self.forward_only:
                got = dict(zip(case.outputs, outputs))
            else:
                grads = given.grads_like(provider.strides)
                watched += [(g, g.clone()) for g in grads]
                got = _with_gradients(case, given.named, outputs, grads)
        if not all(torch.equal(t, before) for t, before in watched):
            with torch.no_grad():
                for t, before in watched:
                    t.copy_(before)
            raise Wrong("writes to its inputs")
        got = {name: t.detach() for name, t in got.items()}
        found = {}
        for name, want in self.expected(got).items():
            value, dtype = got[name], case.dtype if name in case.outputs else given.named[name[1:]].dtype
            if value.shape != want.shape or value.dtype != dtype:
                raise Wrong(f"{name} is {tuple(value.shape)} {value.dtype}, not {tuple(want.shape)} {dtype}")
            difference, rms = value.double() - want, want.square().mean().sqrt()
            relative = difference.norm() / want.norm().clamp_min(1e-300)
            largest = (difference.abs() / (want.abs() + rms).clamp_min(1e-300)).max()
            if case.tolerance is not None:  # single elements say nothing; the size of all of them does
                largest = ((difference * want).sum() / want.square().sum().clamp_min(1e-300)).abs()
            found[name] = relative.item(), largest.item()
        return found

    def verify(self, provider: Provider, poison: bool = False) -> None:
        """Records the errors of `provider`, and why it is wrong if it is."""
        try:
            found = self.errors(provider, poison)
        except Wrong as wrong:
            return provider.fail(str(wrong))
        for name, pair in found.items():
            tolerance = TOLERANCE[self.case.dtype]
            limits = [min(top, max(tolerance, 2 * own)) for top, own in zip(CEILING, self.accepted[name])]
            if self.case.tolerance is not None:
                limits = [self.case.tolerance, 0.05]
            if not all(error <= limit for error, limit in zip(pair, limits)):  # NaN fails
                provider.fail(f"{name} is wrong: relative error {pair[0]:.1e}, largest {pair[1]:.1e}")
            provider.errors.setdefault(name, pair[0])
        return None
