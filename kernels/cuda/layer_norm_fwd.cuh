// Forward kernel. layer_norm.cu has the overview.
#pragma once

#include <cmath>

#include "../params/layer_norm.h"
#include "layer_norm_common.cuh"

namespace pyops {

// Count, mean and sum of squared deviations of the elements a thread has seen.
template <typename A>
struct Moments {
  A n = 0, mean = 0, m2 = 0;

  __device__ __forceinline__ void merge(A n_new, A mean_new, A m2_new) {
    if (n == 0) {
      n = n_new, mean = mean_new, m2 = m2_new;
    } else if (n_new > 0) {
      const A delta = mean_new - mean, part = n_new / (n + n_new);
      mean += delta * part;
      m2 += m2_new + delta * delta * n * part;
      n += n_new;
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
    constexpr int kMasked = kMaskedVecs<kN, kVecs>;
    const T* residual = p.residual + layout.offset(r, p.residual_stride, start);
    T* sum = p.sum + layout.offset(r, p.C, start);
    uint32_t kept = 0;
#pragma unroll
    for (int v = 0; v < kVecs; ++v, residual += layout.vec_step(), sum += layout.vec_step()) {
      if (v % kMasked == 0 && p.seed != nullptr) {
        kept = kept_by_dropout<kN, kMasked>(p, r, start + layout.column(v), layout.vec_step());
      }
      if (layout.column(v) < width) {
        acc_t<T> value[kN], other[kN];
        unpack<T, kN>(h[v], value);
        load_as(residual, 0, other);
        if (p.seed != nullptr) apply_dropout(kept >> v % kMasked * kN, p.dropout_scale, value);
#pragma unroll
        for (int i = 0; i < kN; ++i) value[i] += other[i];
        h[v] = pack<T>(value);
        store_packed(sum, h[v]);
      }
    }
  }
}

template <typename T, int kN, int kVecs, typename Layout, typename A>
__device__ __forceinline__ void add_moments(const Layout& layout, int width, bool rms, const Packed<T, kN> (&h)[kVecs],
                                            Moments<A>& moments) {
  A sum = 0, m2 = 0;
  int n = 0;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    A value[kN];
    unpack<T, kN>(h[v], value);
    n += layout.column(v) < width ? kN : 0;
#pragma unroll
    for (int i = 0; i < kN; ++i) sum += value[i];
  }
  const A mean = rms || n == 0 ? A(0) : sum / A(n);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (layout.column(v) < width) {
      A value[kN];
      unpack<T, kN>(h[v], value);
#pragma unroll
      for (int i = 0; i < kN; ++i) m2 += (value[i] - mean) * (value[i] - mean);
    }
  }
  moments.merge(A(n), mean, m2);
}

// Threads to a block, at most, and blocks to a multiprocessor, at least: few enough for the row to stay in registers.
template <typename T, int kN, int kVecs>
struct FwdPlan {
  static constexpr int kRowWords = kVecs * kWords<T, kN>;
  static constexpr int kThreads = kRowWords == 16 ? kFewThreads : kMaxThreads;
  static constexpr int kBlocks = kRowWords > 16 ? 1 : kRowWords == 16 ? 3 : 2;
};

template <typename T, typename W, int kN, int kVecs, template <typename, int, int, int> class Layout>
__global__ void __launch_bounds__(FwdPlan<T, kN, kVecs>::kThreads, FwdPlan<T, kN, kVecs>::kBlocks)
    layer_norm_fwd_kernel(const __grid_constant__ LayerNormFwdParams<T, W> p, const __grid_constant__ Tiling t) {
  using A = acc_t<T>;
  Layout<A, 1, kN, kVecs> layout(t, p.R, p.C, p.P);
  for (int64_t first = int64_t(blockIdx.x) * t.slots; first < p.R; first += int64_t(gridDim.x) * t.slots) {
    const int64_t r = first + layout.slot;
    const auto width = [&](int64_t start) { return r < p.R ? int(min(p.C - start, int64_t(t.chunk))) : 0; };
    Packed<T, kN> h[kVecs];

    // Statistics.
    Moments<A> own;
    for (int64_t start = 0; start <= t.last; start += t.chunk) {
      load_h<T, W, kN>(p, layout, r, start, width(start), h);
      add_moments<T, kN>(layout, width(start), p.rms, h, own);
    }
    A total[1] = {own.n * own.mean};
    if (!p.rms) layout.sum(total);
    const A mean = total[0] / A(p.C), shift = own.mean - mean;
    total[0] = own.m2 + own.n * shift * shift;
    layout.sum(total);
    const A rstd = A(1) / std::sqrt(total[0] / A(p.C) + p.eps);
    if (layout.lane == 0 && r < p.R) {
      if (p.mean != nullptr) p.mean[r] = mean;
      if (p.rstd != nullptr) p.rstd[r] = rstd;
    }

    // Output, from the last chunk, which is still in registers, to the first.
    for (int64_t start = t.last; start >= 0; start -= t.chunk) {
      const T* source = p.x + layout.offset(r, p.x_stride, start);
      if (Layout<A, 1, kN, kVecs>::kFused && p.residual != nullptr) source = p.sum + layout.offset(r, p.C, start);
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
          for (int i = 0; i < kN; ++i) value[i] = (value[i] - mean) * rstd * scale[i] + bias[i];
          store_as(y, value);
        }
      }
    }
  }
}

}  // namespace pyops
