"""Scaled dot-product attention: definition, operators, autograd and public functions.

Vaswani et al., "Attention Is All You Need" (2017); Dao, "FlashAttention-2" (2023). ALiBi: Press, Smith, Lewis, "Train
Short, Test Long" (2021); sliding windows: Beltagy, Peters, Cohan, "Longformer" (2020); grouped queries: Ainslie et al.,
"GQA" (2023).
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd
from .autograd import acc_dtype as _acc
from .autograd import fail as _fail
from .autograd import present as _present
from .backend import (
    FLOATING,
    choose,
    functorch_active,
    is_autocast,
    is_compiling,
    is_plain,
    leaf,
    needs_definition,
    when_imported,
    without_autocast,
)
from .philox import draw_seed, drop_scale, keep_mask

_get_num_threads = torch.get_num_threads
_grad_enabled = torch.is_grad_enabled

_LOG2_E = math.log2(math.e)
# An additive bias in base 2 is held below this; where the maximum of a row lies above half of it, the row has a key at
# +inf.
_TOP = 2.0**100


class Config(NamedTuple):
    """The plain values of a call, in the order of the operators' schema."""

    scale: float | None  # None: 1 / sqrt(head size)
    left: int  # of the window; -1: unlimited
    right: int  # 0: causal
    bottom_right: bool  # where the diagonal lies
    softcap: float  # 0: none
    p: float  # dropout
    max_q: int  # the longest packed sequence; of no meaning without cu_q
    max_k: int
    return_lse: bool
    differentiated: bool  # forward prepares a backward
    backend: str


def _scale(q: Tensor, c: Config) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if c.scale is None else c.scale


# ---- the definition ----


def _repeat_heads(t: Tensor, H: int) -> Tensor:
    """[B, Hk, S, D] as [B, H, S, D]: each key head serves H / Hk neighbouring query heads."""
    if t.shape[1] == H:
        return t
    return t[:, :, None].expand(-1, -1, H // t.shape[1], -1, -1).flatten(1, 2)


class _Packing:
    """Sequences [1, H, T, D] that lie one behind the other, as a padded batch [B, H, longest, D], and back."""

    def __init__(self, cu: Tensor, T: int, longest: int):
        at = torch.arange(longest, device=cu.device)
        self.start = cu[:-1].long()
        self.lengths = cu[1:] - self.start
        self.valid = at < self.lengths[:, None]  # [B, longest]
        self.from_packed = torch.where(self.valid, self.start[:, None] + at, T)
        at = torch.arange(T, device=cu.device)
        self.sequence = (at[:, None] >= cu[1:]).sum(-1)  # [T]
        self.position = at - self.start[self.sequence]

    def pad(self, t: Tensor) -> Tensor:
        """Elements beyond the end of a sequence are 0: they read a row of zeros behind the last one."""
        return F.pad(t[0], (0, 0, 0, 1))[:, self.from_packed].transpose(0, 1)

    def pack(self, t: Tensor) -> Tensor:
        return t.transpose(1, 2)[self.sequence, self.position].transpose(0, 1)[None]


def held_bias(bias: Tensor) -> tuple[Tensor, Tensor]:
    """The bias within the limits of kernels/params/attention.h, and where it is -inf.

    The gradient is 0 where the bias is infinite, and passes wherever it is not.
    """
    low, high = -torch.finfo(bias.dtype).max * math.log(2), _TOP * math.log(2)
    bottom, top = bias == -math.inf, bias == math.inf
    bias = torch.where(bottom | top, 0.0, bias)
    clamped = bias.clamp(low, high).detach()
    bias = torch.where(bias == clamped, bias, clamped + (bias - bias.detach()))
    return torch.where(top, high, bias), bottom


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    c: Config,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in differentiable torch operators: what every kernel computes (kernels/params/attention.h).

    q [B, H, L, D], k [B, Hk, S, D], v [B, Hk, S, Dv], mask [B, H, L, S] with 1 in any place, slopes [B, H], sinks [H];
    with cu_q and cu_k B sequences packed as [1, H, T, D]. Arithmetic in float32 (float64 for float64).
    """
    with without_autocast(q.device):
        acc, dtype, scale = _acc(q.dtype), q.dtype, _scale(q, c)
        H, rows = q.shape[1], q.shape[2]
        queries = keys = None
        if cu_q is not None:
            queries, keys = _Packing(cu_q, q.shape[2], c.max_q), _Packing(cu_k, k.shape[2], c.max_k)
            q, k, v = queries.pad(q), keys.pad(k), keys.pad(v)
        B, L, S = q.shape[0], q.shape[2], k.shape[2]
        k, v = _repeat_heads(k.to(acc), H), _repeat_heads(v.to(acc), H)
        s = torch.matmul(q.to(acc), k.transpose(-2, -1)) * scale
        if c.softcap > 0:
            s = c.softcap * torch.tanh(s / c.softcap)

        i, j = torch.arange(L, device=q.device)[:, None], torch.arange(S, device=q.device)
        distance = i - j
        if c.bottom_right:
            distance = distance + (S - L if keys is None else (keys.lengths - queries.lengths)[:, None, None, None])
        visible = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=q.device)
        if keys is not None:
            visible = keys.valid[:, None, None, :]
        if c.left >= 0:
            visible = visible & (distance <= c.left)
        if c.right >= 0:
            visible = visible & (distance >= -c.right)
        if slopes is not None:
            s = s - slopes[:, :, None, None] * distance.abs()
        if mask is not None and mask.dtype == torch.bool:
            visible = visible & mask
        elif mask is not None:
            bias, hidden = held_bias(mask.to(acc))
            visible = visible & ~hidden
            s = s + bias

        # Where a key is hidden nothing of s passes, in either direction: no NaN or infinity reaches a gradient.
        m = torch.where(visible, s, -math.inf).detach()
        m = m.amax(-1, keepdim=True) if S > 0 else m.new_full((B, H, L, 1), -math.inf)
        if sinks is not None:
            sinks, without = (t[:, None, None] for t in held_bias(sinks))
            m = torch.maximum(m, torch.where(without, -math.inf, sinks).detach())
        finite = torch.where(m == -math.inf, 0.0, m)
        e = torch.where(visible, torch.exp(torch.where(visible, s - finite, 0.0)), 0.0)
        total = e.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.where(without, 0.0, torch.exp(torch.where(without, 0.0, sinks - finite)))
        empty = total == 0
        total = torch.where(empty, 1.0, total)
        p = e / total
        if seed is not None:
            p = torch.where(keep_mask(seed, _dropout_rows(q, rows, queries), S, c.p), p * drop_scale(c.p), 0.0)
        out = torch.matmul(p, v).to(dtype)

        lse = torch.where(empty, -math.inf, finite + torch.log(total))
        lse = torch.where(m >= _TOP / 2 * math.log(2), math.inf, lse)
        if queries is not None:
            out, lse = queries.pack(out), queries.pack(lse)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse.squeeze(-1)


def _dropout_rows(q: Tensor, rows: int, queries: _Packing | None) -> Tensor:
    """The number of each row (kernels/params/attention.h), [B, H, L]."""
    B, H, L, _ = q.shape
    h, i = torch.arange(H, device=q.device)[:, None], torch.arange(L, device=q.device)
    if queries is None:
        return (torch.arange(B, device=q.device)[:, None, None] * H + h) * L + i
    return h * rows + queries.start[:, None, None] + i


# ---- leaves: allocate, then run a backend ----


def _rows(t: Tensor) -> Tensor:
    """t, or a copy of it, with a dense last dimension."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy of it, with rows that start at multiples of 16 bytes."""
    step = 16 // t.element_size()
    if t.data_ptr() % 16 or any(s % step for s, n in zip(t.stride()[:-1], t.shape) if n > 1):
        return t.clone(memory_format=torch.contiguous_format)
    return t


def _prepared(t: Tensor, c: Config) -> Tensor:
    t = _rows(t)
    return _aligned(t) if c.backend in NEEDS_ALIGNED_ROWS else t


def _empty_like(t: Tensor) -> Tensor:
    """Memory for a gradient of t, in the order of its dimensions, with a dense last one."""
    e = torch.empty_like(t)
    return e if e.stride(-1) == 1 else torch.empty_like(t, memory_format=torch.contiguous_format)


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    """[B, H, L, Dv] in the memory order of [B, L, H, Dv], so that heads join without a copy. No view of another tensor:
    autograd forbids to change those in place."""
    B, H, L, _ = q.shape
    Dv = v.shape[-1]
    return q.new_empty_strided((B, H, L, Dv), (L * H * Dv, Dv, H * Dv, 1))


def _expanded_mask(mask: Tensor | None, shape: Sequence[int], dense: bool = False) -> Tensor | None:
    """As [B, H, L, S] with stride 0 wherever its size is 1, and 1 or 0 in the last dimension (1 if ``dense``)."""
    if mask is None:
        return None
    if mask.shape[-1] > 1 and mask.stride(-1) != 1 and (dense or mask.stride(-1) != 0):
        mask = mask.contiguous()
    strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride())]
    return mask.as_strided(shape, strides, mask.storage_offset())


def _lse(stats: Tensor) -> Tensor:
    m, total = stats
    lse = (m + torch.log2(total)) / _LOG2_E
    return torch.where(m >= _TOP / 2, math.inf, lse)


def _has_residue(q: Tensor, c: Config) -> bool:
    """Whether forward also returns what rounding took from out (kernels/params/attention.h)."""
    return c.differentiated and q.dtype.itemsize == 2


def _sizes(q: Tensor, k: Tensor, cu_q: Tensor | None, c: Config) -> tuple[tuple[int, int, int, int], bool]:
    """[B, H, L, S] of the scores (of the longest sequences), and whether there are any."""
    if cu_q is None:
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    else:
        shape = (cu_q.shape[0] - 1, q.shape[1], c.max_q, c.max_k)
    return shape, q.numel() > 0 and k.numel() > 0 and 0 not in shape


def forward_leaf(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    c: Config,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(out, lse, residue, stats) on the kernels of ``c.backend``; None is what was not asked for."""
    shape, scores = _sizes(q, k, cu_q, c)
    out = _empty_out(q, v)
    residue = _empty_out(q, v) if _has_residue(q, c) else None
    stats = torch.empty((2, *q.shape[:3]), dtype=_acc(q.dtype), device=q.device)
    if scores:
        q, k, v = (_prepared(t, c) for t in (q, k, v))
        mask = _expanded_mask(mask, shape)
        max_q, max_k = shape[2:]
        kernels = leaf(c.backend, "attention")
        size = kernels.attention_fwd_workspace(q, k, v, mask, cu_q, max_q, max_k)
        workspace = torch.empty(size, dtype=stats.dtype, device=q.device) if size else None
        kernels.attention_fwd(
            q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, out, residue, stats, workspace,
            _scale(q, c), c.left, c.right, c.bottom_right, c.softcap, c.p, max_q, max_k, _get_num_threads(),
            c.differentiated,
        )  # fmt: skip
    else:
        out.zero_()
        if residue is not None:
            residue.zero_()
        stats[0] = -math.inf if sinks is None else (sinks[:, None] * _LOG2_E).clamp(max=_TOP)
        stats[1] = 0.0 if sinks is None else sinks[:, None] > -math.inf
    return out, _lse(stats) if c.return_lse else None, residue, stats


def backward_leaf(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    out: Tensor,
    residue: Tensor | None,
    stats: Tensor,
    c: Config,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dmask, dsinks) on the kernels of ``c.backend``; None where ``needs`` says so."""
    shape, scores = _sizes(q, k, cu_q, c)
    need_q, need_k, need_v, need_mask, need_sinks = needs
    stats = stats.contiguous()
    if dlse is not None:
        # An infinite lse is a constant.
        dlse = torch.where((stats[0] > -math.inf) & (stats[0] < _TOP / 2), dlse, 0.0).contiguous()
    by_key = need_mask and mask.shape[-1] > 1
    dmask, dsinks = _row_gradients(
        dout, dlse, mask, sinks, cu_q, out, residue, stats, c, need_mask and not by_key, need_sinks
    )
    dq, dk, dv = (_empty_like(t) if need else None for t, need in ((q, need_q), (k, need_k), (v, need_v)))
    if by_key:
        dmask = torch.empty(mask.shape, dtype=stats.dtype, device=q.device)
    written = [t for t in (dq, dk, dv, dmask if by_key else None) if t is not None]
    if not scores:
        for t in written:
            t.zero_()
    elif written:
        q, k, v, dout, out = (_prepared(t, c) for t in (q, k, v, dout, out))
        residue = None if residue is None else _prepared(residue, c)
        wide = _expanded_mask(mask, shape, dense=by_key)
        max_q, max_k = shape[2:]
        kernels = leaf(c.backend, "attention")
        size = kernels.attention_bwd_workspace(q, k, v, wide, cu_q, max_q, max_k, by_key)
        workspace = torch.empty(size, dtype=stats.dtype, device=q.device) if size else None
        kernels.attention_bwd(
            dout, dlse, q, k, v, wide, slopes, sinks, seed, cu_q, cu_k, out, residue, stats,
            dq, dk, dv, dmask if by_key else None, workspace,
            _scale(q, c), c.left, c.right, c.bottom_right, c.softcap, c.p, max_q, max_k, _get_num_threads(),
        )  # fmt: skip
    return dq, dk, dv, None if dmask is None else dmask.to(mask.dtype), dsinks


def _row_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    cu_q: Tensor | None,
    out: Tensor,
    residue: Tensor | None,
    stats: Tensor,
    c: Config,
    need_mask: bool,
    need_sinks: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that need no scores: of a mask with one value for all keys, and of the sinks.

    With delta = dout . out: the sink of a row has p_sink (0 - (delta - dlse)); the sum over j of the row's dS is
    delta - (delta - dlse) sum_j p, and its sum_j p is 1 - p_sink.
    """
    if not (need_mask or need_sinks):
        return None, None
    m, total = stats
    delta = (dout.to(stats.dtype) * (out if residue is None else out.to(stats.dtype) + residue)).sum(-1)
    towards = delta if dlse is None else delta - dlse
    p_sink = 0.0
    if sinks is not None:
        finite = sinks[:, None].isfinite() & (total > 0)  # an infinite sink is a constant
        p_sink = torch.where(total > 0, torch.exp2((sinks[:, None] * _LOG2_E).clamp(max=_TOP) - m) / total, 0.0)
        p_sink = torch.where(sinks[:, None] == -math.inf, 0.0, p_sink)
    dsinks = -torch.where(finite, p_sink * towards, 0.0).sum((0, 2)) if need_sinks else None
    if not need_mask:
        return None, dsinks
    row = torch.where(total > 0, delta - towards * (1.0 - p_sink), 0.0)[..., None]
    if cu_q is not None:
        row = _Packing(cu_q, row.shape[2], c.max_q).pad(row)
    over = [i for i, n in enumerate(mask.shape[:3]) if n == 1]
    row = row.sum(over, keepdim=True) if over else row
    return torch.where(mask.isinf(), 0.0, row), dsinks


# ---- the leaves as torch operators ----

_CONFIG = (
    "float? scale, SymInt left, SymInt right, bool bottom_right, float softcap, float p, SymInt max_q, SymInt max_k, "
    "bool return_lse, bool differentiated, str backend"
)
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? slopes, Tensor? sinks, Tensor? seed, Tensor? cu_q, "
    "Tensor? cu_k"
)
_N_INPUTS = 9
_library = torch.library.Library("pyops", "FRAGMENT")
_library.define(f"attention_fwd({_INPUTS}, {_CONFIG}) -> (Tensor out, Tensor lse, Tensor residue, Tensor stats)")
_library.define(
    f"attention_bwd(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor? residue, Tensor stats, {_CONFIG}, "
    "bool[5] needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)"
)


def _fwd_operator(*args):
    results = forward_leaf(*args[:_N_INPUTS], Config(*args[_N_INPUTS:]))
    return tuple(_present(t, args[0]) for t in results)


def _bwd_operator(*args):
    at = _N_INPUTS + 5
    results = backward_leaf(*args[:at], Config(*args[at:-1]), args[-1])
    return tuple(_present(t, args[0]) for t in results)


for _device in ("CPU", "CUDA"):
    _library.impl("attention_fwd", _fwd_operator, _device)
    _library.impl("attention_bwd", _bwd_operator, _device)


@torch.library.register_fake("pyops::attention_fwd", lib=_library)
def _fwd_fake(q, k, v, *rest):  # noqa: ARG001
    c = Config(*rest[_N_INPUTS - 3 :])
    stats = q.new_empty((2, *q.shape[:3]), dtype=_acc(q.dtype))
    lse = torch.empty_like(stats[0]) if c.return_lse else None
    residue = _empty_out(q, v) if _has_residue(q, c) else None
    return tuple(_present(t, q) for t in (_empty_out(q, v), lse, residue, stats))


@torch.library.register_fake("pyops::attention_bwd", lib=_library)
def _bwd_fake(dout, dlse, q, k, v, mask, slopes, sinks, *rest):  # noqa: ARG001
    needs = rest[-1]
    grads = [_empty_like(t) if need else None for t, need in zip((q, k, v), needs)]
    grads.append(torch.empty_like(mask, memory_format=torch.contiguous_format) if needs[3] else None)
    grads.append(torch.empty_like(sinks, memory_format=torch.contiguous_format) if needs[4] else None)
    return tuple(_present(t, dout) for t in grads)


def _fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The vmapped dimension merged into the first one, the batch."""
    t = autograd.batched_first(t, dim, size)
    return None if t is None else t.flatten(0, 1)


def _folded_mask(mask: Tensor | None, dim: int | None, size: int, B: int) -> Tensor | None:
    if mask is not None and (dim is not None or mask.shape[0] > 1):
        mask = mask.movedim(dim, 0) if dim is not None else mask.expand(size, *mask.shape)
        return mask.expand(size, B, *mask.shape[2:]).flatten(0, 1)
    return mask


@torch.library.register_vmap("pyops::attention_fwd", lib=_library)
def _fwd_vmap(info, in_dims, *args):
    op, size = torch.ops.pyops.attention_fwd.default, info.batch_size
    q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, *config = args
    if size == 0 or seed is not None or cu_q is not None or in_dims[5] is not None:
        return autograd.per_sample(op, info, in_dims, args)
    q, k, v, slopes = (_fold(t, d, size) for t, d in zip((q, k, v, slopes), (*in_dims[:3], in_dims[4])))
    mask = _folded_mask(mask, in_dims[3], size, q.shape[0] // size)
    out, lse, residue, stats = op(q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, *config)
    lead = (size, q.shape[0] // size)
    c = Config(*config)
    dims = 0, 0 if c.return_lse else None, 0 if _has_residue(q, c) else None
    results = (t if dim is None else t.unflatten(0, lead) for t, dim in zip((out, lse, residue), dims))
    return (*results, stats.unflatten(1, lead)), (*dims, 1)


@torch.library.register_vmap("pyops::attention_bwd", lib=_library)
def _bwd_vmap(info, in_dims, *args):
    op, size = torch.ops.pyops.attention_bwd.default, info.batch_size
    dout, dlse, q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, out, residue, stats, *config, needs = args
    summed = any(needs[3:])  # over the batch
    if size == 0 or seed is not None or cu_q is not None or in_dims[7] is not None or summed:
        return autograd.per_sample(op, info, in_dims, args)
    dout, dlse, q, k, v, slopes, out, residue = (
        _fold(t, d, size)
        for t, d in zip((dout, dlse, q, k, v, slopes, out, residue), (*in_dims[:5], in_dims[6], *in_dims[11:13]))
    )
    B = q.shape[0] // size
    mask = _folded_mask(mask, in_dims[5], size, B)
    if in_dims[13] is not None:
        stats = stats.movedim(in_dims[13], 1).flatten(1, 2)
    else:
        stats = stats[:, None].expand(2, size, *stats.shape[1:]).flatten(1, 2)
    grads = op(dout, dlse, q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, out, residue, stats, *config, needs)
    return tuple(g.unflatten(0, (size, B)) if need else g for g, need in zip(grads, needs)), tuple(
        0 if need else None for need in needs
    )


# ---- autograd ----


class AttentionRule(autograd.Rule):
    """Tensors: those of :func:`definition`. Saved: the same, then out, its residue or None, and stats."""

    name = "Attention"
    config = Config
    n_tensors = _N_INPUTS
    n_saved = _N_INPUTS + 3
    n_grads = 2  # of out and lse
    recomputed = (4, *range(6, _N_INPUTS + 3))

    @staticmethod
    def forward(direct, tensors, config):
        if direct:
            return forward_leaf(*tensors, config)
        out, lse, residue, stats = torch.ops.pyops.attention_fwd(*tensors, *config)
        return out, lse if config.return_lse else None, residue if _has_residue(tensors[0], config) else None, stats

    @staticmethod
    def outputs(results, config):
        return results[:2] if config.return_lse else results[:1]

    @staticmethod
    def saved(tensors, results, config):  # noqa: ARG004
        out, _, residue, stats = results
        return *tensors, out, residue, stats

    @staticmethod
    def _each(found, needs):
        """(dq, dk, dv, dmask, dsinks) as a gradient for each tensor."""
        dq, dk, dv, dmask, dsinks = (g if need else None for g, need in zip(found, _wanted(needs)))
        return dq, dk, dv, dmask, None, dsinks, None, None, None

    @classmethod
    def backward(cls, direct, grads, saved, c, needs):
        dout, dlse = grads
        dout = torch.zeros_like(saved[_N_INPUTS]) if dout is None else dout
        if direct:
            found = backward_leaf(dout, dlse, *saved, c, _wanted(needs))
        else:
            found = torch.ops.pyops.attention_bwd(dout, dlse, *saved, *c, _wanted(needs))
        return cls._each(found, needs)

    @classmethod
    def formula(cls, grads, saved, c, needs):
        tensors = list(saved[:_N_INPUTS])
        at = [i for i, need in zip((0, 1, 2, 3, 5), _wanted(needs)) if need]

        def results(*wanted: Tensor) -> tuple[Tensor, ...]:
            for i, t in zip(at, wanted):
                tensors[i] = t
            return tuple(r for r, g in zip(definition(*tensors, c), grads) if g is not None)

        with without_autocast(tensors[0].device):
            _, vjp = torch.func.vjp(results, *(tensors[i] for i in at))
            found = dict(zip(at, vjp(tuple(g for g in grads if g is not None))))
        return tuple(found.get(i) for i in range(_N_INPUTS))


def _wanted(needs: Sequence[bool]) -> list[bool]:
    """Of the tensors, those that have a gradient: q, k, v, mask, sinks."""
    return [*needs[:4], needs[5]]


_, _apply_plain, _apply_functorch = autograd.make(AttentionRule)


# ---- what the kernels of a backend do not serve ----


def _cuda_limit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.dtype.itemsize != 2:
        return f'its kernels serve bfloat16 and float16, not {q.dtype}; use "triton"'
    sizes = q.shape[-1], v.shape[-1]
    if any(n % 8 or n > 256 for n in sizes):
        return f'its kernels serve head sizes up to 256 that 8 divides, not {sizes[0]} and {sizes[1]}; use "triton"'
    longest = max(*q.shape[:-1], *k.shape[:-1])
    if longest >= 2**29:
        return f'its kernels serve lengths below 2^29, not {longest}; use "triton"'
    return None


# By name, for explain() too: a reason, or None.
LIMITS = {"cuda": _cuda_limit}
NEEDS_ALIGNED_ROWS = {"cuda"}


# ---- validation ----


def _check_tensor(op: str, name: str, t: object, like: Tensor | None = None, first: str = "") -> None:
    if not isinstance(t, Tensor):
        _fail(op, name, "be a torch.Tensor", type(t).__name__, TypeError)
    if t.is_nested or t.layout != torch.strided:
        _fail(op, name, "be a strided tensor", "a nested one" if t.is_nested else t.layout, TypeError)
    if like is not None and t.device != like.device:
        _fail(op, name, f"be on the device of {first}, {like.device}", t.device)


def _check_floating(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOATING:
        _fail(op, name, "have dtype float64, float32, bfloat16 or float16", t.dtype, TypeError)


def _check_number(op: str, name: str, value: object) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        _fail(op, name, "be a number", type(value).__name__, TypeError)


class _Options(NamedTuple):
    left: int
    right: int
    bottom_right: bool
    softcap: float


def _check_options(
    op: str, dropout_p: Any, is_causal: bool, scale: Any, causal: Any, window: Any, softcap: Any, alibi_slopes: Any
) -> _Options:
    """Raises unless the options that are no tensors have a meaning together."""
    _check_number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        _fail(op, "dropout_p", "lie in [0, 1)", dropout_p)
    if scale is not None:
        _check_number(op, "scale", scale)
        if not -math.inf < scale < math.inf:
            _fail(op, "scale", "be finite", scale)
    _check_number(op, "softcap", softcap)
    if not 0.0 <= softcap < math.inf:
        _fail(op, "softcap", "be finite and not negative", softcap)
    left = right = -1
    if window is not None:
        pair = isinstance(window, (tuple, list)) and len(window) == 2
        if not pair or not all(n is None or isinstance(n, (int, torch.SymInt, numbers.Integral)) for n in window):
            _fail(op, "window", "be None or a pair of ints or None", repr(window), TypeError)
        left, right = (-1 if n is None else n for n in window)
        if left < -1 or right < -1:
            _fail(op, "window", "have sides of at least 0, or -1 for no limit", window)
        if is_causal and right > 0:
            _fail(op, "window", "end at the diagonal beside is_causal", window)
    if not isinstance(is_causal, (bool, torch.SymBool)):
        _fail(op, "is_causal", "be a bool", type(is_causal).__name__, TypeError)
    right = 0 if is_causal else right
    if causal not in ("top-left", "bottom-right"):
        _fail(op, "causal", 'be "top-left" or "bottom-right"', repr(causal))
    if causal == "bottom-right" and left < 0 and right < 0 and alibi_slopes is None:
        _fail(op, "causal", "stand beside is_causal=True, window or alibi_slopes", repr(causal))
    return _Options(left, right, causal == "bottom-right", float(softcap))


def _check_heads(op: str, names: Sequence[str], heads: Sequence[int], enable_gqa: bool) -> int:
    """The number of query heads, that of the result."""
    query, key, value = heads
    if enable_gqa:
        for name, n in zip(names[1:], (key, value)):
            if n != query and (n == 0 or query % n):
                _fail(op, name, f"have a number of heads that divides that of {names[0]}, {query}", n)
        return query
    H = query if query != 1 else key if key != 1 else value
    for name, n in zip(names, heads):
        if n not in (1, H):
            remedy = "" if n == 0 or H % n else " (any divisor with enable_gqa=True)"
            _fail(op, name, f"have {H} heads, or 1{remedy}", n)
    return H


def _check_mask(op: str, mask: Any, q: Tensor, first: str, shape: Sequence[int]) -> None:
    _check_tensor(op, "attn_mask", mask, q, first)
    wide = mask.dtype == torch.float32
    if mask.dtype != torch.bool and mask.dtype != q.dtype and not wide:
        kinds = "bool or float32" if q.dtype == torch.float32 else f"bool, {q.dtype} as {first}, or float32"
        _fail(op, "attn_mask", f"have dtype {kinds}", mask.dtype, TypeError)
    fits = mask.dim() <= len(shape) and all(m in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1]))
    if not fits:
        _fail(op, "attn_mask", f"have a shape that broadcasts to {tuple(shape)}", tuple(mask.shape))


def _check_per_head(op: str, name: str, t: Any, q: Tensor, first: str, shapes: Sequence[tuple[int, ...]]) -> None:
    _check_tensor(op, name, t, q, first)
    _check_floating(op, name, t)
    if tuple(t.shape) not in shapes:
        _fail(op, name, "have shape " + " or ".join(map(str, shapes)), tuple(t.shape))
    if name == "alibi_slopes" and t.requires_grad and _grad_enabled():
        _fail(op, name, "require no gradient (there is none for it)", "one that does")


def _check_cu_seqlens(op: str, name: str, cu: Any, q: Tensor, T: int, longest: Any) -> int:
    """The longest length, as an int."""
    side = name[-1]
    _check_tensor(op, name, cu, q, "q")
    if cu.dtype != torch.int32:
        _fail(op, name, "have dtype int32", cu.dtype, TypeError)
    if cu.dim() != 1 or cu.shape[0] < 1:
        _fail(op, name, "have shape (sequences + 1,)", tuple(cu.shape))
    if not isinstance(longest, (int, torch.SymInt, numbers.Integral)):
        _fail(op, f"max_seqlen_{side}", "be an int", type(longest).__name__, TypeError)
    if longest < 0:
        _fail(op, f"max_seqlen_{side}", "not be negative", longest)
    if cu.is_cpu and is_plain(cu):
        ends = cu.tolist()
        lengths = [b - a for a, b in itertools.pairwise(ends)]
        if ends[0] != 0 or ends[-1] != T or min(lengths, default=0) < 0:
            _fail(op, name, f"rise from 0 to the length of {'q' if side == 'q' else 'k'}, {T}", ends)
        if max(lengths, default=0) > longest:
            _fail(op, f"max_seqlen_{side}", f"be at least the longest length, {max(lengths)}", longest)
    return longest


# ---- public functions ----


def _autocast(tensors: Sequence[Any]) -> Sequence[Any]:
    """torch's rule for attention: under autocast, in its dtype. The mask may stay float32."""
    q = tensors[0]
    kind = q.device.type
    if not is_autocast(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Any) -> Any:
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible else t

    *inputs, mask = tensors
    mask = mask if isinstance(mask, Tensor) and mask.dtype == torch.float32 else cast(mask)
    return *map(cast, inputs), mask


def _torch_serves(mask, slopes, sinks, cu_q, q: Tensor, c: Config) -> bool:
    """Whether F.scaled_dot_product_attention can express the call."""
    plain = slopes is None and sinks is None and cu_q is None and not c.return_lse and c.softcap == 0
    causal = c.right == 0 and not c.bottom_right and mask is None
    own_mask = mask is None or mask.dtype in (torch.bool, q.dtype)
    return plain and own_mask and c.left < 0 and (c.right < 0 or causal)


def _run(q, k, v, mask, slopes, sinks, cu_q, cu_k, c: Config) -> tuple[Tensor, Tensor | None]:
    """A valid call by the way that the surroundings allow: (out, lse)."""
    if c.backend == "torch" and _torch_serves(mask, slopes, sinks, cu_q, q, c):
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, c.p, c.right == 0, scale=c.scale, enable_gqa=gqa), None
    seed = draw_seed(q.device) if c.p > 0.0 else None
    tensors = (q, k, v, mask, slopes, sinks, seed, cu_q, cu_k)
    if c.backend in ("eager", "torch") or needs_definition():
        return definition(*tensors, c)
    if functorch_active():
        out, lse, *_ = _apply_functorch(c._replace(differentiated=True), *tensors)
        return out, lse
    direct = is_plain(*tensors)
    differentiated = _grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, mask, sinks))
    if direct and not differentiated:
        out, lse, *_ = forward_leaf(*tensors, c)
        return out, lse
    if differentiated:
        c = c._replace(differentiated=True)
    if is_compiling():
        tensors = autograd.distinct(tensors)
    outputs = _apply_plain(direct, c, *tensors)
    return outputs if c.return_lse else (outputs, None)


def _joined(t: Tensor, batch: Sequence[int], heads: int) -> Tensor:
    """(..., heads or 1, T, D) with any broadcasting batch dimensions as [B, heads, T, D]."""
    shape = (*batch, heads, *t.shape[-2:])
    t = t if t.shape == shape else t.expand(shape)
    return t[None] if not batch else t if len(batch) == 1 else t.flatten(0, -4)


def _joined_mask(mask: Tensor, batch: Sequence[int]) -> Tensor:
    """A mask that broadcasts to (*batch, H, L, S) as [B, H, L, S] with 1 where it is broadcast."""
    missing = len(batch) + 3 - mask.dim()
    mask = mask.reshape((1,) * missing + tuple(mask.shape)) if missing else mask
    lead = mask.shape[: len(batch)]
    if len(batch) < 2:
        return mask if batch else mask[None]
    if all(n == 1 for n in lead):
        return mask.flatten(0, -4)
    return mask.expand(*batch, *mask.shape[len(batch) :]).flatten(0, -4)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str = "top-left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention (Vaswani et al. 2017), without ever holding the scores in memory.

        s = scale * query key^T        softcap * tanh(s / softcap) with a softcap        + attn_mask - slope * distance
        out = dropout(softmax(s)) value        over the keys that a query sees

    Args:
        query: (..., Hq, L, E); key: (..., H, S, E); value: (..., H, S, Ev); of one dtype, float64, float32, bfloat16 or
            float16, with any strides. Two or more dimensions; batch dimensions broadcast, and so does one head.
        attn_mask: broadcasts to (..., Hq, L, S). bool: True where a query sees a key. Floating (dtype of query, or
            float32): added to the scores; its gradient has its shape and dtype. Allowed beside is_causal.
        dropout_p: probability of dropping an element of the softmax; applied whenever it is above 0.
        is_causal: query i sees no key behind the diagonal.
        scale: any finite number; None means 1 / sqrt(E).
        enable_gqa: Hq may be a multiple of H; query head h then reads key head h // (Hq // H).
        causal: where the diagonal of is_causal, window and alibi_slopes lies. "top-left": query i stands at key i;
            "bottom-right": at key i + S - L, so that the last query stands at the last key.
        window: (left, right); a query at key j sees j - left .. j + right; None or -1: no limit on that side.
        softcap: caps the scores within (-softcap, softcap); 0: none.
        alibi_slopes: (Hq,) or (..., Hq); subtracts slope * |distance from the diagonal| (Press et al. 2021); constants.
        sinks: (Hq,); a score of each head that takes part in the softmax without a value (as in gpt-oss).
        return_lse: also return the log-sum-exp of the scores, differentiable.
        backend: "eager", "cpu", "cuda" or "triton"; None chooses (see :func:`pyops.explain`).

    Returns:
        out: (..., Hq, L, Ev), dtype of query; of 4 dimensions in the memory order of (B, L, Hq, Ev).
        lse: (..., Hq, L), float32 (float64 for float64), with return_lse.

    Masking::

        is_causal, L = 2, S = 4     top-left  1 0 0 0     bottom-right  1 1 1 0
                                              1 1 0 0                   1 1 1 1

        A query that sees no key has a result of 0, gradients of 0, and an lse of -inf (its sink, where there is one).
        A row of equal finite values, finfo.min included, is an average. Keys at +inf share their row; its lse is +inf.

    Jagged nested tensors (B, H, j, E), as ``nt.transpose(1, 2)`` gives them, run as :func:`varlen_attention`.

    Raises:
        ValueError, TypeError: ``scaled_dot_product_attention: <argument> must <rule>, got <value>``, before any work.

    Differs from torch.nn.functional.scaled_dot_product_attention: the keyword options; attn_mask beside is_causal; no
    integer or empty head size; no dropout_p of 1; dropout uses Philox counters and one seed from torch's generator, so
    it drops other elements than torch with the same seed, but the same ones on every backend.

    Backends: eager, cpu, cuda (bfloat16 and float16, E and Ev multiples of 8 up to 256), triton.
    """
    op = "scaled_dot_product_attention"
    names = ("query", "key", "value")
    if isinstance(query, Tensor) and query.is_nested:
        return _jagged(
            op, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal=causal, window=window,
            softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    _check_tensor(op, "query", query)
    query, key, value, attn_mask = _autocast((query, key, value, attn_mask))
    for name, t in zip(names, (query, key, value)):
        _check_tensor(op, name, t, query, "query")
        _check_floating(op, name, t)
        if t.dtype != query.dtype:
            _fail(op, name, f"have the dtype of query, {query.dtype}", t.dtype, TypeError)
        if t.dim() < 2:
            _fail(op, name, "have at least 2 dimensions", f"shape {tuple(t.shape)}")
        if t.shape[-1] < 1:
            _fail(op, name, "have a head size of at least 1", f"shape {tuple(t.shape)}")
    if key.shape[-1] != query.shape[-1]:
        _fail(op, "key", f"have the head size of query, {query.shape[-1]}", key.shape[-1])
    if value.shape[-2] != key.shape[-2]:
        _fail(op, "value", f"have the length of key, {key.shape[-2]}", value.shape[-2])
    options = _check_options(op, dropout_p, is_causal, scale, causal, window, softcap, alibi_slopes)

    heads = [t.shape[-3] if t.dim() > 2 else 1 for t in (query, key, value)]
    H = _check_heads(op, names, heads, enable_gqa)
    batches = [tuple(t.shape[:-3]) for t in (query, key, value)]
    batch = batches[0]
    if batches[1] != batch or batches[2] != batch:
        for name, other in zip(names[1:], batches[1:]):
            if any(m != n and 1 not in (m, n) for m, n in zip(batch[::-1], other[::-1])):
                _fail(op, name, f"have batch dimensions that broadcast with {batch}", other)
            batch = torch.broadcast_shapes(batch, other)
    rank = max(query.dim(), key.dim(), value.dim())
    L, S = query.shape[-2], key.shape[-2]
    full = (*batch, H, L, S) if rank > 2 else (L, S)
    if attn_mask is not None:
        _check_mask(op, attn_mask, query, "query", full)
    if alibi_slopes is not None:
        shapes = [(H,), (*batch, H)] if batch else [(H,)]
        _check_per_head(op, "alibi_slopes", alibi_slopes, query, "query", shapes)
    if sinks is not None:
        _check_per_head(op, "sinks", sinks, query, "query", [(H,)])
    name = choose(op, query, backend, lambda name: LIMITS[name](query, key, value) if name in LIMITS else None)

    acc = _acc(query.dtype)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().to(acc).expand(*batch, H).reshape(-1, H).contiguous()
    # A 3-dimensional call has no batch; heads that are independent of each other may be one.
    swap = rank == 3 and heads[0] == heads[1] == heads[2] and sinks is None
    if swap:
        batch, Hk, Hv, Hq = (H,), 1, 1, 1
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        alibi_slopes = None if alibi_slopes is None else alibi_slopes.reshape(H, 1)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
    else:
        Hq, Hk, Hv = H, heads[1], heads[2]
        if Hk != Hv:  # the kernels know one number of key heads
            if enable_gqa:
                key, value = (t.repeat_interleave(H // n, -3) for t, n in ((key, Hk), (value, Hv)))
            Hk = Hv = H
    q, k, v = _joined(query, batch, Hq), _joined(key, batch, Hk), _joined(value, batch, Hv)
    mask = attn_mask
    if mask is not None:
        mask = mask.to(acc) if query.dtype == torch.float64 and mask.dtype == torch.float32 else mask
        mask = _joined_mask(mask, batch)
    if sinks is not None:
        sinks = sinks.to(acc).contiguous()
    c = Config(
        None if scale is None else float(scale), options.left, options.right, options.bottom_right, options.softcap,
        float(dropout_p), 0, 0, return_lse, False, name,
    )  # fmt: skip
    out, lse = _run(q, k, v, mask, alibi_slopes, sinks, None, None, c)
    if swap:
        out, lse = out.squeeze(1), None if lse is None else lse.squeeze(1)
    elif rank == 2:
        out, lse = out[0, 0], None if lse is None else lse[0, 0]
    elif len(batch) != 1:
        out = out.unflatten(0, batch) if batch else out[0]
        lse = lse if lse is None else lse.unflatten(0, batch) if batch else lse[0]
    return (out, lse) if return_lse else out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str = "top-left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences of any lengths, packed one behind the other without padding.

    Sequence b holds the queries ``cu_seqlens_q[b] .. cu_seqlens_q[b + 1]`` and the keys
    ``cu_seqlens_k[b] .. cu_seqlens_k[b + 1]``; within it, this is :func:`scaled_dot_product_attention`.

    Args:
        q: (Tq, Hq, E); k: (Tk, H, E); v: (Tk, H, Ev); dtypes and strides as there.
        cu_seqlens_q, cu_seqlens_k: (B + 1,), int32, on the device of q: the ends of the sequences, from 0 to Tq and Tk.
            On the CPU their values are checked; elsewhere wrong values are undefined behaviour.
        max_seqlen_q, max_seqlen_k: at least the longest lengths.
        attn_mask: broadcasts to (B, Hq, max_seqlen_q, max_seqlen_k), by positions within the sequences.
        alibi_slopes: (Hq,) or (B, Hq).
        The others: as in :func:`scaled_dot_product_attention`; "bottom-right" is that of each sequence.

    Returns:
        out: (Tq, Hq, Ev), dtype of q; contiguous.
        lse: (Tq, Hq), float32 (float64 for float64), with return_lse.

    Raises:
        ValueError, TypeError: ``varlen_attention: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch.nn.attention.varlen.varlen_attn: the order of its options, which is that of
    scaled_dot_product_attention here; masks, dropout, every dtype and backend, gradients of every order.
    """
    op = "varlen_attention"
    names = ("q", "k", "v")
    _check_tensor(op, "q", q)
    q, k, v, attn_mask = _autocast((q, k, v, attn_mask))
    for name, t in zip(names, (q, k, v)):
        _check_tensor(op, name, t, q, "q")
        _check_floating(op, name, t)
        if t.dtype != q.dtype:
            _fail(op, name, f"have the dtype of q, {q.dtype}", t.dtype, TypeError)
        if t.dim() != 3 or t.shape[-1] < 1:
            _fail(op, name, "have shape (tokens, heads, head size)", tuple(t.shape))
    if k.shape[-1] != q.shape[-1]:
        _fail(op, "k", f"have the head size of q, {q.shape[-1]}", k.shape[-1])
    if v.shape[0] != k.shape[0]:
        _fail(op, "v", f"have the length of k, {k.shape[0]}", v.shape[0])
    options = _check_options(op, dropout_p, is_causal, scale, causal, window, softcap, alibi_slopes)
    heads = [t.shape[1] for t in (q, k, v)]
    H = _check_heads(op, names, heads, enable_gqa)
    max_q = _check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q, q.shape[0], max_seqlen_q)
    max_k = _check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, q, k.shape[0], max_seqlen_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        _fail(
            op,
            "cu_seqlens_k",
            f"have the shape of cu_seqlens_q, {tuple(cu_seqlens_q.shape)}",
            tuple(cu_seqlens_k.shape),
        )
    B = cu_seqlens_q.shape[0] - 1
    if attn_mask is not None:
        _check_mask(op, attn_mask, q, "q", (B, H, max_q, max_k))
    else:
        max_q, max_k = min(max_q, q.shape[0]), min(max_k, k.shape[0])
    if alibi_slopes is not None:
        _check_per_head(op, "alibi_slopes", alibi_slopes, q, "q", [(H,), (B, H)])
    if sinks is not None:
        _check_per_head(op, "sinks", sinks, q, "q", [(H,)])
    name = choose(op, q, backend, lambda name: LIMITS[name](q, k, v) if name in LIMITS else None)

    acc = _acc(q.dtype)
    Hk = heads[1]
    if heads[1] != heads[2]:
        if enable_gqa:
            k, v = (t.repeat_interleave(H // n, 1) for t, n in ((k, heads[1]), (v, heads[2])))
        Hk = H
    mask = attn_mask
    if mask is not None:
        mask = mask.to(acc) if q.dtype == torch.float64 and mask.dtype == torch.float32 else mask
        mask = _joined_mask(mask, (B,))
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().to(acc).expand(B, H).contiguous()
    if sinks is not None:
        sinks = sinks.to(acc).contiguous()
    c = Config(
        None if scale is None else float(scale), options.left, options.right, options.bottom_right, options.softcap,
        float(dropout_p), max_q, max_k, return_lse, False, name,
    )  # fmt: skip
    q, k, v = (t.transpose(0, 1).expand(h, -1, -1)[None] for t, h in ((q, H), (k, Hk), (v, Hk)))
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    out, lse = _run(q, k, v, mask, alibi_slopes, sinks, cu_q, cu_k, c)
    out = out[0].transpose(0, 1)
    return (out, lse[0].transpose(0, 1)) if return_lse else out


def _jagged(
    op: str, query: Any, key: Any, value: Any, attn_mask: Tensor | None, *rest: Any, return_lse: bool, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Jagged nested (B, H, j, E) tensors by way of the packed form, which is how they lie in memory."""
    packed, offsets, longest = [], [], []
    for name, t in zip(("query", "key", "value"), (query, key, value)):
        if not isinstance(t, Tensor) or t.layout != torch.jagged or t.dim() != 4 or t._ragged_idx != 2:
            _fail(op, name, "be jagged, of shape (B, H, j, E), when query is nested", _described(t), TypeError)
        if t.lengths() is not None:
            _fail(op, name, "be jagged without holes", "a narrowed one")
        packed.append(t.transpose(1, 2).values())
        offsets.append(t.offsets())
        # The tensor remembers its longest sequence once asked; a compiler cannot ask, and the bound serves as well.
        longest.append(packed[-1].shape[0] if is_compiling() and attn_mask is None else t._get_max_seqlen())
    if offsets[2] is not offsets[1] and not is_compiling() and not torch.equal(offsets[2], offsets[1]):
        _fail(op, "value", "have the lengths of key", "others")
    if offsets[0].shape != offsets[1].shape:
        _fail(op, "key", f"have the batch size of query, {offsets[0].shape[0] - 1}", offsets[1].shape[0] - 1)
    cu_q, cu_k = (o.to(torch.int32) for o in offsets[:2])
    results = varlen_attention(*packed, cu_q, cu_k, *longest[:2], attn_mask, *rest, return_lse=return_lse, **options)
    nested = [
        torch.nested.nested_tensor_from_jagged(t, offsets[0]).transpose(1, 2)
        for t in (results if return_lse else (results,))
    ]
    return tuple(nested) if return_lse else nested[0]


def _described(t: Any) -> str:
    if not isinstance(t, Tensor):
        return type(t).__name__
    return "a strided nested one" if t.is_nested and t.layout == torch.strided else f"{t.layout} of {tuple(t.shape)}"


# ---- FLOPs ----


def _register_flops() -> None:
    """As torch.utils.flop_counter counts torch's own attention: the products, masks not considered."""
    from torch.utils.flop_counter import register_flop_formula

    def products(q: Tensor, v: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> tuple[int, int]:
        """Multiplications and additions of one product over the head size of q, and over that of v."""
        B, H, L, D = q.shape
        pairs = B * L * k.shape[2]
        if cu_q is not None:
            pairs = int((cu_q.diff().long() * cu_k.diff()).sum())
        return 2 * H * pairs * D, 2 * H * pairs * v.shape[-1]

    @register_flop_formula(torch.ops.pyops.attention_fwd, get_raw=True)
    def forward(q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, *_, out_val=None, **__):  # noqa: ARG001
        over_d, over_dv = products(q, v, k, cu_q, cu_k)
        return over_d + over_dv

    @register_flop_formula(torch.ops.pyops.attention_bwd, get_raw=True)
    def backward(dout, dlse, q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, *_, out_val=None, **__):  # noqa: ARG001
        over_d, over_dv = products(q, v, k, cu_q, cu_k)
        return 3 * over_d + 2 * over_dv


when_imported("torch.utils.flop_counter", _register_flops)

# torch.fx then keeps a call as one node, as it does with torch's own functions.
for _name in ("scaled_dot_product_attention", "varlen_attention"):
    torch.fx.wrap(_name)
