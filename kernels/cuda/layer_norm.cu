// LayerNorm and RMSNorm, forward and backward; the formulas stand in params/layer_norm.h.
//
// Parallelisation: a block takes `slots` rows at a time, and the `lanes` threads of a slot share one row. For P == 1 a
// thread owns 16-byte vectors of it (single elements when sizes or addresses do not allow that): several rows per warp,
// a warp per row, several warps per row, up to a block per row. For P > 1 neighbouring threads take neighbouring pixels
// and a thread owns some channels of its pixel. Both are a Layout; the kernels do not know which one they run on.
//   Forward: the row stays in registers. A longer row goes in chunks, once for the statistics and once more, backwards
//   and mostly from L2, for the output.
//   Backward: a persistent grid; a thread owns the same columns of every row it visits, so that its sums for dweight
//   and dbias stay in registers, and loads the next row while it works on this one. Each block writes one row of
//   [G, 2, C] partial sums; a second kernel adds them up. Rows too long for that take dx and the sums in two kernels.
// Traffic per element: forward 1 read, 1 write (in chunks 2, 1); backward 2 reads, 1 write (in two kernels 6, 1);
// residual, sum, dsum and dresidual once each. About 10 FLOP per element: all of it is bound by memory.
// Numerics: sums and statistics in acc_t. Variance from deviations about each thread's own mean, merged and corrected
// for the rounding of the mean (Chan, Golub and LeVeque 1983), never E[x^2] - E[x]^2. h is rounded to T before its
// statistics are taken, so that they are those of the stored `sum`. Fixed order of additions, no atomics: equal bits
// from run to run on a device.
// Residual, dropout, RMS and from_output are run-time flags: uniform branches cost a memory-bound kernel little, while
// each as a template parameter would double the number of kernels.
// Limits: any C, R, P and row stride, 64-bit offsets. One backward kernel up to C = 16384 (fp32: 12288, fp64: 8192; odd
// sizes: 4096, fp64 2048; channels first: 768, fp64 512), two beyond.
// Papers: Ba, Kiros and Hinton 2016; Zhang and Sennrich 2019 (RMSNorm).
#include "layer_norm.h"

#include <algorithm>

#include "layer_norm_bwd.cuh"
#include "layer_norm_fwd.cuh"

namespace pyops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tiling make_tiling(int64_t C, int slots, int lanes, int columns_per_thread) {
  const int chunk = lanes * columns_per_thread;
  return {slots, lanes, chunk, (C - 1) / chunk * chunk};
}

// Rows of C columns, kN * kVecs to a thread; short rows share blocks of `threads`. At least four lanes, so that an
// access to neighbouring vectors is not shorter than 64 bytes.
Tiling row_tiling(int64_t C, int kN, int kVecs, int threads, int max_lanes) {
  const int64_t need = ceil_div(C, kN * kVecs);
  int lanes = 4;
  if (need > kWarpSize) {
    lanes = static_cast<int>(std::min<int64_t>(ceil_div(need, kWarpSize) * kWarpSize, max_lanes));
  } else {
    while (lanes < need) lanes *= 2;
  }
  return make_tiling(C, std::max(1, threads / lanes), lanes, kN * kVecs);
}

// Pixels of C channels, `per_thread` to a thread, in blocks of about `threads`. Where that makes too few blocks they
// take fewer pixels, but not so few that a memory access becomes shorter than 32 bytes; where `whole` rows must fit, as
// few as that takes.
Tiling pixel_tiling(int64_t R, int64_t C, int per_thread, int threads, bool whole, size_t element_bytes) {
  constexpr int kMaxLanes = kMaxThreads / 8;
  int lanes = static_cast<int>(std::min<int64_t>(ceil_div(C, per_thread), kMaxLanes));
  int slots = std::max(kWarpSize, threads / lanes / kWarpSize * kWarpSize);
  const int least = std::max<int>(8, 32 / element_bytes);
  while (slots / 2 >= least && ceil_div(R, slots) < 2 * multiprocessor_count()) slots /= 2;
  while (slots * lanes > kMaxThreads) {
    if (whole || slots > 16) {
      slots /= 2;
    } else {
      lanes = kMaxThreads / slots;
    }
  }
  return make_tiling(C, slots, lanes, per_thread);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every access of 16 bytes is aligned.
template <typename T, typename W>
bool fits_vectors(const LayerNormFwdParams<T, W>& p) {
  constexpr int kN = 16 / sizeof(T);
  return p.C % kN == 0 && p.x_stride % kN == 0 && (p.residual == nullptr || p.residual_stride % kN == 0) &&
         aligned(p.x) && aligned(p.residual) && aligned(p.y) && aligned(p.sum) && aligned(p.weight) && aligned(p.bias);
}

template <typename T, typename W>
bool fits_vectors(const LayerNormBwdParams<T, W>& p) {
  constexpr int kN = 16 / sizeof(T);
  return p.C % kN == 0 && p.dy_stride % kN == 0 && p.saved_stride % kN == 0 &&
         (p.dsum == nullptr || p.dsum_stride % kN == 0) && aligned(p.dy) && aligned(p.saved) && aligned(p.dsum) &&
         aligned(p.dx) && aligned(p.dresidual) && aligned(p.weight) && aligned(p.bias) && aligned(p.workspace);
}

template <typename T, typename W, int kN, int kVecs, template <typename, int, int> class Layout>
void launch_fwd(const LayerNormFwdParams<T, W>& p, const Tiling& t, stream_t stream) {
  const int64_t blocks = std::min<int64_t>(ceil_div(p.R, t.slots), INT32_MAX);
  launch("layer_norm_fwd_kernel", layer_norm_fwd_kernel<T, W, kN, kVecs, Layout>, dim3(blocks), dim3(t.slots * t.lanes),
         Layout<acc_t<T>, kN, kVecs>::shared_bytes(t), stream, p, t);
}

template <typename T, typename W, int kN, int kVecs>
void fwd_rows(const LayerNormFwdParams<T, W>& p, stream_t stream) {
  constexpr int kThreads = FwdPlan<T, kN, kVecs>::kThreads;
  launch_fwd<T, W, kN, kVecs, RowLayout>(p, row_tiling(p.C, kN, kVecs, 128, kThreads), stream);
}

// The most rows of partial sums that any launch writes: two blocks to a multiprocessor, fewer for long rows, which
// bounds the workspace.
int64_t max_partials(int64_t R, int64_t C) {
  const int64_t multiprocessors = multiprocessor_count();
  return std::min(R, std::clamp<int64_t>(multiprocessors * 16384 / C, 1, 2 * multiprocessors));
}

// Returns the rows of partial sums it writes.
template <typename T, typename W, int kN, int kVecs, template <typename, int, int> class Layout, bool kDx>
int launch_bwd(const LayerNormBwdParams<T, W>& p, const Tiling& t, stream_t stream) {
  using A = acc_t<T>;
  using L = Layout<A, kN, kVecs>;
  const int threads = t.slots * t.lanes;
  const int64_t chunks = ceil_div(p.C, t.chunk);
  const int64_t resident = int64_t(multiprocessor_count()) * (BwdPlan<T, kN, kVecs>::kThreads / threads);
  const int64_t blocks =
      std::clamp<int64_t>(resident / chunks, 1, std::min(ceil_div(p.R, t.slots), max_partials(p.R, p.C)));
  const size_t partial_bytes = t.slots > 1 ? sizeof(A) * t.slots * partial_stride<L>(t) : 0;
  launch("layer_norm_bwd_kernel", layer_norm_bwd_kernel<T, W, kN, kVecs, Layout, kDx>, dim3(chunks, blocks),
         dim3(threads), std::max(L::shared_bytes(t), partial_bytes), stream, p, t);
  return static_cast<int>(blocks);
}

template <typename T, typename W, int kN, int kVecs, template <typename, int, int> class Layout>
void launch_bwd_dx(const LayerNormBwdParams<T, W>& p, const Tiling& t, stream_t stream) {
  const int64_t blocks = std::min<int64_t>(ceil_div(p.R, t.slots), INT32_MAX);
  launch("layer_norm_bwd_dx_kernel", layer_norm_bwd_dx_kernel<T, W, kN, kVecs, Layout>, dim3(blocks),
         dim3(t.slots * t.lanes), Layout<acc_t<T>, kN, kVecs>::shared_bytes(t), stream, p, t);
}

// Half as many columns to a thread where an accumulator takes two registers.
template <typename T>
constexpr int kHalf = sizeof(acc_t<T>) == 8 ? 2 : 1;

// kN elements to an access. These return the rows of partial sums written.
template <typename T, typename W, int kN>
int bwd_rows(const LayerNormBwdParams<T, W>& p, bool dx, bool sums, stream_t stream) {
  constexpr int kVecs = kN == 1 ? 8 / kHalf<T> : 2;
  const auto tiling = [&](int vecs, int max_lanes) { return row_tiling(p.C, kN, vecs, kFewThreads, max_lanes); };
  if (dx && sums) {
    if (p.C <= kMaxThreads * kN * kVecs) {
      return launch_bwd<T, W, kN, kVecs, RowLayout, true>(p, tiling(kVecs, kMaxThreads), stream);
    }
    if constexpr (kN > 1) {
      constexpr int kMany = (sizeof(T) == 4 ? 48 : 64) / kHalf<T> / kN;  // as far as the registers go
      if (p.C <= kFewThreads * kN * kMany) {
        return launch_bwd<T, W, kN, kMany, RowLayout, true>(p, tiling(kMany, kFewThreads), stream);
      }
    }
  }
  constexpr int kHeld = kN == 1 ? kVecs : 4;
  if (dx) launch_bwd_dx<T, W, kN, kHeld, RowLayout>(p, tiling(kHeld, kMaxThreads), stream);
  return sums ? launch_bwd<T, W, kN, kVecs, RowLayout, false>(p, tiling(kVecs, kFewThreads), stream) : 0;
}

template <typename T, typename W>
int bwd_pixels(const LayerNormBwdParams<T, W>& p, bool dx, bool sums, stream_t stream) {
  constexpr int kVecs = kHalf<T> == 2 ? 8 : 12;
  const Tiling whole = pixel_tiling(p.R, p.C, kVecs, kFewThreads, true, sizeof(T));
  if (dx && sums && p.C <= whole.chunk) return launch_bwd<T, W, 1, kVecs, PixelLayout, true>(p, whole, stream);
  const Tiling t = pixel_tiling(p.R, p.C, kVecs, kFewThreads, false, sizeof(T));
  if (dx) launch_bwd_dx<T, W, 1, kVecs, PixelLayout>(p, t, stream);
  return sums ? launch_bwd<T, W, 1, kVecs, PixelLayout, false>(p, t, stream) : 0;
}

}  // namespace

template <typename T, typename W>
void layer_norm_fwd_cuda(const LayerNormFwdParams<T, W>& params, stream_t stream) {
  LayerNormFwdParams<T, W> p = params;
  if (p.R == 0) return;
  if (p.weight == nullptr) p.weight_offset = 1;
  if (p.P > 1) {
    constexpr int kVecs = 32 / kHalf<T>;
    return launch_fwd<T, W, 1, kVecs, PixelLayout>(p, pixel_tiling(p.R, p.C, kVecs, 128, false, sizeof(T)), stream);
  }
  constexpr int kN = 16 / sizeof(T);
  if (!fits_vectors(p)) return fwd_rows<T, W, 1, 8>(p, stream);
  if (p.C <= FwdPlan<T, kN, 4>::kThreads * kN * 4) return fwd_rows<T, W, kN, 4>(p, stream);
  fwd_rows<T, W, kN, 8>(p, stream);
}

template <typename T, typename W>
void layer_norm_bwd_cuda(const LayerNormBwdParams<T, W>& params, stream_t stream) {
  LayerNormBwdParams<T, W> p = params;
  if (p.weight == nullptr) p.weight_offset = 1;
  const bool dx = p.dx != nullptr || p.dresidual != nullptr, sums = p.dweight != nullptr || p.dbias != nullptr;
  int partials = 0;
  if (p.R > 0) {
    if (p.P > 1) {
      partials = bwd_pixels(p, dx, sums, stream);
    } else if (fits_vectors(p)) {
      partials = bwd_rows<T, W, 16 / sizeof(T)>(p, dx, sums, stream);
    } else {
      partials = bwd_rows<T, W, 1>(p, dx, sums, stream);
    }
  }
  if (!sums) return;
  launch("layer_norm_bwd_reduce_kernel", layer_norm_bwd_reduce_kernel<T, W>, dim3(ceil_div(2 * p.C, kWarpSize)),
         dim3(kReduceParts * kWarpSize), sizeof(acc_t<T>) * kReduceParts * kWarpSize, stream, p, partials);
}

int64_t layer_norm_bwd_workspace_cuda(int64_t R, int64_t C, int64_t) { return max_partials(R, C) * 2 * C; }

#define PYOPS_INSTANTIATE(T, W)                                                       \
  template void layer_norm_fwd_cuda<T, W>(const LayerNormFwdParams<T, W>&, stream_t); \
  template void layer_norm_bwd_cuda<T, W>(const LayerNormBwdParams<T, W>&, stream_t);
PYOPS_INSTANTIATE(double, double)
PYOPS_INSTANTIATE(float, float)
PYOPS_INSTANTIATE(bf16, bf16)
PYOPS_INSTANTIATE(bf16, float)
PYOPS_INSTANTIATE(f16, f16)
PYOPS_INSTANTIATE(f16, float)

}  // namespace pyops
