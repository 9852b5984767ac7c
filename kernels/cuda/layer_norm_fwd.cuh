// Forward kernel. layer_norm.cu has the overview.
#pragma once

#include <cmath>

#include "../params/layer_norm.h"
#include "layer_norm_common.cuh"

namespace pyops {

// Threads to a block, at most, and blocks to a multiprocessor, at least: few enough for the row to stay in registers.
template <typename T, int kN, int kVecs>
struct FwdPlan {
  static constexpr bool kShort = kVecs * kWords<T, kN> <= 16;
  static constexpr int kThreads = kShort ? 320 : kMaxThreads;
  static constexpr int kBlocks = kShort ? 2 : 1;
  static constexpr int kAtOnce = kShort ? kVecs : 2;  // vectors of `residual` in flight
};

// Whether the rounding of the mean can show. 16-bit values, and results, are coarser than it.
template <typename T>
constexpr bool kCorrected = sizeof(T) > 2;

// Count of some elements, and sums of their deviations from a centre and of the squares of these.
template <typename A>
struct Moments {
  A n = 0, centre = 0, first = 0, second = 0;

  __device__ __forceinline__ void recentre(A to) {
    const A shift = centre - to;
    second += shift * (2 * first + n * shift);
    first += n * shift;
    centre = to;
  }

  __device__ __forceinline__ void add(Moments other) {
    if (n == 0) {
      *this = other;
    } else if (other.n > 0) {
      const A between = centre + (other.centre - centre) * (other.n / (n + other.n));
      recentre(between);
      other.recentre(between);
      n += other.n;
      first += other.first;
      second += other.second;
    }
  }
};

// The thread's vectors of h in one chunk of row r; writes them to `sum` where there is a residual.
template <typename T, typename W, int kN, int kVecs, typename Layout>
__device__ __forceinline__ void load_h(const LayerNormFwdParams<T, W>& p, const Layout& layout, int64_t r,
                                       int64_t start, int width, Packed<T, kN> (&h)[kVecs]) {
  const T* x = p.x + layout.offset(r, p.x_stride, start);
#pragma unroll
  for (int v = 0; v < kVecs; ++v, x += layout.vec_step()) {
    h[v] = {};
    if (layout.column(v) < width) h[v] = load_packed<kN>(x);
  }
  if constexpr (Layout::kFused) {
    if (p.residual == nullptr) return;
    constexpr int kAtOnce = FwdPlan<T, kN, kVecs>::kAtOnce;
    const T* residual = p.residual + layout.offset(r, p.residual_stride, start);
    T* sum = p.sum + layout.offset(r, p.C, start);
    Packed<T, kN> other[kAtOnce];
    uint32_t kept = 0;
#pragma unroll
    for (int v = 0; v < kVecs; ++v, sum += layout.vec_step()) {
      if (v % kAtOnce == 0) {
        if (p.seed != nullptr) {
          kept = kept_by_dropout<kN, kAtOnce>(p, r, start + layout.column(v), layout.vec_step());
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i, residual += layout.vec_step()) {
          if (layout.column(v + i) < width) other[i] = load_packed<kN>(residual);
        }
      }
      if (layout.column(v) < width) {
        acc_t<T> value[kN], added[kN];
        unpack<T, kN>(h[v], value);
        if (p.seed != nullptr) {
          apply_dropout(kept >> v % kAtOnce * kN, p.dropout_scale, value);
          unpack<T, kN>(pack<T>(value), value);  // rounded here too, like the operators apart
        }
        unpack<T, kN>(other[v % kAtOnce], added);
#pragma unroll
        for (int i = 0; i < kN; ++i) value[i] += added[i];
        h[v] = pack<T>(value);
        store_packed(sum, h[v]);
      }
    }
  }
}

// Of the thread's elements in one chunk, about their mean, or about 0 for RMSNorm.
template <typename T, int kN, int kVecs, typename Layout, typename A = acc_t<T>>
__device__ __forceinline__ Moments<A> moments(const Layout& layout, int width, bool rms,
                                              const Packed<T, kN> (&h)[kVecs]) {
  A sum = 0;
  int n = 0;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    A value[kN];
    unpack<T, kN>(h[v], value);
    n += layout.column(v) < width ? kN : 0;
#pragma unroll
    for (int i = 0; i < kN; ++i) sum += value[i];
  }
  Moments<A> found{.n = A(n), .centre = rms || n == 0 ? A(0) : sum / A(n)};
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (layout.column(v) < width) {
      A value[kN];
      unpack<T, kN>(h[v], value);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const A deviation = value[i] - found.centre;
        if constexpr (kCorrected<T>) found.first += deviation;
        found.second += deviation * deviation;
      }
    }
  }
  return found;
}

template <typename T, typename W, int kN, int kVecs, template <typename, int, int> class Layout>
__global__ void __launch_bounds__(FwdPlan<T, kN, kVecs>::kThreads, FwdPlan<T, kN, kVecs>::kBlocks)
    layer_norm_fwd_kernel(const __grid_constant__ LayerNormFwdParams<T, W> p, const __grid_constant__ Tiling t) {
  using A = acc_t<T>;
  using L = Layout<A, kN, kVecs>;
  L layout(t, p.R, p.C, p.P);
  for (int64_t first = int64_t(blockIdx.x) * t.slots; first < p.R; first += int64_t(gridDim.x) * t.slots) {
    const int64_t r = first + layout.slot;
    const auto width = [&](int64_t start) { return r < p.R ? int(min(p.C - start, int64_t(t.chunk))) : 0; };
    Packed<T, kN> h[kVecs];

    // Statistics.
    Moments<A> own;
    for (int64_t start = 0; start <= t.last; start += t.chunk) {
      load_h<T, W, kN>(p, layout, r, start, width(start), h);
      own.add(moments<T, kN>(layout, width(start), p.rms, h));
    }
    A mean = 0, correction = 0;
    if (!p.rms) {
      A sum[1] = {own.n * own.centre + own.first};
      layout.sum(sum);
      mean = sum[0] / A(p.C);
      own.recentre(mean);
    }
    A sums[2] = {own.second, own.first};
    layout.sum(sums);
    A variance = sums[0] / A(p.C);
    if (kCorrected<T> && !p.rms && variance < INFINITY) {
      correction = sums[1] / A(p.C);
      variance = max(variance - correction * correction, A(0));
    }
    const A rstd = A(1) / std::sqrt(variance + p.eps);
    if (layout.lane == 0 && r < p.R) {
      if (p.mean != nullptr) p.mean[r] = mean + correction;
      if (p.rstd != nullptr) p.rstd[r] = rstd;
    }

    // Output, from the last chunk, which is still in registers, to the first.
    for (int64_t start = t.last; start >= 0; start -= t.chunk) {
      const T* source = p.x + layout.offset(r, p.x_stride, start);
      if (L::kFused && p.residual != nullptr) source = p.sum + layout.offset(r, p.C, start);
      T* y = p.y + layout.offset(r, p.C, start);
#pragma unroll
      for (int v = 0; v < kVecs; ++v, source += layout.vec_step(), y += layout.vec_step()) {
        if (layout.column(v) < width(start)) {
          if (start != t.last) h[v] = load_packed<kN>(source);
          A value[kN], scale[kN], bias[kN];
          unpack<T, kN>(h[v], value);
          load_scale(p, start + layout.column(v), scale);
          load_as(p.bias, start + layout.column(v), bias);
#pragma unroll
          for (int i = 0; i < kN; ++i) value[i] = (value[i] - mean - correction) * rstd * scale[i] + bias[i];
          store_as(y, value);
        }
      }
    }
  }
}

}  // namespace pyops
