// What the attention kernels share: sequences and windows, tiles in shared memory and products of them, what a lane's
// elements stand for, scores, gradients. attention.cu has the overview.
//
// A lane is 4 g + t (g = 0 .. 7, t = 0 .. 3). Products lie in fragments x[m][n][e] of 16 rows and 8 columns: the lane
// holds row 16 m + 8 (e / 2) + g, column 8 n + 2 t + e % 2.
#pragma once

#include <cfloat>
#include <cmath>

#include "../params/attention.h"
#include "mma.cuh"

#ifndef PYOPS_SIMT
extern "C" __device__ float __nvvm_ex2_approx_ftz_f(float);  // the instruction ex2.approx.ftz.f32
#endif

namespace pyops {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarpSize;
constexpr int kRowLanes = 8;  // threads that share a row in the kernels without products
constexpr float kLog2e = 1.44269504088896f;
constexpr float kInfinity = INFINITY;
constexpr int kUnlimited = 1 << 29;  // more than any index, and three of them fit in 32 bits

// ---------------------------------------------------------------------------------------------------------- arithmetic

// 2^x to two units in the last place; 0 below 2^-126. One instruction where exp2f() takes four.
__device__ __forceinline__ float exp2_flushed(float x) {
#ifdef PYOPS_SIMT
  return x < -126.0f ? 0.0f : exp2f(x);
#else
  return __nvvm_ex2_approx_ftz_f(x);
#endif
}

// 1 / x to two units in the last place, for x < 2^126.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef PYOPS_SIMT
  return 1.0f / x;
#else
  return __fdividef(1.0f, x);
#endif
}

// A bias in base 2, see params/attention.h. NaN stays NaN.
__device__ __forceinline__ float base2(float bias) {
  const float scaled = bias * kLog2e;
  if (scaled > 0x1p100f) return 0x1p100f;
  return scaled < -FLT_MAX && bias >= -FLT_MAX ? -FLT_MAX : scaled;
}

// Two elements in one register, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float a, float b) {
  return from_acc<T>(a).bits | uint32_t(from_acc<T>(b).bits) << 16;
}
template <typename T>
__device__ __forceinline__ float low(uint32_t pair) {
  return to_acc(T{uint16_t(pair)});
}
template <typename T>
__device__ __forceinline__ float high(uint32_t pair) {
  return to_acc(T{uint16_t(pair >> 16)});
}

template <typename T>
__device__ __forceinline__ float lost_by_rounding(float x) {
  return x - to_acc(from_acc<T>(x));
}

// ----------------------------------------------------------------------------------------------- sequences and windows

// Rows of all sequences.
template <typename T>
__host__ __device__ __forceinline__ int64_t row_count(const AttentionParams<T>& p) {
  return (p.cu_q == nullptr ? p.B : 1) * p.H * p.L;
}

// Row `row` of a tensor like q. Packed sequences are one batch.
template <typename T, typename E>
__device__ __forceinline__ E* find_row(const AttentionParams<T>& p, E* tensor, const AttentionStrides& stride,
                                       int64_t row) {
  const int64_t i = row % p.L, h = row / p.L % p.H, b = row / p.L / p.H;
  return tensor + b * stride.b + h * stride.h + i * stride.l;
}

// Sequence b of a call. Query i of head h has the row `row + h * p.L + i`.
struct Sequence {
  int64_t b, row;
  int L, S;

  template <typename T>
  __device__ __forceinline__ Sequence(const AttentionParams<T>& p, int64_t b) : b(b) {
    if (p.cu_q == nullptr) {
      L = int(p.L);
      S = int(p.S);
      row = b * p.H * p.L;
      batch_ = b;
      q_start_ = k_start_ = 0;
    } else {
      row = q_start_ = p.cu_q[b];
      k_start_ = p.cu_k[b];
      L = p.cu_q[b + 1] - int(q_start_);
      S = p.cu_k[b + 1] - int(k_start_);
      batch_ = 0;
    }
  }

  // The first of the sequence's rows of a tensor like q, or like k.
  template <typename E>
  __device__ __forceinline__ E* queries(E* tensor, const AttentionStrides& stride, int64_t h) const {
    return tensor + batch_ * stride.b + h * stride.h + q_start_ * stride.l;
  }
  template <typename E>
  __device__ __forceinline__ E* keys(E* tensor, const AttentionStrides& stride, int64_t h) const {
    return tensor + batch_ * stride.b + h * stride.h + k_start_ * stride.l;
  }

 private:
  int64_t batch_, q_start_, k_start_;
};

// Query i sees key j when lo <= j - i <= hi.
struct Window {
  int lo, hi, offset;  // offset: of the diagonal

  template <typename T>
  __device__ __forceinline__ Window(const AttentionParams<T>& p, const Sequence& seq)
      : lo(-kUnlimited), hi(kUnlimited), offset(p.bottom_right ? seq.S - seq.L : 0) {
    if (p.left >= 0) lo = int(max(offset - p.left, int64_t(-kUnlimited)));
    if (p.right >= 0) hi = int(min(offset + p.right, int64_t(kUnlimited)));
  }

  // Keys [0, S) that some query of [i_first, i_last] sees.
  __device__ __forceinline__ int first_key(int i_first) const { return max(0, i_first + lo); }
  __device__ __forceinline__ int end_key(int i_last, int S) const { return min(S, i_last + hi + 1); }
  // Queries [0, L) that see some key of [j_first, j_last].
  __device__ __forceinline__ int first_query(int j_first) const { return max(0, j_first - hi); }
  __device__ __forceinline__ int end_query(int j_last, int L) const { return min(L, j_last - lo + 1); }
};

// ----------------------------------------------------------------------------------------------------- tiles, products
// A tile has rows of kD <= kPitch elements in shared memory. Rows of a tile are rows or columns of a product, and of
// every 16 keys the product has them in an order by which a lane's own are neighbours: its mask is read in one access.

enum class Order {
  queries,      // as they lie
  key_rows,     // row 8 h + g is key 2 g + h
  key_columns,  // column 8 n + 2 t + e is key 4 t + 2 n + e
};

template <int kD>
constexpr int kPitch = kD <= 64    ? 64
                       : kD <= 128 ? 128
                                   : 256;

template <Order kOrder>
__device__ __forceinline__ int in_order(int r) {
  switch (kOrder) {
    case Order::key_rows:
      return r % 8 * 2 + r / 8;
    case Order::key_columns:
      return r % 8 / 2 * 4 + r / 8 * 2 + r % 2;
    default:
      return r;
  }
}

// Of each row the 16-byte pieces are exchanged, c with c ^ bank(row), so that equal pieces of eight rows that ldmatrix
// reads together lie in different banks. A bit of `row` is a bit of bank(row) or has no effect.
template <Order kOrder>
__device__ __forceinline__ constexpr int bank(int row) {
  switch (kOrder) {
    case Order::key_rows:
      return row / 2 % 8;
    case Order::key_columns:
      return row / 4 % 4 * 2 + row % 2;
    default:
      return row % 8;
  }
}

template <int kD, Order kOrder>
__device__ __forceinline__ int piece_at(int row, int piece) {
  return row * kPitch<kD> + (piece ^ bank<kOrder>(row)) * 8;
}

// A thread's share of a tile of kRows rows: one piece of every kStep-th row.
template <int kD, int kRows, Order kOrder>
struct CopyShare {
  static constexpr int kPieces = kPitch<kD> / 8, kStep = kAttentionThreads / kPieces, kSteps = kRows / kStep;
  static_assert(kRows % kStep == 0);
  const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces, first = piece_at<kD, kOrder>(row, piece);

  __device__ __forceinline__ int at(int step) const {
    return (first ^ bank<kOrder>(step * kStep) * 8) + step * kStep * kPitch<kD>;
  }
};

// Starts copying rows [first, first + kRows) of `source`; rows from `end` on and columns from D on become zeros.
template <int kD, int kRows, Order kOrder, typename T>
__device__ __forceinline__ void copy_rows(T* tile, const T* source, int64_t stride, int first, int end, int D) {
  using Share = CopyShare<kD, kRows, kOrder>;
  const Share share;
  const T* from = source + (first + share.row) * stride + share.piece * 8;
  const int left = share.piece * 8 < D ? end - first - share.row : 0;
#pragma unroll
  for (int step = 0; step < Share::kSteps; ++step) {
    cp_async<16>(tile + share.at(step), from, step * Share::kStep < left);
    from += Share::kStep * stride;
  }
}

// A tile `offset` elements behind `base`; the offset may be known at run time only. Exclusive ors are taken of the
// offset: tiles at the same offset from different bases share them, and where the offset changes from step to step
// nothing of it stays in registers.
template <typename T>
struct Tile {
  const T* base;
  int offset;
};

// The address that the lane gives to ldmatrix x4, for columns 0 .. 15 of 16 rows. Left: matrices top left, bottom left,
// top right, bottom right. Right: top left, top right, bottom left, bottom right.
template <int kD, Order kOrder>
__device__ __forceinline__ int left_offset() {
  const int lane = threadIdx.x % kWarpSize;
  return piece_at<kD, kOrder>(in_order<kOrder>(lane % 16), lane / 16);
}
template <int kD, Order kOrder>
__device__ __forceinline__ int right_offset() {
  const int lane = threadIdx.x % kWarpSize;
  return piece_at<kD, kOrder>(in_order<kOrder>(lane / 16 * 8 + lane % 8), lane / 8 % 2);
}
// For columns c .. c + 15. Eight pieces further is 64 elements further, which costs no register.
__device__ __forceinline__ int at_column(int offset, int c) { return (offset ^ c % 64) + c / 64 * 64; }

// d += a b^T; a: 16 kM rows, b: 8 kN rows.
template <int kD, Order kA, Order kB, typename T, int kM, int kN>
__device__ __forceinline__ void multiply_rows(float (&d)[kM][kN][4], Tile<T> a, Tile<T> b) {
  const int left = a.offset + left_offset<kD, kA>(), right = b.offset + right_offset<kD, kB>();
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t ra[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ldmatrix<4, false>(ra[m], a.base + m * 16 * kPitch<kD> + at_column(left, 16 * k));
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t rb[4];
      ldmatrix<4, false>(rb, b.base + n * 8 * kPitch<kD> + at_column(right, 16 * k));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_16x8x16<T>(d[m][n], ra[m], {rb[0], rb[1]});
        mma_16x8x16<T>(d[m][n + 1], ra[m], {rb[2], rb[3]});
      }
    }
  }
}

// d += a b; a: a product that is rounded to T, b: as many rows as a has columns, in the order of these.
template <int kD, Order kB, typename T, int kM, int kN>
__device__ __forceinline__ void multiply_product(float (&d)[kM][kD / 8][4], const float (&a)[kM][kN][4], Tile<T> b) {
  const int left = b.offset + left_offset<kD, kB>();
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) {
    uint32_t ra[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = a[m][2 * k + i / 2];
        ra[m][i] = pack2<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kD / 8; n += 2) {
      uint32_t rb[4];
      ldmatrix<4, true>(rb, b.base + k * 16 * kPitch<kD> + at_column(left, 8 * n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_16x8x16<T>(d[m][n], ra[m], {rb[0], rb[1]});
        mma_16x8x16<T>(d[m][n + 1], ra[m], {rb[2], rb[3]});
      }
    }
  }
}

// Writes x[m][n][e] * factor(m, e / 2) to rows of a tensor: row(r) points to row r of the warp, or is null where there
// is none. By way of `tile`, 16 kM rows that only this warp uses.
template <int kD, Order kOrder, typename T, int kM, typename Factor, typename Row>
__device__ __forceinline__ void store_rows(const float (&x)[kM][kD / 8][4], Factor factor, T* tile, int D, Row row) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  sync_warp();  // the tile is free
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float by = factor(m, half);
      const int r = 16 * m + in_order<kOrder>(8 * half + g);
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        const uint32_t pair = pack2<T>(x[m][n][2 * half] * by, x[m][n][2 * half + 1] * by);
        memcpy(tile + piece_at<kD, kOrder>(r, n) + 2 * t, &pair, sizeof(pair));
      }
    }
  }
  sync_warp();
  constexpr int kPieces = kPitch<kD> / 8, kStep = kWarpSize / kPieces;
  const int piece = lane % kPieces;
#pragma unroll 4
  for (int r = lane / kPieces; r < 16 * kM; r += kStep) {
    T* to = row(r);
    if (to != nullptr && piece * 8 < D) {
      const auto bits = load_vec<4>(reinterpret_cast<const uint32_t*>(tile + piece_at<kD, kOrder>(r, piece)));
      store_vec(reinterpret_cast<uint32_t*>(to + piece * 8), bits);
    }
  }
}

// -------------------------------------------------------------------------------------------------------- block tables
// What a block needs to know of its rows or keys stands in shared memory: the registers are full of products.

// How a grid of blocks divides the work: by sequence, key head, tile of rows and part of the keys, the last one
// fastest. The rows of a key head are those of [heads that share it, queries]. Tiles count backwards: under a causal
// mask the last rows, which see most keys, should come first.
struct AttentionGrid {
  int tiles, splits, key_heads, group;
  bool whole_masks;  // four neighbouring keys of the mask are one access
};

struct BlockIndex {
  int split, tile, key_head;
  int64_t b;

  __device__ __forceinline__ explicit BlockIndex(const AttentionGrid& grid) {
    unsigned block = blockIdx.x;
    split = int(block % unsigned(grid.splits));
    block /= unsigned(grid.splits);
    tile = grid.tiles - 1 - int(block % unsigned(grid.tiles));
    block /= unsigned(grid.tiles);
    key_head = int(block % unsigned(grid.key_heads));
    b = block / unsigned(grid.key_heads);
  }
};

// Tiles of keys.
struct KeyRange {
  int first, end;
};

template <int kRows>
struct RowTable {
  int64_t row[kRows], mask[kRows];                                   // index among all rows; offset of the mask's row
  int head[kRows], query[kRows], first_key[kRows], last_key[kRows];  // the keys that the row sees
  float slope[kRows], sink[kRows];                                   // in base 2
  int count;                                                         // of rows that exist
  int open_first, open_end;                                          // the keys that all of them see

  // Rows from `first` on, of `rows`; those behind the last one stand for it. Returns the tiles of `keys` keys that some
  // row sees. A barrier must follow.
  template <typename T>
  __device__ __forceinline__ KeyRange fill(const AttentionParams<T>& p, const Sequence& seq, const Window& window,
                                           int first_head, int first, int rows, int keys) {
    static_assert(kRows <= kAttentionThreads);
    const int last = min(first + kRows, rows) - 1;
    const bool one_head = first / seq.L == last / seq.L;
    const int i_first = one_head ? first % seq.L : 0, i_last = one_head ? last % seq.L : seq.L - 1;
    const int r = threadIdx.x;
    if (r < kRows) {
      const int at = min(first + r, last), h = first_head + at / seq.L, i = at % seq.L;
      row[r] = seq.row + h * p.L + i;
      mask[r] = seq.b * p.mask_stride[0] + h * p.mask_stride[1] + i * p.mask_stride[2];
      head[r] = h;
      query[r] = i;
      first_key[r] = window.first_key(i);
      last_key[r] = window.end_key(i, seq.S) - 1;
      slope[r] = p.slopes == nullptr ? 0.0f : p.slopes[seq.b * p.H + h] * kLog2e;
      sink[r] = p.sinks == nullptr ? -kInfinity : base2(p.sinks[h]);
    }
    if (r == 0) {
      count = last - first + 1;
      open_first = i_last + window.lo;
      open_end = window.end_key(i_first, seq.S);
    }
    const int first_tile = window.first_key(i_first) / keys;
    return {first_tile, max(first_tile, (window.end_key(i_last, seq.S) + keys - 1) / keys)};
  }

  // Where row r of a tensor like q begins.
  template <typename E>
  __device__ __forceinline__ E* find(E* tensor, const AttentionStrides& stride, const Sequence& seq, int r) const {
    return seq.queries(tensor, stride, head[r]) + query[r] * stride.l;
  }

  // copy_rows().
  template <int kD, typename T>
  __device__ __forceinline__ void copy(T* tile, const T* tensor, const AttentionStrides& stride, const Sequence& seq,
                                       int D) const {
    using Share = CopyShare<kD, kRows, Order::queries>;
    const Share share;
#pragma unroll 4
    for (int step = 0; step < Share::kSteps; ++step) {
      const int r = share.row + step * Share::kStep;
      cp_async<16>(tile + share.at(step), find(tensor, stride, seq, r) + share.piece * 8,
                   r < count && share.piece * 8 < D);
    }
  }
};

struct KeyTable {
  Window window;
  int L;
  int open_first, open_end;  // the queries that see all of the keys

  // Keys [j_first, j_last]. A barrier must follow.
  __device__ __forceinline__ void fill(const Sequence& seq, const Window& from, int j_first, int j_last) {
    if (threadIdx.x != 0) return;
    window = from;
    L = seq.L;
    open_first = j_last - window.hi;
    open_end = window.end_query(j_first, seq.L);
  }
};

// -------------------------------------------------------------------------------------------------------------- places
// Which queries and keys the lane's elements of a product belong to, and what mask and dropout have for them.

template <int kM, int kN, typename F>
__device__ __forceinline__ void for_each_element(F f) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(m, n, e);
    }
  }
}

// Elements [column, column + kCount) of a row of the mask, which has `end`; what lies behind is something, because it
// is hidden and a branch per access would cost more. `whole`: one access, because `end` and all rows are multiples of
// four.
template <int kCount, typename A>
__device__ __forceinline__ void load_mask(const A* row, int column, int end, int64_t step, bool whole,
                                          A (&to)[kCount]) {
  constexpr int kBytes = kCount * sizeof(A);
  using Word = std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>;
  if (whole) {
    const A* from = row + min(column, end - kCount);
    const auto words = load_vec<kBytes / sizeof(Word)>(reinterpret_cast<const Word*>(from));
    constexpr int kWord = sizeof(Word), kElement = sizeof(A);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {  // by shifts, because a copy of the words becomes accesses to 16 bits
      const uint32_t bits = words[i * kElement / kWord] >> i * kElement % kWord * 8;
      memcpy(to + i, &bits, kElement);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = row[min(column + i, end - 1) * step];
  }
}

struct Seed {
  uint32_t key0, key1, stream, threshold;

  template <typename T>
  __device__ __forceinline__ explicit Seed(const AttentionParams<T>& p)
      : key0(uint32_t(p.seed[0])),
        key1(uint32_t(p.seed[0] >> 32)),
        stream(uint32_t(p.seed[1])),
        threshold(p.drop_threshold) {}

  // Bit i: dropout keeps key 4 group + i of a row.
  __device__ __forceinline__ uint32_t kept(int64_t row, int group) const {
    const Philox random = philox4x32_10(uint32_t(group), uint32_t(row), uint32_t(row >> 32), stream, key0, key1);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= uint32_t((random.lane[i] >> 8) >= threshold) << i;
    return bits;
  }
};

// Rows are queries, columns keys in Order::key_columns: of every 16 the lane has four neighbours.
template <typename T, int kM, int kRows>
class QueryRows {
 public:
  // `warp_row`: the warp's first row in the table.
  __device__ __forceinline__ QueryRows(const AttentionParams<T>& p, const RowTable<kRows>& table, int warp_row,
                                       bool whole_masks)
      : p_(p), table_(table), first_(warp_row + threadIdx.x % kWarpSize / 4), whole_(whole_masks) {}

  __device__ __forceinline__ void at_key(int first) { key_ = first + threadIdx.x % 4 * 4; }
  __device__ __forceinline__ int in_table(int m, int half) const { return first_ + 16 * m + 8 * half; }
  __device__ __forceinline__ int query(int m, int, int e) const { return table_.query[in_table(m, e / 2)]; }
  __device__ __forceinline__ int key(int, int n, int e) const { return key_ + from_key(n, e); }
  __device__ __forceinline__ float slope(int m, int, int e) const { return table_.slope[in_table(m, e / 2)]; }

  // Hides the keys that the window hides and those behind the last one.
  template <int kN>
  __device__ __forceinline__ void hide(float (&s)[kM][kN][4]) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = in_table(m, half), first = table_.first_key[r] - key_, last = table_.last_key[r] - key_;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (from_key(n, e) < first || from_key(n, e) > last) s[m][n][2 * half + e] = -kInfinity;
          }
        }
      }
    }
  }

  // Calls f(m, n, e, element of the mask).
  template <int kN, typename A, typename F>
  __device__ __forceinline__ void visit_mask(const A* mask, F f) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const A* const row = mask + table_.mask[in_table(m, half)];
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
          A part[4];
          load_mask(row, key_ + 8 * n, int(p_.max_k), p_.mask_stride[3], whole_, part);
#pragma unroll
          for (int i = 0; i < 4; ++i) f(m, n + i / 2, 2 * half + i % 2, part[i]);
        }
      }
    }
  }

  // Bit 4 n + e of bits[m]: dropout keeps element (m, n, e).
  template <int kN>
  __device__ __forceinline__ void kept(const Seed& seed, uint32_t (&bits)[kM]) const {
    static_assert(kN <= 8);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      bits[m] = 0;
#pragma unroll 1
      for (int i = 0; i < kN; ++i) {
        const int half = i % 2, n = i / 2 * 2;
        const uint32_t four = seed.kept(table_.row[in_table(m, half)], (key_ + 8 * n) / 4);
        bits[m] |= ((four & 3) | (four & 12) << 2) << (4 * n + 2 * half);
      }
    }
  }

 private:
  static __device__ __forceinline__ constexpr int from_key(int n, int e) { return n / 2 * 16 + n % 2 * 2 + e % 2; }

  const AttentionParams<T>& p_;
  const RowTable<kRows>& table_;
  const int first_;
  const bool whole_;
  int key_ = 0;
};

// Rows are keys in Order::key_rows: of every 16 the lane has two neighbours. Columns are queries of one head.
template <typename T, int kM>
class KeyRows {
 public:
  __device__ __forceinline__ KeyRows(const AttentionParams<T>& p, const Sequence& seq, const KeyTable& table, int first,
                                     bool whole_masks)
      : p_(p), seq_(seq), table_(table), key_(first + threadIdx.x % kWarpSize / 4 * 2), whole_(whole_masks) {}

  __device__ __forceinline__ void at_query(int head, int first) {
    head_ = head;
    query_ = first + threadIdx.x % 4 * 2;
  }
  __device__ __forceinline__ int query(int, int n, int e) const { return query_ + 8 * n + e % 2; }
  __device__ __forceinline__ int key(int m, int, int e) const { return key_ + 16 * m + e / 2; }
  __device__ __forceinline__ float slope(int, int, int) const { return p_.slopes[seq_.b * p_.H + head_] * kLog2e; }

  // Hides the queries that do not see the key and those behind the last one.
  template <int kN>
  __device__ __forceinline__ void hide(float (&s)[kM][kN][4]) const {
    const int lo = table_.window.lo, hi = table_.window.hi, end = table_.L;
    for_each_element<kM, kN>([&](int m, int n, int e) {
      const int i = query(m, n, e), distance = key(m, n, e) - i;
      if (distance < lo || distance > hi || i >= end) s[m][n][e] = -kInfinity;
    });
  }

  template <int kN, typename A, typename F>
  __device__ __forceinline__ void visit_mask(const A* mask, F f) const {
    mask += seq_.b * p_.mask_stride[0] + head_ * p_.mask_stride[1];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const A* const row = mask + min(query(0, n, odd), table_.L - 1) * p_.mask_stride[2];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          A part[2];
          load_mask(row, key_ + 16 * m, int(p_.max_k), p_.mask_stride[3], whole_, part);
          f(m, n, odd, part[0]);
          f(m, n, odd + 2, part[1]);
        }
      }
    }
  }

  // As in QueryRows. Two neighbouring lanes of a column need the same two groups, two queries by four keys: each makes
  // one of them.
  template <int kN>
  __device__ __forceinline__ void kept(const Seed& seed, uint32_t (&bits)[kM]) const {
    static_assert(kN <= 8);
    const int odd = threadIdx.x / 4 % 2;
    const int64_t row = seq_.row + head_ * p_.L + query_ + odd;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t own = 0;
#pragma unroll 1
      for (int n = 0; n < kN; ++n) own |= seed.kept(row + 8 * n, key_ / 4 + 4 * m) << 4 * n;
      const uint32_t other = shfl_xor(own, 4);
      const uint32_t first = (odd ? other : own) >> 2 * odd & 0x33333333u;
      const uint32_t second = (odd ? own : other) >> 2 * odd & 0x33333333u;
      // Bits 0 and 1, the two keys, to bits 0 and 2 for the first query and to 1 and 3 for the second.
      bits[m] = ((first | first << 1) & 0x55555555u) | ((second << 1 | second << 2) & 0xaaaaaaaau);
    }
  }

 private:
  const AttentionParams<T>& p_;
  const Sequence& seq_;
  const KeyTable& table_;
  const int key_;
  const bool whole_;
  int head_ = 0, query_ = 0;
};

// -------------------------------------------------------------------------------------------------------------- scores

// Calls f(m, n, e, bias) with an additive mask.
template <int kN, typename T, typename Place, typename F>
__device__ __forceinline__ void visit_bias(const AttentionParams<T>& p, const Place& at, F f) {
  if (p.mask_kind == AttentionMask::wide) {
    at.template visit_mask<kN>(static_cast<const float*>(p.mask), f);
  } else {
    at.template visit_mask<kN>(static_cast<const T*>(p.mask),
                               [&](int m, int n, int e, T bias) { f(m, n, e, to_acc(bias)); });
  }
}

// Products q . k to scores in base 2, with everything but the window. capped(m, n, e, c) is told the quotient
// c = capped / softcap where there is a softcap.
template <typename T, typename Place, int kM, int kN, typename F>
__device__ __forceinline__ void make_scores(float (&s)[kM][kN][4], const AttentionParams<T>& p, const Place& at,
                                            int offset, F capped) {
  if (p.softcap > 0) {
    const float inner = p.scale / p.softcap, outer = p.softcap * kLog2e;
    for_each_element<kM, kN>([&](int m, int n, int e) {
      const float c = tanhf(s[m][n][e] * inner);
      capped(m, n, e, c);
      s[m][n][e] = c * outer;
    });
  } else {
    const float scale = p.scale * kLog2e;
    for_each_element<kM, kN>([&](int m, int n, int e) { s[m][n][e] *= scale; });
  }
  if (p.slopes != nullptr) {
    for_each_element<kM, kN>([&](int m, int n, int e) {
      s[m][n][e] -= at.slope(m, n, e) * float(abs(at.query(m, n, e) + offset - at.key(m, n, e)));
    });
  }
  if (p.mask_kind == AttentionMask::boolean) {
    at.template visit_mask<kN>(static_cast<const uint8_t*>(p.mask), [&](int m, int n, int e, uint8_t visible) {
      if (visible == 0) s[m][n][e] = -kInfinity;
    });
  } else if (p.mask_kind != AttentionMask::none) {
    visit_bias<kN>(p, at, [&](int m, int n, int e, float bias) { s[m][n][e] += base2(bias); });
  }
}

// ----------------------------------------------------------------------------------------------------------- gradients

// What backward needs of a row, in its workspace. Zeros make everything of the row vanish.
struct alignas(16) RowStats {
  float m2, inverse_l, delta, unused;
};

// s, the products q . k, becomes P; dp, the products dout . v, becomes dS, the gradient of s before the softcap, or of
// the bias when kOfBias. stats(m, n, e) are those of the element's row; `kept` is set where there is dropout.
template <bool kPlain, bool kOfBias, typename T, typename Place, int kM, int kN, typename Stats>
__device__ __forceinline__ void make_gradients(float (&s)[kM][kN][4], float (&dp)[kM][kN][4], uint32_t (&kept)[kM],
                                               const AttentionParams<T>& p, const Place& at, int offset, bool boundary,
                                               Stats stats) {
  if constexpr (!kPlain) {
    if (p.seed != nullptr) {
      at.template kept<kN>(Seed(p), kept);
      for_each_element<kM, kN>([&](int m, int n, int e) {
        dp[m][n][e] = kept[m] >> (4 * n + e) & 1 ? dp[m][n][e] * p.dropout_scale : 0.0f;
      });
    }
    for_each_element<kM, kN>([&](int m, int n, int e) { dp[m][n][e] -= stats(m, n, e).delta; });
    make_scores(s, p, at, offset, [&](int m, int n, int e, float c) {
      if constexpr (!kOfBias) dp[m][n][e] *= 1.0f - c * c;
    });
  }
  if (boundary) at.hide(s);
  const float factor = kPlain ? p.scale * kLog2e : 1.0f;
  for_each_element<kM, kN>([&](int m, int n, int e) {
    const RowStats row = stats(m, n, e);
    s[m][n][e] = exp2_flushed(fmaf(s[m][n][e], factor, -row.m2)) * row.inverse_l;
    dp[m][n][e] = s[m][n][e] * (kPlain ? dp[m][n][e] - row.delta : dp[m][n][e]);
  });
}

}  // namespace pyops
