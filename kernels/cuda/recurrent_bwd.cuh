// Backward kernels. recurrent.cu has the overview.
#pragma once

#include "recurrent_common.cuh"

namespace pyops {

template <typename T>
struct BwdWorkspace {
  int64_t* offsets;   // [T + 1] with packed sequences, for kernels that walk the steps
  acc_t<T>* dm;       // [directions, B, H] with a projection or normalised gates
  acc_t<T>* d;        // with normalised gates: [directions, B, G H] gradients behind the norm of the gates,
  acc_t<T>* dseen;    // [directions, rows, H] those behind the norm of the cells,
  acc_t<T>* norms;    // [directions, rows, 4] mean and rstd of the products and of the cells
  acc_t<T>* partial;  // [directions, parts, kinds, H] sums over rows
  uint64_t* words;    // that blocks of a kernel over all steps exchange
};

// ---- a step at a time: blocks [sequences, units] x directions
// dh0 holds what reaches the last h past the product, dc0 holds dc, until a sequence has no step any more.

// dm of unit u: to the gates, or to the kernel of the norms.
template <typename T>
__device__ __forceinline__ acc_t<T> give_dm(const RecurrentBwdParams<T>& p, const BwdWorkspace<T>& ws, int d,
                                            const Steps& s, int64_t b, int64_t u, acc_t<T> dm) {
  using A = acc_t<T>;
  const int64_t at = (d * p.B + b) * p.H + u, n = row_of(p, s.now, b);
  if (p.direction[d].ln_gates != nullptr) {
    ws.dm[at] = dm;
    return 0;
  }
  A h = 0, old = 0, dc = 0;
  if (has_cells(p.cell)) {
    old = last_c(p, d, s, b, u);
    dc = arriving_c(p, d, s, b, u, p.dc0[at]);
  } else if (p.cell == RecurrentCell::gru) {
    h = last_h(p, d, s, b, u);
  }
  const UnitGradients<A> of = unit_bwd(p, d, n, u, dm, h, old, dc);
  store_gradients(p, d, n, u, of, p.dp[d] != nullptr);
  if (has_cells(p.cell)) p.dc0[at] = dc;
  return of.past;
}

// Behind the first step of a sequence what is left of dc belongs to c0.
template <typename T>
__device__ __forceinline__ void leave_dc(const RecurrentBwdParams<T>& p, int d, const Steps& s, int64_t b, int64_t u) {
  if (!has_cells(p.cell)) return;
  acc_t<T>& dc = p.dc0[(d * p.B + b) * p.H + u];
  dc = arriving_c(p, d, s, b, u, dc);
}

// dh of a step, from dp of the one after it; and all else, where h is m and nothing is normalised.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    recurrent_bwd_step_kernel(const __grid_constant__ RecurrentBwdParams<T> p,
                              const __grid_constant__ BwdWorkspace<T> ws, const __grid_constant__ DirectionSteps steps,
                              int unit_tiles) {
  using A = acc_t<T>;
  const int d = blockIdx.y, G = gates_of(p.cell);
  const RecurrentDirection<T>& w = p.direction[d];
  const Steps& s = steps.of[d];
  const int64_t u0 = int64_t(blockIdx.x % unit_tiles) * kTileUnits, b0 = int64_t(blockIdx.x / unit_tiles) * kTileRows;
  if (b0 >= s.now.count && b0 >= s.after.count) return;
  const T* dp = p.dp[d] == nullptr ? p.dgx[d] : p.dp[d];
  A product[1][kThreadRows] = {};
  if (b0 < s.after.count) {
    multiply_tile<true>(
        shared_storage<ProductStorage<A, 1>>(), 1, G * p.H,
        [&](int, int u, int64_t k) { return u0 + u < p.P ? to_acc(w.w_hh[k * w.w_hh_row + u0 + u]) : A(0); },
        [&](int i, int64_t k) {
          const int64_t b = b0 + i;
          return b < s.after.count ? to_acc(dp[row_of(p, s.after, b) * G * p.H + k]) : A(0);
        },
        product);
  }
  const int64_t u = u0 + threadIdx.x % kTileUnits;
  if (u >= p.P) return;
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t b = b0 + threadIdx.x / kTileUnits * kThreadRows + r;
    if (b >= s.now.count && b >= s.after.count) continue;
    A& held = p.dh0[(d * p.B + b) * p.P + u];
    const A dh = arriving_h(p, d, s, b, u, product[0][r], held);
    if (b >= s.now.count) {
      held = dh;
      if (w.w_hr == nullptr) leave_dc(p, d, s, b, u);
      continue;
    }
    const int64_t n = row_of(p, s.now, b);
    A past;
    const A dm = through_zoneout(p, d, n, u, dh, past);
    if (w.w_hr != nullptr) {
      p.dm[d][n * p.P + u] = from_acc<T>(dm);
    } else {
      past += give_dm(p, ws, d, s, b, u, dm);
    }
    held = past;
  }
}

// And with a projection.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    recurrent_bwd_projection_kernel(const __grid_constant__ RecurrentBwdParams<T> p,
                                    const __grid_constant__ BwdWorkspace<T> ws,
                                    const __grid_constant__ DirectionSteps steps, int unit_tiles) {
  using A = acc_t<T>;
  const int d = blockIdx.y;
  const RecurrentDirection<T>& w = p.direction[d];
  const Steps& s = steps.of[d];
  const int64_t u0 = int64_t(blockIdx.x % unit_tiles) * kTileUnits, b0 = int64_t(blockIdx.x / unit_tiles) * kTileRows;
  if (b0 >= s.now.count && b0 >= s.after.count) return;
  A product[1][kThreadRows] = {};
  if (b0 < s.now.count) {
    multiply_tile<true>(
        shared_storage<ProductStorage<A, 1>>(), 1, p.P,
        [&](int, int u, int64_t k) { return u0 + u < p.H ? to_acc(w.w_hr[k * w.w_hr_row + u0 + u]) : A(0); },
        [&](int i, int64_t k) {
          const int64_t b = b0 + i;
          return b < s.now.count ? to_acc(p.dm[d][row_of(p, s.now, b) * p.P + k]) : A(0);
        },
        product);
  }
  const int64_t u = u0 + threadIdx.x % kTileUnits;
  if (u >= p.H) return;
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t b = b0 + threadIdx.x / kTileUnits * kThreadRows + r;
    if (b < s.now.count) {
      give_dm(p, ws, d, s, b, u, product[0][r]);
    } else if (b < s.after.count) {
      leave_dc(p, d, s, b, u);
    }
  }
}

// Mean of v(i) and of v(i) xhat(i), i < count, for the whole block.
template <typename A, typename V, typename X>
__device__ __forceinline__ void find_norm_gradient(BlockReduce<A, 2>& reduce, int64_t count, V v, X xhat,
                                                   A (&means)[2]) {
  means[0] = means[1] = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    means[0] += v(i);
    means[1] += v(i) * xhat(i);
  }
  reduce.sum(means);
  means[0] /= A(count);
  means[1] /= A(count);
}

// Behind them, with normalised gates: a block to a row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    recurrent_bwd_norm_kernel(const __grid_constant__ RecurrentBwdParams<T> p,
                              const __grid_constant__ BwdWorkspace<T> ws,
                              const __grid_constant__ DirectionSteps steps) {
  using A = acc_t<T>;
  BlockReduce<A, 2> reduce(shared_storage<BlockReduceStorage<A, 2>>());
  const int d = blockIdx.y, G = gates_of(p.cell);
  const RecurrentDirection<T>& w = p.direction[d];
  const Steps& s = steps.of[d];
  const int64_t b = blockIdx.x, H = p.H;
  if (b >= s.now.count) return;
  const int64_t n = row_of(p, s.now, b), state = d * p.B + b;
  const A* const dm = ws.dm + state * H;
  A* const of_gates = ws.d + state * G * H;
  A* const norms = ws.norms + (d * p.rows + n) * 4;
  A means[2];
  const auto give = [&](int64_t u, const UnitGradients<A>& of) {
    store_gradients(p, d, n, u, of, false);
#pragma unroll
    for (int g = 0; g < kMostGates; ++g) {
      if (g < G) of_gates[g * H + u] = product_gradient(p.cell, of, g);
    }
  };

  if (has_cells(p.cell)) {
    A* const dseen = ws.dseen + (d * p.rows + n) * H;
    // c' stands where the gradient of its unit's first gate comes: no other thread reads it.
    for (int64_t u = threadIdx.x; u < H; u += kRowThreads) {
      of_gates[u] = saved_cell(p, d, n, u, last_c(p, d, s, b, u)).now;
    }
    A mean, rstd;
    find_norm(reduce, H, p.eps, [&](int64_t u) { return of_gates[u]; }, mean, rstd);
    const auto xhat = [&](int64_t u) { return (of_gates[u] - mean) * rstd; };
    const auto seen = [&](int64_t u) { return tanh(xhat(u) * to_acc(w.ln_cell[u]) + to_acc(w.ln_cell[H + u])); };
    for (int64_t u = threadIdx.x; u < H; u += kRowThreads) {
      const A t = seen(u), o = saved_gate(p, d, n, G - 1, u);
      dseen[u] = dm[u] * o * (A(1) - t * t);
    }
    find_norm_gradient(reduce, H, [&](int64_t u) { return dseen[u] * to_acc(w.ln_cell[u]); }, xhat, means);
    for (int64_t u = threadIdx.x; u < H; u += kRowThreads) {
      const CellGates<A> c = saved_cell(p, d, n, u, last_c(p, d, s, b, u));
      const A dnow = (dseen[u] * to_acc(w.ln_cell[u]) - means[0] - xhat(u) * means[1]) * rstd;
      A dc = arriving_c(p, d, s, b, u, p.dc0[state * H + u]);
      give(u, cell_bwd(p, d, n, u, c, dm[u] * seen(u) * c.o * (A(1) - c.o), dnow, dc));
      p.dc0[state * H + u] = dc;
    }
    if (threadIdx.x == 0) norms[2] = mean, norms[3] = rstd;
  } else {
    for (int64_t u = threadIdx.x; u < H; u += kRowThreads) {
      A dc = 0;
      const A h = p.cell == RecurrentCell::gru ? last_h(p, d, s, b, u) : A(0);
      const UnitGradients<A> of = unit_bwd(p, d, n, u, dm[u], h, A(0), dc);
      give(u, of);
      p.dh0[state * H + u] += of.past;
    }
  }

  const A* const x = p.products[d] + n * G * H;
  A mean, rstd;
  // With barriers, behind which other threads' parts of of_gates may be read.
  find_norm(reduce, G * H, p.eps, [&](int64_t i) { return x[i]; }, mean, rstd);
  const auto scaled = [&](int64_t i) { return of_gates[i] * to_acc(w.ln_gates[i]); };
  const auto xhat = [&](int64_t i) { return (x[i] - mean) * rstd; };
  find_norm_gradient(reduce, G * H, scaled, xhat, means);
  for (int64_t i = threadIdx.x; i < G * H; i += kRowThreads) {
    p.dp[d][n * G * H + i] = from_acc<T>((scaled(i) - means[0] - xhat(i) * means[1]) * rstd);
  }
  if (threadIdx.x == 0) norms[0] = mean, norms[1] = rstd;
}

// Asks for what a thread reads behind the product of a step.
template <typename T>
__device__ __forceinline__ void prefetch_unit(const RecurrentBwdParams<T>& p, int d, const Steps& s, int64_t b,
                                              int64_t u) {
  const RecurrentDirection<T>& w = p.direction[d];
  const int64_t n = row_of(p, s.now, b);
  const T* const gates = w.gates + n * saved_of(p.cell) * p.H + u;
#pragma unroll
  for (int g = 0; g < kMostGates; ++g) {
    if (g < saved_of(p.cell)) prefetch(gates + g * p.H);
  }
  if (has_cells(p.cell)) prefetch(w.cells + n * p.H + u);
  if (p.dy[d] != nullptr) prefetch(p.dy[d] + n * p.dy_row + u);
}

// ---- all steps in one kernel: blocks [slices, tiles of sequences] x directions
// A group is 16 units, one tile of rows of W_hh^T; its inner dimension is all gates of all units. The upper and the
// lower eight of them fall to warps of even and of odd part, so that a thread has one unit, and dc of it in registers,
// for two sequences. dp of the block's sequences stands in shared memory; from other slices it comes in stamped words,
// once a step.

template <typename T>
using BwdWeights = HeldWeights<T, 1, 16, sizeof(T) == 2 ? 4 : 0>;
constexpr int kBwdGroup = 16;

template <typename T>
__global__ void __launch_bounds__(kSequenceWarps* kWarpSize, 1)
    recurrent_bwd_sequence_kernel(const __grid_constant__ RecurrentBwdParams<T> p,
                                  const __grid_constant__ BwdWorkspace<T> ws,
                                  const __grid_constant__ SequencePlan plan) {
  const SequencePlace at = place_of(plan);
  const int d = blockIdx.y, G = gates_of(p.cell), sequences = plan.row_tiles * kRowTile;
  const RecurrentDirection<T>& w = p.direction[d];
  const int inner = G * int(p.H), first_unit = (at.slice * plan.groups + at.group) * kBwdGroup;
  const int half = at.part % 2, row_tile = at.part / 2, u = first_unit + half * 8 + at.lane / 4;
  const int row = row_tile * kRowTile + at.lane % 4 * 2;
  const int b0 = row_tile < plan.row_tiles && u < p.H ? at.first_b + row : kNoSequence;

  const int warps = plan.parts * plan.groups;
  unsigned char* const own = shared_array<unsigned char>(at.warp * BwdWeights<T>::kSharedBytes);
  T* const rows = shared_array<T>(warps * BwdWeights<T>::kSharedBytes);
  float* const partial = reinterpret_cast<float*>(rows + sequences * plan.stride);
  for (int i = threadIdx.x; i < sequences * plan.stride; i += blockDim.x) rows[i] = from_acc<T>(0.0f);

  BwdWeights<T> weights;
  weights.load(own, [&](int, int r, int k) {
    const int unit = first_unit + r, column = at.part * weights.kInner + k;
    return unit < p.P && column < inner ? w.w_hh[int64_t(column) * w.w_hh_row + unit] : from_acc<T>(0.0f);
  });
  float dc[2] = {}, past[2] = {};

  for (int step = int(p.T_) - 1; step >= -1; --step) {
    if constexpr (sizeof(T) == 2) {  // in float it takes registers that are not there
      const Steps s = steps_at(p, d, step);
      for (int b = b0; b < b0 + 2 && b < s.now.count; ++b) prefetch_unit(p, d, s, b, u);
    }
    if (plan.slices > 1) {
      const int count = int(min(steps_at(p, d, step).after.count - at.first_b, int64_t(sequences)));
      if (count > 0) {
        gather(words_of<T>(ws.words, plan, at, step + 1, inner), plan, inner, count, plan.first_stamp + step + 2, rows);
      }
    }
    sync_block();
    float sum[1][4];
    multiply_rows(weights, own, plan, at, rows, partial, row_tile, sum);
    float product[2] = {half == 0 ? sum[0][0] : sum[0][2], half == 0 ? sum[0][1] : sum[0][3]};
    const Steps s = steps_at(p, d, step);
    uint32_t pending[kMostGates] = {};
    // In turn, for the sake of registers; the arrays' first elements are those of the turn.
#pragma unroll 1
    for (int e = 0; e < 2; ++e) {
      const int b = b0 + e;
      const bool active = b < s.now.count;
      UnitGradients<float> of{};
      if (active || b < s.after.count) {
        const float dh = arriving_h(p, d, s, b, u, product[0], past[0]);
        if (has_cells(p.cell)) dc[0] = arriving_c(p, d, s, b, u, dc[0]);
        if (active) {
          const int64_t n = row_of(p, s.now, b);
          const float dm = through_zoneout(p, d, n, u, dh, past[0]);
          const float h = p.cell == RecurrentCell::gru ? last_h(p, d, s, b, u) : 0.0f;
          const float old = has_cells(p.cell) ? last_c(p, d, s, b, u) : 0.0f;
          of = unit_bwd(p, d, n, u, dm, h, old, dc[0]);
          past[0] += of.past;
          store_gradients(p, d, n, u, of, p.dp[d] != nullptr);
        } else {
          p.dh0[(d * p.B + b) * p.P + u] = dh;
          if (has_cells(p.cell)) p.dc0[(d * p.B + b) * p.H + u] = dc[0];
        }
      }
      if (b0 < s.now.count) {
#pragma unroll
        for (int g = 0; g < kMostGates; ++g) {
          if (g >= G) break;
          const T out = from_acc<T>(product_gradient(p.cell, of, g));
          if (plan.slices > 1) {
            publish(words_of<T>(ws.words, plan, at, step, inner), row, e, inner, g * int(p.H) + u, out, active,
                    plan.first_stamp + step + 1, pending[g]);
          } else if (active) {
            rows[(row + e) * plan.stride + g * int(p.H) + u] = out;
          }
        }
      }
      swap_values(dc[0], dc[1]);
      swap_values(past[0], past[1]);
      swap_values(product[0], product[1]);
    }
  }
}

// ---- sums over rows, behind all steps: of the biases, peepholes and norms
// blocks [units, parts of the rows] x directions; a block's rows in kSumRows strands.

constexpr int kSumRows = 8, kSumThreads = kTileUnits * kSumRows;

// Kinds of sums, in the order of the workspace.
constexpr int kOfPeepholes = 4, kOfGates = kOfPeepholes + 3, kOfCell = kOfGates + kMostGates, kSumKinds = kOfCell + 2;

template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    recurrent_bwd_sums_kernel(const __grid_constant__ RecurrentBwdParams<T> p,
                              const __grid_constant__ BwdWorkspace<T> ws, int64_t part_rows) {
  using A = acc_t<T>;
  using Sums = A[kSumRows][kTileUnits];
  Sums& shared = shared_storage<Sums>();
  const int d = blockIdx.z, G = gates_of(p.cell), strand = threadIdx.x / kTileUnits;
  const RecurrentDirection<T>& w = p.direction[d];
  const int64_t u = int64_t(blockIdx.x) * kTileUnits + threadIdx.x % kTileUnits, H = p.H;
  A sums[kSumKinds] = {};
  const int64_t begin = blockIdx.y * part_rows, end = min(begin + part_rows, p.T_ * p.B);
  for (int64_t i = begin + strand; u < H && i < end; i += kSumRows) {
    const Steps s = steps_at(p, d, i / p.B);
    const int64_t b = i % p.B;
    if (b >= s.now.count) continue;
    const int64_t n = row_of(p, s.now, b);
    A dgx[kMostGates] = {};
#pragma unroll
    for (int g = 0; g < kMostGates; ++g) {
      if (g < G) dgx[g] = to_acc(p.dgx[d][(n * G + g) * H + u]);
      sums[g] += dgx[g];
    }
    const A dq = p.cell == RecurrentCell::gru ? dgx[2] * saved_gate(p, d, n, 0, u) : A(0);
    if (p.cell == RecurrentCell::gru) sums[3] += dq;
    if (p.dpeephole[d] == nullptr && w.ln_gates == nullptr) continue;
    CellGates<A> c{};
    if (has_cells(p.cell)) c = saved_cell(p, d, n, u, last_c(p, d, s, b, u));
    if (p.dpeephole[d] != nullptr) {
      const bool coupled = p.cell == RecurrentCell::coupled;
      sums[kOfPeepholes] += dgx[0] * c.old;
      sums[kOfPeepholes + 1] += coupled ? dgx[2] * c.now : dgx[1] * c.old;
      sums[kOfPeepholes + 2] += dgx[3] * c.now;
    }
    if (w.ln_gates == nullptr) continue;
    const A* const norms = ws.norms + (d * p.rows + n) * 4;
#pragma unroll
    for (int g = 0; g < kMostGates; ++g) {
      if (g >= G) break;
      const A xhat = (p.products[d][(n * G + g) * H + u] - norms[0]) * norms[1];
      sums[kOfGates + g] += (p.cell == RecurrentCell::gru && g == 2 ? dq : dgx[g]) * xhat;
    }
    if (has_cells(p.cell)) {
      const A dseen = ws.dseen[(d * p.rows + n) * H + u];
      sums[kOfCell] += dseen * (c.now - norms[2]) * norms[3];
      sums[kOfCell + 1] += dseen;
    }
  }
  A* const to = ws.partial + (d * gridDim.y + blockIdx.y) * kSumKinds * H;
#pragma unroll
  for (int kind = 0; kind < kSumKinds; ++kind) {
    shared[strand][threadIdx.x % kTileUnits] = sums[kind];
    sync_block();
    if (strand == 0 && u < H) {
      A sum = sums[kind];
      for (int i = 1; i < kSumRows; ++i) sum += shared[i][threadIdx.x];
      to[kind * H + u] = sum;
    }
    sync_block();
  }
}

// The parts, added up: a thread to a sum.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    recurrent_bwd_reduce_kernel(const __grid_constant__ RecurrentBwdParams<T> p,
                                const __grid_constant__ BwdWorkspace<T> ws, int parts) {
  using A = acc_t<T>;
  const int d = blockIdx.y;
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x, kind = i / p.H;
  if (kind >= kSumKinds) return;
  A sum = 0;
  for (int part = 0; part < parts; ++part) sum += ws.partial[(d * parts + part) * kSumKinds * p.H + i];
  const auto give = [&](A* to, int first, int count) {
    if (to != nullptr && kind >= first && kind < first + count) to[i - first * p.H] = sum;
  };
  give(p.dbias[d], 0, saved_of(p.cell));
  give(p.dpeephole[d], kOfPeepholes, gates_of(p.cell) - 1);
  give(p.dln_gates[d], kOfGates, gates_of(p.cell));
  give(p.dln_cell[d], kOfCell, 2);
}

}  // namespace pyops
