"""LayerNorm and RMSNorm, with fused dropout and residual, in Triton.

Ba et al. 2016, Layer Normalization; Zhang & Sennrich 2019, Root Mean Square Layer Normalization.
kernels/params/layer_norm.h holds the formulas, the layouts and the dropout mapping; names here are the names there.

Tiles: every kernel works on tiles of [ROWS, BLOCK_C] elements. Rows are grouped into images so that both layouts are
one address rule, image * C * c_stride + row * row_stride + c * c_stride:
    P == 1   one image of R rows,   row_stride as given,  c_stride 1
    P > 1    B images of P rows,    row_stride 1,         c_stride P
Triton compiles a stride of 1 as a constant, so neighbouring lanes take neighbouring addresses in both.

Short rows stay in registers: BLOCK_C >= C, each element is read once. Longer rows (LOOPED) are walked in chunks of
BLOCK_C and read a second time, from L2.

Forward: one program per tile. Moves x (and residual) in, y (and sum) out.
Backward: a persistent grid of G programs; each walks every G-th tile and keeps its own sums for dweight and dbias, in
registers, or in its slice of the workspace when LOOPED. Moves dy, saved (and dsum) in, dx (and dresidual) out, and
2 * G * C sums. A second kernel adds the G slices in a fixed order, so results repeat bit for bit on one device.

Numerics: sums and statistics in fp32 (fp64 for fp64). The variance is taken around the mean; LOOPED takes it by
Welford's update per lane and merges the lanes around the common mean. The rounding of the mean itself is not taken
back, as the CPU and CUDA kernels do for fp32: rows with a large mean differ in their last digits.
"""

import functools
import math
from typing import NamedTuple

import torch

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_SMALL_TILE = 2048  # elements of a tile of short rows
_LOOPED_TILE = 2048
# Elements of the longest tile that a program keeps in registers: the longest without spills (tests/test_triton_aot.py).
_FWD_REGISTERS = 16384
_BWD_REGISTERS = 8192


@triton.jit
def _cast(value, dtype: tl.constexpr):
    """value rounded to the nearest dtype, ties to even: the interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def _keep(seed_ptr, row, c0, drop_threshold, BLOCK_C: tl.constexpr):
    """Which elements of rows row and columns c0 to c0 + BLOCK_C dropout keeps: [ROWS, BLOCK_C]."""
    key = tl.load(seed_ptr)
    stream = tl.load(seed_ptr + 1)
    group = (c0 // 4 + tl.arange(0, BLOCK_C // 4))[None, :]
    lane0, lane1, lane2, lane3 = tl.philox_impl(
        group.to(tl.uint32),
        row.to(tl.uint32)[:, None],
        (row >> 32).to(tl.uint32)[:, None],
        stream.to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    keep0 = (lane0 >> 8).to(tl.int32) >= drop_threshold
    keep1 = (lane1 >> 8).to(tl.int32) >= drop_threshold
    keep2 = (lane2 >> 8).to(tl.int32) >= drop_threshold
    keep3 = (lane3 >> 8).to(tl.int32) >= drop_threshold
    # join puts the new dimension last: [ROWS, BLOCK_C / 4, 2, 2] counts lanes 0, 1, 2, 3.
    keep = tl.join(tl.join(keep0, keep2), tl.join(keep1, keep3))
    return tl.reshape(keep, [row.shape[0], BLOCK_C])


@triton.jit
def _load_hidden(
    x_ptr, residual_ptr, seed_ptr, sum_ptr, x_offset, residual_offset, sum_offset, row, c0, mask,
    dropout_scale, drop_threshold, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """h of one tile, rounded to the type of x like dropout(x) before it; with a residual it is stored to sum."""
    h = tl.load(x_ptr + x_offset, mask=mask, other=0).to(ACC)
    if residual_ptr is not None:
        if seed_ptr is not None:
            h = tl.where(_keep(seed_ptr, row, c0, drop_threshold, BLOCK_C), h * dropout_scale, 0.0)
            h = _cast(h, x_ptr.dtype.element_ty).to(ACC)
        h += tl.load(residual_ptr + residual_offset, mask=mask, other=0).to(ACC)
        rounded = _cast(h, x_ptr.dtype.element_ty)
        tl.store(sum_ptr + sum_offset, rounded, mask=mask)
        h = rounded.to(ACC)
    return h


@triton.jit
def _store_normalised(h, mean, rstd, weight_ptr, bias_ptr, y_ptr, offset, cols, C, mask, weight_offset):
    y = (h - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        y *= (tl.load(weight_ptr + cols, mask=cols < C, other=0).to(h.dtype) + weight_offset)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < C, other=0).to(h.dtype)[None, :]
    tl.store(y_ptr + offset, _cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles", "drop_threshold"])
def _layer_norm_fwd_kernel(
    x_ptr,  # [R, C]
    residual_ptr,  # [R, C] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    seed_ptr,  # [2] or None
    y_ptr,  # [R, C]
    sum_ptr,  # [R, C] or None
    mean_ptr,  # [R] or None
    rstd_ptr,  # [R] or None
    C,
    rows,  # per image
    tiles,  # per image
    c_stride,
    x_stride,  # between rows, like the next two
    residual_stride,
    y_stride,  # of sum too
    eps: tl.float64,
    weight_offset: tl.float64,
    dropout_scale: tl.float64,
    drop_threshold,
    RMS: tl.constexpr,
    LOOPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    eps = tl.full([], eps, ACC)
    weight_offset = tl.full([], weight_offset, ACC)
    dropout_scale = tl.full([], dropout_scale, ACC)

    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    row_mask = (row < rows)[:, None]
    r = image * rows + row
    base = image * C * c_stride
    x_row = (base + row * x_stride)[:, None]
    residual_row = (base + row * residual_stride)[:, None]
    y_row = (base + row * y_stride)[:, None]
    block = tl.arange(0, BLOCK_C)

    if LOOPED:
        lane_mean = tl.full([ROWS, BLOCK_C], 0, ACC)
        lane_squares = tl.full([ROWS, BLOCK_C], 0, ACC)
        visits = tl.full([], 0, ACC)
        for c0 in range(0, C, BLOCK_C):
            cols = c0 + block
            c_offset = (cols.to(tl.int64) * c_stride)[None, :]
            mask = row_mask & (cols < C)[None, :]
            h = _load_hidden(
                x_ptr, residual_ptr, seed_ptr, sum_ptr, x_row + c_offset, residual_row + c_offset, y_row + c_offset,
                r, c0, mask, dropout_scale, drop_threshold, ACC, BLOCK_C,
            )  # fmt: skip
            visits += 1.0
            delta = tl.where(mask, h - lane_mean, 0.0)
            if not RMS:
                lane_mean += delta * (1.0 / visits)
            lane_squares += delta * tl.where(mask, h - lane_mean, 0.0)
        visits_of_lane = ((C - block + BLOCK_C - 1) // BLOCK_C).to(ACC)[None, :]
        mean = tl.sum(lane_mean * visits_of_lane, axis=1) / C
        deviation = lane_mean - mean[:, None]
        variance = tl.sum(lane_squares + visits_of_lane * deviation * deviation, axis=1) / C
    else:
        c_offset = (block.to(tl.int64) * c_stride)[None, :]
        mask = row_mask & (block < C)[None, :]
        h = _load_hidden(
            x_ptr, residual_ptr, seed_ptr, sum_ptr, x_row + c_offset, residual_row + c_offset, y_row + c_offset,
            r, 0, mask, dropout_scale, drop_threshold, ACC, BLOCK_C,
        )  # fmt: skip
        mean = tl.full([ROWS], 0, ACC) if RMS else tl.sum(h, axis=1) / C
        deviation = tl.where(mask, h - mean[:, None], 0.0)
        variance = tl.sum(deviation * deviation, axis=1) / C

    rstd = tl.rsqrt(variance + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + r, mean, mask=row < rows)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + r, rstd, mask=row < rows)

    if LOOPED:
        if residual_ptr is not None:
            tl.debug_barrier()  # sum is read back, not by the threads that wrote it
        for c0 in range(0, C, BLOCK_C):
            cols = c0 + block
            c_offset = (cols.to(tl.int64) * c_stride)[None, :]
            mask = row_mask & (cols < C)[None, :]
            if residual_ptr is not None:
                h = tl.load(sum_ptr + y_row + c_offset, mask=mask, other=0).to(ACC)
            else:
                h = tl.load(x_ptr + x_row + c_offset, mask=mask, other=0).to(ACC)
            _store_normalised(
                h, mean, rstd, weight_ptr, bias_ptr, y_ptr, y_row + c_offset, cols, C, mask, weight_offset
            )
    else:
        _store_normalised(h, mean, rstd, weight_ptr, bias_ptr, y_ptr, y_row + c_offset, block, C, mask, weight_offset)


@triton.jit
def _load_affine(weight_ptr, bias_ptr, cols, C, weight_offset):
    """weight_offset + weight and bias at cols; 1 and 0 where there is none."""
    weight = tl.full(cols.shape, 1.0, weight_offset.dtype)
    bias = tl.full(cols.shape, 0.0, weight_offset.dtype)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < C, other=1.0).to(weight_offset.dtype) + weight_offset
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < C, other=0).to(weight_offset.dtype)
    return weight, bias


@triton.jit
def _load_gradient(
    dy_ptr, saved_ptr, dy_offset, saved_offset, mask, weight, bias, mean, rstd, FROM_OUTPUT: tl.constexpr
):
    """dy, g and xhat of one tile; outside of the mask dy and g are 0, and xhat is finite."""
    dy = tl.load(dy_ptr + dy_offset, mask=mask, other=0).to(weight.dtype)
    saved = tl.load(saved_ptr + saved_offset, mask=mask, other=0).to(weight.dtype)
    if FROM_OUTPUT:
        xhat = (saved - bias[None, :]) * (1.0 / weight)[None, :]
    else:
        xhat = (saved - mean[:, None]) * rstd[:, None]
    return dy, dy * weight[None, :], xhat


@triton.jit
def _store_dx(
    g, xhat, mean_g, mean_gx, rstd, dsum_ptr, seed_ptr, dx_ptr, dresidual_ptr, dsum_offset, dx_offset, r, c0, mask,
    dropout_scale, drop_threshold, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dh = rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
    if dsum_ptr is not None:
        dh += tl.load(dsum_ptr + dsum_offset, mask=mask, other=0).to(g.dtype)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + dx_offset, _cast(dh, dresidual_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        if seed_ptr is not None:
            dh = tl.where(_keep(seed_ptr, r, c0, drop_threshold, BLOCK_C), dh * dropout_scale, 0.0)
        tl.store(dx_ptr + dx_offset, _cast(dh, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles", "total_tiles", "drop_threshold"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # [R, C]
    dsum_ptr,  # [R, C] or None
    saved_ptr,  # [R, C] h, or y when FROM_OUTPUT
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    mean_ptr,  # [R]; None for RMSNorm and when FROM_OUTPUT
    rstd_ptr,  # [R]
    seed_ptr,  # [2] or None
    dx_ptr,  # [R, C] or None
    dresidual_ptr,  # [R, C] or None
    workspace_ptr,  # [G, 2, C] sums for dweight and dbias, or None
    C,
    rows,  # per image
    tiles,  # per image
    total_tiles,
    c_stride,
    dy_stride,  # between rows, like the next three
    dsum_stride,
    saved_stride,
    dx_stride,  # of dresidual too
    weight_offset: tl.float64,
    dropout_scale: tl.float64,
    drop_threshold,
    RMS: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    STAGES: tl.constexpr,
    LOOPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    weight_offset = tl.full([], weight_offset, ACC)
    dropout_scale = tl.full([], dropout_scale, ACC)

    program = tl.program_id(0)
    if workspace_ptr is not None:
        dweight_ptr = workspace_ptr + program.to(tl.int64) * 2 * C
        dbias_ptr = dweight_ptr + C
    block = tl.arange(0, BLOCK_C)
    if DWEIGHT:
        dweight = tl.full([ROWS, BLOCK_C], 0, ACC)
    if DBIAS:
        dbias = tl.full([ROWS, BLOCK_C], 0, ACC)

    if not LOOPED:
        weight, bias = _load_affine(weight_ptr, bias_ptr, block, C, weight_offset)

    for tile in tl.range(program, total_tiles, tl.num_programs(0), num_stages=STAGES):
        image = (tile // tiles).to(tl.int64)
        row = (tile % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row_mask = (row < rows)[:, None]
        r = image * rows + row
        base = image * C * c_stride
        dy_row = (base + row * dy_stride)[:, None]
        dsum_row = (base + row * dsum_stride)[:, None]
        saved_row = (base + row * saved_stride)[:, None]
        dx_row = (base + row * dx_stride)[:, None]
        rstd = tl.load(rstd_ptr + r, mask=row < rows, other=0)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + r, mask=row < rows, other=0)
        else:
            mean = tl.full([ROWS], 0, ACC)

        if LOOPED:
            sum_g = tl.full([ROWS, BLOCK_C], 0, ACC)
            sum_gx = tl.full([ROWS, BLOCK_C], 0, ACC)
            for c0 in range(0, C, BLOCK_C):
                cols = c0 + block
                c_offset = (cols.to(tl.int64) * c_stride)[None, :]
                mask = row_mask & (cols < C)[None, :]
                weight, bias = _load_affine(weight_ptr, bias_ptr, cols, C, weight_offset)
                dy, g, xhat = _load_gradient(
                    dy_ptr, saved_ptr, dy_row + c_offset, saved_row + c_offset, mask, weight, bias, mean, rstd,
                    FROM_OUTPUT,
                )  # fmt: skip
                sum_g += g
                sum_gx += g * xhat
            mean_gx = tl.sum(sum_gx, axis=1) / C
            mean_g = tl.full([ROWS], 0, ACC) if RMS else tl.sum(sum_g, axis=1) / C
            summed = tl.where(tile == program, 0, C)  # the first tile finds no sums
            for c0 in range(0, C, BLOCK_C):
                cols = c0 + block
                c_offset = (cols.to(tl.int64) * c_stride)[None, :]
                mask = row_mask & (cols < C)[None, :]
                weight, bias = _load_affine(weight_ptr, bias_ptr, cols, C, weight_offset)
                dy, g, xhat = _load_gradient(
                    dy_ptr, saved_ptr, dy_row + c_offset, saved_row + c_offset, mask, weight, bias, mean, rstd,
                    FROM_OUTPUT,
                )  # fmt: skip
                _store_dx(
                    g, xhat, mean_g, mean_gx, rstd, dsum_ptr, seed_ptr, dx_ptr, dresidual_ptr, dsum_row + c_offset,
                    dx_row + c_offset, r, c0, mask, dropout_scale, drop_threshold, BLOCK_C,
                )  # fmt: skip
                if DWEIGHT:
                    before = tl.load(dweight_ptr + cols, mask=cols < summed, other=0)
                    tl.store(dweight_ptr + cols, before + tl.sum(dy * xhat, axis=0), mask=cols < C)
                if DBIAS:
                    before = tl.load(dbias_ptr + cols, mask=cols < summed, other=0)
                    tl.store(dbias_ptr + cols, before + tl.sum(dy, axis=0), mask=cols < C)
            tl.debug_barrier()  # the sums are read back, not by the threads that wrote them
        else:
            c_offset = (block.to(tl.int64) * c_stride)[None, :]
            mask = row_mask & (block < C)[None, :]
            dy, g, xhat = _load_gradient(
                dy_ptr, saved_ptr, dy_row + c_offset, saved_row + c_offset, mask, weight, bias, mean, rstd, FROM_OUTPUT
            )
            mean_gx = tl.sum(g * xhat, axis=1) / C
            mean_g = tl.full([ROWS], 0, ACC) if RMS else tl.sum(g, axis=1) / C
            _store_dx(
                g, xhat, mean_g, mean_gx, rstd, dsum_ptr, seed_ptr, dx_ptr, dresidual_ptr, dsum_row + c_offset,
                dx_row + c_offset, r, 0, mask, dropout_scale, drop_threshold, BLOCK_C,
            )  # fmt: skip
            if DWEIGHT:
                dweight += dy * xhat
            if DBIAS:
                dbias += dy

    if not LOOPED:
        if DWEIGHT:
            tl.store(dweight_ptr + block, tl.sum(dweight, axis=0), mask=block < C)
        if DBIAS:
            tl.store(dbias_ptr + block, tl.sum(dbias, axis=0), mask=block < C)


@triton.jit(do_not_specialize=["G"])
def _layer_norm_bwd_reduce_kernel(
    workspace_ptr,  # [G, 2, C]
    dweight_ptr,  # [C] or None
    dbias_ptr,  # [C] or None
    G,
    C,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = workspace_ptr.dtype.element_ty
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.full([BLOCK_G, BLOCK_C], 0, ACC)
    dbias = tl.full([BLOCK_G, BLOCK_C], 0, ACC)
    for g0 in range(0, G, BLOCK_G):
        g = g0 + tl.arange(0, BLOCK_G)
        mask = (g < G)[:, None] & (cols < C)[None, :]
        offset = g.to(tl.int64)[:, None] * 2 * C + cols[None, :]
        if dweight_ptr is not None:
            dweight += tl.load(workspace_ptr + offset, mask=mask, other=0)
        if dbias_ptr is not None:
            dbias += tl.load(workspace_ptr + offset + C, mask=mask, other=0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + cols, _cast(tl.sum(dweight, axis=0), dweight_ptr.dtype.element_ty), mask=cols < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cols, _cast(tl.sum(dbias, axis=0), dbias_ptr.dtype.element_ty), mask=cols < C)


class _Tiling(NamedTuple):
    """Launch arguments, under the names that the kernels and Triton give them."""

    ROWS: int
    BLOCK_C: int
    LOOPED: bool
    num_warps: int


def _tiling(rows, C, P, dtype, registers, heavy=False):
    """How to walk images of ``rows`` rows.

    registers: how many fp32 elements of a contiguous row a program can keep. heavy: each needs more registers.
    """
    most_warps = registers // 1024
    looped_tile = _LOOPED_TILE
    if dtype == torch.float64:
        registers //= 4
        looped_tile //= 2
    if P > 1 or C % 16:  # an access per element: addresses take registers too
        registers //= 2
    if heavy:
        registers //= 2
    most_rows = triton.next_power_of_2(rows)
    if P == 1:
        sector = line = 1
    else:  # rows are neighbours in memory: a tile needs 32 bytes of them, and is better with 128
        sector = min(32 // dtype.itemsize, most_rows)
        line = min(128 // dtype.itemsize, most_rows)
    BLOCK_C = max(triton.next_power_of_2(C), 4)
    LOOPED = BLOCK_C * sector > registers
    if LOOPED:
        ROWS = line
        BLOCK_C = looped_tile // ROWS
    else:
        ROWS = min(max(_SMALL_TILE // BLOCK_C, line), max(registers // BLOCK_C, sector), most_rows)
    if INTERPRETED.value:  # its time goes by programs more than by elements
        ROWS = min(max(65536 // BLOCK_C, ROWS), most_rows)
    elements_per_warp = (256 if LOOPED or dtype == torch.float64 else 512) // (2 if heavy else 1)
    num_warps = min(max(ROWS * BLOCK_C // elements_per_warp, 1), most_warps)
    return _Tiling(ROWS, BLOCK_C, LOOPED, num_warps)


def _images(x, C, P):
    """Images, and rows per image."""
    return (1, x.numel() // C) if P == 1 else (x.numel() // (C * P), P)


def _row_stride(tensor, C, P):
    if tensor is None or P > 1:
        return 1
    return C if tensor.is_contiguous() else tensor.stride(0)


def _dropout(seed, p):
    """dropout_scale and drop_threshold."""
    if seed is None:
        return 1.0, 0
    return (0.0 if p == 1 else 1 / (1 - p)), math.ceil(p * 2**24)


@functools.cache
def _multiprocessors(device):
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _bwd_grid(x, C, P, heavy):
    """The tiling of a backward call, tiles per image, tiles, and programs G: as many as fit the registers at once."""
    images, rows = _images(x, C, P)
    tiling = _tiling(rows, C, P, x.dtype, _BWD_REGISTERS, heavy)
    tiles = triton.cdiv(rows, tiling.ROWS)
    resident = _multiprocessors(x.device) * max(_BWD_REGISTERS // (tiling.ROWS * tiling.BLOCK_C), 1)
    return tiling, tiles, images * tiles, min(images * tiles, resident)


def layer_norm_fwd(
    x, residual, weight, bias, seed, y, sum, mean, rstd, C, P, eps, weight_offset, p, rms,
    num_threads=None,  # noqa: ARG001
):  # fmt: skip
    if x.numel() == 0:
        return
    images, rows = _images(x, C, P)
    tiling = _tiling(rows, C, P, x.dtype, _FWD_REGISTERS)
    tiles = triton.cdiv(rows, tiling.ROWS)
    with torch.cuda.device_of(x):
        _layer_norm_fwd_kernel[(images * tiles,)](
            x, residual, weight, bias, seed, y, sum, mean, rstd, C, rows, tiles, P,
            _row_stride(x, C, P), _row_stride(residual, C, P), _row_stride(y, C, P),
            float(eps), float(weight_offset), *_dropout(seed, p),
            RMS=rms, **tiling._asdict(), enable_fp_fusion=True,
        )  # fmt: skip


def layer_norm_bwd_workspace(x, C, P, num_threads=None):  # noqa: ARG001
    if x.numel() == 0:
        return 0
    return max(_bwd_grid(x, C, P, heavy)[-1] for heavy in (False, True)) * 2 * C


def layer_norm_bwd(
    dy, dsum, saved, weight, bias, mean, rstd, seed, dx, dresidual, dweight, dbias, workspace,
    C, P, weight_offset, p, rms, from_output,
    num_threads=None,  # noqa: ARG001
):  # fmt: skip
    if dy.numel() == 0:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return
    tiling, tiles, total_tiles, G = _bwd_grid(dy, C, P, heavy=from_output or seed is not None)
    with torch.cuda.device_of(dy):
        _layer_norm_bwd_kernel[(G,)](
            dy, dsum, saved, weight, bias if from_output else None, mean, rstd, seed, dx, dresidual, workspace,
            C, _images(dy, C, P)[1], tiles, total_tiles, P,
            _row_stride(dy, C, P), _row_stride(dsum, C, P), _row_stride(saved, C, P), 1 if P > 1 else C,
            float(weight_offset), *_dropout(seed, p),
            RMS=rms, FROM_OUTPUT=from_output, DWEIGHT=dweight is not None, DBIAS=dbias is not None,
            STAGES=1 if tiling.LOOPED or P > 1 else 2, **tiling._asdict(), enable_fp_fusion=True,
        )  # fmt: skip
        if dweight is not None or dbias is not None:
            BLOCK_G, BLOCK_C = (2, min(triton.next_power_of_2(C), 4096)) if INTERPRETED.value else (64, 32)
            _layer_norm_bwd_reduce_kernel[(triton.cdiv(C, BLOCK_C),)](
                workspace, dweight, dbias, G, C, BLOCK_G=BLOCK_G, BLOCK_C=BLOCK_C, num_warps=4, enable_fp_fusion=True
            )
