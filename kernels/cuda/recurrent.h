// Launchers of recurrent.cu. Instantiated for double, float, bf16 and f16. They return before the work is done, and
// throw std::runtime_error if it cannot start. `offsets` of the params is memory of the host.
#pragma once
#include <stdint.h>

#include "../params/recurrent.h"
#include "runtime.h"

namespace pyops {

template <typename T>
void recurrent_fwd_cuda(const RecurrentFwdParams<T>& p, acc_t<T>* workspace, stream_t stream);

template <typename T>
void recurrent_bwd_cuda(const RecurrentBwdParams<T>& p, acc_t<T>* workspace, stream_t stream);

// Elements of `workspace`, for the current device. Of p only the cell, the sizes, and whether there are offsets, a
// projection and normalised gates are looked at.
template <typename T>
int64_t recurrent_fwd_workspace_cuda(const RecurrentFwdParams<T>& p);
template <typename T>
int64_t recurrent_bwd_workspace_cuda(const RecurrentBwdParams<T>& p);

}  // namespace pyops
