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
enum class Mma { kBf16, kF16, kTf32 };

int multiprocessor_count();
size_t max_shared_bytes();

// Runs `kernel(context)` once per thread of the grid; all blocks of a cooperative launch run together. Throws
// std::runtime_error with the report when the launch is not possible or a thread does what a device would not survive.
void launch(const char* name, dim3 grid, dim3 block, size_t smem_bytes, bool cooperative, void (*kernel)(void*),
            void* context);

template <typename F>
void launch(const char* name, dim3 grid, dim3 block, size_t smem_bytes, bool cooperative, F kernel) {
  launch(name, grid, block, smem_bytes, cooperative, [](void* context) { (*static_cast<F*>(context))(); }, &kernel);
}

void sync_block(CallSite site);
void sync_warp(unsigned mask, CallSite site);
unsigned ballot(bool v, unsigned mask, CallSite site);
uint64_t exchange(Shuffle kind, uint64_t bits, int operand, int width, unsigned mask, CallSite site);
void* shared_memory(size_t bytes, size_t alignment, CallSite site);
[[noreturn]] void misaligned(const void* p, size_t bytes, CallSite site);

extern bool conflicts_recorded;
void record_access(const char* what, const void* p, size_t bytes, unsigned lanes, CallSite site);

// Of an access by `lanes` of the warp: alignment, and bank conflicts where they are recorded.
inline void check_access(const char* what, const void* p, size_t bytes, CallSite site, unsigned lanes = 0xffffffffu) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) misaligned(p, bytes, site);
  if (conflicts_recorded) record_access(what, p, bytes, lanes, site);
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

// A lane reads its row when it comes and writes it when it leaves, here, where ThreadSanitizer sees it.
struct alignas(16) MatrixRow {
  uint32_t words[4];
};
bool takes_row(const void* row, int matrices, const char* what, CallSite site);  // of this lane; checks the address
void exchange_loaded(const MatrixRow& row, uint32_t* r, int matrices, bool transpose, CallSite site);
bool exchange_stored(const uint32_t* r, MatrixRow* row, int matrices, bool transpose, CallSite site);

template <int N, bool kTranspose>
void load_matrices(uint32_t (&r)[N], const void* row, CallSite site) {
  MatrixRow mine{};
  if (takes_row(row, N, "ldmatrix", site)) memcpy(&mine, row, sizeof mine);
  exchange_loaded(mine, r, N, kTranspose, site);
}

template <int N, bool kTranspose>
void store_matrices(void* row, const uint32_t (&r)[N], CallSite site) {
  MatrixRow mine;
  const bool mine_is_used = takes_row(row, N, "stmatrix", site);
  if (exchange_stored(r, &mine, N, kTranspose, site) && mine_is_used) memcpy(row, &mine, sizeof mine);
}

void mma(Mma kind, float* d, const uint32_t* a, const uint32_t* b, CallSite site);
void mma_f64(double* d, double a, double b, CallSite site);

void copy_async(void* shared, const void* global, unsigned bytes, bool valid, CallSite site);
void commit_copies(CallSite site);
void wait_for_copies(unsigned latest, CallSite site);

// Words that blocks exchange (words.cpp).
uint64_t load_word(const uint64_t* p, bool acquire, CallSite site);
void store_word(uint64_t* p, uint64_t v, bool release, CallSite site);
bool await_is_off(CallSite site);

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
