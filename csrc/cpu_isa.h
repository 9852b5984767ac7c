// The instruction sets that the CPU kernels are compiled for, and the one in use.
#pragma once

namespace pyops {

enum class CpuIsa { baseline, avx2, avx512, avx512_bf16 };

// Chosen once, from CPUID and PYOPS_CPU_ISA (any level that this processor has). Throws when the variable names a level
// that does not exist or that this processor lacks.
CpuIsa cpu_isa();
const char* cpu_isa_name(CpuIsa isa);
// For the kernels, which know nothing of the C++ library.
[[noreturn]] void out_of_memory();
// The highest level that this processor and this build have.
CpuIsa cpu_isa_best();

}  // namespace pyops

#if defined(__x86_64__)
// Calls NAME (a function of every pyops::<isa> namespace) of the level in use.
#define PYOPS_CPU_DISPATCH(NAME, ...)                   \
  do {                                                  \
    switch (::pyops::cpu_isa()) {                       \
      case ::pyops::CpuIsa::avx512_bf16:                \
        return ::pyops::avx512_bf16::NAME(__VA_ARGS__); \
      case ::pyops::CpuIsa::avx512:                     \
        return ::pyops::avx512::NAME(__VA_ARGS__);      \
      case ::pyops::CpuIsa::avx2:                       \
        return ::pyops::avx2::NAME(__VA_ARGS__);        \
      case ::pyops::CpuIsa::baseline:                   \
        return ::pyops::baseline::NAME(__VA_ARGS__);    \
    }                                                   \
  } while (false)
#else
#define PYOPS_CPU_DISPATCH(NAME, ...) return ::pyops::baseline::NAME(__VA_ARGS__)
#endif
