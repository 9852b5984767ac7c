// Launchers of kernels/cpu/layer_norm.cpp, one set per instruction set. Instantiated for (T, W) in (double, double),
// (float, float), (bf16, bf16), (bf16, float), (f16, f16), (f16, float).
#pragma once
#include "../params/layer_norm.h"
#include "isa.h"

#define PYOPS_DECLARE(isa)                                         \
  namespace pyops::isa {                                           \
  template <typename T, typename W>                                \
  void layer_norm_fwd_cpu(const LayerNormFwdParams<T, W>& params); \
  template <typename T, typename W>                                \
  void layer_norm_bwd_cpu(const LayerNormBwdParams<T, W>& params); \
  }
PYOPS_FOR_EACH_ISA(PYOPS_DECLARE)
#undef PYOPS_DECLARE
