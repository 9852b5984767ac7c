// Forward kernels. attention.cu has the overview.
#pragma once

#include "attention_common.cuh"

namespace pyops {

// Sizes of a block's tiles. kSmall is for few queries, where reading the keys takes all the time there is.
template <int kD, bool kPlain, bool kSmall>
struct FwdPlan {
  static constexpr int kM = kPitch<kD> == 256 || kSmall ? 1 : 2;  // fragments of 16 rows to a warp
  static constexpr int kQueries = 16 * kM * kAttentionWarps;
  static constexpr int kKeys = kM == 1 ? 64 : !kPlain ? 32 : kPitch<kD> == 128 ? 48 : 64;
  // Tiles of keys or values, as many as leave room for two blocks on compute capability 8.0, up to kD = 128.
  static constexpr int kStages = kPitch<kD> == 256 ? 2 : kPitch<kD> == 128 && (kPlain || kSmall) ? 3 : 4;
  static constexpr int kBlocks =
      kD <= 32 || (kD <= 64 && kSmall) ? 3 : 2;  // to a multiprocessor, as far as registers go
};

template <typename T, int kD, typename Plan>
struct FwdStorage {
  static constexpr int kTile = Plan::kKeys * kPitch<kD>, kRing = Plan::kQueries * kPitch<kD>;
  alignas(16) T tiles[kRing + Plan::kStages * kTile];  // queries, then a ring of keys and values
  RowTable<Plan::kQueries> rows;
};

// Workspace of a call that is split: [splits, rows, Dv] of sums of values, then [splits, rows, 2] of m2 and l.

template <typename T, int kD, bool kPlain, bool kSmall>
__global__ void __launch_bounds__(kAttentionThreads, FwdPlan<kD, kPlain, kSmall>::kBlocks)
    attention_fwd_kernel(const __grid_constant__ AttentionFwdParams<T> p, const __grid_constant__ AttentionGrid grid) {
  using Plan = FwdPlan<kD, kPlain, kSmall>;
  using Storage = FwdStorage<T, kD, Plan>;
  constexpr int kM = Plan::kM, kN = Plan::kKeys / 8, kKeys = Plan::kKeys, kStages = Plan::kStages;
  Storage& shared = shared_storage<Storage>();
  T* const ring = shared.tiles + Storage::kRing;
  const auto place = [](int n) { return n % kStages * Storage::kTile; };  // in the ring

  const BlockIndex block(grid);
  const Sequence seq(p, block.b);
  const int split = block.split, rows = grid.group * seq.L, first_row = block.tile * Plan::kQueries;
  if (first_row >= rows) return;
  const Window window(p, seq);
  const KeyRange keys = shared.rows.fill(p, seq, window, block.key_head * grid.group, first_row, rows, kKeys);
  sync_block();
  const int from = keys.first + (keys.end - keys.first) * split / grid.splits;
  const int steps = keys.first + (keys.end - keys.first) * (split + 1) / grid.splits - from;

  // Half step n takes the keys, then the values of tile from + n / 2.
  const T* k = seq.keys(p.k, p.k_stride, block.key_head);
  const T* v = seq.keys(p.v, p.v_stride, block.key_head);
  const auto copy = [&](int n) {
    if (n < 2 * steps) {
      T* to = ring + place(n);
      const int first = (from + n / 2) * kKeys;
      if (n % 2 == 0) {
        copy_rows<kD, kKeys, Order::key_columns>(to, k, p.k_stride.l, first, seq.S, int(p.D));
      } else {
        copy_rows<kD, kKeys, Order::key_columns>(to, v, p.v_stride.l, first, seq.S, int(p.Dv));
      }
    }
    cp_async_commit();
  };
  const auto arrive = [&](int n) {
    cp_async_wait<kStages - 2>();
    sync_block();
    copy(n + kStages - 1);
  };
  if (steps > 0) shared.rows.template copy<kD>(shared.tiles, p.q, p.q_stride, seq, int(p.D));
#pragma unroll
  for (int n = 0; n < kStages - 1; ++n) copy(n);

  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * 16 * kM;
  QueryRows<T, kM, Plan::kQueries> at(p, shared.rows, warp_row, grid.whole_masks);
  float o[kM][kD / 8][4] = {}, m2[kM][2], l[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m2[m][half] = split == 0 ? shared.rows.sink[at.in_table(m, half)] : -kInfinity;
      l[m][half] = lane % 4 == 0 && m2[m][half] > -kInfinity ? 1.0f : 0.0f;  // the lanes' parts are added up later
    }
  }
  const float factor = kPlain ? p.scale * kLog2e : 1.0f;

  for (int step = 0; step < steps; ++step) {
    const int j = (from + step) * kKeys;
    at.at_key(j);

    // s = q k^T  [kQueries, kKeys]
    arrive(2 * step);
    float s[kM][kN][4] = {};
    multiply_rows<kD, Order::queries, Order::key_columns, T>(s, {shared.tiles, warp_row * kPitch<kD>},
                                                             {ring, place(2 * step)});
    if constexpr (!kPlain) make_scores(s, p, at, window.offset, [](int, int, int, float) {});
    if (j < shared.rows.open_first || j + kKeys > shared.rows.open_end) at.hide(s);

    // p = exp2(s - m2), in the place of s
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = s[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        top = fmaxf(top, shfl_xor(top, 1));
        top = fmaxf(top, shfl_xor(top, 2));
        const float before = m2[m][half], now = fmaxf(before, top * factor);
        const float base = now == -kInfinity ? 0.0f : now, shrink = exp2_flushed(before - base);
        m2[m][half] = now;
        l[m][half] *= shrink;
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          o[m][n][2 * half] *= shrink;
          o[m][n][2 * half + 1] *= shrink;
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[m][n][e] = exp2_flushed(fmaf(s[m][n][e], factor, -base));
            l[m][half] += s[m][n][e];
          }
        }
      }
    }
    if (!kPlain && p.seed != nullptr) {
      uint32_t kept[kM];
      at.template kept<kN>(Seed(p), kept);
      for_each_element<kM, kN>([&](int m, int n, int e) {
        if ((kept[m] >> (4 * n + e) & 1) == 0) s[m][n][e] = 0;
      });
    }

    // o += p v  [kQueries, kD]
    arrive(2 * step + 1);
    multiply_product<kD, Order::key_columns, T>(o, s, {ring, place(2 * step + 1)});
  }

  const int64_t all_rows = row_count(p);
  const int count = shared.rows.count;
  float scale[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[m][half] += shfl_xor(l[m][half], 1);
      l[m][half] += shfl_xor(l[m][half], 2);
      scale[m][half] = (l[m][half] == 0 ? 0.0f : reciprocal(l[m][half])) * (p.seed == nullptr ? 1.0f : p.dropout_scale);
    }
  }
  if (grid.splits == 1) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = at.in_table(m, half);
        if (lane % 4 == 0 && r < count) {
          const int64_t row = shared.rows.row[r];
          p.stats[row] = m2[m][half];
          p.stats[all_rows + row] = l[m][half];
        }
      }
    }
    for_each_element<kM, kD / 8>([&](int m, int n, int e) { o[m][n][e] *= scale[m][e / 2]; });
    const auto store = [&](T* to, const AttentionStrides& stride) {
      store_rows<kD, Order::queries>(
          o, [](int, int) { return 1.0f; }, shared.tiles + warp_row * kPitch<kD>, int(p.Dv),
          [&](int r) -> T* {
            return warp_row + r < count ? shared.rows.find(to, stride, seq, warp_row + r) : nullptr;
          });
    };
    store(p.out, p.out_stride);
    if (p.residue != nullptr) {
      for_each_element<kM, kD / 8>([&](int m, int n, int e) { o[m][n][e] = lost_by_rounding<T>(o[m][n][e]); });
      store(p.residue, p.residue_stride);
    }
    return;
  }

  float* const sums = p.workspace + split * all_rows * p.Dv;
  float* const stats = p.workspace + grid.splits * all_rows * p.Dv + split * all_rows * 2;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = at.in_table(m, half);
      if (r >= count) continue;
      const int64_t row = shared.rows.row[r];
      if (lane % 4 == 0) store_vec(stats + row * 2, Vec<float, 2>{m2[m][half], l[m][half]});
      float* const to = sums + row * p.Dv + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        if (8 * n < p.Dv) store_vec(to + 8 * n, Vec<float, 2>{o[m][n][2 * half], o[m][n][2 * half + 1]});
      }
    }
  }
}

// Combines the parts of a split call: out = sum_s o_s 2^(m_s - m) / sum_s l_s 2^(m_s - m) with m = max m_s, in the
// order of s. kRowLanes threads share a row.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_fwd_combine_kernel(const __grid_constant__ AttentionFwdParams<T> p,
                                 const __grid_constant__ AttentionGrid grid) {
  const int64_t rows = row_count(p);
  const int64_t row = (int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x) / kRowLanes;
  if (row >= rows) return;
  const float* stats = p.workspace + grid.splits * rows * p.Dv + row * 2;
  float m2 = -kInfinity, l = 0;
  for (int s = 0; s < grid.splits; ++s) m2 = fmaxf(m2, stats[s * rows * 2]);
  const float base = m2 == -kInfinity ? 0.0f : m2;
  for (int s = 0; s < grid.splits; ++s) l += stats[s * rows * 2 + 1] * exp2_flushed(stats[s * rows * 2] - base);
  const float scale = (l == 0 ? 0.0f : reciprocal(l)) * (p.seed == nullptr ? 1.0f : p.dropout_scale);
  const int lane = threadIdx.x % kRowLanes;
  if (lane == 0) {
    p.stats[row] = m2;
    p.stats[rows + row] = l;
  }

  T* const out = find_row(p, p.out, p.out_stride, row);
  for (int d = lane * 8; d < p.Dv; d += kRowLanes * 8) {
    float sum[8] = {};
    for (int s = 0; s < grid.splits; ++s) {
      const float by = exp2_flushed(stats[s * rows * 2] - base) * scale;
      const float* from = p.workspace + (s * rows + row) * p.Dv + d;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const Vec<float, 4> part = load_vec<4>(from + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i + j] += part[j] * by;
      }
    }
    const auto store = [&](T* to) {
      Vec<uint32_t, 4> packed;
#pragma unroll
      for (int i = 0; i < 4; ++i) packed[i] = pack2<T>(sum[2 * i], sum[2 * i + 1]);
      store_vec(reinterpret_cast<uint32_t*>(to + d), packed);
    };
    store(out);
    if (p.residue != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] = lost_by_rounding<T>(sum[i]);
      store(find_row(p, p.residue, p.residue_stride, row));
    }
  }
}

}  // namespace pyops
