// Backward kernels. layer_norm.cu has the overview.
#pragma once

#include "../params/layer_norm.h"
#include "layer_norm_common.cuh"

namespace pyops {

// A thread's vectors of dy and `saved` in one chunk of one row: held in registers (kHeld), or read, mostly from L1,
// each time they are visited.
template <typename T, typename W, int kN, int kVecs, typename Layout, bool kHeld>
class BwdTile {
 public:
  using A = acc_t<T>;

  __device__ __forceinline__ void load(const LayerNormBwdParams<T, W>& p, const Layout& layout, int64_t r,
                                       int64_t start, int width) {
    dy_ = p.dy + layout.offset(r, p.dy_stride, start);
    saved_ = p.saved + layout.offset(r, p.saved_stride, start);
    mean_ = width > 0 && p.mean != nullptr ? p.mean[r] : A(0);
    rstd_ = width > 0 ? p.rstd[r] : A(0);
    if constexpr (kHeld) {
      const T *dy = dy_, *saved = saved_;
#pragma unroll
      for (int v = 0; v < kVecs; ++v, dy += layout.vec_step(), saved += layout.vec_step()) {
        held_dy_[v] = held_saved_[v] = {};
        if (layout.column(v) < width) {
          held_dy_[v] = load_packed<kN>(dy);
          held_saved_[v] = load_packed<kN>(saved);
        }
      }
    }
  }

  // Calls f(v, dy, xhat, scale) for each vector v.
  template <typename F>
  __device__ __forceinline__ void visit(const LayerNormBwdParams<T, W>& p, const Layout& layout, int64_t start,
                                        int width, F f) const {
    const T *from_dy = dy_, *from_saved = saved_;
#pragma unroll
    for (int v = 0; v < kVecs; ++v, from_dy += layout.vec_step(), from_saved += layout.vec_step()) {
      if (layout.column(v) < width) {
        const int64_t c = start + layout.column(v);
        A dy[kN], xhat[kN], scale[kN];
        load_scale(p, c, scale);
        if constexpr (kHeld) {
          unpack<T, kN>(held_dy_[v], dy);
          unpack<T, kN>(held_saved_[v], xhat);
        } else {
          load_as(from_dy, 0, dy);
          load_as(from_saved, 0, xhat);
        }
        if (p.from_output) {
          A bias[kN];
          load_as(p.bias, c, bias);
#pragma unroll
          for (int i = 0; i < kN; ++i) xhat[i] = divide(xhat[i] - bias[i], scale[i]);
        } else {
#pragma unroll
          for (int i = 0; i < kN; ++i) xhat[i] = (xhat[i] - mean_) * rstd_;
        }
        f(v, dy, xhat, scale);
      }
    }
  }

  // dx and dresidual, given mean_C(g) and mean_C(g * xhat).
  __device__ __forceinline__ void store_dx(const LayerNormBwdParams<T, W>& p, const Layout& layout, int64_t r,
                                           int64_t start, int width, const A (&means)[2]) const {
    const int64_t offset = layout.offset(r, p.C, start);
    const T* dsum = p.dsum + layout.offset(r, p.dsum_stride, start);
    T *dx = p.dx + offset, *dresidual = p.dresidual + offset;
    uint32_t kept = 0;
    visit(p, layout, start, width, [&](int v, const A(&dy)[kN], A(&value)[kN], const A(&scale)[kN]) {
#pragma unroll
      for (int i = 0; i < kN; ++i) value[i] = rstd_ * (dy[i] * scale[i] - means[0] - value[i] * means[1]);
      if constexpr (Layout::kFused) {
        if (p.dsum != nullptr) {
          A more[kN];
          load_as(dsum, 0, more);
#pragma unroll
          for (int i = 0; i < kN; ++i) value[i] += more[i];
        }
        if (p.seed != nullptr) {
          constexpr int kMasked = kMaskedVecs<kN, kVecs>;
          if (p.dresidual != nullptr) store_as(dresidual, value);
          if (v % kMasked == 0) {
            kept = kept_by_dropout<kN, kMasked>(p, r, start + layout.column(v), layout.vec_step());
          }
          apply_dropout(kept >> v % kMasked * kN, p.dropout_scale, value);
        }
      }
      if (p.dx != nullptr) store_as(dx, value);
      dsum += layout.vec_step(), dx += layout.vec_step(), dresidual += layout.vec_step();
    });
  }

 private:
  const T *dy_, *saved_;
  A mean_, rstd_;
  Packed<T, kN> held_dy_[kHeld ? kVecs : 1], held_saved_[kHeld ? kVecs : 1];
};

// Columns between the slots in shared memory; one spare where a warp's threads are in as many slots, against conflicts.
template <typename Layout>
__host__ __device__ int partial_stride(const Tiling& t) {
  return t.chunk + (Layout::kFused ? 0 : 1);
}

// Sums `values` over the slots of the block, in order, into out[0 .. width).
template <int kN, int kVecs, typename Layout, typename A>
__device__ __forceinline__ void store_partial(const Tiling& t, const Layout& layout, int width,
                                              const A (&values)[kVecs][kN], A* out) {
  if (t.slots == 1) {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if (layout.column(v) < width) store_as(out + layout.column(v), values[v]);
    }
    return;
  }
  A* const shared = shared_array<A>();  // [slots, stride]
  const int stride = partial_stride<Layout>(t);
  sync_block();  // whoever still reads what was there
#pragma unroll
  for (int v = 0; v < kVecs; ++v) store_as(shared + layout.slot * stride + layout.column(v), values[v]);
  sync_block();
  for (int c = threadIdx.x; c < width; c += blockDim.x) {
    A sum = 0;
    for (int s = 0; s < t.slots; ++s) sum += shared[s * stride + c];
    out[c] = sum;
  }
}

// What a thread of layer_norm_bwd_kernel has room for.
template <typename T, int kN, int kVecs>
struct BwdPlan {
  static constexpr int kTileWords = 2 * kVecs * kWords<T, kN>;
  static constexpr int kSumWords = 2 * kVecs * kN * sizeof(acc_t<T>) / 4;
  static constexpr bool kAhead = 2 * kTileWords + kSumWords <= 72;  // load the next row while at work on this one
  static constexpr bool kHeld = kTileWords + kSumWords <= 64;       // keep the row in registers
  static constexpr int kThreads = kHeld ? kMaxThreads : kFewThreads;
};

// Partial sums of dweight and dbias for the chunk of columns blockIdx.x, over the rows of row block blockIdx.y. With
// kDx also dx; then the chunk holds the whole row.
template <typename T, typename W, int kN, int kVecs, template <typename, int, int> class Layout, bool kDx>
__global__ void __launch_bounds__(BwdPlan<T, kN, kVecs>::kThreads, 1)
    layer_norm_bwd_kernel(const __grid_constant__ LayerNormBwdParams<T, W> p, const __grid_constant__ Tiling t) {
  using A = acc_t<T>;
  using L = Layout<A, kN, kVecs>;
  using Plan = BwdPlan<T, kN, kVecs>;
  L layout(t, p.R, p.C, p.P);
  const int64_t start = int64_t(blockIdx.x) * t.chunk;
  const int columns = int(min(p.C - start, int64_t(t.chunk)));
  const int64_t stride = int64_t(gridDim.y) * t.slots;
  const A inverse = A(1) / A(p.C);
  A dweight[kVecs][kN] = {}, dbias[kVecs][kN] = {};

  using Tile = BwdTile<T, W, kN, kVecs, L, Plan::kHeld>;
  int64_t first = int64_t(blockIdx.y) * t.slots;
  const auto width = [&](int64_t first_row) { return first_row + layout.slot < p.R ? columns : 0; };
  const auto one_row = [&](Tile& tile, Tile& next) {
    const int64_t r = first + layout.slot;
    A sums[2] = {};
    tile.visit(p, layout, start, width(first), [&](int v, const A(&dy)[kN], const A(&xhat)[kN], const A(&scale)[kN]) {
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        dweight[v][i] += dy[i] * xhat[i];
        dbias[v][i] += dy[i];
        sums[0] += dy[i] * scale[i];
        sums[1] += dy[i] * scale[i] * xhat[i];
      }
    });
    if constexpr (Plan::kAhead) next.load(p, layout, r + stride, start, width(first + stride));
    if constexpr (kDx) {
      layout.sum(sums);
      sums[0] = p.rms ? A(0) : sums[0] * inverse;
      sums[1] *= inverse;
      tile.store_dx(p, layout, r, start, width(first), sums);
    }
    first += stride;
  };
  Tile tile, next;
  if constexpr (Plan::kAhead) {
    // Two tiles take turns, as copying one to the other costs its registers twice.
    tile.load(p, layout, first + layout.slot, start, width(first));
    while (first < p.R) {
      one_row(tile, next);
      if (first >= p.R) break;
      one_row(next, tile);
    }
  } else {
    while (first < p.R) {
      tile.load(p, layout, first + layout.slot, start, width(first));
      one_row(tile, next);
    }
  }
  A* const out = p.workspace + int64_t(blockIdx.y) * 2 * p.C + start;  // [G, 2, C]
  store_partial(t, layout, columns, dweight, out);
  store_partial(t, layout, columns, dbias, out + p.C);
}

// dx alone, for rows of any length.
template <typename T, typename W, int kN, int kVecs, template <typename, int, int> class Layout>
__global__ void __launch_bounds__(kMaxThreads, 1)
    layer_norm_bwd_dx_kernel(const __grid_constant__ LayerNormBwdParams<T, W> p, const __grid_constant__ Tiling t) {
  using A = acc_t<T>;
  using L = Layout<A, kN, kVecs>;
  L layout(t, p.R, p.C, p.P);
  for (int64_t first = int64_t(blockIdx.x) * t.slots; first < p.R; first += int64_t(gridDim.x) * t.slots) {
    const int64_t r = first + layout.slot;
    const auto width = [&](int64_t start) { return r < p.R ? int(min(p.C - start, int64_t(t.chunk))) : 0; };
    BwdTile<T, W, kN, kVecs, L, true> tile;
    A sums[2] = {};
    for (int64_t start = 0; start <= t.last; start += t.chunk) {
      tile.load(p, layout, r, start, width(start));
      tile.visit(p, layout, start, width(start), [&](int, const A(&dy)[kN], const A(&xhat)[kN], const A(&scale)[kN]) {
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          sums[0] += dy[i] * scale[i];
          sums[1] += dy[i] * scale[i] * xhat[i];
        }
      });
    }
    layout.sum(sums);
    sums[0] = p.rms ? A(0) : sums[0] / A(p.C);
    sums[1] /= A(p.C);
    for (int64_t start = t.last; start >= 0; start -= t.chunk) {
      if (start != t.last) tile.load(p, layout, r, start, width(start));
      tile.store_dx(p, layout, r, start, width(start), sums);
    }
  }
}

constexpr int kReduceParts = 16;

// dweight and dbias from the partial sums [G, 2, C]: a warp's threads take neighbouring columns, the warps of a block
// every kReduceParts-th row of them.
template <typename T, typename W>
__global__ void __launch_bounds__(kReduceParts* kWarpSize)
    layer_norm_bwd_reduce_kernel(const __grid_constant__ LayerNormBwdParams<T, W> p, int partials) {
  using A = acc_t<T>;
  using Sums = A[kReduceParts][kWarpSize];
  Sums& sums = shared_storage<Sums>();
  const int lane = threadIdx.x % kWarpSize, part = threadIdx.x / kWarpSize;
  const int64_t c = int64_t(blockIdx.x) * kWarpSize + lane;  // of 2 * C
  A sum = 0;
  if (c < 2 * p.C) {
#pragma unroll 4
    for (int g = part; g < partials; g += kReduceParts) sum += p.workspace[g * 2 * p.C + c];
  }
  sums[part][lane] = sum;
  sync_block();
  if (part > 0 || c >= 2 * p.C) return;
  for (int i = 1; i < kReduceParts; ++i) sum += sums[i][lane];
  W* const out = c < p.C ? p.dweight : p.dbias;
  if (out != nullptr) out[c < p.C ? c : c - p.C] = from_acc<W>(acc_t<W>(sum));
}

}  // namespace pyops
