// The kernels under ThreadSanitizer: no report on correct ones, a report when a barrier is switched off. Values are not
// looked at here; the sizes are chosen so that every kernel runs, with several rows to a block or several blocks to a
// grid.
//
//   simt_tsan [--seed N] [--disable KERNEL FILE LINE] [--selftest NAME] [--variant N]
//
// Exit status 66 after a report, 2 when the executor refuses, 0 otherwise.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../kernels/cuda/layer_norm.h"
#include "api.h"

SIMT_API const char* selftest_run(const char* name, unsigned blocks, unsigned threads, size_t smem_bytes,
                                  const float* x, float* y, int64_t n, int variant);

extern "C" const char* __tsan_default_options() { return "halt_on_error=1:exitcode=66:history_size=0"; }

namespace pyops {
namespace {

struct Case {
  int64_t R, C, P;
  bool rms, dropout, backward;
};

constexpr Case kLayerNorm[] = {
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
void layer_norm(const Case& c) {
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

void run_selftest(const char* name, int variant) {
  constexpr unsigned kBlocks = 3, kThreads = 64;
  const std::vector<float> x(kBlocks * kThreads * kThreads * 4, 1.0f);
  std::vector<float> y(kBlocks * kThreads * 4);
  const char* report = selftest_run(name, kBlocks, kThreads, 4096, x.data(), y.data(), kThreads, variant);
  if (report != nullptr) throw std::runtime_error(report);
}

}  // namespace
}  // namespace pyops

int main(int argc, char** argv) try {
  const char* selftest = nullptr;
  int variant = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const int left = argc - 1 - i;
    if (option == "--seed" && left >= 1) {
      simt_set_seed(strtoull(argv[++i], nullptr, 10));
    } else if (option == "--disable" && left >= 3) {
      simt_disable(argv[i + 2], atoi(argv[i + 3]), argv[i + 1]);
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
  } else {
    for (const pyops::Case& c : pyops::kLayerNorm) {
      pyops::layer_norm<float, float>(c);
    }
  }
  return 0;
} catch (const std::exception& error) {
  fprintf(stderr, "%s\n", error.what());
  return 2;
}
