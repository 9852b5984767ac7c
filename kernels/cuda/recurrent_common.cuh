// What the recurrent kernels share: where rows lie, what a unit's gates are and their gradients, zoneout, the tiled
// product of one step, and weights that stay in registers over all steps. recurrent.cu has the overview.
#pragma once

#include "../params/recurrent.h"
#include "mma.cuh"

namespace pyops {

// ------------------------------------------------------------------------------------------------ cells, steps, rows

constexpr int kMostGates = 4;

__host__ __device__ __forceinline__ int gates_of(RecurrentCell cell) {
  return cell == RecurrentCell::lstm ? 4 : cell == RecurrentCell::gru || cell == RecurrentCell::coupled ? 3 : 1;
}
__host__ __device__ __forceinline__ int saved_of(RecurrentCell cell) {
  return cell == RecurrentCell::gru ? 4 : gates_of(cell);
}
__host__ __device__ __forceinline__ bool has_cells(RecurrentCell cell) {
  return cell == RecurrentCell::lstm || cell == RecurrentCell::coupled;
}

// The rows of a step: sequence b < count has the row first + b batch_rows.
struct StepRows {
  int64_t first, count;
};

// p.offsets is read by the host or by the device, whichever calls.
template <typename T>
__host__ __device__ __forceinline__ StepRows rows_of_step(const RecurrentParams<T>& p, int64_t t) {
  if (t < 0 || t >= p.T_) return {0, 0};
  if (p.offsets != nullptr) return {p.offsets[t], p.offsets[t + 1] - p.offsets[t]};
  return {t * p.step_rows, p.B};
}

// A step and its neighbours, in the order of a direction.
struct Steps {
  StepRows now, before, after;
};

// Step number s of direction d. Numbers -1 and T_ lie outside, and have neighbours.
template <typename T>
__host__ __device__ __forceinline__ Steps steps_at(const RecurrentParams<T>& p, int d, int64_t s) {
  const int64_t t = d == 0 ? s : p.T_ - 1 - s, forwards = d == 0 ? 1 : -1;
  return {rows_of_step(p, t), rows_of_step(p, t - forwards), rows_of_step(p, t + forwards)};
}

struct DirectionSteps {
  Steps of[2];
};

template <typename T>
__device__ __forceinline__ int64_t row_of(const RecurrentParams<T>& p, const StepRows& rows, int64_t b) {
  return rows.first + b * p.batch_rows;
}

template <typename T>
__device__ __forceinline__ bool resets(const RecurrentParams<T>& p, int64_t row) {
  return p.reset != nullptr && p.reset[row];
}

// h of unit u that sequence b begins a step with.
template <typename T>
__device__ __forceinline__ acc_t<T> last_h(const RecurrentParams<T>& p, int d, const Steps& s, int64_t b, int64_t u) {
  const RecurrentDirection<T>& w = p.direction[d];
  if (resets(p, row_of(p, s.now, b))) return 0;
  if (b < s.before.count) return to_acc(w.y[row_of(p, s.before, b) * p.y_row + u]);
  return w.h0 == nullptr ? acc_t<T>(0) : to_acc(w.h0[b * p.P + u]);
}

// c likewise, from the saved ones.
template <typename T>
__device__ __forceinline__ acc_t<T> last_c(const RecurrentParams<T>& p, int d, const Steps& s, int64_t b, int64_t u) {
  const RecurrentDirection<T>& w = p.direction[d];
  if (resets(p, row_of(p, s.now, b))) return 0;
  if (b < s.before.count) return w.cells[row_of(p, s.before, b) * p.H + u];
  return w.c0 == nullptr ? acc_t<T>(0) : to_acc(w.c0[b * p.H + u]);
}

// h on its way into the product.
template <typename T>
__device__ __forceinline__ T sent(const RecurrentParams<T>& p, int d, int64_t b, int64_t u, acc_t<T> h) {
  const T* keep = p.direction[d].keep;
  return from_acc<T>(keep == nullptr ? h : h * to_acc(keep[b * p.P + u]));
}

// -------------------------------------------------------------------------------------------------- units of a cell

template <typename A>
__device__ __forceinline__ A sigmoid(A x) {
  const A e = exp(-abs(x));
  return (x < 0 ? e : A(1)) / (A(1) + e);
}

// Zoneout's share of the new value: 0 or 1 drawn in training, else constant.
template <typename T>
__device__ __forceinline__ acc_t<T> zoneout_update(const RecurrentParams<T>& p, acc_t<T> probability, int64_t row,
                                                   int64_t u) {
  using A = acc_t<T>;
  if (p.seed == nullptr || probability <= 0) return A(1) - probability;
  const Philox random = philox4x32_10(uint32_t(u / 4), uint32_t(row), uint32_t(row >> 32), uint32_t(p.seed[1]),
                                      uint32_t(p.seed[0]), uint32_t(p.seed[0] >> 32));
  const uint32_t even = u % 4 < 2 ? random.lane[0] : random.lane[2], odd = u % 4 < 2 ? random.lane[1] : random.lane[3];
  return ((u % 2 == 0 ? even : odd) >> 8) >= uint32_t(ceil(probability * A(16777216))) ? A(1) : A(0);
}
template <typename T>
__device__ __forceinline__ acc_t<T> update_of_h(const RecurrentParams<T>& p, int d, int64_t n, int64_t u) {
  return zoneout_update(p, p.zoneout_h, 2 * (d * p.rows + n), u);
}
template <typename T>
__device__ __forceinline__ acc_t<T> update_of_c(const RecurrentParams<T>& p, int d, int64_t n, int64_t u) {
  return zoneout_update(p, p.zoneout_c, 2 * (d * p.rows + n) + 1, u);
}

// A gate's peephole times c, 0 without peepholes.
template <typename T>
__device__ __forceinline__ acc_t<T> peephole(const RecurrentParams<T>& p, int d, int gate, int64_t u, acc_t<T> c) {
  const T* w = p.direction[d].peephole;
  return w == nullptr ? acc_t<T>(0) : to_acc((w + u)[gate * p.H]) * c;
}

// gx of unit u in row n.
template <typename T>
__device__ __forceinline__ void load_gx(const RecurrentParams<T>& p, int d, int64_t n, int64_t u,
                                        acc_t<T> (&gx)[kMostGates]) {
  const T* const own = p.direction[d].gx + n * p.direction[d].gx_row + u;
#pragma unroll
  for (int g = 0; g < kMostGates; ++g) gx[g] = g < gates_of(p.cell) ? to_acc(own[g * p.H]) : acc_t<T>(0);
}

// What a unit makes of its sums; of an LSTM also c' and o, from which m comes again behind a norm of c'.
template <typename A>
struct Unit {
  A m, now, o;
};

// Unit u of sequence b in row n, from gx and the products; h is the last one, and c changes from the last to the new
// one. Saves what backward needs.
template <typename T>
__device__ __forceinline__ Unit<acc_t<T>> unit_fwd(const RecurrentFwdParams<T>& p, int d, int64_t n, int64_t u,
                                                   const acc_t<T> (&gx)[kMostGates],
                                                   const acc_t<T> (&product)[kMostGates], acc_t<T> h, acc_t<T>& c) {
  using A = acc_t<T>;
  const RecurrentDirection<T>& w = p.direction[d];
  T* const gates = w.gates + n * saved_of(p.cell) * p.H + u;
  const auto save = [&](int g, A v) {
    if (w.gates != nullptr) gates[g * p.H] = from_acc<T>(v);
  };
  if (p.cell == RecurrentCell::rnn_tanh || p.cell == RecurrentCell::rnn_relu) {
    const A sum = gx[0] + product[0];
    const A m = p.cell == RecurrentCell::rnn_tanh ? tanh(sum) : sum < 0 ? A(0) : sum;  // NaN stays NaN
    save(0, m);
    return {m, 0, 0};
  }
  if (p.cell == RecurrentCell::gru) {
    const A r = sigmoid(gx[0] + product[0]), z = sigmoid(gx[1] + product[1]);
    const A q = product[2] + (w.b_n == nullptr ? A(0) : to_acc(w.b_n[u])), m = tanh(gx[2] + r * q);
    save(0, r);
    save(1, z);
    save(2, m);
    save(3, q);
    return {m + z * (h - m), 0, 0};
  }
  const bool coupled = p.cell == RecurrentCell::coupled;
  const A second = gx[1] + product[1], third = gx[2] + product[2], fourth = gx[3] + product[3];
  const A i = sigmoid(gx[0] + product[0] + peephole(p, d, 0, u, c));
  const A f = coupled ? A(1) - i : sigmoid(second + peephole(p, d, 1, u, c));
  const A g = tanh(coupled ? second : third);
  const A now = f * c + i * g;
  const A o = sigmoid((coupled ? third : fourth) + peephole(p, d, coupled ? 1 : 2, u, now));
  c = p.zoneout_c == 0 ? now : c + update_of_c(p, d, n, u) * (now - c);
  save(0, i);
  if (!coupled) save(1, f);
  save(coupled ? 1 : 2, g);
  save(coupled ? 2 : 3, o);
  if (w.cells != nullptr) w.cells[n * p.H + u] = c;
  return {o * tanh(now), now, o};
}

// The new h of unit u of sequence b, from m and the last one, as it reads back from y. Behind the sequence's `last`
// step it is h_n, and c is c_n.
template <typename T>
__device__ __forceinline__ acc_t<T> finish_h(const RecurrentFwdParams<T>& p, int d, int64_t n, int64_t b, int64_t u,
                                             bool last, acc_t<T> m, acc_t<T> h) {
  const T rounded = from_acc<T>(p.zoneout_h == 0 ? m : h + update_of_h(p, d, n, u) * (m - h));
  p.direction[d].y[n * p.y_row + u] = rounded;
  if (last) p.h_n[(d * p.B + b) * p.P + u] = rounded;
  return to_acc(rounded);
}
template <typename T>
__device__ __forceinline__ void finish_c(const RecurrentFwdParams<T>& p, int d, int64_t b, int64_t u, bool last,
                                         acc_t<T> c) {
  if (last && p.c_n != nullptr) p.c_n[(d * p.B + b) * p.H + u] = from_acc<T>(c);
}

// Gradients of a unit's sums: of gx by gate, of the product where it differs (q of a GRU), and what reaches the last h
// past the product.
template <typename A>
struct UnitGradients {
  A dgx[kMostGates], dq, past;
};

template <typename A>
struct CellGates {
  A i, f, g, o, old, now;
};

template <typename T>
__device__ __forceinline__ acc_t<T> saved_gate(const RecurrentParams<T>& p, int d, int64_t n, int g, int64_t u) {
  const T* const own = p.direction[d].gates + n * saved_of(p.cell) * p.H + u;
  return to_acc(own[g * p.H]);
}

// The gates of an LSTM as they were saved. c' is c unless zoneout held some of it back.
template <typename T>
__device__ __forceinline__ CellGates<acc_t<T>> saved_cell(const RecurrentParams<T>& p, int d, int64_t n, int64_t u,
                                                          acc_t<T> old) {
  using A = acc_t<T>;
  const bool coupled = p.cell == RecurrentCell::coupled;
  CellGates<A> c{};
  c.i = saved_gate(p, d, n, 0, u);
  c.f = coupled ? A(1) - c.i : saved_gate(p, d, n, 1, u);
  c.g = saved_gate(p, d, n, coupled ? 1 : 2, u);
  c.o = saved_gate(p, d, n, coupled ? 2 : 3, u);
  c.old = old;
  c.now = p.zoneout_c == 0 ? p.direction[d].cells[n * p.H + u] : c.f * old + c.i * c.g;
  return c;
}

// Through the gates of an LSTM, from the gradient of o's sum and the part of that of c' that came through m. dc arrives
// from the next step and leaves for the one before.
template <typename T>
__device__ __forceinline__ UnitGradients<acc_t<T>> cell_bwd(const RecurrentBwdParams<T>& p, int d, int64_t n, int64_t u,
                                                            const CellGates<acc_t<T>>& c, acc_t<T> d_o, acc_t<T> dnow,
                                                            acc_t<T>& dc) {
  using A = acc_t<T>;
  const bool coupled = p.cell == RecurrentCell::coupled;
  if (p.dcells[d] != nullptr) dc += p.dcells[d][n * p.H + u];
  A dold = 0;
  if (p.zoneout_c != 0) {
    const A update = update_of_c(p, d, n, u);
    dold = (A(1) - update) * dc;
    dc *= update;
  }
  dc += dnow + peephole(p, d, coupled ? 1 : 2, u, d_o);
  const A di = dc * (coupled ? c.g - c.old : c.g) * c.i * (A(1) - c.i);
  const A df = coupled ? A(0) : dc * c.old * c.f * (A(1) - c.f);
  const A dg = dc * c.i * (A(1) - c.g * c.g);
  dold += dc * c.f + peephole(p, d, 0, u, di);
  if (!coupled) dold += peephole(p, d, 1, u, df);
  dc = dold;
  return {{di, coupled ? dg : df, coupled ? d_o : dg, d_o}, 0, 0};
}

// From dm to the gradients of the sums; nothing is normalised. `h` and `old` are what the step began with.
template <typename T>
__device__ __forceinline__ UnitGradients<acc_t<T>> unit_bwd(const RecurrentBwdParams<T>& p, int d, int64_t n, int64_t u,
                                                            acc_t<T> dm, acc_t<T> h, acc_t<T> old, acc_t<T>& dc) {
  using A = acc_t<T>;
  if (p.cell == RecurrentCell::rnn_tanh || p.cell == RecurrentCell::rnn_relu) {
    const A m = saved_gate(p, d, n, 0, u);
    return {{p.cell == RecurrentCell::rnn_tanh ? dm * (A(1) - m * m) : m > 0 ? dm : A(0), 0, 0, 0}, 0, 0};
  }
  if (p.cell == RecurrentCell::gru) {
    const A r = saved_gate(p, d, n, 0, u), z = saved_gate(p, d, n, 1, u), m = saved_gate(p, d, n, 2, u);
    const A q = saved_gate(p, d, n, 3, u), dn = dm * (A(1) - z) * (A(1) - m * m);
    return {{dn * q * r * (A(1) - r), dm * (h - m) * z * (A(1) - z), dn, 0}, dn * r, dm * z};
  }
  const CellGates<A> c = saved_cell(p, d, n, u, old);
  const A seen = tanh(c.now);
  return cell_bwd(p, d, n, u, c, dm * seen * c.o * (A(1) - c.o), dm * c.o * (A(1) - seen * seen), dc);
}

// The gradient of gate g's product.
template <typename A>
__device__ __forceinline__ A product_gradient(RecurrentCell cell, const UnitGradients<A>& of, int g) {
  return cell == RecurrentCell::gru && g == 2 ? of.dq : of.dgx[g];
}

template <typename T>
__device__ __forceinline__ void store_gradients(const RecurrentBwdParams<T>& p, int d, int64_t n, int64_t u,
                                                const UnitGradients<acc_t<T>>& of, bool with_dp) {
  const int64_t own = n * gates_of(p.cell) * p.H + u;
  T *const dgx = p.dgx[d] + own, *const dp = with_dp ? p.dp[d] + own : nullptr;
#pragma unroll
  for (int g = 0; g < kMostGates; ++g) {
    if (g >= gates_of(p.cell)) break;
    dgx[g * p.H] = from_acc<T>(of.dgx[g]);
    if (with_dp) dp[g * p.H] = from_acc<T>(product_gradient(p.cell, of, g));
  }
}

// dh and dc of unit u as they leave the step after this one: 0 where that one began anew, the gradients of the last
// states where there is none. `product` is that with the weights.
template <typename T>
__device__ __forceinline__ acc_t<T> arriving_h(const RecurrentBwdParams<T>& p, int d, const Steps& s, int64_t b,
                                               int64_t u, acc_t<T> product, acc_t<T> past) {
  const T* keep = p.direction[d].keep;
  if (b >= s.after.count) {
    return p.dh_n == nullptr ? acc_t<T>(0) : to_acc(p.dh_n[(d * p.B + b) * p.P + u]);
  }
  if (resets(p, row_of(p, s.after, b))) return 0;
  return (keep == nullptr ? product : product * to_acc(keep[b * p.P + u])) + past;
}
template <typename T>
__device__ __forceinline__ acc_t<T> arriving_c(const RecurrentBwdParams<T>& p, int d, const Steps& s, int64_t b,
                                               int64_t u, acc_t<T> dc) {
  if (b >= s.after.count) {
    return p.dc_n == nullptr ? acc_t<T>(0) : to_acc(p.dc_n[(d * p.B + b) * p.H + u]);
  }
  return resets(p, row_of(p, s.after, b)) ? acc_t<T>(0) : dc;
}

// dm from dh: adds dy and takes off what zoneout leads past the step.
template <typename T>
__device__ __forceinline__ acc_t<T> through_zoneout(const RecurrentBwdParams<T>& p, int d, int64_t n, int64_t u,
                                                    acc_t<T> dh, acc_t<T>& past) {
  using A = acc_t<T>;
  if (p.dy[d] != nullptr) dh += to_acc(p.dy[d][n * p.dy_row + u]);
  past = 0;
  if (p.zoneout_h == 0) return dh;
  const A update = update_of_h(p, d, n, u);
  past = (A(1) - update) * dh;
  return dh * update;
}

// ------------------------------------------------------------------------------------------- the product of one step
// out[b, g, u] = sum over k < inner of x[b, k] w[g, u, k], a tile of kTileRows sequences and kTileUnits units to a
// block. Thread: unit threadIdx % kTileUnits, kThreadRows sequences.

constexpr int kTileUnits = 32, kTileInner = 32, kTileRows = 16, kThreadRows = 4;
constexpr int kTileThreads = kTileUnits * kTileRows / kThreadRows;

// Rows are padded, so that neither order of writing meets one bank.
template <typename A, int kGates>
struct ProductStorage {
  A w[kTileInner][kGates * kTileUnits + 1];
  A x[kTileInner][kTileRows + 1];
};

// w(g, u, k) and x(row, k) load, or give 0 outside. Neighbouring threads take neighbouring k of w, or where kTransposed
// neighbouring u.
template <bool kTransposed, typename A, int kGates, typename W, typename X>
__device__ __forceinline__ void multiply_tile(ProductStorage<A, kGates>& storage, int gates, int64_t inner, W w, X x,
                                              A (&sum)[kGates][kThreadRows]) {
  const int unit = threadIdx.x % kTileUnits, row = threadIdx.x / kTileUnits * kThreadRows;
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) sum[g][r] = 0;
  }
  for (int64_t k0 = 0; k0 < inner; k0 += kTileInner) {
    sync_block();  // the tile before has been read
    for (int i = threadIdx.x; i < gates * kTileUnits * kTileInner; i += kTileThreads) {
      const int fast = i % kTileInner, slow = i / kTileInner;
      const int g = slow / kTileUnits, u = kTransposed ? fast : slow % kTileUnits;
      const int k = kTransposed ? slow % kTileInner : fast;
      storage.w[k][g * kTileUnits + u] = k0 + k < inner ? w(g, u, k0 + k) : A(0);
    }
    for (int i = threadIdx.x; i < kTileRows * kTileInner; i += kTileThreads) {
      const int k = i % kTileInner;
      storage.x[k][i / kTileInner] = k0 + k < inner ? x(i / kTileInner, k0 + k) : A(0);
    }
    sync_block();
    for (int k = 0; k < kTileInner; ++k) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        if (g >= gates) break;
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) sum[g][r] += storage.w[k][g * kTileUnits + unit] * storage.x[k][row + r];
      }
    }
  }
}

// Mean and 1 / sqrt(variance + eps) of values(i), i < count, for the whole block; each thread visits the same i always.
template <typename A, typename F>
__device__ __forceinline__ void find_norm(BlockReduce<A, 2>& reduce, int64_t count, A eps, F values, A& mean, A& rstd) {
  A sums[2] = {};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sums[0] += values(i);
  reduce.sum(sums);
  mean = sums[0] / A(count);
  sums[0] = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const A centred = values(i) - mean;
    sums[0] += centred * centred;
  }
  reduce.sum(sums);
  rstd = A(1) / sqrt(sums[0] / A(count) + eps);
}

constexpr int kRowThreads = 256;  // of a block for one row

// ------------------------------------------------------------------------------------------- weights over all steps
// A warp holds kTiles tiles of 16 rows of the weights, and kSteps steps of their columns, the last kShared of them in
// shared memory, where registers do not suffice; it multiplies them with 8 sequences. Lane = 4 g + t gets sums of rows
// g (first two) and g + 8 of each tile, for sequences 2 t and 2 t + 1. `own` is the warp's part of shared memory.

constexpr int kSequenceWarps = 16, kRowTile = 8;  // of a block at most; sequences of a product

template <typename T, int kTiles, int kSteps, int kShared>
class HeldWeights {
 public:
  static constexpr int kInner = kSteps * 16, kSharedBytes = kTiles * kShared * kWarpSize * 16;

  // element(tile, row, k), 0 outside.
  template <typename F>
  __device__ __forceinline__ void load(unsigned char* own, F element) {
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Vec<uint32_t, 4> a;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = g + j % 2 * 8, k = step * 16 + j / 2 * 8 + 2 * t;
          a[j] = uint32_t(element(i, row, k).bits) | uint32_t(element(i, row, k + 1).bits) << 16;
        }
        if (step < kHeld) {
          a_[i][step] = a;
        } else {
          store_vec(place(own, i, step), a);
        }
      }
    }
  }

  // x: the sequences' rows in shared memory, `stride` elements apart, from the first of the columns on.
  __device__ __forceinline__ void multiply(unsigned char* own, const T* x, int stride, float (&sum)[kTiles][4]) const {
    const int lane = threadIdx.x % kWarpSize;
    const T* const row = x + lane % 8 * stride + lane / 8 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t b[4];
      ldmatrix<4, false>(b, row + step * 16);
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) mma_16x8x16<T>(sum[i], weights(own, i, step).v, first);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) mma_16x8x16<T>(sum[i], weights(own, i, step + 1).v, second);
    }
  }

 private:
  static constexpr int kHeld = kSteps - kShared;
  static __device__ __forceinline__ uint32_t* place(unsigned char* own, int i, int step) {
    return reinterpret_cast<uint32_t*>(own) + ((i * kShared + step - kHeld) * kWarpSize + threadIdx.x % kWarpSize) * 4;
  }
  __device__ __forceinline__ Vec<uint32_t, 4> weights(unsigned char* own, int i, int step) const {
    return step < kHeld ? a_[i][step < kHeld ? step : 0] : load_vec<4>(place(own, i, step));
  }
  Vec<uint32_t, 4> a_[kTiles][kHeld];
};

// float: the four lanes of a row share its columns, and exchange their sums.
template <int kTiles, int kSteps, int kShared>
class HeldWeights<float, kTiles, kSteps, kShared> {
 public:
  static constexpr int kInner = kSteps * 8, kSharedBytes = kTiles * kShared * kWarpSize * 16;

  template <typename F>
  __device__ __forceinline__ void load(unsigned char* own, F element) {
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int k = 0; k < kSteps / 2; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Vec<float, 4> w;
#pragma unroll
          for (int j = 0; j < 4; ++j) w[j] = element(i, g + 8 * half, 16 * k + 4 * t + j);
          if (k < kHeld) {
            w_[i][k][half] = w;
          } else {
            store_vec(place(own, i, k, half), w);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(unsigned char* own, const float* x, int stride,
                                           float (&sum)[kTiles][4]) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float part[2][kRowTile] = {};  // of rows g and g + 8
#pragma unroll
      for (int k = 0; k < kSteps / 2; ++k) {
        const Vec<float, 4> upper = weights(own, i, k, 0), lower = weights(own, i, k, 1);
#pragma unroll
        for (int n = 0; n < kRowTile; ++n) {
          const Vec<float, 4> v = load_vec<4>(x + n * stride + 16 * k + 4 * t);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            part[0][n] += upper[j] * v[j];
            part[1][n] += lower[j] * v[j];
          }
        }
      }
      // Of eight sequences a lane keeps four, then two.
      float four[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float given = shfl_xor(t < 2 ? part[half][4 + n] : part[half][n], 2);
          four[half][n] = (t < 2 ? part[half][n] : part[half][4 + n]) + given;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float given = shfl_xor(t % 2 == 0 ? four[half][2 + n] : four[half][n], 1);
          sum[i][2 * half + n] += (t % 2 == 0 ? four[half][n] : four[half][2 + n]) + given;
        }
      }
    }
  }

 private:
  static constexpr int kHeld = (kSteps - kShared) / 2;
  static __device__ __forceinline__ float* place(unsigned char* own, int i, int k, int half) {
    const int vector = i * kShared + (k - kHeld) * 2 + half;
    return reinterpret_cast<float*>(own) + (vector * kWarpSize + threadIdx.x % kWarpSize) * 4;
  }
  __device__ __forceinline__ Vec<float, 4> weights(unsigned char* own, int i, int k, int half) const {
    return k < kHeld ? w_[i][k < kHeld ? k : 0][half] : load_vec<4>(place(own, i, k, half));
  }
  Vec<float, 4> w_[kTiles][kHeld][2];
};

// How a kernel over all steps divides its work. A group of units has `parts` warps, which share the inner dimension of
// the product; a block has `groups` of them, and `slices` blocks share a tile of sequences.
struct SequencePlan {
  int parts, groups, slices;
  int row_tiles;          // of a block: 8 sequences each
  int tiles, first_tile;  // of sequences, in this launch
  int stride;             // of rows in shared memory
  uint32_t first_stamp;
};

constexpr int kNoSequence = 1 << 30;  // beyond all others

// What a thread of such a kernel does: its warp's place, its block's place.
struct SequencePlace {
  int lane, warp, part, group, slice;
  int first_b;      // of the block's sequences
  int words_block;  // of the words that its tile exchanges
};

__device__ __forceinline__ SequencePlace place_of(const SequencePlan& plan) {
  SequencePlace at;
  at.lane = threadIdx.x % kWarpSize;
  at.warp = threadIdx.x / kWarpSize;
  at.part = at.warp % plan.parts;
  at.group = at.warp / plan.parts;
  at.slice = blockIdx.x % plan.slices;
  const int tile = blockIdx.x / plan.slices;
  at.first_b = (plan.first_tile + tile) * plan.row_tiles * kRowTile;
  at.words_block = blockIdx.y * plan.tiles + tile;
  return at;
}

// Sequences whose values share a word.
template <typename T>
constexpr int kInWord = sizeof(T) == 2 ? 2 : 1;

template <typename T>
__device__ __forceinline__ uint32_t bits_of(T v) {
  uint32_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  return bits;
}

template <typename T>
__device__ __forceinline__ T from_bits(uint32_t bits) {
  T v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// The words of step number s of a tile: [2, sequences / kInWord, inner], by turns.
template <typename T>
__device__ __forceinline__ uint64_t* words_of(uint64_t* words, const SequencePlan& plan, const SequencePlace& at, int s,
                                              int inner) {
  return words + (at.words_block * 2 + s % 2) * (plan.row_tiles * kRowTile / kInWord<T>)*inner;
}

// Value v of the thread's first (e = 0) and second sequence, `row` and row + 1 of the tile, in turn; `pending` holds
// the half of a word between. Of the second one nothing counts where it is not `active`.
template <typename T>
__device__ __forceinline__ void publish(uint64_t* words, int row, int e, int inner, int k, T v, bool active,
                                        uint32_t stamp, uint32_t& pending) {
  if constexpr (kInWord<T> == 1) {
    if (active) store_stamped(words + (row + e) * inner + k, bits_of(v), stamp);
  } else if (e == 0) {
    pending = bits_of(v);
  } else {
    store_stamped(words + row / 2 * inner + k, pending | bits_of(v) << 16, stamp);
  }
}

template <typename T>
__device__ __forceinline__ void swap_values(T& a, T& b) {
  const T t = a;
  a = b;
  b = t;
}

// The values of the first `count` sequences of the tile, into rows of shared memory.
template <typename T>
__device__ __forceinline__ void gather(const uint64_t* words, const SequencePlan& plan, int inner, int count,
                                       uint32_t stamp, T* rows) {
  constexpr int kAtOnce = 4;
  const int total = (count + kInWord<T> - 1) / kInWord<T> * inner, threads = blockDim.x;
  for (int first = threadIdx.x; first < total; first += kAtOnce * threads) {
    uint32_t value[kAtOnce];
    await_stamped(words + first, threads, (total - first + threads - 1) / threads, stamp, value);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * threads;
      if (at >= total) break;
      const int row = at / inner * kInWord<T>, k = at % inner;
      rows[row * plan.stride + k] = from_bits<T>(value[i]);
      if (kInWord<T> == 2 && row + 1 < count) rows[(row + 1) * plan.stride + k] = from_bits<T>(value[i] >> 16);
    }
  }
}

// Sums of the parts, in their order. partial: [warps, row_tiles, kTiles, lanes, 4].
template <int kTiles>
__device__ __forceinline__ float* partial_of(float* partial, const SequencePlan& plan, int warp, int row_tile, int tile,
                                             int lane) {
  return partial + (((warp * plan.row_tiles + row_tile) * kTiles + tile) * kWarpSize + lane) * 4;
}

// The products of the block's weights with its rows. Behind them, warp `part` of a group has the sums of row tile
// `row_tile`, where that is one.
template <typename T, int kTiles, int kSteps, int kShared>
__device__ __forceinline__ void multiply_rows(const HeldWeights<T, kTiles, kSteps, kShared>& weights,
                                              unsigned char* own, const SequencePlan& plan, const SequencePlace& at,
                                              const T* rows, float* partial, int row_tile, float (&sum)[kTiles][4]) {
  for (int j = 0; j < plan.row_tiles; ++j) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0;
    weights.multiply(own, rows + j * kRowTile * plan.stride + at.part * weights.kInner, plan.stride, sum);
    if (plan.parts == 1) return;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      store_vec(partial_of<kTiles>(partial, plan, at.warp, j, i, at.lane),
                Vec<float, 4>{sum[i][0], sum[i][1], sum[i][2], sum[i][3]});
    }
  }
  sync_block();
  if (row_tile >= plan.row_tiles) return;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0;
    for (int part = 0; part < plan.parts; ++part) {
      const int warp = at.warp - at.part + part;
      const Vec<float, 4> v = load_vec<4>(partial_of<kTiles>(partial, plan, warp, row_tile, i, at.lane));
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += v[j];
    }
  }
}

}  // namespace pyops
