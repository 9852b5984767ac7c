// Forward kernels. recurrent.cu has the overview.
#pragma once

#include "recurrent_common.cuh"

namespace pyops {

template <typename T>
struct FwdWorkspace {
  int64_t* offsets;    // [T + 1] with packed sequences, for kernels that walk the steps
  acc_t<T>* c;         // [directions, B, H]
  acc_t<T>* products;  // [directions, B, G H], with normalised gates
  T* m;                // [directions, B, H] on its way into W_hr
  uint64_t* words;     // that blocks of a kernel over all steps exchange
};

// ---- a step at a time: blocks [sequences, units] x directions

// c as the step finds it.
template <typename T>
__device__ __forceinline__ acc_t<T> held_c(const RecurrentFwdParams<T>& p, const FwdWorkspace<T>& ws, int d,
                                           const Steps& s, int64_t b, int64_t u) {
  if (resets(p, row_of(p, s.now, b))) return 0;
  if (b < s.before.count) return ws.c[(d * p.B + b) * p.H + u];
  const T* c0 = p.direction[d].c0;
  return c0 == nullptr ? acc_t<T>(0) : to_acc(c0[b * p.H + u]);
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    recurrent_fwd_step_kernel(const __grid_constant__ RecurrentFwdParams<T> p,
                              const __grid_constant__ FwdWorkspace<T> ws, const __grid_constant__ DirectionSteps steps,
                              int unit_tiles) {
  using A = acc_t<T>;
  const int d = blockIdx.y, G = gates_of(p.cell);
  const RecurrentDirection<T>& w = p.direction[d];
  const Steps& s = steps.of[d];
  const int64_t u0 = int64_t(blockIdx.x % unit_tiles) * kTileUnits, b0 = int64_t(blockIdx.x / unit_tiles) * kTileRows;
  if (b0 >= s.now.count) return;
  A product[kMostGates][kThreadRows];
  multiply_tile<false>(
      shared_storage<ProductStorage<A, kMostGates>>(), G, p.P,
      [&](int g, int u, int64_t k) {
        return u0 + u < p.H ? to_acc(w.w_hh[(g * p.H + u0 + u) * w.w_hh_row + k]) : A(0);
      },
      [&](int i, int64_t k) {
        const int64_t b = b0 + i;
        return b < s.now.count ? to_acc(sent(p, d, b, k, last_h(p, d, s, b, k))) : A(0);
      },
      product);
  const int64_t u = u0 + threadIdx.x % kTileUnits;
  if (u >= p.H) return;
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t b = b0 + threadIdx.x / kTileUnits * kThreadRows + r;
    if (b >= s.now.count) break;
    const int64_t n = row_of(p, s.now, b), state = d * p.B + b;
    if (w.ln_gates != nullptr) {
#pragma unroll
      for (int g = 0; g < kMostGates; ++g) {
        if (g < G) ws.products[(state * G + g) * p.H + u] = product[g][r];
      }
      continue;
    }
    A gx[kMostGates], own[kMostGates];
#pragma unroll
    for (int g = 0; g < kMostGates; ++g) own[g] = product[g][r];
    load_gx(p, d, n, u, gx);
    const A h = w.w_hr == nullptr ? last_h(p, d, s, b, u) : A(0);
    A c = has_cells(p.cell) ? held_c(p, ws, d, s, b, u) : A(0);
    const Unit<A> unit = unit_fwd(p, d, n, u, gx, own, h, c);
    if (has_cells(p.cell)) {
      ws.c[state * p.H + u] = c;
      finish_c(p, d, b, u, b >= s.after.count, c);
    }
    if (w.w_hr != nullptr) {
      ws.m[state * p.H + u] = from_acc<T>(unit.m);
    } else {
      finish_h(p, d, n, b, u, b >= s.after.count, unit.m, h);
    }
  }
}

// Behind it, with normalised gates: a block to a row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    recurrent_fwd_norm_kernel(const __grid_constant__ RecurrentFwdParams<T> p,
                              const __grid_constant__ FwdWorkspace<T> ws,
                              const __grid_constant__ DirectionSteps steps) {
  using A = acc_t<T>;
  BlockReduce<A, 2> reduce(shared_storage<BlockReduceStorage<A, 2>>());
  const int d = blockIdx.y, G = gates_of(p.cell);
  const RecurrentDirection<T>& w = p.direction[d];
  const Steps& s = steps.of[d];
  const int64_t b = blockIdx.x;
  if (b >= s.now.count) return;
  const int64_t n = row_of(p, s.now, b), state = d * p.B + b, H = p.H;
  A* const products = ws.products + state * G * H;
  A mean, rstd;
  find_norm(reduce, G * H, p.eps, [&](int64_t i) { return products[i]; }, mean, rstd);

  const auto finish = [&](int64_t u, A m) {
    if (w.w_hr != nullptr) {
      ws.m[state * H + u] = from_acc<T>(m);
    } else {
      finish_h(p, d, n, b, u, b >= s.after.count, m, last_h(p, d, s, b, u));
    }
  };
  // c' and o take the place of the first two products of their unit, which no other thread reads any more.
  for (int64_t u = threadIdx.x; u < H; u += kRowThreads) {
    A gx[kMostGates], normed[kMostGates] = {};
    load_gx(p, d, n, u, gx);
#pragma unroll
    for (int g = 0; g < kMostGates; ++g) {
      if (g < G) normed[g] = (products[g * H + u] - mean) * rstd * to_acc(w.ln_gates[g * H + u]);
    }
    const A h = w.w_hr == nullptr ? last_h(p, d, s, b, u) : A(0);
    A c = has_cells(p.cell) ? held_c(p, ws, d, s, b, u) : A(0);
    const Unit<A> unit = unit_fwd(p, d, n, u, gx, normed, h, c);
    if (!has_cells(p.cell)) {
      finish(u, unit.m);
      continue;
    }
    ws.c[state * H + u] = c;
    finish_c(p, d, b, u, b >= s.after.count, c);
    products[u] = unit.now;
    products[H + u] = unit.o;
  }
  if (!has_cells(p.cell)) return;
  find_norm(reduce, H, p.eps, [&](int64_t u) { return products[u]; }, mean, rstd);
  for (int64_t u = threadIdx.x; u < H; u += kRowThreads) {
    const A seen = (products[u] - mean) * rstd * to_acc(w.ln_cell[u]) + to_acc(w.ln_cell[H + u]);
    finish(u, products[H + u] * tanh(seen));
  }
}

// And with a projection: blocks [sequences, units of h] x directions.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    recurrent_fwd_projection_kernel(const __grid_constant__ RecurrentFwdParams<T> p,
                                    const __grid_constant__ FwdWorkspace<T> ws,
                                    const __grid_constant__ DirectionSteps steps, int unit_tiles) {
  using A = acc_t<T>;
  const int d = blockIdx.y;
  const RecurrentDirection<T>& w = p.direction[d];
  const Steps& s = steps.of[d];
  const int64_t u0 = int64_t(blockIdx.x % unit_tiles) * kTileUnits, b0 = int64_t(blockIdx.x / unit_tiles) * kTileRows;
  if (b0 >= s.now.count) return;
  A product[1][kThreadRows];
  multiply_tile<false>(
      shared_storage<ProductStorage<A, 1>>(), 1, p.H,
      [&](int, int u, int64_t k) { return u0 + u < p.P ? to_acc(w.w_hr[(u0 + u) * w.w_hr_row + k]) : A(0); },
      [&](int i, int64_t k) { return b0 + i < s.now.count ? to_acc(ws.m[(d * p.B + b0 + i) * p.H + k]) : A(0); },
      product);
  const int64_t u = u0 + threadIdx.x % kTileUnits;
  if (u >= p.P) return;
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t b = b0 + threadIdx.x / kTileUnits * kThreadRows + r;
    if (b >= s.now.count) break;
    finish_h(p, d, row_of(p, s.now, b), b, u, b >= s.after.count, product[0][r], last_h(p, d, s, b, u));
  }
}

// ---- all steps in one kernel: blocks [slices, tiles of sequences] x directions
// A group is 8 units with their gates, two tiles of 16 rows of W_hh: rows g and g + 8 of them are the gates of unit g,
// so that a thread has all gates of its unit, and c and h of it in registers, for two sequences. h' of the block's
// sequences stands in shared memory; from other slices it comes in stamped words, once a step.

template <typename T>
using FwdWeights = HeldWeights<T, 2, sizeof(T) == 2 ? 8 : 6, sizeof(T) == 2 ? 4 : 0>;
constexpr int kFwdGroup = 8;

// What a thread knows of a sequence at a step, in kFacts bits: it has the step, begins anew, ends with it, the next
// step begins anew.
constexpr unsigned kActive = 1, kReset = 2, kLast = 4, kCleared = 8, kFacts = 4;

template <typename T>
__global__ void __launch_bounds__(kSequenceWarps* kWarpSize, 1)
    recurrent_fwd_sequence_kernel(const __grid_constant__ RecurrentFwdParams<T> p,
                                  const __grid_constant__ FwdWorkspace<T> ws,
                                  const __grid_constant__ SequencePlan plan) {
  const SequencePlace at = place_of(plan);
  const int d = blockIdx.y, G = gates_of(p.cell), sequences = plan.row_tiles * kRowTile;
  const RecurrentDirection<T>& w = p.direction[d];
  const int first_unit = (at.slice * plan.groups + at.group) * kFwdGroup, u = first_unit + at.lane / 4;
  const int row = at.part * kRowTile + at.lane % 4 * 2;  // of the thread's first sequence, in the tile
  const int b0 = at.first_b + row, P = int(p.P);
  const bool has_unit = at.part < plan.row_tiles && u < p.H;

  // With one part, a step's rows are still read when the next one's come.
  const int buffers = plan.parts == 1 ? 2 : 1;
  const int warps = plan.parts * plan.groups;
  unsigned char* const own = shared_array<unsigned char>(at.warp * FwdWeights<T>::kSharedBytes);
  T* const rows = shared_array<T>(warps * FwdWeights<T>::kSharedBytes);
  float* const partial = reinterpret_cast<float*>(rows + buffers * sequences * plan.stride);
  for (int i = threadIdx.x; i < buffers * sequences * plan.stride; i += blockDim.x) rows[i] = from_acc<T>(0.0f);
  sync_block();

  FwdWeights<T> weights;
  weights.load(own, [&](int tile, int r, int k) {
    const int gate = 2 * tile + r / 8;
    const int unit = first_unit + r % 8, column = at.part * weights.kInner + k;
    return gate < G && unit < p.H && column < P ? w.w_hh[(gate * p.H + unit) * w.w_hh_row + column] : from_acc<T>(0.0f);
  });
  float c[2] = {}, h[2] = {};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (!has_unit || b0 + e >= p.B) continue;
    if (w.h0 != nullptr) h[e] = to_acc(w.h0[(b0 + e) * p.P + u]);
    if (w.c0 != nullptr) c[e] = to_acc(w.c0[(b0 + e) * p.H + u]);
  }

  const int last = int(p.T_);
  for (int step = 0; step < last; ++step) {
    // What a step needs beside the product, on its way while the block waits.
    float gx[2][kMostGates] = {};
    unsigned facts = 0;
    int64_t n = 0;  // row of the first sequence
    T* const now = rows + step % buffers * sequences * plan.stride;
    {
      const Steps s = steps_at(p, d, step);
      const int end = int(min(s.now.count, int64_t(at.first_b + sequences)));
      const int begun = int(min(s.before.count, int64_t(end)));
      for (int b = max(begun, at.first_b); b < end; ++b) {
        for (int k = threadIdx.x; k < P; k += blockDim.x) {
          now[(b - at.first_b) * plan.stride + k] = sent(p, d, b, k, last_h(p, d, s, b, k));
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int b = b0 + e;
        if (!has_unit || b >= s.now.count) continue;
        const bool ends = b >= s.after.count;
        load_gx(p, d, row_of(p, s.now, b), u, gx[e]);
        facts |= (kActive | (resets(p, row_of(p, s.now, b)) ? kReset : 0) | (ends ? kLast : 0) |
                  (!ends && resets(p, row_of(p, s.after, b)) ? kCleared : 0))
                 << (e * kFacts);
      }
      n = row_of(p, s.now, b0);
      if (plan.slices > 1 && begun > at.first_b) {
        gather(words_of<T>(ws.words, plan, at, step - 1, P), plan, P, begun - at.first_b, plan.first_stamp + step, now);
      }
    }
    sync_block();
    float sum[2][4];
    multiply_rows(weights, own, plan, at, now, partial, at.part, sum);
    if (facts != 0) {
      uint32_t pending = 0;
      T* const next = rows + (step + 1) % buffers * sequences * plan.stride;
      // In turn, for the sake of registers; the arrays' first elements are those of the turn.
#pragma unroll 1
      for (int e = 0; e < 2; ++e) {
        const int b = b0 + e;
        T out{};
        if (facts & kActive) {
          if (facts & kReset) c[0] = h[0] = 0;
          const float product[kMostGates] = {sum[0][0], sum[0][2], sum[1][0], sum[1][2]};
          const float m = unit_fwd(p, d, n, u, gx[0], product, h[0], c[0]).m;
          if (has_cells(p.cell)) finish_c(p, d, b, u, facts & kLast, c[0]);
          h[0] = finish_h(p, d, n, b, u, facts & kLast, m, h[0]);
          out = sent(p, d, b, u, facts & kCleared ? 0.0f : h[0]);
          if (plan.slices == 1) next[(row + e) * plan.stride + u] = out;
        }
        if (plan.slices > 1) {
          publish(words_of<T>(ws.words, plan, at, step, P), row, e, P, u, out, facts & kActive,
                  plan.first_stamp + step + 1, pending);
        }
        facts >>= kFacts;
        n += p.batch_rows;
        swap_values(c[0], c[1]);
        swap_values(h[0], h[1]);
#pragma unroll
        for (int g = 0; g < kMostGates; ++g) {
          swap_values(gx[0][g], gx[1][g]);
          if (g % 2 == 0) swap_values(sum[g / 2][0], sum[g / 2][1]);
          if (g % 2 == 1) swap_values(sum[g / 2][2], sum[g / 2][3]);
        }
      }
    }
  }
}

}  // namespace pyops
