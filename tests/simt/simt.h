// The device as kernels/cuda/common.cuh sees it when a .cu file is compiled by g++ with PYOPS_SIMT. Needs no CUDA
// toolkit. The executor behind it is executor.cpp; nothing of its state is touched by code in this header, so that the
// ThreadSanitizer build, which instruments the kernels only, sees the kernels' own accesses and no others.
//
// There is no __shared__ here: shared memory outside shared_storage() does not compile.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <source_location>
#include <type_traits>

#include "numeric.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace pyops::simt {

using CallSite = std::source_location;

struct Thread {
  uint3 index;
};

extern const Thread* current_thread;  // the one that runs
extern uint3 current_block;
extern dim3 block_size, grid_size;

enum class Shuffle { kIndex, kDown, kXor };

int multiprocessor_count();

// Runs `kernel(context)` once per thread of the grid. Throws std::runtime_error with the report when the launch is not
// possible or a thread does what a device would not survive.
void launch(const char* name, dim3 grid, dim3 block, size_t smem_bytes, void (*kernel)(void*), void* context);

template <typename F>
void launch(const char* name, dim3 grid, dim3 block, size_t smem_bytes, F kernel) {
  launch(name, grid, block, smem_bytes, [](void* context) { (*static_cast<F*>(context))(); }, &kernel);
}

void sync_block(CallSite site);
void sync_warp(unsigned mask, CallSite site);
unsigned ballot(bool v, unsigned mask, CallSite site);
uint64_t exchange(Shuffle kind, uint64_t bits, int operand, int width, unsigned mask, CallSite site);
void* shared_memory(size_t bytes, size_t alignment, CallSite site);
[[noreturn]] void misaligned(const void* p, size_t bytes, CallSite site);

inline void check_aligned(const void* p, size_t bytes, CallSite site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) misaligned(p, bytes, site);
}

template <typename T>
T shuffle(Shuffle kind, T v, int operand, int width, unsigned mask, CallSite site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  bits = exchange(kind, bits, operand, width, mask, site);
  memcpy(&v, &bits, sizeof(T));
  return v;
}

// Relaxed, like the device's: orders nothing else.
template <typename T>
T atomic_add(T* p, T v) {
  return std::atomic_ref<T>(*p).fetch_add(v, std::memory_order_relaxed);
}

}  // namespace pyops::simt

#define threadIdx (::pyops::simt::current_thread->index)
#define blockIdx (::pyops::simt::current_block)
#define blockDim (::pyops::simt::block_size)
#define gridDim (::pyops::simt::grid_size)

// CUDA's own mathematics that the host's headers lack.
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline double rsqrt(double v) { return 1.0 / sqrt(v); }
using std::max;
using std::min;
