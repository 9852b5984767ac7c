// Width-generic vectors over GCC's vector types, one width per instruction set. Compiled once per instruction set, so
// everything stands in namespace pyops::<isa> and nothing comes from the C++ library: the linker keeps one copy of an
// inline function, and a copy compiled for AVX-512 would then run on an older machine.
#pragma once
#include "../params/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PYOPS_ALWAYS_INLINE __attribute__((always_inline))  // behind a lambda's parameters
#define PYOPS_INLINE inline PYOPS_ALWAYS_INLINE

namespace pyops::PYOPS_ISA {

constexpr int kVectorBytes = PYOPS_VECTOR_BYTES;

template <typename A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

using U32 = Vec<uint32_t>;
using U64 = Vec<unsigned long long>;
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as Vec<float>

// How many lanes of a vector lie inside the row. Full is a type of its own, so that the common case costs nothing.
struct Full {};
struct Partial {
  int n;
};

template <typename To, typename From>
PYOPS_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename A>
PYOPS_INLINE Vec<A> splat(A a) {
  return a - Vec<A>{};
}

// ---- conversion between storage and accumulation vectors ----

// g++ 12 makes five instructions of __builtin_convertvector.
PYOPS_INLINE U32 widen_bits(U16 v) {
#if PYOPS_VECTOR_BYTES == 64
  return bit_cast<U32>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(v)));
#elif PYOPS_VECTOR_BYTES == 32
  return bit_cast<U32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, U32);
#endif
}
PYOPS_INLINE U16 narrow_bits(U32 v) {
#if PYOPS_VECTOR_BYTES == 64
  return bit_cast<U16>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, U16);
#endif
}

PYOPS_INLINE Vec<float> widen(U16 v, bf16) { return bit_cast<Vec<float>>(widen_bits(v) << 16); }

// Round to nearest even; NaN keeps its sign and becomes quiet. vcvtneps2bf16 is not used: it flushes denormals.
PYOPS_INLINE U16 narrow(Vec<float> v, bf16) {
  const U32 bits = bit_cast<U32>(v);
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32 quiet = (bits >> 16) | 0x40;
  return narrow_bits(v != v ? quiet : rounded);
}

PYOPS_INLINE Vec<float> widen(U16 v, f16) {
#if PYOPS_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(v)));
#elif PYOPS_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(v)));
#else
  Vec<float> out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = bit_cast<_Float16>(static_cast<uint16_t>(v[i]));
  return out;
#endif
}

PYOPS_INLINE U16 narrow(Vec<float> v, f16) {
#if PYOPS_VECTOR_BYTES == 64
  return bit_cast<U16>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif PYOPS_VECTOR_BYTES == 32
  return bit_cast<U16>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  U16 out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = bit_cast<uint16_t>(static_cast<_Float16>(v[i]));
  return out;
#endif
}

template <typename T>
struct Storage {
  using type = U16;  // the 16-bit types
};
template <>
struct Storage<float> {
  using type = Vec<float>;
};
template <>
struct Storage<double> {
  using type = Vec<double>;
};

PYOPS_INLINE Vec<float> widen(Vec<float> v, float) { return v; }
PYOPS_INLINE Vec<double> widen(Vec<double> v, double) { return v; }
PYOPS_INLINE Vec<float> narrow(Vec<float> v, float) { return v; }
PYOPS_INLINE Vec<double> narrow(Vec<double> v, double) { return v; }

// ---- loads and stores, unaligned; lanes beyond a Partial read as zero and are not written ----

template <typename T>
PYOPS_INLINE Vec<acc_t<T>> load(const T* p, Full) {
  typename Storage<T>::type raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return widen(raw, T{});
}
template <typename T>
PYOPS_INLINE Vec<acc_t<T>> load(const T* p, Partial lanes) {
  typename Storage<T>::type raw{};
  __builtin_memcpy(&raw, p, lanes.n * sizeof(T));
  return widen(raw, T{});
}
template <typename T>
PYOPS_INLINE void store(T* p, Vec<acc_t<T>> v, Full) {
  const typename Storage<T>::type raw = narrow(v, T{});
  __builtin_memcpy(p, &raw, sizeof(raw));
}
template <typename T>
PYOPS_INLINE void store(T* p, Vec<acc_t<T>> v, Partial lanes) {
  const typename Storage<T>::type raw = narrow(v, T{});
  __builtin_memcpy(p, &raw, lanes.n * sizeof(T));
}

template <typename T>
PYOPS_INLINE acc_t<T> to_acc(T v) {
  if constexpr (sizeof(T) >= 4) {
    return v;
  } else {
    return load(&v, Partial{1})[0];
  }
}
template <typename T>
PYOPS_INLINE T from_acc(acc_t<T> v) {
  T out;
  store(&out, splat(v), Partial{1});
  return out;
}

// An integer for each lane of Vec<A>.
template <typename A>
struct LaneIndex {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct LaneIndex<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};

// 0, 1, 2, ... Read from memory: g++ does not fold a vector that is filled lane by lane.
constexpr int32_t kIota32[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr int64_t kIota64[] = {0, 1, 2, 3, 4, 5, 6, 7};
template <typename A>
PYOPS_INLINE typename LaneIndex<A>::type iota() {
  typename LaneIndex<A>::type v;
  if constexpr (sizeof(A) == 8) {
    __builtin_memcpy(&v, kIota64, sizeof(v));
  } else {
    __builtin_memcpy(&v, kIota32, sizeof(v));
  }
  return v;
}

// Zero beyond the row.
template <typename A>
PYOPS_INLINE Vec<A> inside(Vec<A> v, Full) {
  return v;
}
template <typename A>
PYOPS_INLINE Vec<A> inside(Vec<A> v, Partial lanes) {
  return iota<A>() < lanes.n ? v : Vec<A>{};
}

// Sum of the lanes, halves first: a fixed order.
template <typename A>
PYOPS_INLINE A reduce_add(Vec<A> v) {
#pragma GCC unroll 4
  for (int width = kLanes<A> / 2; width > 0; width /= 2) v += __builtin_shuffle(v, iota<A>() ^ width);
  return v[0];
}

// The larger and the smaller one; x where either is NaN. Compilers do not make one instruction of the comparison.
PYOPS_INLINE Vec<float> maximum(Vec<float> bound, Vec<float> x) {
#if PYOPS_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_max_ps(bit_cast<__m512>(bound), bit_cast<__m512>(x)));
#elif PYOPS_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_max_ps(bit_cast<__m256>(bound), bit_cast<__m256>(x)));
#else
  return bound > x ? bound : x;
#endif
}
PYOPS_INLINE Vec<float> minimum(Vec<float> bound, Vec<float> x) {
#if PYOPS_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_min_ps(bit_cast<__m512>(bound), bit_cast<__m512>(x)));
#elif PYOPS_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_min_ps(bit_cast<__m256>(bound), bit_cast<__m256>(x)));
#else
  return bound < x ? bound : x;
#endif
}
PYOPS_INLINE Vec<double> maximum(Vec<double> bound, Vec<double> x) { return bound > x ? bound : x; }
PYOPS_INLINE Vec<double> minimum(Vec<double> bound, Vec<double> x) { return bound < x ? bound : x; }

template <typename A>
PYOPS_INLINE A reduce_max(Vec<A> v) {
#pragma GCC unroll 4
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    const Vec<A> other = __builtin_shuffle(v, iota<A>() ^ width);
    v = v > other ? v : other;
  }
  return v[0];
}

// Sums of the lanes of two vectors at once.
template <typename A>
PYOPS_INLINE void reduce_add(Vec<A> a, Vec<A> b, A& sum_a, A& sum_b) {
  constexpr int L = kLanes<A>;
  const auto lane = iota<A>(), low = lane < L / 2 ? lane : lane + L / 2;  // the low half of a, the low half of b
  Vec<A> v = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + L / 2);
#pragma GCC unroll 4
  for (int width = L / 4; width > 0; width /= 2) v += __builtin_shuffle(v, lane ^ width);
  sum_a = v[0];
  sum_b = v[L / 2];
}

// ---- rows in pairs of vectors ----
//
// A pair holds 2 L neighbouring columns of a row. Of bf16 its halves are the even and the odd columns: one shift and
// one mask widen 2 L of them, where keeping the order takes two loads, two extensions and two shifts. Everything that
// meets such a pair (weight, bias, their gradients, the dropout mask) is brought into the same order, T's order.

template <typename A>
struct Pair {
  Vec<A> lo{}, hi{};
};

template <typename T>
constexpr bool kSplitsEvenOdd = false;
template <>
inline constexpr bool kSplitsEvenOdd<bf16> = true;

// Where column o of a block of 2 L stands in T's order.
template <typename T>
PYOPS_INLINE int place(int o) {
  return kSplitsEvenOdd<T> ? (o % 2) * kLanes<acc_t<T>> + o / 2 : o;
}

// Two vectors in column order as a pair in T's order.
template <typename T, typename V>
PYOPS_INLINE void to_order(V& first, V& second) {
  if constexpr (kSplitsEvenOdd<T>) {
    const auto even = iota<acc_t<T>>() * 2;
    const V lo = __builtin_shuffle(first, second, even), hi = __builtin_shuffle(first, second, even + 1);
    first = lo;
    second = hi;
  }
}

// And back.
template <typename T, typename V>
PYOPS_INLINE void to_columns(V& lo, V& hi) {
  if constexpr (kSplitsEvenOdd<T>) {
    const auto lane = iota<acc_t<T>>();
    const auto source = (lane >> 1) + (lane & 1) * kLanes<acc_t<T>>;
    const V first = __builtin_shuffle(lo, hi, source),
            second = __builtin_shuffle(lo, hi, source + kLanes<acc_t<T>> / 2);
    lo = first;
    hi = second;
  }
}

template <typename T>
PYOPS_INLINE Pair<acc_t<T>> load_pair(const T* p, Full) {
  if constexpr (kSplitsEvenOdd<T>) {
    U32 raw;
    __builtin_memcpy(&raw, p, sizeof(raw));
    return {bit_cast<Vec<float>>(raw << 16), bit_cast<Vec<float>>(raw & 0xffff0000u)};
  } else {
    return {load(p, Full{}), load(p + kLanes<acc_t<T>>, Full{})};
  }
}
template <typename T>
PYOPS_INLINE Pair<acc_t<T>> load_pair(const T* p, Partial lanes) {
  constexpr int L = kLanes<acc_t<T>>;
  alignas(kVectorBytes) T columns[2 * L] = {};
  __builtin_memcpy(columns, p, lanes.n * sizeof(T));
  return load_pair(columns, Full{});
}

// Asks for the pair at p, which may lie behind the end: a prefetch never faults. The hardware's own prefetchers stop at
// the end of a page, which is often the end of a row.
template <typename T>
PYOPS_INLINE void prefetch_pair(const T* p) {
  constexpr int bytes = 2 * kLanes<acc_t<T>> * static_cast<int>(sizeof(T));
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + at);
}

// Rounds to bf16 and leaves the result in the upper half of each lane.
PYOPS_INLINE U32 round_to_upper(Vec<float> v) {
  const U32 bits = bit_cast<U32>(v);
  return v != v ? bits | 0x400000u : bits + 0x7fff + ((bits >> 16) & 1);
}

PYOPS_INLINE U32 bf16_pair(Pair<float> v) {
  return (round_to_upper(v.lo) >> 16) | (round_to_upper(v.hi) & 0xffff0000u);
}

template <typename T>
PYOPS_INLINE void store_pair(T* p, Pair<acc_t<T>> v, Full) {
  if constexpr (kSplitsEvenOdd<T>) {
    const U32 raw = bf16_pair(v);
    __builtin_memcpy(p, &raw, sizeof(raw));
  } else {
    store(p, v.lo, Full{});
    store(p + kLanes<acc_t<T>>, v.hi, Full{});
  }
}
template <typename T>
PYOPS_INLINE void store_pair(T* p, Pair<acc_t<T>> v, Partial lanes) {
  constexpr int L = kLanes<acc_t<T>>;
  alignas(kVectorBytes) T columns[2 * L];
  store_pair(columns, v, Full{});
  __builtin_memcpy(p, columns, lanes.n * sizeof(T));
}

// ---- stores past the cache ----
//
// A plain store first reads the line that it fills. Where an output will be out of the cache before it is read again,
// these save that read; elsewhere they cost the reader more than they saved (bench/notes/layer_norm.md).

template <typename V>
PYOPS_INLINE void stream_raw(void* p, const V& raw) {  // p aligned to sizeof(V)
#if defined(__x86_64__)
#if PYOPS_VECTOR_BYTES >= 64
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), bit_cast<__m512i>(raw));
#endif
#if PYOPS_VECTOR_BYTES >= 32
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(raw));
#endif
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), bit_cast<__m128i>(raw));
  if constexpr (sizeof(V) == 8) return _mm_stream_si64(static_cast<long long*>(p), bit_cast<long long>(raw));
#endif
  __builtin_memcpy(p, &raw, sizeof(raw));
}

template <bool kStream, typename T, typename Lanes>
PYOPS_INLINE void put_pair(T* p, Pair<acc_t<T>> v, Lanes lanes) {
  if constexpr (!kStream || sizeof(Lanes) != sizeof(Full)) {
    store_pair(p, v, lanes);
  } else if constexpr (kSplitsEvenOdd<T>) {
    stream_raw(p, bf16_pair(v));
  } else {
    stream_raw(p, narrow(v.lo, T{}));
    stream_raw(p + kLanes<acc_t<T>>, narrow(v.hi, T{}));
  }
}

// Whether rows of C elements from p on may be streamed.
template <typename T>
inline bool is_streamable(const T* p, int64_t C) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(C * sizeof(T))) % kVectorBytes == 0;
}

// Streamed stores before this are seen by other threads before what follows.
inline void end_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Zero beyond the row, in T's order.
template <typename T>
PYOPS_INLINE Pair<acc_t<T>> inside_pair(Pair<acc_t<T>> v, Full) {
  return v;
}
template <typename T>
PYOPS_INLINE Pair<acc_t<T>> inside_pair(Pair<acc_t<T>> v, Partial lanes) {
  using A = acc_t<T>;
  auto lo = iota<A>(), hi = iota<A>() + kLanes<A>;
  to_order<T>(lo, hi);
  return {lo < lanes.n ? v.lo : Vec<A>{}, hi < lanes.n ? v.hi : Vec<A>{}};
}

// v as it reads back after a store to T.
template <typename T>
PYOPS_INLINE Pair<acc_t<T>> rounded_pair(Pair<acc_t<T>> v) {
  if constexpr (kSplitsEvenOdd<T>) {
    return {bit_cast<Vec<float>>(round_to_upper(v.lo) & 0xffff0000u),
            bit_cast<Vec<float>>(round_to_upper(v.hi) & 0xffff0000u)};
  } else {
    return {widen(narrow(v.lo, T{}), T{}), widen(narrow(v.hi, T{}), T{})};
  }
}

template <typename A>
constexpr int64_t padded(int64_t C) {  // columns, up to whole pairs
  return (C + 2 * kLanes<A> - 1) / (2 * kLanes<A>)*(2 * kLanes<A>);
}

// Calls f(column, lanes, slot) for every pair of a row; slot 0 or 1 names one of two independent sets of accumulators.
template <typename A, typename F>
PYOPS_INLINE void for_each_pair(int64_t C, F&& f) {
  constexpr int step = 2 * kLanes<A>;
  int64_t c = 0;
  for (; c + 2 * step <= C; c += 2 * step) {
    f(c, Full{}, 0);
    f(c + step, Full{}, 1);
  }
  if (c + step <= C) {
    f(c, Full{}, 0);
    c += step;
  }
  if (c < C) f(c, Partial{static_cast<int>(C - c)}, 1);
}

}  // namespace pyops::PYOPS_ISA
