// LayerNorm (Ba, Kiros, Hinton 2016) and RMSNorm (Zhang, Sennrich 2019), forward and backward; formulas, symbols and
// the layout of every tensor stand in params/layer_norm.h.
//
// Parallelisation: threads take contiguous shares of the rows (P == 1) or of the tiles of pixels (P > 1), one parallel
//   region per call. The split depends on the number of threads alone, and the partial sums of dweight and dbias are
//   added in thread order, so results repeat bitwise.
// Traffic: forward reads x and writes y (2 R C elements, 4 R C with a residual); backward reads dy and the saved tensor
//   and writes dx (3 R C). Each row passes through the cache up to three times: its later reads hit L1 (L2 when C is
//   large). Forward asks for the next row while it writes one; backward takes four rows at a time, so that the running
//   dweight and dbias are loaded once per four rows. Outputs that outgrow the cache are streamed past it (parallel.h).
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

// weight_offset + weight and bias in the accumulation type and in T's order, up to whole pairs.
template <typename A>
struct Affine {
  const A* weight;
  const A* bias;
};

// Parameters as a pair in the order of T.
template <typename T, typename W, typename Lanes, typename A = acc_t<T>>
PYOPS_INLINE Pair<A> load_params(const W* p, Lanes lanes) {
  Pair<A> v = load_pair(p, lanes);
  if constexpr (kSplitsEvenOdd<T> && !kSplitsEvenOdd<W>) to_order<T>(v.lo, v.hi);
  if constexpr (kSplitsEvenOdd<W> && !kSplitsEvenOdd<T>) to_columns<W>(v.lo, v.hi);
  return v;
}

// T: whose order; the accumulation type itself for columns as they come (P > 1).
template <typename T, typename W, typename A = acc_t<T>>
Affine<A> affine(const W* weight, const W* bias, A weight_offset, int64_t C, A* scratch) {
  A* w = scratch;
  A* b = scratch + padded<A>(C);
  for_each_pair<A>(C, [&](int64_t c, auto lanes, int) PYOPS_ALWAYS_INLINE {
    Pair<A> v{splat(A{1}), splat(A{1})};
    if (weight != nullptr) {
      v = load_params<T>(weight + c, lanes);
      v = {v.lo + weight_offset, v.hi + weight_offset};
    }
    store_pair(w + c, v, Full{});
    store_pair(b + c, bias != nullptr ? load_params<T>(bias + c, lanes) : Pair<A>{}, Full{});
  });
  return {w, b};
}

// Whether the parameters serve as they lie. A bias that is not read may be missing.
template <typename T, typename Params, typename A = acc_t<T>>
bool affine_in_place(const Params& p, bool reads_bias) {
  const bool in_order = !kSplitsEvenOdd<T> || p.P > 1;
  return sizeof(*p.weight) == sizeof(A) && in_order && p.C % (2 * kLanes<A>) == 0 && p.weight != nullptr &&
         p.weight_offset == 0 && (p.bias != nullptr || !reads_bias);
}

// `scratch` has 2 padded(C) elements, or none where affine_in_place. A missing parameter is filled in.
template <typename T, typename Params, typename A = acc_t<T>>
Affine<A> affine_of(const Params& p, bool reads_bias, A* scratch) {
  if constexpr (sizeof(*p.weight) == sizeof(A)) {
    if (affine_in_place<T>(p, reads_bias)) return {p.weight, p.bias};
  }
  return p.P > 1 ? affine<A>(p.weight, p.bias, p.weight_offset, p.C, scratch)
                 : affine<T>(p.weight, p.bias, p.weight_offset, p.C, scratch);
}

template <typename A>
struct Statistics {
  A mean;        // 0 for RMSNorm
  A correction;  // what rounding took from the mean: x - mean - correction is centred
  A rstd;
};

// From the sums of the centred values and of their squares.
template <typename A>
PYOPS_INLINE Statistics<A> statistics_of(A mean, Vec<A> first, Vec<A> second, int64_t C, A eps, bool rms) {
  A sum, square;
  reduce_add<A>(first, second, sum, square);
  const A correction = rms ? A{0} : sum / C;
  square /= C;
  const A variance = square < __builtin_inf() ? square - correction * correction : square;
  return {mean, correction, A{1} / sqrt_of(variance + eps)};
}

// Sums of kRows rows; a single row takes two accumulators in turn, several rows one each.
template <int kRows, typename A>
struct RowSums {
  static constexpr int kSlots = kRows == 1 ? 2 : 1;
  Pair<A> sums[kRows][kSlots];

  PYOPS_INLINE void add(int i, int slot, Pair<A> v) {
    sums[i][slot % kSlots].lo += v.lo;
    sums[i][slot % kSlots].hi += v.hi;
  }
  PYOPS_INLINE void add_squares(int i, int slot, Pair<A> v) {
    sums[i][slot % kSlots].lo += v.lo * v.lo;
    sums[i][slot % kSlots].hi += v.hi * v.hi;
  }
  PYOPS_INLINE Vec<A> total(int i) const {
    if constexpr (kSlots == 1) return sums[i][0].lo + sums[i][0].hi;
    return (sums[i][0].lo + sums[i][0].hi) + (sums[i][kSlots - 1].lo + sums[i][kSlots - 1].hi);
  }
};

template <int kRows, typename T, typename A = acc_t<T>>
PYOPS_INLINE void row_sums(const T* const (&h)[kRows], int64_t C, A (&out)[kRows]) {
  RowSums<kRows, A> sums{};
  for_each_pair<A>(C, [&](int64_t c, auto lanes, int slot) PYOPS_ALWAYS_INLINE {
    for (int i = 0; i < kRows; ++i) sums.add(i, slot, load_pair(h[i] + c, lanes));
  });
  for (int i = 0; i < kRows; ++i) out[i] = reduce_add<A>(sums.total(i));
}

// Statistics of rows whose sums are known.
template <int kRows, typename T, typename A = acc_t<T>>
PYOPS_INLINE void statistics(const T* const (&h)[kRows], const A (&sum)[kRows], int64_t C, A eps, bool rms,
                             Statistics<A> (&out)[kRows]) {
  RowSums<kRows, A> first{}, second{};
  A mean[kRows];
  for (int i = 0; i < kRows; ++i) mean[i] = rms ? A{0} : sum[i] / C;
  for_each_pair<A>(C, [&](int64_t c, auto lanes, int slot) PYOPS_ALWAYS_INLINE {
    for (int i = 0; i < kRows; ++i) {
      const Pair<A> v = load_pair(h[i] + c, lanes);
      const Pair<A> d = inside_pair<T>({v.lo - mean[i], v.hi - mean[i]}, lanes);
      // 16-bit values are coarser than the rounding of the mean: they need no correction.
      if constexpr (sizeof(T) > 2) first.add(i, slot, d);
      second.add_squares(i, slot, d);
    }
  });
  for (int i = 0; i < kRows; ++i) out[i] = statistics_of(mean[i], first.total(i), second.total(i), C, eps, rms);
}

// h = dropout(x) + residual, written to `sum`.
template <typename T, typename A = acc_t<T>>
__attribute__((noinline)) void add_row(const T* x, const T* residual, const uint32_t* keep, A scale, T* sum,
                                       int64_t C) {
  for_each_pair<A>(C, [&](int64_t c, auto lanes, int) PYOPS_ALWAYS_INLINE {
    Pair<A> v = load_pair(x + c, lanes);
    if (keep != nullptr) v = rounded_pair<T>(select<T>(keep + c, {v.lo * scale, v.hi * scale}));
    const Pair<A> r = load_pair(residual + c, lanes);
    store_pair(sum + c, {v.lo + r.lo, v.hi + r.hi}, lanes);
  });
}

template <bool kAffine, bool kStream, typename T, typename A = acc_t<T>>
__attribute__((noinline)) void normalise_row(const T* h, T* y, const Statistics<A>& s, Affine<A> a, int64_t C,
                                             const T* next) {
  const A shift = -s.correction * s.rstd;
  for_each_pair<A>(C, [&](int64_t c, auto lanes, int) PYOPS_ALWAYS_INLINE {
    prefetch_pair(next + c);
    Pair<A> v = load_pair(h + c, lanes);
    v = {(v.lo - s.mean) * s.rstd + shift, (v.hi - s.mean) * s.rstd + shift};
    if constexpr (kAffine) {
      const Pair<A> w = load_pair(a.weight + c, Full{}), b = load_pair(a.bias + c, Full{});
      v = {v.lo * w.lo + b.lo, v.hi * w.hi + b.hi};
    }
    put_pair<kStream>(y + c, v, lanes);
  });
}

// The row of sum that h = dropout(x) + residual was written to.
template <typename T, typename W, typename A = acc_t<T>>
PYOPS_INLINE const T* add_residual(const LayerNormFwdParams<T, W>& p, int64_t r, uint32_t* keep) {
  if (p.seed != nullptr) dropout_row(keep, p.seed, r, p.C, p.drop_threshold);
  T* out = p.sum + r * p.C;
  add_row(p.x + r * p.x_stride, p.residual + r * p.residual_stride, p.seed ? keep : nullptr, p.dropout_scale, out, p.C);
  return out;
}

template <int kRows, bool kAffine, typename T, typename W, typename A = acc_t<T>>
PYOPS_INLINE void forward_rows(const LayerNormFwdParams<T, W>& p, Affine<A> a, int64_t r, uint32_t* keep, bool stream) {
  const T* h[kRows];
  A sum[kRows]{};
  for (int i = 0; i < kRows; ++i) {
    h[i] = p.residual != nullptr ? add_residual(p, r + i, keep) : p.x + (r + i) * p.x_stride;
  }
  if (!p.rms) row_sums(h, p.C, sum);
  Statistics<A> s[kRows];
  statistics(h, sum, p.C, p.eps, p.rms, s);
  const auto normalise = stream ? normalise_row<kAffine, true, T> : normalise_row<kAffine, false, T>;
  for (int i = 0; i < kRows; ++i) {
    if (p.y != nullptr) normalise(h[i], p.y + (r + i) * p.C, s[i], a, p.C, p.x + (r + kRows + i) * p.x_stride);
    if (p.mean != nullptr) p.mean[r + i] = s[i].mean + s[i].correction;
    if (p.rstd != nullptr) p.rstd[r + i] = s[i].rstd;
  }
}

// 16-bit rows are bound by arithmetic, and the sums of several rows hide each other's latency; longer elements are
// bound by memory, which is read best in one stream.
template <typename T>
constexpr int kForwardRows = sizeof(T) == 2 ? 4 : 1;

// Calls f(Count<n>{}) and returns true when a row of C elements is n whole pairs, n at most kMost.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <typename A, int kMost, typename F>
PYOPS_INLINE bool with_whole_pairs(int64_t C, F&& f) {
  if constexpr (kMost > 0) {
    if (C != kMost * 2 * kLanes<A>) return with_whole_pairs<A, kMost - 1>(C, f);
    f(Count<kMost>{});
    return true;
  }
  return false;
}

// Rows of kPairs whole pairs stay in registers.
template <int kPairs, bool kAffine, typename T, typename W, typename A = acc_t<T>>
__attribute__((noinline)) void forward_short(const LayerNormFwdParams<T, W>& p, Affine<A> a, Range range,
                                             uint32_t* keep) {
  constexpr int step = 2 * kLanes<A>;
  for (int64_t r = range.begin; r < range.end; ++r) {
    const T* h = p.residual != nullptr ? add_residual(p, r, keep) : p.x + r * p.x_stride;
    Pair<A> v[kPairs];
    Vec<A> sum{}, first{}, second{};
    for (int i = 0; i < kPairs; ++i) {
      v[i] = load_pair(h + i * step, Full{});
      sum += v[i].lo + v[i].hi;
    }
    const A mean = p.rms ? A{0} : reduce_add<A>(sum) / p.C;
    for (int i = 0; i < kPairs; ++i) {
      v[i] = {v[i].lo - mean, v[i].hi - mean};
      first += v[i].lo + v[i].hi;
      second += v[i].lo * v[i].lo;
      second += v[i].hi * v[i].hi;
    }
    const Statistics<A> s = statistics_of(mean, first, second, p.C, p.eps, p.rms);
    const A shift = -s.correction * s.rstd;
    for (int i = 0; p.y != nullptr && i < kPairs; ++i) {
      v[i] = {v[i].lo * s.rstd + shift, v[i].hi * s.rstd + shift};
      if constexpr (kAffine) {
        const Pair<A> w = load_pair(a.weight + i * step, Full{}), b = load_pair(a.bias + i * step, Full{});
        v[i] = {v[i].lo * w.lo + b.lo, v[i].hi * w.hi + b.hi};
      }
      store_pair(p.y + r * p.C + i * step, v[i], Full{});
    }
    if (p.mean != nullptr) p.mean[r] = s.mean + s.correction;
    if (p.rstd != nullptr) p.rstd[r] = s.rstd;
  }
}

template <bool kAffine, typename T, typename W, typename A = acc_t<T>>
void forward_row_share(const LayerNormFwdParams<T, W>& p, Affine<A> a, Range range, bool stream) {
  Scratch<uint32_t> keep(p.seed ? padded<float>(p.C) + 2 * kLanes<uint32_t> : 0);
  if constexpr (sizeof(T) > 2) {
    const auto in_registers = [&](auto pairs) { forward_short<pairs.value, kAffine>(p, a, range, keep.get()); };
    if (!stream && with_whole_pairs<A, 4>(p.C, in_registers)) return;
  }
  int64_t r = range.begin;
  for (; r + kForwardRows<T> <= range.end; r += kForwardRows<T>) {
    forward_rows<kForwardRows<T>, kAffine>(p, a, r, keep.get(), stream);
  }
  if constexpr (kForwardRows<T> > 1) {
    for (; r < range.end; ++r) forward_rows<1, kAffine>(p, a, r, keep.get(), stream);
  }
  if (stream) end_stream();
}

// ---- channels first: NV vectors of neighbouring pixels, all C ----

// Sums over the channels are formed in blocks, whose sums are then added: the rounding error grows with C / 32 + 32.
template <typename F>
PYOPS_INLINE void for_each_channel_block(int64_t C, F&& f) {
  for (int64_t begin = 0; begin < C; begin += 32) f(begin, begin + 32 < C ? begin + 32 : C);
}

template <int NV, typename T, typename Lanes, typename A = acc_t<T>>
PYOPS_INLINE void tile_means(const T* x, int64_t C, int64_t P, Lanes lanes, Vec<A> (&mean)[NV]) {
  for_each_channel_block(C, [&](int64_t begin, int64_t end) {
    Vec<A> sum[NV]{};
    for (int64_t c = begin; c < end; ++c) {
      for (int v = 0; v < NV; ++v) sum[v] += load(x + c * P + v * kLanes<A>, lanes);
    }
    for (int v = 0; v < NV; ++v) mean[v] += sum[v];
  });
  for (int v = 0; v < NV; ++v) mean[v] /= splat<A>(C);
}

template <int NV, bool kAffine, typename T, typename W, typename Lanes, typename A = acc_t<T>>
void forward_tile(const LayerNormFwdParams<T, W>& p, Affine<A> a, int64_t image, int64_t pixel, Lanes lanes) {
  constexpr int L = kLanes<A>;
  const T* x = p.x + image * p.C * p.P + pixel;
  T* y = p.y != nullptr ? p.y + image * p.C * p.P + pixel : nullptr;
  Vec<A> mean[NV]{}, first[NV]{}, second[NV]{}, rstd[NV];
  if (!p.rms) tile_means(x, p.C, p.P, lanes, mean);
  for_each_channel_block(p.C, [&](int64_t begin, int64_t end) {
    Vec<A> sum[NV]{}, square[NV]{};
    for (int64_t c = begin; c < end; ++c) {
      for (int v = 0; v < NV; ++v) {
        const Vec<A> d = load(x + c * p.P + v * L, lanes) - mean[v];
        sum[v] += d;
        square[v] += d * d;
      }
    }
    for (int v = 0; v < NV; ++v) {
      first[v] += sum[v];
      second[v] += square[v];
    }
  });
  for (int v = 0; v < NV; ++v) {
    first[v] = p.rms ? Vec<A>{} : first[v] / splat<A>(p.C);
    const Vec<A> square = second[v] / splat<A>(p.C);
    const Vec<A> finite = square - first[v] * first[v];
    for (int i = 0; i < L; ++i) {
      rstd[v][i] = A{1} / sqrt_of<A>((square[i] < __builtin_inf() ? finite[i] : square[i]) + p.eps);
    }
  }
  for (int64_t c = 0; p.y != nullptr && c < p.C; ++c) {
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

// Calls tile(vectors, image, pixel, lanes) for the tiles of a share of the images' pixel blocks.
template <typename A, typename F>
void for_each_tile(int64_t P, Range blocks, F&& tile) {
  constexpr int L = kLanes<A>;
  const int64_t per_image = (P + kTileVectors * L - 1) / (kTileVectors * L);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t image = block / per_image;
    int64_t pixel = block % per_image * kTileVectors * L;
    if (pixel + kTileVectors * L <= P) {
      tile(Count<kTileVectors>{}, image, pixel, Full{});
      continue;
    }
    for (; pixel + L <= P; pixel += L) tile(Count<1>{}, image, pixel, Full{});
    if (pixel < P) tile(Count<1>{}, image, pixel, Partial{static_cast<int>(P - pixel)});
  }
}

template <typename A>
int64_t tile_blocks(int64_t R, int64_t P) {
  return R / P * ((P + kTileVectors * kLanes<A> - 1) / (kTileVectors * kLanes<A>));
}

template <bool kAffine, typename T, typename W, typename A = acc_t<T>>
void forward_share(const LayerNormFwdParams<T, W>& p, Affine<A> a, int index, int count) {
  if (p.P == 1) {
    const int64_t bytes = (p.residual != nullptr ? 4 : 2) * p.R * p.C * static_cast<int64_t>(sizeof(T));
    const bool stream = outgrows_cache(bytes, count) && is_streamable(p.y, p.C);
    return forward_row_share<kAffine>(p, a, share(p.R, index, count), stream);
  }
  for_each_tile<A>(p.P, share(tile_blocks<A>(p.R, p.P), index, count),
                   [&](auto vectors, int64_t image, int64_t pixel, auto lanes) {
                     forward_tile<vectors.value, kAffine>(p, a, image, pixel, lanes);
                   });
}

// ---- backward ----

// Whether forward left the mean to be computed again.
template <bool kFromOutput, typename T, typename W>
PYOPS_INLINE bool needs_mean(const LayerNormBwdParams<T, W>& p) {
  return !kFromOutput && !p.rms && p.mean == nullptr;
}

// xhat from what forward saved.
template <bool kFromOutput, typename A>
PYOPS_INLINE Vec<A> normalised(Vec<A> saved, Vec<A> mean, Vec<A> rstd, Vec<A> weight, Vec<A> bias) {
  if constexpr (kFromOutput) {
    return (saved - bias) / weight;
  } else {
    return (saved - mean) * rstd;
  }
}

// A row of backward, with centred(saved) * scale = xhat.
template <bool kFromOutput, typename T, typename A = acc_t<T>>
struct BackwardRow {
  const T* dy;
  const T* saved;
  A mean, rstd, scale;

  PYOPS_INLINE Pair<A> centred(Affine<A> a, int64_t c, auto lanes) const {
    const Pair<A> v = load_pair(saved + c, lanes);
    if constexpr (kFromOutput) {
      const Pair<A> w = load_pair(a.weight + c, Full{}), b = load_pair(a.bias + c, Full{});
      return {(v.lo - b.lo) / w.lo, (v.hi - b.hi) / w.hi};
    } else {
      return {v.lo - mean, v.hi - mean};
    }
  }
};

// dx and dresidual of row r: dh = rstd g - from_g - from_gx xhat (xhat is formed first, because rstd^3 would underflow
// for large x).
template <bool kStream, bool kFromOutput, typename T, typename W, typename A = acc_t<T>>
__attribute__((noinline)) void input_gradients(const LayerNormBwdParams<T, W>& p, Affine<A> a, int64_t r,
                                               const BackwardRow<kFromOutput, T>& row, A from_g, A from_gx,
                                               uint32_t* keep) {
  const T* dsum = p.dsum != nullptr ? p.dsum + r * p.dsum_stride : nullptr;
  T* dx = p.dx != nullptr ? p.dx + r * p.C : nullptr;
  T* dresidual = p.dresidual != nullptr ? p.dresidual + r * p.C : nullptr;
  const bool drop = p.seed != nullptr;
  if (drop && dx != nullptr) dropout_row(keep, p.seed, r, p.C, p.drop_threshold);
  for_each_pair<A>(p.C, [&](int64_t c, auto lanes, int) PYOPS_ALWAYS_INLINE {
    const Pair<A> w = load_pair(a.weight + c, Full{}), d = load_pair(row.dy + c, lanes);
    const Pair<A> x = row.centred(a, c, lanes);
    Pair<A> dh{d.lo * w.lo * row.rstd - from_g - x.lo * row.scale * from_gx,
               d.hi * w.hi * row.rstd - from_g - x.hi * row.scale * from_gx};
    if (dsum != nullptr) {
      const Pair<A> s = load_pair(dsum + c, lanes);
      dh = {dh.lo + s.lo, dh.hi + s.hi};
    }
    if (dresidual != nullptr) put_pair<kStream>(dresidual + c, dh, lanes);
    if (dx == nullptr) return;
    if (drop) dh = select<T>(keep + c, {dh.lo * p.dropout_scale, dh.hi * p.dropout_scale});
    put_pair<kStream>(dx + c, dh, lanes);
  });
}

// kRows rows at once. dweight and dbias run along, in T's order.
template <int kRows, bool kFromOutput, bool kParamGrads, typename T, typename W, typename A = acc_t<T>>
PYOPS_INLINE void backward_rows(const LayerNormBwdParams<T, W>& p, Affine<A> a, int64_t r, A* dweight, A* dbias,
                                uint32_t* keep, bool stream) {
  BackwardRow<kFromOutput, T> row[kRows];
  Vec<A> sum_g[kRows]{}, sum_gx[kRows]{};
  const T* saved[kRows];
  A sum[kRows]{};
  for (int i = 0; i < kRows; ++i) saved[i] = p.saved + (r + i) * p.saved_stride;
  const bool find_mean = needs_mean<kFromOutput>(p);
  if (find_mean) row_sums(saved, p.C, sum);
  for (int i = 0; i < kRows; ++i) {
    const A mean = find_mean ? sum[i] / p.C : (p.mean != nullptr ? p.mean[r + i] : A{0}), rstd = p.rstd[r + i];
    row[i] = {p.dy + (r + i) * p.dy_stride, saved[i], mean, rstd, kFromOutput ? A{1} : rstd};
  }
  for_each_pair<A>(p.C, [&](int64_t c, auto lanes, int) PYOPS_ALWAYS_INLINE {
    const Pair<A> w = load_pair(a.weight + c, Full{});
    Pair<A> dw, db;
    for (int i = 0; i < kRows; ++i) {
      const Pair<A> d = load_pair(row[i].dy + c, lanes);
      const Pair<A> x = inside_pair<T>(row[i].centred(a, c, lanes), lanes);
      const Vec<A> g_lo = d.lo * w.lo, g_hi = d.hi * w.hi;
      sum_g[i] += g_lo;
      sum_gx[i] += g_lo * x.lo;
      sum_g[i] += g_hi;
      sum_gx[i] += g_hi * x.hi;
      dw.lo += d.lo * row[i].scale * x.lo;
      dw.hi += d.hi * row[i].scale * x.hi;
      db.lo += d.lo;
      db.hi += d.hi;
    }
    if constexpr (kParamGrads) {
      const Pair<A> dw_before = load_pair(dweight + c, Full{}), db_before = load_pair(dbias + c, Full{});
      store_pair(dweight + c, {dw_before.lo + dw.lo, dw_before.hi + dw.hi}, Full{});
      store_pair(dbias + c, {db_before.lo + db.lo, db_before.hi + db.hi}, Full{});
    }
  });
  if (p.dx == nullptr && p.dresidual == nullptr) return;
  const auto finish = stream ? input_gradients<true, kFromOutput, T, W> : input_gradients<false, kFromOutput, T, W>;
  for (int i = 0; i < kRows; ++i) {
    const A from_g = p.rms ? A{0} : row[i].rstd * (reduce_add<A>(sum_g[i]) / p.C);
    const A from_gx = row[i].rstd * (row[i].scale * reduce_add<A>(sum_gx[i]) / p.C);
    finish(p, a, r + i, row[i], from_g, from_gx, keep);
  }
}

// Rows of kPairs whole pairs stay in registers, and so do dweight and dbias.
template <int kPairs, bool kParamGrads, typename T, typename W, typename A = acc_t<T>>
__attribute__((noinline)) void backward_short(const LayerNormBwdParams<T, W>& p, Affine<A> a, Range range, A* dweight,
                                              A* dbias) {
  constexpr int step = 2 * kLanes<A>;
  Pair<A> dw[kPairs], db[kPairs];
  for (int64_t r = range.begin; r < range.end; ++r) {
    const A mean = p.mean != nullptr ? p.mean[r] : A{0}, rstd = p.rstd[r];
    Pair<A> g[kPairs], x[kPairs];
    Vec<A> sum_g{}, sum_gx{};
    for (int i = 0; i < kPairs; ++i) {
      const Pair<A> d = load_pair(p.dy + r * p.dy_stride + i * step, Full{});
      const Pair<A> w = load_pair(a.weight + i * step, Full{});
      x[i] = load_pair(p.saved + r * p.saved_stride + i * step, Full{});
      x[i] = {(x[i].lo - mean) * rstd, (x[i].hi - mean) * rstd};
      if constexpr (kParamGrads) {
        dw[i] = {dw[i].lo + d.lo * x[i].lo, dw[i].hi + d.hi * x[i].hi};
        db[i] = {db[i].lo + d.lo, db[i].hi + d.hi};
      }
      g[i] = {d.lo * w.lo, d.hi * w.hi};
      sum_g += g[i].lo + g[i].hi;
      sum_gx += g[i].lo * x[i].lo;
      sum_gx += g[i].hi * x[i].hi;
    }
    A total_g, total_gx;
    reduce_add<A>(sum_g, sum_gx, total_g, total_gx);
    const A from_g = p.rms ? A{0} : rstd * (total_g / p.C), from_gx = rstd * (total_gx / p.C);
    for (int i = 0; p.dx != nullptr && i < kPairs; ++i) {
      store_pair(p.dx + r * p.C + i * step,
                 {g[i].lo * rstd - from_g - x[i].lo * from_gx, g[i].hi * rstd - from_g - x[i].hi * from_gx}, Full{});
    }
  }
  for (int i = 0; kParamGrads && i < kPairs; ++i) {
    store_pair(dweight + i * step, dw[i], Full{});
    store_pair(dbias + i * step, db[i], Full{});
  }
}

constexpr int kBlockRows = 4;

template <bool kFromOutput, bool kParamGrads, typename T, typename W, typename A = acc_t<T>>
void backward_row_share(const LayerNormBwdParams<T, W>& p, Affine<A> a, Range range, A* dweight, A* dbias,
                        bool stream) {
  if constexpr (sizeof(T) > 2 && !kFromOutput) {
    const auto in_registers = [&](auto pairs) {
      backward_short<pairs.value, kParamGrads>(p, a, range, dweight, dbias);
    };
    const bool alone = p.dsum == nullptr && p.dresidual == nullptr && p.seed == nullptr;
    if (alone && !stream && !needs_mean<kFromOutput>(p) && with_whole_pairs<A, 2>(p.C, in_registers)) return;
  }
  Scratch<uint32_t> keep(p.seed ? padded<float>(p.C) + 2 * kLanes<uint32_t> : 0);
  int64_t r = range.begin;
  for (; r + kBlockRows <= range.end; r += kBlockRows) {
    backward_rows<kBlockRows, kFromOutput, kParamGrads>(p, a, r, dweight, dbias, keep.get(), stream);
  }
  for (; r < range.end; ++r) {
    backward_rows<1, kFromOutput, kParamGrads>(p, a, r, dweight, dbias, keep.get(), stream);
  }
  if (stream) end_stream();
}

// dweight and dbias are kept as vectors over the pixel lanes, [C] of them each, and folded at the end.
template <int NV, bool kFromOutput, bool kParamGrads, typename T, typename W, typename Lanes, typename A = acc_t<T>>
void backward_tile(const LayerNormBwdParams<T, W>& p, Affine<A> a, int64_t image, int64_t pixel, Lanes lanes,
                   Vec<A>* dweight, Vec<A>* dbias) {
  constexpr int L = kLanes<A>;
  const int64_t offset = image * p.C * p.P + pixel, row = image * p.P + pixel;
  Vec<A> mean[NV]{}, rstd[NV], sum_g[NV]{}, sum_gx[NV]{};
  if (needs_mean<kFromOutput>(p)) tile_means(p.saved + offset, p.C, p.P, lanes, mean);
  for (int v = 0; v < NV; ++v) {
    if (p.mean != nullptr) mean[v] = load(p.mean + row + v * L, lanes);
    rstd[v] = load(p.rstd + row + v * L, lanes);
  }
  for_each_channel_block(p.C, [&](int64_t begin, int64_t end) {
    Vec<A> block_g[NV]{}, block_gx[NV]{};
    for (int64_t c = begin; c < end; ++c) {
      const Vec<A> w = splat(a.weight[c]), b = kFromOutput ? splat(a.bias[c]) : Vec<A>{};
      Vec<A> dw{}, db{};
      for (int v = 0; v < NV; ++v) {
        const int64_t at = offset + c * p.P + v * L;
        const Vec<A> d = load(p.dy + at, lanes);
        const Vec<A> xhat =
            inside<A>(normalised<kFromOutput, A>(load(p.saved + at, lanes), mean[v], rstd[v], w, b), lanes);
        const Vec<A> g = d * w;
        block_g[v] += g;
        block_gx[v] += g * xhat;
        dw += d * xhat;
        db += d;
      }
      if constexpr (kParamGrads) {
        dweight[c] += dw;
        dbias[c] += db;
      }
    }
    for (int v = 0; v < NV; ++v) {
      sum_g[v] += block_g[v];
      sum_gx[v] += block_gx[v];
    }
  });
  if (p.dx == nullptr) return;
  for (int v = 0; v < NV; ++v) {
    sum_g[v] = p.rms ? Vec<A>{} : sum_g[v] / splat<A>(p.C);
    sum_gx[v] /= splat<A>(p.C);
  }
  for (int64_t c = 0; c < p.C; ++c) {
    const Vec<A> w = splat(a.weight[c]), b = kFromOutput ? splat(a.bias[c]) : Vec<A>{};
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
    backward_tile<tile.value, kFromOutput, kParamGrads>(p, a, image, pixel, lanes, sums.get(), sums.get() + vectors);
  });
  for (int64_t c = 0; c < vectors; ++c) {
    dweight[c] = reduce_add<A>(sums.get()[c]);
    dbias[c] = reduce_add<A>(sums.get()[vectors + c]);
  }
}

template <bool kFromOutput, bool kParamGrads, typename T, typename W, typename A = acc_t<T>>
void backward_share(const LayerNormBwdParams<T, W>& p, Affine<A> a, A* partial, int index, int count) {
  A* dweight = kParamGrads ? partial + index * 2 * padded<A>(p.C) : nullptr;
  A* dbias = kParamGrads ? dweight + padded<A>(p.C) : nullptr;
  if (p.P > 1) {
    backward_tile_share<kFromOutput, kParamGrads>(p, a, share(tile_blocks<A>(p.R, p.P), index, count), dweight, dbias);
    return;
  }
  for (int64_t i = 0; kParamGrads && i < 2 * padded<A>(p.C); ++i) dweight[i] = 0;
  const int64_t tensors = 2 + (p.dsum != nullptr) + (p.dx != nullptr) + (p.dresidual != nullptr);
  const bool stream = outgrows_cache(tensors * p.R * p.C * static_cast<int64_t>(sizeof(T)), count) &&
                      is_streamable(p.dx, p.C) && is_streamable(p.dresidual, p.C);
  backward_row_share<kFromOutput, kParamGrads>(p, a, share(p.R, index, count), dweight, dbias, stream);
}

// dweight[c] = sum over the threads' partial sums, in thread order, for this thread's share of the columns.
template <typename T, typename W, typename A = acc_t<T>>
void reduce_params(const LayerNormBwdParams<T, W>& p, const A* partial, int index, int count) {
  const Range columns = share(p.C, index, count);
  const int64_t stride = padded<A>(p.C);
  for (int64_t c = columns.begin; c < columns.end; ++c) {
    const int in_block = static_cast<int>(c % (2 * kLanes<A>));
    const int64_t at = p.P > 1 ? c : c - in_block + place<T>(in_block);
    A dweight = 0, dbias = 0;
    for (int t = 0; t < count; ++t) {
      dweight += partial[t * 2 * stride + at];
      dbias += partial[t * 2 * stride + stride + at];
    }
    if (p.dweight != nullptr) p.dweight[c] = from_acc<W>(dweight);
    if (p.dbias != nullptr) p.dbias[c] = from_acc<W>(dbias);
  }
}

template <bool kFromOutput, bool kParamGrads, typename T, typename W, typename A = acc_t<T>>
void backward(const LayerNormBwdParams<T, W>& p, Affine<A> a) {
  const int64_t tasks = p.P > 1 ? tile_blocks<A>(p.R, p.P) : p.R;
  const int threads = useful_threads(p.R * p.C, tasks, p.num_threads);
  Scratch<A> partial(kParamGrads ? threads * 2 * padded<A>(p.C) : 0);
  in_parallel(threads, [&](int index, int count) {
    backward_share<kFromOutput, kParamGrads>(p, a, partial.get(), index, count);
    if constexpr (kParamGrads) {
      wait_for_all(count);
      reduce_params(p, partial.get(), index, count);
    }
  });
}

}  // namespace

template <typename T, typename W>
void layer_norm_fwd_cpu(const LayerNormFwdParams<T, W>& params) {
  using A = acc_t<T>;
  const bool has_affine = params.weight != nullptr || params.bias != nullptr;
  Scratch<A> scratch(has_affine && !affine_in_place<T>(params, true) ? 2 * padded<A>(params.C) : 0);
  Affine<A> a{};
  if (has_affine) a = affine_of<T>(params, true, scratch.get());
  const int64_t tasks = params.P > 1 ? tile_blocks<A>(params.R, params.P) : params.R;
  const int threads = useful_threads(params.R * params.C, tasks, params.num_threads);
  in_parallel(threads, [&](int index, int count) {
    if (has_affine) {
      forward_share<true>(params, a, index, count);
    } else {
      forward_share<false>(params, a, index, count);
    }
  });
}

template <typename T, typename W>
void layer_norm_bwd_cpu(const LayerNormBwdParams<T, W>& params) {
  using A = acc_t<T>;
  Scratch<A> scratch(affine_in_place<T>(params, params.from_output) ? 0 : 2 * padded<A>(params.C));
  const Affine<A> a = affine_of<T>(params, params.from_output, scratch.get());
  const bool param_grads = params.dweight != nullptr || params.dbias != nullptr;
  if (params.from_output) {
    return param_grads ? backward<true, true>(params, a) : backward<true, false>(params, a);
  }
  return param_grads ? backward<false, true>(params, a) : backward<false, false>(params, a);
}

#define PYOPS_INSTANTIATE(T, W)                                            \
  template void layer_norm_fwd_cpu<T, W>(const LayerNormFwdParams<T, W>&); \
  template void layer_norm_bwd_cpu<T, W>(const LayerNormBwdParams<T, W>&);
PYOPS_INSTANTIATE(double, double)
PYOPS_INSTANTIATE(float, float)
PYOPS_INSTANTIATE(bf16, bf16)
PYOPS_INSTANTIATE(bf16, float)
PYOPS_INSTANTIATE(f16, f16)
PYOPS_INSTANTIATE(f16, float)

}  // namespace pyops::PYOPS_ISA
