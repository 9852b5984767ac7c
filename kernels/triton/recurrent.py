"""Recurrent layers (LSTM, coupled LSTM, GRU, RNN), their packed sequences, norms, peepholes, projections and zoneout,
in Triton.

Hochreiter & Schmidhuber 1997, Long Short-Term Memory; Cho et al. 2014, Learning Phrase Representations using RNN
Encoder-Decoder; Elman 1990, Finding Structure in Time.
kernels/params/recurrent.h holds the formulas, the order of the rows and the zoneout mapping; names here are the names
there.

Two ways. Where one program can hold all of W_hh (_WEIGHT_BYTES, _WHOLE_GATES), one launch runs the whole sequence: a
program for each direction and tile of BLOCK_B sequences loads the weights once, keeps h and c (backward: dh and dc) in
registers and walks the steps. Otherwise there is a launch per step, whose programs share directions, tiles of sequences
and tiles of units: product with W_hh, gates and states in one kernel. It reads the last h from y (backward: the last
dp), where its own launch writes other rows only. Norms and projections need what several programs made: further
launches per step.
    forward    [product -> norms and gates, a row for each program]  -> [projection]
    backward   product, dm -> [projection] -> [norms and gates, a row for each program]

Sums over rows: those for the biases by torch over dgx; those for peepholes and norms in a slice for each tile of
sequences, which one program at a time owns, added at the end. Results repeat bit for bit on one device.

Traffic: a sequence kernel reads gx and writes y, gates and cells once, W_hh once per program; a step reads W_hh once
per tile of sequences, from L2.
Numerics: gates, c and sums in fp32 (fp64 for fp64). What enters a product is rounded to T: h, m before the projection,
dp, dm. The gates' saved values are rounded to T, c is not.
Limits: a program of the norms keeps a row of each gate in registers; hidden sizes of 4096 and more spill. A
sequence kernel with all options, or of 16-bit types with H > 64 that 16 does not divide, spills a few registers.
"""

from typing import Any, NamedTuple

import torch

import triton
import triton.language as tl

from .attention import _dot, _pad, _roomy
from .attention import _tanh as _tanh_of_small
from .layer_norm import INTERPRETED, _cast, _keep

# Bytes of weights, padded, that one program holds over the sequence, by the size of an element: in 99 KB of shared
# memory, and in 227 KB. Products of fp32 are FMA instructions without a loop: with more of them LLVM fails an assertion
# (seen on sm_90 with H = 64 of an LSTM).
_WEIGHT_BYTES = {2: (64 * 1024, 128 * 1024), 4: (16 * 1024, 16 * 1024), 8: (32 * 1024, 32 * 1024)}
# Most gates, padded, of a sequence in such a program: registers.
_WHOLE_GATES = 512
# Sequences of a program of the norms.
_ROW_TILE = 16 if INTERPRETED.value else 1
_UNSPECIALIZED = ["s", "steps", "batch", "rows", "tiles", "chunks", "step_rows", "batch_rows"]


class _Layer(NamedTuple):
    """What the kernels of both ways and directions read, and where the steps leave what they made. Of D directions."""

    gx: Any  # [rows, G H] of direction 0, forward only
    gx_r: Any  # the same of direction 1, or None
    w_hh: Any  # [D, G H, P]
    b_n: Any  # [D, H] or None
    w_hr: Any  # [D, P, H] or None
    peephole: Any  # [D, G - 1, H] or None
    ln_gates: Any  # [D, G H] or None
    ln_cell: Any  # [D, 2, H] or None
    h0: Any  # [D, batch, P] or None
    c0: Any  # [D, batch, H] or None
    keep: Any  # [D, batch, P] or None
    reset: Any  # [rows] uint8 or None
    seed: Any  # [2] or None
    offsets: Any  # [steps + 1] or None
    y: Any  # [rows, D P]
    gates: Any  # [D, rows, S H] or None
    cells: Any  # [D, rows, H] or None


class _Gradients(NamedTuple):
    dy: Any  # [rows, D P] or None
    dcells: Any  # [D, rows, H] or None
    products: Any  # [D, rows, G H], with ln_gates
    dgx: Any  # [D, rows, G H]
    dp: Any  # like dgx, or dgx itself
    dm: Any  # [D, rows, P], with a projection
    dpeephole: Any  # [D, tiles, G - 1, H] sums of a tile of sequences, or None; so the next two
    dln_gates: Any  # [D, tiles, G, H]
    dln_cell: Any  # [D, tiles, 2, H]


class _Place(NamedTuple):
    """Where the sequences of a tile have a step: [BLOCK_B] each."""

    state: Any  # the row of [D, batch]
    n: Any  # the row of the step
    active: Any  # whether there is one
    before: Any  # the row of the step before, in the order of the direction
    begun: Any  # whether there is one
    fresh: Any  # whether h and c are reset to 0 ahead of the step


@triton.jit
def _sigmoid(x):
    t = tl.exp(-tl.abs(x))
    return tl.where(x < 0, t, 1.0) / (1.0 + t)


@triton.jit
def _tanh(x):
    """Also of numbers whose powers overflow, and of NaN."""
    bounded = tl.where(x < -32, -32.0, tl.where(x > 32, 32.0, x))
    return tl.where(x == x, _tanh_of_small(bounded), x)


@triton.jit
def _rows_of_step(offsets_ptr, t, steps, step_rows, batch):
    """First row of step t and how many sequences have it: none outside of the steps."""
    exists = (t >= 0) & (t < steps)
    if offsets_ptr is not None:
        first = tl.load(offsets_ptr + t, mask=exists, other=0)
        count = tl.load(offsets_ptr + t + 1, mask=exists, other=0) - first
    else:
        first = t.to(tl.int64) * step_rows
        count = tl.where(exists, batch, 0)
    return first, count


@triton.jit
def _update(seed_ptr, row, u0, p, UNITS: tl.constexpr, ACC: tl.constexpr):
    """Zoneout's share of the new value, in rows `row` and columns u0 to u0 + UNITS."""
    p = tl.full([], p, tl.float64)
    if seed_ptr is not None:
        update = _keep(seed_ptr, row, u0, tl.ceil(p * 16777216.0).to(tl.int32), UNITS).to(ACC)
    else:
        update = (1.0 - p).to(ACC)
    return update


@triton.jit
def _place(layer, t, d, b, steps, batch, step_rows, batch_rows):
    first, count = _rows_of_step(layer.offsets, t, steps, step_rows, batch)
    first_before, count_before = _rows_of_step(layer.offsets, tl.where(d == 0, t - 1, t + 1), steps, step_rows, batch)
    row = b.to(tl.int64) * batch_rows
    active = b < count
    fresh = b < 0
    if layer.reset is not None:
        fresh = tl.load(layer.reset + first + row, mask=active, other=0) != 0
    return _Place(d.to(tl.int64) * batch + b, first + row, active, first_before + row, b < count_before, fresh)


@triton.jit
def _last(ptr, stride, initial_ptr, place, column, width, ACC: tl.constexpr):
    """h or c as a step finds it, 0 where there is no such step: [ROWS, COLUMNS]."""
    wanted = (place.active & (place.fresh == 0))[:, None] & (column < width)[None, :]
    begun = place.begun[:, None]
    value = tl.load(ptr + place.before[:, None] * stride + column[None, :], mask=wanted & begun, other=0).to(ACC)
    if initial_ptr is not None:
        pointers = initial_ptr + place.state[:, None] * width + column[None, :]
        value = tl.where(begun, value, tl.load(pointers, mask=wanted & (begun == 0), other=0).to(ACC))
    return value


@triton.jit
def _last_h(layer, place, d, y_row, column, P, ACC: tl.constexpr):
    return _last(layer.y + d * P, y_row, layer.h0, place, column, P, ACC)


@triton.jit
def _load_gates(ptr, row, width, u, H, inside, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Numbers of units u in rows `row` of [rows, COUNT, H]: COUNT tiles."""
    pointers = ptr + row[:, None] * width + u[None, :]
    tiles = ()
    for g in tl.static_range(COUNT):
        tiles += (tl.load(pointers + g * H, mask=inside, other=0).to(ACC),)
    return tiles


@triton.jit
def _store_gates(tiles, ptr, row, u, H, inside, COUNT: tl.constexpr):
    pointers = ptr + row[:, None] * (COUNT * H) + u[None, :]
    for g in tl.static_range(COUNT):
        tl.store(pointers + g * H, _cast(tiles[g], ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_inputs(layer, place, d, gx_row, u, H, G: tl.constexpr):
    ptr = layer.gx
    if layer.gx_r is not None:
        ptr = layer.gx_r if d == 1 else layer.gx
    return _load_gates(ptr, place.n, gx_row, u, H, place.active[:, None] & (u < H)[None, :], G, ptr.dtype.element_ty)


@triton.jit
def _normalise(tiles, inside, H, eps, COUNT: tl.constexpr):
    """The tiles of a row, normalised together, and 1 / their standard deviation."""
    total = tl.sum(tl.where(inside, tiles[0], 0.0), axis=1)
    for g in tl.static_range(1, COUNT):
        total += tl.sum(tl.where(inside, tiles[g], 0.0), axis=1)
    mean = total / (COUNT * H)
    squares = tl.zeros_like(total)
    centred = ()
    for g in tl.static_range(COUNT):
        deviation = tl.where(inside, tiles[g] - mean[:, None], 0.0)
        centred += (deviation,)
        squares += tl.sum(deviation * deviation, axis=1)
    rstd = tl.rsqrt(squares / (COUNT * H) + eps)
    xhat = ()
    for g in tl.static_range(COUNT):
        xhat += (centred[g] * rstd[:, None],)
    return xhat, rstd


@triton.jit
def _normalise_bwd(dxhat, xhat, rstd, inside, H, COUNT: tl.constexpr):
    total = tl.sum(dxhat[0], axis=1)
    products = tl.sum(dxhat[0] * xhat[0], axis=1)
    for g in tl.static_range(1, COUNT):
        total += tl.sum(dxhat[g], axis=1)
        products += tl.sum(dxhat[g] * xhat[g], axis=1)
    mean = (total / (COUNT * H))[:, None]
    mean_of_products = (products / (COUNT * H))[:, None]
    dx = ()
    for g in tl.static_range(COUNT):
        dx_g = rstd[:, None] * (dxhat[g] - mean - xhat[g] * mean_of_products)
        dx += (tl.where(inside, dx_g, 0.0),)
    return dx


@triton.jit
def _load_parameter(ptr, row, u, H, ACC: tl.constexpr):
    """Row `row` of [rows, H] at units u: [1, UNITS]."""
    return tl.load(ptr + row * H + u, mask=u < H, other=0).to(ACC)[None, :]


@triton.jit
def _add_sum(ptr, row, value, u, H):
    """Adds the sum over the sequences of a tile to row `row` of [rows, H]."""
    pointers = ptr + row.to(tl.int64) * H + u
    tl.store(pointers, tl.load(pointers, mask=u < H, other=0) + tl.sum(value, axis=0), mask=u < H)


@triton.jit
def _cell_fwd(
    layer, x, p, h, c, place, d, u0, rows, H, zoneout_c, eps,
    CELL: tl.constexpr, G: tl.constexpr, ZONEOUT_C: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """m before the projection, and the new c (for cells without one, m again). h and c as they are after the reset.

    Norms take a tile for the whole row.
    """
    u = u0 + tl.arange(0, UNITS)
    row = d * rows + place.n
    inside = place.active[:, None] & (u < H)[None, :]
    S: tl.constexpr = 4 if CELL == "gru" else G
    if layer.ln_gates is not None:
        p, _ = _normalise(p, inside, H, eps, G)
        scaled = ()
        for g in tl.static_range(G):
            scaled += (p[g] * _load_parameter(layer.ln_gates, d * G + g, u, H, ACC),)
        p = scaled
    if CELL == "rnn_tanh":
        m = _tanh(x[0].to(ACC) + p[0])
        now = m
        saved = (m,)
    elif CELL == "rnn_relu":
        m = x[0].to(ACC) + p[0]
        m = tl.where(m < 0, 0.0, m)
        now = m
        saved = (m,)
    elif CELL == "gru":
        r = _sigmoid(x[0].to(ACC) + p[0])
        z = _sigmoid(x[1].to(ACC) + p[1])
        q = p[2]
        if layer.b_n is not None:
            q += _load_parameter(layer.b_n, d, u, H, ACC)
        v = _tanh(x[2].to(ACC) + r * q)
        m = v + z * (h - v)
        now = m
        saved = (r, z, v, q)
    else:
        i = x[0].to(ACC) + p[0]
        o = x[G - 1].to(ACC) + p[G - 1]
        if layer.peephole is not None:
            i += _load_parameter(layer.peephole, d * (G - 1), u, H, ACC) * c
        i = _sigmoid(i)
        if CELL == "lstm":
            f = x[1].to(ACC) + p[1]
            if layer.peephole is not None:
                f += _load_parameter(layer.peephole, d * (G - 1) + 1, u, H, ACC) * c
            f = _sigmoid(f)
        else:
            f = 1.0 - i
        g = _tanh(x[G - 2].to(ACC) + p[G - 2])
        now = f * c + i * g
        if layer.peephole is not None:
            o += _load_parameter(layer.peephole, d * (G - 1) + G - 2, u, H, ACC) * now
        o = _sigmoid(o)
        seen = now
        if layer.ln_cell is not None:
            xhat, _ = _normalise((now,), inside, H, eps, 1)
            weight = _load_parameter(layer.ln_cell, d * 2, u, H, ACC)
            seen = xhat[0] * weight + _load_parameter(layer.ln_cell, d * 2 + 1, u, H, ACC)
        m = o * _tanh(seen)
        if CELL == "lstm":
            saved = (i, f, g, o)
        else:
            saved = (i, g, o)
        if ZONEOUT_C:
            now = c + _update(layer.seed, 2 * row + 1, u0, zoneout_c, UNITS, ACC) * (now - c)
        if layer.cells is not None:
            tl.store(layer.cells + row[:, None] * H + u[None, :], now, mask=inside)
    if layer.gates is not None:
        _store_gates(saved, layer.gates, row, u, H, inside, S)
    return m, now


@triton.jit
def _dh(
    dh, layer, gradients, place, d, u0, rows, dy_row, P, zoneout_h,
    ZONEOUT_H: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dm, after the projection, and what zoneout passes to the h before, from dh of the steps behind."""
    u = u0 + tl.arange(0, UNITS)
    inside = place.active[:, None] & (u < P)[None, :]
    if gradients.dy is not None:
        pointers = gradients.dy + place.n[:, None] * dy_row + (d * P + u)[None, :]
        dh += tl.load(pointers, mask=inside, other=0).to(ACC)
    past = tl.zeros_like(dh)
    if ZONEOUT_H:
        update = _update(layer.seed, 2 * (d * rows + place.n), u0, zoneout_h, UNITS, ACC)
        past = (1.0 - update) * dh
        dh *= update
    return dh, past


@triton.jit
def _cell_bwd(
    layer, gradients, dm, dc, past, place, d, tile, u0, rows, y_row, H, zoneout_c, eps,
    CELL: tl.constexpr, G: tl.constexpr, ZONEOUT_C: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dp, dc of the c before, and in `past` what reaches the h before other than through the product.

    dm: of m before the projection. tile: the slice of the sums.
    """
    u = u0 + tl.arange(0, UNITS)
    row = d * rows + place.n
    inside = place.active[:, None] & (u < H)[None, :]
    S: tl.constexpr = 4 if CELL == "gru" else G
    saved = _load_gates(layer.gates, row, S * H, u, H, inside, S, ACC)
    dm = tl.where(inside, dm, 0.0)
    if CELL == "rnn_tanh":
        dgx = (dm * (1.0 - saved[0] * saved[0]),)
        dp = dgx
    elif CELL == "rnn_relu":
        dgx = (tl.where(saved[0] > 0, dm, 0.0),)
        dp = dgx
    elif CELL == "gru":
        r = saved[0]
        z = saved[1]
        v = saved[2]
        dv = dm * (1.0 - z) * (1.0 - v * v)
        dr = dv * saved[3] * r * (1.0 - r)
        h = _last_h(layer, place, d, y_row, u, H, ACC)
        dz = dm * (h - v) * z * (1.0 - z)
        dgx = (dr, dz, dv)
        dp = (dr, dz, dv * r)
        past += dm * z
    else:
        i = saved[0]
        g = saved[G - 2]
        o = saved[G - 1]
        if CELL == "lstm":
            f = saved[1]
        else:
            f = 1.0 - i
        c = _last(layer.cells + (d * rows).to(tl.int64) * H, H, layer.c0, place, u, H, ACC)
        dc = tl.where(inside, dc, 0.0)
        if gradients.dcells is not None:
            dc += tl.load(gradients.dcells + row[:, None] * H + u[None, :], mask=inside, other=0)
        if ZONEOUT_C:
            now = f * c + i * g
            update = _update(layer.seed, 2 * row + 1, u0, zoneout_c, UNITS, ACC)
            dold = (1.0 - update) * dc
            dc *= update
        else:
            now = tl.load(layer.cells + row[:, None] * H + u[None, :], mask=inside, other=0)
            dold = tl.zeros_like(dc)
        if layer.ln_cell is not None:
            xhat, rstd = _normalise((now,), inside, H, eps, 1)
            weight = _load_parameter(layer.ln_cell, d * 2, u, H, ACC)
            t = _tanh(xhat[0] * weight + _load_parameter(layer.ln_cell, d * 2 + 1, u, H, ACC))
            dseen = dm * o * (1.0 - t * t)
            dc += _normalise_bwd((dseen * weight,), xhat, rstd, inside, H, 1)[0]
            if gradients.dln_cell is not None:
                _add_sum(gradients.dln_cell, tile * 2, dseen * xhat[0], u, H)
                _add_sum(gradients.dln_cell, tile * 2 + 1, dseen, u, H)
        else:
            t = _tanh(now)
            dc += dm * o * (1.0 - t * t)
        do = dm * t * o * (1.0 - o)
        if layer.peephole is not None:
            dc += _load_parameter(layer.peephole, d * (G - 1) + G - 2, u, H, ACC) * do
        dg = dc * i * (1.0 - g * g)
        dold += dc * f
        if CELL == "lstm":
            di = dc * g * i * (1.0 - i)
            df = dc * c * f * (1.0 - f)
            dgx = (di, df, dg, do)
            if layer.peephole is not None:
                dold += _load_parameter(layer.peephole, d * (G - 1) + 1, u, H, ACC) * df
        else:
            di = dc * (g - c) * i * (1.0 - i)
            dgx = (di, dg, do)
        if layer.peephole is not None:
            dold += _load_parameter(layer.peephole, d * (G - 1), u, H, ACC) * di
        if gradients.dpeephole is not None:
            _add_sum(gradients.dpeephole, tile * (G - 1), di * c, u, H)
            if CELL == "lstm":
                _add_sum(gradients.dpeephole, tile * (G - 1) + 1, df * c, u, H)
            _add_sum(gradients.dpeephole, tile * (G - 1) + G - 2, do * now, u, H)
        dc = tl.where(place.fresh[:, None], 0.0, dold)
        dp = dgx
    if layer.ln_gates is not None:
        products = _load_gates(gradients.products, row, G * H, u, H, inside, G, ACC)
        xhat, rstd = _normalise(products, inside, H, eps, G)
        dxhat = ()
        for k in tl.static_range(G):
            if gradients.dln_gates is not None:
                _add_sum(gradients.dln_gates, tile * G + k, dp[k] * xhat[k], u, H)
            dxhat += (dp[k] * _load_parameter(layer.ln_gates, d * G + k, u, H, ACC),)
        dp = _normalise_bwd(dxhat, xhat, rstd, inside, H, G)
    _store_gates(dgx, gradients.dgx, row, u, H, inside, G)
    if CELL == "gru" or layer.ln_gates is not None:
        _store_gates(dp, gradients.dp, row, u, H, inside, G)
    return dp, dc, past


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _sequence_fwd_kernel(
    layer,
    h_n_ptr,  # [D, batch, P]
    c_n_ptr,  # [D, batch, H] or None
    steps,
    batch,
    rows,
    tiles,  # of sequences
    step_rows,
    batch_rows,
    gx_row,
    y_row,
    H,
    P,
    zoneout_h: tl.float64,
    zoneout_c: tl.float64,
    eps: tl.float64,
    CELL: tl.constexpr,
    G: tl.constexpr,
    ZONEOUT_H: tl.constexpr,
    ZONEOUT_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    T: tl.constexpr = layer.y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if layer.y.dtype.element_ty == tl.float64 else tl.float32
    HAS_CELLS: tl.constexpr = CELL == "lstm" or CELL == "coupled"
    eps = tl.full([], eps, ACC)

    program = tl.program_id(0)
    d = program // tiles
    b = program % tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    state = d.to(tl.int64) * batch + b
    u = tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_P)
    of_h = (b < batch)[:, None] & (k < P)[None, :]
    of_c = (b < batch)[:, None] & (u < H)[None, :]
    h_offset = state[:, None] * P + k[None, :]
    c_offset = state[:, None] * H + u[None, :]

    weights = ()
    for g in tl.static_range(G):
        pointers = layer.w_hh + ((d * G + g) * H + u)[None, :] * P + k[:, None]
        weights += (tl.load(pointers, mask=(k < P)[:, None] & (u < H)[None, :], other=0),)
    if layer.w_hr is not None:
        pointers = layer.w_hr + (d * P + k)[None, :] * H + u[:, None]
        projection = tl.load(pointers, mask=(u < H)[:, None] & (k < P)[None, :], other=0)
    if layer.keep is not None:
        keep = tl.load(layer.keep + h_offset, mask=of_h, other=0).to(ACC)
    h = tl.zeros([BLOCK_B, BLOCK_P], ACC)
    if layer.h0 is not None:
        h = tl.load(layer.h0 + h_offset, mask=of_h, other=0).to(ACC)
    c = h
    if HAS_CELLS:
        c = tl.zeros([BLOCK_B, BLOCK_H], ACC)
        if layer.c0 is not None:
            c = tl.load(layer.c0 + c_offset, mask=of_c, other=0).to(ACC)

    place = _place(layer, tl.where(d == 0, 0, steps - 1), d, b, steps, batch, step_rows, batch_rows)
    x = _load_inputs(layer, place, d, gx_row, u, H, G)
    for s in range(steps):
        # Asked for one step ahead.
        next_place = _place(layer, tl.where(d == 0, s + 1, steps - 2 - s), d, b, steps, batch, step_rows, batch_rows)
        next_x = _load_inputs(layer, next_place, d, gx_row, u, H, G)
        active = place.active[:, None]
        last_h = tl.where(place.fresh[:, None], 0.0, h)
        last_c = c
        if HAS_CELLS:
            last_c = tl.where(place.fresh[:, None], 0.0, c)
        sent = last_h
        if layer.keep is not None:
            sent = last_h * keep
        sent = _cast(sent, T)
        p = ()
        for g in tl.static_range(G):
            p += (_dot(sent, weights[g], tl.zeros([BLOCK_B, BLOCK_H], ACC)),)
        m, now = _cell_fwd(
            layer, x, p, last_h, last_c, place, d, 0, rows, H, zoneout_c, eps, CELL, G, ZONEOUT_C, BLOCK_H, ACC
        )
        if HAS_CELLS:
            c = tl.where(active, now, c)
        if layer.w_hr is not None:
            m = _dot(_cast(m, T), projection, tl.zeros([BLOCK_B, BLOCK_P], ACC))
        if ZONEOUT_H:
            m = last_h + _update(layer.seed, 2 * (d * rows + place.n), 0, zoneout_h, BLOCK_P, ACC) * (m - last_h)
        rounded = _cast(m, T)
        y_pointers = layer.y + place.n[:, None] * y_row + (d * P + k)[None, :]
        tl.store(y_pointers, rounded, mask=active & (k < P)[None, :])
        h = tl.where(active, rounded.to(ACC), h)
        place = next_place
        x = next_x

    tl.store(h_n_ptr + h_offset, _cast(h, T), mask=of_h)
    if HAS_CELLS:
        tl.store(c_n_ptr + c_offset, _cast(c, T), mask=of_c)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _sequence_bwd_kernel(
    layer,
    gradients,
    dh_n_ptr,  # [D, batch, P] or None
    dc_n_ptr,  # [D, batch, H] or None
    dh0_ptr,  # [D, batch, P]
    dc0_ptr,  # [D, batch, H] or None
    steps,
    batch,
    rows,
    tiles,  # of sequences
    step_rows,
    batch_rows,
    dy_row,
    y_row,
    H,
    P,
    zoneout_h: tl.float64,
    zoneout_c: tl.float64,
    eps: tl.float64,
    CELL: tl.constexpr,
    G: tl.constexpr,
    ZONEOUT_H: tl.constexpr,
    ZONEOUT_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    T: tl.constexpr = layer.y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if layer.y.dtype.element_ty == tl.float64 else tl.float32
    HAS_CELLS: tl.constexpr = CELL == "lstm" or CELL == "coupled"
    eps = tl.full([], eps, ACC)

    program = tl.program_id(0)
    d = program // tiles
    b = program % tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    state = d.to(tl.int64) * batch + b
    u = tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_P)
    of_h = (b < batch)[:, None] & (k < P)[None, :]
    of_c = (b < batch)[:, None] & (u < H)[None, :]
    h_offset = state[:, None] * P + k[None, :]
    c_offset = state[:, None] * H + u[None, :]

    SUMS: tl.constexpr = (
        gradients.dpeephole is not None or gradients.dln_gates is not None or gradients.dln_cell is not None
    )
    weights = ()
    for g in tl.static_range(G):
        pointers = layer.w_hh + ((d * G + g) * H + u)[:, None] * P + k[None, :]
        weights += (tl.load(pointers, mask=(u < H)[:, None] & (k < P)[None, :], other=0),)
    if layer.w_hr is not None:
        pointers = layer.w_hr + (d * P + k)[:, None] * H + u[None, :]
        projection = tl.load(pointers, mask=(k < P)[:, None] & (u < H)[None, :], other=0)
    if layer.keep is not None:
        keep = tl.load(layer.keep + h_offset, mask=of_h, other=0).to(ACC)
    dh = tl.zeros([BLOCK_B, BLOCK_P], ACC)
    if dh_n_ptr is not None:
        dh = tl.load(dh_n_ptr + h_offset, mask=of_h, other=0).to(ACC)
    dc = dh
    if HAS_CELLS:
        dc = tl.zeros([BLOCK_B, BLOCK_H], ACC)
        if dc_n_ptr is not None:
            dc = tl.load(dc_n_ptr + c_offset, mask=of_c, other=0).to(ACC)

    for s in range(steps):
        t = tl.where(d == 0, steps - 1 - s, s)
        place = _place(layer, t, d, b, steps, batch, step_rows, batch_rows)
        active = place.active[:, None]
        inside = active & (k < P)[None, :]
        row = d * rows + place.n
        dm, past = _dh(dh, layer, gradients, place, d, 0, rows, dy_row, P, zoneout_h, ZONEOUT_H, BLOCK_P, ACC)
        if layer.w_hr is not None:
            rounded = _cast(dm, T)
            tl.store(gradients.dm + row[:, None] * P + k[None, :], rounded, mask=inside)
            dm = _dot(rounded, projection, tl.zeros([BLOCK_B, BLOCK_H], ACC))
        dp, dold, past = _cell_bwd(
            layer, gradients, dm, dc, past, place, d, program, 0, rows, y_row, H, zoneout_c, eps,
            CELL, G, ZONEOUT_C, BLOCK_H, ACC,
        )  # fmt: skip
        product = tl.zeros([BLOCK_B, BLOCK_P], ACC)
        for g in tl.static_range(G):
            product = _dot(_cast(dp[g], T), weights[g], product)
        if layer.keep is not None:
            product *= keep
        dh = tl.where(active, tl.where(place.fresh[:, None], 0.0, past + product), dh)
        if HAS_CELLS:
            dc = tl.where(active, dold, dc)
        if SUMS:
            tl.debug_barrier()  # they are read back, not by the threads that wrote them

    tl.store(dh0_ptr + h_offset, dh, mask=of_h)
    if HAS_CELLS:
        tl.store(dc0_ptr + c_offset, dc, mask=of_c)


@triton.jit
def _program(tiles, chunks, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr):
    """Direction, tile of sequences, the sequences and the first unit of a program of a step."""
    program = tl.program_id(0)
    tile = program % tiles
    d = program // tiles // chunks
    u0 = program // tiles % chunks * BLOCK_U
    return d, tile, tile * BLOCK_B + tl.arange(0, BLOCK_B), u0


@triton.jit
def _depth(layer, place, K):
    """K, or 0 where no sequence of the tile has the step."""
    if layer.offsets is not None:
        K *= tl.max(place.active.to(tl.int32), axis=0)
    return K


@triton.jit
def _product(
    layer, place, a_ptr, a_row, b_ptr, b_stride_k, b_stride_u, u, units, K, BLOCK_K: tl.constexpr, ACC: tl.constexpr
):
    """Rows of a for the sequences of a place, which begin at a_row, times b [K, units]: [ROWS, UNITS]."""
    acc = tl.zeros([a_row.shape[0], u.shape[0]], ACC)
    for k0 in range(0, _depth(layer, place, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + a_row[:, None] + k[None, :], mask=place.active[:, None] & (k < K)[None, :], other=0)
        b_pointers = b_ptr + k.to(tl.int64)[:, None] * b_stride_k + u.to(tl.int64)[None, :] * b_stride_u
        b = tl.load(b_pointers, mask=(k < K)[:, None] & (u < units)[None, :], other=0)
        acc = _dot(a, b, acc)
    return acc


@triton.jit
def _store_h(
    m, layer, h_n_ptr, place, d, u0, rows, y_row, P, zoneout_h,
    ZONEOUT_H: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The end of a step: zoneout, y, and h_n, which the last step overwrites last."""
    u = u0 + tl.arange(0, UNITS)
    if ZONEOUT_H:
        h = _last_h(layer, place, d, y_row, u, P, ACC)
        m = h + _update(layer.seed, 2 * (d * rows + place.n), u0, zoneout_h, UNITS, ACC) * (m - h)
    inside = place.active[:, None] & (u < P)[None, :]
    rounded = _cast(m, layer.y.dtype.element_ty)
    tl.store(layer.y + place.n[:, None] * y_row + (d * P + u)[None, :], rounded, mask=inside)
    tl.store(h_n_ptr + place.state[:, None] * P + u[None, :], rounded, mask=inside)


@triton.jit
def _units_fwd(
    p, x, layer, c_ptr, m_ptr, h_n_ptr, place, d, u0, rows, y_row, H, zoneout_h, zoneout_c, eps,
    CELL: tl.constexpr, G: tl.constexpr, ZONEOUT_H: tl.constexpr, ZONEOUT_C: tl.constexpr, UNITS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A step from its products on, up to a projection."""
    u = u0 + tl.arange(0, UNITS)
    inside = place.active[:, None] & (u < H)[None, :]
    state_offset = place.state[:, None] * H + u[None, :]
    h = p[0]
    c = p[0]
    if CELL == "gru":
        h = _last_h(layer, place, d, y_row, u, H, ACC)
    if c_ptr is not None:
        c = tl.load(c_ptr + state_offset, mask=inside & (place.fresh == 0)[:, None], other=0)
    m, now = _cell_fwd(layer, x, p, h, c, place, d, u0, rows, H, zoneout_c, eps, CELL, G, ZONEOUT_C, UNITS, ACC)
    if c_ptr is not None:
        tl.store(c_ptr + state_offset, now, mask=inside)
    if m_ptr is not None:
        tl.store(m_ptr + state_offset, _cast(m, m_ptr.dtype.element_ty), mask=inside)
    else:
        _store_h(m, layer, h_n_ptr, place, d, u0, rows, y_row, H, zoneout_h, ZONEOUT_H, UNITS, ACC)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _step_fwd_kernel(
    layer,
    c_ptr,  # [D, batch, H] or None
    products_ptr,  # [D, batch, G H] with norms: the end of this kernel's work
    m_ptr,  # [D, batch, H] with a projection
    h_n_ptr,  # [D, batch, P]
    s,
    steps,
    batch,
    rows,
    tiles,  # of sequences
    chunks,  # of units
    step_rows,
    batch_rows,
    gx_row,
    y_row,
    H,
    P,
    zoneout_h: tl.float64,
    zoneout_c: tl.float64,
    eps: tl.float64,
    CELL: tl.constexpr,
    G: tl.constexpr,
    ZONEOUT_H: tl.constexpr,
    ZONEOUT_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    T: tl.constexpr = layer.y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if layer.y.dtype.element_ty == tl.float64 else tl.float32
    eps = tl.full([], eps, ACC)
    d, _, b, u0 = _program(tiles, chunks, BLOCK_B, BLOCK_U)
    place = _place(layer, tl.where(d == 0, s, steps - 1 - s), d, b, steps, batch, step_rows, batch_rows)
    u = u0 + tl.arange(0, BLOCK_U)
    if products_ptr is None:
        x = _load_inputs(layer, place, d, gx_row, u, H, G)
    p = ()
    for _ in tl.static_range(G):
        p += (tl.zeros([BLOCK_B, BLOCK_U], ACC),)
    for k0 in range(0, _depth(layer, place, P), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        h = _last_h(layer, place, d, y_row, k, P, ACC)
        if layer.keep is not None:
            keep_inside = place.active[:, None] & (k < P)[None, :]
            h *= tl.load(layer.keep + place.state[:, None] * P + k[None, :], mask=keep_inside, other=0).to(ACC)
        sums = ()
        for g in tl.static_range(G):
            w_pointers = layer.w_hh + ((d * G + g) * H + u).to(tl.int64)[None, :] * P + k[:, None]
            w = tl.load(w_pointers, mask=(k < P)[:, None] & (u < H)[None, :], other=0)
            sums += (_dot(_cast(h, T), w, p[g]),)
        p = sums
    if products_ptr is not None:
        _store_gates(p, products_ptr, place.state, u, H, place.active[:, None] & (u < H)[None, :], G)
    else:
        _units_fwd(
            p, x, layer, c_ptr, m_ptr, h_n_ptr, place, d, u0, rows, y_row, H, zoneout_h, zoneout_c, eps,
            CELL, G, ZONEOUT_H, ZONEOUT_C, BLOCK_U, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _rows_fwd_kernel(
    layer,
    c_ptr,  # as of _step_fwd_kernel, all
    products_ptr,
    m_ptr,
    h_n_ptr,
    s,
    steps,
    batch,
    rows,
    tiles,
    step_rows,
    batch_rows,
    gx_row,
    y_row,
    H,
    zoneout_h: tl.float64,
    zoneout_c: tl.float64,
    eps: tl.float64,
    CELL: tl.constexpr,
    G: tl.constexpr,
    ZONEOUT_H: tl.constexpr,
    ZONEOUT_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if layer.y.dtype.element_ty == tl.float64 else tl.float32
    eps = tl.full([], eps, ACC)
    d, _, b, _ = _program(tiles, 1, BLOCK_B, BLOCK_H)
    place = _place(layer, tl.where(d == 0, s, steps - 1 - s), d, b, steps, batch, step_rows, batch_rows)
    u = tl.arange(0, BLOCK_H)
    x = _load_inputs(layer, place, d, gx_row, u, H, G)
    p = _load_gates(products_ptr, place.state, G * H, u, H, place.active[:, None] & (u < H)[None, :], G, ACC)
    _units_fwd(
        p, x, layer, c_ptr, m_ptr, h_n_ptr, place, d, 0, rows, y_row, H, zoneout_h, zoneout_c, eps,
        CELL, G, ZONEOUT_H, ZONEOUT_C, BLOCK_H, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _projection_fwd_kernel(
    layer,
    m_ptr,  # [D, batch, H]
    h_n_ptr,  # [D, batch, P]
    s,
    steps,
    batch,
    rows,
    tiles,  # of sequences
    chunks,  # of P
    step_rows,
    batch_rows,
    y_row,
    H,
    P,
    zoneout_h: tl.float64,
    ZONEOUT_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if layer.y.dtype.element_ty == tl.float64 else tl.float32
    d, _, b, u0 = _program(tiles, chunks, BLOCK_B, BLOCK_U)
    place = _place(layer, tl.where(d == 0, s, steps - 1 - s), d, b, steps, batch, step_rows, batch_rows)
    u = u0 + tl.arange(0, BLOCK_U)
    w_ptr = layer.w_hr + (d * P).to(tl.int64) * H
    m = _product(layer, place, m_ptr, place.state * H, w_ptr, 1, H, u, P, H, BLOCK_K, ACC)
    _store_h(m, layer, h_n_ptr, place, d, u0, rows, y_row, P, zoneout_h, ZONEOUT_H, BLOCK_U, ACC)


@triton.jit
def _units_bwd(
    dm, past, layer, gradients, past_ptr, dc_ptr, place, d, tile, u0, rows, y_row, H, zoneout_c, eps,
    CELL: tl.constexpr, G: tl.constexpr, ZONEOUT_C: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A step back from dm, of m before the projection."""
    u = u0 + tl.arange(0, UNITS)
    inside = place.active[:, None] & (u < H)[None, :]
    state_offset = place.state[:, None] * H + u[None, :]
    dc = dm
    if dc_ptr is not None:
        dc = tl.load(dc_ptr + state_offset, mask=inside, other=0)
    _, dc, past = _cell_bwd(
        layer, gradients, dm, dc, past, place, d, tile, u0, rows, y_row, H, zoneout_c, eps,
        CELL, G, ZONEOUT_C, UNITS, ACC,
    )  # fmt: skip
    if dc_ptr is not None:
        tl.store(dc_ptr + state_offset, dc, mask=inside)
    if past_ptr is not None:
        tl.store(past_ptr + state_offset, past, mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _step_bwd_kernel(
    layer,
    gradients,
    dh_n_ptr,  # [D, batch, P] or None
    dh0_ptr,  # [D, batch, P]
    past_ptr,  # [D, batch, P] what reaches the last h other than through the product; None: nothing does
    dc_ptr,  # [D, batch, H] or None
    dm_ptr,  # [D, batch, P] with norms, unless there is a projection; it or gradients.dm: the end of this kernel's work
    s,
    steps,
    batch,
    rows,
    tiles,  # of sequences
    chunks,  # of P
    step_rows,
    batch_rows,
    dy_row,
    y_row,
    H,
    P,
    zoneout_h: tl.float64,
    zoneout_c: tl.float64,
    eps: tl.float64,
    CELL: tl.constexpr,
    G: tl.constexpr,
    ZONEOUT_H: tl.constexpr,
    ZONEOUT_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    T: tl.constexpr = layer.y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if layer.y.dtype.element_ty == tl.float64 else tl.float32
    eps = tl.full([], eps, ACC)
    d, tile, b, u0 = _program(tiles, chunks, BLOCK_B, BLOCK_U)
    # The step that was visited last, and the one whose turn it is: none after the first step.
    t = tl.where(d == 0, steps - 1 - s, s)
    later = _place(layer, tl.where(d == 0, t + 1, t - 1), d, b, steps, batch, step_rows, batch_rows)
    place = _place(layer, t, d, b, steps, batch, step_rows, batch_rows)
    u = u0 + tl.arange(0, BLOCK_U)
    state_offset = place.state[:, None] * P + u[None, :]
    visited = later.active[:, None] & (u < P)[None, :]
    inside = place.active[:, None] & (u < P)[None, :]

    w_ptr = layer.w_hh + (d * G * H).to(tl.int64) * P
    later_row = (d * rows + later.n) * (G * H)
    dh = _product(layer, later, gradients.dp, later_row, w_ptr, P, 1, u, P, G * H, BLOCK_K, ACC)
    if layer.keep is not None:
        dh *= tl.load(layer.keep + state_offset, mask=visited, other=0).to(ACC)
    if past_ptr is not None:
        dh += tl.load(past_ptr + state_offset, mask=visited, other=0)
    dh = tl.where(later.fresh[:, None], 0.0, dh)
    if dh_n_ptr is not None:
        initial = tl.load(dh_n_ptr + state_offset, mask=inside & (visited == 0), other=0).to(ACC)
        dh = tl.where(visited, dh, initial)
    tl.store(dh0_ptr + state_offset, dh, mask=visited & (inside == 0))

    dm, past = _dh(dh, layer, gradients, place, d, u0, rows, dy_row, P, zoneout_h, ZONEOUT_H, BLOCK_U, ACC)
    if layer.w_hr is not None:
        dm_row = (d * rows + place.n)[:, None] * P
        tl.store(gradients.dm + dm_row + u[None, :], _cast(dm, T), mask=inside)
    elif dm_ptr is not None:
        tl.store(dm_ptr + state_offset, dm, mask=inside)
    if layer.w_hr is not None or dm_ptr is not None:
        if past_ptr is not None:
            tl.store(past_ptr + state_offset, past, mask=inside)
    else:
        _units_bwd(
            dm, past, layer, gradients, past_ptr, dc_ptr, place, d, d * tiles + tile, u0, rows, y_row, H,
            zoneout_c, eps, CELL, G, ZONEOUT_C, BLOCK_U, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _projection_bwd_kernel(
    layer,
    gradients,
    dm_ptr,  # [D, batch, H]
    s,
    steps,
    batch,
    rows,
    tiles,  # of sequences
    chunks,  # of H
    step_rows,
    batch_rows,
    H,
    P,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    d, _, b, u0 = _program(tiles, chunks, BLOCK_B, BLOCK_U)
    place = _place(layer, tl.where(d == 0, steps - 1 - s, s), d, b, steps, batch, step_rows, batch_rows)
    u = u0 + tl.arange(0, BLOCK_U)
    w_ptr = layer.w_hr + (d * P).to(tl.int64) * H
    row = (d * rows + place.n) * P
    dm = _product(layer, place, gradients.dm, row, w_ptr, H, 1, u, H, P, BLOCK_K, dm_ptr.dtype.element_ty)
    tl.store(dm_ptr + place.state[:, None] * H + u[None, :], dm, mask=place.active[:, None] & (u < H)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _rows_bwd_kernel(
    layer,
    gradients,
    dm_ptr,  # [D, batch, H] of m before the projection
    past_ptr,  # [D, batch, H] of a GRU, else None
    dc_ptr,  # [D, batch, H] or None
    s,
    steps,
    batch,
    rows,
    tiles,
    step_rows,
    batch_rows,
    y_row,
    H,
    zoneout_c: tl.float64,
    eps: tl.float64,
    CELL: tl.constexpr,
    G: tl.constexpr,
    ZONEOUT_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if layer.y.dtype.element_ty == tl.float64 else tl.float32
    eps = tl.full([], eps, ACC)
    d, tile, b, _ = _program(tiles, 1, BLOCK_B, BLOCK_H)
    place = _place(layer, tl.where(d == 0, steps - 1 - s, s), d, b, steps, batch, step_rows, batch_rows)
    u = tl.arange(0, BLOCK_H)
    inside = place.active[:, None] & (u < H)[None, :]
    state_offset = place.state[:, None] * H + u[None, :]
    dm = tl.load(dm_ptr + state_offset, mask=inside, other=0)
    past = dm
    if past_ptr is not None:
        past = tl.load(past_ptr + state_offset, mask=inside, other=0)
    _units_bwd(
        dm, past, layer, gradients, past_ptr, dc_ptr, place, d, d * tiles + tile, 0, rows, y_row, H,
        zoneout_c, eps, CELL, G, ZONEOUT_C, BLOCK_H, ACC,
    )  # fmt: skip


class _Tiles(NamedTuple):
    """Of a step's products."""

    BLOCK_B: int
    BLOCK_U: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def _tiles(batch, dtype):
    if INTERPRETED.value:
        return _Tiles(16, 32, 64, 4, 1)
    BLOCK_B = min(_pad(batch), 64 if dtype.itemsize == 2 else 32)
    num_warps = 8 if BLOCK_B > 16 else 4
    if dtype.itemsize == 2:
        return _Tiles(BLOCK_B, 32, 32 if BLOCK_B == 64 else 64, num_warps, 3)
    return _Tiles(BLOCK_B, 16, 32, num_warps, 2)


def _both(of_0, of_1):
    """The parameters of the directions, one behind the other."""
    if of_0 is None:
        return None
    return of_0.contiguous()[None] if of_1 is None else torch.stack((of_0, of_1))


class _Call:
    """What forward and backward share: the layer, the sizes and the way."""

    def __init__(self, inputs, y, gates, cells, cell, steps, batch, batch_first, zoneout_h, zoneout_c, eps):
        gx, *of_0 = inputs[:7]
        gx_r, *of_1 = inputs[7:14]
        h0, c0, keep, reset, seed, offsets = inputs[14:]
        w_hh, b_n, w_hr, peephole, ln_gates, ln_cell = (_both(*pair) for pair in zip(of_0, of_1))
        reset = None if reset is None else reset.view(torch.uint8)
        packed = offsets is not None
        offsets = offsets.to(y.device) if packed else None
        self.layer = _Layer(
            gx, gx_r, w_hh, b_n, w_hr, peephole, ln_gates, ln_cell, h0, c0, keep, reset, seed, offsets, y, gates, cells
        )
        self.D, G_H, self.P = w_hh.shape
        self.H = self.P if w_hr is None else w_hr.shape[2]
        self.G = G_H // self.H
        self.has_cells = cell in ("lstm", "coupled")
        self.acc = torch.float64 if y.dtype == torch.float64 else torch.float32
        self.norms = ln_gates is not None or ln_cell is not None
        self.BLOCK_H, self.BLOCK_P = _pad(self.H), _pad(self.P)
        weights = (self.G + (w_hr is not None)) * self.BLOCK_H * self.BLOCK_P
        size = y.element_size()
        fits = weights * size <= _WEIGHT_BYTES[size][_roomy(y.device)]
        self.whole = fits and max(self.G * self.BLOCK_H, self.BLOCK_P) <= _WHOLE_GATES
        self.tiles = _tiles(batch, y.dtype)
        if self.whole:
            self.tiles = self.tiles._replace(BLOCK_B=16)
        apart = self.norms or w_hr is not None
        self.sum_tiles = triton.cdiv(batch, _ROW_TILE if apart and not self.whole else self.tiles.BLOCK_B)
        step_rows, batch_rows = (1, steps) if batch_first and not packed else (batch, 1)
        self.sizes = {
            "steps": steps, "batch": batch, "rows": y.shape[0], "step_rows": step_rows, "batch_rows": batch_rows,
            "H": self.H, "enable_fp_fusion": True,
        }  # fmt: skip
        self.zoneout_h = {"zoneout_h": float(zoneout_h), "ZONEOUT_H": zoneout_h > 0}
        self.gates = {
            "zoneout_c": float(zoneout_c), "ZONEOUT_C": zoneout_c > 0 and self.has_cells, "eps": float(eps),
            "CELL": cell, "G": self.G, "y_row": y.stride(0),
        }  # fmt: skip

    def of_sequence(self):
        """Grid and arguments of a whole sequence's launch."""
        tiles = triton.cdiv(self.sizes["batch"], self.tiles.BLOCK_B)
        tiling = {"BLOCK_B": self.tiles.BLOCK_B, "BLOCK_H": self.BLOCK_H, "BLOCK_P": self.BLOCK_P}
        return (self.D * tiles,), {"tiles": tiles, "P": self.P, **tiling, **self.sizes, "num_warps": 8, "num_stages": 2}

    def of_products(self, columns):
        """Of a step's launch that multiplies: as many columns of each sequence."""
        tiles = triton.cdiv(self.sizes["batch"], self.tiles.BLOCK_B)
        chunks = triton.cdiv(columns, self.tiles.BLOCK_U)
        sizes = {"tiles": tiles, "chunks": chunks, "P": self.P, **self.sizes, **self.tiles._asdict()}
        return (self.D * tiles * chunks,), sizes

    def of_rows(self):
        """Of a step's launch on whole rows."""
        tiles = triton.cdiv(self.sizes["batch"], _ROW_TILE)
        sizes = {"tiles": tiles, "BLOCK_B": _ROW_TILE, "BLOCK_H": self.BLOCK_H, **self.sizes}
        return (self.D * tiles,), {**sizes, "num_warps": min(max(self.BLOCK_H * self.acc.itemsize // 512, 1), 16)}

    def state(self, width, dtype=None):
        return self.layer.y.new_empty(self.D, self.sizes["batch"], width, dtype=dtype or self.acc)


def recurrent_fwd_workspace(gx, w_hh, w_hr, ln_gates, w_hh_r, offsets, cell, steps, batch):  # noqa: ARG001
    return 0


@torch.no_grad()
def recurrent_fwd(
    gx, w_hh, b_n, w_hr, peephole, ln_gates, ln_cell,
    gx_r, w_hh_r, b_n_r, w_hr_r, peephole_r, ln_gates_r, ln_cell_r,
    h0, c0, keep, reset, seed, offsets,
    y, h_n, c_n, gates, cells, workspace,  # noqa: ARG001
    cell, steps, batch, batch_first, zoneout_h, zoneout_c, eps,
    num_threads=None,  # noqa: ARG001
):  # fmt: skip
    inputs = (
        gx, w_hh, b_n, w_hr, peephole, ln_gates, ln_cell,
        gx_r, w_hh_r, b_n_r, w_hr_r, peephole_r, ln_gates_r, ln_cell_r,
        h0, c0, keep, reset, seed, offsets,
    )  # fmt: skip
    call = _Call(inputs, y, gates, cells, cell, steps, batch, batch_first, zoneout_h, zoneout_c, eps)
    gx_row = gx.stride(0)
    with torch.cuda.device_of(gx):
        if call.whole:
            grid, sizes = call.of_sequence()
            _sequence_fwd_kernel[grid](
                call.layer, h_n_ptr=h_n, c_n_ptr=c_n, gx_row=gx_row, **sizes, **call.gates, **call.zoneout_h
            )
            return
        c = None
        if call.has_cells:
            c = call.state(call.H).zero_() if c0 is None else c0.to(call.acc, copy=True)
        products = call.state(call.G * call.H) if call.norms else None
        m = None if w_hr is None else call.state(call.H, y.dtype)
        pointers = {"c_ptr": c, "products_ptr": products, "m_ptr": m, "h_n_ptr": h_n, "gx_row": gx_row}
        product_grid, product_sizes = call.of_products(call.H)
        row_grid, row_sizes = call.of_rows()
        projection_grid, projection_sizes = call.of_products(call.P)
        for s in range(steps):
            _step_fwd_kernel[product_grid](call.layer, **pointers, s=s, **product_sizes, **call.gates, **call.zoneout_h)
            if call.norms:
                _rows_fwd_kernel[row_grid](call.layer, **pointers, s=s, **row_sizes, **call.gates, **call.zoneout_h)
            if w_hr is not None:
                _projection_fwd_kernel[projection_grid](
                    call.layer, m_ptr=m, h_n_ptr=h_n, s=s, y_row=y.stride(0), **projection_sizes, **call.zoneout_h
                )
        if call.has_cells:
            c_n.copy_(c)


def recurrent_bwd_workspace(gx, w_hh, w_hr, ln_gates, w_hh_r, offsets, cell, steps, batch):  # noqa: ARG001
    return 0


@torch.no_grad()
def recurrent_bwd(
    dy, dh_n, dc_n, dcells,
    gx, w_hh, b_n, w_hr, peephole, ln_gates, ln_cell,
    gx_r, w_hh_r, b_n_r, w_hr_r, peephole_r, ln_gates_r, ln_cell_r,
    h0, c0, keep, reset, seed, offsets,
    y, gates, cells, products,
    dgx, dp, dm, dbias, dpeephole, dln_gates, dln_cell, dh0, dc0, workspace,  # noqa: ARG001
    cell, steps, batch, batch_first, zoneout_h, zoneout_c, eps,
    num_threads=None,  # noqa: ARG001
):  # fmt: skip
    inputs = (
        gx, w_hh, b_n, w_hr, peephole, ln_gates, ln_cell,
        gx_r, w_hh_r, b_n_r, w_hr_r, peephole_r, ln_gates_r, ln_cell_r,
        h0, c0, keep, reset, seed, offsets,
    )  # fmt: skip
    call = _Call(inputs, y, gates, cells, cell, steps, batch, batch_first, zoneout_h, zoneout_c, eps)
    G, H = call.G, call.H
    sums = {}
    for name, total, count in (("dpeephole", dpeephole, G - 1), ("dln_gates", dln_gates, G), ("dln_cell", dln_cell, 2)):
        sums[name] = None if total is None else y.new_zeros(call.D, call.sum_tiles, count, H, dtype=call.acc)
    gradients = _Gradients(dy, dcells, products, dgx, dgx if dp is None else dp, dm, **sums)
    dy_row = 0 if dy is None else dy.stride(0)
    with torch.cuda.device_of(gates):
        if call.whole:
            grid, sizes = call.of_sequence()
            _sequence_bwd_kernel[grid](
                call.layer, gradients, dh_n_ptr=dh_n, dc_n_ptr=dc_n, dh0_ptr=dh0, dc0_ptr=dc0, dy_row=dy_row,
                **sizes, **call.gates, **call.zoneout_h,
            )  # fmt: skip
        else:
            if call.has_cells:
                dc0.zero_() if dc_n is None else dc0.copy_(dc_n)  # the steps' dc
            apart = call.norms or w_hr is not None
            dm_of_units = call.state(H) if apart else None
            past = call.state(call.P) if cell == "gru" or zoneout_h > 0 else None
            product_grid, product_sizes = call.of_products(call.P)
            projection_grid, projection_sizes = call.of_products(H)
            row_grid, row_sizes = call.of_rows()
            for s in range(steps + 1):
                _step_bwd_kernel[product_grid](
                    call.layer, gradients, dh_n_ptr=dh_n, dh0_ptr=dh0, past_ptr=past, dc_ptr=dc0, dm_ptr=dm_of_units,
                    s=s, dy_row=dy_row, **product_sizes, **call.gates, **call.zoneout_h,
                )  # fmt: skip
                if s == steps:
                    break
                if w_hr is not None:
                    _projection_bwd_kernel[projection_grid](
                        call.layer, gradients, dm_ptr=dm_of_units, s=s, **projection_sizes
                    )
                if apart:
                    _rows_bwd_kernel[row_grid](
                        call.layer, gradients, dm_ptr=dm_of_units, past_ptr=past if cell == "gru" else None, dc_ptr=dc0,
                        s=s, **row_sizes, **call.gates,
                    )  # fmt: skip
        for total, parts in zip((dpeephole, dln_gates, dln_cell), sums.values()):
            if total is not None:
                torch.sum(parts, 1, out=total.view(call.D, *parts.shape[2:]))
        if dbias is not None:
            by_gate = dgx.unflatten(-1, (G, H))
            dbias[:, :G] = by_gate.sum(1, dtype=call.acc)
            if cell == "gru":
                r = gates[:, :, :H]
                dbias[:, 3] = (by_gate[:, :, 2].to(call.acc) * r).sum(1)
