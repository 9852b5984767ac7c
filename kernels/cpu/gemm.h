// Products of small matrices that lie in the cache, register-tiled: C (rows x columns) from A (rows x steps) and B
// (steps x columns).
//
// A tile is kTileRows x kTileVectors vectors of accumulators. A step reads one row of a panel of B, which is as wide as
// the tile and lies in one piece, and broadcasts one element of A per row of C, so A may lie in any order. An element
// is a number, or a pair of bf16 that one instruction multiplies and adds (two steps of the product at once).
#pragma once
#include "simd.h"

namespace pyops::PYOPS_ISA {

#if defined(__AVX512BF16__)
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif

using Bf16Pair = uint32_t;  // the lower half is the earlier one

template <typename E>
constexpr bool is_pair = false;
template <>
inline constexpr bool is_pair<Bf16Pair> = true;

template <typename A>
PYOPS_INLINE Vec<A> multiply_add(Vec<A> c, A a, Vec<A> b) {
  return c + splat(a) * b;
}
#if defined(__AVX512BF16__)
PYOPS_INLINE Vec<float> multiply_add(Vec<float> c, Bf16Pair a, U32 b) {
  return bit_cast<Vec<float>>(
      _mm512_dpbf16_ps(bit_cast<__m512>(c), bit_cast<__m512bh>(splat(a)), bit_cast<__m512bh>(b)));
}
#endif

#if defined(__AVX512BF16__)
// Two vectors as bf16 in column order. Flushes denormals, which a weight or a rounded gradient may lose.
PYOPS_INLINE U32 bf16_in_order(Vec<float> first, Vec<float> second) {
  return bit_cast<U32>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first)));
}
#endif

// 12 x 2 of 32 registers, 6 x 2 of 16; the remaining rows of a product take the smaller heights.
constexpr int kTileRows = PYOPS_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kTileVectors = 2;
constexpr int kLeastRows = kTileRows / 3;  // every number of rows is rounded up to a multiple of it

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <typename T>
struct ElementOf {
  using type = acc_t<T>;
};
#if defined(__AVX512BF16__)
template <>
struct ElementOf<bf16> {
  using type = Bf16Pair;
};
#endif
// What the products of T read: pairs of bf16 where the processor multiplies them, else the accumulation type.
template <typename T>
using Element = typename ElementOf<T>::type;

// From one step to the next in a packed strip of rows of A.
template <typename A>
constexpr int kStripStep = static_cast<int>(round_up(kTileRows, kLanes<A>));

// What becomes of C.
enum class Into {
  product,  // C = A B, times scale[0] where scale is not null
  add,      // C += A B
  scaled,   // C = scale_row C + A B
};

// Columns of a panel of B.
template <typename E>
constexpr int kPanel = kTileVectors * kLanes<E>;

// One tile. Element (r, k) of A lies at a[r * kRow + k * kStep], element (k, n) of B at b[k * kPanel + n].
template <Into kInto, int kRow, int kStep, int R, int V, typename E, typename A>
PYOPS_INLINE void multiply_tile(const E* a, const E* b, int steps, A* c, int64_t c_row, const A* scale) {
  constexpr int L = kLanes<A>;
  // C joins at the end: sums of blocks lose fewer digits than one sum over all.
  Vec<A> sum[R][V] = {};
  for (int k = 0; k < steps; ++k) {
    Vec<E> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) __builtin_memcpy(&row[v], b + v * L, sizeof(row[v]));
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const E element = a[r * kRow];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(sum[r][v], element, row[v]);
    }
    a += kStep;
    b += kPanel<E>;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* to = c + r * c_row + v * L;
      if constexpr (kInto == Into::product) {
        if (scale != nullptr) sum[r][v] *= scale[0];
      }
      if constexpr (kInto == Into::add) sum[r][v] += load(to, Full{});
      if constexpr (kInto == Into::scaled) sum[r][v] += load(to, Full{}) * scale[r];
      store(to, sum[r][v], Full{});
    }
  }
}

// R rows of C; `columns` are whole vectors. Panels of B lie b_panel elements apart.
template <Into kInto, int kRow, int kStep, int R, typename E, typename A>
__attribute__((noinline)) void multiply_strip(const E* a, const E* b, int64_t b_panel, int steps, A* c, int64_t c_row,
                                              int columns, const A* scale) {
  constexpr int L = kLanes<A>;
  static_assert(kTileVectors == 2);
  int n = 0;
  for (; n + 2 * L <= columns; n += 2 * L, b += b_panel) {
    multiply_tile<kInto, kRow, kStep, R, 2>(a, b, steps, c + n, c_row, scale);
  }
  if (n < columns) multiply_tile<kInto, kRow, kStep, R, 1>(a, b, steps, c + n, c_row, scale);
}

// At most kTileRows rows; what lies behind `rows`, up to a multiple of kLeastRows, is computed too.
template <Into kInto, int kRow, int kStep, typename E, typename A>
PYOPS_INLINE void multiply(int rows, const E* a, const E* b, int64_t b_panel, int steps, A* c, int64_t c_row,
                           int columns, const A* scale = nullptr) {
  if (rows > 2 * kLeastRows) {
    multiply_strip<kInto, kRow, kStep, kTileRows>(a, b, b_panel, steps, c, c_row, columns, scale);
  } else if (rows > kLeastRows) {
    multiply_strip<kInto, kRow, kStep, 2 * kLeastRows>(a, b, b_panel, steps, c, c_row, columns, scale);
  } else {
    multiply_strip<kInto, kRow, kStep, kLeastRows>(a, b, b_panel, steps, c, c_row, columns, scale);
  }
}

// ---- packing ----

// An L x L block of vectors, transposed in place.
template <typename E, int L>
PYOPS_INLINE void transpose(Vec<E> (&m)[L]) {
  const auto lane = iota<E>();
#pragma GCC unroll 4
  for (int width = 1; width < L; width *= 2) {
    const auto upper = (lane & width) != 0;
    const auto low = upper ? lane - width + L : lane, high = upper ? lane + L : lane + width;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & width) continue;
      const Vec<E> a = m[i], b = m[i + width];
      m[i] = __builtin_shuffle(a, b, low);
      m[i + width] = __builtin_shuffle(a, b, high);
    }
  }
}

// What one product step reads of a row: L elements at step k, zeros behind the row's n numbers.
template <typename E, typename T>
PYOPS_INLINE Vec<E> load_elements(const T* row, int64_t k, int64_t n, acc_t<T> factor) {
  constexpr int L = kLanes<E>;
  if constexpr (is_pair<E>) {
    U32 raw{};
    const int64_t left = n - 2 * k;
    if (left >= 2 * L) {
      __builtin_memcpy(&raw, row + 2 * k, sizeof(raw));
    } else {
      __builtin_memcpy(&raw, row + 2 * k, left * sizeof(T));
    }
    return raw;
  } else {
    const int64_t left = n - k;
    return (left >= L ? load(row + k, Full{}) : load(row + k, Partial{static_cast<int>(left)})) * factor;
  }
}

// Steps of a product over n numbers.
template <typename E>
constexpr int64_t steps_of(int64_t n) {
  return is_pair<E> ? (n + 1) / 2 : n;
}

// Rows as columns: element k of row r, times factor, goes to column r of step k, for `count` rows of n numbers; zeros
// for rows up to a multiple of L (of pairs, whose products take whole panels, of kWidth). Panels of kWidth columns lie
// `panel` elements apart; steps up to a multiple of L are written. Pairs take no factor.
template <int kWidth, typename E, typename T, typename RowOf>
PYOPS_INLINE void pack_transposed(RowOf&& row_of, int count, int64_t n, acc_t<T> factor, E* panels, int64_t panel) {
  constexpr int L = kLanes<E>;
  static_assert(kWidth % L == 0);
  const int64_t columns = is_pair<E> ? round_up(count, kWidth) : count;
  for (int r = 0; r < columns; r += L) {
    E* to = panels + r / kWidth * panel + r % kWidth;
    for (int64_t k = 0; k < steps_of<E>(n); k += L) {
      Vec<E> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        block[i] = r + i < count ? load_elements<E>(static_cast<const T*>(row_of(r + i)), k, n, factor) : Vec<E>{};
      }
      transpose<E>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) __builtin_memcpy(to + (k + i) * kWidth, &block[i], sizeof(block[i]));
    }
  }
}

// Rows as rows: number c of row k (of rows 2 k and 2 k + 1, as pairs) goes to column c of step k, for `count` rows of n
// numbers; zeros up to whole vectors, and for the missing half of a last pair. Panels lie `panel` elements apart.
template <typename E, typename T, typename RowOf>
PYOPS_INLINE void pack_rows(RowOf&& row_of, int count, int64_t n, E* panels, int64_t panel) {
  constexpr int L = kLanes<E>;
  for (int k = 0; k < steps_of<E>(count); ++k) {
    const T* first = row_of(is_pair<E> ? 2 * k : k);
    const T* second = is_pair<E> && 2 * k + 1 < count ? static_cast<const T*>(row_of(2 * k + 1)) : nullptr;
    for (int64_t c = 0; c < n; c += L) {
      E* to = panels + c / kPanel<E> * panel + k * kPanel<E> + c % kPanel<E>;
      Vec<E> v;
      if constexpr (is_pair<E>) {
        U16 halves[2] = {};
        const int64_t bytes = (n - c < L ? n - c : L) * sizeof(T);
        __builtin_memcpy(&halves[0], first + c, bytes);
        if (second != nullptr) __builtin_memcpy(&halves[1], second + c, bytes);
        v = widen_bits(halves[0]) | (widen_bits(halves[1]) << 16);
      } else {
        v = n - c >= L ? load(first + c, Full{}) : load(first + c, Partial{static_cast<int>(n - c)});
      }
      __builtin_memcpy(to, &v, sizeof(v));
    }
  }
}

}  // namespace pyops::PYOPS_ISA
