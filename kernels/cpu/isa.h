// The namespaces that the CPU kernels are compiled into. setup.py holds the compiler flags of each.
#pragma once

#if defined(__x86_64__)
#define PYOPS_FOR_EACH_ISA(M) M(baseline) M(avx2) M(avx512) M(avx512_bf16)
#else
#define PYOPS_FOR_EACH_ISA(M) M(baseline)
#endif
