// Recurrent layers, forward and backward; the formulas stand in params/recurrent.h.
//
// Parallelisation. Products of the input and gradients of the weights are products over all steps, outside. Two ways:
//   All steps in one kernel: the weights stay on chip, in registers and shared memory, c and dc in registers, a step's
//   h' or dp in shared memory. A warp holds 8 units with all gates (backward 16 columns of W_hh) and a part of the
//   inner dimension; the parts are added in shared memory. Where a block has room for all units of a direction, it
//   takes a tile of 8 to 128 sequences by itself. Else blocks that run together (a cooperative launch, one to a
//   multiprocessor) have a slice of the units each and exchange h' or dp through words of a value and the number of its
//   step, in two halves by turns: one exchange a step, without barriers of the grid or fences. More tiles than fit take
//   turns. A step at a time, for what needs sums over units (normalised gates, projection), float64, few steps, and
//   weights that do not fit: a launch for the product, gates and states of a step; with normalised gates a second one,
//   a block to a row; with a projection one more.
// Both directions run in the same launches. Sums over rows (biases, peepholes, norms) come behind the steps, from what
// these have stored: parts of the rows in a fixed order, then the parts.
// Traffic: gx in, y, gates and c out once; backward reads those and dy, writes dgx, and reads it again for the sums. A
// step at a time reads W_hh once per tile of 16 sequences and step, from L2; all steps in one kernel read it once. An
// exchange moves 4 bytes for each value of 16 bits, 8 for one of 32, to every slice.
// Work: 2 G H P FLOP per row. Steps depend on each other: bound by the latency of a step unless the batch is large.
// Numerics: fp32 sums of 16-bit products by the matrix units; fp32 and fp64 by FMA, no tf32. h' and dp are rounded to T
// on their way into a product. Fixed order of additions, no atomics: equal bits from run to run on a device.
// Variants: cells and options are uniform branches; each as a template parameter would multiply the number of kernels.
// Limits: fewer than 2^30 steps and sequences for all steps in one kernel, else any size.
// Papers: Hochreiter and Schmidhuber 1997; Cho et al. 2014; Diamos et al. 2016 (Persistent RNNs).
#include "recurrent.h"

#include <algorithm>
#include <stdexcept>

#include "recurrent_bwd.cuh"
#include "recurrent_fwd.cuh"

namespace pyops {

// Stamps begin at 1.
__global__ void recurrent_clear_kernel(uint64_t* words, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) words[i] = 0;
}

// As many offsets as kernel parameters hold: a copy from the host's memory would wait for the stream, or outlive it.
struct OffsetsChunk {
  int64_t first, count, values[256];
};

__global__ void recurrent_offsets_kernel(int64_t* offsets, const __grid_constant__ OffsetsChunk chunk) {
  if (threadIdx.x < chunk.count) offsets[chunk.first + threadIdx.x] = chunk.values[threadIdx.x];
}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned grid_size_of(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error("recurrent: the call needs more than 2^31 blocks");
  return static_cast<unsigned>(blocks);
}

// Deals out the workspace; without one it counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename Element>
  Element* take(int64_t count) {
    constexpr int64_t kAlignment = 16;
    const int64_t at = used_;
    used_ += ceil_div(count * int64_t(sizeof(Element)), kAlignment) * kAlignment;
    return memory_ == nullptr ? nullptr : reinterpret_cast<Element*>(memory_ + at);
  }
  int64_t used() const { return used_; }  // bytes

 private:
  char* memory_;
  int64_t used_ = 0;
};

// ---- kernels over all steps

constexpr int64_t kLeastSteps = 4;          // for which weights are worth bringing into registers
constexpr int64_t kMostRows = kNoSequence;  // steps or sequences: they are counted in 32 bits
constexpr int64_t kMostWaves = 4;           // launches one behind the other, as the blocks of a tile must run together

struct SequenceLaunch {
  SequencePlan plan;
  int64_t tiles;        // of sequences, of all launches
  size_t shared_bytes;  // of a block
  int64_t words;
  int launches() const { return static_cast<int>(ceil_div(tiles, plan.tiles)); }
};

// Whether one kernel takes all steps, and how: it keeps the weights in registers, so the slices of a tile of sequences
// have one block to a multiprocessor. Tiles are as small as leaves none of these idle. `inner` is that of the product,
// `group` are the units of a group, which end up in `ends` warps for each tile of rows.
template <typename T, typename Weights, int kTiles>
bool plan_sequence(const RecurrentParams<T>& p, int64_t inner, int group, int ends, SequenceLaunch& launch) {
  const RecurrentDirection<T>& w = p.direction[0];
  if (p.T_ < kLeastSteps || p.T_ >= kMostRows || p.B >= kMostRows || w.ln_gates != nullptr || w.w_hr != nullptr)
    return false;
  const int64_t parts = ceil_div(ceil_div(inner, Weights::kInner), ends) * ends;
  if (parts > kSequenceWarps) return false;
  const int64_t groups = std::min(kSequenceWarps / parts, ceil_div(p.H, group)), slices = ceil_div(p.H, groups * group);
  const int64_t multiprocessors = multiprocessor_count(), together = multiprocessors / (slices * p.directions);
  if (slices > 1 && together == 0) return false;
  const int64_t stride = parts * Weights::kInner + 8;  // so that ldmatrix meets every bank once
  bool fits = false;
  for (int64_t row_tiles = 1; row_tiles <= parts / ends; ++row_tiles) {
    const int64_t rows = row_tiles * kRowTile, tiles = ceil_div(p.B, rows);
    const size_t bytes = parts * groups * Weights::kSharedBytes + (parts == 1 ? 2 : 1) * rows * stride * sizeof(T) +
                         (parts == 1 ? 0 : parts * groups * row_tiles * kTiles * kWarpSize * 4 * sizeof(float));
    if (bytes > max_shared_bytes()) break;
    const int64_t at_once = slices == 1 ? tiles : std::min(together, tiles);
    launch.plan = {.parts = int(parts),
                   .groups = int(groups),
                   .slices = int(slices),
                   .row_tiles = int(row_tiles),
                   .tiles = int(at_once),
                   .first_tile = 0,
                   .stride = int(stride),
                   .first_stamp = 0};
    launch.tiles = tiles;
    launch.shared_bytes = bytes;
    launch.words = slices == 1 ? 0 : p.directions * at_once * 2 * (rows / kInWord<T>)*inner;
    fits = true;
    if (tiles * slices * p.directions <= multiprocessors) break;
  }
  return fits && (slices == 1 || launch.launches() <= kMostWaves);
}

template <typename T>
bool plan_sequence(const RecurrentFwdParams<T>& p, SequenceLaunch& launch) {
  return plan_sequence<T, FwdWeights<T>, 2>(p, p.H, kFwdGroup, 1, launch);
}
template <typename T>
bool plan_sequence(const RecurrentBwdParams<T>& p, SequenceLaunch& launch) {
  return plan_sequence<T, BwdWeights<T>, 1>(p, gates_of(p.cell) * p.H, kBwdGroup, 2, launch);
}
// In double, a word would not hold a value and its stamp.
bool plan_sequence(const RecurrentFwdParams<double>&, SequenceLaunch&) { return false; }
bool plan_sequence(const RecurrentBwdParams<double>&, SequenceLaunch&) { return false; }

template <typename Params, typename Workspace>
void launch_sequence(const char* name, void (*kernel)(Params, Workspace, SequencePlan), const Params& p,
                     const Workspace& ws, const SequenceLaunch& of, stream_t stream) {
  SequencePlan plan = of.plan;
  const dim3 block(plan.parts * plan.groups * kWarpSize);
  if (plan.slices == 1) {
    return launch(name, kernel, dim3(grid_size_of(of.tiles), p.directions), block, of.shared_bytes, stream, p, ws,
                  plan);
  }
  constexpr int kThreads = 256;
  launch("recurrent_clear_kernel", recurrent_clear_kernel, dim3(grid_size_of(ceil_div(of.words, kThreads))),
         dim3(kThreads), 0, stream, ws.words, of.words);
  for (int wave = 0; wave < of.launches(); ++wave) {
    plan.first_tile = wave * of.plan.tiles;
    plan.first_stamp = static_cast<uint32_t>(wave * (p.T_ + 1));
    plan.tiles = static_cast<int>(std::min<int64_t>(of.plan.tiles, of.tiles - plan.first_tile));
    launch_cooperative(name, kernel, dim3(plan.slices * plan.tiles, p.directions), block, of.shared_bytes, stream, p,
                       ws, plan);
  }
}

// ---- the workspace

template <typename T>
FwdWorkspace<T> divide(const RecurrentFwdParams<T>& p, Arena& arena) {
  const int64_t states = p.directions * p.B;
  FwdWorkspace<T> ws{};
  if (p.offsets != nullptr) ws.offsets = arena.take<int64_t>(p.T_ + 1);
  if (has_cells(p.cell)) ws.c = arena.take<acc_t<T>>(states * p.H);
  if (p.direction[0].ln_gates != nullptr) ws.products = arena.take<acc_t<T>>(states * gates_of(p.cell) * p.H);
  if (p.direction[0].w_hr != nullptr) ws.m = arena.take<T>(states * p.H);
  if (SequenceLaunch launch{}; plan_sequence(p, launch)) ws.words = arena.take<uint64_t>(launch.words);
  return ws;
}

constexpr int64_t kMostParts = 64, kLeastPartRows = 128;

template <typename T>
int64_t sum_parts(const RecurrentBwdParams<T>& p) {
  return std::clamp<int64_t>(p.T_ * p.B / kLeastPartRows, 1, kMostParts);
}

template <typename T>
BwdWorkspace<T> divide(const RecurrentBwdParams<T>& p, Arena& arena) {
  using A = acc_t<T>;
  const bool normalised = p.direction[0].ln_gates != nullptr, projected = p.direction[0].w_hr != nullptr;
  const int64_t states = p.directions * p.B, rows = p.directions * p.rows;
  BwdWorkspace<T> ws{};
  if (p.offsets != nullptr) ws.offsets = arena.take<int64_t>(p.T_ + 1);
  if (normalised || projected) ws.dm = arena.take<A>(states * p.H);
  if (normalised) {
    ws.d = arena.take<A>(states * gates_of(p.cell) * p.H);
    ws.dseen = arena.take<A>(rows * p.H);
    ws.norms = arena.take<A>(rows * 4);
  }
  ws.partial = arena.take<A>(p.directions * sum_parts(p) * kSumKinds * p.H);
  if (SequenceLaunch launch{}; plan_sequence(p, launch)) ws.words = arena.take<uint64_t>(launch.words);
  return ws;
}

template <typename T>
DirectionSteps direction_steps(const RecurrentParams<T>& p, int64_t s) {
  DirectionSteps steps{};
  for (int d = 0; d < p.directions; ++d) steps.of[d] = steps_at(p, d, s);
  return steps;
}

// Sequences that any direction has at the step or after it.
int64_t most_sequences(const DirectionSteps& steps) {
  int64_t most = 0;
  for (const Steps& s : steps.of) most = std::max({most, s.now.count, s.after.count});
  return most;
}

// A launch or a few for each step.
template <typename T>
void fwd_steps(const RecurrentFwdParams<T>& p, const FwdWorkspace<T>& ws, stream_t stream) {
  using A = acc_t<T>;
  const int tiles = static_cast<int>(ceil_div(p.H, kTileUnits)),
            tiles_of_h = static_cast<int>(ceil_div(p.P, kTileUnits));
  for (int64_t s = 0; s < p.T_; ++s) {
    const DirectionSteps steps = direction_steps(p, s);
    const int64_t B = std::max(steps.of[0].now.count, steps.of[1].now.count), row_tiles = ceil_div(B, kTileRows);
    launch("recurrent_fwd_step_kernel", recurrent_fwd_step_kernel<T>,
           dim3(grid_size_of(tiles * row_tiles), p.directions), dim3(kTileThreads),
           sizeof(ProductStorage<A, kMostGates>), stream, p, ws, steps, tiles);
    if (p.direction[0].ln_gates != nullptr) {
      launch("recurrent_fwd_norm_kernel", recurrent_fwd_norm_kernel<T>, dim3(grid_size_of(B), p.directions),
             dim3(kRowThreads), sizeof(BlockReduceStorage<A, 2>), stream, p, ws, steps);
    }
    if (p.direction[0].w_hr != nullptr) {
      launch("recurrent_fwd_projection_kernel", recurrent_fwd_projection_kernel<T>,
             dim3(grid_size_of(tiles_of_h * row_tiles), p.directions), dim3(kTileThreads), sizeof(ProductStorage<A, 1>),
             stream, p, ws, steps, tiles_of_h);
    }
  }
}

template <typename T>
void bwd_steps(const RecurrentBwdParams<T>& p, const BwdWorkspace<T>& ws, stream_t stream) {
  using A = acc_t<T>;
  const int tiles = static_cast<int>(ceil_div(p.H, kTileUnits)),
            tiles_of_h = static_cast<int>(ceil_div(p.P, kTileUnits));
  for (int64_t s = p.T_ - 1; s >= -1; --s) {
    const DirectionSteps steps = direction_steps(p, s);
    const int64_t B = most_sequences(steps), row_tiles = ceil_div(B, kTileRows);
    launch("recurrent_bwd_step_kernel", recurrent_bwd_step_kernel<T>,
           dim3(grid_size_of(tiles_of_h * row_tiles), p.directions), dim3(kTileThreads), sizeof(ProductStorage<A, 1>),
           stream, p, ws, steps, tiles_of_h);
    if (p.direction[0].w_hr != nullptr) {
      launch("recurrent_bwd_projection_kernel", recurrent_bwd_projection_kernel<T>,
             dim3(grid_size_of(tiles * row_tiles), p.directions), dim3(kTileThreads), sizeof(ProductStorage<A, 1>),
             stream, p, ws, steps, tiles);
    }
    if (p.direction[0].ln_gates != nullptr && s >= 0) {
      launch("recurrent_bwd_norm_kernel", recurrent_bwd_norm_kernel<T>, dim3(grid_size_of(B), p.directions),
             dim3(kRowThreads), sizeof(BlockReduceStorage<A, 2>), stream, p, ws, steps);
    }
  }
}

// Behind the steps. The kernels read p.offsets.
template <typename T>
void bwd_sums(const RecurrentBwdParams<T>& p, const BwdWorkspace<T>& ws, stream_t stream) {
  using A = acc_t<T>;
  if (p.dbias[0] == nullptr && p.dpeephole[0] == nullptr && p.dln_gates[0] == nullptr && p.dln_cell[0] == nullptr)
    return;
  const int64_t parts = sum_parts(p);
  launch("recurrent_bwd_sums_kernel", recurrent_bwd_sums_kernel<T>,
         dim3(grid_size_of(ceil_div(p.H, kTileUnits)), parts, p.directions), dim3(kSumThreads), sizeof(A) * kSumThreads,
         stream, p, ws, ceil_div(p.T_ * p.B, parts));
  launch("recurrent_bwd_reduce_kernel", recurrent_bwd_reduce_kernel<T>,
         dim3(grid_size_of(ceil_div(kSumKinds * p.H, kSumThreads)), p.directions), dim3(kSumThreads), 0, stream, p, ws,
         static_cast<int>(parts));
}

// The params with offsets that kernels can read.
template <typename Params>
Params with_offsets(Params p, int64_t* offsets, stream_t stream) {
  constexpr int64_t kChunk = std::size(OffsetsChunk{}.values);
  if (p.offsets == nullptr) return p;
  for (int64_t first = 0; first <= p.T_; first += kChunk) {
    OffsetsChunk chunk{first, std::min(kChunk, p.T_ + 1 - first), {}};
    std::copy_n(p.offsets + first, chunk.count, chunk.values);
    launch("recurrent_offsets_kernel", recurrent_offsets_kernel, dim3(1), dim3(kChunk), 0, stream, offsets, chunk);
  }
  p.offsets = offsets;
  return p;
}

// Packed sequences lie side by side.
template <typename Params>
Params with_row_stride(Params p) {
  if (p.offsets != nullptr) p.batch_rows = 1;
  return p;
}

}  // namespace

template <typename T>
void recurrent_fwd_cuda(const RecurrentFwdParams<T>& params, acc_t<T>* workspace, stream_t stream) {
  const RecurrentFwdParams<T> p = with_row_stride(params);
  Arena arena(workspace);
  const FwdWorkspace<T> ws = divide(p, arena);
  if constexpr (!std::is_same_v<T, double>) {
    if (SequenceLaunch of{}; plan_sequence(p, of)) {
      return launch_sequence("recurrent_fwd_sequence_kernel", recurrent_fwd_sequence_kernel<T>,
                             with_offsets(p, ws.offsets, stream), ws, of, stream);
    }
  }
  fwd_steps(p, ws, stream);
}

template <typename T>
void recurrent_bwd_cuda(const RecurrentBwdParams<T>& params, acc_t<T>* workspace, stream_t stream) {
  const RecurrentBwdParams<T> p = with_row_stride(params);
  Arena arena(workspace);
  const BwdWorkspace<T> ws = divide(p, arena);
  const RecurrentBwdParams<T> on_device = with_offsets(p, ws.offsets, stream);
  bool done = false;
  if constexpr (!std::is_same_v<T, double>) {
    if (SequenceLaunch of{}; plan_sequence(p, of)) {
      launch_sequence("recurrent_bwd_sequence_kernel", recurrent_bwd_sequence_kernel<T>, on_device, ws, of, stream);
      done = true;
    }
  }
  if (!done) bwd_steps(p, ws, stream);
  bwd_sums(on_device, ws, stream);
}

template <typename T>
int64_t recurrent_fwd_workspace_cuda(const RecurrentFwdParams<T>& p) {
  Arena arena(nullptr);
  divide(p, arena);
  return ceil_div(arena.used(), sizeof(acc_t<T>));
}

template <typename T>
int64_t recurrent_bwd_workspace_cuda(const RecurrentBwdParams<T>& p) {
  Arena arena(nullptr);
  divide(p, arena);
  return ceil_div(arena.used(), sizeof(acc_t<T>));
}

#define PYOPS_INSTANTIATE(T)                                                              \
  template void recurrent_fwd_cuda<T>(const RecurrentFwdParams<T>&, acc_t<T>*, stream_t); \
  template void recurrent_bwd_cuda<T>(const RecurrentBwdParams<T>&, acc_t<T>*, stream_t); \
  template int64_t recurrent_fwd_workspace_cuda<T>(const RecurrentFwdParams<T>&);         \
  template int64_t recurrent_bwd_workspace_cuda<T>(const RecurrentBwdParams<T>&);
PYOPS_INSTANTIATE(double)
PYOPS_INSTANTIATE(float)
PYOPS_INSTANTIATE(bf16)
PYOPS_INSTANTIATE(f16)

}  // namespace pyops
