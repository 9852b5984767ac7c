// Launchers of kernels/cpu/recurrent.cpp, one set per instruction set. Instantiated for double, float, bf16 and f16.
#pragma once
#include "../params/recurrent.h"
#include "isa.h"

#define PYOPS_DECLARE(isa)                                     \
  namespace pyops::isa {                                       \
  template <typename T>                                        \
  void recurrent_fwd_cpu(const RecurrentFwdParams<T>& params); \
  template <typename T>                                        \
  void recurrent_bwd_cpu(const RecurrentBwdParams<T>& params); \
  template <typename T>                                        \
  void recurrent_gradients_cpu(const RecurrentGradients<T>&);  \
  }
PYOPS_FOR_EACH_ISA(PYOPS_DECLARE)
#undef PYOPS_DECLARE
