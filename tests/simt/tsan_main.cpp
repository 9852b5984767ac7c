// The kernels under ThreadSanitizer: no report on correct ones, a report when a barrier is switched off. Values are not
// looked at here; the sizes are chosen so that every kernel runs, with several rows to a block or several blocks to a
// grid.
//
//   simt_tsan [--seed N] [--disable KERNEL FILE LINE] [--selftest NAME] [--variant N]
//
// With --disable only the operation runs whose kernel it is.
//
// Exit status 66 after a report, 2 when the executor refuses, 0 otherwise.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../kernels/cuda/attention.h"
#include "../../kernels/cuda/layer_norm.h"
#include "../../kernels/cuda/recurrent.h"
#include "api.h"

SIMT_API const char* selftest_run(const char* name, unsigned blocks, unsigned threads, size_t smem_bytes,
                                  const float* x, float* y, int64_t n, int variant);

extern "C" const char* __tsan_default_options() { return "halt_on_error=1:exitcode=66:history_size=0"; }

namespace pyops {
namespace {

struct LayerNorm {
  int64_t R, C, P;
  bool rms, dropout, backward;
};

constexpr LayerNorm kLayerNorm[] = {
    {70, 8, 1, false, false, true},      // several rows to a warp
    {9, 200, 1, false, true, true},      // a warp to a row
    {9, 203, 1, true, true, true},       // odd: single elements
    {5, 1536, 1, false, false, true},    // several warps to a row
    {3, 1537, 1, false, false, true},    // the same, odd
    {2, 4099, 1, false, false, true},    // longer than the registers of a backward block
    {2, 16387, 1, false, false, false},  // longer than the registers of a forward block
    {75, 40, 25, false, false, true},    // channels first, few channels
    {50, 900, 25, false, false, true},   // many channels
};

template <typename T, typename W>
void layer_norm(const LayerNorm& c) {
  using A = acc_t<T>;
  const size_t n = c.R * c.C;
  const std::vector<T> x(n), residual(n), dy(n), dsum(n);
  const std::vector<W> weight(c.C), bias(c.C);
  const std::vector<int64_t> seed = {7, 9};
  std::vector<T> y(n), sum(n), dx(n), dresidual(n);
  std::vector<W> dweight(c.C), dbias(c.C);
  std::vector<A> mean(c.R), rstd(c.R), workspace(layer_norm_bwd_workspace_cuda(c.R, c.C, c.P));
  const uint32_t threshold = c.dropout ? 1u << 22 : 0;
  layer_norm_fwd_cuda(LayerNormFwdParams<T, W>{.x = x.data(),
                                               .residual = c.P == 1 ? residual.data() : nullptr,
                                               .weight = weight.data(),
                                               .bias = bias.data(),
                                               .seed = c.dropout ? seed.data() : nullptr,
                                               .y = y.data(),
                                               .sum = c.P == 1 ? sum.data() : nullptr,
                                               .mean = c.rms ? nullptr : mean.data(),
                                               .rstd = rstd.data(),
                                               .R = c.R,
                                               .C = c.C,
                                               .P = c.P,
                                               .x_stride = c.C,
                                               .residual_stride = c.C,
                                               .eps = A(1e-5),
                                               .weight_offset = A(0),
                                               .dropout_scale = A(1),
                                               .drop_threshold = threshold,
                                               .rms = c.rms,
                                               .num_threads = 1},
                      nullptr);
  if (!c.backward) return;
  LayerNormBwdParams<T, W> bwd{.dy = dy.data(),
                               .dsum = c.P == 1 ? dsum.data() : nullptr,
                               .saved = x.data(),
                               .weight = weight.data(),
                               .bias = bias.data(),
                               .mean = c.rms ? nullptr : mean.data(),
                               .rstd = rstd.data(),
                               .seed = c.dropout ? seed.data() : nullptr,
                               .dx = dx.data(),
                               .dresidual = c.dropout ? dresidual.data() : nullptr,
                               .dweight = dweight.data(),
                               .dbias = dbias.data(),
                               .workspace = workspace.data(),
                               .R = c.R,
                               .C = c.C,
                               .P = c.P,
                               .dy_stride = c.C,
                               .dsum_stride = c.C,
                               .saved_stride = c.C,
                               .weight_offset = A(0),
                               .dropout_scale = A(1),
                               .drop_threshold = threshold,
                               .rms = c.rms,
                               .from_output = false,
                               .num_threads = 1};
  layer_norm_bwd_cuda(bwd, nullptr);
  bwd.dweight = bwd.dbias = nullptr;  // dx alone
  layer_norm_bwd_cuda(bwd, nullptr);
}

// Query heads share one key head. With dropout there is a bias of the keys, and its gradient.
struct Attention {
  int64_t H, L, S, D;
  bool dropout;
  std::vector<int32_t> cu_q, cu_k;  // of packed sequences, or empty
};

const Attention kAttention[] = {
    {2, 70, 300, 24, false, {}, {}},  // several tiles of queries and of keys
    {2, 2, 300, 64, false, {}, {}},   // few queries: the keys are split
    {3, 70, 72, 72, true, {}, {}},    // tiles of queries and heads share a tile of the bias
    {2, 20, 40, 136, false, {}, {}},  // dk and dv apart
    {2, 75, 60, 8, false, {0, 5, 75}, {0, 40, 60}},
};

template <typename T>
void attention(const Attention& c) {
  const bool packed = !c.cu_q.empty();
  const std::vector<T> q(c.H * c.L * c.D), k(c.S * c.D), v(c.S * c.D), dout(q.size()), bias(c.S);
  const std::vector<int64_t> seed = {7, 9};
  std::vector<T> out(q.size()), dq(q.size()), dk(k.size()), dv(v.size());
  std::vector<float> stats(2 * c.H * c.L), dbias(c.S), workspace;
  const AttentionStrides by_query{c.H * c.L * c.D, c.L * c.D, c.D}, by_key{c.S * c.D, c.S * c.D, c.D};
  const AttentionParams<T> shared{.q = q.data(),
                                  .k = k.data(),
                                  .v = v.data(),
                                  .mask = c.dropout ? bias.data() : nullptr,
                                  .slopes = nullptr,
                                  .sinks = nullptr,
                                  .seed = c.dropout ? seed.data() : nullptr,
                                  .cu_q = packed ? c.cu_q.data() : nullptr,
                                  .cu_k = packed ? c.cu_k.data() : nullptr,
                                  .q_stride = by_query,
                                  .k_stride = by_key,
                                  .v_stride = by_key,
                                  .mask_stride = {0, 0, 0, 1},
                                  .mask_kind = c.dropout ? AttentionMask::same : AttentionMask::none,
                                  .B = packed ? int64_t(c.cu_q.size()) - 1 : 1,
                                  .H = c.H,
                                  .Hk = 1,
                                  .L = c.L,
                                  .S = c.S,
                                  .D = c.D,
                                  .Dv = c.D,
                                  .max_q = c.L,
                                  .max_k = c.S,
                                  .scale = 1.0f,
                                  .softcap = 0.0f,
                                  .left = -1,
                                  .right = packed ? 0 : -1,
                                  .bottom_right = false,
                                  .dropout_scale = 1.0f,
                                  .drop_threshold = 1u << 22,
                                  .num_threads = 1};
  AttentionFwdParams<T> fwd{shared, out.data(), by_query, stats.data(), nullptr};
  workspace.resize(attention_fwd_workspace_cuda(fwd));
  fwd.workspace = workspace.data();
  attention_fwd_cuda(fwd, nullptr);
  AttentionBwdParams<T> bwd{
      shared,    dout.data(), out.data(), stats.data(), nullptr, by_query, by_query,
      dq.data(), dk.data(),   dv.data(),  by_query,     by_key,  by_key,   c.dropout ? dbias.data() : nullptr,
      {0, 0, 0}, nullptr};
  workspace.resize(attention_bwd_workspace_cuda(bwd));
  bwd.workspace = workspace.data();
  attention_bwd_cuda(bwd, nullptr);
}

// An LSTM layer; with everything: peepholes, normalised gates and a projection.
struct Recurrent {
  int64_t T, B, H;
  bool everything;
};

constexpr Recurrent kRecurrent[] = {
    {2, 3, 70, true},    // a step at a time
    {5, 9, 40, false},   // one block has all units
    {5, 9, 150, false},  // blocks share the units
};

template <typename T>
void recurrent(const Recurrent& c) {
  using A = acc_t<T>;
  constexpr int64_t kGates = 4;
  simt_set_multiprocessors(8);
  const int64_t rows = c.T * c.B, P = c.everything ? c.H / 2 : c.H, gates = kGates * c.H;
  const std::vector<T> gx(rows * gates), w_hh(gates * P), w_hr(P * c.H), peephole(3 * c.H), ln_gates(gates),
      ln_cell(2 * c.H), dy(rows * P);
  const std::vector<A> products(rows * gates);
  std::vector<T> y(rows * P), saved(rows * gates), h_n(c.B * P), c_n(c.B * c.H), dgx(rows * gates), dp(rows * gates),
      dm(rows * P);
  std::vector<A> cells(rows * c.H), dbias(gates), dpeephole(3 * c.H), dln_gates(gates), dln_cell(2 * c.H), dh0(c.B * P),
      dc0(c.B * c.H);
  RecurrentFwdParams<T> fwd{};
  fwd.direction[0].gx = gx.data(), fwd.direction[0].gx_row = gates;
  fwd.direction[0].w_hh = w_hh.data(), fwd.direction[0].w_hh_row = P;
  fwd.direction[0].y = y.data(), fwd.y_row = P;
  fwd.direction[0].gates = saved.data(), fwd.direction[0].cells = cells.data();
  if (c.everything) {
    fwd.direction[0].w_hr = w_hr.data(), fwd.direction[0].w_hr_row = c.H;
    fwd.direction[0].peephole = peephole.data();
    fwd.direction[0].ln_gates = ln_gates.data(), fwd.direction[0].ln_cell = ln_cell.data();
  }
  fwd.cell = RecurrentCell::lstm, fwd.directions = 1;
  fwd.T_ = c.T, fwd.B = c.B, fwd.H = c.H, fwd.P = P, fwd.rows = rows;
  fwd.step_rows = c.B, fwd.batch_rows = 1, fwd.eps = A(1e-5), fwd.num_threads = 1;
  fwd.h_n = h_n.data(), fwd.c_n = c_n.data();
  std::vector<A> workspace(recurrent_fwd_workspace_cuda(fwd));
  recurrent_fwd_cuda(fwd, workspace.data(), nullptr);

  RecurrentBwdParams<T> bwd{};
  static_cast<RecurrentParams<T>&>(bwd) = fwd;
  bwd.dy[0] = dy.data(), bwd.dy_row = P;
  bwd.dgx[0] = dgx.data(), bwd.dbias[0] = dbias.data();
  if (c.everything) {
    bwd.dp[0] = dp.data(), bwd.dm[0] = dm.data(), bwd.products[0] = products.data();
    bwd.dpeephole[0] = dpeephole.data(), bwd.dln_gates[0] = dln_gates.data(), bwd.dln_cell[0] = dln_cell.data();
  }
  bwd.dh0 = dh0.data(), bwd.dc0 = dc0.data();
  workspace.resize(recurrent_bwd_workspace_cuda(bwd));
  recurrent_bwd_cuda(bwd, workspace.data(), nullptr);
  simt_set_multiprocessors(4);
}

void run_selftest(const char* name, int variant) {
  constexpr unsigned kBlocks = 3, kThreads = 64;
  const std::vector<float> x(kBlocks * kThreads * kThreads * 4, 1.0f);
  std::vector<float> y(kBlocks * kThreads * 8);
  const char* report = selftest_run(name, kBlocks, kThreads, 4096, x.data(), y.data(), kThreads, variant);
  if (report != nullptr) throw std::runtime_error(report);
}

}  // namespace
}  // namespace pyops

int main(int argc, char** argv) try {
  const char* selftest = nullptr;
  std::string disabled;
  int variant = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const int left = argc - 1 - i;
    if (option == "--seed" && left >= 1) {
      simt_set_seed(strtoull(argv[++i], nullptr, 10));
    } else if (option == "--disable" && left >= 3) {
      simt_disable(argv[i + 2], atoi(argv[i + 3]), argv[i + 1]);
      disabled = argv[i + 1];
      i += 3;
    } else if (option == "--selftest" && left >= 1) {
      selftest = argv[++i];
    } else if (option == "--variant" && left >= 1) {
      variant = atoi(argv[++i]);
    } else {
      throw std::runtime_error("unknown option " + option);
    }
  }
  if (selftest != nullptr) {
    pyops::run_selftest(selftest, variant);
    return 0;
  }
  const auto wanted = [&](const char* op) { return disabled.empty() || disabled.starts_with(op); };
  if (wanted("layer_norm")) {
    for (const pyops::LayerNorm& c : pyops::kLayerNorm) pyops::layer_norm<float, float>(c);
  }
  if (wanted("attention")) {
    for (const pyops::Attention& c : pyops::kAttention) pyops::attention<pyops::bf16>(c);
  }
  if (wanted("recurrent")) {
    for (const pyops::Recurrent& c : pyops::kRecurrent) {
      pyops::recurrent<float>(c);
      pyops::recurrent<pyops::bf16>(c);
    }
  }
  return 0;
} catch (const std::exception& error) {
  fprintf(stderr, "%s\n", error.what());
  return 2;
}
