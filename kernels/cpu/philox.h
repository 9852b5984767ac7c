// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a vector of counters at a time.
#pragma once
#include "simd.h"

namespace pyops::PYOPS_ISA {

// The even 32-bit lanes of a times m, as 64-bit products.
PYOPS_INLINE U64 multiply_even(U32 a, uint32_t m) {
#if PYOPS_VECTOR_BYTES == 64
  return bit_cast<U64>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(m)));
#elif PYOPS_VECTOR_BYTES == 32
  return bit_cast<U64>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
  return bit_cast<U64>(_mm_mul_epu32(bit_cast<__m128i>(a), _mm_set1_epi64x(m)));
#else
  return (bit_cast<U64>(a) & 0xffffffffull) * m;
#endif
}

struct HighLow {
  U32 high, low;
};

PYOPS_INLINE HighLow multiply_wide(U32 a, uint32_t m) {
  const U64 even = multiply_even(a, m);
  const U64 odd = multiply_even(bit_cast<U32>(bit_cast<U64>(a) >> 32), m);
  const U64 low_half = splat<unsigned long long>(0xffffffffull);
  return {bit_cast<U32>((even >> 32) | (odd & ~low_half)), bit_cast<U32>((even & low_half) | (odd << 32))};
}

struct Philox {
  uint32_t key[2];
  uint32_t row[2];
  uint32_t stream;

  Philox(const int64_t* seed, int64_t r)
      : key{static_cast<uint32_t>(seed[0]), static_cast<uint32_t>(static_cast<uint64_t>(seed[0]) >> 32)},
        row{static_cast<uint32_t>(r), static_cast<uint32_t>(static_cast<uint64_t>(r) >> 32)},
        stream(static_cast<uint32_t>(seed[1])) {}

  // The four lanes of counters (group, row, row >> 32, stream).
  PYOPS_INLINE void operator()(U32 group, U32 out[4]) const {
    U32 c0 = group, c1 = splat(row[0]), c2 = splat(row[1]), c3 = splat(stream);
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
      const HighLow a = multiply_wide(c0, 0xD2511F53u), b = multiply_wide(c2, 0xCD9E8D57u);
      c0 = b.high ^ c1 ^ k0;
      c2 = a.high ^ c3 ^ k1;
      c1 = b.low;
      c3 = a.low;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
  }
};

PYOPS_INLINE U32 interleave(U32 a, U32 b, int from) {
  const auto lane = iota<float>();
  return __builtin_shuffle(a, b, from + (lane >> 1) + (lane & 1) * kLanes<float>);
}

// keep[c] = element (r, from + c) survives dropout ? ~0 : 0, for c in [0, C); `from` is a multiple of 4. keep has room
// for C rounded up to four vectors.
inline __attribute__((noinline)) void dropout_row(uint32_t* keep, const int64_t* seed, int64_t r, int64_t C,
                                                  uint32_t threshold, int64_t from = 0) {
  constexpr int L = kLanes<uint32_t>;
  const Philox philox(seed, r);
  for (int64_t c = 0; c < C; c += 4 * L) {
    U32 lane[4];
    philox(bit_cast<U32>(iota<float>()) + static_cast<uint32_t>((from + c) / 4), lane);
    for (int k = 0; k < 4; ++k) lane[k] = bit_cast<U32>((lane[k] >> 8) >= threshold);
    // Lane k holds columns c + 4 j + k: interleave twice to put the columns in order.
    const U32 even_low = interleave(lane[0], lane[2], 0), even_high = interleave(lane[0], lane[2], L / 2);
    const U32 odd_low = interleave(lane[1], lane[3], 0), odd_high = interleave(lane[1], lane[3], L / 2);
    const U32 columns[4] = {interleave(even_low, odd_low, 0), interleave(even_low, odd_low, L / 2),
                            interleave(even_high, odd_high, 0), interleave(even_high, odd_high, L / 2)};
    __builtin_memcpy(keep + c, columns, sizeof(columns));
  }
}

PYOPS_INLINE U32 load_mask(const uint32_t* keep, float) {
  U32 mask;
  __builtin_memcpy(&mask, keep, sizeof(mask));
  return mask;
}
PYOPS_INLINE LaneIndex<double>::type load_mask(const uint32_t* keep, double) {
  typedef int32_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  Narrow mask;
  __builtin_memcpy(&mask, keep, sizeof(mask));
  return __builtin_convertvector(mask, LaneIndex<double>::type);
}

// keep ? v : 0, for the pair of a row that starts at `keep`, in T's order.
template <typename T>
PYOPS_INLINE Pair<acc_t<T>> select(const uint32_t* keep, Pair<acc_t<T>> v) {
  using A = acc_t<T>;
  auto lo = load_mask(keep, A{}), hi = load_mask(keep + kLanes<A>, A{});
  to_order<T>(lo, hi);
  return {bit_cast<Vec<A>>(bit_cast<decltype(lo)>(v.lo) & lo), bit_cast<Vec<A>>(bit_cast<decltype(hi)>(v.hi) & hi)};
}

}  // namespace pyops::PYOPS_ISA
