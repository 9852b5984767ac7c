// One layer of an LSTM (Hochreiter, Schmidhuber 1997; Gers, Schmidhuber, Cummins 2000), a GRU (Cho et al. 2014) or an
// Elman RNN, forward and backward; formulas, symbols and the layout of every tensor stand in params/recurrent.h.
#include "recurrent.h"

#include "recurrent_bwd.h"
#include "recurrent_fwd.h"
#include "recurrent_gradients.h"

namespace pyops::PYOPS_ISA {

#define PYOPS_FOR_FAMILY(NAME)                         \
  switch (params.cell) {                               \
    case RecurrentCell::rnn_tanh:                      \
    case RecurrentCell::rnn_relu:                      \
      return NAME<T, RecurrentCell::rnn_tanh>(params); \
    case RecurrentCell::gru:                           \
      return NAME<T, RecurrentCell::gru>(params);      \
    case RecurrentCell::lstm:                          \
    case RecurrentCell::coupled:                       \
      return NAME<T, RecurrentCell::lstm>(params);     \
  }

template <typename T>
void recurrent_fwd_cpu(const RecurrentFwdParams<T>& params) {
  PYOPS_FOR_FAMILY(forward)
}

template <typename T>
void recurrent_bwd_cpu(const RecurrentBwdParams<T>& params) {
  PYOPS_FOR_FAMILY(backward)
}

template <typename T>
void recurrent_gradients_cpu(const RecurrentGradients<T>& params) {
  gradients(params);
}

#define PYOPS_INSTANTIATE(T)                                        \
  template void recurrent_fwd_cpu<T>(const RecurrentFwdParams<T>&); \
  template void recurrent_bwd_cpu<T>(const RecurrentBwdParams<T>&); \
  template void recurrent_gradients_cpu<T>(const RecurrentGradients<T>&);
PYOPS_INSTANTIATE(double) PYOPS_INSTANTIATE(float) PYOPS_INSTANTIATE(bf16) PYOPS_INSTANTIATE(f16)

}  // namespace pyops::PYOPS_ISA
