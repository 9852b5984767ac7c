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

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

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

#ifndef PYOPS_SIMT
template <typename T, typename W>
void run_cpu(const LayerNormFwdParams<T, W>& params) {
  PYOPS_CPU_DISPATCH(layer_norm_fwd_cpu, params);
}
template <typename T, typename W>
void run_cpu(const LayerNormBwdParams<T, W>& params) {
  PYOPS_CPU_DISPATCH(layer_norm_bwd_cpu, params);
}
#endif
#if defined(PYOPS_SIMT) || defined(PYOPS_WITH_CUDA)
template <typename T, typename W>
void run_cuda(const LayerNormFwdParams<T, W>& params, void* stream) {
  layer_norm_fwd_cuda(params, stream);
}
template <typename T, typename W>
void run_cuda(const LayerNormBwdParams<T, W>& params, void* stream) {
  layer_norm_bwd_cuda(params, stream);
}
#endif

// Launches the kernel where x lives.
template <typename Params>
void run(const Params& params, [[maybe_unused]] const TensorView& x) {
#ifdef PYOPS_SIMT
  run_cuda(params, nullptr);
#else
#ifdef PYOPS_WITH_CUDA
  if (x.is_cuda()) {
    DeviceGuard guard(x.t.device.device_id);
    return run_cuda(params, current_stream(x));
  }
#endif
  without_gil(params.R * params.C, [&] { run_cpu(params); });
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
  require((y || rstd) && bool(residual) == bool(sum) && bool(seed) == (p > 0), kFwd,
          "an output or the seed is missing");
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
    if (R > 0) run(params, x);
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
#ifdef PYOPS_SIMT
  require(rms || from_output || mean, kBwd, "mean is missing");
#else
  require(rms || from_output || mean || saved.is_cpu(), kBwd, "mean is missing");
#endif
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
    run(params, saved);
  });
}

// ---- the common call: plain, valid, dense, on the CPU. Checked, allocated and run in one step. ----

// pyops/layer_norm.py, Config: (int, bool, float, float, float, bool, bool, backend), read without type questions.
struct Config {
  explicit Config(const py::tuple& c)
      : dims(static_cast<int>(PyLong_AsLong(at(c, 0)))),
        channels_first(at(c, 1) == Py_True),
        eps(PyFloat_AS_DOUBLE(at(c, 2))),
        weight_offset(PyFloat_AS_DOUBLE(at(c, 3))),
        p(PyFloat_AS_DOUBLE(at(c, 4))),
        rms(at(c, 5) == Py_True),
        from_output(at(c, 6) == Py_True) {}
  static PyObject* at(const py::tuple& c, int i) { return PyTuple_GET_ITEM(c.ptr(), i); }
  int dims;
  bool channels_first;
  double eps, weight_offset, p;
  bool rms, from_output;
};

// The layout of a dense tensor, or of a matrix with dense rows: C features, P pixels per image (1 for rows).
struct Layout {
  int64_t C = 1, P = 1;
  bool channels_last = false, strided = false;
};

bool is_channels_last(const TensorView& v) {
  if (v.t.ndim != 4) return false;
  int64_t expected = 1;
  for (int i : {1, 3, 2, 0}) {
    if (v.size(i) != 1 && v.stride(i) != expected) return false;
    expected *= v.size(i);
  }
  return true;
}

// False for any other, and for too few dimensions (a hook may unpack anything in backward).
bool find_layout(const TensorView& x, const Config& c, Layout& layout) {
  if (x.t.ndim < (c.channels_first ? 3 : c.dims)) return false;
  const bool contiguous = x.is_contiguous();
  layout.channels_last = c.channels_first && !contiguous && is_channels_last(x);
  layout.strided =
      !contiguous && !c.channels_first && x.t.ndim == 2 && c.dims == 1 && x.stride(1) == 1 && x.stride(0) >= x.size(1);
  if (!contiguous && !layout.channels_last && !layout.strided) return false;
  if (c.channels_first) {
    layout.C = x.size(x.t.ndim - 3);
    if (!layout.channels_last) layout.P = x.size(x.t.ndim - 2) * x.size(x.t.ndim - 1);
  } else {
    for (int i = 1; i <= c.dims; ++i) layout.C *= x.size(x.t.ndim - i);
  }
  return true;
}

// Views a gradient in the layout of its dense output, copied where it has another one. False for one that is not plain.
bool view_gradient(py::object& grad, const Layout& layout, TensorView& view) {
  if (!view_plain(grad.ptr(), view)) return false;
  if (!view || (layout.channels_last ? is_channels_last(view) : view.is_contiguous())) return true;
  if (layout.channels_last) return false;
  grad = contiguous(grad);
  return view_plain(grad.ptr(), view);
}

// The memory of a dense tensor as one dimension: what the leaves check against R and C.
class Flat {
 public:
  explicit Flat(const TensorView& v, bool leave = false) : view_(v), size_(v.numel()) {
    if (leave) return;
    view_.t.ndim = 1;
    view_.t.shape = &size_;
    view_.t.strides = &one_;
  }
  Flat(const Flat&) = delete;
  Flat& operator=(const Flat&) = delete;
  operator const TensorView&() const { return view_; }

 private:
  TensorView view_;
  int64_t size_, one_ = 1;
};

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.t.ndim == b.t.ndim && std::equal(a.t.shape, a.t.shape + a.t.ndim, b.t.shape);
}

// Whether the arguments have the meaning that pyops/layer_norm.py demands: x ends in `shape` (None: anything),
// parameters of that shape, of x's dtype or float32 beside 16 bits. A "no" says nothing: Python then asks in full.
bool is_common(const TensorView& x, const TensorView& residual, py::handle shape, const TensorView& weight,
               const TensorView& bias, const Config& c) {
  const int dims = shape.is_none() ? 1 : static_cast<int>(PyTuple_GET_SIZE(shape.ptr())), rank = x.t.ndim;
  const bool known = has_dtype<float>(x) || has_dtype<double>(x) || has_dtype<bf16>(x) || has_dtype<f16>(x);
  if (!x || !known || dims != c.dims || dims == 0) return false;
  if (c.channels_first ? rank != 3 && rank != 4 : rank < dims) return false;
  if (!(c.eps >= 0 && std::isfinite(c.eps) && c.p >= 0 && c.p <= 1)) return false;
  for (int i = 0; i < dims; ++i) {
    const int64_t n = x.size(c.channels_first ? rank - 3 : rank - dims + i);
    if (n < 1) return false;
    if (!shape.is_none()) {
      PyObject* size = PyTuple_GET_ITEM(shape.ptr(), i);
      if (!PyLong_Check(size)) return false;
      if (PyLong_AsLongLong(size) != n) {
        PyErr_Clear();  // a size that int64 does not hold
        return false;
      }
    }
    if ((weight && (weight.t.ndim != dims || weight.size(i) != n)) ||
        (bias && (bias.t.ndim != dims || bias.size(i) != n))) {
      return false;
    }
  }
  const auto fits = [&](const TensorView& v) {
    return v.is_contiguous() && (same_dtype(v, x) || (has_dtype<float>(v) && x.t.dtype.bits == 16));
  };
  if (residual && !(same_dtype(residual, x) && same_shape(residual, x))) return false;
  return (!weight || fits(weight)) && (!bias || fits(bias)) && (!weight || !bias || same_dtype(weight, bias));
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

// Statistics of fewer elements than this are cheaper computed again than kept in a tensor.
constexpr int64_t kSaveStatisticsFrom = 1 << 14;

// Statistics that are needed for one call only, as rows of a tensor would be.
class Statistics {
 public:
  Statistics(const TensorView& x, int64_t R) : memory_(new char[2 * R * sizeof(double)]), R_(R) {
    mean = {.t = x.t, .defined = true};
    mean.t.data = memory_.get();
    mean.t.byte_offset = 0;
    mean.t.dtype = has_dtype<double>(x) ? dl_dtype<double>() : dl_dtype<float>();
    mean.t.ndim = 1;
    mean.t.shape = &R_;
    mean.t.strides = &one_;
    rstd = mean;
    rstd.t.byte_offset = R * sizeof(double);
  }
  Statistics(const Statistics&) = delete;
  Statistics& operator=(const Statistics&) = delete;
  TensorView mean, rstd;

 private:
  std::unique_ptr<char[]> memory_;
  int64_t R_, one_ = 1;
};

// A common call, or None for any other. The result is y, or (y, sum) with a residual; and when an argument wants a
// gradient (y, sum, stats, seed), where sum is None without residual, seed without dropout, and stats holds the rows
// mean and rstd (rstd alone for RMSNorm, with from_output and for 16 bits), or is None where layer_norm_backward
// computes them again. shape is a tuple or None; draw_seed(device) is called when nothing can fail any more.
py::object layer_norm_forward(py::handle x, py::handle residual, py::handle shape, py::handle weight, py::handle bias,
                              const py::tuple& config, py::handle draw_seed) {
  TensorView xv, rv, wv, bv;
  Layout layout;
  const Config c(config);
  if (!(is_quiet() && view_plain(x.ptr(), xv) && view_plain(residual.ptr(), rv) && view_plain(weight.ptr(), wv) &&
        view_plain(bias.ptr(), bv) && is_common(xv, rv, shape, wv, bv, c) && find_layout(xv, c, layout) &&
        (!rv || rv.is_contiguous()))) {
    return py::none();
  }
  const bool grad = ask(torch_objects.is_grad_enabled) &&
                    (requires_grad(x) || requires_grad(residual) || requires_grad(weight) || requires_grad(bias));
  py::object y = empty_like(x), sum = py::none(), stats = py::none(), seed = py::none();
  if (rv) sum = empty_like(x);
  if (c.p > 0) seed = draw_seed(x.attr("device"));
  TensorView mean, rstd;
  if (grad && (c.from_output || xv.numel() >= kSaveStatisticsFrom)) {
    // torch keeps two 16-bit numbers for a row of 16 bits: the mean is computed again, so that ours is no more memory.
    const bool alone = c.rms || c.from_output || xv.t.dtype.bits == 16;
    stats = empty_statistics(alone ? 1 : 2, xv, c.dims, c.channels_first);
    const TensorView stats_view = view(stats);
    rstd = stats_row(stats_view, alone ? 0 : 1);
    if (!alone) mean = stats_row(stats_view, 0);
  }
  layer_norm_fwd(Flat(xv, layout.strided), rv, wv, bv, view(seed), Flat(view(y)), view(sum), mean, rstd, layout.C,
                 layout.P, c.eps, c.weight_offset, c.p, c.rms, get_num_threads());
  if (grad) return py::make_tuple(std::move(y), std::move(sum), std::move(stats), std::move(seed));
  if (rv) return py::make_tuple(std::move(y), std::move(sum));
  return y;
}

// (None, dx, dresidual, dweight, dbias) of such a call, what LayerNormDirectFunction.backward returns; or None when a
// further order is wanted, something is watching, or a tensor is not plain or dense. saved: h or y, weight, bias,
// stats, seed. ctx holds config and needs_input_grad, whose first entry is no tensor's. grads: of y, and of sum.
py::object layer_norm_backward(const py::object& ctx, const py::tuple& saved, const py::tuple& grads) {
  if (ask(torch_objects.is_grad_enabled) || !is_quiet()) return py::none();
  const py::tuple config = ctx.attr("config"), needs = ctx.attr("needs_input_grad");
  const int num_threads = get_num_threads();
  TensorView dy, dsum, h, weight, bias, stats, seed;
  Layout layout;
  const Config c(config);
  if (!(view_again(saved[0].ptr(), h) && view_again(saved[1].ptr(), weight) && view_again(saved[2].ptr(), bias) &&
        view_again(saved[3].ptr(), stats) && view_again(saved[4].ptr(), seed) && h && find_layout(h, c, layout))) {
    return py::none();
  }
  py::object dy_held = grads[0], dsum_held = grads.size() == 2 ? py::object(grads[1]) : py::none();
  if ((c.from_output && !dsum_held.is_none()) || !view_gradient(dy_held, layout, dy) || !dy ||
      !view_gradient(dsum_held, layout, dsum) || (stats && (stats.t.ndim == 0 || !stats.is_contiguous()))) {
    return py::none();
  }
  const TensorView none;
  std::optional<Statistics> computed;
  TensorView mean, rstd;
  if (stats) {
    const bool alone = stats.size(0) == 1;
    rstd = stats_row(stats, alone ? 0 : 1);
    if (!alone) mean = stats_row(stats, 0);
  } else {
    computed.emplace(h, h.numel() / layout.C);
    rstd = computed->rstd;
    if (!c.rms && h.t.dtype.bits != 16) mean = computed->mean;
    layer_norm_fwd(Flat(h, layout.strided), none, none, none, none, none, none, mean, rstd, layout.C, layout.P, c.eps,
                   0.0, 0.0, c.rms, num_threads);
  }
  const auto needed = [&](int i) { return needs[i].ptr() == Py_True; };
  const bool drop = bool(seed);
  // Without dropout the residual's gradient is that of x.
  const py::handle param = weight ? saved[1] : saved[2];
  py::object dx = needed(1) || (needed(2) && !drop) ? empty_like(saved[0]) : py::none();
  py::object dresidual = needed(2) && drop ? empty_like(saved[0]) : py::none();
  py::object dweight = needed(3) ? empty_like(param) : py::none();
  py::object dbias = needed(4) ? empty_like(param) : py::none();
  layer_norm_bwd(Flat(dy), dsum, Flat(h, layout.strided), weight, bias, mean, rstd, seed, Flat(view(dx)),
                 view(dresidual), view(dweight), view(dbias), none, layout.C, layout.P, c.weight_offset, c.p, c.rms,
                 c.from_output, num_threads);
  if (needed(2) && !drop) dresidual = dx;
  if (!needed(1)) dx = py::none();
  return py::make_tuple(py::none(), std::move(dx), std::move(dresidual), std::move(dweight), std::move(dbias));
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
