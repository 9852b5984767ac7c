// Binds the recurrent kernels. The arguments are those of every backend (see pyops/recurrent.py); the shapes are in
// kernels/params/recurrent.h.
#include "../kernels/params/recurrent.h"

#include "bindings.h"
#include "tensor_view.h"

#ifndef PYOPS_SIMT
#include "../kernels/cpu/recurrent.h"
#include "cpu_isa.h"
#endif

#include <string>

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

// A matrix whose rows are dense.
template <typename T>
T* matrix(const TensorView& v, int64_t rows, int64_t columns, int64_t& row, const char* op, const char* rule) {
  require(v && has_dtype<std::remove_const_t<T>>(v) && v.is_cpu() && v.t.ndim == 2 && v.size(0) == rows &&
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

// What forward and backward share. `y` is [rows, directions P].
template <typename T, typename Params>
void fill(Params& p, const Cell& cell, const DirectionViews (&views)[2], const TensorView& h0, const TensorView& c0,
          const TensorView& keep, const TensorView& reset, const TensorView& seed, const TensorView& offsets,
          const TensorView& y, const TensorView& gates, const TensorView& cells, const Options& o, const char* op) {
  const TensorView& first = views[0].gx;
  require(first && first.is_cpu() && views[0].w_hh && views[0].w_hh.t.ndim == 2 && first.t.ndim == 2, op,
          "gx and w_hh must be CPU matrices");
  p.cell = cell.kind;
  p.directions = views[1].gx ? 2 : 1;
  p.T_ = o.steps, p.B = o.batch;
  p.H = views[0].w_hh.size(0) / cell.gates, p.P = views[0].w_hh.size(1);
  p.rows = first.size(0);
  require(p.T_ > 0 && p.B > 0 && p.H > 0 && p.P > 0 && views[0].w_hh.size(0) == p.H * cell.gates &&
              (p.P == p.H || views[0].w_hr),
          op, "no size may be 0, and w_hh must be [G H, H], or [G H, P] with a projection");
  if (offsets) {
    p.offsets = dense<int64_t>(offsets, first, p.T_ + 1, op, "offsets must be dense int64 [T + 1]");
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
    to.gx = matrix<const T>(v.gx, p.rows, cell.gates * p.H, to.gx_row, op, "gx must be [rows, G H] with dense rows");
    to.w_hh = matrix<const T>(v.w_hh, cell.gates * p.H, p.P, to.w_hh_row, op, "w_hh must be [G H, P] with dense rows");
    require(bool(v.w_hr) == bool(views[0].w_hr) && bool(v.ln_gates) == bool(views[0].ln_gates) &&
                bool(v.ln_cell) == (cell.has_cells && v.ln_gates) && (!v.w_hr || cell.has_cells),
            op, "both directions must have the same options, and only an LSTM a projection and a norm of its cell");
    if (v.w_hr) {
      to.w_hr = matrix<const T>(v.w_hr, p.P, p.H, to.w_hr_row, op, "w_hr must be [P, H] with dense rows");
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
    to.y = matrix<T>(y, p.rows, p.directions * p.P, p.y_row, op, "y must be [rows, directions P] with dense rows") +
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
void run(const RecurrentFwdParams<T>& params) {
  PYOPS_CPU_DISPATCH(recurrent_fwd_cpu, params);
}
template <typename T>
void run(const RecurrentBwdParams<T>& params) {
  PYOPS_CPU_DISPATCH(recurrent_bwd_cpu, params);
}

// Products. A small call finishes sooner than the interpreter lock changes hands.
constexpr int64_t kReleaseGilFrom = 1 << 16;
#endif

template <typename Params>
void launch([[maybe_unused]] const Params& params, const char* op) {
#ifdef PYOPS_SIMT
  require(false, op, "there are no CUDA kernels yet");
#else
  (void)op;
  if (params.rows * params.directions * params.H * params.P < kReleaseGilFrom) return run(params);
  py::gil_scoped_release release;
  run(params);
#endif
}

void recurrent_fwd(const TensorView& gx, const TensorView& w_hh, const TensorView& b_n, const TensorView& w_hr,
                   const TensorView& peephole, const TensorView& ln_gates, const TensorView& ln_cell,
                   const TensorView& gx_r, const TensorView& w_hh_r, const TensorView& b_n_r, const TensorView& w_hr_r,
                   const TensorView& peephole_r, const TensorView& ln_gates_r, const TensorView& ln_cell_r,
                   const TensorView& h0, const TensorView& c0, const TensorView& keep, const TensorView& reset,
                   const TensorView& seed, const TensorView& offsets, const TensorView& y, const TensorView& h_n,
                   const TensorView& c_n, const TensorView& gates, const TensorView& cells, const std::string& cell,
                   int64_t steps, int64_t batch, bool batch_first, double zoneout_h, double zoneout_c, double eps,
                   int num_threads) {
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
    launch(p, kFwd);
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
                   const TensorView& dc0, const std::string& cell, int64_t steps, int64_t batch, bool batch_first,
                   double zoneout_h, double zoneout_c, double eps, int num_threads) {
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
        p.dy[d] = matrix<const T>(dy, p.rows, p.directions * p.P, p.dy_row, kBwd, "dy must be like y") + d * p.P;
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
    launch(p, kBwd);
  });
}

}  // namespace

void bind_recurrent(py::module_& m) {
  m.def("recurrent_fwd", &recurrent_fwd);
  m.def("recurrent_bwd", &recurrent_bwd);
}

}  // namespace pyops
