// Scaled dot-product attention (Vaswani et al. 2017) without its matrix of scores (Rabe, Staats 2021; Dao et al. 2022),
// forward and backward; formulas, symbols and the layout of every tensor stand in params/attention.h.
#include "attention.h"

#include "attention_bwd.h"
#include "attention_fwd.h"

namespace pyops::PYOPS_ISA {

template <typename T>
void attention_fwd_cpu(const AttentionFwdParams<T>& params) {
  forward(params);
}

template <typename T>
void attention_bwd_cpu(const AttentionBwdParams<T>& params) {
  backward(params);
}

#define PYOPS_INSTANTIATE(T)                                        \
  template void attention_fwd_cpu<T>(const AttentionFwdParams<T>&); \
  template void attention_bwd_cpu<T>(const AttentionBwdParams<T>&);
PYOPS_INSTANTIATE(double)
PYOPS_INSTANTIATE(float)
PYOPS_INSTANTIATE(bf16)
PYOPS_INSTANTIATE(f16)

}  // namespace pyops::PYOPS_ISA
