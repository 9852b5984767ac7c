// Width-generic vectors over GCC's vector types, one width per instruction set. Compiled once per instruction set, so
// everything stands in namespace pyops::<isa> and nothing comes from the C++ library: the linker keeps one copy of an
// inline function, and a copy compiled for AVX-512 would then run on an older machine.
#pragma once
#include "../params/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PYOPS_INLINE inline __attribute__((always_inline))

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

PYOPS_INLINE Vec<float> widen(U16 v, bf16) { return bit_cast<Vec<float>>(__builtin_convertvector(v, U32) << 16); }

// Round to nearest even; NaN keeps its sign and becomes quiet. vcvtneps2bf16 is not used: it flushes denormals.
PYOPS_INLINE U16 narrow(Vec<float> v, bf16) {
  const U32 bits = bit_cast<U32>(v);
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32 quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(v != v ? quiet : rounded, U16);
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

// v as it reads back after a store to T.
template <typename T>
PYOPS_INLINE Vec<acc_t<T>> rounded(Vec<acc_t<T>> v) {
  return widen(narrow(v, T{}), T{});
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

// Zero beyond the row.
template <typename V>
PYOPS_INLINE V inside(V v, Full) {
  return v;
}
template <typename V>
PYOPS_INLINE V inside(V v, Partial lanes) {
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) v[i] = i < lanes.n ? v[i] : 0;
  return v;
}

// Sum of the lanes, halves first: a fixed order.
template <typename A>
PYOPS_INLINE A reduce_add(Vec<A> v) {
  A lanes[kLanes<A>];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Calls f(column, lanes, slot) for every vector of a row; slot in 0..3 names one of four independent accumulators.
template <typename A, typename F>
PYOPS_INLINE void for_each_vector(int64_t C, F&& f) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * L <= C; c += 4 * L) {
    f(c, Full{}, 0);
    f(c + L, Full{}, 1);
    f(c + 2 * L, Full{}, 2);
    f(c + 3 * L, Full{}, 3);
  }
  for (; c + L <= C; c += L) f(c, Full{}, 0);
  if (c < C) f(c, Partial{static_cast<int>(C - c)}, 1);
}

}  // namespace pyops::PYOPS_ISA
