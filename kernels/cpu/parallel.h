// Threads and scratch memory of the CPU kernels.
#pragma once
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>

#include "simd.h"

namespace pyops {
[[noreturn]] void out_of_memory();  // throws (csrc/cpu_isa.cpp)
}

namespace pyops::PYOPS_ISA {

// A parallel region costs a few microseconds: each thread must have this many elements to work on.
constexpr int64_t kElementsPerThread = 1 << 14;

inline int useful_threads(int64_t elements, int64_t tasks, int num_threads) {
  int64_t n = elements / kElementsPerThread;
  n = n < tasks ? n : tasks;
  n = n < num_threads ? n : num_threads;
  return n < 1 ? 1 : static_cast<int>(n);
}

// Whether a call that moves this many bytes leaves nothing of its output in the cache for the next one. Measured with a
// reader behind the kernel: below, streaming costs the reader more than it saves (bench/notes/layer_norm.md).
inline bool outgrows_cache(int64_t bytes, int threads) { return bytes / threads >= 24 << 20; }

// Runs f(index, count) on each of `threads` threads; a single one is the caller, without entering OpenMP.
template <typename F>
PYOPS_INLINE void in_parallel(int threads, F&& f) {
  if (threads == 1) return f(0, 1);
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
}
// Inside in_parallel: every thread has come here.
inline void wait_for_all(int count) {
  if (count > 1) {
#pragma omp barrier
  }
}

// The contiguous share of thread `index` of `count` in [0, n): the same split for the same count, so that sums formed
// per thread repeat from run to run.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int index, int count) {
  const int64_t base = n / count, rest = n % count;
  const int64_t begin = index * base + (index < rest ? index : rest);
  return {begin, begin + base + (index < rest ? 1 : 0)};
}

// Aligned scratch of n elements, on the stack while small. What grows with the call is allocated outside of
// in_parallel, where the exception can leave.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n) {
    const int64_t bytes = (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    data_ = bytes <= static_cast<int64_t>(sizeof(local_)) ? reinterpret_cast<T*>(local_)
                                                          : static_cast<T*>(aligned_alloc(64, bytes));
    if (data_ == nullptr) out_of_memory();
  }
  ~Scratch() {
    if (reinterpret_cast<char*>(data_) != local_) free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }

 private:
  T* data_;
  alignas(64) char local_[4096];
};

}  // namespace pyops::PYOPS_ISA
