// Launchers of layer_norm.cu. Instantiated for (T, W) in (double, double), (float, float), (bf16, bf16), (bf16, float),
// (f16, f16) and (f16, float). They return before the work is done, and throw std::runtime_error if it cannot start.
#pragma once
#include <stdint.h>

#include "../params/layer_norm.h"
#include "runtime.h"

namespace pyops {

template <typename T, typename W>
void layer_norm_fwd_cuda(const LayerNormFwdParams<T, W>& p, stream_t stream);

template <typename T, typename W>
void layer_norm_bwd_cuda(const LayerNormBwdParams<T, W>& p, stream_t stream);

// Elements of LayerNormBwdParams::workspace, for the current device.
int64_t layer_norm_bwd_workspace_cuda(int64_t R, int64_t C, int64_t P);

}  // namespace pyops
