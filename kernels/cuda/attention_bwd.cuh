// Backward kernels. attention.cu has the overview.
#pragma once

#include "attention_common.cuh"

namespace pyops {

// The workspace: RowStats of every row, then the parts of dmask.
template <typename T>
__device__ __forceinline__ RowStats* row_stats(const AttentionBwdParams<T>& p) {
  return reinterpret_cast<RowStats*>(p.workspace);
}

// delta = dout . (out + residue) - dlse of each row. kRowLanes threads share a row.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_bwd_rows_kernel(const __grid_constant__ AttentionBwdParams<T> p) {
  const int64_t rows = row_count(p);
  const int64_t row = (int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x) / kRowLanes;
  const int lane = threadIdx.x % kRowLanes;
  float delta = 0;
  if (row < rows) {
    const T* out = find_row(p, p.out, p.out_stride, row);
    const T* dout = find_row(p, p.dout, p.dout_stride, row);
    const T* residue = p.residue == nullptr ? nullptr : find_row(p, p.residue, p.residue_stride, row);
    for (int d = lane * 8; d < p.Dv; d += kRowLanes * 8) {
      const Vec<uint32_t, 4> a = load_vec<4>(reinterpret_cast<const uint32_t*>(out + d));
      const Vec<uint32_t, 4> b = load_vec<4>(reinterpret_cast<const uint32_t*>(dout + d));
      Vec<uint32_t, 4> c{};
      if (residue != nullptr) c = load_vec<4>(reinterpret_cast<const uint32_t*>(residue + d));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        delta += (low<T>(a[i]) + low<T>(c[i])) * low<T>(b[i]);
        delta += (high<T>(a[i]) + high<T>(c[i])) * high<T>(b[i]);
      }
    }
  }
  delta = warp_reduce_sum(delta, kRowLanes);
  if (lane != 0 || row >= rows) return;
  if (p.dlse != nullptr) delta -= p.dlse[row];
  const float m2 = p.stats[row], l = p.stats[rows + row];
  const Vec<float, 4> stats{m2 == -kInfinity ? 0.0f : m2, l == 0 ? 0.0f : 1.0f / l, delta, 0.0f};
  store_vec(reinterpret_cast<float*>(row_stats(p) + row), stats);
}

// ------------------------------------------------------------------------------------------------------------------ dq

template <int kD>
struct DqPlan {
  static constexpr int kM = kD <= 64 ? 2 : 1;  // fragments of 16 rows to a warp
  static constexpr int kQueries = 16 * kM * kAttentionWarps;
  static constexpr int kKeys = kPitch<kD> == 256 ? 16 : 32;
  static constexpr int kStages = 2;                          // pairs of tiles of keys and values
  static constexpr int kBlocks = kPitch<kD> == 128 ? 3 : 2;  // to a multiprocessor, as far as registers go
};

template <typename T, int kD>
struct DqStorage {
  using Plan = DqPlan<kD>;
  static constexpr int kTile = Plan::kKeys * kPitch<kD>, kDout = Plan::kQueries * kPitch<kD>, kRing = 2 * kDout;
  alignas(16) T tiles[kRing + Plan::kStages * 2 * kTile];  // q, dout, then a ring of keys and values
  RowTable<Plan::kQueries> rows;
};

template <typename T, int kD, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, DqPlan<kD>::kBlocks)
    attention_bwd_dq_kernel(const __grid_constant__ AttentionBwdParams<T> p,
                            const __grid_constant__ AttentionGrid grid) {
  using Plan = DqPlan<kD>;
  using Storage = DqStorage<T, kD>;
  constexpr int kM = Plan::kM, kN = Plan::kKeys / 8, kKeys = Plan::kKeys, kStages = Plan::kStages;
  Storage& shared = shared_storage<Storage>();
  T* const ring = shared.tiles + Storage::kRing;
  const auto place = [](int step) { return step % kStages * 2 * Storage::kTile; };  // in the ring

  const BlockIndex block(grid);
  const Sequence seq(p, block.b);
  const int rows = grid.group * seq.L, first_row = block.tile * Plan::kQueries;
  if (first_row >= rows) return;
  const Window window(p, seq);
  const KeyRange keys = shared.rows.fill(p, seq, window, block.key_head * grid.group, first_row, rows, kKeys);
  sync_block();
  const int steps = keys.end - keys.first;

  const T* k = seq.keys(p.k, p.k_stride, block.key_head);
  const T* v = seq.keys(p.v, p.v_stride, block.key_head);
  const auto copy = [&](int step) {
    if (step < steps) {
      T* to = ring + place(step);
      const int first = (keys.first + step) * kKeys;
      copy_rows<kD, kKeys, Order::key_columns>(to, k, p.k_stride.l, first, seq.S, int(p.D));
      copy_rows<kD, kKeys, Order::key_columns>(to + Storage::kTile, v, p.v_stride.l, first, seq.S, int(p.Dv));
    }
    cp_async_commit();
  };
  if (steps > 0) {
    shared.rows.template copy<kD>(shared.tiles, p.q, p.q_stride, seq, int(p.D));
    shared.rows.template copy<kD>(shared.tiles + Storage::kDout, p.dout, p.dout_stride, seq, int(p.Dv));
  }
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy(step);

  const int warp_row = threadIdx.x / kWarpSize * 16 * kM;
  QueryRows<T, kM, Plan::kQueries> at(p, shared.rows, warp_row, grid.whole_masks);
  RowStats stats[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) stats[m][half] = row_stats(p)[shared.rows.row[at.in_table(m, half)]];
  }
  float dq[kM][kD / 8][4] = {};

  for (int step = 0; step < steps; ++step) {
    const int j = (keys.first + step) * kKeys;
    at.at_key(j);
    cp_async_wait<kStages - 2>();
    sync_block();
    copy(step + kStages - 1);

    // s = q k^T, dp = dout v^T  [kQueries, kKeys]
    float s[kM][kN][4] = {}, dp[kM][kN][4] = {};
    uint32_t kept[kM];
    const int rows_at = warp_row * kPitch<kD>, keys_at = place(step);
    multiply_rows<kD, Order::queries, Order::key_columns, T>(s, {shared.tiles, rows_at}, {ring, keys_at});
    multiply_rows<kD, Order::queries, Order::key_columns, T>(dp, {shared.tiles + Storage::kDout, rows_at},
                                                             {ring + Storage::kTile, keys_at});
    const bool boundary = j < shared.rows.open_first || j + kKeys > shared.rows.open_end;
    make_gradients<kPlain, false>(s, dp, kept, p, at, window.offset, boundary,
                                  [&](int m, int, int e) { return stats[m][e / 2]; });
    // dq += dS k  [kQueries, kD]
    multiply_product<kD, Order::key_columns, T>(dq, dp, {ring, keys_at});
  }

  const int count = shared.rows.count;
  store_rows<kD, Order::queries>(
      dq, [&](int, int) { return p.scale; }, shared.tiles + warp_row * kPitch<kD>, int(p.D),
      [&](int r) -> T* {
        return warp_row + r < count ? shared.rows.find(p.dq, p.dq_stride, seq, warp_row + r) : nullptr;
      });
}

// ----------------------------------------------------------------------------------------------------------- dk and dv

// A tile of queries of one of the heads that share keys.
struct QueryTile {
  int head, tile;
};

enum class KeyGradient { both, of_keys, of_values };

// Large head sizes take two kernels, because dk and dv together do not fit in the registers.
template <int kD, bool kPlain, KeyGradient kWhich>
struct DkvPlan {
  static constexpr bool kOfKeys = kWhich != KeyGradient::of_values, kOfValues = kWhich != KeyGradient::of_keys;
  static constexpr int kM = kD <= 64 && kPlain ? 2 : 1;  // fragments of 16 keys to a warp
  static constexpr int kKeys = 16 * kM * kAttentionWarps;
  static constexpr int kQueries = kPitch<kD> == 256 ? 16 : 32;
  static constexpr int kStages = 2;  // pairs of tiles of q and dout
};

template <typename T, int kD, typename Plan>
struct DkvStorage {
  static constexpr int kTile = Plan::kQueries * kPitch<kD>, kValues = Plan::kKeys * kPitch<kD>;
  static constexpr int kRing = kValues * (Plan::kOfKeys ? 2 : 1);  // dv alone does without the values
  alignas(16) T tiles[kRing + Plan::kStages * 2 * kTile];          // keys, values, then a ring of q and dout
  RowStats stats[Plan::kStages][Plan::kQueries];
  QueryTile queries[Plan::kStages];
  KeyTable keys;
};

template <typename T, int kD, bool kPlain, KeyGradient kWhich>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_bwd_dkv_kernel(const __grid_constant__ AttentionBwdParams<T> p,
                             const __grid_constant__ AttentionGrid grid) {
  using Plan = DkvPlan<kD, kPlain, kWhich>;
  using Storage = DkvStorage<T, kD, Plan>;
  constexpr int kM = Plan::kM, kN = Plan::kQueries / 8, kQueries = Plan::kQueries, kStages = Plan::kStages;
  Storage& shared = shared_storage<Storage>();
  T* const ring = shared.tiles + Storage::kRing;
  const auto place = [](int step) { return step % kStages * 2 * Storage::kTile; };  // in the ring

  // Under a causal mask most queries see the first keys: these come first.
  const BlockIndex block(grid);
  const Sequence seq(p, block.b);
  const int j_first = (grid.tiles - 1 - block.tile) * Plan::kKeys;
  if (j_first >= seq.S) return;
  const Window window(p, seq);
  const int j_last = min(j_first + Plan::kKeys, seq.S) - 1;
  const int first_tile = window.first_query(j_first) / kQueries;
  const int end_tile = max(first_tile, (window.end_query(j_last, seq.L) + kQueries - 1) / kQueries);
  const int steps = (end_tile - first_tile) * grid.group;
  shared.keys.fill(seq, window, j_first, j_last);

  QueryTile next{block.key_head * grid.group, first_tile};
  const auto copy = [&](int step) {
    if (step < steps) {
      T* to = ring + place(step);
      const T* q = seq.queries(p.q, p.q_stride, next.head);
      const T* dout = seq.queries(p.dout, p.dout_stride, next.head);
      const int first = next.tile * kQueries, r = threadIdx.x;
      copy_rows<kD, kQueries, Order::queries>(to, q, p.q_stride.l, first, seq.L, int(p.D));
      copy_rows<kD, kQueries, Order::queries>(to + Storage::kTile, dout, p.dout_stride.l, first, seq.L, int(p.Dv));
      if (r < kQueries) {
        cp_async<16>(&shared.stats[step % kStages][r], row_stats(p) + seq.row + next.head * p.L + first + r,
                     first + r < seq.L);
      }
      if (r == 0) shared.queries[step % kStages] = next;
      if (++next.tile == end_tile) next = {next.head + 1, first_tile};
    }
    cp_async_commit();
  };
  if (steps > 0) {
    const T* k = seq.keys(p.k, p.k_stride, block.key_head);
    const T* v = seq.keys(p.v, p.v_stride, block.key_head);
    copy_rows<kD, Plan::kKeys, Order::key_rows>(shared.tiles, k, p.k_stride.l, j_first, seq.S, int(p.D));
    if constexpr (Plan::kOfKeys) {
      copy_rows<kD, Plan::kKeys, Order::key_rows>(shared.tiles + Storage::kValues, v, p.v_stride.l, j_first, seq.S,
                                                  int(p.Dv));
    }
  }
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy(step);

  const int warp_row = threadIdx.x / kWarpSize * 16 * kM;
  KeyRows<T, kM> at(p, seq, shared.keys, j_first + warp_row, grid.whole_masks);
  float dk[kM][kD / 8][4] = {}, dv[kM][kD / 8][4] = {};

  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    sync_block();
    copy(step + kStages - 1);
    const int i = shared.queries[step % kStages].tile * kQueries;
    at.at_query(shared.queries[step % kStages].head, i);

    // s = k q^T, dp = v dout^T  [kKeys, kQueries]
    float s[kM][kN][4] = {}, dp[kM][kN][4] = {};
    uint32_t kept[kM];
    const int rows_at = warp_row * kPitch<kD>, queries_at = place(step);
    multiply_rows<kD, Order::key_rows, Order::queries, T>(s, {shared.tiles, rows_at}, {ring, queries_at});
    if constexpr (Plan::kOfKeys) {
      multiply_rows<kD, Order::key_rows, Order::queries, T>(dp, {shared.tiles + Storage::kValues, rows_at},
                                                            {ring + Storage::kTile, queries_at});
    }
    const bool boundary = i < shared.keys.open_first || i + kQueries > shared.keys.open_end;
    const RowStats* stats = shared.stats[step % kStages] + threadIdx.x % 4 * 2;
    make_gradients<kPlain, false>(s, dp, kept, p, at, window.offset, boundary,
                                  [&](int, int n, int e) { return stats[8 * n + e % 2]; });
    // dk += dS^T q, dv += P'^T dout  [kKeys, kD]
    if constexpr (Plan::kOfKeys) multiply_product<kD, Order::queries, T>(dk, dp, {ring, queries_at});
    if constexpr (Plan::kOfValues) {
      if (!kPlain && p.seed != nullptr) {
        for_each_element<kM, kN>([&](int m, int n, int e) {
          if ((kept[m] >> (4 * n + e) & 1) == 0) s[m][n][e] = 0;
        });
      }
      multiply_product<kD, Order::queries, T>(dv, s, {ring + Storage::kTile, queries_at});
    }
  }

  const auto row = [&](T* tensor, const AttentionStrides& stride, int r) -> T* {
    const int j = j_first + warp_row + r;
    return j < seq.S ? seq.keys(tensor, stride, block.key_head) + j * stride.l : nullptr;
  };
  T* const tile = shared.tiles + warp_row * kPitch<kD>;
  if (Plan::kOfKeys && p.dk != nullptr) {
    store_rows<kD, Order::key_rows>(
        dk, [&](int, int) { return p.scale; }, tile, int(p.D), [&](int r) { return row(p.dk, p.dk_stride, r); });
  }
  if (Plan::kOfValues && p.dv != nullptr) {
    store_rows<kD, Order::key_rows>(
        dv, [&](int, int) { return p.seed == nullptr ? 1.0f : p.dropout_scale; }, tile, int(p.Dv),
        [&](int r) { return row(p.dv, p.dv_stride, r); });
  }
}

// --------------------------------------------------------------------------------------------------------------- dmask
// A block owns a tile of dmask, kMaskTile queries and keys, or one row where dmask has one for all queries, and adds up
// dS of the sequences, heads and tiles of queries that share it. Where there are few tiles, `parts` blocks divide that
// work, and a second kernel adds up what they leave in the workspace: [parts, tiles, kMaskTile, kMaskTile].

constexpr int kMaskTile = 64;
constexpr int kMaskStages = 4;  // pairs of tiles of at most kMaskTile columns of q and k, or of dout and v

struct MaskGrid {
  int parts, key_tiles, query_tiles, heads, batches;  // of dmask
  int shared_tiles, shared_heads, shared_batches;     // by each tile of dmask
  bool whole_masks;
  __host__ __device__ __forceinline__ int64_t tiles() const {
    return int64_t(key_tiles) * query_tiles * heads * batches;
  }
};

template <typename T>
struct MaskStorage {
  static constexpr int kTile = kMaskTile * kMaskTile;
  alignas(16) T tiles[kMaskStages * 2 * kTile];
  RowTable<kMaskTile> rows;
  float sums[kAttentionWarps][kMaskTile];
};

template <typename T>
__device__ __forceinline__ float* mask_parts(const AttentionBwdParams<T>& p) {
  return reinterpret_cast<float*>(row_stats(p) + row_count(p));
}

template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_bwd_dmask_kernel(const __grid_constant__ AttentionBwdParams<T> p, const __grid_constant__ MaskGrid grid) {
  using Storage = MaskStorage<T>;
  constexpr int kN = kMaskTile / 8;
  Storage& shared = shared_storage<Storage>();
  const auto place = [](int step) { return step % kMaskStages * 2 * Storage::kTile; };

  const unsigned tile = blockIdx.x / unsigned(grid.parts), part = blockIdx.x % unsigned(grid.parts);
  const int j_first = int(tile % unsigned(grid.key_tiles)) * kMaskTile;
  const unsigned above = tile / unsigned(grid.key_tiles);
  const int own_tile = int(above % unsigned(grid.query_tiles));
  const int own_head = int(above / unsigned(grid.query_tiles) % unsigned(grid.heads));
  const int own_batch = int(above / unsigned(grid.query_tiles) / unsigned(grid.heads));
  const int64_t items = int64_t(grid.shared_tiles) * grid.shared_heads * grid.shared_batches;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warp_row = warp * 16;
  const int q_steps = int(p.D + kMaskTile - 1) / kMaskTile, steps = q_steps + int(p.Dv + kMaskTile - 1) / kMaskTile;
  QueryRows<T, 1, kMaskTile> at(p, shared.rows, warp_row, grid.whole_masks);
  at.at_key(j_first);
  float sum[1][kN][4] = {};

  for (int64_t item = items * part / grid.parts; item < items * (part + 1) / grid.parts; ++item) {
    const int i_first = (own_tile + int(item % grid.shared_tiles)) * kMaskTile;
    const int h = own_head + int(item / grid.shared_tiles % grid.shared_heads);
    const Sequence seq(p, own_batch + item / grid.shared_tiles / grid.shared_heads);
    if (i_first >= seq.L || j_first >= seq.S) continue;
    const Window window(p, seq);
    const int i_last = min(i_first + kMaskTile, seq.L) - 1;
    if (window.first_key(i_first) >= j_first + kMaskTile || window.end_key(i_last, seq.S) <= j_first) continue;
    sync_block();  // nobody reads the last item's tiles and rows any more
    shared.rows.fill(p, seq, window, h, i_first, seq.L, kMaskTile);

    const int64_t key_head = h / (p.H / p.Hk);
    const auto copy_pair = [&](T* to, const T* a, int64_t a_stride, const T* b, int64_t b_stride, int column, int D) {
      copy_rows<kMaskTile, kMaskTile, Order::queries>(to, a + column, a_stride, i_first, seq.L, D - column);
      copy_rows<kMaskTile, kMaskTile, Order::key_columns>(to + Storage::kTile, b + column, b_stride, j_first, seq.S,
                                                          D - column);
    };
    const auto copy = [&](int step) {
      T* to = shared.tiles + place(step);
      if (step < q_steps) {
        copy_pair(to, seq.queries(p.q, p.q_stride, h), p.q_stride.l, seq.keys(p.k, p.k_stride, key_head), p.k_stride.l,
                  step * kMaskTile, int(p.D));
      } else if (step < steps) {
        copy_pair(to, seq.queries(p.dout, p.dout_stride, h), p.dout_stride.l, seq.keys(p.v, p.v_stride, key_head),
                  p.v_stride.l, (step - q_steps) * kMaskTile, int(p.Dv));
      }
      cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < kMaskStages - 1; ++step) copy(step);

    float s[1][kN][4] = {}, dp[1][kN][4] = {};
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kMaskStages - 2>();
      sync_block();
      copy(step + kMaskStages - 1);
      const Tile<T> a{shared.tiles, place(step) + warp_row * kMaskTile}, b{shared.tiles + Storage::kTile, place(step)};
      if (step < q_steps) {
        multiply_rows<kMaskTile, Order::queries, Order::key_columns>(s, a, b);
      } else {
        multiply_rows<kMaskTile, Order::queries, Order::key_columns>(dp, a, b);
      }
    }

    RowStats stats[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      stats[half] = {};
      if (at.in_table(0, half) < shared.rows.count) stats[half] = row_stats(p)[shared.rows.row[at.in_table(0, half)]];
    }
    uint32_t kept[1];
    const bool boundary = j_first < shared.rows.open_first || j_first + kMaskTile > shared.rows.open_end;
    make_gradients<false, true>(s, dp, kept, p, at, window.offset, boundary,
                                [&](int, int, int e) { return stats[e / 2]; });
    // A bias of +inf has no gradient. Where there is one, m2 is at least 2^100.
    if (stats[0].m2 >= 0x1p99f || stats[1].m2 >= 0x1p99f) {
      visit_bias<kN>(p, at, [&](int m, int n, int e, float bias) {
        if (bias == kInfinity) dp[m][n][e] = 0;
      });
    }
    for_each_element<1, kN>([&](int m, int n, int e) { sum[m][n][e] += dp[m][n][e]; });
  }

  const bool one_row = p.dmask_stride[2] == 0;
  if (one_row) {
    for_each_element<1, kN>([&](int, int n, int e) {
      if (e >= 2) return;
      float column = sum[0][n][e] + sum[0][n][e + 2];
#pragma unroll
      for (int distance = 4; distance < kWarpSize; distance *= 2) column += shfl_xor(column, distance);
      if (lane < 4) shared.sums[warp][at.key(0, n, e) - j_first] = column;
    });
    sync_block();
  }
  // Element (i, j) of the tile.
  const auto store = [&](int i, int j, float value) {
    if (grid.parts > 1) {
      mask_parts(p)[((part * grid.tiles() + tile) * kMaskTile + i) * kMaskTile + j] = value;
    } else if (own_tile * kMaskTile + i < (one_row ? 1 : p.max_q) && j_first + j < p.max_k) {
      p.dmask[own_batch * p.dmask_stride[0] + own_head * p.dmask_stride[1] +
              (own_tile * kMaskTile + i) * p.dmask_stride[2] + j_first + j] = value;
    }
  };
  if (!one_row) {
    for_each_element<1, kN>([&](int m, int n, int e) {
      store(warp_row + lane / 4 + 8 * (e / 2), at.key(m, n, e) - j_first, sum[m][n][e]);
    });
  } else if (threadIdx.x < kMaskTile) {
    float value = 0;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) value += shared.sums[w][threadIdx.x];
    store(0, threadIdx.x, value);
  }
}

// Adds the parts of dmask up, in their order.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_bwd_dmask_reduce_kernel(const __grid_constant__ AttentionBwdParams<T> p,
                                      const __grid_constant__ MaskGrid grid) {
  const int64_t rows = p.dmask_stride[2] == 0 ? 1 : p.max_q;
  const int64_t at = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (at >= grid.batches * grid.heads * rows * p.max_k) return;
  const int64_t j = at % p.max_k, i = at / p.max_k % rows, head_and_batch = at / p.max_k / rows;
  const int64_t tile = (head_and_batch * grid.query_tiles + i / kMaskTile) * grid.key_tiles + j / kMaskTile;
  const float* from = mask_parts(p) + (tile * kMaskTile + i % kMaskTile) * kMaskTile + j % kMaskTile;
  float sum = 0;
  for (int part = 0; part < grid.parts; ++part) sum += from[part * grid.tiles() * kMaskTile * kMaskTile];
  p.dmask[at] = sum;
}

}  // namespace pyops
