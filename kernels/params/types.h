// Storage types that the CPU, CUDA and host sides share. Types only: a function here would be compiled once per
// instruction set and the linker would keep one copy of it.
#pragma once
#include <stdint.h>

namespace pyops {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// acc_t<T>: the type in which sums over T are formed and statistics are stored.
template <typename T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Acc<T>::type;

}  // namespace pyops
