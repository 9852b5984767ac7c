"""The tolerance rule of every numerical test; no test file picks a tolerance of its own.

A result is judged by its error against the float64 result, in the units of that result's largest element. Dividing by
the result, not by what went into it, keeps cancellation visible; dividing by the largest element, not by each, keeps
elements that happen to lie near 0 from deciding.

* every case: error <= 2 x the error of torch's own result of the same dtype + a rounding floor. The floor is half an
  ulp of the storage dtype (the last rounding) and four ulps of the accumulation dtype.
* all cases of a test that covers the operation (``mean=True``): geometric mean of error / torch's error <= 1. Both are
  raised by half an ulp of the accumulation dtype, so that a case which torch hits by luck has no infinite weight. The
  ratio of single cases scatters widely around 1, so a mean of few of them would say nothing.

float64 has no wider reference: what is called exact is off by as much. Its floor is 64 ulps, its cases do not count in
the mean, and its gradients go through gradcheck as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor

MOST_OVER_TORCH = 2.0
MOST_OVER_TORCH_MEAN = 1.0
ENOUGH_FOR_MEAN = 50
FLOOR_ACC_ULPS = 4
FLOOR_FLOAT64_ULPS = 64


def storage_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def acc_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def floor(dtype: torch.dtype) -> float:
    """The error that is always allowed."""
    if dtype == torch.float64:
        return FLOOR_FLOAT64_ULPS * storage_ulp(dtype)
    return storage_ulp(dtype) / 2 + FLOOR_ACC_ULPS * acc_ulp(dtype)


def error(result: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """Largest deviation from the float64 result over that result's largest element (or over ``scale``).

    NaN and infinity have to stand where they stand in ``exact``, with the same sign; otherwise the error is infinite.
    """
    assert exact.dtype == torch.float64, "the reference must be float64"
    result, exact = result.detach().double().cpu(), exact.detach().cpu()
    if result.shape != exact.shape:
        return math.inf
    finite = exact.isfinite()
    special, expected = (torch.where(finite, 0.0, t).nan_to_num(nan=7.0) for t in (result, exact))
    if not torch.equal(special, expected):
        return math.inf
    if not finite.any():
        return 0.0
    deviation = (result - exact)[finite].abs().max().item()
    if math.isnan(deviation):
        return math.inf
    scale = exact[finite].abs().max().item() if scale is None else scale
    if scale == 0.0:
        return 0.0 if deviation == 0.0 else math.inf
    return deviation / scale


class Oracle:
    """Collects the cases of one test; at the end of the block raises when one of them, or their mean, is too far off.

    with Oracle("layer_norm forward on cpu", mean=True) as oracle:
        for case in cases:
            oracle.check(case, ours, torch's, exact)
    """

    def __init__(self, name: str, *, mean: bool = False):
        self.name = name
        self.mean = mean
        self.cases = 0
        self.failures: list[str] = []
        self.log_ratios: list[tuple[float, str]] = []

    def check(self, case: object, ours: Tensor, theirs: Tensor, exact: Tensor, scale: float | None = None) -> None:
        """One result. ``theirs`` is torch's own result in the same dtype, ``exact`` the float64 one.

        ``scale`` replaces the largest element of ``exact``, where that one is 0 by construction.
        """
        self.cases += 1
        if ours.dtype != theirs.dtype or ours.shape != exact.shape:
            self.failures.append(
                f"{case}: got {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} {tuple(exact.shape)}"
            )
            return
        mine, torchs = error(ours, exact, scale), error(theirs, exact, scale)
        allowed = MOST_OVER_TORCH * torchs + floor(ours.dtype)
        if not mine <= allowed:
            self.failures.append(f"{case}: error {mine:.3g}, allowed {allowed:.3g} (torch has {torchs:.3g})")
        elif ours.dtype != torch.float64 and torchs < math.inf:
            half = acc_ulp(ours.dtype) / 2
            self.log_ratios.append((math.log((mine + half) / (torchs + half)), str(case)))

    def check_all(
        self,
        case: object,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
        scales: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Several named results of one case; every side must have the same names."""
        if not ours.keys() == theirs.keys() == exact.keys():
            self.failures.append(f"{case}: got {sorted(ours)}, torch {sorted(theirs)}, exact {sorted(exact)}")
            return
        for name in exact:
            self.check(f"{case} {name}", ours[name], theirs[name], exact[name], scales.get(name))

    @property
    def mean_ratio(self) -> float:
        """Geometric mean of our error over torch's."""
        return math.exp(sum(r for r, _ in self.log_ratios) / len(self.log_ratios)) if self.log_ratios else 0.0

    def __enter__(self) -> Oracle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        if self.cases == 0:
            raise AssertionError(f"{self.name}: no case was checked")
        if self.failures:
            shown = "\n  ".join(self.failures[:20])
            count = f"{len(self.failures)} of {self.cases} results are too far off"
            raise AssertionError(f"{self.name}: {count}\n  {shown}")
        if self.mean and len(self.log_ratios) < ENOUGH_FOR_MEAN:
            raise AssertionError(f"{self.name}: {len(self.log_ratios)} results are too few for a mean")
        if self.mean and self.mean_ratio > MOST_OVER_TORCH_MEAN:
            largest = sorted(self.log_ratios)[-8:]
            worst = "\n  ".join(f"{math.exp(ratio):.3g} x torch's error: {case}" for ratio, case in largest)
            raise AssertionError(
                f"{self.name}: the errors are {self.mean_ratio:.4g} x torch's in geometric mean, "
                f"allowed {MOST_OVER_TORCH_MEAN}; the largest:\n  {worst}"
            )
