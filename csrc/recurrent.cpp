// Binds the recurrent kernels. The arguments are those of every backend (see pyops/recurrent.py); the shapes are in
// kernels/params/recurrent.h.
#include "../kernels/params/recurrent.h"

#include "bindings.h"
#include "plain.h"

#ifdef PYOPS_SIMT
#include "../kernels/cuda/recurrent.h"
#else
#include "../kernels/cpu/recurrent.h"
#include "cpu_isa.h"
#ifdef PYOPS_WITH_CUDA
#include "../kernels/cuda/recurrent.h"
#endif
#endif

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

namespace py = pybind11;

namespace pyops {
namespace {

constexpr const char* kFwd = "recurrent_fwd";
constexpr const char* kBwd = "recurrent_bwd";

struct Cell {
  RecurrentCell kind;
  int gates, saved;
  bool has_cells;
};

Cell cell_named(const std::string& name, const char* op) {
  if (name == "rnn_tanh") return {RecurrentCell::rnn_tanh, 1, 1, false};
  if (name == "rnn_relu") return {RecurrentCell::rnn_relu, 1, 1, false};
  if (name == "gru") return {RecurrentCell::gru, 3, 4, false};
  if (name == "coupled") return {RecurrentCell::coupled, 3, 3, true};
  require(name == "lstm", op, "cell must be rnn_tanh, rnn_relu, gru, lstm or coupled");
  return {RecurrentCell::lstm, 4, 4, true};
}

bool on_cuda([[maybe_unused]] const TensorView& gx) {
#ifdef PYOPS_SIMT
  return true;
#else
  return gx.is_cuda();
#endif
}

bool same_device(const TensorView& a, const TensorView& b) {
  return a.t.device.device_type == b.t.device.device_type && a.t.device.device_id == b.t.device.device_id;
}

// A matrix whose rows are dense, on the device of `like`.
template <typename T>
T* matrix(const TensorView& v, const TensorView& like, int64_t rows, int64_t columns, int64_t& row, const char* op,
          const char* rule) {
  require(v && has_dtype<std::remove_const_t<T>>(v) && same_device(v, like) && v.t.ndim == 2 && v.size(0) == rows &&
              v.size(1) == columns && (columns == 1 || v.stride(1) == 1),
          op, rule);
  row = v.stride(0);
  return v.data<T>();
}

// The tensors of one direction, in the order of the arguments.
struct DirectionViews {
  const TensorView &gx, &w_hh, &b_n, &w_hr, &peephole, &ln_gates, &ln_cell;
};

struct Options {
  std::string cell;
  int64_t steps, batch;
  bool batch_first;
  double zoneout_h, zoneout_c, eps;
  int num_threads;
};

// The sizes of a call, from a matrix of all rows.
template <typename Params>
void fill_sizes(Params& p, const Cell& cell, const TensorView& gx, const TensorView& w_hh, const TensorView& w_hr,
                bool both, int64_t steps, int64_t batch, const char* op) {
#if !defined(PYOPS_SIMT) && defined(PYOPS_WITH_CUDA)
  require(gx && (gx.is_cpu() || gx.is_cuda()), op, "gx must be a CPU or CUDA tensor");
#else
  require(gx && gx.is_cpu(), op, "gx must be a CPU tensor: this build has no CUDA kernels");
#endif
  require(w_hh && w_hh.t.ndim == 2 && gx.t.ndim == 2, op, "gx and w_hh must be matrices");
  p.cell = cell.kind;
  p.directions = both ? 2 : 1;
  p.T_ = steps, p.B = batch;
  p.H = w_hh.size(0) / cell.gates, p.P = w_hh.size(1);
  p.rows = gx.size(0);
  require(p.T_ > 0 && p.B > 0 && p.H > 0 && p.P > 0 && w_hh.size(0) == p.H * cell.gates && (p.P == p.H || w_hr), op,
          "no size may be 0, and w_hh must be [G H, H], or [G H, P] with a projection");
}

// What forward and backward share. `y` is [rows, directions P].
template <typename T, typename Params>
void fill(Params& p, const Cell& cell, const DirectionViews (&views)[2], const TensorView& h0, const TensorView& c0,
          const TensorView& keep, const TensorView& reset, const TensorView& seed, const TensorView& offsets,
          const TensorView& y, const TensorView& gates, const TensorView& cells, const Options& o, const char* op) {
  const TensorView& first = views[0].gx;
  fill_sizes(p, cell, first, views[0].w_hh, views[0].w_hr, bool(views[1].gx), o.steps, o.batch, op);
  if (offsets) {
    constexpr const char* kRule = "offsets must be dense int64 [T + 1] on the CPU";
    require(offsets.is_cpu(), op, kRule);
    p.offsets = dense<int64_t>(offsets, offsets, p.T_ + 1, op, kRule);
    bool ok = p.offsets[0] == 0 && p.offsets[1] == p.B && p.offsets[p.T_] == p.rows;
    for (int64_t t = 0; ok && t < p.T_; ++t) {
      const int64_t n = p.offsets[t + 1] - p.offsets[t];
      ok = n > 0 && n <= p.B && (t == 0 || n <= p.offsets[t] - p.offsets[t - 1]);
    }
    require(ok, op, "offsets must rise to the number of rows, by less from step to step");
  } else {
    require(p.rows == p.T_ * p.B, op, "gx must have a row for each step of each sequence");
  }
  p.step_rows = o.batch_first ? 1 : p.B;
  p.batch_rows = o.batch_first ? p.T_ : 1;
  for (int d = 0; d < p.directions; ++d) {
    const DirectionViews& v = views[d];
    RecurrentDirection<T>& to = p.direction[d];
    to.gx =
        matrix<const T>(v.gx, first, p.rows, cell.gates * p.H, to.gx_row, op, "gx must be [rows, G H] with dense rows");
    to.w_hh =
        matrix<const T>(v.w_hh, first, cell.gates * p.H, p.P, to.w_hh_row, op, "w_hh must be [G H, P] with dense rows");
    require(bool(v.w_hr) == bool(views[0].w_hr) && bool(v.ln_gates) == bool(views[0].ln_gates) &&
                bool(v.ln_cell) == (cell.has_cells && v.ln_gates) && (!v.w_hr || cell.has_cells),
            op, "both directions must have the same options, and only an LSTM a projection and a norm of its cell");
    if (v.w_hr) {
      to.w_hr = matrix<const T>(v.w_hr, first, p.P, p.H, to.w_hr_row, op, "w_hr must be [P, H] with dense rows");
    }
    to.ln_gates = dense<T>(v.ln_gates, first, cell.gates * p.H, op, "ln_gates must be dense [G H]");
    to.ln_cell = dense<T>(v.ln_cell, first, 2 * p.H, op, "ln_cell must be dense [2, H]");
    to.b_n = dense<T>(v.b_n, first, p.H, op, "b_n must be dense [H]");
    to.peephole = dense<T>(v.peephole, first, (cell.gates - 1) * p.H, op, "peephole must be dense [G - 1, H]");
    to.h0 = dense<T>(h0, first, p.directions * p.B * p.P, op, "h0 must be dense [directions, B, P]");
    to.c0 = dense<T>(c0, first, p.directions * p.B * p.H, op, "c0 must be dense [directions, B, H]");
    to.keep = dense<T>(keep, first, p.directions * p.B * p.P, op, "keep must be dense [directions, B, P]");
    to.gates = dense<T>(gates, first, p.directions * p.rows * cell.saved * p.H, op, "gates must be dense");
    to.cells = dense<acc_t<T>>(cells, first, p.directions * p.rows * p.H, op, "cells must be dense");
    if (to.h0 != nullptr) to.h0 += d * p.B * p.P;
    if (to.c0 != nullptr) to.c0 += d * p.B * p.H;
    if (to.keep != nullptr) to.keep += d * p.B * p.P;
    if (to.gates != nullptr) to.gates += d * p.rows * cell.saved * p.H;
    if (to.cells != nullptr) to.cells += d * p.rows * p.H;
    to.y =
        matrix<T>(y, first, p.rows, p.directions * p.P, p.y_row, op, "y must be [rows, directions P] with dense rows") +
        d * p.P;
  }
  p.reset = dense<bool>(reset, first, p.rows, op, "reset must be dense bool [rows]");
  p.seed = dense<int64_t>(seed, first, 2, op, "seed must be two int64");
  p.zoneout_h = static_cast<acc_t<T>>(o.zoneout_h);
  p.zoneout_c = static_cast<acc_t<T>>(o.zoneout_c);
  p.eps = static_cast<acc_t<T>>(o.eps);
  p.num_threads = o.num_threads;
}

#ifndef PYOPS_SIMT
template <typename T>
void run_cpu(const RecurrentFwdParams<T>& params) {
  PYOPS_CPU_DISPATCH(recurrent_fwd_cpu, params);
}
template <typename T>
void run_cpu(const RecurrentBwdParams<T>& params) {
  PYOPS_CPU_DISPATCH(recurrent_bwd_cpu, params);
}
template <typename T>
void run_cpu(const RecurrentGradients<T>& params) {
  PYOPS_CPU_DISPATCH(recurrent_gradients_cpu, params);
}

// Products. A small call finishes sooner than the interpreter lock changes hands.
constexpr int64_t kReleaseGilFrom = 1 << 16;
#endif
#if defined(PYOPS_SIMT) || defined(PYOPS_WITH_CUDA)
template <typename T>
void run_cuda(const RecurrentFwdParams<T>& params, acc_t<T>* workspace, void* stream) {
  recurrent_fwd_cuda(params, workspace, stream);
}
template <typename T>
void run_cuda(const RecurrentBwdParams<T>& params, acc_t<T>* workspace, void* stream) {
  recurrent_bwd_cuda(params, workspace, stream);
}
template <typename T>
int64_t workspace_cuda(const RecurrentFwdParams<T>& params) {
  return recurrent_fwd_workspace_cuda(params);
}
template <typename T>
int64_t workspace_cuda(const RecurrentBwdParams<T>& params) {
  return recurrent_bwd_workspace_cuda(params);
}
#endif

// Elements of `workspace`; 0 on the CPU, whose kernels keep their own.
template <typename Params>
int64_t workspace_size([[maybe_unused]] const Params& params, const TensorView& gx) {
  if (on_cuda(gx)) {
#if defined(PYOPS_SIMT)
    return workspace_cuda(params);
#elif defined(PYOPS_WITH_CUDA)
    DeviceGuard guard(gx.t.device.device_id);
    return workspace_cuda(params);
#endif
  }
  return 0;
}

// Launches the kernels where gx lives.
template <typename T, typename Params>
void run(const Params& params, const TensorView& gx, const TensorView& workspace, const char* op) {
  if (on_cuda(gx)) {
    const int64_t size = workspace_size(params, gx);
    require(size == 0 || (workspace && workspace.numel() >= size), op, "workspace is missing or too small");
    [[maybe_unused]] auto* memory =
        size == 0 ? nullptr : dense<acc_t<T>>(workspace, gx, workspace.numel(), op, "workspace must be dense");
    require(reinterpret_cast<uintptr_t>(memory) % 16 == 0, op, "workspace must start at a multiple of 16 bytes");
#if defined(PYOPS_SIMT)
    run_cuda(params, memory, nullptr);
#elif defined(PYOPS_WITH_CUDA)
    DeviceGuard guard(gx.t.device.device_id);
    run_cuda(params, memory, current_stream(gx));
#endif
    return;
  }
#ifndef PYOPS_SIMT
  if (params.rows * params.directions * params.H * params.P < kReleaseGilFrom) return run_cpu(params);
  py::gil_scoped_release release;
  run_cpu(params);
#endif
}

void recurrent_fwd(const TensorView& gx, const TensorView& w_hh, const TensorView& b_n, const TensorView& w_hr,
                   const TensorView& peephole, const TensorView& ln_gates, const TensorView& ln_cell,
                   const TensorView& gx_r, const TensorView& w_hh_r, const TensorView& b_n_r, const TensorView& w_hr_r,
                   const TensorView& peephole_r, const TensorView& ln_gates_r, const TensorView& ln_cell_r,
                   const TensorView& h0, const TensorView& c0, const TensorView& keep, const TensorView& reset,
                   const TensorView& seed, const TensorView& offsets, const TensorView& y, const TensorView& h_n,
                   const TensorView& c_n, const TensorView& gates, const TensorView& cells, const TensorView& workspace,
                   const std::string& cell, int64_t steps, int64_t batch, bool batch_first, double zoneout_h,
                   double zoneout_c, double eps, int num_threads) {
  const Cell kind = cell_named(cell, kFwd);
  const Options o{cell, steps, batch, batch_first, zoneout_h, zoneout_c, eps, num_threads};
  const DirectionViews views[] = {{gx, w_hh, b_n, w_hr, peephole, ln_gates, ln_cell},
                                  {gx_r, w_hh_r, b_n_r, w_hr_r, peephole_r, ln_gates_r, ln_cell_r}};
  dispatch_dtypes(kFwd, gx, {}, [&](auto t, auto) {
    using T = typename decltype(t)::type;
    RecurrentFwdParams<T> p{};
    fill<T>(p, kind, views, h0, c0, keep, reset, seed, offsets, y, gates, cells, o, kFwd);
    p.h_n = dense<T>(h_n, gx, p.directions * p.B * p.P, kFwd, "h_n must be dense [directions, B, P]");
    p.c_n = dense<T>(c_n, gx, p.directions * p.B * p.H, kFwd, "c_n must be dense [directions, B, H]");
    require(p.h_n != nullptr && (p.c_n != nullptr) == kind.has_cells, kFwd, "an output is missing");
    run<T>(p, gx, workspace, kFwd);
  });
}

void recurrent_bwd(const TensorView& dy, const TensorView& dh_n, const TensorView& dc_n, const TensorView& dcells,
                   const TensorView& gx, const TensorView& w_hh, const TensorView& b_n, const TensorView& w_hr,
                   const TensorView& peephole, const TensorView& ln_gates, const TensorView& ln_cell,
                   const TensorView& gx_r, const TensorView& w_hh_r, const TensorView& b_n_r, const TensorView& w_hr_r,
                   const TensorView& peephole_r, const TensorView& ln_gates_r, const TensorView& ln_cell_r,
                   const TensorView& h0, const TensorView& c0, const TensorView& keep, const TensorView& reset,
                   const TensorView& seed, const TensorView& offsets, const TensorView& y, const TensorView& gates,
                   const TensorView& cells, const TensorView& products, const TensorView& dgx, const TensorView& dp,
                   const TensorView& dm, const TensorView& dbias, const TensorView& dpeephole,
                   const TensorView& dln_gates, const TensorView& dln_cell, const TensorView& dh0,
                   const TensorView& dc0, const TensorView& workspace, const std::string& cell, int64_t steps,
                   int64_t batch, bool batch_first, double zoneout_h, double zoneout_c, double eps, int num_threads) {
  const Cell kind = cell_named(cell, kBwd);
  const Options o{cell, steps, batch, batch_first, zoneout_h, zoneout_c, eps, num_threads};
  const DirectionViews views[] = {{gx, w_hh, b_n, w_hr, peephole, ln_gates, ln_cell},
                                  {gx_r, w_hh_r, b_n_r, w_hr_r, peephole_r, ln_gates_r, ln_cell_r}};
  dispatch_dtypes(kBwd, gx, {}, [&](auto t, auto) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    RecurrentBwdParams<T> p{};
    fill<T>(p, kind, views, h0, c0, keep, reset, seed, offsets, y, gates, cells, o, kBwd);
    const int64_t states = p.directions * p.B;
    p.dh_n = dense<T>(dh_n, gx, states * p.P, kBwd, "dh_n must be dense [directions, B, P]");
    p.dc_n = dense<T>(dc_n, gx, states * p.H, kBwd, "dc_n must be dense [directions, B, H]");
    p.dh0 = dense<A>(dh0, gx, states * p.P, kBwd, "dh0 must be dense [directions, B, P]");
    p.dc0 = dense<A>(dc0, gx, states * p.H, kBwd, "dc0 must be dense [directions, B, H]");
    require(gates && dgx && p.dh0 != nullptr && bool(cells) == kind.has_cells && bool(dc0) == kind.has_cells, kBwd,
            "a tensor is missing");
    const int64_t of_dgx = p.rows * kind.gates * p.H, of_peephole = (kind.gates - 1) * p.H;
    T* const dgxs = dense<T>(dgx, gx, p.directions * of_dgx, kBwd, "dgx must be dense [directions, rows, G H]");
    T* const dps = dense<T>(dp, gx, p.directions * of_dgx, kBwd, "dp must be dense [directions, rows, G H]");
    A* const sums = dense<A>(dpeephole, gx, p.directions * of_peephole, kBwd, "dpeephole must be dense");
    A* const recomputed = dense<A>(products, gx, p.directions * of_dgx, kBwd, "products must be dense");
    T* const dms = dense<T>(dm, gx, p.directions * p.rows * p.P, kBwd, "dm must be dense [directions, rows, P]");
    A* const of_gates = dense<A>(dln_gates, gx, p.directions * kind.gates * p.H, kBwd, "dln_gates must be dense");
    A* const of_cell = dense<A>(dln_cell, gx, p.directions * 2 * p.H, kBwd, "dln_cell must be dense");
    require(bool(products) == bool(ln_gates) && bool(dm) == bool(w_hr) && (!ln_gates || dp), kBwd,
            "a tensor is missing");
    A* const biases = dense<A>(dbias, gx, p.directions * kind.saved * p.H, kBwd, "dbias must be dense");
    A* const cell_grads = dense<A>(dcells, gx, p.directions * p.rows * p.H, kBwd, "dcells must be dense");
    for (int d = 0; d < p.directions; ++d) {
      if (dy) {
        p.dy[d] = matrix<const T>(dy, gx, p.rows, p.directions * p.P, p.dy_row, kBwd, "dy must be like y") + d * p.P;
      }
      p.dgx[d] = dgxs + d * of_dgx;
      p.dp[d] = dps == nullptr ? nullptr : dps + d * of_dgx;
      p.dbias[d] = biases == nullptr ? nullptr : biases + d * kind.saved * p.H;
      p.products[d] = recomputed == nullptr ? nullptr : recomputed + d * of_dgx;
      p.dm[d] = dms == nullptr ? nullptr : dms + d * p.rows * p.P;
      p.dln_gates[d] = of_gates == nullptr ? nullptr : of_gates + d * kind.gates * p.H;
      p.dln_cell[d] = of_cell == nullptr ? nullptr : of_cell + d * 2 * p.H;
      p.dpeephole[d] = sums == nullptr ? nullptr : sums + d * of_peephole;
      p.dcells[d] = cell_grads == nullptr ? nullptr : cell_grads + d * p.rows * p.H;
    }
    run<T>(p, gx, workspace, kBwd);
  });
}

// The elements of `workspace` that a call needs.
template <template <typename> typename Params>
int64_t workspace(const TensorView& gx, const TensorView& w_hh, const TensorView& w_hr, const TensorView& ln_gates,
                  const TensorView& w_hh_r, const TensorView& offsets, const std::string& cell, int64_t steps,
                  int64_t batch, const char* op) {
  int64_t size = 0;
  dispatch_dtypes(op, gx, {}, [&](auto t, auto) {
    using T = typename decltype(t)::type;
    Params<T> p{};
    fill_sizes(p, cell_named(cell, op), gx, w_hh, w_hr, bool(w_hh_r), steps, batch, op);
    p.offsets = offsets.data<const int64_t>();
    p.direction[0].w_hr = w_hr.data<const T>();
    p.direction[0].ln_gates = ln_gates.data<const T>();
    size = workspace_size(p, gx);
  });
  return size;
}

int64_t recurrent_fwd_workspace(const TensorView& gx, const TensorView& w_hh, const TensorView& w_hr,
                                const TensorView& ln_gates, const TensorView& w_hh_r, const TensorView& offsets,
                                const std::string& cell, int64_t steps, int64_t batch) {
  return workspace<RecurrentFwdParams>(gx, w_hh, w_hr, ln_gates, w_hh_r, offsets, cell, steps, batch, kFwd);
}

int64_t recurrent_bwd_workspace(const TensorView& gx, const TensorView& w_hh, const TensorView& w_hr,
                                const TensorView& ln_gates, const TensorView& w_hh_r, const TensorView& offsets,
                                const std::string& cell, int64_t steps, int64_t batch) {
  return workspace<RecurrentBwdParams>(gx, w_hh, w_hr, ln_gates, w_hh_r, offsets, cell, steps, batch, kBwd);
}

#ifndef PYOPS_SIMT
// ---- the common call: one layer without options on plain, dense CPU tensors. Checked, allocated and run in one step.

// Products of x and W_ih from which on torch's matrix product is faster than ours.
constexpr int64_t kFewProducts = 1 << 26;
// Both weights within a core's second cache, with room for the rest.
constexpr int64_t kNearBytes = 3 << 19;

// (rows, columns) with dense rows.
bool is_matrix(const TensorView& v, const TensorView& like, int64_t rows, int64_t columns) {
  return v && same_dtype(v, like) && v.t.ndim == 2 && v.size(0) == rows && v.size(1) == columns &&
         (columns == 1 || v.stride(1) == 1);
}

// Absent, or a dense vector.
bool is_vector(const TensorView& v, const TensorView& like, int64_t size) {
  return !v || (same_dtype(v, like) && v.t.ndim == 1 && v.size(0) == size && v.is_contiguous());
}

// What a call is, where it is a common one; x is (B, F) of a cell, else (T, B, F) or (B, T, F).
struct LayerCall {
  LayerCall(const Cell& cell, bool is_cell, bool batch_first)
      : cell(cell), is_cell(is_cell), batch_first(batch_first), threads(get_num_threads()) {}

  Cell cell;
  bool is_cell, batch_first;
  int threads;
  TensorView x, h0, c0, w_ih, w_hh, b_ih, b_hh;
  int64_t steps = 1, batch = 0, F = 0, H = 0;

  bool is_common() {
    const bool known = has_dtype<float>(x) || has_dtype<double>(x) || has_dtype<bf16>(x) || has_dtype<f16>(x);
    if (!x || !known || x.t.ndim != (is_cell ? 2 : 3) || !w_hh || w_hh.t.ndim != 2) return false;
    if (is_cell ? x.size(1) > 1 && x.stride(1) != 1 : !x.is_contiguous()) return false;
    steps = is_cell ? 1 : x.size(batch_first ? 1 : 0);
    batch = x.size(is_cell || batch_first ? 0 : 1);
    F = x.size(x.t.ndim - 1), H = w_hh.size(1);
    const int64_t columns = cell.gates * H;
    const auto is_state = [&](const TensorView& v) {
      if (!v) return true;
      const int first = is_cell ? 0 : 1;
      return same_dtype(v, x) && v.is_contiguous() && v.t.ndim == 2 + first && (is_cell || v.size(0) == 1) &&
             v.size(first) == batch && v.size(first + 1) == H;
    };
    return steps > 0 && batch > 0 && F > 0 && H > 0 && is_matrix(w_ih, x, columns, F) &&
           is_matrix(w_hh, x, columns, H) && is_vector(b_ih, x, columns) && is_vector(b_hh, x, columns) &&
           is_state(h0) && (cell.has_cells ? is_state(c0) : !c0) &&
           (is_cell || steps * batch * columns * F < kFewProducts || is_folded());
  }
  // Whether no gx is formed: both weights of a thread stay in its core's second cache. Fewer than 8 sequences a thread
  // have the kernel divide the units (Division in kernels/cpu/recurrent_steps.h).
  bool is_folded() const {
    const int64_t shared = batch < 8 * threads ? threads : 1;
    return steps > 1 && batch > 1 && (F + H) * cell.gates * H * (x.t.dtype.bits == 64 ? 8 : 4) / shared <= kNearBytes;
  }
};

// A matrix on the memory of a dense tensor: its first `columns` of `row` numbers.
class Matrix {
 public:
  Matrix(const TensorView& v, int64_t rows, int64_t columns, int64_t row)
      : view_(v), sizes_{rows, columns}, strides_{row, 1} {
    view_.t.ndim = 2;
    view_.t.shape = sizes_;
    view_.t.strides = strides_;
  }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;
  operator const TensorView&() const { return view_; }

 private:
  TensorView view_;
  int64_t sizes_[2], strides_[2];
};

// The last H numbers of the bias of a GRU.
class LastBias {
 public:
  LastBias(const TensorView& bias, int64_t H) : view_(bias), size_(H) {
    if (!bias) return;
    view_.t.byte_offset += 2 * H * bias.t.dtype.bits / 8;
    view_.t.shape = &size_;
  }
  LastBias(const LastBias&) = delete;
  LastBias& operator=(const LastBias&) = delete;
  operator const TensorView&() const { return view_; }

 private:
  TensorView view_;
  int64_t size_;
};

PyObject* acc_dtype(const TensorView& v) {
  return has_dtype<double>(v) ? torch_objects.float64 : torch_objects.float32;
}

// (h, c) of a cell, (y, h_n, c_n) of a sequence, with c as None where the cell has none; when an argument wants a
// gradient (y, h_n, c_n, gates, cells) with y as rows, and h_n as None of a cell; or None for any other call.
py::object recurrent_forward(const std::string& cell, py::handle x, py::handle h0, py::handle c0, py::handle w_ih,
                             py::handle w_hh, py::handle b_ih, py::handle b_hh, bool is_cell, bool batch_first) {
  LayerCall call(cell_named(cell, kFwd), is_cell, batch_first);
  const std::pair<py::handle, TensorView*> all[] = {{x, &call.x},       {h0, &call.h0},     {c0, &call.c0},
                                                    {w_ih, &call.w_ih}, {w_hh, &call.w_hh}, {b_ih, &call.b_ih},
                                                    {b_hh, &call.b_hh}};
  if (!is_quiet()) return py::none();
  const bool enabled = ask(torch_objects.is_grad_enabled);
  bool grad = false;
  for (const auto& [tensor, view] : all) {
    if (!view_plain(tensor.ptr(), *view)) return py::none();
    grad = grad || (enabled && requires_grad(tensor));
  }
  if (!call.is_common()) return py::none();
  const py::object held = x.attr("dtype");
  PyObject* const dtype = held.ptr();
  const int64_t B = call.batch, H = call.H, rows = call.steps * B, columns = call.cell.gates * H;
  const auto state = [&](const TensorView& given, py::handle tensor) {
    if (given) return empty_like(tensor);
    return is_cell ? empty({B, H}, dtype) : empty({1, B, H}, dtype);
  };
  py::object y = is_cell       ? state(call.h0, h0)
                 : grad        ? empty({rows, H}, dtype)
                 : batch_first ? empty({B, call.steps, H}, dtype)
                               : empty({call.steps, B, H}, dtype);
  py::object h_n = is_cell ? py::none() : state(call.h0, h0), gates = py::none(), cells = py::none();
  py::object c_n = call.cell.has_cells ? state(call.c0, c0) : py::none();
  if (grad) gates = empty({1, rows, call.cell.saved * H}, dtype);
  if (grad && call.cell.has_cells) cells = empty({1, rows, H}, acc_dtype(call.x));
  dispatch_dtypes(kFwd, call.x, {}, [&](auto t, auto) {
    using T = typename decltype(t)::type;
    RecurrentFwdParams<T> p{};
    RecurrentDirection<T>& d = p.direction[0];
    d.gates = view(gates).data<T>();
    d.cells = view(cells).data<acc_t<T>>();
    // The gates take the place of what they are made of, where there is as much of both.
    const bool in_gates = grad && call.cell.saved == call.cell.gates;
    const bool needs_own = !in_gates && !call.is_folded();
    const std::unique_ptr<T[]> own(needs_own ? new T[rows * columns] : nullptr);
    const RecurrentInput<T> input{
        .x = call.x.data<T>(),
        .w_ih = call.w_ih.data<T>(),
        .x_row = is_cell ? call.x.stride(0) : call.F,
        .w_ih_row = call.w_ih.stride(0),
        .b_ih = call.b_ih.data<T>(),
        .b_hh = call.b_hh.data<T>(),
        .gx = call.is_folded() ? nullptr
              : in_gates       ? d.gates
                               : own.get(),
        .rows = rows,
        .columns = columns,
        .F = call.F,
        .added = call.cell.kind == RecurrentCell::gru ? 2 * H : columns,
    };
    p.input = &input;
    d.gx = input.gx, d.gx_row = columns;
    d.w_hh = call.w_hh.data<T>(), d.w_hh_row = call.w_hh.stride(0);
    if (call.cell.kind == RecurrentCell::gru && call.b_hh) d.b_n = input.b_hh + 2 * H;
    d.h0 = call.h0.data<T>(), d.c0 = call.c0.data<T>();
    d.y = view(y).data<T>();
    p.cell = call.cell.kind;
    p.directions = 1;
    p.T_ = call.steps, p.B = B, p.H = p.P = H, p.rows = rows;
    p.step_rows = batch_first ? 1 : B;
    p.batch_rows = batch_first ? call.steps : 1;
    p.y_row = H;
    p.num_threads = call.threads;
    p.h_n = view(h_n).data<T>();
    p.c_n = view(c_n).data<T>();
    if (rows * (call.F + H) * columns < kReleaseGilFrom) return run_cpu(p);
    py::gil_scoped_release release;
    run_cpu(p);
  });
  if (grad) {
    return py::make_tuple(std::move(y), std::move(h_n), std::move(c_n), std::move(gates), std::move(cells));
  }
  if (is_cell) return py::make_tuple(std::move(y), std::move(c_n));
  return py::make_tuple(std::move(y), std::move(h_n), std::move(c_n));
}

// Up to this many products of a gradient, with a matrix of this size, ours are as fast as torch's matrix products.
constexpr int64_t kFewGradients = 1 << 26, kFewWeights = 1 << 19;

// Of such a call (dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0), the last four in the accumulation type, each None where it
// is not wanted; or (dgx, dp, dbias, dh0, dc0), dp being None where it is dgx, and dbias where it is not wanted, which
// leaves the products to the caller; or None when a further order is wanted, something is watching, or a tensor is not
// plain. saved: x, w_ih, w_hh, b_hh, h0, c0, y, gates, cells; grads: of y, h_n and c_n; wanted: a bool of each of the
// seven.
py::object recurrent_backward(const std::string& cell, const py::tuple& saved, const py::tuple& grads, int64_t steps,
                              int64_t batch, bool batch_first, const py::tuple& wanted) {
  if (ask(torch_objects.is_grad_enabled) || !is_quiet()) return py::none();
  const Cell kind = cell_named(cell, kBwd);
  bool needs[7];
  for (int i = 0; i < 7; ++i) needs[i] = wanted[i].ptr() == Py_True;
  TensorView views[9], incoming[3];
  for (int i = 0; i < 9; ++i) {
    if (!view_again(saved[i].ptr(), views[i])) return py::none();
  }
  const auto& [x, w_ih, w_hh, b_hh, h0, c0, y, gates, cells] = views;
  py::object held[3] = {py::none(), py::none(), py::none()};
  for (size_t i = 0; i < grads.size(); ++i) {
    held[i] = grads[i];
    if (!view_plain(held[i].ptr(), incoming[i])) return py::none();
    if (!incoming[i] || incoming[i].is_contiguous()) continue;
    held[i] = contiguous(held[i]);
    incoming[i] = view(held[i]);
  }
  if (!x || !w_hh || !y || !gates || w_hh.t.ndim != 2 || x.t.ndim != 2) return py::none();
  const int64_t H = w_hh.size(1), rows = x.size(0), F = x.size(1), columns = kind.gates * H;
  if (!is_vector(b_hh, w_hh, columns)) return py::none();  // a hook may have put anything in its place
  const bool gru = kind.kind == RecurrentCell::gru;
  PyObject* const acc = acc_dtype(x);
  const py::object held_dtype = saved[0].attr("dtype");
  PyObject* const dtype = held_dtype.ptr();
  py::object dgx = empty({rows, columns}, dtype), dp = gru ? empty({rows, columns}, dtype) : py::none();
  py::object dbias = needs[3] || needs[4] ? empty({kind.saved, H}, acc) : py::none();
  const auto state = [&](const TensorView& v) {
    return v && v.t.ndim == 2 ? empty({batch, H}, acc) : empty({1, batch, H}, acc);
  };
  py::object dh0 = state(h0), dc0 = kind.has_cells ? state(c0) : py::none();
  const TensorView none;
  const LastBias b_n(gru ? b_hh : none, H);
  const int num_threads = get_num_threads();
  recurrent_bwd(incoming[0], incoming[1], incoming[2], none, Matrix(gates, rows, columns, kind.saved * H), w_hh, b_n,
                none, none, none, none, none, none, none, none, none, none, none, h0, c0, none, none, none, none, y,
                gates, cells, none, view(dgx), view(dp), none, view(dbias), none, none, none, view(dh0), view(dc0),
                none, cell, steps, batch, batch_first, 0.0, 0.0, 0.0, num_threads);

  const bool in_order = steps == 1 || batch == 1 || !batch_first;
  const auto is_rows = [&](const TensorView& v, int64_t n) {
    return same_dtype(v, x) && v.is_contiguous() && v.numel() == n * H;
  };
  const int64_t weights = columns * std::max(F, H);
  if (!in_order || rows * weights > kFewGradients || weights > kFewWeights || !is_matrix(w_ih, x, columns, F) ||
      !is_matrix(x, x, rows, F) || (h0 && !is_rows(h0, batch)) || (steps > 1 && !is_rows(y, rows))) {
    return py::make_tuple(std::move(dgx), std::move(dp), std::move(dbias), std::move(dh0), std::move(dc0));
  }
  py::object dx = needs[0] ? empty({rows, F}, dtype) : py::none();
  py::object dw_ih = needs[1] ? empty({columns, F}, dtype) : py::none();
  py::object dw_hh = needs[2] ? empty({columns, H}, dtype) : py::none();
  py::object db_ih = needs[3] ? empty({columns}, acc) : py::none();
  py::object db_hh = needs[4] ? empty({columns}, acc) : py::none();
  dispatch_dtypes(kBwd, x, {}, [&](auto t, auto) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const A* const sums = view(dbias).data<A>();
    if (needs[3]) std::copy_n(sums, columns, view(db_ih).data<A>());
    if (needs[4]) {
      A* const to = view(db_hh).data<A>();
      std::copy_n(sums, columns, to);
      if (gru) std::copy_n(sums + 3 * H, H, to + 2 * H);
    }
    const T* const of_gx = view(dgx).data<T>();
    const RecurrentGradients<T> p{
        .dgx = of_gx,
        .dp = gru ? view(dp).data<T>() : of_gx,
        .x = x.data<T>(),
        .w_ih = w_ih.data<T>(),
        .x_row = x.stride(0),
        .w_ih_row = w_ih.stride(0),
        .y = y.data<T>(),
        .h0 = h0.data<T>(),
        .rows = rows,
        .columns = columns,
        .F = F,
        .B = batch,
        .P = H,
        .dx = view(dx).data<T>(),
        .dw_ih = view(dw_ih).data<T>(),
        .dw_hh = view(dw_hh).data<T>(),
        .num_threads = num_threads,
    };
    if (rows * (F + H) * columns < kReleaseGilFrom) return run_cpu(p);
    py::gil_scoped_release release;
    run_cpu(p);
  });
  if (!needs[5]) dh0 = py::none();
  if (!needs[6]) dc0 = py::none();
  return py::make_tuple(std::move(dx), std::move(dw_ih), std::move(dw_hh), std::move(db_ih), std::move(db_hh),
                        std::move(dh0), std::move(dc0));
}
#endif

}  // namespace

void bind_recurrent(py::module_& m) {
  m.def("recurrent_fwd", &recurrent_fwd);
  m.def("recurrent_bwd", &recurrent_bwd);
  m.def("recurrent_fwd_workspace", &recurrent_fwd_workspace);
  m.def("recurrent_bwd_workspace", &recurrent_bwd_workspace);
#ifndef PYOPS_SIMT
  m.def("recurrent_forward", &recurrent_forward);
  m.def("recurrent_backward", &recurrent_backward);
#endif
}

}  // namespace pyops
