"""Recurrent layers: LSTM, GRU and Elman RNN; definition, operators, autograd, public functions and modules.

Hochreiter, Schmidhuber, "Long Short-Term Memory" (1997); Cho et al., "Learning Phrase Representations using RNN
Encoder-Decoder" (2014); Elman, "Finding Structure in Time" (1990).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import autograd
from .autograd import acc_dtype as _acc
from .autograd import fail as _fail
from .autograd import present as _present
from .backend import (
    FLOATING,
    check_name,
    choose,
    cpu_kernels,
    functorch_active,
    is_autocast,
    is_compiling,
    is_plain,
    leaf,
    needs_definition,
    without_autocast,
)
from .layer_norm import layer_norm
from .philox import draw_seed, keep_mask

_get_num_threads = torch.get_num_threads
_grad_enabled = torch.is_grad_enabled
_autocast_enabled = torch.is_autocast_enabled

# By cell: products of a unit, and numbers that are saved of it.
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4, "coupled": 3}
SAVED = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 4, "lstm": 4, "coupled": 3}
HAS_CELLS = ("lstm", "coupled")


class Config(NamedTuple):
    """The plain values of a layer's call, in the order of the operator's schema."""

    cell: str
    steps: int
    batch: int
    batch_first: bool  # rows are [batch, steps], not [steps, batch]; without meaning for packed sequences
    zoneout_h: float
    zoneout_c: float
    eps: float  # of the norms
    differentiated: bool  # a backward will follow
    return_states: bool
    backend: str


class Direction(NamedTuple):
    """The parameters of one direction of a layer, as torch has them, and those of the options."""

    w_ih: Tensor | None  # None: x is W_ih x already, of both directions side by side, with b_ih and b_hh but for b_n
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    peephole: Tensor | None
    ln_gates: Tensor | None
    ln_cell: Tensor | None


_N_DIRECTION = len(Direction._fields)
_STATES = 1 + 2 * _N_DIRECTION  # where h0, c0, keep, reset, seed and offsets stand, behind x and the directions
_N_INPUTS = _STATES + 6
_NO_OPTIONS = (None,) * (2 * _N_DIRECTION - 4)  # in the place of all parameters but the first four
_AT_STATES = (_STATES, _STATES + 1, _N_INPUTS, _N_INPUTS + 1, _N_INPUTS + 2)  # of h0, c0, y, gates, cells when saved


def _directions(tensors: Sequence[Tensor | None]) -> list[Direction]:
    both = [Direction(*tensors[at : at + _N_DIRECTION]) for at in (1, 1 + _N_DIRECTION)]
    return both if both[1].w_hh is not None else both[:1]


def _biases(w: Direction, cell: str) -> tuple[Tensor | None, Tensor | None]:
    """What is added to W_ih x, and the b_n of a GRU, which r multiplies."""
    b_ih, b_hh, b_n = w.b_ih, w.b_hh, None
    if cell == "gru" and b_hh is not None:
        H = w.w_hh.shape[0] // 3
        b_n = b_hh[2 * H :]
        b_hh = F.pad(b_hh[: 2 * H], (0, H))
    if w.w_ih is None:
        return None, b_n
    return b_ih if b_hh is None else b_hh if b_ih is None else b_ih + b_hh, b_n


# ---- the definition ----


class _Rows:
    """Where the rows of the steps lie: [steps, batch], [batch, steps] or packed."""

    def __init__(self, c: Config, offsets: Tensor | None):
        self.c = c
        self.packed = offsets is not None
        self.sizes = [c.batch] * c.steps if offsets is None else offsets.diff().tolist()

    def split(self, t: Tensor) -> Sequence[Tensor]:
        """The rows of each step."""
        if self.packed:
            return t.split(self.sizes)
        if self.c.batch_first:
            return t.reshape(self.c.batch, self.c.steps, *t.shape[1:]).unbind(1)
        return t.reshape(self.c.steps, self.c.batch, *t.shape[1:]).unbind(0)

    def join(self, steps: list[Tensor], empty: Tensor) -> Tensor:
        if not steps:
            return empty
        if self.packed:
            return torch.cat(steps)
        return torch.stack(steps, 1 if self.c.batch_first else 0).flatten(0, 1)


def _step(cell: str, x: Tensor, p: Tensor, h: Tensor, old: Tensor | None, w: Direction, b_n: Tensor | None, eps: float):
    """m, the new c and the gates of one step."""
    G = GATES[cell]
    if w.ln_gates is not None:
        p = F.layer_norm(p, p.shape[-1:], w.ln_gates, None, eps)
    if G == 1:
        m = torch.tanh(x + p) if cell == "rnn_tanh" else torch.relu(x + p)
        return m, None, [m]
    xs, ps = x.chunk(G, -1), p.chunk(G, -1)
    if cell == "gru":
        r, z = torch.sigmoid(xs[0] + ps[0]), torch.sigmoid(xs[1] + ps[1])
        q = ps[2] if b_n is None else ps[2] + b_n
        n = torch.tanh(xs[2] + r * q)
        return n + z * (h - n), None, [r, z, n, q]
    inner = [a + b for a, b in zip(xs, ps)]
    w_i, *w_f, w_o = (0.0,) * (G - 1) if w.peephole is None else w.peephole.unbind(0)
    i = torch.sigmoid(inner[0] + w_i * old)
    f = torch.sigmoid(inner[1] + w_f[0] * old) if cell == "lstm" else 1 - i
    g = torch.tanh(inner[-2])
    now = f * old + i * g
    o = torch.sigmoid(inner[-1] + w_o * now)
    seen = now if w.ln_cell is None else F.layer_norm(now, now.shape[-1:], w.ln_cell[0], w.ln_cell[1], eps)
    m = o * torch.tanh(seen)
    if w.w_hr is not None:
        m = F.linear(m, w.w_hr)
    return m, now, [i, f, g, o] if cell == "lstm" else [i, g, o]


def definition(tensors: Sequence[Tensor | None], c: Config) -> tuple[Tensor | None, ...]:
    """(y, h_n, c_n, gates, cells) in differentiable torch operators: what every kernel computes.

    The formulas stand in kernels/params/recurrent.h. Arithmetic and c in float32 (float64 for float64); h is rounded
    to the dtype of x.
    """
    x, directions = tensors[0], _directions(tensors)
    h0, c0, keep, reset, seed, offsets = tensors[_STATES:]
    dtype = x.dtype
    acc = _acc(dtype)
    rows = _Rows(c, offsets)
    N, G = x.shape[0], GATES[c.cell]
    has_cells = c.cell in HAS_CELLS
    resets = None if reset is None else rows.split(reset)
    results = []
    with without_autocast(x.device):
        x = x.to(acc)
        for d, given in enumerate(directions):
            w = Direction(*(None if t is None else t.to(acc) for t in given))
            P = w.w_hh.shape[1]
            H = w.w_hh.shape[0] // G
            bias, b_n = _biases(w, c.cell)
            gx = x[:, d * G * H : (d + 1) * G * H] if w.w_ih is None else F.linear(x, w.w_ih, bias)
            h = x.new_zeros(c.batch, P) if h0 is None else h0[d].to(acc)
            old = None
            if has_cells:
                old = x.new_zeros(c.batch, H) if c0 is None else c0[d].to(acc)
            xs = rows.split(gx)
            numbers = rows.split(torch.arange(N, device=x.device) + d * N)
            ys, gates, cells = [None] * c.steps, [None] * c.steps, [None] * c.steps
            for t in range(c.steps) if d == 0 else reversed(range(c.steps)):
                n = rows.sizes[t]
                last_h, last_c = h[:n], old[:n] if has_cells else None
                if resets is not None:
                    last_h = last_h.masked_fill(resets[t][:, None], 0.0)
                    last_c = last_c.masked_fill(resets[t][:, None], 0.0) if has_cells else None
                sent = last_h if keep is None else (last_h * keep[d, :n].to(acc)).to(dtype).to(acc)
                m, now, of_step = _step(c.cell, xs[t], F.linear(sent, w.w_hh), last_h, last_c, w, b_n, c.eps)
                if c.zoneout_h > 0:
                    m = last_h + _update(seed, 2 * numbers[t], m, c.zoneout_h) * (m - last_h)
                if c.zoneout_c > 0 and has_cells:
                    now = last_c + _update(seed, 2 * numbers[t] + 1, now, c.zoneout_c) * (now - last_c)
                ys[t] = m.to(dtype)
                m = ys[t].to(acc)
                h = m if n == c.batch else torch.cat([m, h[n:]])
                gates[t] = torch.cat(of_step, -1)
                if has_cells:
                    cells[t] = now
                    old = now if n == c.batch else torch.cat([now, old[n:]])
            results.append((
                rows.join(ys, gx[:, :P]).to(dtype), h.to(dtype), old.to(dtype) if has_cells else None,
                rows.join(gates, gx.new_empty(0, SAVED[c.cell] * H)).to(dtype),
                rows.join(cells, gx[:, :H]) if has_cells else None,
            ))  # fmt: skip
    ys, *others = zip(*results)
    return torch.cat(ys, -1), *(None if each[0] is None else torch.stack(each) for each in others)


def _update(seed: Tensor | None, rows: Tensor, like: Tensor, p: float) -> Tensor | float:
    """Zoneout's share of the new value."""
    return 1.0 - p if seed is None else keep_mask(seed, rows, like.shape[-1], p).to(like.dtype)


# ---- leaves: allocate, then run a backend ----


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _dense_rows(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _shape(tensors: Sequence[Tensor | None], c: Config) -> tuple[int, int, int, int]:
    """directions, rows, H and P."""
    D = 1 if tensors[2 + _N_DIRECTION] is None else 2
    G_H, P = tensors[2].shape
    w_hr = tensors[5]
    return D, tensors[0].shape[0], G_H // GATES[c.cell], P if w_hr is None else w_hr.shape[0]


def _kernel_inputs(tensors: Sequence[Tensor | None], projected: Sequence[Tensor], c: Config) -> list[Tensor | None]:
    """What the kernels of a layer read, in the order of their arguments; ``projected``: gx of each direction."""
    found: list[Tensor | None] = []
    for d, w in enumerate(_directions(tensors)):
        b_n = None if c.cell != "gru" or w.b_hh is None else w.b_hh[-(w.b_hh.shape[0] // 3) :]
        found += [projected[d], _dense_rows(w.w_hh), _dense(b_n), _dense_rows(w.w_hr), _dense(w.peephole)]
        found += [_dense(w.ln_gates), _dense(w.ln_cell)]
    found += [None] * (14 - len(found))
    return found + [_dense(t) for t in tensors[_STATES:]]


def _arguments(c: Config) -> tuple:
    return c.cell, c.steps, c.batch, c.batch_first, c.zoneout_h, c.zoneout_c, c.eps, _get_num_threads()


def _workspace(size, tensors: Sequence[Tensor | None], gx: Tensor, c: Config) -> Tensor | None:
    """Memory of the kernels' own; ``size``: what tells the elements of it."""
    first, *rest = _directions(tensors)
    w_hh_r = rest[0].w_hh if rest else None
    elements = size(gx, first.w_hh, first.w_hr, first.ln_gates, w_hh_r, tensors[-1], c.cell, c.steps, c.batch)
    return gx.new_empty(elements, dtype=_acc(gx.dtype)) if elements else None


def _project(x: Tensor, w: Direction, c: Config, out: Tensor) -> None:
    """gx of a direction, into ``out``."""
    bias, _ = _biases(w, c.cell)
    if bias is None:
        torch.mm(x, w.w_ih.t(), out=out)
    else:
        torch.addmm(bias, x, w.w_ih.t(), out=out)


def forward_leaf(tensors: Sequence[Tensor | None], c: Config) -> tuple[Tensor | None, ...]:
    """(y, h_n, c_n, gates, cells) on the kernels of ``c.backend``; None is what was not asked for."""
    D, N, H, P = _shape(tensors, c)
    x, directions, G, S = tensors[0], _directions(tensors), GATES[c.cell], SAVED[c.cell]
    has_cells, kept = c.cell in HAS_CELLS, c.differentiated or c.return_states
    y, h_n = x.new_empty(N, D * P), x.new_empty(D, c.batch, P)
    c_n = x.new_empty(D, c.batch, H) if has_cells else None
    gates = x.new_empty(D, N, S * H) if kept else None
    cells = x.new_empty(D, N, H, dtype=_acc(x.dtype)) if has_cells and kept else None
    if N == 0:
        for t, t0 in ((h_n, tensors[_STATES]), (c_n, tensors[_STATES + 1])):
            if t is not None:
                t.zero_() if t0 is None else t.copy_(t0)
        return y, h_n, c_n, gates, cells
    with torch.no_grad(), without_autocast(x.device):
        if directions[0].w_ih is None:
            projected = [x[:, d * G * H : (d + 1) * G * H] for d in range(D)]
        else:
            # The gates take the place of what they are made of, where there is as much of both.
            projected = gates if kept and G == S else x.new_empty(D, N, G * H)
            for d, w in enumerate(directions):
                _project(x, w, c, projected[d])
        kernels = leaf(c.backend, "recurrent")
        workspace = _workspace(kernels.recurrent_fwd_workspace, tensors, projected[0], c)
        kernels.recurrent_fwd(
            *_kernel_inputs(tensors, projected, c), y, h_n, c_n, gates, cells, workspace, *_arguments(c)
        )
    return y, h_n, c_n, gates, cells


def _last_h(y: Tensor, h0: Tensor, d: int, c: Config, offsets: Tensor | None) -> Tensor:
    """[rows, P]: the h that each row of direction d began with."""
    P = h0.shape[-1]
    if offsets is None:
        y = y.reshape(*((c.batch, c.steps) if c.batch_first else (c.steps, c.batch)), P)
        dim = 1 if c.batch_first else 0
        rest = y.narrow(dim, 1 if d else 0, c.steps - 1)
        first = h0.unsqueeze(dim)
        return torch.cat([rest, first] if d else [first, rest], dim).flatten(0, 1)
    sizes = offsets.diff()
    t = torch.repeat_interleave(torch.arange(c.steps, device=offsets.device), sizes)
    b = torch.arange(y.shape[0], device=offsets.device) - offsets[t]
    if d == 0:
        at = torch.where(t > 0, offsets[t - 1] + b, y.shape[0] + b)
    else:
        after = (t + 1).clamp(max=c.steps - 1)
        begun = (t + 1 < c.steps) & (b < sizes[after])
        at = torch.where(begun, offsets[after] + b, y.shape[0] + b)
    return torch.cat([y, h0])[at.to(y.device)]


def _sent(y: Tensor, h0: Tensor | None, keep: Tensor | None, reset, d: int, c: Config, offsets) -> Tensor:
    """[rows, P]: h' of each row, what the step multiplied with W_hh."""
    P = y.shape[1]
    last = _last_h(y, y.new_zeros(c.batch, P) if h0 is None else h0, d, c, offsets)
    if reset is not None:
        last = last.masked_fill(reset[:, None], 0.0)
    if keep is None:
        return last
    if offsets is not None:
        return last * torch.cat([keep[:n] for n in offsets.diff().tolist()])
    shape = (c.batch, c.steps, P) if c.batch_first else (c.steps, c.batch, P)
    return (last.view(shape) * (keep[:, None] if c.batch_first else keep)).flatten(0, 1)


def _sum_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, a block of rows at a time: one long sum loses more digits than a sum of sums, as step by step."""
    rows = min(max(a.shape[0] // 4, 64), 512)
    if a.shape[0] <= rows or a.dtype.itemsize == 2:  # in 16 bits each sum is rounded
        return torch.mm(a.t(), b)
    total = torch.mm(a[:rows].t(), b[:rows])
    for first in range(rows, a.shape[0], rows):
        total.addmm_(a[first : first + rows].t(), b[first : first + rows])
    return total


def _product_gradient(dp: Tensor, y: Tensor, h0: Tensor | None, keep, reset, d: int, c: Config, offsets) -> Tensor:
    """dW_hh = sum over the rows of dp h'^T."""
    if y.shape[0] == 0:
        return y.new_zeros(dp.shape[1], y.shape[1])
    if offsets is not None or c.batch_first or keep is not None or reset is not None:
        return _sum_over_rows(dp, _sent(y, h0, keep, reset, d, c, offsets))
    rest, B = (c.steps - 1) * c.batch, c.batch
    dw = _sum_over_rows(dp[:rest], y[B:]) if d else _sum_over_rows(dp[B:], y[:rest])
    if h0 is not None:
        dw.addmm_((dp[rest:] if d else dp[:B]).t(), h0)
    return dw


def _bias_gradients(
    sums: Tensor, cell: str, dtype: torch.dtype, of_ih: bool, of_hh: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of b_ih and b_hh, each with memory of its own, from the sums [S, H] over the rows."""
    db_ih = sums[: GATES[cell]].flatten().to(dtype) if of_ih else None
    if not of_hh:
        return db_ih, None
    return db_ih, (sums[[0, 1, 3]] if cell == "gru" else sums).flatten().to(dtype, copy=True)


def _projection_gradient(
    dm: Tensor, gates: Tensor, cells: Tensor, w: Direction, c: Config, last_c: Tensor | None
) -> Tensor:
    """dW_hr = sum over the rows of dm m^T, with m computed again."""
    H = cells.shape[-1]
    acc = cells.dtype
    now = cells
    if last_c is not None:
        i, g = gates[:, :H].to(acc), gates[:, -2 * H : -H].to(acc)
        f = 1 - i if c.cell == "coupled" else gates[:, H : 2 * H].to(acc)
        now = f * last_c + i * g
    if w.ln_cell is not None:
        now = F.layer_norm(now, (H,), w.ln_cell[0].to(acc), w.ln_cell[1].to(acc), c.eps)
    m = gates[:, -H:].to(acc) * torch.tanh(now)
    return _sum_over_rows(dm, m.to(dm.dtype))


def backward_leaf(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    tensors: Sequence[Tensor | None],
    y: Tensor | None,
    gates: Tensor,
    cells: Tensor | None,
    c: Config,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """A gradient for each tensor on the kernels of ``c.backend``; None where ``needs`` says so."""
    D, N, H, P = _shape(tensors, c)
    if y is None:  # of a single step: it has a shape, but is not read
        y = gates.new_empty(N, D * P)
    x, directions, G, S = tensors[0], _directions(tensors), GATES[c.cell], SAVED[c.cell]
    h0, c0, keep, reset, _, offsets = tensors[_STATES:]
    has_cells, acc = c.cell in HAS_CELLS, _acc(x.dtype)

    def asked(name: str) -> bool:
        at = 1 + Direction._fields.index(name)
        return any(needs[at + d * _N_DIRECTION] for d in range(D))

    dgx = x.new_empty(D, N, G * H)
    normalised, projected = directions[0].ln_gates is not None, directions[0].w_hr is not None
    dp = torch.empty_like(dgx) if c.cell == "gru" or normalised else None
    dm = x.new_empty(D, N, P) if projected else None
    dbias = x.new_empty(D, S, H, dtype=acc) if asked("b_ih") or asked("b_hh") else None
    dpeephole = x.new_empty(D, G - 1, H, dtype=acc) if asked("peephole") else None
    dln_gates = x.new_empty(D, G * H, dtype=acc) if asked("ln_gates") else None
    dln_cell = x.new_empty(D, 2, H, dtype=acc) if asked("ln_cell") else None

    def of_direction(t: Tensor | None, d: int) -> Tensor | None:
        return None if t is None else t[d]

    def sent(d: int) -> Tensor:
        return _sent(y[:, d * P : (d + 1) * P], of_direction(h0, d), of_direction(keep, d), reset, d, c, offsets)

    dh0 = x.new_empty(D, c.batch, P, dtype=acc)
    dc0 = x.new_empty(D, c.batch, H, dtype=acc) if has_cells else None
    if N == 0:
        for t, d_n in ((dh0, dh_n), (dc0, dc_n)):
            if t is not None:
                t.zero_() if d_n is None else t.copy_(d_n)
        for t in (dbias, dpeephole, dln_gates, dln_cell):
            if t is not None:
                t.zero_()
    else:
        products = None
        if normalised:
            with without_autocast(x.device):
                products = x.new_empty(D, N, G * H, dtype=acc)
                for d, w in enumerate(directions):
                    torch.mm(sent(d).to(acc), w.w_hh.to(acc).t(), out=products[d])
        # In the place of gx, which backward does not read, the gates that came of it.
        of_gates = gates[:, :, : G * H]
        kernels = leaf(c.backend, "recurrent")
        workspace = _workspace(kernels.recurrent_bwd_workspace, tensors, of_gates[0], c)
        kernels.recurrent_bwd(
            _dense_rows(dy), _dense(dh_n), _dense(dc_n), _dense(dcells),
            *_kernel_inputs(tensors, of_gates, c), y, gates, cells, products,
            dgx, dp, dm, dbias, dpeephole, dln_gates, dln_cell, dh0, dc0, workspace, *_arguments(c),
        )  # fmt: skip
    grads: list[Tensor | None] = [None] * _N_INPUTS
    with without_autocast(x.device):
        for d, w in enumerate(directions):
            at = 1 + d * _N_DIRECTION
            if w.w_ih is not None and needs[0]:
                grads[0] = dgx[d] @ w.w_ih if grads[0] is None else torch.addmm(grads[0], dgx[d], w.w_ih)
            if needs[at]:
                grads[at] = _sum_over_rows(dgx[d], x)
            if needs[at + 1]:
                grads[at + 1] = _product_gradient(
                    (dgx if dp is None else dp)[d], y[:, d * P : (d + 1) * P], of_direction(h0, d),
                    of_direction(keep, d), reset, d, c, offsets,
                )  # fmt: skip
            if needs[at + 2] or needs[at + 3]:
                sums = dbias[d]
                if w.w_ih is None:  # x holds all of b_hh but b_n
                    sums = sums * (torch.arange(S, device=x.device) == 3)[:, None] if c.cell == "gru" else sums * 0.0
                grads[at + 2 : at + 4] = _bias_gradients(sums, c.cell, x.dtype, needs[at + 2], needs[at + 3])
            if needs[at + 4]:
                last_c = None
                if c.zoneout_c > 0 and N > 0:
                    start = cells.new_zeros(c.batch, H) if c0 is None else c0[d].to(acc)
                    last_c = _last_h(cells[d], start, d, c, offsets)
                    last_c = last_c if reset is None else last_c.masked_fill(reset[:, None], 0.0)
                grads[at + 4] = _projection_gradient(dm[d], gates[d], cells[d], w, c, last_c)
            if needs[at + 5]:
                grads[at + 5] = dpeephole[d].to(w.peephole.dtype)
            if needs[at + 6]:
                grads[at + 6] = dln_gates[d].to(w.ln_gates.dtype)
            if needs[at + 7]:
                grads[at + 7] = dln_cell[d].to(w.ln_cell.dtype)
        if directions[0].w_ih is None and needs[0]:
            grads[0] = dgx[0] if D == 1 else torch.cat(list(dgx), -1)
    if needs[_STATES]:
        grads[_STATES] = dh0.to(h0.dtype)
    if needs[_STATES + 1]:
        grads[_STATES + 1] = dc0.to(c0.dtype)
    return tuple(grads)


# ---- the leaves as torch operators ----

_CONFIG = (
    "str cell, SymInt steps, SymInt batch, bool batch_first, float zoneout_h, float zoneout_c, float eps, "
    "bool differentiated, bool return_states, str backend"
)
_INPUTS = "Tensor x, " + ", ".join(
    f"Tensor{'' if (name, suffix) == ('w_hh', '') else '?'} {name}{suffix}"
    for suffix in ("", "_r")
    for name in Direction._fields
)
_INPUTS += ", Tensor? h0, Tensor? c0, Tensor? keep, Tensor? reset, Tensor? seed, Tensor? offsets"
_library = torch.library.Library("pyops", "FRAGMENT")
_library.define(
    f"recurrent_fwd({_INPUTS}, {_CONFIG}) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
_library.define(
    f"recurrent_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, {_INPUTS}, Tensor? y, Tensor gates, "
    f"Tensor? cells, {_CONFIG}, bool[] needs) -> Tensor[]"
)


def _fwd_operator(*args):
    tensors, c = args[:_N_INPUTS], Config(*args[_N_INPUTS:])
    return tuple(_present(t, tensors[0]) for t in forward_leaf(tensors, c))


def _bwd_operator(*args):
    grads, tensors = args[:4], args[4 : 4 + _N_INPUTS]
    y, gates, cells, *config, needs = args[4 + _N_INPUTS :]
    found = backward_leaf(*grads, tensors, y, gates, cells, Config(*config), needs)
    # An operator's outputs share no memory.
    return [
        _present(t if t is None or t.untyped_storage().nbytes() == t.nbytes else t.clone(), tensors[0]) for t in found
    ]


for _device in ("CPU", "CUDA"):
    _library.impl("recurrent_fwd", _fwd_operator, _device)
    _library.impl("recurrent_bwd", _bwd_operator, _device)


@torch.library.register_fake("pyops::recurrent_fwd", lib=_library)
def _fwd_fake(*args):
    tensors, c = args[:_N_INPUTS], Config(*args[_N_INPUTS:])
    D, N, H, P = _shape(tensors, c)
    x, has_cells = tensors[0], c.cell in HAS_CELLS
    kept = c.differentiated or c.return_states
    return (
        x.new_empty(N, D * P),
        x.new_empty(D, c.batch, P),
        x.new_empty(D, c.batch, H) if has_cells else x.new_empty(0),
        x.new_empty(D, N, SAVED[c.cell] * H) if kept else x.new_empty(0),
        x.new_empty(D, N, H, dtype=_acc(x.dtype)) if kept and has_cells else x.new_empty(0),
    )


@torch.library.register_fake("pyops::recurrent_bwd", lib=_library)
def _bwd_fake(*args):
    tensors, needs = args[4 : 4 + _N_INPUTS], args[-1]
    return [t.new_empty(t.shape) if need else tensors[0].new_empty(0) for t, need in zip(tensors, needs)]


@torch.library.register_vmap("pyops::recurrent_fwd", lib=_library)
def _fwd_vmap(info, in_dims, *args):
    return autograd.per_sample(torch.ops.pyops.recurrent_fwd.default, info, in_dims, args)


@torch.library.register_vmap("pyops::recurrent_bwd", lib=_library)
def _bwd_vmap(info, in_dims, *args):
    results, dims = autograd.per_sample(torch.ops.pyops.recurrent_bwd.default, info, in_dims, args)
    return list(results), list(dims)


# ---- autograd ----


def _with_direction(t: Tensor | None) -> Tensor | None:
    """A state, or its gradient, as [directions, batch, numbers]."""
    return t if t is None or t.dim() == 3 else t.unsqueeze(0)


class RecurrentRule(autograd.Rule):
    """Tensors: those of :func:`definition`, but the states of a direct call of a cell have no directions. Saved: the
    same, then y, gates and cells. Backward reads y of the steps before alone: of a single step it is not saved, so that
    the h that a cell returned may be changed in place."""

    name = "Recurrent"
    config = Config
    n_tensors = _N_INPUTS
    n_saved = _N_INPUTS + 3
    n_grads = 4  # of y, h_n, c_n and cells
    recomputed = tuple(range(_N_INPUTS, _N_INPUTS + 3))

    @staticmethod
    def forward(direct, tensors, config):
        if direct:
            return forward_leaf(tensors, config)
        results = torch.ops.pyops.recurrent_fwd(*tensors, *config)
        has_cells, kept = config.cell in HAS_CELLS, config.differentiated or config.return_states
        here = (True, True, has_cells, kept, kept and has_cells)
        return tuple(r if present else None for r, present in zip(results, here))

    @staticmethod
    def outputs(results, config):
        y, h_n, c_n, _, cells = results
        if config.cell not in HAS_CELLS:
            return y, h_n
        return (y, h_n, c_n, cells) if config.return_states else (y, h_n, c_n)

    @staticmethod
    def constants(results, config):
        return (results[3],) if config.return_states else ()

    @staticmethod
    def saved(tensors, results, config):
        return *tensors, results[0] if config.steps > 1 else None, results[3], results[4]

    @staticmethod
    def backward(direct, grads, saved, c, needs):
        given, (y, gates, cells) = list(saved[:_N_INPUTS]), saved[_N_INPUTS:]
        tensors = [*given[:_STATES], *map(_with_direction, given[_STATES : _STATES + 2]), *given[_STATES + 2 :]]
        grads = (grads[0], *map(_with_direction, grads[1:3]), grads[3])
        needs = tuple(needs) + (False,) * (_N_INPUTS - len(needs))
        if direct:
            found = backward_leaf(*grads, tensors, y, gates, cells, c, needs)
        else:
            found = torch.ops.pyops.recurrent_bwd(*grads, *tensors, y, gates, cells, *c, needs)
        return tuple(
            None if not need else g if t.dim() == g.dim() else g.view_as(t) for g, t, need in zip(found, given, needs)
        )

    @staticmethod
    def backward_direct(ctx, saved, grads):
        needs = ctx.needs_input_grad
        cell, steps, batch, batch_first = ctx.config[:4]
        x, w_ih, w_hh, _, b_hh = saved[:5]
        h0, c0, y, gates, cells = (saved[i] for i in _AT_STATES)
        if y is None:  # anything of its shape
            y = h0 if h0 is not None and h0.dim() == 2 else gates[0, :, : w_hh.shape[1]]
        wanted = (*needs[1:6], needs[_STATES + 1], needs[_STATES + 2])
        found = cpu_kernels("cpu").recurrent_backward(
            cell, (x, w_ih, w_hh, b_hh, h0, c0, y, gates, cells), grads, steps, batch, batch_first, wanted
        )
        if found is None:
            return None
        if len(found) == len(wanted):
            if x.dtype.itemsize == 2:
                found = [None if t is None else t.to(x.dtype) for t in found]
            return None, *found[:5], *_NO_OPTIONS, *found[5:]
        dgx, dp, dbias, dh0, dc0 = found
        dx = dw_ih = dw_hh = db_ih = db_hh = None
        with without_autocast(x.device):
            if needs[1]:
                dx = torch.mm(dgx, w_ih)
            if needs[2]:
                dw_ih = _sum_over_rows(dgx, x)
            if needs[3]:
                first = None if h0 is None else h0.view(batch, -1)
                dp = dgx if dp is None else dp
                if steps > 1:
                    dw_hh = _product_gradient(dp, y, first, None, None, 0, Config(*ctx.config), None)
                else:
                    dw_hh = torch.zeros_like(w_hh) if first is None else _sum_over_rows(dp, first)
        if dbias is not None:
            db_ih, db_hh = _bias_gradients(dbias, cell, x.dtype, needs[4], needs[5])
        dh0 = dh0.to(x.dtype) if needs[_STATES + 1] else None
        dc0 = dc0.to(x.dtype) if needs[_STATES + 2] else None
        return None, dx, dw_ih, dw_hh, db_ih, db_hh, *_NO_OPTIONS, dh0, dc0

    @staticmethod
    def formula(grads, saved, c, needs):
        tensors = saved[:_N_INPUTS]
        at = [i for i, need in enumerate(needs) if need]

        def outputs(*some):
            full = list(tensors)
            for i, t in zip(at, some):
                full[i] = t
            full[_STATES : _STATES + 2] = map(_with_direction, full[_STATES : _STATES + 2])
            y, h_n, c_n, _, cells = definition(full, c)
            return tuple(t for t, g in zip((y, h_n, c_n, cells), grads) if g is not None)

        grads = (grads[0], *map(_with_direction, grads[1:3]), grads[3])
        _, vjp = torch.func.vjp(outputs, *(tensors[i] for i in at))
        found = dict(zip(at, vjp(tuple(g for g in grads if g is not None))))
        return tuple(found.get(i) for i in range(_N_INPUTS))


_apply_direct, _apply_plain, _apply_functorch = autograd.make(RecurrentRule)


def _run(tensors: Sequence[Tensor | None], c: Config) -> tuple[Tensor | None, ...]:
    """(y, h_n, c_n, gates, cells) of a valid call by the way that the surroundings allow."""
    if c.backend in ("eager", "torch") or needs_definition():
        y, h_n, c_n, gates, cells = definition(tensors, c)
        return y, h_n, c_n, gates.detach(), cells
    if functorch_active():
        return _apply_functorch(c._replace(differentiated=True), *tensors)
    direct = is_plain(*tensors)
    if not (_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return RecurrentRule.forward(direct, tensors, c)
    c = c._replace(differentiated=True)
    y, h_n, *rest = _apply_plain(direct, c, *(autograd.distinct(tensors) if is_compiling() else tensors))
    c_n = rest.pop(0) if c.cell in HAS_CELLS else None
    cells = rest.pop(0) if c.cell in HAS_CELLS and c.return_states else None
    return y, h_n, c_n, rest.pop(0) if c.return_states else None, cells


# ---- public functions ----


def _direct(
    cell: str, input: Tensor, h: Tensor | None, c: Tensor | None, w: Sequence[Tensor | None], is_cell: bool,
    batch_first: bool, backend: str | None,
) -> tuple[Tensor | None, ...] | None:  # fmt: skip
    """(h, c) of a cell's call, (y, h_n, c_n) of a sequence's, where it is the one that most calls are: a layer without
    options, plain, valid, dense, on the CPU; None for any other.

    It does what the rest of the way would do, with the questions, the allocation and the kernel in one C++ call
    (bench/notes/recurrent.md, host cost).
    """
    kernels = cpu_kernels(backend)
    if kernels is None or is_compiling() or _autocast_enabled("cpu"):
        return None
    results = kernels.recurrent_forward(cell, input, h, c, *w, is_cell, batch_first)
    if results is None or len(results) < 5:
        return results
    y, h_n, c_n, gates, cells = results
    if is_cell:
        steps, batch, x = 1, input.shape[0], input
    else:
        batch, steps = input.shape[:2] if batch_first else input.shape[1::-1]
        x = input.view(steps * batch, -1)
    config = (cell, steps, batch, batch_first, 0.0, 0.0, 0.0, True, False, "cpu")
    tensors = (x, *w, *_NO_OPTIONS, h, c)
    outputs = (y, h_n) if c_n is None else (y, h_n, c_n)
    saved = (*tensors, None, None, None, None, y if steps > 1 else None, gates, cells)
    y, h_n, *c_n = _apply_direct((outputs, saved, config), *tensors)
    c_n = c_n[0] if c_n else None
    return (y, c_n) if is_cell else (y.view(*input.shape[:2], -1), h_n, c_n)


def _without_options(zoneout: Any, recurrent_dropout: Any, eps: Any, return_states: Any, *others: Any) -> bool:
    """What is not valid counts as an option."""
    zero = type(zoneout) is type(recurrent_dropout) is float and zoneout == recurrent_dropout == 0.0
    return zero and eps == 1e-5 and not return_states and all(t is None for t in others)


def _direct_layer(
    cell: str, input: Tensor | PackedSequence, h: Tensor | None, c: Tensor | None, weights: Any, bidirectional: bool,
    dropout: Any, batch_first: bool, backend: str | None, plain: bool,
) -> tuple[Tensor | None, ...] | None:  # fmt: skip
    """:func:`_direct` of a sequence; ``plain``: it has no options."""
    if not plain or bidirectional or type(input) is PackedSequence:
        return None
    if type(dropout) is not float or not 0.0 <= dropout <= 1.0 or type(weights) not in (list, tuple):
        return None
    if len(weights) != 1:
        return None
    w = weights[0]
    if type(w) not in (list, tuple) or len(w) != 5 or w[4] is not None:
        return None
    return _direct(cell, input, h, c, w[:4], False, batch_first, backend)


class Options(NamedTuple):
    """What the layers of a call share beyond torch's own arguments, checked."""

    peepholes: Sequence[Tensor | None] | None
    norms: Sequence[Sequence[Tensor | None]] | None
    zoneout: tuple[float, float]
    recurrent_dropout: float
    eps: float
    return_states: bool


class States(NamedTuple):
    """What a layer did at each step, with the leading dimensions of the input.

    gates: (..., directions, S, hidden_size), what the gates became, without gradient: i, f, g, o of an LSTM (i, g, o of
        a coupled one); r, z, n and the product that r multiplies, of a GRU; the new h of an RNN.
    cells: (..., directions, hidden_size), c after the step, with gradient; float32 beside 16-bit input. None but for
        LSTMs.
    """

    gates: Tensor
    cells: Tensor | None


def _check_probability(op: str, name: str, p: object) -> float:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        _fail(op, name, "be a number", type(p).__name__, TypeError)
    if not 0 <= p <= 1:
        _fail(op, name, "lie in [0, 1]", p)
    return float(p)


def _check_tensor(
    op: str, name: str, t: object, like: Tensor | None, shape: tuple[int, ...] | None = None, of: str = "input"
) -> None:
    """``like``, which messages call ``of``, gives the device and the dtype (under autocast: whether it is float64)."""
    if not isinstance(t, Tensor):
        _fail(op, name, "be a torch.Tensor", type(t).__name__, TypeError)
    if t.layout != torch.strided or t.is_nested:
        _fail(op, name, "be a strided tensor", "a nested one" if t.is_nested else t.layout, TypeError)
    if t.dtype not in FLOATING:
        _fail(op, name, "have dtype float64, float32, bfloat16 or float16", t.dtype, TypeError)
    if like is not None:
        if t.device != like.device:
            _fail(op, name, f"be on the device of {of}, {like.device}", t.device)
        if t.dtype != like.dtype and (not is_autocast(like.device.type) or torch.float64 in (t.dtype, like.dtype)):
            _fail(op, name, f"have the dtype of {of}, {like.dtype}", t.dtype, TypeError)
    if shape is not None and tuple(t.shape) != shape:
        _fail(op, name, f"have shape {shape}", tuple(t.shape))


_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def _check_weights(op: str, cell: str, x: Tensor, weights: object, D: int, o: Options) -> tuple[int, int]:
    """H and P, once the parameters of every layer and direction fit each other and the input."""
    is_cell = op.endswith("_cell")

    def named(i: int, j: int) -> str:
        return _WEIGHTS[j] if is_cell else f"weights[{i}][{j}]"

    if not isinstance(weights, (tuple, list)) or not weights or len(weights) % D:
        got = len(weights) if isinstance(weights, (tuple, list)) else type(weights).__name__
        _fail(op, "weights", "hold an entry for each layer" + " and direction, an even number" * (D > 1), got)
    G, projects = GATES[cell], cell in HAS_CELLS
    first, like = weights[0], {"of": named(0, 1)}
    for i, each in enumerate(weights):
        if not isinstance(each, (tuple, list)) or len(each) != 5:
            got = len(each) if isinstance(each, (tuple, list)) else type(each).__name__
            _fail(op, f"weights[{i}]", "be (w_ih, w_hh, b_ih, b_hh, w_hr), the last three possibly None", got)
    w_ih, w_hh = first[:2]
    _check_tensor(op, named(0, 1), w_hh, None)
    if w_hh.dim() != 2 or w_hh.shape[0] % G or w_hh.shape[0] == 0:
        _fail(op, named(0, 1), f"have shape ({G} * hidden_size, hidden_size)", tuple(w_hh.shape))
    H = w_hh.shape[0] // G
    _check_tensor(op, named(0, 0), w_ih, w_hh, **like)
    if w_ih.dim() != 2 or w_ih.shape[0] != G * H:
        _fail(op, named(0, 0), f"have shape ({G * H}, input_size)", tuple(w_ih.shape))
    P = H
    if first[4] is not None:
        if not projects:
            _fail(op, named(0, 4), "be None: only an LSTM has a projection", "a tensor")
        _check_tensor(op, named(0, 4), first[4], w_hh, **like)
        if first[4].dim() != 2 or not 0 < first[4].shape[0] < H:
            _fail(op, named(0, 4), "have shape (proj_size, hidden_size) with proj_size < hidden_size",
                  tuple(first[4].shape))  # fmt: skip
        P = first[4].shape[0]
    for i, each in enumerate(weights):
        features = w_ih.shape[1] if i < D else D * P
        shapes = ((G * H, features), (G * H, P), (G * H,), (G * H,), None if first[4] is None else (P, H))
        for j, (t, shape) in enumerate(zip(each, shapes)):
            if t is None and (j in (2, 3) or shape is None):
                continue
            if shape is None:
                _fail(op, named(i, j), f"be None, as {named(0, 4)} is", "a tensor")
            _check_tensor(op, named(i, j), t, w_hh, shape, **like)
    # The weights fit each other: what does not fit them is the input.
    _check_tensor(op, "input", x, w_hh, of="the weights")
    if x.shape[-1] != w_ih.shape[1]:
        _fail(op, "input", f"have {w_ih.shape[1]} features (input_size)", x.shape[-1])
    for name, found, shapes in (
        ("peephole", o.peepholes, ((G - 1, H),)),
        ("norm", o.norms, ((G * H,), (G * H,), (2, H) if projects else None)),
    ):
        if found is None:
            continue
        if not isinstance(found, (tuple, list)) or len(found) != len(weights):
            _fail(op, f"{name}s", "have an entry for each entry of weights, " + str(len(weights)),
                  len(found) if isinstance(found, (tuple, list)) else type(found).__name__)  # fmt: skip
        for i, each in enumerate(found):
            shown = name if is_cell else f"{name}s[{i}]"
            group = (each,) if name == "peephole" else each
            if not isinstance(group, (tuple, list)) or len(group) != len(shapes):
                _fail(op, shown, "be (norm_ih, norm_hh, norm_cell), the weights of the norms of W_ih x, W_hh h and c",
                      len(group) if isinstance(group, (tuple, list)) else type(group).__name__)  # fmt: skip
            for j, (t, shape) in enumerate(zip(group, shapes)):
                member = shown if name == "peephole" else f"{shown}[{j}]"
                if shape is not None:
                    _check_tensor(op, member, t, x, shape)
                elif t is not None:
                    _fail(op, member, "be None: only an LSTM has a cell", "a tensor")
    return H, P


def _check_batch_sizes(op: str, sizes: Tensor, rows: int) -> list[int]:
    """As numbers."""
    name = "input.batch_sizes"
    if sizes.dtype != torch.int64 or sizes.dim() != 1 or not sizes.is_cpu:
        shown = f"{sizes.dim()} dimensions of {sizes.dtype} on {sizes.device}"
        _fail(op, name, "be one dimension of torch.int64 on the CPU", shown)
    found = sizes.tolist()
    if not found:
        _fail(op, name, "have at least one step", 0)
    if found[-1] < 1 or found != sorted(found, reverse=True):
        _fail(op, name, "be positive and never rise from step to step", found)
    if sum(found) != rows:
        _fail(op, name, f"sum to the rows of input.data, {rows}", sum(found))
    return found


def _check_reset(op: str, reset: object, input: Tensor | PackedSequence, x: Tensor) -> Tensor:
    """As rows; ``x``: the numbers of input."""
    packed, lead = isinstance(input, PackedSequence), tuple(x.shape[:-1])
    if packed != isinstance(reset, PackedSequence):
        _fail(op, "reset", "be a PackedSequence exactly where input is one", type(reset).__name__, TypeError)
    if packed:
        order, own = input.sorted_indices, reset.sorted_indices
        same = order is own or (order is not None and own is not None and torch.equal(order, own))
        if not same or not torch.equal(input.batch_sizes, reset.batch_sizes):
            _fail(op, "reset", "have the lengths and the order of input", f"batch sizes {reset.batch_sizes.tolist()}")
    mark = reset.data if packed else reset
    if not isinstance(mark, Tensor) or mark.dtype != torch.bool:
        _fail(op, "reset", "be a bool tensor", getattr(mark, "dtype", type(mark).__name__), TypeError)
    if tuple(mark.shape) != lead:
        _fail(op, "reset", f"have shape {lead}", tuple(mark.shape))
    if mark.device != x.device:
        _fail(op, "reset", f"be on the device of input, {x.device}", mark.device)
    return mark.reshape(-1)


def _autocast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def _common_dtype(op: str, x: Tensor, h: Tensor | None, c: Tensor | None, packed: bool = False) -> torch.dtype:
    """torch's rule under autocast: its dtype. But on the CPU torch casts the products of a GRU, an LSTM cell and a
    packed LSTM alone, and the result has the dtype of what they are added to; a dense LSTM keeps what either type of 16
    bits holds; float64 stays."""
    if not is_autocast(x.device.type) or x.dtype == torch.float64:
        return x.dtype
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.is_cpu and (op in ("gru", "gru_cell", "lstm_cell") or (op == "lstm" and packed)):
        state = h if op.startswith("gru") else c
        return torch.promote_types(dtype, (x if state is None else state).dtype)
    if x.is_cpu and op == "lstm" and x.dtype.itemsize == 2:
        return torch.promote_types(dtype, x.dtype)
    return dtype


def _config(cell: str, steps: int, batch: int, batch_first: bool, o: Options, dtype: torch.dtype, name: str) -> Config:
    of_h, of_c = o.zoneout
    if dtype != torch.float64:  # as the kernels have them: every backend draws the same units
        of_h, of_c = _as_float32(of_h), _as_float32(of_c)
    of_c = of_c if cell in HAS_CELLS else 0.0
    return Config(cell, steps, batch, batch_first, of_h, of_c, o.eps, False, o.return_states, name)


def _as_float32(p: float) -> float:
    """To 24 bits (Veltkamp 1968): arithmetic alone, which every tracer follows."""
    shifted = p * (2.0**29 + 1.0)
    return shifted - (shifted - p)


def _layer(
    x: Tensor,
    weights: Sequence[Sequence[Tensor | None]],
    h0: Tensor | None,
    c0: Tensor | None,
    reset: Tensor | None,
    offsets: Tensor | None,
    o: Options,
    at: int,
    training: bool,
    c: Config,
) -> tuple[Tensor | None, ...]:
    """(y, h_n, c_n, gates, cells) of one layer; x is [rows, features], ``weights`` has an entry for each direction,
    the first one being entry ``at`` of the call's."""
    tensors: list[Tensor | None] = []
    projected = []
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(weights):
        of_gates = of_cell = None
        if o.norms is not None:
            of_input, of_gates, of_cell = (_autocast(t, x.dtype) for t in o.norms[at + d])
            bias, b_n = _biases(Direction(w_ih, w_hh, b_ih, b_hh, w_hr, None, None, None), c.cell)
            name = None if c.backend == "torch" else c.backend
            projected.append(
                # int: torch.jit.trace makes tensors of sizes.
                layer_norm(F.linear(x, w_ih), int(w_ih.shape[0]), of_input, bias, o.eps, keep_dtype=True, backend=name)
            )
            w_ih = b_ih = None
            b_hh = None if b_n is None else F.pad(b_n, (w_hh.shape[0] - b_n.shape[0], 0))
        peephole = None if o.peepholes is None else _autocast(o.peepholes[at + d], x.dtype)
        tensors += [w_ih, w_hh, b_ih, b_hh, w_hr, peephole, of_gates, of_cell]
    tensors += [None] * (2 * _N_DIRECTION - len(tensors))
    if projected:
        x = projected[0] if len(projected) == 1 else torch.cat(projected, -1)
    keep = seed = None
    if training and o.recurrent_dropout > 0:
        keep = F.dropout(x.new_ones(len(weights), c.batch, weights[0][1].shape[1]), o.recurrent_dropout)
    if training and max(o.zoneout) > 0:
        seed = draw_seed(x.device)
    return _run((x, *tensors, h0, c0, keep, reset, seed, offsets), c)


def _sequence(
    op: str,
    cell: str,
    input: Tensor | PackedSequence,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Sequence[Tensor | None]],
    batch_first: bool,
    bidirectional: bool,
    dropout: float,
    training: bool,
    reset: Tensor | PackedSequence | None,
    o: Options,
    backend: str | None,
) -> tuple[Tensor | PackedSequence, Tensor, Tensor | None, list[States]]:
    """(output, h_n, c_n, states)."""
    D = 2 if bidirectional else 1
    packed = isinstance(input, PackedSequence)
    x = input.data if packed else input
    _check_tensor(op, "input", x, None)
    batched = packed or x.dim() == 3
    if packed and x.dim() != 2:
        _fail(op, "input", "hold rows of features", f"shape {tuple(x.shape)}")
    if not packed and x.dim() not in (2, 3):
        _fail(op, "input", "have 2 dimensions (a sequence) or 3 (a batch of them)", x.dim())
    H, P = _check_weights(op, cell, x, weights, D, o)
    layers = len(weights) // D
    offsets = None
    if packed:
        sizes = _check_batch_sizes(op, input.batch_sizes, x.shape[0])
        steps, batch, batch_first = len(sizes), sizes[0], False
        offsets = F.pad(input.batch_sizes.cumsum(0), (1, 0))
    elif batched:
        steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    else:
        steps, batch, batch_first = x.shape[0], 1, False
    state = (layers * D, batch) if batched else (layers * D,)
    for name, t, size in zip(_state_names(cell), (h0, c0), (P, H)):
        if t is not None:
            _check_tensor(op, name, t, x, (*state, size))
    if reset is not None:
        reset = _check_reset(op, reset, input, x)
    name = choose(op, x, backend)
    dtype = _common_dtype(op, x, h0, c0, packed)
    lead, x = x.shape[:-1], _autocast(x, dtype).flatten(0, -2)
    states = []
    for t in (h0, c0):
        if t is not None:
            t = _autocast(t if batched else t.unsqueeze(1), dtype)
            if packed and input.sorted_indices is not None:
                t = t.index_select(1, input.sorted_indices)
        states.append(t)
    h0, c0 = states
    c = _config(cell, steps, batch, batch_first, o, dtype, name)
    h_ns, c_ns, found = [], [], []
    for layer in range(layers):
        at = layer * D
        own = slice(at, at + D)
        y, h_n, c_n, gates, cells = _layer(
            x, [[_autocast(t, dtype) for t in each] for each in weights[own]], None if h0 is None else h0[own],
            None if c0 is None else c0[own], reset, offsets, o, at, training, c,
        )  # fmt: skip
        h_ns.append(h_n)
        c_ns.append(c_n)
        if o.return_states:
            gates = gates.unflatten(-1, (SAVED[cell], H)).movedim(0, 1).unflatten(0, lead)
            found.append(States(gates, None if cells is None else cells.movedim(0, 1).unflatten(0, lead)))
        x = F.dropout(y, dropout, training) if dropout > 0 and layer < layers - 1 else y
    h_n = h_ns[0] if layers == 1 else torch.cat(h_ns)
    c_n = None if cell not in HAS_CELLS else c_ns[0] if layers == 1 else torch.cat(c_ns)
    if packed:
        if input.unsorted_indices is not None:
            h_n = h_n.index_select(1, input.unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, input.unsorted_indices)
        return PackedSequence(x, *input[1:]), h_n, c_n, found
    if not batched:
        h_n, c_n = h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)
    return x.unflatten(0, lead), h_n, c_n, found


def _options(
    op: str, cell: str, peepholes: Any, norms: Any, zoneout: Any, recurrent_dropout: Any, eps: Any, return_states: bool
) -> Options:
    pair = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    if len(pair) != 2:
        _fail(op, "zoneout", "be a probability, or two of them (of h and of c)", zoneout)
    pair = tuple(_check_probability(op, "zoneout", p) for p in pair)
    if cell not in HAS_CELLS and pair[0] != pair[1]:
        _fail(op, "zoneout", "be one number: only an LSTM has a cell", zoneout)
    recurrent_dropout = _check_probability(op, "recurrent_dropout", recurrent_dropout)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        _fail(op, "eps", "be a finite number, not negative", eps)
    return Options(peepholes, norms, pair, recurrent_dropout, float(eps), bool(return_states))


def _state_names(cell: str) -> tuple[str, ...]:
    return ("hx[0]", "hx[1]") if cell in HAS_CELLS else ("hx",)


def _states(op: str, hx: object) -> tuple[Tensor | None, Tensor | None]:
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        _fail(op, "hx", "be a pair (h0, c0)", type(hx).__name__, TypeError)
    return tuple(hx)


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Sequence[Tensor | None]],
    *,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | PackedSequence | None = None,
    coupled: bool = False,
    peepholes: Sequence[Tensor] | None = None,
    norms: Sequence[Sequence[Tensor | None]] | None = None,
    zoneout: float | tuple[float, float] = 0.0,
    recurrent_dropout: float = 0.0,
    eps: float = 1e-5,
    return_states: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """A long short-term memory over whole sequences (Hochreiter, Schmidhuber 1997; Gers et al. 2000).

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh)        g = tanh(...)        each with its own rows
        c = f c + i g        h = o tanh(c), or W_hr (o tanh(c)) with a projection (Sak et al. 2014)

    Args:
        input: (T, B, features), (B, T, features) with ``batch_first``, (T, features) of a single sequence, or a
            PackedSequence. float64, float32, bfloat16 or float16. T and B may be 0.
        hx: (h0, c0), of (layers * directions, B, proj_size or hidden_size) and (layers * directions, B, hidden_size),
            without B for a single sequence; None: zeros.
        weights: (w_ih, w_hh, b_ih, b_hh, w_hr) for each layer and direction, in torch's order and shapes; biases and
            w_hr (the projection) may be None. Any strides. A torch module's ``all_weights`` leaves out what it has not:
            ``[(*w, None) for w in module.all_weights]``, without biases ``[(*w, None, None, None) for w in ...]``.
        batch_first, bidirectional: as in torch.nn.LSTM.
        dropout: of each layer's output but the last one's.
        training: whether dropout, zoneout and recurrent dropout are drawn; else the expected value is taken.
        reset: bool, like input without its features, so (1, B) for one step: h and c are 0 before a step where it is
            set. The reverse direction does so at the same step, which then is the last one of the part before it.
        coupled: f = 1 - i (Greff et al. 2017); w_ih, w_hh and biases hold i, g and o.
        peepholes: for each entry of weights (3, hidden_size): what i, f (of c before the step) and o (of c after it)
            add to their sums (Gers, Schmidhuber 2000); (2, hidden_size) of i and o where ``coupled``.
        norms: for each entry of weights the weights of three layer norms (Ba et al. 2016): of W_ih x and W_hh h, each
            (gates * hidden_size,), over the gates of a step together, and of c inside of tanh, (2, hidden_size): row 0
            is its weight, row 1 its bias.
        zoneout: probability, or those of h and of c, that a unit keeps its state (Krueger et al. 2017).
        recurrent_dropout: of h on its way into W_hh, one mask for all steps of a sequence (Gal, Ghahramani 2016).
        eps: of the norms.
        return_states: also return a list with a :class:`States` for each layer.
        backend: "eager", "cpu", "cuda" or "triton"; None chooses (see :func:`pyops.explain`).

    What applies to which cell:

        ==================== ==== === ===
        option               lstm gru rnn
        ==================== ==== === ===
        reset                yes  yes yes
        norms                yes  yes yes
        zoneout              h, c h   h
        recurrent_dropout    yes  yes yes
        return_states        yes  yes yes
        peepholes            yes
        coupled              yes
        projection (w_hr)    yes
        ==================== ==== === ===

    Returns:
        (output, (h_n, c_n)) as torch.nn.LSTM; with ``return_states`` (output, (h_n, c_n), states).

    Raises:
        ValueError, TypeError: ``lstm: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch.nn.LSTM: the options; empty sequences and batches; gradients of every order, on every backend;
    in 16 bits gates and c are float32 within a call, and c is rounded to the dtype of input when it is returned.
    Randomness comes from torch's generator, by one seed for a layer's zoneout and one mask for its recurrent dropout.

    Under autocast results have its dtype. On the CPU a GRU, an LSTM cell and a packed LSTM are computed in float32 and
    return it, as torch's do, where their state is float32 (c of an LSTM; the input, where no state is given).

    A PackedSequence, and packing, break the graph of torch.compile: fullgraph=True takes dense input.
    """
    h0, c0 = _states("lstm", hx)
    found = _direct_layer(
        "coupled" if coupled else "lstm", input, h0, c0, weights, bidirectional, dropout, batch_first, backend,
        _without_options(zoneout, recurrent_dropout, eps, return_states, reset, peepholes, norms),
    )  # fmt: skip
    if found is not None:
        return found[0], found[1:]
    o = _options("lstm", "lstm", peepholes, norms, zoneout, recurrent_dropout, eps, return_states)
    dropout = _check_probability("lstm", "dropout", dropout)
    output, h_n, c_n, states = _sequence(
        "lstm", "coupled" if coupled else "lstm", input, h0, c0, weights, batch_first, bidirectional, dropout, training,
        reset, o, backend,
    )  # fmt: skip
    return (output, (h_n, c_n), states) if o.return_states else (output, (h_n, c_n))


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Sequence[Tensor | None]],
    *,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | PackedSequence | None = None,
    norms: Sequence[Sequence[Tensor | None]] | None = None,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    eps: float = 1e-5,
    return_states: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """Gated recurrent units over whole sequences (Cho et al. 2014), in the form that torch and cuDNN have.

        r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh)        n = tanh(W_in x + b_in + r (W_hn h + b_hn))
        h = (1 - z) n + z h

    Args: as in :func:`lstm`, with hx being h0 alone, weights ending in None, and norms in None for the cell.

    Returns:
        (output, h_n) as torch.nn.GRU; with ``return_states`` (output, h_n, states).

    Raises:
        ValueError, TypeError: ``gru: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch.nn.GRU: as :func:`lstm` does from torch.nn.LSTM; autocast and torch.compile as there.
    """
    found = _direct_layer(
        "gru", input, hx, None, weights, bidirectional, dropout, batch_first, backend,
        _without_options(zoneout, recurrent_dropout, eps, return_states, reset, norms),
    )  # fmt: skip
    if found is not None:
        return found[:2]
    o = _options("gru", "gru", None, norms, zoneout, recurrent_dropout, eps, return_states)
    dropout = _check_probability("gru", "dropout", dropout)
    output, h_n, _, states = _sequence(
        "gru", "gru", input, hx, None, weights, batch_first, bidirectional, dropout, training, reset, o, backend
    )
    return (output, h_n, states) if o.return_states else (output, h_n)


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Sequence[Tensor | None]],
    *,
    nonlinearity: str = "tanh",
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | PackedSequence | None = None,
    norms: Sequence[Sequence[Tensor | None]] | None = None,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    eps: float = 1e-5,
    return_states: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """A simple recurrent network over whole sequences (Elman 1990).

        h = tanh(W_ih x + b_ih + W_hh h + b_hh)        or relu

    Args: as in :func:`gru`, and
        nonlinearity: "tanh" or "relu".

    Returns:
        (output, h_n) as torch.nn.RNN; with ``return_states`` (output, h_n, states).

    Raises:
        ValueError, TypeError: ``rnn: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch.nn.RNN: as :func:`lstm` does from torch.nn.LSTM; autocast and torch.compile as there.
    """
    cell = _rnn_cell("rnn", nonlinearity)
    found = _direct_layer(
        cell, input, hx, None, weights, bidirectional, dropout, batch_first, backend,
        _without_options(zoneout, recurrent_dropout, eps, return_states, reset, norms),
    )  # fmt: skip
    if found is not None:
        return found[:2]
    o = _options("rnn", cell, None, norms, zoneout, recurrent_dropout, eps, return_states)
    dropout = _check_probability("rnn", "dropout", dropout)
    output, h_n, _, states = _sequence(
        "rnn", cell, input, hx, None, weights, batch_first, bidirectional, dropout, training, reset, o, backend
    )
    return (output, h_n, states) if o.return_states else (output, h_n)


def _rnn_cell(op: str, nonlinearity: object) -> str:
    if nonlinearity not in ("tanh", "relu"):
        _fail(op, "nonlinearity", 'be "tanh" or "relu"', repr(nonlinearity))
    return f"rnn_{nonlinearity}"


def _one_step(
    op: str, cell: str, input: Tensor, h: Tensor | None, c: Tensor | None, w: tuple, training: bool, o: Options,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(h, c) after one step of a sequence or a batch of them."""
    _check_tensor(op, "input", input, None)
    if input.dim() not in (1, 2):
        _fail(op, "input", "have 1 dimension (features) or 2 (a batch of them)", input.dim())
    batched = input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    H, P = _check_weights(op, cell, x, (w,), 1, o)
    for name, t, size in zip(_state_names(cell), (h, c), (P, H)):
        if t is not None:
            _check_tensor(op, name, t, input, (x.shape[0], size) if batched else (size,))
    dtype = _common_dtype(op, x, h, c)
    config = _config(cell, 1, x.shape[0], False, o, dtype, choose(op, input, backend))
    h, c = (None if t is None else _autocast(t[None] if batched else t[None, None], dtype) for t in (h, c))
    weights = [[_autocast(t, dtype) for t in w]]
    y, _, c_n, _, _ = _layer(_autocast(x, dtype), weights, h, c, None, None, o, 0, training, config)
    c_n = None if c_n is None else c_n[0]
    return (y, c_n) if batched else (y[0], None if c_n is None else c_n[0])


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    w_hr: Tensor | None = None,
    coupled: bool = False,
    peephole: Tensor | None = None,
    norm: Sequence[Tensor] | None = None,
    zoneout: float | tuple[float, float] = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM; formula, shapes of the parameters and options as in :func:`lstm`.

    Args:
        input: (B, features), or (features,).
        hx: (h, c), of (B, proj_size or hidden_size) and (B, hidden_size), without B for (features,); None: zeros.
        w_ih, w_hh, b_ih, b_hh, w_hr: an entry of :func:`lstm`'s weights; peephole, norm: of its peepholes and norms.

    Returns:
        (h, c) after the step.

    Raises:
        ValueError, TypeError: ``lstm_cell: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch.lstm_cell: the options; a single sequence; hx may be None. In 16 bits c is rounded to the dtype
    of input after every call, as torch's is; autocast as in :func:`lstm`. The results may be changed in place.
    """
    op, cell = "lstm_cell", "coupled" if coupled else "lstm"
    h, c = _states(op, hx)
    if _without_options(zoneout, 0.0, eps, False, w_hr, peephole, norm):
        found = _direct(cell, input, h, c, (w_ih, w_hh, b_ih, b_hh), True, False, backend)
        if found is not None:
            return found
    o = _options(op, cell, _one(peephole), _one(norm), zoneout, 0.0, eps, False)
    return _one_step(op, cell, input, h, c, (w_ih, w_hh, b_ih, b_hh, w_hr), training, o, backend)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    norm: Sequence[Tensor | None] | None = None,
    zoneout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """One step of a GRU: h after it. Formula and options as in :func:`gru`, arguments as in :func:`lstm_cell`.

    Raises:
        ValueError, TypeError: ``gru_cell: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch.gru_cell: the options; a single sequence; hx may be None.
    """
    if _without_options(zoneout, 0.0, eps, False, norm):
        found = _direct("gru", input, hx, None, (w_ih, w_hh, b_ih, b_hh), True, False, backend)
        if found is not None:
            return found[0]
    o = _options("gru_cell", "gru", None, _one(norm), zoneout, 0.0, eps, False)
    return _one_step("gru_cell", "gru", input, hx, None, (w_ih, w_hh, b_ih, b_hh, None), training, o, backend)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    norm: Sequence[Tensor | None] | None = None,
    zoneout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """One step of an Elman RNN: h after it. Formula and options as in :func:`rnn`, arguments as in :func:`lstm_cell`.

    Raises:
        ValueError, TypeError: ``rnn_cell: <argument> must <rule>, got <value>``, before any work is done.

    Differs from torch.rnn_tanh_cell and torch.rnn_relu_cell: the options; a single sequence; hx may be None.
    """
    cell = _rnn_cell("rnn_cell", nonlinearity)
    if _without_options(zoneout, 0.0, eps, False, norm):
        found = _direct(cell, input, hx, None, (w_ih, w_hh, b_ih, b_hh), True, False, backend)
        if found is not None:
            return found[0]
    o = _options("rnn_cell", cell, None, _one(norm), zoneout, 0.0, eps, False)
    return _one_step("rnn_cell", cell, input, hx, None, (w_ih, w_hh, b_ih, b_hh, None), training, o, backend)[0]


def _one(t: Any) -> tuple | None:
    return None if t is None else (t,)


# torch.fx then keeps a call as one node, as it does with torch's own functions.
for _name in ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell"):
    torch.fx.wrap(_name)

# ---- modules ----

# torch's arguments, then ours.
_ARGUMENTS = (
    "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "device", "dtype"
)  # fmt: skip
_OPTIONS = ("layer_norm", "peephole", "coupled", "zoneout", "recurrent_dropout", "eps", "return_states", "backend")


def _check_module_options(op: str, has_cells: bool, options: dict[str, Any]) -> None:
    cell, zoneout = "lstm" if has_cells else "gru", options.get("zoneout", 0.0)
    _options(op, cell, None, None, zoneout, options.get("recurrent_dropout", 0.0), options.get("eps", 1e-5), False)
    for name in ("layer_norm", "peephole", "coupled", "return_states"):
        if not isinstance(options.get(name, False), bool):
            _fail(op, name, "be a bool", repr(options[name]), TypeError)
    for name in ("peephole", "coupled"):
        if options.get(name) and not has_cells:
            _fail(op, name, "be False: only an LSTM has it", options[name])
    if options.get("backend") is not None:
        check_name(op, options["backend"])


def _check_names(op: str, known: tuple[str, ...], given: dict[str, Any]) -> None:
    for name in given:
        if name not in known:
            _fail(op, "keyword", f"be one of {', '.join(known)}", repr(name), TypeError)


def _couple(module: nn.Module, H: int) -> None:
    """Weights and biases of i, g and o in the place of those of four gates."""
    for name in [n for n, _ in module.named_parameters() if not n.startswith("weight_hr")]:
        own = getattr(module, name)
        setattr(module, name, nn.Parameter(own.new_empty(3 * H, *own.shape[1:])))


def _start_norms(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name.startswith("norm_"):
            nn.init.ones_(parameter)
            if name.startswith("norm_cell"):
                nn.init.zeros_(parameter[1])


class _Sequence(nn.RNNBase):
    """What LSTM, GRU and RNN share."""

    # Class attributes, so that a torch module whose class is exchanged has them too.
    layer_norm = False
    peephole = False
    coupled = False
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout = 0.0
    eps = 1e-5
    return_states = False
    backend: str | None = None

    def __init__(self, mode: str, args: tuple, kwargs: dict[str, Any]) -> None:
        op = type(self).__name__
        own = {"LSTM": ("proj_size",), "GRU": ()}.get(mode, ("nonlinearity",))
        _check_names(op, (*_ARGUMENTS, *own, *_OPTIONS), kwargs)
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        dropout = args[5] if len(args) > 5 else kwargs.get("dropout", 0.0)
        _check_probability(op, "dropout", dropout)
        _check_module_options(op, mode == "LSTM", options)
        super().__init__(mode, *args, **kwargs)
        for name, value in options.items():
            setattr(self, name, value)
        self._add_parameters()

    def _add_parameters(self) -> None:
        """What the options need beyond torch's parameters."""
        H = self.hidden_size
        weight = self.weight_hh_l0
        if self.coupled:
            _couple(self, H)
        G = self.weight_hh_l0.shape[0] // H
        for suffix in self._suffixes():
            if self.peephole:
                setattr(self, f"peephole{suffix}", nn.Parameter(weight.new_empty(G - 1, H)))
            if self.layer_norm:
                setattr(self, f"norm_ih{suffix}", nn.Parameter(weight.new_empty(G * H)))
                setattr(self, f"norm_hh{suffix}", nn.Parameter(weight.new_empty(G * H)))
                if self.mode == "LSTM":
                    setattr(self, f"norm_cell{suffix}", nn.Parameter(weight.new_empty(2, H)))
        if self.coupled or self.peephole or self.layer_norm:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _start_norms(self)

    def flatten_parameters(self) -> None:
        """Nothing: the kernels read each parameter where it lies, and cuDNN refuses those of coupled gates."""

    def _suffixes(self) -> list[str]:
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _arguments(self) -> dict[str, Any]:
        # By name: functional_call and parametrizations do not reach _flat_weights.
        def found(names: Sequence[str], suffix: str) -> tuple[Tensor | None, ...]:
            return tuple(getattr(self, name + suffix, None) for name in names)

        suffixes = self._suffixes()
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        arguments = {
            "weights": [found(kinds, suffix) for suffix in suffixes],
            "batch_first": self.batch_first, "bidirectional": self.bidirectional, "dropout": float(self.dropout),
            "training": self.training, "zoneout": self.zoneout, "recurrent_dropout": self.recurrent_dropout,
            "eps": self.eps, "return_states": self.return_states, "backend": self.backend,
        }  # fmt: skip
        if self.layer_norm:
            arguments["norms"] = [found(("norm_ih", "norm_hh", "norm_cell"), suffix) for suffix in suffixes]
        return arguments

    def extra_repr(self) -> str:
        given = [
            f"{name}={getattr(self, name)!r}" for name in _OPTIONS if getattr(self, name) != getattr(_Sequence, name)
        ]
        return ", ".join([super().extra_repr(), *given])


class LSTM(_Sequence):
    """torch.nn.LSTM on :func:`pyops.lstm`; same arguments, parameters and state_dict.

    Args: those of torch.nn.LSTM, and as keywords
        layer_norm, peephole: norms and peepholes of :func:`pyops.lstm`, with parameters ``norm_ih_l0``, ``norm_hh_l0``,
            ``norm_cell_l0`` (rows: weight, bias) and ``peephole_l0`` (and so on for each layer and direction).
        coupled, zoneout, recurrent_dropout, eps, return_states, backend: as in :func:`pyops.lstm`.

    ``forward(input, hx=None, *, reset=None)``; ``train()`` and ``eval()`` govern zoneout and dropout. Norms start as 1
    (the bias of the cell's as 0), the peepholes like the weights; a state_dict without them is loaded with
    ``strict=False``. With ``batch_first`` dropout between layers draws other units than torch's. Differs from
    torch.nn.LSTM: it is no subclass of it (such a class cannot be compiled as one graph), but of torch.nn.RNNBase, so
    ``isinstance(module, torch.nn.LSTM)`` is False, after :func:`pyops.replace` too; the options, and what
    :func:`pyops.lstm` names.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", args, kwargs)

    def forward(self, input, hx=None, *, reset=None):
        arguments = self._arguments()
        if self.peephole:
            arguments["peepholes"] = [getattr(self, f"peephole{suffix}") for suffix in self._suffixes()]
        return lstm(input, hx, reset=reset, coupled=self.coupled, **arguments)


class GRU(_Sequence):
    """torch.nn.GRU on :func:`pyops.gru`; same arguments, parameters and state_dict.

    The options are those of :class:`LSTM` but peephole, coupled and the norm of the cell; so are the differences.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            _fail("GRU", "proj_size", "not be given: only an LSTM has a projection", kwargs["proj_size"])
        super().__init__("GRU", args, kwargs)

    def forward(self, input, hx=None, *, reset=None):
        return gru(input, hx, reset=reset, **self._arguments())


class RNN(_Sequence):
    """torch.nn.RNN on :func:`pyops.rnn`; same arguments, parameters and state_dict.

    The options are those of :class:`LSTM` but peephole, coupled and the norm of the cell; so are the differences.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            _fail("RNN", "proj_size", "not be given: only an LSTM has a projection", kwargs["proj_size"])
        if len(args) > 3:
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        mode = _rnn_cell("RNN", nonlinearity).upper()
        super().__init__(mode, args, kwargs)
        self.nonlinearity = nonlinearity

    def forward(self, input, hx=None, *, reset=None):
        nonlinearity = "tanh" if self.mode == "RNN_TANH" else "relu"
        return rnn(input, hx, nonlinearity=nonlinearity, reset=reset, **self._arguments())


_CELL_ARGUMENTS = ("input_size", "hidden_size", "bias", "device", "dtype")
_CELL_OPTIONS = ("layer_norm", "peephole", "coupled", "zoneout", "eps", "backend")


class _Cell(nn.RNNCellBase):
    """What LSTMCell, GRUCell and RNNCell add to torch's."""

    layer_norm = False
    peephole = False
    coupled = False
    zoneout: float | tuple[float, float] = 0.0
    eps = 1e-5
    backend: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = ("nonlinearity",) if isinstance(self, nn.RNNCell) else ()
        _check_names(type(self).__name__, (*_CELL_ARGUMENTS, *own, *_CELL_OPTIONS), kwargs)
        options = {name: kwargs.pop(name) for name in _CELL_OPTIONS if name in kwargs}
        has_cells = isinstance(self, nn.LSTMCell)
        _check_module_options(type(self).__name__, has_cells, options)
        super().__init__(*args, **kwargs)
        for name, value in options.items():
            setattr(self, name, value)
        H = self.hidden_size
        if self.coupled:
            _couple(self, H)
        weight = self.weight_hh
        if self.peephole:
            self.weight_peephole = nn.Parameter(weight.new_empty(weight.shape[0] // H - 1, H))
        if self.layer_norm:
            self.norm_ih, self.norm_hh = (nn.Parameter(weight.new_empty(weight.shape[0])) for _ in range(2))
            if has_cells:
                self.norm_cell = nn.Parameter(weight.new_empty(2, H))
        if self.coupled or self.peephole or self.layer_norm:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _start_norms(self)

    def _step(self, function: Any, input: Tensor, hx: Any, **options: Any) -> Any:
        if self.layer_norm:
            options["norm"] = (self.norm_ih, self.norm_hh, getattr(self, "norm_cell", None))
        return function(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, zoneout=self.zoneout,
            training=self.training, eps=self.eps, backend=self.backend, **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        given = [f"{n}={getattr(self, n)!r}" for n in _CELL_OPTIONS if getattr(self, n) != getattr(_Cell, n)]
        return ", ".join([super().extra_repr(), *given])


class LSTMCell(_Cell, nn.LSTMCell):
    """torch.nn.LSTMCell on :func:`pyops.lstm_cell`; same arguments, parameters and state_dict.

    Args: those of torch.nn.LSTMCell, and as keywords
        layer_norm, peephole: with parameters ``norm_ih``, ``norm_hh``, ``norm_cell`` and ``weight_peephole``.
        coupled, zoneout, eps, backend: as in :func:`pyops.lstm_cell`.

    There is no ``reset``: set the states of finished sequences to zero yourself, in place if you like.
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        peephole = self.weight_peephole if self.peephole else None
        return self._step(lstm_cell, input, hx, coupled=self.coupled, peephole=peephole)


class GRUCell(_Cell, nn.GRUCell):
    """torch.nn.GRUCell on :func:`pyops.gru_cell`; same arguments, parameters and state_dict.

    The options are those of :class:`LSTMCell` but peephole, coupled and the norm of the cell.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(gru_cell, input, hx)


class RNNCell(_Cell, nn.RNNCell):
    """torch.nn.RNNCell on :func:`pyops.rnn_cell`; same arguments, parameters and state_dict.

    The options are those of :class:`LSTMCell` but peephole, coupled and the norm of the cell.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(rnn_cell, input, hx, nonlinearity=self.nonlinearity)
