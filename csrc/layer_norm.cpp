// Binds the LayerNorm kernels. The arguments are those of every backend (see pyops/layer_norm.py); the shapes are in
// kernels/params/layer_norm.h.
#include "bindings.h"
#include "plain.h"
#include "tensor_view.h"

#ifdef PYOPS_SIMT
#include "../kernels/cuda/layer_norm.h"
#else
#include "../kernels/cpu/layer_norm.h"
#include "cpu_isa.h"
#ifdef PYOPS_WITH_CUDA
#include "../kernels/cuda/layer_norm.h"
#endif
#endif

#include <cmath>

namespace py = pybind11;

namespace pyops {
namespace {

constexpr const char* kFwd = "layer_norm_fwd";
constexpr const char* kBwd = "layer_norm_bwd";

template <typename T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0;
};

// v as R rows of C features: dense of any rank, or [R, C] with any row stride. An undefined view gives null.
template <typename T>
Rows<T> rows(const TensorView& v, const TensorView& like, int64_t R, int64_t C, int64_t P, const char* op) {
  if (!v) return {};
  require(has_dtype<T>(v) && v.t.device.device_type == like.t.device.device_type &&
              v.t.device.device_id == like.t.device.device_id && v.numel() == R * C,
          op, "every tensor must have the dtype, device and number of elements of x");
  if (v.is_contiguous()) return {v.data<const T>(), C};
  require(P == 1 && v.t.ndim == 2 && v.size(1) == C && (v.stride(1) == 1 || C == 1), op,
          "a strided tensor must be [R, C] with dense features");
  return {v.data<const T>(), v.stride(0)};
}

struct Dropout {
  double scale;
  uint32_t threshold;
};

Dropout dropout(double p) {
  return {p < 1.0 ? 1.0 / (1.0 - p) : 0.0, static_cast<uint32_t>(std::ceil(p * 16777216.0))};
}

// A small call finishes sooner than the interpreter lock changes hands.
constexpr int64_t kReleaseGilFrom = 1 << 14;

template <typename F>
void without_gil(int64_t numel, F&& f) {
  if (numel < kReleaseGilFrom) return f();
  py::gil_scoped_release release;
  f();
}

template <typename T, typename W>
void run_fwd(const LayerNormFwdParams<T, W>& params, [[maybe_unused]] const TensorView& x) {
#ifdef PYOPS_SIMT
  layer_norm_fwd_cuda(params, nullptr);
#else
#ifdef PYOPS_WITH_CUDA
  if (x.is_cuda()) {
    DeviceGuard guard(x.t.device.device_id);
    return layer_norm_fwd_cuda(params, current_stream(x));
  }
#endif
  without_gil(params.R * params.C, [&] { PYOPS_CPU_DISPATCH(layer_norm_fwd_cpu, params); });
#endif
}

template <typename T, typename W>
void run_bwd(const LayerNormBwdParams<T, W>& params, [[maybe_unused]] const TensorView& x) {
#ifdef PYOPS_SIMT
  layer_norm_bwd_cuda(params, nullptr);
#else
#ifdef PYOPS_WITH_CUDA
  if (x.is_cuda()) {
    DeviceGuard guard(x.t.device.device_id);
    return layer_norm_bwd_cuda(params, current_stream(x));
  }
#endif
  without_gil(params.R * params.C, [&] { PYOPS_CPU_DISPATCH(layer_norm_bwd_cpu, params); });
#endif
}

void check_device(const TensorView& x, const char* op) {
#if !defined(PYOPS_SIMT) && defined(PYOPS_WITH_CUDA)
  require(x && (x.is_cpu() || x.is_cuda()), op, "x must be a CPU or CUDA tensor");
#else
  require(x && x.is_cpu(), op, "x must be a CPU tensor: this build has no CUDA kernels");
#endif
}

int64_t row_count(const TensorView& x, int64_t C, int64_t P, const char* op) {
  require(C >= 1 && P >= 0 && x.numel() % C == 0, op, "C must divide the number of elements of x");
  const int64_t R = x.numel() / C;
  require(P == 0 ? R == 0 : R % P == 0, op, "P must divide the number of rows");
  return R;
}

void layer_norm_fwd(const TensorView& x, const TensorView& residual, const TensorView& weight, const TensorView& bias,
                    const TensorView& seed, const TensorView& y, const TensorView& sum, const TensorView& mean,
                    const TensorView& rstd, int64_t C, int64_t P, double eps, double weight_offset, double p, bool rms,
                    int num_threads) {
  check_device(x, kFwd);
  const int64_t R = row_count(x, C, P, kFwd);
  require(y && bool(residual) == bool(sum) && bool(seed) == (p > 0), kFwd, "an output or the seed is missing");
  require(P == 1 || R == 0 || !residual, kFwd, "channels-first input takes no residual");
  require(!seed || residual, kFwd, "dropout needs a residual");
  dispatch_dtypes(kFwd, x, weight ? weight : bias, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    using A = acc_t<T>;
    const Rows<T> x_rows = rows<T>(x, x, R, C, P, kFwd);
    const Rows<T> residual_rows = rows<T>(residual, x, R, C, P, kFwd);
    const Dropout drop = dropout(p);
    const LayerNormFwdParams<T, W> params{
        .x = x_rows.data,
        .residual = residual_rows.data,
        .weight = dense<W>(weight, x, C, kFwd, "weight must be dense [C]"),
        .bias = dense<W>(bias, x, C, kFwd, "bias must be dense [C] of weight's dtype"),
        .seed = dense<int64_t>(seed, x, 2, kFwd, "seed must be two int64"),
        .y = dense<T>(y, x, R * C, kFwd, "y must be dense, like x"),
        .sum = dense<T>(sum, x, R * C, kFwd, "sum must be dense, like x"),
        .mean = dense<A>(mean, x, R, kFwd, "mean must be dense [R]"),
        .rstd = dense<A>(rstd, x, R, kFwd, "rstd must be dense [R]"),
        .R = R,
        .C = C,
        .P = P,
        .x_stride = x_rows.stride,
        .residual_stride = residual_rows.stride,
        .eps = static_cast<A>(eps),
        .weight_offset = static_cast<A>(weight_offset),
        .dropout_scale = static_cast<A>(drop.scale),
        .drop_threshold = drop.threshold,
        .rms = rms,
        .num_threads = num_threads,
    };
    if (R > 0) run_fwd(params, x);
  });
}

// Elements of `workspace`; 0 on the CPU, whose kernels keep their partial sums to themselves.
int64_t layer_norm_bwd_workspace(const TensorView& x, int64_t C, int64_t P) {
  check_device(x, kBwd);
  [[maybe_unused]] const int64_t R = row_count(x, C, P, kBwd);
#ifdef PYOPS_SIMT
  return layer_norm_bwd_workspace_cuda(R, C, P);
#else
#ifdef PYOPS_WITH_CUDA
  if (x.is_cuda()) {
    DeviceGuard guard(x.t.device.device_id);
    return layer_norm_bwd_workspace_cuda(R, C, P);
  }
#endif
  return 0;
#endif
}

void layer_norm_bwd(const TensorView& dy, const TensorView& dsum, const TensorView& saved, const TensorView& weight,
                    const TensorView& bias, const TensorView& mean, const TensorView& rstd, const TensorView& seed,
                    const TensorView& dx, const TensorView& dresidual, const TensorView& dweight,
                    const TensorView& dbias, const TensorView& workspace, int64_t C, int64_t P, double weight_offset,
                    double p, bool rms, bool from_output, int num_threads) {
  check_device(saved, kBwd);
  const int64_t R = row_count(saved, C, P, kBwd);
  require(dy && rstd && bool(seed) == (p > 0), kBwd, "an input or the seed is missing");
  require(rms || from_output || mean, kBwd, "mean is missing");
  require(P == 1 || R == 0 || (!dsum && !seed), kBwd, "channels-first input takes neither dsum nor dropout");
  const int64_t workspace_size = dweight || dbias ? layer_norm_bwd_workspace(saved, C, P) : 0;
  require(workspace_size == 0 || workspace, kBwd, "workspace is missing");
  dispatch_dtypes(kBwd, saved, weight ? weight : (bias ? bias : dbias), [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    using A = acc_t<T>;
    const Rows<T> dy_rows = rows<T>(dy, saved, R, C, P, kBwd);
    const Rows<T> dsum_rows = rows<T>(dsum, saved, R, C, P, kBwd);
    const Rows<T> saved_rows = rows<T>(saved, saved, R, C, P, kBwd);
    const Dropout drop = dropout(p);
    const LayerNormBwdParams<T, W> params{
        .dy = dy_rows.data,
        .dsum = dsum_rows.data,
        .saved = saved_rows.data,
        .weight = dense<W>(weight, saved, C, kBwd, "weight must be dense [C]"),
        .bias = dense<W>(bias, saved, C, kBwd, "bias must be dense [C] of weight's dtype"),
        .mean = dense<A>(mean, saved, R, kBwd, "mean must be dense [R]"),
        .rstd = dense<A>(rstd, saved, R, kBwd, "rstd must be dense [R]"),
        .seed = dense<int64_t>(seed, saved, 2, kBwd, "seed must be two int64"),
        .dx = dense<T>(dx, saved, R * C, kBwd, "dx must be dense, like x"),
        .dresidual = dense<T>(dresidual, saved, R * C, kBwd, "dresidual must be dense, like x"),
        .dweight = dense<W>(dweight, saved, C, kBwd, "dweight must be dense [C]"),
        .dbias = dense<W>(dbias, saved, C, kBwd, "dbias must be dense [C] of weight's dtype"),
        .workspace = workspace.data<A>(),
        .R = R,
        .C = C,
        .P = P,
        .dy_stride = dy_rows.stride,
        .dsum_stride = dsum_rows.stride,
        .saved_stride = saved_rows.stride,
        .weight_offset = static_cast<A>(weight_offset),
        .dropout_scale = static_cast<A>(drop.scale),
        .drop_threshold = drop.threshold,
        .rms = rms,
        .from_output = from_output,
        .num_threads = num_threads,
    };
    if (workspace) {
      require(has_dtype<A>(workspace) && workspace.is_contiguous() && workspace.numel() >= workspace_size, kBwd,
              "workspace must be dense and have layer_norm_bwd_workspace() elements");
    }
    run_bwd(params, saved);
  });
}

// Whether the call is the plain and valid one that most calls are: dense CPU tensors, x ending in `shape`, parameters
// of that shape and of its dtype (or float32 beside 16 bits). A "no" says nothing: Python then asks in full.
bool is_common(const TensorView& x, const py::tuple& shape, const TensorView& weight, const TensorView& bias) {
  const int dims = static_cast<int>(shape.size());
  const auto known = [](const TensorView& v) {
    return has_dtype<float>(v) || has_dtype<double>(v) || has_dtype<bf16>(v) || has_dtype<f16>(v);
  };
  if (!x || !x.is_cpu() || !known(x) || dims == 0 || x.t.ndim < dims || !x.is_contiguous()) return false;
  for (int i = 0; i < dims; ++i) {
    PyObject* size = PyTuple_GET_ITEM(shape.ptr(), i);
    if (!PyLong_Check(size)) return false;
    const int64_t n = PyLong_AsLongLong(size);
    if (n < 1 || x.size(x.t.ndim - dims + i) != n) return false;
    if ((weight && (weight.t.ndim != dims || weight.size(i) != n)) ||
        (bias && (bias.t.ndim != dims || bias.size(i) != n))) {
      return false;
    }
  }
  const auto same = [](const TensorView& a, const TensorView& b) {
    return a.t.dtype.code == b.t.dtype.code && a.t.dtype.bits == b.t.dtype.bits;
  };
  const auto fits = [&](const TensorView& v) {
    return v.is_cpu() && v.is_contiguous() && (same(v, x) || (has_dtype<float>(v) && x.t.dtype.bits == 16));
  };
  return (!weight || fits(weight)) && (!bias || fits(bias)) && (!weight || !bias || same(weight, bias));
}

// Row i of the statistics.
TensorView stats_row(const TensorView& stats, int i) {
  TensorView row = stats;
  row.t.byte_offset += i * stats.stride(0) * stats.t.dtype.bits / 8;
  row.t.shape += 1;
  row.t.strides += 1;
  row.t.ndim -= 1;
  return row;
}

// (y, None, stats) for a common call, None for any other: allocation and forward in one step. stats holds the rows mean
// and rstd (rstd alone for RMSNorm and with from_output); it is None when no argument wants a gradient.
py::object layer_norm_forward(py::handle x, const py::tuple& shape, py::handle weight, py::handle bias, double eps,
                              double weight_offset, bool rms, bool from_output, bool grad_enabled, int num_threads) {
  TensorView xv, wv, bv;
  if (!(view_plain(x.ptr(), xv) && view_plain(weight.ptr(), wv) && view_plain(bias.ptr(), bv) &&
        is_common(xv, shape, wv, bv) && eps >= 0 && std::isfinite(eps))) {
    return py::none();
  }
  int64_t C = 1;
  for (int i = 1; i <= static_cast<int>(shape.size()); ++i) C *= xv.size(xv.t.ndim - i);
  const bool statistics = grad_enabled && (requires_grad(x) || requires_grad(weight) || requires_grad(bias));
  py::object y = empty_like(x), stats = py::none();
  TensorView mean, rstd;
  if (statistics) {
    const bool alone = rms || from_output;
    stats = empty_statistics(alone ? 1 : 2, xv, xv.t.ndim - static_cast<int>(shape.size()));
    const TensorView stats_view = view(stats);
    rstd = stats_row(stats_view, alone ? 0 : 1);
    if (!alone) mean = stats_row(stats_view, 0);
  }
  const TensorView none;
  layer_norm_fwd(xv, none, wv, bv, none, view(y), none, mean, rstd, C, 1, eps, weight_offset, 0.0, rms, num_threads);
  return py::make_tuple(std::move(y), py::none(), std::move(stats));
}

// Backward of such a call: everything that LayerNormFunction.backward returns, or None for tensors that are not plain
// and dense. The tuples are those of pyops/layer_norm.py: (dy, ...), (x or y, weight, bias, stats, seed), Config, and
// needs_input_grad of (done, direct, config, x, residual, weight, bias, seed).
py::object layer_norm_backward(const py::tuple& grads, const py::tuple& saved, const py::tuple& config,
                               const py::tuple& needs, int num_threads) {
  TensorView dy, h, weight, bias, stats;
  for (size_t i = 1; i < grads.size(); ++i) {
    if (!grads[i].is_none()) return py::none();
  }
  if (!(view_plain(grads[0].ptr(), dy) && view_plain(saved[0].ptr(), h) && view_plain(saved[1].ptr(), weight) &&
        view_plain(saved[2].ptr(), bias) && view_plain(saved[3].ptr(), stats))) {
    return py::none();
  }
  if (!dy || !dy.is_cpu() || !dy.is_contiguous() || !h.is_contiguous() || !stats.is_contiguous()) return py::none();
  const bool need_x = needs[3].cast<bool>(), need_weight = needs[5].cast<bool>(), need_bias = needs[6].cast<bool>();
  int64_t C = 1;
  for (int i = 1; i <= config[0].cast<int>(); ++i) C *= h.size(h.t.ndim - i);
  const py::handle param = weight ? saved[1] : saved[2];
  py::object dx = need_x ? empty_like(saved[0]) : py::none();
  py::object dweight = need_weight ? empty_like(param) : py::none();
  py::object dbias = need_bias ? empty_like(param) : py::none();
  const TensorView none;
  const bool alone = stats.size(0) == 1;
  layer_norm_bwd(dy, none, h, weight, bias, alone ? none : stats_row(stats, 0), stats_row(stats, alone ? 0 : 1), none,
                 view(dx), none, view(dweight), view(dbias), none, C, 1, config[3].cast<double>(), 0.0,
                 config[5].cast<bool>(), config[6].cast<bool>(), num_threads);
  const py::none nothing;
  return py::make_tuple(nothing, nothing, nothing, std::move(dx), nothing, std::move(dweight), std::move(dbias),
                        nothing);
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_backward);
  m.def("layer_norm_fwd", &layer_norm_fwd);
  m.def("layer_norm_bwd", &layer_norm_bwd);
  m.def("layer_norm_bwd_workspace", &layer_norm_bwd_workspace);
}

}  // namespace pyops
