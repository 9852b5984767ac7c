// Launchers of attention.cu. Instantiated for bf16 and f16. They return before the work is done, and throw
// std::runtime_error if it cannot start. What they do not serve is named in pyops/attention.py.
#pragma once
#include <stdint.h>

#include "../params/attention.h"
#include "runtime.h"

namespace pyops {

template <typename T>
void attention_fwd_cuda(const AttentionFwdParams<T>& p, stream_t stream);

template <typename T>
void attention_bwd_cuda(const AttentionBwdParams<T>& p, stream_t stream);

// Elements of `workspace`, for the current device. Of p only the sizes, mask_kind and whether there is cu_q are looked
// at.
template <typename T>
int64_t attention_fwd_workspace_cuda(const AttentionFwdParams<T>& p);
template <typename T>
int64_t attention_bwd_workspace_cuda(const AttentionBwdParams<T>& p);

}  // namespace pyops
