// Launchers of kernels/cpu/attention.cpp, one set per instruction set. Instantiated for double, float, bf16 and f16.
#pragma once
#include "../params/attention.h"
#include "isa.h"

#define PYOPS_DECLARE(isa)                                     \
  namespace pyops::isa {                                       \
  template <typename T>                                        \
  void attention_fwd_cpu(const AttentionFwdParams<T>& params); \
  template <typename T>                                        \
  void attention_bwd_cpu(const AttentionBwdParams<T>& params); \
  }
PYOPS_FOR_EACH_ISA(PYOPS_DECLARE)
#undef PYOPS_DECLARE
