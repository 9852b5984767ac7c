"""Scaled dot product attention with masks, biases and their gradients, in Triton.

Dao 2023, FlashAttention-2; Press et al. 2022, Train Short, Test Long (ALiBi).
kernels/params/attention.h holds the formulas, the row index and the dropout mapping; names here are the names there.

Forward: one program per BLOCK_M queries of a head walks the keys in tiles of BLOCK_N and keeps running m2, l and
out. Backward: delta first (a dot product per row, into the workspace); then one program per key block of a key head
walks the queries of all heads that read it, for dk and dv; one per query block walks the keys, for dq; one per tile of
dmask walks the heads, batches and rows that share it. Each element of a gradient has one owner, which adds in a fixed
order: results repeat bit for bit on one device, and memory is linear in L and S. Scores are computed again by each of
the three, so backward does 10 products of [L, S, D] at most, where the fewest is 5.

Tiles that the window hides from all of a block are not visited. With 16-bit types the tiles that it hides from none are
visited first, in a loop of their own without its comparisons.

Products take head sizes padded to a power of two, at least 16. Those longer than CHUNK_D are walked in chunks of
CHUNK_D, read again from L2 for every tile. Outputs wider than OUT_D are shared by several programs, each of which
computes all of the scores. Both keep registers from spilling: fp32 products are rows of FMA instructions
(input_precision="ieee"), fp64 ones run on tensor cores from compute capability 8.0 to 10.x.

Traffic: q, k, v and out once, and k and v once more per block of queries, from L2; 2 * L * S * (D + Dv) FLOPs forward.
Numerics: everything but the operands of products in fp32 (fp64 for fp64).
"""

import functools
from typing import NamedTuple

import torch

import triton
import triton.language as tl

from .layer_norm import INTERPRETED, _dropout, _keep, _multiprocessors

_LOG2_E = 1.4426950408889634
LOG2_E = tl.constexpr(_LOG2_E)
MOST_BIAS = tl.constexpr(2.0**100)
INF = tl.constexpr(float("inf"))

# Arguments that change from call to call: no kernel of its own for a length of 1 or a multiple of 16. Strides are given
# in units of UNIT elements, a power of two that divides them all, which tells the compiler all that it can use.
_TENSORS = ("q", "k", "v", "out", "mask", "dout", "dq", "dk", "dv")
_UNSPECIALIZED = [f"{tensor}_stride_{dimension}" for tensor in _TENSORS for dimension in "bhl"]
_UNSPECIALIZED += ["blocks", "chunks", "H", "L", "S", "rows", "left", "right", "drop_threshold"]
_UNSPECIALIZED += ["mask_b", "mask_h", "mask_l", "mask_s", "m_blocks", "n_blocks", "shared_b", "shared_h"]
_UNSPECIALIZED += ["splits", "elements"]

# BLOCK_M and BLOCK_N under the interpreter, whose time goes by tiles more than by elements.
INTERPRETED_BLOCKS = (64, 32)
_DELTA_ROWS = 64


@triton.jit
def _tanh(x):
    if x.dtype == tl.float64:
        # expm1(y) = (u - 1) y / log(u): the rounding of u = exp(y) cancels (Kahan).
        y = tl.minimum(2 * tl.abs(x), 64.0)
        u = tl.exp(y)
        expm1 = tl.where(u == 1, y, (u - 1) * (y / tl.where(u == 1, 1.0, tl.log(u))))
        tanh = expm1 / (expm1 + 2)
    else:
        t = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
        xx = x * x
        series = -0.33333316 + xx * (0.1333251 + xx * (-0.053843956 + xx * (0.021035824 + xx * -0.0062215063)))
        tanh = tl.where(xx < 0.3, tl.abs(x) * (1 + xx * series), (1 - t) / (1 + t))
    return tl.where(x < 0, -tanh, tanh)


@triton.jit
def _load(
    ptr, stride, row0, rows, column0, ROWS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, BOUND: tl.constexpr
):
    """Rows row0 to row0 + ROWS and columns column0 to column0 + BLOCK of [rows, DIM]: [ROWS, BLOCK], 0 outside.

    BOUND: whether rows may end within the tile.
    """
    row = tl.arange(0, ROWS)
    column = column0 + tl.arange(0, BLOCK)
    pointers = ptr + row0.to(tl.int64) * stride + (row * stride)[:, None] + column[None, :]
    if BOUND:
        inside = (row0 + row < rows)[:, None]
        if DIM % BLOCK != 0:
            inside = inside & (column < DIM)[None, :]
        tile = tl.load(pointers, mask=inside, other=0)
    elif DIM % BLOCK != 0:
        tile = tl.load(pointers, mask=(column < DIM)[None, :], other=0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store(value, ptr, stride, row0, rows, column0, DIM: tl.constexpr):
    row = tl.arange(0, value.shape[0])
    column = column0 + tl.arange(0, value.shape[1])
    pointers = ptr + row0.to(tl.int64) * stride + (row * stride)[:, None] + column[None, :]
    inside = (row0 + row < rows)[:, None] & (column < DIM)[None, :]
    tl.store(pointers, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _product(
    a, a_ptr, a_stride, a0, a_rows,
    b, b_ptr, b_stride, b0, b_rows,
    ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
    BOUND_A: tl.constexpr, BOUND_B: tl.constexpr,
):  # fmt: skip
    """Rows of a times rows of b: [ROWS_A, ROWS_B]. Tiles a and b are given where a chunk holds all of DIM."""
    acc = tl.zeros([ROWS_A, ROWS_B], ACC)
    if DIM <= CHUNK:
        acc = _dot(a, tl.trans(b), acc)
    else:
        for d0 in range(0, DIM, CHUNK):
            a_chunk = _load(a_ptr, a_stride, a0, a_rows, d0, ROWS_A, CHUNK, DIM, BOUND_A)
            b_chunk = _load(b_ptr, b_stride, b0, b_rows, d0, ROWS_B, CHUNK, DIM, BOUND_B)
            acc = _dot(a_chunk, tl.trans(b_chunk), acc)
    return acc


@triton.jit
def _sequence(b, L, S, cu_q_ptr, cu_k_ptr):
    """First query, queries, first key and keys of sequence b."""
    q_first = 0
    k_first = 0
    queries = L
    keys = S
    if cu_q_ptr is not None:
        q_first = tl.load(cu_q_ptr + b)
        k_first = tl.load(cu_k_ptr + b)
        queries = tl.load(cu_q_ptr + b + 1) - q_first
        keys = tl.load(cu_k_ptr + b + 1) - k_first
    return q_first, queries, k_first, keys


@triton.jit
def _key_tiles(
    i0, i1, queries, keys, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, INNER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the key tiles that queries i0 to i1 see, counted from key 0: first, end, and first and end of the inner ones.

    Inner tiles are seen in full by each of the queries. Without INNER there are none.
    """
    off = keys - queries if BOTTOM_RIGHT else 0
    first = 0
    inner_first = 0
    end = tl.cdiv(keys, BLOCK_N)
    inner_end = keys // BLOCK_N
    if LEFT:
        first = tl.maximum(i0 + off - left, 0) // BLOCK_N
        inner_first = tl.cdiv(tl.maximum(i1 - 1 + off - left, 0), BLOCK_N)
    if RIGHT:
        end = tl.minimum(end, tl.cdiv(tl.maximum(i1 + off + right, 0), BLOCK_N))
        inner_end = tl.minimum(inner_end, tl.maximum(i0 + off + right + 1, 0) // BLOCK_N)
    end = tl.maximum(end, first)
    if INNER:
        inner_first = tl.minimum(inner_first, end)
        inner_end = tl.maximum(inner_end, inner_first)
    else:
        inner_first = end
        inner_end = end
    return first, end, inner_first, inner_end


@triton.jit
def _query_tiles(
    j0, j1, queries, keys, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, INNER: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """_key_tiles of the query tiles that see keys j0 to j1."""
    off = keys - queries if BOTTOM_RIGHT else 0
    first = 0
    inner_first = 0
    end = tl.cdiv(queries, BLOCK_M)
    inner_end = queries // BLOCK_M
    if RIGHT:
        first = tl.maximum(j0 - off - right, 0) // BLOCK_M
        inner_first = tl.cdiv(tl.maximum(j1 - 1 - off - right, 0), BLOCK_M)
    if LEFT:
        end = tl.minimum(end, tl.cdiv(tl.maximum(j1 - off + left, 0), BLOCK_M))
        inner_end = tl.minimum(inner_end, tl.maximum(j0 - off + left + 1, 0) // BLOCK_M)
    end = tl.maximum(end, first)
    if INNER:
        inner_first = tl.minimum(inner_first, end)
        inner_end = tl.where(j0 + BLOCK_N > keys, inner_first, tl.maximum(inner_end, inner_first))
    else:
        inner_first = end
        inner_end = end
    return first, end, inner_first, inner_end


@triton.jit
def _scores(
    s, i, j, queries, keys, mask_ptr, mask_stride, slope, scale, softcap, left, right,
    MASK_J: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 from the products s, and tanh(s / softcap). One of i and j is a column, the other a row.

    scale: of the product, softcap: of the tanh, slope: of the distance; in base 2.
    EDGE: whether the tile may reach over the window or over the sequence.
    """
    off = keys - queries if BOTTOM_RIGHT else 0
    ACC: tl.constexpr = s.dtype
    MOST: tl.constexpr = 1.7976931348623157e308 if s.dtype == tl.float64 else 3.4028234663852886e38
    s *= scale
    tanh = s
    if SOFTCAP:
        tanh = _tanh(s)
        s = softcap * tanh
    if mask_ptr is not None:
        inside = i < queries
        if EDGE:
            inside = inside & (j < keys)
        mask = tl.load(mask_ptr + i.to(tl.int64) * mask_stride + j * MASK_J, mask=inside, other=0)
        if mask.dtype == tl.uint8:
            s = tl.where(mask != 0, s, -INF)
        else:
            bias = mask.to(ACC) * LOG2_E
            bias = tl.where(bias < -MOST, -MOST, tl.where(bias > MOST_BIAS, MOST_BIAS, bias))
            s = tl.where(mask.to(ACC) == -INF, -INF, s + bias)
    if slope is not None:
        s -= slope * tl.abs(i + off - j).to(ACC)
    if EDGE:
        visible = (i < queries) & (j < keys)
        if LEFT:
            visible = visible & (j >= i + off - left)
        if RIGHT:
            visible = visible & (j <= i + off + right)
        s = tl.where(visible, s, -INF)
    return s, tanh


@triton.jit
def _head(ptr, b, h, first, stride_b, stride_h, stride_l, UNIT: tl.constexpr, PACKED: tl.constexpr):
    """Where row first of a head begins, and the distance between rows."""
    ptr += h.to(tl.int64) * stride_h * UNIT
    row = stride_l.to(tl.int64) * UNIT
    if PACKED:
        ptr += first * row
    else:
        ptr += b.to(tl.int64) * stride_b * UNIT
    return ptr, row


@triton.jit
def _row0(b, h, H, L, q_first, PACKED: tl.constexpr):
    """The row of a head's first query."""
    if PACKED:
        row0 = h.to(tl.int64) * L + q_first
    else:
        row0 = (b.to(tl.int64) * H + h) * L
    return row0


@triton.jit
def _slope(slopes_ptr, b, h, H):
    """In base 2."""
    slope = tl.load(slopes_ptr + b * H + h)
    return slope * tl.full([], LOG2_E, slope.dtype)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_fwd_kernel(
    q_ptr,  # [B, H, L, D]
    k_ptr,  # [B, Hk, S, D]
    v_ptr,  # [B, Hk, S, Dv]
    mask_ptr,  # [B, H, L, S] or None
    slopes_ptr,  # [B, H] or None
    sinks_ptr,  # [H] or None
    seed_ptr,  # [2] or None
    cu_q_ptr,  # [B + 1] or None
    cu_k_ptr,  # [B + 1] or None
    out_ptr,  # [B, H, L, Dv]
    residue_ptr,  # like out, or None
    stats_ptr,  # [2, rows]
    q_stride_b, q_stride_h, q_stride_l,
    k_stride_b, k_stride_h, k_stride_l,
    v_stride_b, v_stride_h, v_stride_l,
    out_stride_b, out_stride_h, out_stride_l,
    residue_stride_b, residue_stride_h, residue_stride_l,
    mask_stride_b, mask_stride_h, mask_stride_l,
    blocks,  # of queries
    chunks,  # of Dv
    H,
    G,  # query heads of a key head
    L,
    S,
    rows,
    scale: tl.float64,  # in base 2, like the next
    softcap: tl.float64,
    left,
    right,
    dropout_scale: tl.float64,
    drop_threshold,
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_J: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_D: tl.constexpr,
    OUT_DV: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    PACKED: tl.constexpr = cu_q_ptr is not None
    scale = tl.full([], scale, ACC)
    softcap = tl.full([], softcap, ACC)

    program = tl.program_id(0)
    chunk = program % chunks
    block = program // chunks % blocks
    head = program // chunks // blocks
    b = head // H
    h = head % H
    if RIGHT:
        block = blocks - 1 - block  # the longest first

    q_first, queries, k_first, keys = _sequence(b, L, S, cu_q_ptr, cu_k_ptr)
    i0 = block * BLOCK_M
    if PACKED and i0 >= queries:
        return
    q_ptr, q_stride = _head(q_ptr, b, h, q_first, q_stride_b, q_stride_h, q_stride_l, UNIT, PACKED)
    k_ptr, k_stride = _head(k_ptr, b, h // G, k_first, k_stride_b, k_stride_h, k_stride_l, UNIT, PACKED)
    v_ptr, v_stride = _head(v_ptr, b, h // G, k_first, v_stride_b, v_stride_h, v_stride_l, UNIT, PACKED)
    out_ptr, out_stride = _head(out_ptr, b, h, q_first, out_stride_b, out_stride_h, out_stride_l, UNIT, PACKED)
    row0 = _row0(b, h, H, L, q_first, PACKED)
    mask_of_head = None
    mask_stride = 0
    if mask_ptr is not None:
        mask_of_head, mask_stride = _head(
            mask_ptr, b, h, 0, mask_stride_b, mask_stride_h, mask_stride_l, MASK_UNIT, False
        )
    slope = None
    if slopes_ptr is not None:
        slope = _slope(slopes_ptr, b, h, H)

    i = i0 + tl.arange(0, BLOCK_M)
    if sinks_ptr is not None:
        m = tl.full([BLOCK_M], tl.minimum(tl.load(sinks_ptr + h) * tl.full([], LOG2_E, ACC), MOST_BIAS), ACC)
        total = tl.where(m == -INF, 0.0, 1.0).to(ACC)
    else:
        m = tl.full([BLOCK_M], -INF, ACC)
        total = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, OUT_DV], ACC)
    q = None
    if D <= CHUNK_D:
        q = _load(q_ptr, q_stride, i0, queries, 0, BLOCK_M, CHUNK_D, D, True)

    first, end, inner_first, inner_end = _key_tiles(
        i0, tl.minimum(i0 + BLOCK_M, queries), queries, keys, left, right, LEFT, RIGHT, BOTTOM_RIGHT, INNER, BLOCK_N
    )
    before = inner_first - first
    for edge in tl.static_range(1 - INNER, 2):
        if edge:
            start = 0
            stop = before + end - inner_end
        else:
            start = inner_first
            stop = inner_end
        for t in tl.range(start, stop):
            tile = t
            if edge:
                tile = tl.where(t < before, first + t, inner_end + t - before)
            j0 = tile * BLOCK_N
            j = j0 + tl.arange(0, BLOCK_N)
            k = None
            if D <= CHUNK_D:
                k = _load(k_ptr, k_stride, j0, keys, 0, BLOCK_N, CHUNK_D, D, edge)
            s = _product(
                q, q_ptr, q_stride, i0, queries, k, k_ptr, k_stride, j0, keys,
                BLOCK_M, BLOCK_N, D, CHUNK_D, ACC, True, edge,
            )  # fmt: skip
            s, _ = _scores(
                s, i[:, None], j[None, :], queries, keys, mask_of_head, mask_stride, slope, scale, softcap, left, right,
                MASK_J, LEFT, RIGHT, BOTTOM_RIGHT, SOFTCAP, edge,
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(s, axis=1))
            subtracted = tl.where(m_new == -INF, 0.0, m_new)
            p = tl.exp2(s - subtracted[:, None])
            alpha = tl.exp2(m - subtracted)
            total = total * alpha + tl.sum(p, axis=1)
            m = m_new
            if seed_ptr is not None:
                p = tl.where(_keep(seed_ptr, row0 + i, j0, drop_threshold, BLOCK_N), p, 0.0)
            v = _load(v_ptr, v_stride, j0, keys, chunk * OUT_DV, BLOCK_N, OUT_DV, DV, edge)
            acc = _dot(p.to(T), v, acc * alpha[:, None])

    weight = tl.full([], dropout_scale, ACC) / tl.where(total == 0, 1.0, total)
    out = tl.where((total == 0)[:, None], 0.0, acc * weight[:, None])
    _store(out, out_ptr, out_stride, i0, queries, chunk * OUT_DV, DV)
    if residue_ptr is not None:
        residue_ptr, residue_stride = _head(
            residue_ptr, b, h, q_first, residue_stride_b, residue_stride_h, residue_stride_l, UNIT, PACKED
        )
        lost = out - out.to(T).to(ACC)
        _store(lost, residue_ptr, residue_stride, i0, queries, chunk * OUT_DV, DV)
    end = tl.where(chunk == 0, queries, 0)
    tl.store(stats_ptr + row0 + i, m, mask=i < end)
    tl.store(stats_ptr + rows + row0 + i, total, mask=i < end)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_delta_kernel(
    dout_ptr,  # [B, H, L, Dv]
    out_ptr,  # [B, H, L, Dv]
    residue_ptr,  # like out, or None
    stats_ptr,  # [2, rows]
    dlse_ptr,  # [rows] or None
    cu_q_ptr,  # [B + 1] or None
    delta_ptr,  # [rows]
    dout_stride_b, dout_stride_h, dout_stride_l,
    out_stride_b, out_stride_h, out_stride_l,
    residue_stride_b, residue_stride_h, residue_stride_l,
    blocks,
    H,
    L,
    rows,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK_D: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = delta_ptr.dtype.element_ty
    PACKED: tl.constexpr = cu_q_ptr is not None
    program = tl.program_id(0)
    i0 = program % blocks * BLOCK_M
    head = program // blocks
    b = head // H
    h = head % H
    q_first, queries, _, _ = _sequence(b, L, L, cu_q_ptr, cu_q_ptr)
    if PACKED and i0 >= queries:
        return
    row0 = _row0(b, h, H, L, q_first, PACKED)
    dout_ptr, dout_stride = _head(dout_ptr, b, h, q_first, dout_stride_b, dout_stride_h, dout_stride_l, UNIT, PACKED)
    out_ptr, out_stride = _head(out_ptr, b, h, q_first, out_stride_b, out_stride_h, out_stride_l, UNIT, PACKED)
    if residue_ptr is not None:
        residue_ptr, residue_stride = _head(
            residue_ptr, b, h, q_first, residue_stride_b, residue_stride_h, residue_stride_l, UNIT, PACKED
        )
    i = i0 + tl.arange(0, BLOCK_M)
    delta = tl.zeros([BLOCK_M], ACC)
    for d0 in range(0, DV, CHUNK_D):
        dout = _load(dout_ptr, dout_stride, i0, queries, d0, BLOCK_M, CHUNK_D, DV, True).to(ACC)
        out = _load(out_ptr, out_stride, i0, queries, d0, BLOCK_M, CHUNK_D, DV, True).to(ACC)
        if residue_ptr is not None:
            out += _load(residue_ptr, residue_stride, i0, queries, d0, BLOCK_M, CHUNK_D, DV, True)
        delta += tl.sum(dout * out, axis=1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row0 + i, mask=i < queries, other=0)
    # A row without a visible key has no gradient, whatever that of its lse is.
    total = tl.load(stats_ptr + rows + row0 + i, mask=i < queries, other=0)
    tl.store(delta_ptr + row0 + i, tl.where(total == 0, 0.0, delta), mask=i < queries)


@triton.jit
def _load_rows(stats_ptr, delta_ptr, rows, row, inside):
    """m2, 1 / l and delta of rows; 0 of those outside and of those without a visible key."""
    m = tl.load(stats_ptr + row, mask=inside, other=0)
    total = tl.load(stats_ptr + rows + row, mask=inside, other=0)
    delta = tl.load(delta_ptr + row, mask=inside, other=0)
    weight = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    return tl.where(m == -INF, 0.0, m), weight, delta


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_dkdv_kernel(
    dout_ptr,  # [B, H, L, Dv]
    q_ptr,  # [B, H, L, D]
    k_ptr,  # [B, Hk, S, D]
    v_ptr,  # [B, Hk, S, Dv]
    mask_ptr,  # [B, H, L, S] or None
    slopes_ptr,  # [B, H] or None
    seed_ptr,  # [2] or None
    cu_q_ptr,  # [B + 1] or None
    cu_k_ptr,  # [B + 1] or None
    stats_ptr,  # [2, rows]
    delta_ptr,  # [rows]
    dk_ptr,  # [B, Hk, S, D] or None
    dv_ptr,  # [B, Hk, S, Dv] or None
    dout_stride_b, dout_stride_h, dout_stride_l,
    q_stride_b, q_stride_h, q_stride_l,
    k_stride_b, k_stride_h, k_stride_l,
    v_stride_b, v_stride_h, v_stride_l,
    dk_stride_b, dk_stride_h, dk_stride_l,
    dv_stride_b, dv_stride_h, dv_stride_l,
    mask_stride_b, mask_stride_h, mask_stride_l,
    blocks,  # of keys
    chunks,  # of D and Dv
    H,
    G,  # query heads of a key head
    L,
    S,
    rows,
    scale: tl.float64,  # in base 2, like the next
    softcap: tl.float64,
    dk_scale: tl.float64,
    left,
    right,
    dropout_scale: tl.float64,
    drop_threshold,
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_J: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_D: tl.constexpr,
    CHUNK_DV: tl.constexpr,
    OUT_D: tl.constexpr,
    OUT_DV: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    PACKED: tl.constexpr = cu_q_ptr is not None
    scale = tl.full([], scale, ACC)
    softcap = tl.full([], softcap, ACC)
    dropout_scale = tl.full([], dropout_scale, ACC)

    program = tl.program_id(0)
    chunk = program % chunks
    block = program // chunks % blocks
    head = program // chunks // blocks
    Hk = H // G
    b = head // Hk
    hk = head % Hk

    q_first, queries, k_first, keys = _sequence(b, L, S, cu_q_ptr, cu_k_ptr)
    j0 = block * BLOCK_N
    if PACKED and j0 >= keys:
        return
    k_ptr, k_stride = _head(k_ptr, b, hk, k_first, k_stride_b, k_stride_h, k_stride_l, UNIT, PACKED)
    v_ptr, v_stride = _head(v_ptr, b, hk, k_first, v_stride_b, v_stride_h, v_stride_l, UNIT, PACKED)
    j = j0 + tl.arange(0, BLOCK_N)
    k = None
    if D <= CHUNK_D:
        k = _load(k_ptr, k_stride, j0, keys, 0, BLOCK_N, CHUNK_D, D, True)
    v = None
    if DV <= CHUNK_DV:
        v = _load(v_ptr, v_stride, j0, keys, 0, BLOCK_N, CHUNK_DV, DV, True)
    dk = tl.zeros([BLOCK_N, OUT_D], ACC)
    dv = tl.zeros([BLOCK_N, OUT_DV], ACC)

    first, end, inner_first, inner_end = _query_tiles(
        j0, tl.minimum(j0 + BLOCK_N, keys), queries, keys, left, right, LEFT, RIGHT, BOTTOM_RIGHT, INNER,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    before = inner_first - first
    for edge in tl.static_range(1 - INNER, 2):
        tiles = inner_end - inner_first
        if edge:
            tiles = before + end - inner_end
        for t in tl.range(0, G * tiles):  # all heads in one loop: in two, registers spill
            h = hk
            tile = t
            if G > 1:
                h = hk * G + t // tl.maximum(tiles, 1)
                tile = t % tl.maximum(tiles, 1)
            if edge:
                tile = tl.where(tile < before, first + tile, inner_end + tile - before)
            else:
                tile = inner_first + tile
            dout_head, dout_stride = _head(
                dout_ptr, b, h, q_first, dout_stride_b, dout_stride_h, dout_stride_l, UNIT, PACKED
            )
            q_head, q_stride = _head(q_ptr, b, h, q_first, q_stride_b, q_stride_h, q_stride_l, UNIT, PACKED)
            row0 = _row0(b, h, H, L, q_first, PACKED)
            mask_of_head = None
            mask_stride = 0
            if mask_ptr is not None:
                mask_of_head, mask_stride = _head(
                    mask_ptr, b, h, 0, mask_stride_b, mask_stride_h, mask_stride_l, MASK_UNIT, False
                )
            slope = None
            if slopes_ptr is not None:
                slope = _slope(slopes_ptr, b, h, H)
            i0 = tile * BLOCK_M
            i = i0 + tl.arange(0, BLOCK_M)
            m, weight, delta = _load_rows(stats_ptr, delta_ptr, rows, row0 + i, i < queries)
            q = None
            if D <= CHUNK_D:
                q = _load(q_head, q_stride, i0, queries, 0, BLOCK_M, CHUNK_D, D, edge)
            s = _product(
                k, k_ptr, k_stride, j0, keys, q, q_head, q_stride, i0, queries,
                BLOCK_N, BLOCK_M, D, CHUNK_D, ACC, True, edge,
            )  # fmt: skip
            s, tanh = _scores(
                s, i[None, :], j[:, None], queries, keys, mask_of_head, mask_stride, slope, scale, softcap,
                left, right, MASK_J, LEFT, RIGHT, BOTTOM_RIGHT, SOFTCAP, edge,
            )  # fmt: skip
            p = tl.exp2(s - m[None, :]) * weight[None, :]
            if seed_ptr is not None:
                keep = tl.trans(_keep(seed_ptr, row0 + i, j0, drop_threshold, BLOCK_N))

            dout = None
            if DV <= CHUNK_DV:
                dout = _load(dout_head, dout_stride, i0, queries, 0, BLOCK_M, CHUNK_DV, DV, edge)
            if dv_ptr is not None:
                kept = tl.where(keep, p, 0.0) if seed_ptr is not None else p
                if DV <= CHUNK_DV:
                    dv = _dot(kept.to(T), dout, dv)
                else:
                    column0 = tl.minimum(chunk, (DV - 1) // OUT_DV) * OUT_DV
                    part = _load(dout_head, dout_stride, i0, queries, column0, BLOCK_M, OUT_DV, DV, edge)
                    dv = _dot(kept.to(T), part, dv)
            if dk_ptr is not None:
                dp = _product(
                    v, v_ptr, v_stride, j0, keys, dout, dout_head, dout_stride, i0, queries,
                    BLOCK_N, BLOCK_M, DV, CHUNK_DV, ACC, True, edge,
                )  # fmt: skip
                if seed_ptr is not None:
                    dp = tl.where(keep, dp * dropout_scale, 0.0)
                ds = p * (dp - delta[None, :])
                if SOFTCAP:
                    ds *= 1 - tanh * tanh
                if D <= CHUNK_D:
                    dk = _dot(ds.to(T), q, dk)
                else:
                    column0 = tl.minimum(chunk, (D - 1) // OUT_D) * OUT_D
                    part = _load(q_head, q_stride, i0, queries, column0, BLOCK_M, OUT_D, D, edge)
                    dk = _dot(ds.to(T), part, dk)

    if dk_ptr is not None:
        dk_ptr, dk_stride = _head(dk_ptr, b, hk, k_first, dk_stride_b, dk_stride_h, dk_stride_l, UNIT, PACKED)
        _store(dk * tl.full([], dk_scale, ACC), dk_ptr, dk_stride, j0, keys, chunk * OUT_D, D)
    if dv_ptr is not None:
        dv_ptr, dv_stride = _head(dv_ptr, b, hk, k_first, dv_stride_b, dv_stride_h, dv_stride_l, UNIT, PACKED)
        _store(dv * dropout_scale, dv_ptr, dv_stride, j0, keys, chunk * OUT_DV, DV)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_dq_kernel(
    dout_ptr,  # [B, H, L, Dv]
    q_ptr,  # [B, H, L, D]
    k_ptr,  # [B, Hk, S, D]
    v_ptr,  # [B, Hk, S, Dv]
    mask_ptr,  # [B, H, L, S] or None
    slopes_ptr,  # [B, H] or None
    seed_ptr,  # [2] or None
    cu_q_ptr,  # [B + 1] or None
    cu_k_ptr,  # [B + 1] or None
    stats_ptr,  # [2, rows]
    delta_ptr,  # [rows]
    dq_ptr,  # [B, H, L, D]
    dout_stride_b, dout_stride_h, dout_stride_l,
    q_stride_b, q_stride_h, q_stride_l,
    k_stride_b, k_stride_h, k_stride_l,
    v_stride_b, v_stride_h, v_stride_l,
    dq_stride_b, dq_stride_h, dq_stride_l,
    mask_stride_b, mask_stride_h, mask_stride_l,
    blocks,  # of queries
    chunks,  # of D
    H,
    G,  # query heads of a key head
    L,
    S,
    rows,
    scale: tl.float64,  # in base 2, like the next
    softcap: tl.float64,
    dq_scale: tl.float64,
    left,
    right,
    dropout_scale: tl.float64,
    drop_threshold,
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_J: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_D: tl.constexpr,
    CHUNK_DV: tl.constexpr,
    OUT_D: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    PACKED: tl.constexpr = cu_q_ptr is not None
    scale = tl.full([], scale, ACC)
    softcap = tl.full([], softcap, ACC)
    dropout_scale = tl.full([], dropout_scale, ACC)

    program = tl.program_id(0)
    chunk = program % chunks
    block = program // chunks % blocks
    head = program // chunks // blocks
    b = head // H
    h = head % H
    if RIGHT:
        block = blocks - 1 - block  # the longest first

    q_first, queries, k_first, keys = _sequence(b, L, S, cu_q_ptr, cu_k_ptr)
    i0 = block * BLOCK_M
    if PACKED and i0 >= queries:
        return
    dout_ptr, dout_stride = _head(dout_ptr, b, h, q_first, dout_stride_b, dout_stride_h, dout_stride_l, UNIT, PACKED)
    q_ptr, q_stride = _head(q_ptr, b, h, q_first, q_stride_b, q_stride_h, q_stride_l, UNIT, PACKED)
    k_ptr, k_stride = _head(k_ptr, b, h // G, k_first, k_stride_b, k_stride_h, k_stride_l, UNIT, PACKED)
    v_ptr, v_stride = _head(v_ptr, b, h // G, k_first, v_stride_b, v_stride_h, v_stride_l, UNIT, PACKED)
    dq_ptr, dq_stride = _head(dq_ptr, b, h, q_first, dq_stride_b, dq_stride_h, dq_stride_l, UNIT, PACKED)
    row0 = _row0(b, h, H, L, q_first, PACKED)
    mask_of_head = None
    mask_stride = 0
    if mask_ptr is not None:
        mask_of_head, mask_stride = _head(
            mask_ptr, b, h, 0, mask_stride_b, mask_stride_h, mask_stride_l, MASK_UNIT, False
        )
    slope = None
    if slopes_ptr is not None:
        slope = _slope(slopes_ptr, b, h, H)

    i = i0 + tl.arange(0, BLOCK_M)
    m, weight, delta = _load_rows(stats_ptr, delta_ptr, rows, row0 + i, i < queries)
    q = None
    if D <= CHUNK_D:
        q = _load(q_ptr, q_stride, i0, queries, 0, BLOCK_M, CHUNK_D, D, True)
    dout = None
    if DV <= CHUNK_DV:
        dout = _load(dout_ptr, dout_stride, i0, queries, 0, BLOCK_M, CHUNK_DV, DV, True)
    dq = tl.zeros([BLOCK_M, OUT_D], ACC)

    first, end, inner_first, inner_end = _key_tiles(
        i0, tl.minimum(i0 + BLOCK_M, queries), queries, keys, left, right, LEFT, RIGHT, BOTTOM_RIGHT, INNER, BLOCK_N
    )
    before = inner_first - first
    for edge in tl.static_range(1 - INNER, 2):
        if edge:
            start = 0
            stop = before + end - inner_end
        else:
            start = inner_first
            stop = inner_end
        for t in tl.range(start, stop):
            tile = t
            if edge:
                tile = tl.where(t < before, first + t, inner_end + t - before)
            j0 = tile * BLOCK_N
            j = j0 + tl.arange(0, BLOCK_N)
            k = None
            if D <= CHUNK_D:
                k = _load(k_ptr, k_stride, j0, keys, 0, BLOCK_N, CHUNK_D, D, edge)
            s = _product(
                q, q_ptr, q_stride, i0, queries, k, k_ptr, k_stride, j0, keys,
                BLOCK_M, BLOCK_N, D, CHUNK_D, ACC, True, edge,
            )  # fmt: skip
            s, tanh = _scores(
                s, i[:, None], j[None, :], queries, keys, mask_of_head, mask_stride, slope, scale, softcap, left, right,
                MASK_J, LEFT, RIGHT, BOTTOM_RIGHT, SOFTCAP, edge,
            )  # fmt: skip
            p = tl.exp2(s - m[:, None]) * weight[:, None]
            v = None
            if DV <= CHUNK_DV:
                v = _load(v_ptr, v_stride, j0, keys, 0, BLOCK_N, CHUNK_DV, DV, edge)
            dp = _product(
                dout, dout_ptr, dout_stride, i0, queries, v, v_ptr, v_stride, j0, keys,
                BLOCK_M, BLOCK_N, DV, CHUNK_DV, ACC, True, edge,
            )  # fmt: skip
            if seed_ptr is not None:
                dp = tl.where(_keep(seed_ptr, row0 + i, j0, drop_threshold, BLOCK_N), dp * dropout_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if SOFTCAP:
                ds *= 1 - tanh * tanh
            if D <= CHUNK_D:
                dq = _dot(ds.to(T), k, dq)
            else:
                part = _load(k_ptr, k_stride, j0, keys, chunk * OUT_D, BLOCK_N, OUT_D, D, edge)
                dq = _dot(ds.to(T), part, dq)

    _store(dq * tl.full([], dq_scale, ACC), dq_ptr, dq_stride, i0, queries, chunk * OUT_D, D)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_dmask_kernel(
    dout_ptr,  # [B, H, L, Dv]
    q_ptr,  # [B, H, L, D]
    k_ptr,  # [B, Hk, S, D]
    v_ptr,  # [B, Hk, S, Dv]
    mask_ptr,  # [B, H, L, S]
    slopes_ptr,  # [B, H] or None
    seed_ptr,  # [2] or None
    cu_q_ptr,  # [B + 1] or None
    cu_k_ptr,  # [B + 1] or None
    stats_ptr,  # [2, rows]
    delta_ptr,  # [rows]
    dmask_ptr,  # [splits, mask_b, mask_h, mask_l, mask_s]
    dout_stride_b, dout_stride_h, dout_stride_l,
    q_stride_b, q_stride_h, q_stride_l,
    k_stride_b, k_stride_h, k_stride_l,
    v_stride_b, v_stride_h, v_stride_l,
    mask_stride_b, mask_stride_h, mask_stride_l,
    mask_b,
    mask_h,
    mask_l,
    mask_s,
    m_blocks,
    n_blocks,
    shared_b,  # batches that share an element
    shared_h,
    splits,
    H,
    G,  # query heads of a key head
    L,
    S,
    rows,
    scale: tl.float64,  # in base 2, like the next
    softcap: tl.float64,
    left,
    right,
    dropout_scale: tl.float64,
    drop_threshold,
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SHARED_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_D: tl.constexpr,
    CHUNK_DV: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    PACKED: tl.constexpr = cu_q_ptr is not None
    scale = tl.full([], scale, ACC)
    softcap = tl.full([], softcap, ACC)
    dropout_scale = tl.full([], dropout_scale, ACC)

    program = tl.program_id(0)
    j0 = program % n_blocks * BLOCK_N
    block = program // n_blocks % m_blocks
    image = program // n_blocks // m_blocks  # split, batch and head of dmask
    split = image // (mask_b * mask_h)
    mask_batch = image // mask_h % mask_b
    mask_head = image % mask_h
    shared = shared_b * shared_h
    j = j0 + tl.arange(0, BLOCK_N)
    if SHARED_L:
        dmask = tl.zeros([BLOCK_N], ACC)
    else:
        dmask = tl.zeros([BLOCK_M, BLOCK_N], ACC)

    for t in tl.range(split * shared // splits, (split + 1) * shared // splits):
        b = mask_batch * shared_b + t // shared_h
        h = mask_head * shared_h + t % shared_h
        q_first, queries, k_first, keys = _sequence(b, L, S, cu_q_ptr, cu_k_ptr)
        dout_head, dout_stride = _head(
            dout_ptr, b, h, q_first, dout_stride_b, dout_stride_h, dout_stride_l, UNIT, PACKED
        )
        q_head, q_stride = _head(q_ptr, b, h, q_first, q_stride_b, q_stride_h, q_stride_l, UNIT, PACKED)
        k_head, k_stride = _head(k_ptr, b, h // G, k_first, k_stride_b, k_stride_h, k_stride_l, UNIT, PACKED)
        v_head, v_stride = _head(v_ptr, b, h // G, k_first, v_stride_b, v_stride_h, v_stride_l, UNIT, PACKED)
        row0 = _row0(b, h, H, L, q_first, PACKED)
        mask_of_head = None
        mask_stride = 0
        if mask_ptr is not None:
            mask_of_head, mask_stride = _head(
                mask_ptr, b, h, 0, mask_stride_b, mask_stride_h, mask_stride_l, MASK_UNIT, False
            )
        slope = None
        if slopes_ptr is not None:
            slope = _slope(slopes_ptr, b, h, H)
        first, end, _inner_first, _inner_end = _query_tiles(
            j0, tl.minimum(j0 + BLOCK_N, keys), queries, keys, left, right, LEFT, RIGHT, BOTTOM_RIGHT, False,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        end = tl.where(j0 < keys, end, first)
        if not SHARED_L:
            first = tl.maximum(first, block)
            end = tl.minimum(end, block + 1)
        for tile in tl.range(first, end):
            i0 = tile * BLOCK_M
            i = i0 + tl.arange(0, BLOCK_M)
            m, weight, delta = _load_rows(stats_ptr, delta_ptr, rows, row0 + i, i < queries)
            q = None
            k = None
            if D <= CHUNK_D:
                q = _load(q_head, q_stride, i0, queries, 0, BLOCK_M, CHUNK_D, D, True)
                k = _load(k_head, k_stride, j0, keys, 0, BLOCK_N, CHUNK_D, D, True)
            s = _product(
                q, q_head, q_stride, i0, queries, k, k_head, k_stride, j0, keys,
                BLOCK_M, BLOCK_N, D, CHUNK_D, ACC, True, True,
            )  # fmt: skip
            s, _ = _scores(
                s, i[:, None], j[None, :], queries, keys, mask_of_head, mask_stride, slope, scale, softcap,
                left, right, 1, LEFT, RIGHT, BOTTOM_RIGHT, SOFTCAP, True,
            )  # fmt: skip
            p = tl.exp2(s - m[:, None]) * weight[:, None]
            dout = None
            v = None
            if DV <= CHUNK_DV:
                dout = _load(dout_head, dout_stride, i0, queries, 0, BLOCK_M, CHUNK_DV, DV, True)
                v = _load(v_head, v_stride, j0, keys, 0, BLOCK_N, CHUNK_DV, DV, True)
            dp = _product(
                dout, dout_head, dout_stride, i0, queries, v, v_head, v_stride, j0, keys,
                BLOCK_M, BLOCK_N, DV, CHUNK_DV, ACC, True, True,
            )  # fmt: skip
            if seed_ptr is not None:
                dp = tl.where(_keep(seed_ptr, row0 + i, j0, drop_threshold, BLOCK_N), dp * dropout_scale, 0.0)
            ds = p * (dp - delta[:, None])
            inside = (i < queries)[:, None] & (j < keys)[None, :]
            mask = tl.load(mask_of_head + i.to(tl.int64)[:, None] * mask_stride + j[None, :], mask=inside, other=0)
            ds = tl.where(mask.to(ACC) == INF, 0.0, ds)
            if SHARED_L:
                dmask += tl.sum(ds, axis=0)
            else:
                dmask += ds

    if SHARED_L:
        tl.store(dmask_ptr + image.to(tl.int64) * mask_s + j, dmask, mask=j < mask_s)
    else:
        i = block * BLOCK_M + tl.arange(0, BLOCK_M)
        row = (image.to(tl.int64) * mask_l + i)[:, None]
        tl.store(dmask_ptr + row * mask_s + j[None, :], dmask, mask=(i < mask_l)[:, None] & (j < mask_s)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_dmask_reduce_kernel(
    workspace_ptr,  # [splits, elements]
    dmask_ptr,  # [elements]
    elements,
    splits,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dmask = tl.zeros([BLOCK], dmask_ptr.dtype.element_ty)
    for split in range(splits):
        dmask += tl.load(workspace_ptr + split * elements + offset, mask=offset < elements, other=0)
    tl.store(dmask_ptr + offset, dmask, mask=offset < elements)


class _Tiles(NamedTuple):
    """Tile sizes, the widest chunk of a product's and of an output's head size, and Triton's own options."""

    BLOCK_M: int
    BLOCK_N: int
    chunk: int
    out: int
    num_warps: int
    num_stages: int
    apart: bool = False  # dk and dv by one launch each: each has the accumulators to itself


# By kernel and bytes of an element, for head sizes up to 64, up to 128 and above: tiles without, and with much work per
# score (mask, dropout, softcap, slopes). They are chosen by registers, not by measured times: large, but without spills
# up to 128 (tests/test_triton_aot.py), under these rules:
#   - 16-bit: 16 of the block's own rows per warp (BLOCK_M, or BLOCK_N of dkdv), or 8 where two warps can share the
#     other's 32: with fewer, warps repeat each other's products. The block's own operands stay, 2 or 3 stages of the
#     other's wait in 99 KB. Above 128 head sizes are walked in chunks of 64, through L2, for want of registers;
#   - fp32: an FMA product holds its operands in registers, so its inner dimension is 16 or 32;
#   - fp64: as fp32, for the sake of compute capability 12.0, where Triton multiplies fp64 by FMA instructions.
_TILES = {
    ("fwd", 2): (
        (_Tiles(128, 64, 64, 64, 8, 3), _Tiles(128, 32, 64, 64, 8, 2)),
        (_Tiles(128, 64, 128, 128, 8, 2), _Tiles(128, 32, 64, 128, 8, 2)),
        (_Tiles(128, 32, 64, 256, 8, 2), _Tiles(128, 16, 64, 256, 8, 2)),
    ),
    ("dkdv", 2): (
        (_Tiles(32, 128, 64, 64, 8, 2), _Tiles(16, 128, 64, 64, 8, 2)),
        (_Tiles(16, 128, 128, 128, 8, 2), _Tiles(16, 128, 128, 128, 8, 2, apart=True)),
        (_Tiles(32, 64, 64, 256, 8, 2, apart=True), _Tiles(32, 64, 64, 256, 8, 2, apart=True)),
    ),
    ("dq", 2): (
        (_Tiles(128, 64, 64, 64, 8, 2), _Tiles(128, 32, 64, 64, 8, 2)),
        (_Tiles(128, 32, 128, 128, 8, 2), _Tiles(128, 16, 128, 128, 8, 2)),
        (_Tiles(64, 32, 64, 256, 8, 2), _Tiles(64, 32, 64, 256, 8, 2)),
    ),
    ("dmask", 2): (
        (_Tiles(64, 32, 64, 64, 8, 2), _Tiles(64, 32, 64, 64, 8, 2)),
        (_Tiles(64, 64, 64, 64, 8, 2), _Tiles(64, 64, 64, 64, 8, 2)),
        (_Tiles(64, 64, 64, 64, 8, 2), _Tiles(64, 64, 64, 64, 8, 2)),
    ),
    ("fwd", 4): (
        (_Tiles(64, 32, 16, 64, 8, 1), _Tiles(64, 32, 16, 64, 8, 1)),
        (_Tiles(64, 32, 32, 128, 8, 1), _Tiles(64, 32, 32, 128, 8, 1)),
        (_Tiles(64, 32, 32, 128, 8, 1), _Tiles(64, 32, 32, 128, 8, 1)),
    ),
    ("dkdv", 4): (
        (_Tiles(16, 64, 16, 64, 8, 1), _Tiles(16, 64, 16, 64, 8, 1)),
        (_Tiles(16, 32, 32, 128, 8, 1), _Tiles(16, 64, 16, 64, 8, 1)),
        (_Tiles(16, 32, 32, 128, 8, 1), _Tiles(16, 64, 16, 64, 8, 1)),
    ),
    ("dq", 4): (
        (_Tiles(32, 32, 32, 64, 4, 1), _Tiles(64, 16, 16, 64, 4, 1)),
        (_Tiles(32, 32, 32, 128, 4, 1), _Tiles(64, 16, 16, 128, 4, 1)),
        (_Tiles(32, 32, 32, 128, 4, 1), _Tiles(64, 16, 16, 128, 4, 1)),
    ),
    ("dmask", 4): ((_Tiles(64, 32, 16, 64, 8, 1),) * 2,) * 3,
    ("fwd", 8): ((_Tiles(32, 16, 32, 64, 4, 1),) * 2,) * 3,
    ("dkdv", 8): ((_Tiles(16, 64, 32, 64, 8, 1, apart=True),) * 2,) * 3,
    ("dq", 8): ((_Tiles(32, 16, 16, 64, 4, 1),) * 2,) * 3,
    ("dmask", 8): ((_Tiles(32, 16, 32, 64, 4, 1),) * 2,) * 3,
}
# Where a program has 227 KB of shared memory: compute capability 9.0 and 10.x. The rest is as above.
_ROOMY_TILES = {
    ("fwd", 2): (
        (_Tiles(128, 128, 64, 64, 8, 3), _Tiles(128, 64, 64, 64, 8, 2)),
        (_Tiles(128, 64, 128, 128, 8, 3), _Tiles(128, 32, 128, 128, 8, 2)),
        (_Tiles(128, 32, 64, 256, 8, 2), _Tiles(128, 16, 64, 256, 8, 2)),
    ),
    ("dkdv", 2): (
        (_Tiles(64, 128, 64, 64, 8, 2), _Tiles(16, 128, 64, 64, 8, 2)),
        (_Tiles(32, 128, 128, 128, 8, 2), _Tiles(16, 128, 128, 128, 8, 2, apart=True)),
        (_Tiles(32, 64, 64, 256, 8, 2, apart=True), _Tiles(32, 64, 64, 256, 8, 2, apart=True)),
    ),
    ("dq", 2): (
        (_Tiles(128, 64, 64, 64, 8, 2), _Tiles(128, 32, 64, 64, 8, 2)),
        (_Tiles(128, 64, 128, 128, 8, 2), _Tiles(128, 16, 128, 128, 8, 2)),
        (_Tiles(64, 32, 64, 256, 8, 2), _Tiles(64, 32, 64, 256, 8, 2)),
    ),
}


@functools.cache
def _roomy(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _tiles(kernel, q, v, max_q, max_k, heavy):
    if INTERPRETED.value:
        return _Tiles(*INTERPRETED_BLOCKS, 64, 64, 4, 1, apart=q.shape[3] > 64)
    key = kernel, q.element_size()
    table = _ROOMY_TILES if key in _ROOMY_TILES and _roomy(q.device) else _TILES
    width = max(q.shape[3], v.shape[3])
    tiles = table[key][(width > 64) + (width > 128)][heavy]
    # No larger than the sequences, with as much for each warp.
    BLOCK_M, BLOCK_N = min(tiles.BLOCK_M, _pad(max_q)), min(tiles.BLOCK_N, _pad(max_k))
    own, of = (BLOCK_N, tiles.BLOCK_N) if kernel == "dkdv" else (BLOCK_M, tiles.BLOCK_M)
    num_warps = max(tiles.num_warps * own // of, 1)
    return tiles._replace(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps)


def _pad(size):
    return max(16, triton.next_power_of_2(size))


def _fit(tiles, dim):
    """CHUNK and OUT of a head size."""
    padded = _pad(dim)
    return (padded, padded) if padded <= tiles.chunk else (tiles.chunk, min(padded, tiles.out))


def _unit(*tensors):
    """The largest power of two up to 16 that divides all strides."""
    bits = 16
    for tensor in tensors:
        if tensor is not None:
            for size, stride in zip(tensor.shape[:3], tensor.stride()):
                if size > 1:
                    bits |= stride
    return bits & -bits


def _strides(tensor, unit):
    if tensor is None:
        return 0, 0, 0
    return [stride // unit if size > 1 else 0 for size, stride in zip(tensor.shape[:3], tensor.stride())]


def _features(mask, scale, left, right, bottom_right, softcap, p, seed, max_q, max_k):
    """The mask as the kernels take it, its strides, and what all kernels are told of the scores."""
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    unit = _unit(mask)
    farthest = max_q + max_k
    dropout_scale, drop_threshold = _dropout(seed, p)
    scalars = {
        "scale": float(scale / softcap if softcap else scale * _LOG2_E),
        "softcap": float(softcap * _LOG2_E),
        "left": min(left, farthest),
        "right": min(right, farthest),
        "dropout_scale": float(dropout_scale),
        "drop_threshold": drop_threshold,
        "MASK_UNIT": unit,
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "BOTTOM_RIGHT": bottom_right,
        "SOFTCAP": softcap > 0,
        "enable_fp_fusion": True,
    }
    return mask, _strides(mask, unit), scalars


def _heavy(mask, slopes, seed, softcap):
    return mask is not None or slopes is not None or seed is not None or softcap > 0


def attention_fwd_workspace(q, k, v, mask, cu_q, max_q, max_k):  # noqa: ARG001
    return 0


def attention_fwd(
    q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, out, residue, stats, workspace,  # noqa: ARG001
    scale, left, right, bottom_right, softcap, p, max_q, max_k,
    num_threads=None, differentiated=False,  # noqa: ARG001
):  # fmt: skip
    H, L, D = q.shape[1:]
    Hk, S, DV = v.shape[1:]
    B = q.shape[0] if cu_q is None else cu_q.numel() - 1
    mask, mask_strides, features = _features(mask, scale, left, right, bottom_right, softcap, p, seed, max_q, max_k)
    tiles = _tiles("fwd", q, v, max_q, max_k, _heavy(mask, slopes, seed, softcap))
    CHUNK_D, _ = _fit(tiles, D)
    _, OUT_DV = _fit(tiles, DV)
    blocks = triton.cdiv(max_q, tiles.BLOCK_M)
    chunks = triton.cdiv(DV, OUT_DV)
    unit = _unit(q, k, v, out, residue)
    with torch.cuda.device_of(q):
        _attention_fwd_kernel[(B * H * blocks * chunks,)](
            q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, out, residue, stats,
            *_strides(q, unit), *_strides(k, unit), *_strides(v, unit), *_strides(out, unit),
            *_strides(residue, unit), *mask_strides,
            blocks, chunks, H, H // Hk, L, S, stats[0].numel(),
            D=D, DV=DV, UNIT=unit, MASK_J=0 if mask is None else mask.stride(3), INNER=q.element_size() == 2,
            BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, CHUNK_D=CHUNK_D, OUT_DV=OUT_DV,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **features,
        )  # fmt: skip


def _dmask_grid(q, mask, max_q, max_k, tiles):
    """What shares an element of dmask, and how its tiles are shared out."""
    B, H = mask.shape[:2]
    mask_b, mask_h, mask_l = (1 if stride == 0 else size for size, stride in zip((B, H, max_q), mask.stride()))
    grid = {
        "mask_b": mask_b,
        "mask_h": mask_h,
        "mask_l": mask_l,
        "mask_s": max_k,
        "m_blocks": triton.cdiv(mask_l, tiles.BLOCK_M),
        "n_blocks": triton.cdiv(max_k, tiles.BLOCK_N),
        "shared_b": B // mask_b,
        "shared_h": H // mask_h,
    }
    programs = mask_b * mask_h * grid["m_blocks"] * grid["n_blocks"]
    shared = grid["shared_b"] * grid["shared_h"]
    grid["splits"] = min(triton.cdiv(2 * _multiprocessors(q.device), programs), shared)
    return grid, programs * grid["splits"], mask_b * mask_h * mask_l * max_k


def attention_bwd_workspace(q, k, v, mask, cu_q, max_q, max_k, need_dmask):  # noqa: ARG001
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    if not need_dmask:
        return rows
    grid, _, elements = _dmask_grid(q, mask, max_q, max_k, _tiles("dmask", q, v, max_q, max_k, True))
    return rows + (grid["splits"] * elements if grid["splits"] > 1 else 0)


def attention_bwd(
    dout, dlse, q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, out, residue, stats,  # noqa: ARG001
    dq, dk, dv, dmask, workspace,
    scale, left, right, bottom_right, softcap, p, max_q, max_k,
    num_threads=None,  # noqa: ARG001
):  # fmt: skip
    H, L, D = q.shape[1:]
    Hk, S, DV = v.shape[1:]
    B = q.shape[0] if cu_q is None else cu_q.numel() - 1
    mask, mask_strides, features = _features(mask, scale, left, right, bottom_right, softcap, p, seed, max_q, max_k)
    MASK_J = 0 if mask is None else mask.stride(3)
    INNER = q.element_size() == 2
    heavy = _heavy(mask, slopes, seed, softcap)
    rows = stats[0].numel()
    delta = workspace[:rows]
    unit = _unit(dout, q, k, v, out, residue, dq, dk, dv)
    inputs = [*_strides(dout, unit), *_strides(q, unit), *_strides(k, unit), *_strides(v, unit)]
    sizes = H, H // Hk, L, S, rows

    with torch.cuda.device_of(q):
        blocks = triton.cdiv(max_q, _DELTA_ROWS)
        _attention_bwd_delta_kernel[(B * H * blocks,)](
            dout, out, residue, stats, dlse, cu_q, delta, *_strides(dout, unit), *_strides(out, unit),
            *_strides(residue, unit), blocks, H, L, rows,
            DV=DV, UNIT=unit, BLOCK_M=_DELTA_ROWS, CHUNK_D=min(_pad(DV), 128), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

        if dk is not None or dv is not None:
            tiles = _tiles("dkdv", q, v, max_q, max_k, heavy)
            (CHUNK_D, OUT_D), (CHUNK_DV, OUT_DV) = _fit(tiles, D), _fit(tiles, DV)
            blocks = triton.cdiv(max_k, tiles.BLOCK_N)
            apart = tiles.apart and dk is not None and dv is not None
            for outputs in ((dk, None), (None, dv)) if apart else ((dk, dv),):
                chunks = max(
                    triton.cdiv(D, OUT_D) if outputs[0] is not None else 1,
                    triton.cdiv(DV, OUT_DV) if outputs[1] is not None else 1,
                )
                _attention_bwd_dkdv_kernel[(B * Hk * blocks * chunks,)](
                    dout, q, k, v, mask, slopes, seed, cu_q, cu_k, stats, delta, *outputs,
                    *inputs, *_strides(dk, unit), *_strides(dv, unit), *mask_strides, blocks, chunks, *sizes,
                    dk_scale=float(scale), D=D, DV=DV, UNIT=unit, MASK_J=MASK_J, INNER=INNER,
                    BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, CHUNK_D=CHUNK_D, CHUNK_DV=CHUNK_DV, OUT_D=OUT_D,
                    OUT_DV=OUT_DV, num_warps=tiles.num_warps, num_stages=tiles.num_stages, **features,
                )  # fmt: skip

        if dq is not None:
            tiles = _tiles("dq", q, v, max_q, max_k, heavy)
            (CHUNK_D, OUT_D), (CHUNK_DV, _) = _fit(tiles, D), _fit(tiles, DV)
            blocks, chunks = triton.cdiv(max_q, tiles.BLOCK_M), triton.cdiv(D, OUT_D)
            _attention_bwd_dq_kernel[(B * H * blocks * chunks,)](
                dout, q, k, v, mask, slopes, seed, cu_q, cu_k, stats, delta, dq,
                *inputs, *_strides(dq, unit), *mask_strides, blocks, chunks, *sizes,
                dq_scale=float(scale), D=D, DV=DV, UNIT=unit, MASK_J=MASK_J, INNER=INNER,
                BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, CHUNK_D=CHUNK_D, CHUNK_DV=CHUNK_DV, OUT_D=OUT_D,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages, **features,
            )  # fmt: skip

        if dmask is not None:
            tiles = _tiles("dmask", q, v, max_q, max_k, True)
            (CHUNK_D, _), (CHUNK_DV, _) = _fit(tiles, D), _fit(tiles, DV)
            grid, programs, elements = _dmask_grid(q, mask, max_q, max_k, tiles)
            parts = workspace[rows:] if grid["splits"] > 1 else dmask
            _attention_bwd_dmask_kernel[(programs,)](
                dout, q, k, v, mask, slopes, seed, cu_q, cu_k, stats, delta, parts,
                *inputs, *mask_strides, *grid.values(), *sizes,
                D=D, DV=DV, UNIT=unit, SHARED_L=mask.stride(2) == 0,
                BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, CHUNK_D=CHUNK_D, CHUNK_DV=CHUNK_DV,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages, **features,
            )  # fmt: skip
            if grid["splits"] > 1:
                _attention_bwd_dmask_reduce_kernel[(triton.cdiv(elements, 1024),)](
                    parts, dmask, elements, grid["splits"], BLOCK=1024, num_warps=4, enable_fp_fusion=True
                )
