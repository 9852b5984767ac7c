// What the forward and the backward kernel share: query rows, which keys they see, and scores. A strip is at most
// kTileRows query rows against a block of at most kKeys keys; its scores are rows of kKeys numbers.
#pragma once
#include "../params/attention.h"
#include "gemm.h"
#include "math.h"
#include "parallel.h"
#include "philox.h"

namespace pyops::PYOPS_ISA {

constexpr int kKeys = 256;
constexpr int kChunk = 32;      // keys whose mask is looked at together
constexpr int kMostRows = 480;  // queries against one packed key block

// Scores are computed from a whole panel of keys on, up to a whole vector of weights.
template <typename T>
constexpr int kColumnStep = kLanes<acc_t<T>> * (is_pair<Element<T>> ? 2 : 1);

template <typename A>
constexpr A kInfinity = A(__builtin_inf());
// Of a bias: in base 2 the largest finite number, negative, and 2^100.
template <typename A>
constexpr A kLowestBias = sizeof(A) == 8 ? A(-1.2460659279417836e308) : A(-2.3586574359122396e38);
template <typename A>
constexpr A kHighestBias = A(8.786684394833195e29);

// A score in base 2 and a bias, which is held within these limits; -inf stays.
template <typename A>
PYOPS_INLINE Vec<A> add_bias(Vec<A> score, Vec<A> bias) {
  const Vec<A> held = minimum(splat(kHighestBias<A>), maximum(splat(kLowestBias<A>), bias));
  return bias == -kInfinity<A> ? bias : score + held * kLog2E<A>;
}

// One sequence of the batch.
struct Sequence {
  int64_t b, q_begin, k_begin, L, S, offset;
};

template <typename T>
Sequence sequence(const AttentionParams<T>& p, int64_t b) {
  Sequence s{b, 0, 0, p.L, p.S, 0};
  if (p.cu_q != nullptr) {
    s.q_begin = p.cu_q[b];
    s.k_begin = p.cu_k[b];
    s.L = p.cu_q[b + 1] - s.q_begin;
    s.S = p.cu_k[b + 1] - s.k_begin;
  }
  if (p.bottom_right) s.offset = s.S - s.L;
  return s;
}

// Where row i of a tensor lies for head h.
template <typename T, typename U>
PYOPS_INLINE U* at(const AttentionParams<T>& p, U* data, const AttentionStrides& stride, const Sequence& s,
                   int64_t begin, int64_t h, int64_t i) {
  const int64_t batch = p.cu_q == nullptr ? s.b * stride.b : begin * stride.l;
  return data + batch + h * stride.h + i * stride.l;
}

// A query of one head, and the keys [lo, hi) that causality and the window leave it.
template <typename T>
struct QueryRow {
  int64_t h, i;
  int64_t row;  // of the statistics and of dropout
  int64_t lo, hi;
  acc_t<T> slope;    // in base 2
  const char* mask;  // its first element, or null
};

inline int mask_bytes(AttentionMask kind, int of_type) {
  return kind == AttentionMask::boolean ? 1 : kind == AttentionMask::same ? of_type : 4;
}

template <typename T>
PYOPS_INLINE QueryRow<T> query_row(const AttentionParams<T>& p, const Sequence& s, int64_t h, int64_t i) {
  QueryRow<T> r{};
  r.h = h;
  r.i = i;
  r.row = p.cu_q == nullptr ? (s.b * p.H + h) * p.L + i : h * p.L + s.q_begin + i;
  const int64_t diagonal = i + s.offset;
  r.lo = p.left < 0 || diagonal - p.left < 0 ? 0 : diagonal - p.left;
  r.hi = p.right < 0 || diagonal + p.right + 1 > s.S ? s.S : diagonal + p.right + 1;
  if (r.lo >= r.hi) r.lo = r.hi = 0;
  if (p.slopes != nullptr) r.slope = p.slopes[s.b * p.H + h] * kLog2E<acc_t<T>>;
  if (p.mask != nullptr) {
    const int64_t element = s.b * p.mask_stride[0] + h * p.mask_stride[1] + i * p.mask_stride[2];
    r.mask = static_cast<const char*>(p.mask) + element * mask_bytes(p.mask_kind, sizeof(T));
  }
  return r;
}

// L elements of the mask of a row from column c on; only the first `lanes` are read.
template <typename T>
PYOPS_INLINE Vec<acc_t<T>> load_bias(const char* mask, AttentionMask kind, int64_t c, int lanes) {
  using A = acc_t<T>;
  const bool whole = lanes >= kLanes<A>;
  if (kind == AttentionMask::same) {
    const T* p = reinterpret_cast<const T*>(mask) + c;
    return whole ? load(p, Full{}) : load(p, Partial{lanes});
  }
  const A* p = reinterpret_cast<const A*>(mask) + c;  // wide: A is float
  return whole ? load(p, Full{}) : load(p, Partial{lanes});
}

// Lanes whose byte is not 0. The conversion by hand: g++ 12 makes single bytes of __builtin_convertvector.
template <typename A>
PYOPS_INLINE typename LaneIndex<A>::type load_visible(const char* mask, int64_t c, int lanes) {
  constexpr int L = kLanes<A>;
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  Bytes raw;
  if (lanes >= L) {
    __builtin_memcpy(&raw, mask + c, L);
  } else {
    alignas(16) char padded[16] = {};
    __builtin_memcpy(padded, mask + c, lanes);
    __builtin_memcpy(&raw, padded, sizeof(raw));
  }
  using Lanes = typename LaneIndex<A>::type;
#if PYOPS_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return bit_cast<Lanes>(_mm512_cvtepu8_epi32(bit_cast<__m128i>(raw))) != 0;
  if constexpr (sizeof(A) == 8) return bit_cast<Lanes>(_mm512_cvtepu8_epi64(bit_cast<__m128i>(raw))) != 0;
#elif PYOPS_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) return bit_cast<Lanes>(_mm256_cvtepu8_epi32(bit_cast<__m128i>(raw))) != 0;
  if constexpr (sizeof(A) == 8) return bit_cast<Lanes>(_mm256_cvtepu8_epi64(bit_cast<__m128i>(raw))) != 0;
#else
  Lanes wide{};
  for (int i = 0; i < L; ++i) wide[i] = raw[i];
  return wide != 0;
#endif
}

// Whether a comparison holds in any lane.
template <typename V>
PYOPS_INLINE bool any_lane(V v) {
#if PYOPS_VECTOR_BYTES == 64
  return _mm512_movepi32_mask(bit_cast<__m512i>(v)) != 0;
#elif PYOPS_VECTOR_BYTES == 32
  return _mm256_movemask_epi8(bit_cast<__m256i>(v)) != 0;
#else
  const U64 words = bit_cast<U64>(v);
  return (words[0] | words[1]) != 0;
#endif
}

// Of bytes [from, to) of a boolean mask: not 0 when some byte is not 0, when some byte is 0.
struct Bytes {
  unsigned long long any, zeros;
};
PYOPS_INLINE void look_at_word(unsigned long long word, Bytes& found) {
  found.any |= word;
  found.zeros |= (word - 0x0101010101010101ull) & ~word & 0x8080808080808080ull;
}
inline Bytes look_at_bytes(const char* mask, int64_t from, int64_t to) {
  Bytes found{};
  for (; from + 8 <= to; from += 8) {
    unsigned long long word;
    __builtin_memcpy(&word, mask + from, 8);
    look_at_word(word, found);
  }
  if (from < to) {
    // Behind the end as the first byte is.
    unsigned long long word = 0x0101010101010101ull * static_cast<unsigned char>(mask[from]);
    __builtin_memcpy(&word, mask + from, to - from);
    look_at_word(word, found);
  }
  return found;
}

// What the mask does to columns [from, to) of a row: the part behind which all is hidden on either side, and whether
// anything at all happens between.
struct MaskSpan {
  int lo, hi;
  bool acts;
};

template <typename T>
__attribute__((noinline)) MaskSpan span_of_mask(const AttentionParams<T>& p, const char* mask, int64_t j0, int from,
                                                int to) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  if (p.mask_stride[3] == 0) {  // one element for the row
    if (p.mask_kind == AttentionMask::boolean) return {from, *mask != 0 ? to : from, false};
    const A bias = load_bias<T>(mask, p.mask_kind, 0, 1)[0];
    return {from, bias == -kInfinity<A> ? from : to, bias != 0};
  }
  MaskSpan span{to, from, false};
  bool gap = false;  // a hidden chunk behind a visible one
  for (int c = from / kChunk * kChunk; c < to; c += kChunk) {
    const int first = c < from ? from : c, last = c + kChunk < to ? c + kChunk : to;
    bool any = false, acts = false;
    if (p.mask_kind == AttentionMask::boolean) {
      const Bytes bytes = look_at_bytes(mask, j0 + first, j0 + last);
      any = bytes.any != 0;
      acts = bytes.zeros != 0;
    } else {
      for (int v = first; v < last && !(any && acts); v += L) {
        const Vec<A> bias = load_bias<T>(mask, p.mask_kind, j0 + v, last - v);
        const auto inside = iota<A>() < last - v;
        any |= any_lane(~(bias == -kInfinity<A>)&inside);
        acts |= any_lane(~(bias == A(0)) & inside);
      }
    }
    if (any) {
      if (first < span.lo) span.lo = first;
      span.hi = last;
      span.acts |= acts | gap;
      gap = false;
    } else {
      gap = span.lo < span.hi;
    }
  }
  return span.lo < span.hi ? span : MaskSpan{from, from, false};
}

// Asks for the mask of the strip at the head of n rows, against a key block, ahead of its use. Rows of a mask lie a
// page or so apart, which the hardware's prefetchers do not follow.
template <typename T>
PYOPS_INLINE void prefetch_mask(const AttentionParams<T>& p, const QueryRow<T>* rows, int n, int64_t j0, int width) {
  if (p.mask == nullptr || p.mask_stride[2] == 0 || p.mask_stride[3] == 0) return;
  const int bytes = mask_bytes(p.mask_kind, sizeof(T));
  for (int r = 0; r < n && r < kTileRows; ++r) {
    for (int byte = 0; byte < width * bytes; byte += 64) __builtin_prefetch(rows[r].mask + j0 * bytes + byte);
  }
}

// The columns of a key block that a strip sees.
struct StripView {
  int lo, hi;                          // of the whole strip, rounded outwards
  int last;                            // hi, not rounded
  int from[kTileRows], to[kTileRows];  // of each row
  bool masked[kTileRows];              // whether the mask does something between them
};

// Of `rows` against keys j0 .. j0 + width; false when they see none of them.
template <typename T>
bool view_strip(const AttentionParams<T>& p, const QueryRow<T>* rows, int n, int64_t j0, int width, StripView& view) {
  const auto within = [&](int64_t j) { return static_cast<int>(j < j0 ? 0 : j - j0 < width ? j - j0 : width); };
  int lo = width, hi = 0;
  for (int r = 0; r < n; ++r) {
    int from = within(rows[r].lo), to = within(rows[r].hi);
    view.masked[r] = false;
    if (from < to && rows[r].mask != nullptr) {
      const int same = r - 1;
      if (r > 0 && rows[r].mask == rows[same].mask && within(rows[same].lo) == from && within(rows[same].hi) == to) {
        from = view.from[same];
        to = view.to[same];
        view.masked[r] = view.masked[same];
      } else {
        const MaskSpan span = span_of_mask(p, rows[r].mask, j0, from, to);
        from = span.lo;
        to = span.hi;
        view.masked[r] = span.acts;
      }
    }
    view.from[r] = from;
    view.to[r] = to;
    if (from < to) {
      lo = from < lo ? from : lo;
      hi = to > hi ? to : hi;
    }
  }
  if (lo >= hi) return false;
  view.lo = lo / kPanel<Element<T>> * kPanel<Element<T>>;
  view.hi = static_cast<int>(round_up(hi, kColumnStep<T>));
  view.last = hi;
  return true;
}

// Brings a row of raw scores (base 2, scaled) into its final form: softcap, bias, ALiBi, -inf where the row does not
// look. `factors`, where not null, receives the derivative of the softcap.
template <typename T>
PYOPS_INLINE void finish_scores(const AttentionParams<T>& p, const Sequence& seq, const QueryRow<T>& row,
                                const StripView& view, int r, int64_t j0, int width, acc_t<T>* s, acc_t<T>* factors) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const int from = view.from[r], to = view.to[r];
  if (p.softcap > 0) {
    const A cap = p.softcap * kLog2E<A>, inverse = A(1) / cap;
    for (int c = view.lo; c < view.hi; c += L) {
      const Vec<A> t = tanh<A>(load(s + c, Full{}) * inverse);
      store(s + c, t * cap, Full{});
      if (factors != nullptr) store(factors + c, A(1) - t * t, Full{});
    }
  }
  if (row.slope != 0) {
    const int64_t distance = j0 - (row.i + seq.offset);
    for (int c = from / L * L; c < to; c += L) {
      const Vec<A> d = A(distance + c) + __builtin_convertvector(iota<A>(), Vec<A>);
      store(s + c, load(s + c, Full{}) - row.slope * (d < A(0) ? -d : d), Full{});
    }
  }
  if (view.masked[r]) {
    const bool boolean = p.mask_kind == AttentionMask::boolean;
    const bool whole_row = p.mask_stride[3] == 0;
    for (int c = from / L * L; c < to; c += L) {
      Vec<A> v = load(s + c, Full{});
      if (boolean) {
        v = load_visible<A>(row.mask, j0 + c, width - c) ? v : splat(-kInfinity<A>);
      } else if (whole_row) {
        v = add_bias<A>(v, splat(load_bias<T>(row.mask, p.mask_kind, 0, 1)[0]));
      } else {
        v = add_bias<A>(v, load_bias<T>(row.mask, p.mask_kind, j0 + c, width - c));
      }
      store(s + c, v, Full{});
    }
  }
  const Vec<A> hidden = splat(-kInfinity<A>);
  if (from >= to) {
    for (int c = view.lo; c < view.hi; c += L) store(s + c, hidden, Full{});
    return;
  }
  for (int c = view.lo; c < from; c += L) {
    store(s + c, iota<A>() < from - c ? hidden : load(s + c, Full{}), Full{});
  }
  for (int c = to / L * L; c < view.hi; c += L) {
    store(s + c, iota<A>() >= to - c ? hidden : load(s + c, Full{}), Full{});
  }
}

// Whether finish_scores has anything to do for row r.
template <typename T>
PYOPS_INLINE bool has_plain_scores(const AttentionParams<T>& p, const QueryRow<T>& row, const StripView& view, int r) {
  return view.from[r] <= view.lo && view.to[r] >= view.hi && !view.masked[r] && row.slope == 0 && !(p.softcap > 0);
}

// The queries of a key head in one order: row r is query r % L of head hk * (H / Hk) + r / L. Fills rows begin .. end
// and widens [lo, hi) to the keys that they see together.
template <typename T>
void rows_of_unit(const AttentionParams<T>& p, const Sequence& s, int64_t hk, int64_t begin, int64_t end,
                  QueryRow<T>* rows, int64_t& lo, int64_t& hi) {
  if (begin >= end) return;
  int64_t h = hk * (p.H / p.Hk) + begin / s.L, i = begin % s.L;
  for (int64_t r = begin; r < end; ++r, ++rows) {
    *rows = query_row(p, s, h, i);
    if (rows->lo < rows->hi) {
      lo = rows->lo < lo ? rows->lo : lo;
      hi = rows->hi > hi ? rows->hi : hi;
    }
    if (++i == s.L) {
      i = 0;
      ++h;
    }
  }
}

template <typename T>
PYOPS_INLINE int64_t stats_rows(const AttentionParams<T>& p) {
  return p.cu_q == nullptr ? p.B * p.H * p.L : p.H * p.L;
}

// to[c] = factor * from[c], rounded to T; `from` may be read up to a whole vector.
template <typename T>
PYOPS_INLINE void store_row(T* to, const acc_t<T>* from, int64_t n, acc_t<T> factor) {
  constexpr int L = kLanes<acc_t<T>>;
  int64_t c = 0;
  for (; c + L <= n; c += L) store(to + c, load(from + c, Full{}) * factor, Full{});
  if (c < n) store(to + c, load(from + c, Full{}) * factor, Partial{static_cast<int>(n - c)});
}

// The same, and what rounding took from it.
template <typename T>
PYOPS_INLINE void store_row(T* to, T* residue, const acc_t<T>* from, int64_t n, acc_t<T> factor) {
  constexpr int L = kLanes<acc_t<T>>;
  const auto store_both = [&](int64_t c, auto lanes) PYOPS_ALWAYS_INLINE {
    const auto exact = load(from + c, Full{}) * factor;
    const auto rounded = narrow(exact, T{});
    store(to + c, exact, lanes);
    store(residue + c, exact - widen(rounded, T{}), lanes);
  };
  int64_t c = 0;
  for (; c + L <= n; c += L) store_both(c, Full{});
  if (c < n) store_both(c, Partial{static_cast<int>(n - c)});
}

// A multiply-and-add takes a nanosecond per kLanes or so: a thread is worth starting for some tens of microseconds.
constexpr int64_t kProductsPerThread = 1 << 19;

template <typename T>
int attention_threads(const AttentionParams<T>& p) {
  const int64_t n = p.B * p.H * p.max_q * p.max_k * (p.D + p.Dv) / kProductsPerThread;
  return n < 1 ? 1 : n < p.num_threads ? static_cast<int>(n) : p.num_threads;
}

}  // namespace pyops::PYOPS_ISA
