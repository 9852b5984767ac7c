// Binds the attention kernels. The arguments are those of every backend (see pyops/attention.py); the shapes are in
// kernels/params/attention.h.
#include "bindings.h"
#include "tensor_view.h"

#ifdef PYOPS_SIMT
#include "../kernels/cuda/attention.h"
#else
#include "../kernels/cpu/attention.h"
#include "cpu_isa.h"
#ifdef PYOPS_WITH_CUDA
#include "../kernels/cuda/attention.h"
#endif
#endif

#include <algorithm>
#include <cmath>

namespace py = pybind11;

namespace pyops {
namespace {

constexpr const char* kFwd = "attention_fwd";
constexpr const char* kBwd = "attention_bwd";

bool same_device(const TensorView& a, const TensorView& b) {
  return a.t.device.device_type == b.t.device.device_type && a.t.device.device_id == b.t.device.device_id;
}

bool has_shape(const TensorView& v, int64_t a, int64_t b, int64_t c, int64_t d) {
  return v.t.ndim == 4 && v.size(0) == a && v.size(1) == b && v.size(2) == c && v.size(3) == d;
}

bool on_cuda([[maybe_unused]] const TensorView& q) {
#ifdef PYOPS_SIMT
  return true;
#else
  return q.is_cuda();
#endif
}

constexpr int64_t kMostRows = int64_t{1} << 29;

// What the CUDA kernels' 16-byte accesses ask for.
bool has_aligned_rows(const TensorView& t) {
  bool ok = reinterpret_cast<uintptr_t>(t.data<const void>()) % 16 == 0;
  for (int i = 0; i < 3; ++i) ok = ok && (t.size(i) == 1 || t.stride(i) * 2 % 16 == 0);
  return ok;
}

// The sizes of a call. L and S: of packed sequences, all of them together.
struct Sizes {
  int64_t B, H, Hk, L, S, D, Dv, max_q, max_k;
};

Sizes sizes(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cu_q, int64_t max_q,
            int64_t max_k, const char* op) {
#if !defined(PYOPS_SIMT) && defined(PYOPS_WITH_CUDA)
  require(q && (q.is_cpu() || q.is_cuda()), op, "q must be a CPU or CUDA tensor");
#else
  require(q && q.is_cpu(), op, "q must be a CPU tensor: this build has no CUDA kernels");
#endif
  require(k && v && q.t.ndim == 4 && k.t.ndim == 4 && v.t.ndim == 4, op, "q, k and v must have 4 dimensions");
  Sizes s{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), max_q, max_k};
  require(s.B > 0 && s.H > 0 && s.Hk > 0 && s.L > 0 && s.S > 0 && s.D > 0 && s.Dv > 0 && s.H % s.Hk == 0, op,
          "no size may be 0, and the heads of k must divide those of q");
  const int64_t batch = s.B;
  if (cu_q) {
    require(batch == 1 && cu_q.t.ndim == 1 && cu_q.numel() > 1 && max_q > 0 && max_k > 0, op,
            "packed sequences must have a batch of 1 and cu_q one dimension");
    s.B = cu_q.numel() - 1;
  } else {
    require(max_q == s.L && max_k == s.S, op, "max_q and max_k must be the lengths");
  }
  require(has_shape(k, batch, s.Hk, s.S, s.D) && has_shape(v, batch, s.Hk, s.S, s.Dv), op, "q, k and v must fit");
  return s;
}

// cu holds the ends of the sequences: from 0 to T, none longer than `longest`, which becomes the length of the longest
// where `tighten` says so. On a GPU that is the caller's word.
const int32_t* packed(const TensorView& cu, const TensorView& q, int64_t B, int64_t T, int64_t& longest, bool tighten,
                      const char* op) {
  const int32_t* ends = dense<int32_t>(cu, q, B + 1, op, "cu_q and cu_k must be dense int32 [B + 1]");
  if (ends == nullptr || !cu.is_cpu()) return ends;
  bool ok = ends[0] == 0 && ends[B] == T;
  int64_t found = 1;
  for (int64_t b = 0; b < B; ++b) {
    ok = ok && ends[b] <= ends[b + 1] && ends[b + 1] - ends[b] <= longest;
    found = std::max<int64_t>(found, ends[b + 1] - ends[b]);
  }
  require(ok, op, "cu_q and cu_k must rise from 0 to the number of rows, by max_q and max_k at most");
  if (tighten) longest = found;
  return ends;
}

// [.., .., .., D], `like` in all but the last dimension, which is dense.
template <typename T>
T* strided(const TensorView& v, const TensorView& like, int64_t D, AttentionStrides& strides, const char* op,
           const char* rule) {
  if (!v) return nullptr;
  require(has_dtype<std::remove_const_t<T>>(v) && same_device(v, like) &&
              has_shape(v, like.size(0), like.size(1), like.size(2), D) && (D == 1 || v.stride(3) == 1),
          op, rule);
  strides = {v.stride(0), v.stride(1), v.stride(2)};
  return v.data<T>();
}

template <typename T>
AttentionMask mask_kind(const TensorView& mask, const char* op) {
  if (!mask) return AttentionMask::none;
  if (has_dtype<bool>(mask)) return AttentionMask::boolean;
  if (has_dtype<T>(mask)) return AttentionMask::same;
  require(sizeof(T) == 2 && has_dtype<float>(mask), op, "mask must be bool, of q's dtype, or float32 beside 16 bits");
  return AttentionMask::wide;
}

// Only the sizes, the kind of the mask and whether sequences are packed: what the workspace depends on.
template <typename Params, typename T>
Params sized(const Sizes& s, const TensorView& mask, const TensorView& cu_q, const char* op) {
  Params params{};
  params.cu_q = cu_q.data<const int32_t>();
  params.mask_kind = mask_kind<T>(mask, op);
  params.B = s.B, params.H = s.H, params.Hk = s.Hk, params.L = s.L, params.S = s.S, params.D = s.D, params.Dv = s.Dv;
  params.max_q = s.max_q, params.max_k = s.max_k;
  return params;
}

struct Options {
  double scale;
  int64_t left, right;
  bool bottom_right;
  double softcap, p;
  int num_threads;
};

// What forward and backward share.
template <typename Params, typename T>
Params filled(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& mask,
              const TensorView& slopes, const TensorView& sinks, const TensorView& seed, const TensorView& cu_q,
              const TensorView& cu_k, const Sizes& s, const Options& o, const char* op) {
  using A = acc_t<T>;
  if (on_cuda(q)) {
    require(s.D % 8 == 0 && s.Dv % 8 == 0 && s.D <= 256 && s.Dv <= 256 && s.L < kMostRows && s.S < kMostRows, op,
            "the CUDA kernels serve head sizes to 256 that 8 divides, and lengths below 2^29");
    for (const TensorView* t : {&q, &k, &v})
      require(has_aligned_rows(*t), op, "rows must start at multiples of 16 bytes");
  }
  require(bool(seed) == (o.p > 0) && o.p < 1, op, "dropout needs a seed, and p within [0, 1)");
  require(bool(cu_q) == bool(cu_k), op, "cu_q and cu_k must stand together");
  Params params = sized<Params, T>(s, mask, cu_q, op);
  params.q = strided<const T>(q, q, s.D, params.q_stride, op, "q must have a dense last dimension");
  params.k = strided<const T>(k, k, s.D, params.k_stride, op, "k must have q's dtype and a dense last dimension");
  params.v = strided<const T>(v, v, s.Dv, params.v_stride, op, "v must have q's dtype and a dense last dimension");
  require(same_device(k, q) && same_device(v, q), op, "k and v must be on the device of q");
  if (mask) {
    require(same_device(mask, q) && has_shape(mask, s.B, s.H, s.max_q, s.max_k) &&
                (mask.stride(3) == 0 || mask.stride(3) == 1),
            op, "mask must be [B, H, max_q, max_k] with a last stride of 0 or 1");
    params.mask = mask.data<const void>();
    for (int i = 0; i < 4; ++i) params.mask_stride[i] = mask.stride(i);
  }
  params.slopes = dense<A>(slopes, q, s.B * s.H, op, "slopes must be dense [B, H]");
  params.sinks = dense<A>(sinks, q, s.H, op, "sinks must be dense [H]");
  params.seed = dense<int64_t>(seed, q, 2, op, "seed must be two int64");
  params.cu_q = packed(cu_q, q, s.B, s.L, params.max_q, !mask, op);
  params.cu_k = packed(cu_k, q, s.B, s.S, params.max_k, !mask, op);
  params.scale = static_cast<A>(o.scale);
  params.softcap = static_cast<A>(o.softcap);
  params.left = std::min(o.left, s.max_q + s.max_k);  // no diagonal is farther away
  params.right = std::min(o.right, s.max_q + s.max_k);
  params.bottom_right = o.bottom_right;
  params.dropout_scale = static_cast<A>(1 / (1 - o.p));
  params.drop_threshold = static_cast<uint32_t>(std::ceil(o.p * 16777216.0));
  params.num_threads = o.num_threads;
  return params;
}

#ifndef PYOPS_SIMT
template <typename T>
void run_cpu(const AttentionFwdParams<T>& params) {
  PYOPS_CPU_DISPATCH(attention_fwd_cpu, params);
}
template <typename T>
void run_cpu(const AttentionBwdParams<T>& params) {
  PYOPS_CPU_DISPATCH(attention_bwd_cpu, params);
}

// Scores. A small call finishes sooner than the interpreter lock changes hands.
constexpr int64_t kReleaseGilFrom = 1 << 12;
#endif
#if defined(PYOPS_SIMT) || defined(PYOPS_WITH_CUDA)
template <typename T>
void run_cuda(const AttentionFwdParams<T>& params, void* stream) {
  attention_fwd_cuda(params, stream);
}
template <typename T>
void run_cuda(const AttentionBwdParams<T>& params, void* stream) {
  attention_bwd_cuda(params, stream);
}
template <typename T>
int64_t workspace_cuda(const AttentionFwdParams<T>& params) {
  return attention_fwd_workspace_cuda(params);
}
template <typename T>
int64_t workspace_cuda(const AttentionBwdParams<T>& params) {
  return attention_bwd_workspace_cuda(params);
}
#endif

// Launches the kernel where q lives.
template <typename T, typename Params>
void run(const Params& params, const TensorView& q, const char* op) {
  if (on_cuda(q)) {
    require(sizeof(T) == 2, op, "the CUDA kernels serve bfloat16 and float16");
#if defined(PYOPS_SIMT)
    if constexpr (sizeof(T) == 2) run_cuda(params, nullptr);
#elif defined(PYOPS_WITH_CUDA)
    DeviceGuard guard(q.t.device.device_id);
    if constexpr (sizeof(T) == 2) run_cuda(params, current_stream(q));
#endif
    return;
  }
#ifndef PYOPS_SIMT
  if (params.B * params.H * params.max_q * params.max_k < kReleaseGilFrom) return run_cpu(params);
  py::gil_scoped_release release;
  run_cpu(params);
#endif
}

// Elements of `workspace`; 0 on the CPU, whose kernels keep their own.
template <typename T, typename Params>
int64_t workspace_size([[maybe_unused]] const Params& params, const TensorView& q) {
  if constexpr (sizeof(T) == 2) {
    if (on_cuda(q)) {
#if defined(PYOPS_SIMT)
      return workspace_cuda(params);
#elif defined(PYOPS_WITH_CUDA)
      DeviceGuard guard(q.t.device.device_id);
      return workspace_cuda(params);
#endif
    }
  }
  return 0;
}

// Calls f(Tag<T>), T the dtype of q.
template <typename F>
void dispatch_dtype(const char* op, const TensorView& q, F&& f) {
  dispatch_dtypes(op, q, {}, [&](auto t, auto) { f(t); });
}

// The workspace of backward depends on a mask only as far as there is a dmask.
template <typename Params>
Params without_mask_unless(bool need_dmask, Params params) {
  if (!need_dmask) params.mask_kind = AttentionMask::none;
  return params;
}

template <typename T, typename Params>
acc_t<T>* checked_workspace(const Params& params, const TensorView& workspace, const TensorView& q, const char* op) {
  const int64_t size = workspace_size<T>(params, q);
  require(size == 0 || (workspace && workspace.numel() >= size), op, "workspace is missing or too small");
  return size == 0 ? nullptr : dense<acc_t<T>>(workspace, q, workspace.numel(), op, "workspace must be dense");
}

void attention_fwd(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& mask,
                   const TensorView& slopes, const TensorView& sinks, const TensorView& seed, const TensorView& cu_q,
                   const TensorView& cu_k, const TensorView& out, const TensorView& residue, const TensorView& stats,
                   const TensorView& workspace, double scale, int64_t left, int64_t right, bool bottom_right,
                   double softcap, double p, int64_t max_q, int64_t max_k, int num_threads, bool differentiated) {
  const Sizes s = sizes(q, k, v, cu_q, max_q, max_k, kFwd);
  const Options o{scale, left, right, bottom_right, softcap, p, num_threads};
  require(out && stats, kFwd, "an output is missing");
  dispatch_dtype(kFwd, q, [&](auto t) {
    using T = typename decltype(t)::type;
    auto params = filled<AttentionFwdParams<T>, T>(q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, s, o, kFwd);
    params.out = strided<T>(out, q, s.Dv, params.out_stride, kFwd, "out must be like q, with a dense last dimension");
    params.residue = strided<T>(residue, q, s.Dv, params.residue_stride, kFwd, "residue must be like out");
    for (const TensorView* t : {&out, &residue}) {
      require(!*t || !on_cuda(q) || has_aligned_rows(*t), kFwd, "rows must start at multiples of 16 bytes");
    }
    params.stats = dense<acc_t<T>>(stats, q, 2 * q.size(0) * s.H * s.L, kFwd, "stats must be dense [2, B, H, L]");
    params.workspace = checked_workspace<T>(params, workspace, q, kFwd);
    params.differentiated = differentiated;
    run<T>(params, q, kFwd);
  });
}

void attention_bwd(const TensorView& dout, const TensorView& dlse, const TensorView& q, const TensorView& k,
                   const TensorView& v, const TensorView& mask, const TensorView& slopes, const TensorView& sinks,
                   const TensorView& seed, const TensorView& cu_q, const TensorView& cu_k, const TensorView& out,
                   const TensorView& residue, const TensorView& stats, const TensorView& dq, const TensorView& dk,
                   const TensorView& dv, const TensorView& dmask, const TensorView& workspace, double scale,
                   int64_t left, int64_t right, bool bottom_right, double softcap, double p, int64_t max_q,
                   int64_t max_k, int num_threads) {
  const Sizes s = sizes(q, k, v, cu_q, max_q, max_k, kBwd);
  const Options o{scale, left, right, bottom_right, softcap, p, num_threads};
  require(dout && out && stats, kBwd, "an input is missing");
  dispatch_dtype(kBwd, q, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    auto params = filled<AttentionBwdParams<T>, T>(q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, s, o, kBwd);
    const int64_t rows = q.size(0) * s.H * s.L;
    params.dout = strided<const T>(dout, q, s.Dv, params.dout_stride, kBwd, "dout must be like out");
    params.out = strided<const T>(out, q, s.Dv, params.out_stride, kBwd, "out must be like q");
    params.residue = strided<const T>(residue, q, s.Dv, params.residue_stride, kBwd, "residue must be like out");
    for (const TensorView* t : {&dout, &out, &residue, &dq, &dk, &dv}) {
      require(!*t || !on_cuda(q) || has_aligned_rows(*t), kBwd, "rows must start at multiples of 16 bytes");
    }
    params.stats = dense<A>(stats, q, 2 * rows, kBwd, "stats must be dense [2, B, H, L]");
    params.dlse = dense<A>(dlse, q, rows, kBwd, "dlse must be dense [B, H, L]");
    params.dq = strided<T>(dq, q, s.D, params.dq_stride, kBwd, "dq must be like q");
    params.dk = strided<T>(dk, k, s.D, params.dk_stride, kBwd, "dk must be like k");
    params.dv = strided<T>(dv, v, s.Dv, params.dv_stride, kBwd, "dv must be like v");
    if (dmask) {
      const int64_t full[] = {s.B, s.H, s.max_q};
      bool ok = mask && !has_dtype<bool>(mask) && mask.stride(3) == 1 && dmask.t.ndim == 4 && dmask.size(3) == s.max_k;
      for (int i = 0; ok && i < 3; ++i) {
        ok = dmask.size(i) == 1 || dmask.size(i) == full[i];
        params.dmask_stride[i] = dmask.size(i) == 1 ? 0 : dmask.stride(i);
      }
      require(ok, kBwd, "dmask must be [1 or B, 1 or H, 1 or L, S], of an additive mask with a dense last dimension");
      params.dmask = dense<A>(dmask, q, dmask.numel(), kBwd, "dmask must be dense");
    }
    params.workspace = checked_workspace<T>(without_mask_unless(bool(dmask), params), workspace, q, kBwd);
    run<T>(params, q, kBwd);
  });
}

int64_t attention_fwd_workspace(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& mask,
                                const TensorView& cu_q, int64_t max_q, int64_t max_k) {
  const Sizes s = sizes(q, k, v, cu_q, max_q, max_k, kFwd);
  int64_t size = 0;
  dispatch_dtype(kFwd, q, [&](auto t) {
    using T = typename decltype(t)::type;
    size = workspace_size<T>(sized<AttentionFwdParams<T>, T>(s, mask, cu_q, kFwd), q);
  });
  return size;
}

int64_t attention_bwd_workspace(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& mask,
                                const TensorView& cu_q, int64_t max_q, int64_t max_k, bool need_dmask) {
  const Sizes s = sizes(q, k, v, cu_q, max_q, max_k, kBwd);
  int64_t size = 0;
  dispatch_dtype(kBwd, q, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto params = sized<AttentionBwdParams<T>, T>(s, mask, cu_q, kBwd);
    size = workspace_size<T>(without_mask_unless(need_dmask, params), q);
  });
  return size;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_fwd", &attention_fwd);
  m.def("attention_bwd", &attention_bwd);
  m.def("attention_fwd_workspace", &attention_fwd_workspace);
  m.def("attention_bwd_workspace", &attention_bwd_workspace);
}

}  // namespace pyops
