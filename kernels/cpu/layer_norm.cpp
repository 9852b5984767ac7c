// LayerNorm (Ba, Kiros, Hinton 2016) and RMSNorm (Zhang, Sennrich 2019), forward and backward; formulas, symbols and
// the layout of every tensor stand in params/layer_norm.h.
//
// Parallelisation: threads take contiguous shares of the rows (P == 1) or of the tiles of pixels (P > 1), one parallel
//   region per call. The split depends on the number of threads alone, and the partial sums of dweight and dbias are
//   added in thread order, so results repeat bitwise.
// Traffic: forward reads x and writes y (2 R C elements, 4 R C with a residual); backward reads dy and the saved tensor
//   and writes dx (3 R C). Each row passes through the cache up to three times: its later reads hit L1 (L2 when C is
//   large). Backward takes four rows at a time, so that the running dweight and dbias are loaded once per four rows.
// Numerics: sums in acc_t<T>; variance from centred values, corrected for the rounding of the mean (Chan, Golub,
//   LeVeque 1983), so a row of mean 2,000 and variance 1 keeps its digits; dropout and residual are rounded to T before
//   the statistics, because backward sees the rounded sum.
// Limits: none on R, C or P.
#include "layer_norm.h"

#include "parallel.h"
#include "philox.h"
#include "simd.h"

namespace pyops::PYOPS_ISA {
namespace {

template <typename A>
PYOPS_INLINE A sqrt_of(A a) {
  if constexpr (sizeof(A) == 8) {
    return __builtin_sqrt(a);
  } else {
    return __builtin_sqrtf(a);
  }
}

template <typename A>
PYOPS_INLINE A total(const Vec<A> (&sums)[4]) {
  return reduce_add<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// weight_offset + weight and bias as dense accumulation-type rows; a missing one is filled in.
template <typename A>
struct Affine {
  const A* weight;
  const A* bias;
};

template <typename A, typename W>
Affine<A> affine(const W* weight, const W* bias, A weight_offset, int64_t C, A* scratch) {
  A* w = scratch;
  A* b = scratch + C;
  if constexpr (sizeof(W) == sizeof(A)) {
    const bool as_is = weight != nullptr && weight_offset == 0;
    if (!as_is) for (int64_t c = 0; c < C; ++c) w[c] = weight ? weight_offset + weight[c] : A{1};
    if (!bias) for (int64_t c = 0; c < C; ++c) b[c] = 0;
    return {as_is ? weight : w, bias ? bias : b};
  } else {
    for_each_vector<A>(C, [&](int64_t c, auto lanes, int) {
      store(w + c, weight ? splat(weight_offset) + load(weight + c, lanes) : splat(A{1}), lanes);
      store(b + c, bias ? load(bias + c, lanes) : Vec<A>{}, lanes);
    });
    return {w, b};
  }
}

template <typename A>
struct Statistics {
  A mean;        // 0 for RMSNorm
  A correction;  // what rounding took from the mean: x - mean - correction is centred
  A rstd;
};

// Statistics of the row h, whose sum is known.
template <typename T, typename A = acc_t<T>>
PYOPS_INLINE Statistics<A> statistics(const T* h, A sum, int64_t C, A eps, bool rms) {
  const A mean = rms ? A{0} : sum / C;
  Vec<A> first[4]{}, second[4]{};
  for_each_vector<A>(C, [&](int64_t c, auto lanes, int slot) {
    const Vec<A> d = inside(load(h + c, lanes) - mean, lanes);
    first[slot] += d;
    second[slot] += d * d;
  });
  const A correction = rms ? A{0} : total<A>(first) / C;
  const A variance = total<A>(second) / C - correction * correction;
  return {mean, correction, A{1} / sqrt_of(variance + eps)};
}

template <typename T, typename A = acc_t<T>>
PYOPS_INLINE A row_sum(const T* h, int64_t C) {
  Vec<A> sums[4]{};
  for_each_vector<A>(C, [&](int64_t c, auto lanes, int slot) { sums[slot] += load(h + c, lanes); });
  return total<A>(sums);
}

// h = dropout(x) + residual, written to `sum`; returns the sum over the row of what was written.
template <typename T, typename A = acc_t<T>>
PYOPS_INLINE A add_row(const T* x, const T* residual, const uint32_t* keep, A scale, T* sum, int64_t C) {
  Vec<A> sums[4]{};
  for_each_vector<A>(C, [&](int64_t c, auto lanes, int slot) {
    Vec<A> v = load(x + c, lanes);
    if (keep != nullptr) v = rounded<T>(select(keep + c, v * scale));
    const Vec<A> h = rounded<T>(v + load(residual + c, lanes));
    store(sum + c, h, lanes);
    sums[slot] += inside(h, lanes);
  });
  return total<A>(sums);
}

template <bool kAffine, typename T, typename A = acc_t<T>>
PYOPS_INLINE void normalise_row(const T* h, T* y, const Statistics<A>& s, Affine<A> a, int64_t C) {
  const A shift = -s.correction * s.rstd;
  for_each_vector<A>(C, [&](int64_t c, auto lanes, int) {
    Vec<A> v = (load(h + c, lanes) - s.mean) * s.rstd + shift;
    if constexpr (kAffine) v = v * load(a.weight + c, lanes) + load(a.bias + c, lanes);
    store(y + c, v, lanes);
  });
}

template <bool kAffine, typename T, typename W, typename A = acc_t<T>>
void forward_rows(const LayerNormFwdParams<T, W>& p, Affine<A> a, Range range) {
  Scratch<uint32_t> keep(p.seed ? p.C + 4 * kLanes<uint32_t> : 0);
  for (int64_t r = range.begin; r < range.end; ++r) {
    const T* h = p.x + r * p.x_stride;
    A sum = 0;
    if (p.residual != nullptr) {
      if (p.seed != nullptr) dropout_row(keep.get(), p.seed, r, p.C, p.drop_threshold);
      T* out = p.sum + r * p.C;
      sum = add_row(h, p.residual + r * p.residual_stride, p.seed ? keep.get() : nullptr, p.dropout_scale, out, p.C);
      h = out;
    } else if (!p.rms) {
      sum = row_sum(h, p.C);
    }
    const Statistics<A> s = statistics(h, sum, p.C, p.eps, p.rms);
    normalise_row<kAffine>(h, p.y + r * p.C, s, a, p.C);
    if (p.mean != nullptr) p.mean[r] = s.mean + s.correction;
    if (p.rstd != nullptr) p.rstd[r] = s.rstd;
  }
}

// ---- channels first: NV vectors of neighbouring pixels, all C ----

template <int NV, bool kAffine, typename T, typename W, typename Lanes, typename A = acc_t<T>>
void forward_tile(const LayerNormFwdParams<T, W>& p, Affine<A> a, int64_t image, int64_t pixel, Lanes lanes) {
  constexpr int L = kLanes<A>;
  const T* x = p.x + image * p.C * p.P + pixel;
  T* y = p.y + image * p.C * p.P + pixel;
  Vec<A> mean[NV]{}, first[NV]{}, second[NV]{}, rstd[NV];
  if (!p.rms) {
    for (int64_t c = 0; c < p.C; ++c) {
      for (int v = 0; v < NV; ++v) mean[v] += load(x + c * p.P + v * L, lanes);
    }
    for (int v = 0; v < NV; ++v) mean[v] /= splat<A>(p.C);
  }
  for (int64_t c = 0; c < p.C; ++c) {
    for (int v = 0; v < NV; ++v) {
      const Vec<A> d = load(x + c * p.P + v * L, lanes) - mean[v];
      first[v] += d;
      second[v] += d * d;
    }
  }
  for (int v = 0; v < NV; ++v) {
    first[v] = p.rms ? Vec<A>{} : first[v] / splat<A>(p.C);
    const Vec<A> variance = second[v] / splat<A>(p.C) - first[v] * first[v] + p.eps;
    for (int i = 0; i < L; ++i) rstd[v][i] = A{1} / sqrt_of<A>(variance[i]);
  }
  for (int64_t c = 0; c < p.C; ++c) {
    for (int v = 0; v < NV; ++v) {
      Vec<A> out = ((load(x + c * p.P + v * L, lanes) - mean[v]) - first[v]) * rstd[v];
      if constexpr (kAffine) out = out * a.weight[c] + a.bias[c];
      store(y + c * p.P + v * L, out, lanes);
    }
  }
  for (int v = 0; v < NV; ++v) {
    const int64_t row = image * p.P + pixel + v * L;
    if (p.mean != nullptr) store(p.mean + row, mean[v] + first[v], lanes);
    if (p.rstd != nullptr) store(p.rstd + row, rstd[v], lanes);
  }
}

constexpr int kTileVectors = 4;
template <int N>
struct Tile {
  static constexpr int count = N;
};

// Calls tile(vectors, image, pixel, lanes) for the tiles of a share of the images' pixel blocks.
template <typename A, typename F>
void for_each_tile(int64_t P, Range blocks, F&& tile) {
  constexpr int L = kLanes<A>;
  const int64_t per_image = (P + kTileVectors * L - 1) / (kTileVectors * L);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t image = block / per_image;
    int64_t pixel = block % per_image * kTileVectors * L;
    if (pixel + kTileVectors * L <= P) {
      tile(Tile<kTileVectors>{}, image, pixel, Full{});
      continue;
    }
    for (; pixel + L <= P; pixel += L) tile(Tile<1>{}, image, pixel, Full{});
    if (pixel < P) tile(Tile<1>{}, image, pixel, Partial{static_cast<int>(P - pixel)});
  }
}

template <typename A>
int64_t tile_blocks(int64_t R, int64_t P) {
  return R / P * ((P + kTileVectors * kLanes<A> - 1) / (kTileVectors * kLanes<A>));
}

template <bool kAffine, typename T, typename W, typename A = acc_t<T>>
void forward_share(const LayerNormFwdParams<T, W>& p, Affine<A> a, int index, int count) {
  if (p.P == 1) return forward_rows<kAffine>(p, a, share(p.R, index, count));
  for_each_tile<A>(p.P, share(tile_blocks<A>(p.R, p.P), index, count),
                   [&](auto vectors, int64_t image, int64_t pixel, auto lanes) {
                     forward_tile<vectors.count, kAffine>(p, a, image, pixel, lanes);
                   });
}

// ---- backward ----

// xhat from what forward saved.
template <bool kFromOutput, typename A>
PYOPS_INLINE Vec<A> normalised(Vec<A> saved, Vec<A> mean, Vec<A> rstd, Vec<A> weight, Vec<A> bias) {
  if constexpr (kFromOutput) {
    return (saved - bias) / weight;
  } else {
    return (saved - mean) * rstd;
  }
}

// kRows rows at once. dweight and dbias run along in A.
template <int kRows, bool kFromOutput, bool kParamGrads, typename T, typename W, typename A = acc_t<T>>
PYOPS_INLINE void backward_rows(const LayerNormBwdParams<T, W>& p, Affine<A> a, int64_t r, A* dweight, A* dbias,
                                uint32_t* keep) {
  const T *dy[kRows], *saved[kRows];
  A mean[kRows], rstd[kRows], mean_g[kRows], mean_gx[kRows];
  Vec<A> sum_g[kRows]{}, sum_gx[kRows]{};
  for (int i = 0; i < kRows; ++i) {
    dy[i] = p.dy + (r + i) * p.dy_stride;
    saved[i] = p.saved + (r + i) * p.saved_stride;
    mean[i] = p.mean != nullptr ? p.mean[r + i] : A{0};
    rstd[i] = p.rstd[r + i];
  }
  const auto accumulate = [&](int64_t c, auto lanes) {
    const Vec<A> w = load(a.weight + c, lanes), b = load(a.bias + c, lanes);
    Vec<A> dw{}, db{};
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> d = load(dy[i] + c, lanes);
      const Vec<A> xhat = inside(
          normalised<kFromOutput, A>(load(saved[i] + c, lanes), splat(mean[i]), splat(rstd[i]), w, b), lanes);
      const Vec<A> g = d * w;
      sum_g[i] += g;
      sum_gx[i] += g * xhat;
      dw += d * xhat;
      db += d;
    }
    if constexpr (kParamGrads) {
      store(dweight + c, load(dweight + c, lanes) + dw, lanes);
      store(dbias + c, load(dbias + c, lanes) + db, lanes);
    }
  };
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + L <= p.C; c += L) accumulate(c, Full{});
  if (c < p.C) accumulate(c, Partial{static_cast<int>(p.C - c)});

  for (int i = 0; i < kRows; ++i) {
    mean_g[i] = p.rms ? A{0} : reduce_add<A>(sum_g[i]) / p.C;
    mean_gx[i] = reduce_add<A>(sum_gx[i]) / p.C;
  }
  for (int i = 0; i < kRows && (p.dx != nullptr || p.dresidual != nullptr); ++i) {
    const T* dsum = p.dsum != nullptr ? p.dsum + (r + i) * p.dsum_stride : nullptr;
    T* dx = p.dx != nullptr ? p.dx + (r + i) * p.C : nullptr;
    T* dresidual = p.dresidual != nullptr ? p.dresidual + (r + i) * p.C : nullptr;
    const bool drop = p.seed != nullptr;
    if (drop && dx != nullptr) dropout_row(keep, p.seed, r + i, p.C, p.drop_threshold);
    for_each_vector<A>(p.C, [&](int64_t c, auto lanes, int) {
      const Vec<A> w = load(a.weight + c, lanes), b = load(a.bias + c, lanes);
      const Vec<A> xhat =
          normalised<kFromOutput, A>(load(saved[i] + c, lanes), splat(mean[i]), splat(rstd[i]), w, b);
      Vec<A> dh = (load(dy[i] + c, lanes) * w - mean_g[i] - xhat * mean_gx[i]) * rstd[i];
      if (dsum != nullptr) dh += load(dsum + c, lanes);
      if (dresidual != nullptr) store(dresidual + c, dh, lanes);
      if (dx != nullptr) store(dx + c, drop ? select(keep + c, dh * p.dropout_scale) : dh, lanes);
    });
  }
}

constexpr int kBlockRows = 4;

template <bool kFromOutput, bool kParamGrads, typename T, typename W, typename A = acc_t<T>>
void backward_row_share(const LayerNormBwdParams<T, W>& p, Affine<A> a, Range range, A* dweight, A* dbias) {
  Scratch<uint32_t> keep(p.seed ? p.C + 4 * kLanes<uint32_t> : 0);
  int64_t r = range.begin;
  for (; r + kBlockRows <= range.end; r += kBlockRows) {
    backward_rows<kBlockRows, kFromOutput, kParamGrads>(p, a, r, dweight, dbias, keep.get());
  }
  for (; r < range.end; ++r) backward_rows<1, kFromOutput, kParamGrads>(p, a, r, dweight, dbias, keep.get());
}

// dweight and dbias are kept as vectors over the pixel lanes, [C] of them each, and folded at the end.
template <int NV, bool kFromOutput, bool kParamGrads, typename T, typename W, typename Lanes, typename A = acc_t<T>>
void backward_tile(const LayerNormBwdParams<T, W>& p, Affine<A> a, int64_t image, int64_t pixel, Lanes lanes,
                   Vec<A>* dweight, Vec<A>* dbias) {
  constexpr int L = kLanes<A>;
  const int64_t offset = image * p.C * p.P + pixel, row = image * p.P + pixel;
  Vec<A> mean[NV]{}, rstd[NV], sum_g[NV]{}, sum_gx[NV]{};
  for (int v = 0; v < NV; ++v) {
    if (p.mean != nullptr) mean[v] = load(p.mean + row + v * L, lanes);
    rstd[v] = load(p.rstd + row + v * L, lanes);
  }
  for (int64_t c = 0; c < p.C; ++c) {
    const Vec<A> w = splat(a.weight[c]), b = splat(a.bias[c]);
    Vec<A> dw{}, db{};
    for (int v = 0; v < NV; ++v) {
      const int64_t at = offset + c * p.P + v * L;
      const Vec<A> d = load(p.dy + at, lanes);
      const Vec<A> xhat =
          inside(normalised<kFromOutput, A>(load(p.saved + at, lanes), mean[v], rstd[v], w, b), lanes);
      const Vec<A> g = d * w;
      sum_g[v] += g;
      sum_gx[v] += g * xhat;
      dw += d * xhat;
      db += d;
    }
    if constexpr (kParamGrads) {
      dweight[c] += dw;
      dbias[c] += db;
    }
  }
  if (p.dx == nullptr) return;
  for (int v = 0; v < NV; ++v) {
    sum_g[v] = p.rms ? Vec<A>{} : sum_g[v] / splat<A>(p.C);
    sum_gx[v] /= splat<A>(p.C);
  }
  for (int64_t c = 0; c < p.C; ++c) {
    const Vec<A> w = splat(a.weight[c]), b = splat(a.bias[c]);
    for (int v = 0; v < NV; ++v) {
      const int64_t at = offset + c * p.P + v * L;
      const Vec<A> xhat = normalised<kFromOutput, A>(load(p.saved + at, lanes), mean[v], rstd[v], w, b);
      store(p.dx + at, (load(p.dy + at, lanes) * w - sum_g[v] - xhat * sum_gx[v]) * rstd[v], lanes);
    }
  }
}

template <bool kFromOutput, bool kParamGrads, typename T, typename W, typename A = acc_t<T>>
void backward_tile_share(const LayerNormBwdParams<T, W>& p, Affine<A> a, Range blocks, A* dweight, A* dbias) {
  const int64_t vectors = kParamGrads ? p.C : 0;
  Scratch<Vec<A>> sums(2 * vectors);
  for (int64_t i = 0; i < 2 * vectors; ++i) sums.get()[i] = Vec<A>{};
  for_each_tile<A>(p.P, blocks, [&](auto tile, int64_t image, int64_t pixel, auto lanes) {
    backward_tile<tile.count, kFromOutput, kParamGrads>(p, a, image, pixel, lanes, sums.get(), sums.get() + vectors);
  });
  for (int64_t c = 0; c < vectors; ++c) {
    dweight[c] = reduce_add<A>(sums.get()[c]);
    dbias[c] = reduce_add<A>(sums.get()[vectors + c]);
  }
}

template <bool kFromOutput, bool kParamGrads, typename T, typename W, typename A = acc_t<T>>
void backward_share(const LayerNormBwdParams<T, W>& p, Affine<A> a, int index, int count) {
  A* dweight = kParamGrads ? p.workspace + index * 2 * p.C : nullptr;
  A* dbias = kParamGrads ? dweight + p.C : nullptr;
  if (p.P > 1) {
    backward_tile_share<kFromOutput, kParamGrads>(p, a, share(tile_blocks<A>(p.R, p.P), index, count), dweight, dbias);
    return;
  }
  for (int64_t i = 0; kParamGrads && i < 2 * p.C; ++i) dweight[i] = 0;
  backward_row_share<kFromOutput, kParamGrads>(p, a, share(p.R, index, count), dweight, dbias);
}

// dweight[c] = sum over the threads' partial sums, in thread order, for this thread's share of the columns.
template <typename T, typename W>
void reduce_params(const LayerNormBwdParams<T, W>& p, int index, int count) {
  using A = acc_t<T>;
  const Range columns = share(p.C, index, count);
  for (int64_t c = columns.begin; c < columns.end; ++c) {
    A dweight = 0, dbias = 0;
    for (int t = 0; t < count; ++t) {
      dweight += p.workspace[t * 2 * p.C + c];
      dbias += p.workspace[t * 2 * p.C + p.C + c];
    }
    if (p.dweight != nullptr) p.dweight[c] = from_acc<W>(dweight);
    if (p.dbias != nullptr) p.dbias[c] = from_acc<W>(dbias);
  }
}

template <bool kFromOutput, bool kParamGrads, typename T, typename W, typename A = acc_t<T>>
void backward(const LayerNormBwdParams<T, W>& p, Affine<A> a) {
  const int64_t tasks = p.P > 1 ? tile_blocks<A>(p.R, p.P) : p.R;
  const int threads = useful_threads(p.R * p.C, tasks, p.num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int index = omp_get_thread_num(), count = omp_get_num_threads();
    backward_share<kFromOutput, kParamGrads>(p, a, index, count);
    if constexpr (kParamGrads) {
#pragma omp barrier
      reduce_params(p, index, count);
    }
  }
}

}  // namespace

template <typename T, typename W>
void layer_norm_fwd_cpu(const LayerNormFwdParams<T, W>& params) {
  using A = acc_t<T>;
  const bool has_affine = params.weight != nullptr || params.bias != nullptr;
  Scratch<A> scratch(has_affine ? 2 * params.C : 0);
  Affine<A> a{};
  if (has_affine) a = affine<A>(params.weight, params.bias, params.weight_offset, params.C, scratch.get());
  const int64_t tasks = params.P > 1 ? tile_blocks<A>(params.R, params.P) : params.R;
  const int threads = useful_threads(params.R * params.C, tasks, params.num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int index = omp_get_thread_num(), count = omp_get_num_threads();
    if (has_affine) {
      forward_share<true>(params, a, index, count);
    } else {
      forward_share<false>(params, a, index, count);
    }
  }
}

template <typename T, typename W>
void layer_norm_bwd_cpu(const LayerNormBwdParams<T, W>& params) {
  using A = acc_t<T>;
  Scratch<A> scratch(2 * params.C);
  const Affine<A> a = affine<A>(params.weight, params.bias, params.weight_offset, params.C, scratch.get());
  const bool param_grads = params.dweight != nullptr || params.dbias != nullptr;
  if (params.from_output) {
    return param_grads ? backward<true, true>(params, a) : backward<true, false>(params, a);
  }
  return param_grads ? backward<false, true>(params, a) : backward<false, false>(params, a);
}

int64_t layer_norm_bwd_workspace_cpu(int64_t, int64_t C, int64_t, int num_threads) {
  return (num_threads < 1 ? 1 : num_threads) * 2 * C;
}

#define PYOPS_INSTANTIATE(T, W)                                          \
  template void layer_norm_fwd_cpu<T, W>(const LayerNormFwdParams<T, W>&); \
  template void layer_norm_bwd_cpu<T, W>(const LayerNormBwdParams<T, W>&);
PYOPS_INSTANTIATE(double, double)
PYOPS_INSTANTIATE(float, float)
PYOPS_INSTANTIATE(bf16, bf16)
PYOPS_INSTANTIATE(bf16, float)
PYOPS_INSTANTIATE(f16, f16)
PYOPS_INSTANTIATE(f16, float)

}  // namespace pyops::PYOPS_ISA
