#include "cpu_isa.h"

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

namespace pyops {

namespace {
constexpr CpuIsa kLevels[] = {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512, CpuIsa::avx512_bf16};

// Intel's vdpbf16ps does no more than half of the products per second that its FMA does on float (measured, see
// bench/notes/attention.md), AMD's twice as many.
CpuIsa fastest(CpuIsa best) {
#if defined(__x86_64__)
  if (best == CpuIsa::avx512_bf16 && __builtin_cpu_is("intel")) return CpuIsa::avx512;
#endif
  return best;
}

CpuIsa choose() {
  const CpuIsa best = cpu_isa_best();
  const char* wanted = std::getenv("PYOPS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return fastest(best);
  for (CpuIsa level : kLevels) {
    if (std::string(wanted) != cpu_isa_name(level)) continue;
    if (level <= best) return level;
    throw std::runtime_error("PYOPS_CPU_ISA must not exceed this processor's level " + std::string(cpu_isa_name(best)) +
                             ", got " + wanted);
  }
  throw std::runtime_error("PYOPS_CPU_ISA must be one of baseline, avx2, avx512, avx512_bf16, got " +
                           std::string(wanted));
}
}  // namespace

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::baseline:
      return "baseline";
    case CpuIsa::avx2:
      return "avx2";
    case CpuIsa::avx512:
      return "avx512";
    case CpuIsa::avx512_bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

CpuIsa cpu_isa_best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v4 = __builtin_cpu_supports("x86-64-v4");
  if (v4 && __builtin_cpu_supports("avx512bf16")) return CpuIsa::avx512_bf16;
  if (v4) return CpuIsa::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return CpuIsa::avx2;
#endif
  return CpuIsa::baseline;
}

void out_of_memory() { throw std::bad_alloc(); }

CpuIsa cpu_isa() {
  static const CpuIsa chosen = choose();
  return chosen;
}

}  // namespace pyops
