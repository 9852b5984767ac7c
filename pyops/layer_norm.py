"""Layer normalisation: definition, operators, autograd, public functions and modules.

Ba, Kiros, Hinton, "Layer Normalization" (2016); Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import autograd
from .autograd import acc_dtype as _acc
from .autograd import fail as _fail
from .autograd import present as _present
from .backend import (
    FLOATING,
    OPERATIONS,
    autocast_to_float,
    choose,
    cpu_kernels,
    functorch_active,
    is_autocast,
    is_compiling,
    is_plain,
    leaf,
    needs_definition,
)
from .philox import draw_seed, drop_scale, keep_mask

_get_num_threads = torch.get_num_threads
_grad_enabled = torch.is_grad_enabled


class Config(NamedTuple):
    """The plain values of a call, in the order of the operator's schema."""

    dims: int  # how many trailing dimensions are normalised
    channels_first: bool  # instead: dimension -3 of (..., C, H, W)
    eps: float
    weight_offset: float  # 1 for a zero-centred weight
    p: float  # dropout
    rms: bool
    from_output: bool  # save y rather than x
    backend: str


# ---- the definition ----


def _affine_shape(t: Tensor, like: Tensor, dims: int) -> Tensor:
    """A parameter, possibly with leading batch dimensions of its own, so that it broadcasts against ``like``."""
    lead = t.dim() - dims
    return t.reshape(*t.shape[:lead], *(1,) * (like.dim() - t.dim()), *t.shape[lead:]) if lead else t


def definition(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, c: Config
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd) in differentiable torch operators: what every kernel computes.

    h    = dropout(x, p) + residual        (x without residual)
    xhat = (h - mean(h)) * rsqrt(var(h) + eps)        or h * rsqrt(mean(h^2) + eps) for RMSNorm
    y    = xhat * (weight_offset + weight) + bias

    Arithmetic in float32 (float64 for float64); h is rounded to the dtype of x before the statistics.
    """
    acc = _acc(x.dtype)
    layout = torch.channels_last if c.channels_first and _is_channels_last(x) else torch.contiguous_format
    if c.channels_first:
        x = x.movedim(-3, -1)
    h = x
    if residual is not None:
        if seed is not None:
            C = math.prod(x.shape[x.dim() - c.dims :])
            keep = keep_mask(seed, x.numel() // C if C else 0, C, c.p).reshape(x.shape)
            h = torch.where(keep, (x.to(acc) * drop_scale(c.p)).to(x.dtype), 0.0)
        h = h + residual
    over = tuple(range(-c.dims, 0))
    wide = h.to(acc)
    mean = wide.mean(over, keepdim=True)
    centred = wide if c.rms else wide - mean
    # Divided by the deviation: the derivative of rsqrt forms its cube, which underflows for large x.
    deviation = torch.sqrt((centred * centred).mean(over, keepdim=True) + c.eps)
    y = centred / deviation
    if weight is not None:
        y = y * (_affine_shape(weight, y, c.dims).to(acc) + c.weight_offset)
    if bias is not None:
        y = y + _affine_shape(bias, y, c.dims).to(acc)
    y = y.to(x.dtype)
    mean, rstd = (s.reshape(s.shape[: s.dim() - c.dims]) for s in (mean, 1 / deviation))
    if c.channels_first:
        y, h = y.movedim(-1, -3), h.movedim(-1, -3)
    return y.contiguous(memory_format=layout), h, mean, rstd


def gradients(
    dy: Tensor,
    dsum: Tensor | None,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor | None,
    seed: Tensor | None,
    c: Config,
    batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight, dbias) in differentiable torch operators.

    ``saved`` is h, or y with ``from_output``. Without ``stats`` the statistics are computed from h, so that gradients
    flow through them. ``batch`` leading dimensions are not summed over in dweight and dbias.
    """
    acc = _acc(saved.dtype)
    if c.channels_first:
        dy, saved = dy.movedim(-3, -1), saved.movedim(-3, -1)
    over = tuple(range(-c.dims, 0))

    def column(s: Tensor) -> Tensor:
        return s.reshape(*s.shape, *(1,) * c.dims)

    wide, dwide = saved.to(acc), dy.to(acc)
    w = None if weight is None else _affine_shape(weight, wide, c.dims).to(acc) + c.weight_offset
    mean, rstd = (None, None) if stats is None else _mean_rstd(stats)
    if c.from_output:
        xhat = wide if bias is None else wide - _affine_shape(bias, wide, c.dims).to(acc)
        xhat = xhat if w is None else xhat / w
        rstd = column(rstd)
    elif rstd is None:
        centred = wide if c.rms else wide - wide.mean(over, keepdim=True)
        rstd = torch.rsqrt((centred * centred).mean(over, keepdim=True) + c.eps)
        xhat = centred * rstd
    else:
        rstd = column(rstd)
        if not c.rms:
            wide = wide - (wide.mean(over, keepdim=True) if mean is None else column(mean))
        xhat = wide * rstd
    g = dwide if w is None else dwide * w
    dh = g - xhat * (g * xhat).mean(over, keepdim=True)
    if not c.rms:
        dh = dh - g.mean(over, keepdim=True)
    dh = dh * rstd
    if dsum is not None:
        dh = dh + dsum.to(acc)
    dx = dh
    if seed is not None:
        C = math.prod(dh.shape[dh.dim() - c.dims :])
        keep = keep_mask(seed, dh.numel() // C, C, c.p).reshape(dh.shape)
        dx = torch.where(keep, dh * drop_scale(c.p), 0.0)
    lead = tuple(range(batch, max(dwide.dim(), wide.dim()) - c.dims))
    dweight, dbias = dwide * xhat, dwide.expand_as(xhat)
    if lead:
        dweight, dbias = dweight.sum(lead), dbias.sum(lead)
    dx, dresidual = dx.to(saved.dtype), dh.to(saved.dtype)
    param = next((t.dtype for t in (weight, bias) if t is not None), saved.dtype)
    if c.channels_first:
        dx, dresidual = dx.movedim(-1, -3), dresidual.movedim(-1, -3)
    return dx, dresidual, dweight.to(param), dbias.to(param)


# ---- leaves: allocate, then run a backend ----


def _sizes(x: Tensor, c: Config) -> tuple[int, int, tuple[int, ...]]:
    """Features C, pixels P per image (1 for rows), and the shape of the statistics."""
    shape = tuple(x.shape)
    if c.channels_first:
        return shape[-3], shape[-2] * shape[-1], shape[:-3] + shape[-2:]
    at = len(shape) - c.dims
    return math.prod(shape[at:]), 1, shape[:at]


def _as_rows(t: Tensor, C: int) -> Tensor:
    """t, or a [R, C] view of it with dense features, or a dense copy."""
    if t.is_contiguous():
        return t
    t = t.reshape(-1, C)
    return t if t.stride(1) == 1 else t.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _to_rows(t: Tensor | None) -> Tensor | None:
    """A channels_last (N, C, H, W) tensor as rows (N, H, W, C), which are dense."""
    return None if t is None else t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _mean_rstd(stats: Tensor) -> tuple[Tensor | None, Tensor]:
    """The rows of ``stats``: mean and rstd, or rstd alone (see _stats_rows)."""
    return (stats[0], stats[1]) if stats.shape[0] == 2 else (None, stats[0])


def _stats_rows(c: Config, dtype: torch.dtype) -> int:
    # On the CPU torch keeps two 16-bit numbers for a row of 16 bits, and so may we: its mean is computed again.
    return 1 if c.rms or c.from_output or (c.backend == "cpu" and dtype.itemsize == 2) else 2


_ROWS = {"dims": 1, "channels_first": False}


def forward_leaf(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    c: Config,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, sum, stats) on the kernels of ``c.backend``; what was not asked for is None."""
    if c.channels_first and _is_channels_last(x):
        y, total, stats = forward_leaf(_to_rows(x), None, weight, bias, None, c._replace(**_ROWS), statistics)
        return y.permute(0, 3, 1, 2), total, stats
    C, P, lead = _sizes(x, c)
    if c.channels_first:
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        x = _as_rows(x, C)
    total = stats = mean = rstd = None
    if residual is not None:
        total = torch.empty_like(y)
        residual = _as_rows(residual, C)
    if statistics:
        stats = torch.empty((_stats_rows(c, x.dtype), *lead), dtype=_acc(x.dtype), device=x.device)
        mean, rstd = _mean_rstd(stats)
    if weight is not None:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    leaf(c.backend, "layer_norm").layer_norm_fwd(
        x, residual, weight, bias, seed, y, total, mean, rstd, C, P, c.eps, c.weight_offset, c.p, c.rms,
        _get_num_threads(),
    )  # fmt: skip
    return y, total, stats


def backward_leaf(
    dy: Tensor,
    dsum: Tensor | None,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    c: Config,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dweight, dbias) on the kernels of ``c.backend``; None where ``needs`` says so."""
    if c.channels_first and _is_channels_last(saved):
        dx, _, dweight, dbias = backward_leaf(
            _to_rows(dy), None, _to_rows(saved), weight, bias, stats, None, c._replace(**_ROWS), needs
        )
        return None if dx is None else dx.permute(0, 3, 1, 2), None, dweight, dbias
    C, P, _ = _sizes(saved, c)
    need_x, need_residual, need_weight, need_bias = needs
    # Without dropout the residual's gradient is that of x.
    shared = need_residual and seed is None
    dx = torch.empty_like(saved, memory_format=torch.contiguous_format) if need_x or shared else None
    dresidual = torch.empty_like(saved, memory_format=torch.contiguous_format) if need_residual and not shared else None
    param = weight if weight is not None else bias
    dweight = dbias = workspace = None
    module = leaf(c.backend, "layer_norm")
    threads = _get_num_threads()
    mean, rstd = _mean_rstd(stats.contiguous())
    if not c.channels_first:
        dy, saved = _as_rows(dy, C), _as_rows(saved, C)
        dsum = None if dsum is None else _as_rows(dsum, C)
    else:
        dy, saved = dy.contiguous(), saved.contiguous()
    if need_weight or need_bias:
        dweight = torch.empty_like(param, memory_format=torch.contiguous_format) if need_weight else None
        dbias = torch.empty_like(param, memory_format=torch.contiguous_format) if need_bias else None
        size = module.layer_norm_bwd_workspace(saved, C, P)
        workspace = torch.empty(size, dtype=_acc(saved.dtype), device=saved.device) if size else None
    module.layer_norm_bwd(
        dy, dsum, saved,
        None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous(),
        mean, rstd, seed, dx, dresidual, dweight, dbias, workspace,
        C, P, c.weight_offset, c.p, c.rms, c.from_output, threads,
    )  # fmt: skip
    return (dx if need_x else None), (dx if shared else dresidual), dweight, dbias


# ---- the leaves as torch operators ----

_CONFIG = (
    "int dims, bool channels_first, float eps, float weight_offset, float p, bool rms, bool from_output, str backend"
)
_library = torch.library.Library("pyops", "FRAGMENT")
_library.define(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
    f"{_CONFIG}) -> (Tensor y, Tensor sum, Tensor stats)"
)
_library.define(
    "layer_norm_bwd(Tensor dy, Tensor? dsum, Tensor saved, Tensor? weight, Tensor? bias, Tensor stats, "
    f"Tensor? seed, {_CONFIG}, bool[4] needs) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)


def _absent(like: Tensor) -> Tensor:
    """An operator's output that was not asked for: schemas have no optional results."""
    return like.new_empty(0)


def _fwd_operator(x, residual, weight, bias, seed, *config):
    results = forward_leaf(x, residual, weight, bias, seed, Config(*config))
    return tuple(_present(t, x) for t in results)


def _bwd_operator(dy, dsum, saved, weight, bias, stats, seed, *config_needs):
    *config, needs = config_needs
    results = backward_leaf(dy, dsum, saved, weight, bias, stats, seed, Config(*config), needs)
    dx, dresidual, dweight, dbias = (_present(t, saved) for t in results)
    return dx, dresidual.clone() if dresidual is dx else dresidual, dweight, dbias


for _device in ("CPU", "CUDA"):
    _library.impl("layer_norm_fwd", _fwd_operator, _device)
    _library.impl("layer_norm_bwd", _bwd_operator, _device)


def _empty_output(x: Tensor, c: Config) -> Tensor:
    keep = c.channels_first and _is_channels_last(x)
    return torch.empty_like(x, memory_format=torch.channels_last if keep else torch.contiguous_format)


@torch.library.register_fake("pyops::layer_norm_fwd", lib=_library)
def _fwd_fake(x, residual, weight, bias, seed, *config):  # noqa: ARG001
    c = Config(*config)
    lead = x.shape[:-3] + x.shape[-2:] if c.channels_first else x.shape[: x.dim() - c.dims]
    total = _absent(x) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return _empty_output(x, c), total, x.new_empty((_stats_rows(c, x.dtype), *lead), dtype=_acc(x.dtype))


@torch.library.register_fake("pyops::layer_norm_bwd", lib=_library)
def _bwd_fake(dy, dsum, saved, weight, bias, stats, seed, *config_needs):  # noqa: ARG001
    *config, needs = config_needs
    c = Config(*config)
    param = weight if weight is not None else bias
    grads = [_empty_output(saved, c) if need else _absent(saved) for need in needs[:2]]
    for need in needs[2:]:
        grads.append(torch.empty_like(param, memory_format=torch.contiguous_format) if need else _absent(saved))
    return tuple(grads)


@torch.library.register_vmap("pyops::layer_norm_fwd", lib=_library)
def _fwd_vmap(info, in_dims, x, residual, weight, bias, seed, *config):
    op = torch.ops.pyops.layer_norm_fwd.default
    if seed is not None:
        return autograd.per_sample(op, info, in_dims, (x, residual, weight, bias, seed, *config))
    c = Config(*config)
    size = info.batch_size
    x, residual = autograd.batched_first(x, in_dims[0], size), autograd.batched_first(residual, in_dims[1], size)
    if in_dims[2] is None and in_dims[3] is None:
        flat = x.flatten(0, -4) if c.channels_first else x
        y, total, stats = op(flat, residual, weight, bias, None, *config)
        if c.channels_first:
            y, stats = y.unflatten(0, x.shape[:-3]), stats.unflatten(1, x.shape[:-3])
    else:
        weight, bias = (
            t if d is None else autograd.batched_first(t, d, size)
            for t, d in ((weight, in_dims[2]), (bias, in_dims[3]))
        )
        y, total, mean, rstd = definition(x, residual, weight, bias, None, c)
        total = _absent(x) if residual is None else total
        stats = torch.stack((mean, rstd)[2 - _stats_rows(c, x.dtype) :])
    return (y, total, stats), (0, None if residual is None else 0, 1)


@torch.library.register_vmap("pyops::layer_norm_bwd", lib=_library)
def _bwd_vmap(info, in_dims, dy, dsum, saved, weight, bias, stats, seed, *config_needs):
    if seed is not None:
        op = torch.ops.pyops.layer_norm_bwd.default
        return autograd.per_sample(op, info, in_dims, (dy, dsum, saved, weight, bias, stats, seed, *config_needs))
    *config, needs = config_needs
    size = info.batch_size
    dy, dsum, saved = (autograd.batched_first(t, d, size) for t, d in zip((dy, dsum, saved), in_dims))
    weight, bias = (
        t if d is None else autograd.batched_first(t, d, size) for t, d in ((weight, in_dims[3]), (bias, in_dims[4]))
    )
    stats = stats[:, None] if in_dims[5] is None else stats.movedim(in_dims[5], 1)
    # Per-sample parameter gradients are not what the kernels sum: the formula keeps the batch apart.
    found = gradients(dy, dsum, saved, weight, bias, stats, None, Config(*config), batch=1)
    results = tuple(g if need else _absent(saved) for g, need in zip(found, needs))
    return results, tuple(0 if need else None for need in needs)


# ---- autograd ----


class LayerNormRule(autograd.Rule):
    """Tensors: x, residual, weight, bias, seed. Saved: h or y, weight, bias, stats (None after a small direct call),
    seed."""

    name = "LayerNorm"
    config = Config
    n_tensors = 5
    n_saved = 5
    n_grads = 2  # of y, and of the sum (with residual) or of the statistics (with from_output)

    @staticmethod
    def forward(direct, tensors, config):
        x, residual, weight, bias, seed = tensors
        if direct:
            return forward_leaf(x, residual, weight, bias, seed, config)
        y, total, stats = torch.ops.pyops.layer_norm_fwd(x, residual, weight, bias, seed, *config)
        return y, None if residual is None else total, stats

    @staticmethod
    def outputs(results, config):
        y, total, stats = results
        if total is not None:
            return y, total
        # Gradients of higher order reach x through rstd too, when y stands for x.
        return (y, stats) if config.from_output else (y,)

    @staticmethod
    def saved(tensors, results, config):
        x, _, weight, bias, seed = tensors
        y, total, stats = results
        if config.from_output:
            return y, weight, bias, stats, seed
        return x if total is None else total, weight, bias if weight is None else None, stats, seed

    @staticmethod
    def _incoming(grads, saved, c):
        """dy (zeros when only the statistics were used), dsum, the gradient of the statistics."""
        dy, second = grads
        dy = torch.zeros_like(saved[0]) if dy is None else dy
        return (dy, None, second) if c.from_output else (dy, second, None)

    @staticmethod
    def _through_sum(dsum, seed, c):
        """The gradients when y was not used: of x and residual alone."""
        if dsum is None:
            return (None,) * 5
        dx = dsum
        if seed is not None:
            C = dsum.shape[-1]
            keep = keep_mask(seed, dsum.numel() // C, C, c.p).reshape(dsum.shape)
            dx = torch.where(keep, dsum.to(_acc(dsum.dtype)) * drop_scale(c.p), 0.0).to(dsum.dtype)
        return dx, dsum, None, None, None

    @staticmethod
    def _through_rstd(dstats, saved, c):
        """What a gradient of rstd adds to dx: d rstd / dx = -rstd^2 xhat / C."""
        y, weight, bias, stats, _ = saved
        drstd, rstd = dstats[0], stats[0]
        C, _, _ = _sizes(y, c)
        wide = y.movedim(-3, -1) if c.channels_first else y
        xhat = wide.to(rstd.dtype) if bias is None else wide - bias.to(rstd.dtype)
        xhat = xhat if weight is None else xhat / (weight.to(rstd.dtype) + c.weight_offset)
        scale = (-drstd * rstd * rstd / C).reshape(*rstd.shape, *(1,) * c.dims)
        dx = (scale * xhat).to(y.dtype)
        return dx.movedim(-1, -3) if c.channels_first else dx

    @classmethod
    def backward(cls, direct, grads, saved, c, needs):
        if grads[0] is None and not c.from_output:
            return cls._through_sum(grads[1], saved[4], c)
        dy, dsum, dstats = cls._incoming(grads, saved, c)
        h, weight, bias, stats, seed = saved
        if stats is None:
            _, _, stats = cls.forward(direct, (h, None, None, None, None), c._replace(p=0.0))
        wanted = needs[:4]
        if direct:
            dx, dresidual, dweight, dbias = backward_leaf(dy, dsum, h, weight, bias, stats, seed, c, wanted)
        else:
            found = torch.ops.pyops.layer_norm_bwd(dy, dsum, h, weight, bias, stats, seed, *c, wanted)
            dx, dresidual, dweight, dbias = (g if need else None for g, need in zip(found, wanted))
        if dstats is not None and dx is not None:
            dx = dx + cls._through_rstd(dstats, saved, c)
        return dx, dresidual, dweight, dbias, None

    @staticmethod
    def backward_direct(ctx, saved, grads):
        return cpu_kernels("cpu").layer_norm_backward(ctx, saved, grads)

    @classmethod
    def formula(cls, grads, saved, c, needs):
        if grads[0] is None and not c.from_output:
            return cls._through_sum(grads[1], saved[4], c)
        dy, dsum, dstats = cls._incoming(grads, saved, c)
        h, weight, bias, stats, seed = saved
        found = gradients(dy, dsum, h, weight, bias, stats if c.from_output else None, seed, c)
        dx, dresidual, dweight, dbias = (g if need else None for g, need in zip(found, needs))
        if dstats is not None and dx is not None:
            dx = dx + cls._through_rstd(dstats, saved, c)
        return dx, dresidual, dweight, dbias, None


_apply_direct, _apply_plain, _apply_functorch = autograd.make(LayerNormRule)


# ---- public functions ----


def _check_tensor(op: str, name: str, t: object, like: Tensor | None = None) -> None:
    if not isinstance(t, Tensor):
        _fail(op, name, "be a torch.Tensor", type(t).__name__, TypeError)
    jagged = t.is_nested and t.layout == torch.jagged  # torch's own operator serves it
    if not jagged and (t.is_nested or t.layout != torch.strided):
        _fail(op, name, "be a strided tensor", "a nested one" if t.is_nested else t.layout, TypeError)
    if t.dtype not in FLOATING:
        _fail(op, name, "have dtype float64, float32, bfloat16 or float16", t.dtype, TypeError)
    if like is not None and t.device != like.device:
        _fail(op, name, f"be on the device of x, {like.device}", t.device)


def _check_parameters(op: str, x: Tensor, shape: tuple[int, ...], weight: object, bias: object) -> None:
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        _check_tensor(op, name, t, x)
        if tuple(t.shape) != shape:
            _fail(op, name, f"have shape {shape}", tuple(t.shape))
        if t.dtype != x.dtype and not (t.dtype == torch.float32 and x.dtype.itemsize == 2):
            _fail(op, name, f"have the dtype of x, {x.dtype}, or be float32 beside 16-bit x", t.dtype, TypeError)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        _fail(op, "bias", f"have the dtype of weight, {weight.dtype}", bias.dtype, TypeError)


def _check_eps(op: str, eps: object) -> float:
    if not isinstance(eps, (int, float, numbers.Real)):
        _fail(op, "eps", "be a number", type(eps).__name__, TypeError)
    try:
        value = float(eps)
    except OverflowError:  # an int
        value = math.inf
    if not 0 <= value < math.inf:
        _fail(op, "eps", "be finite and not negative", eps)
    return value


def _check_rows(op: str, x: Any, normalized_shape: Any, weight: Any, bias: Any) -> tuple[int, ...]:
    """Raises unless the call has a meaning; the normalised shape as a tuple."""
    _check_tensor(op, "x", x)
    sizes = normalized_shape if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    if not all(isinstance(n, (int, torch.SymInt, numbers.Integral)) for n in sizes):
        _fail(op, "normalized_shape", "be an int or a sequence of ints", repr(normalized_shape), TypeError)
    shape = tuple(n if isinstance(n, (int, torch.SymInt)) else operator.index(n) for n in sizes)
    if not shape or any(n < 1 for n in shape):
        _fail(op, "normalized_shape", "have at least one dimension and no empty one", shape)
    if tuple(x.shape[-len(shape) :]) != shape:
        _fail(op, "x", f"end in the dimensions of normalized_shape {shape}", f"shape {tuple(x.shape)}")
    _check_parameters(op, x, shape, weight, bias)
    return shape


def _float(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype == torch.float64 else t.float()


def _run(x, residual, weight, bias, seed, c: Config):
    """A valid call by the way that the surroundings allow: (y,) or (y, sum)."""
    if c.backend == "torch" and residual is None and not c.channels_first:
        shape = x.shape[x.dim() - c.dims :]
        if weight is not None and c.weight_offset:
            weight = weight + c.weight_offset
        if c.rms:
            return (F.rms_norm(x, shape, weight, c.eps),)
        return (F.layer_norm(x, shape, weight, bias, c.eps),)
    if c.backend in ("eager", "torch") or needs_definition():
        y, h, _, _ = definition(x, residual, weight, bias, seed, c)
        return (y,) if residual is None else (y, h)
    if functorch_active():
        y, total, _ = _apply_functorch(c, x, residual, weight, bias, seed)
        return (y,) if residual is None else (y, total)
    tensors = (x, residual, weight, bias)
    direct = is_plain(*tensors)
    if direct and not (_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        y, total, _ = forward_leaf(x, residual, weight, bias, seed, c, statistics=False)
        return (y,) if residual is None else (y, total)
    if is_compiling():
        tensors = autograd.distinct(tensors)
    outputs = _apply_plain(direct, c, *tensors, seed)
    if residual is not None:
        return outputs
    return (outputs[0] if c.from_output else outputs,)


def _direct(
    x, residual, shape, weight, bias, eps, zero_centred, p, backend, channels_first=False, rms=False, from_output=False
) -> Tensor | tuple[Tensor, Tensor] | None:
    """y, or (y, sum), of the call that most calls are (plain, valid, dense, on the CPU); None for any other.

    It does what the rest of the way would do, with the questions, the allocation and the kernel in one C++ call
    (bench/notes/layer_norm.md, host cost).
    """
    kernels = cpu_kernels(backend)
    if kernels is None or type(eps) is not float or is_compiling():
        return None
    if residual is not None or channels_first:
        dims = 1
    elif type(shape) is tuple:
        dims = len(shape)
    else:
        return None
    offset = 1.0 if zero_centred else 0.0
    c = (dims, channels_first, eps, offset, p, rms, bool(from_output), "cpu")
    results = kernels.layer_norm_forward(x, residual, shape, weight, bias, c, draw_seed)
    if type(results) is not tuple or len(results) == 2:
        return results
    y, total, stats, seed = results
    if residual is not None:
        outputs, saved = (y, total), (total, weight, None if weight is not None else bias, stats, seed)
    elif from_output:
        outputs, saved = (y, stats), (y, weight, bias, stats, seed)
    else:
        outputs, saved = y, (x, weight, None if weight is not None else bias, stats, seed)
    outputs = _apply_direct((outputs, saved, c), x, residual, weight, bias)
    return outputs[0] if from_output else outputs


def _normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, keep_dtype: bool, c: Config) -> Tensor:
    if autocast_to_float(x, keep_dtype):
        x, weight, bias = _float(x), _float(weight), _float(bias)
    return _run(x, None, weight, bias, None, c)[0]


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centred: bool = False,
    memory_efficient: bool = False,
    keep_dtype: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the trailing dimensions (Ba, Kiros, Hinton 2016).

        y = (x - mean) / sqrt(var + eps) * weight + bias        mean and (biased) var over normalized_shape

    Args:
        x: (..., *normalized_shape), float64, float32, bfloat16 or float16; any strides, empty leading sizes included.
        normalized_shape: the trailing sizes that are normalised together; each at least 1.
        weight, bias: normalized_shape, dtype of x, or both float32 beside 16-bit x. Either may be None.
        eps: added to the variance; not negative.
        zero_centred: multiply by ``1 + weight``, so that weight decay pulls the scale towards 1.
        memory_efficient: save y instead of x for backward (in a chain whose y is saved anyway, x is then freed). x is
            recovered from ``(y - bias) / weight``: a weight close to 0 loses digits, one of exactly 0 gives NaN.
        keep_dtype: under autocast, compute in the dtype of x instead of torch's promotion to float32.
        backend: "eager", "cpu", "cuda" or "triton"; None chooses (see :func:`pyops.explain`).

    Returns:
        y: shape and dtype of x; contiguous.

    Raises:
        ValueError, TypeError: ``layer_norm: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch.nn.functional.layer_norm: the input is called x; float32 parameters beside 16-bit x work on every
    device; the keyword options; statistics are centred, in float32 (float64 for float64).
    """
    y = _direct(x, None, normalized_shape, weight, bias, eps, zero_centred, 0.0, backend, from_output=memory_efficient)
    if y is not None:
        return y
    shape = _check_rows("layer_norm", x, normalized_shape, weight, bias)
    eps = _check_eps("layer_norm", eps)
    name = choose("layer_norm", x, backend)
    c = Config(len(shape), False, eps, 1.0 if zero_centred else 0.0, 0.0, False, memory_efficient, name)
    return _normalise(x, weight, bias, keep_dtype, c)


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    zero_centred: bool = False,
    memory_efficient: bool = False,
    keep_dtype: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Root-mean-square normalisation over the trailing dimensions (Zhang, Sennrich 2019).

        y = x / sqrt(mean(x^2) + eps) * weight        mean over normalized_shape

    Args:
        x, normalized_shape, weight, zero_centred, memory_efficient, keep_dtype, backend: as in :func:`layer_norm`.
        eps: None means the machine epsilon of the arithmetic, float32 (float64 for float64), as in torch.

    Returns:
        y: shape and dtype of x; contiguous.

    Raises:
        ValueError, TypeError: ``rms_norm: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch.nn.functional.rms_norm: of other dtypes than x's, weight may only be float32 beside 16-bit x;
    the keyword options.
    """
    if eps is None and isinstance(x, Tensor) and x.dtype in FLOATING:
        eps = torch.finfo(_acc(x.dtype)).eps
    y = _direct(x, None, normalized_shape, weight, None, eps, zero_centred, 0.0, backend, False, True, memory_efficient)
    if y is not None:
        return y
    shape = _check_rows("rms_norm", x, normalized_shape, weight, None)
    eps = _check_eps("rms_norm", eps)
    name = choose("rms_norm", x, backend)
    c = Config(len(shape), False, eps, 1.0 if zero_centred else 0.0, 0.0, True, memory_efficient, name)
    return _normalise(x, weight, None, keep_dtype, c)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    p: float = 0.0,
    training: bool = True,
    eps: float = 1e-5,
    zero_centred: bool = False,
    keep_dtype: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, residual addition and layer normalisation of the last dimension in one pass, backward fused too.

        sum = dropout(x, p) + residual        y = layer_norm(sum, sum.shape[-1:], weight, bias, eps)

    Args:
        x, residual: (..., C), same shape, dtype and device; under autocast of two dtypes, which are then promoted.
        weight, bias, eps, zero_centred, keep_dtype, backend: as in :func:`layer_norm`, over C.
        p: probability of dropping an element of x, in [0, 1]; kept ones are scaled by 1 / (1 - p).
        training: False leaves dropout out.

    Returns:
        (y, sum): both of the shape and dtype of x; sum is the next residual. Gradients flow through both.

    Raises:
        ValueError, TypeError: ``add_layer_norm: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch: there is no such function. Dropout draws one seed from torch's generator (``torch.manual_seed``
    repeats it) and uses Philox counters, so it drops other elements than ``F.dropout`` with the same seed, but the same
    ones on every backend; backward regenerates the mask instead of saving it.
    """
    if residual is not None and type(p) is float and 0.0 <= p <= 1.0:
        results = _direct(x, residual, None, weight, bias, eps, zero_centred, p if training else 0.0, backend)
        if results is not None:
            return results
    op = "add_layer_norm"
    _check_tensor(op, "x", x)
    if x.dim() == 0 or x.shape[-1] < 1:
        _fail(op, "x", "have a last dimension of at least 1", f"shape {tuple(x.shape)}")
    eps = _check_eps(op, eps)
    _check_tensor(op, "residual", residual, x)
    if residual.dtype != x.dtype and is_autocast(x.device.type):
        # The sum of a 16-bit branch and a float32 stream is float32, as x + residual would be.
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    if residual.shape != x.shape:
        _fail(op, "residual", f"have the shape of x, {tuple(x.shape)}", tuple(residual.shape))
    if residual.dtype != x.dtype:
        _fail(op, "residual", f"have the dtype of x, {x.dtype}", residual.dtype, TypeError)
    _check_parameters(op, x, tuple(x.shape[-1:]), weight, bias)
    if not isinstance(p, (int, float)):
        _fail(op, "p", "be a number", type(p).__name__, TypeError)
    if not 0.0 <= p <= 1.0:
        _fail(op, "p", "lie in [0, 1]", p)
    name = choose(op, x, backend)
    if autocast_to_float(x, keep_dtype):
        x, residual, weight, bias = _float(x), _float(residual), _float(weight), _float(bias)
    p = float(p) if training else 0.0
    seed = draw_seed(x.device) if p > 0.0 else None
    c = Config(1, False, eps, 1.0 if zero_centred else 0.0, p, False, False, name)
    return _run(x, residual, weight, bias, seed, c)


def layer_norm2d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centred: bool = False,
    memory_efficient: bool = False,
    keep_dtype: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the channels of every pixel of an image, in the layout that the image has.

        y = (x - mean) / sqrt(var + eps) * weight + bias        mean and (biased) var over C

    Args:
        x: (N, C, H, W) or (C, H, W), contiguous or channels_last (other strides are copied).
        weight, bias: (C,); dtypes as in :func:`layer_norm`.
        eps, zero_centred, memory_efficient, keep_dtype, backend: as in :func:`layer_norm`.

    Returns:
        y: shape and dtype of x; channels_last when x is, else contiguous.

    Raises:
        ValueError, TypeError: ``layer_norm2d: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch: torch has no such operator; ``F.layer_norm(x.permute(0, 2, 3, 1), ...).permute(0, 3, 1, 2)``
    computes the same with two changes of layout.
    """
    y = _direct(x, None, None, weight, bias, eps, zero_centred, 0.0, backend, True, from_output=memory_efficient)
    if y is not None:
        return y
    op = "layer_norm2d"
    _check_tensor(op, "x", x)
    if x.dim() not in (3, 4):
        _fail(op, "x", "have shape (N, C, H, W) or (C, H, W)", tuple(x.shape))
    if x.shape[-3] < 1:
        _fail(op, "x", "have at least one channel", tuple(x.shape))
    eps = _check_eps(op, eps)
    _check_parameters(op, x, (x.shape[-3],), weight, bias)
    name = choose(op, x, backend)
    c = Config(1, True, eps, 1.0 if zero_centred else 0.0, 0.0, False, memory_efficient, name)
    return _normalise(x, weight, bias, keep_dtype, c)


# torch.fx then keeps a call as one node, as it does with torch's own functions.
for _name in OPERATIONS:
    torch.fx.wrap(_name)

# ---- modules ----


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on :func:`pyops.layer_norm`; same arguments, parameters and state_dict.

    Differs from torch.nn.LayerNorm: the keyword options of :func:`pyops.layer_norm`.
    """

    # Class attributes, so that an nn.LayerNorm whose class is exchanged has them too.
    zero_centred = False
    memory_efficient = False
    keep_dtype = False
    backend: str | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        zero_centred: bool = False,
        memory_efficient: bool = False,
        keep_dtype: bool = False,
        backend: str | None = None,
    ) -> None:
        _set_options(self, zero_centred, memory_efficient, keep_dtype, backend)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _zero_centre(self)

    def extra_repr(self) -> str:
        return super().extra_repr() + _options_repr(self)

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, zero_centred=self.zero_centred,
            memory_efficient=self.memory_efficient, keep_dtype=self.keep_dtype, backend=self.backend,
        )  # fmt: skip


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm on :func:`pyops.rms_norm`; same arguments, parameters and state_dict.

    Differs from torch.nn.RMSNorm: the keyword options of :func:`pyops.rms_norm`, and its dtypes of weight.
    """

    zero_centred = False
    memory_efficient = False
    keep_dtype = False
    backend: str | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        zero_centred: bool = False,
        memory_efficient: bool = False,
        keep_dtype: bool = False,
        backend: str | None = None,
    ) -> None:
        _set_options(self, zero_centred, memory_efficient, keep_dtype, backend)
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _zero_centre(self)

    def extra_repr(self) -> str:
        return super().extra_repr() + _options_repr(self)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps, zero_centred=self.zero_centred,
            memory_efficient=self.memory_efficient, keep_dtype=self.keep_dtype, backend=self.backend,
        )  # fmt: skip


class LayerNorm2d(LayerNorm):
    """Layer normalisation over the channels of (N, C, H, W) images, as in ConvNeXt; see :func:`pyops.layer_norm2d`.

    Args:
        num_channels: C. The other arguments are those of :class:`LayerNorm`.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True,
                 device: Any = None, dtype: Any = None, **options: Any) -> None:  # fmt: skip
        if not isinstance(num_channels, int):
            _fail("LayerNorm2d", "num_channels", "be an int", type(num_channels).__name__, TypeError)
        super().__init__(num_channels, eps, elementwise_affine, bias, device, dtype, **options)

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm2d(
            input, self.weight, self.bias, self.eps, zero_centred=self.zero_centred,
            memory_efficient=self.memory_efficient, keep_dtype=self.keep_dtype, backend=self.backend,
        )  # fmt: skip


def _options_repr(module: Any) -> str:
    names = ("zero_centred", "memory_efficient", "keep_dtype", "backend")
    return "".join(f", {name}={getattr(module, name)!r}" for name in names if getattr(module, name))


def _set_options(module: Any, zero_centred: bool, memory_efficient: bool, keep_dtype: bool, backend: str | None):
    # Before nn.Module.__init__, which calls reset_parameters; plain values pass its __setattr__ untouched.
    for name, value in (("zero_centred", zero_centred), ("memory_efficient", memory_efficient),
                        ("keep_dtype", keep_dtype), ("backend", backend)):  # fmt: skip
        if value:
            object.__setattr__(module, name, value)


def _zero_centre(module: Any) -> None:
    if module.zero_centred and module.weight is not None:
        nn.init.zeros_(module.weight)
