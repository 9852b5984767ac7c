// Matrix products on fragments, matrix loads and stores of shared memory, and asynchronous copies: one instruction
// each.
//
// All 32 lanes of a warp call ldmatrix, stmatrix and the mma together. Fragments are given below for lane = 4 g + t
// (g = 0 .. 7, t = 0 .. 3); two 16-bit elements share a register, the lower one in the lower half. These instructions
// order no memory: between a plain access or stmatrix and an ldmatrix of the same row by other lanes stands a barrier.
#pragma once

#include "common.cuh"

namespace pyops {

#ifndef PYOPS_SIMT
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// --------------------------------------------------------------------------------------------- matrices in shared
// memory N matrices of 8 rows of 16 bytes (8 elements of 16 bits). Lane 8 i + j gives the address of row j of matrix i,
// a multiple of 16; of N < 4 matrices the other lanes' addresses are not looked at. r[i] is the lane's part of matrix
// i: elements (g, 2 t) and (g, 2 t + 1), or (2 t, g) and (2 t + 1, g) when kTranspose.

template <int N, bool kTranspose>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[N], const void* row,
                                         [[maybe_unused]] CallSite site = CallSite::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
#ifdef PYOPS_SIMT
  simt::load_matrices<N, kTranspose>(r, row, site);
#else
  const uint32_t address = shared_address(row);
  if constexpr (N == 1 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address));
  } else if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address));
  } else if constexpr (N == 2 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address));
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address));
  } else if constexpr (!kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  }
#endif
}

// The reverse of ldmatrix. Compute capability 9.0 and up.
template <int N, bool kTranspose>
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&r)[N],
                                         [[maybe_unused]] CallSite site = CallSite::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
#ifdef PYOPS_SIMT
  simt::store_matrices<N, kTranspose>(row, r, site);
#else
  const uint32_t address = shared_address(row);
  if constexpr (N == 1 && !kTranspose) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0]) : "memory");
  } else if constexpr (N == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0]) : "memory");
  } else if constexpr (N == 2 && !kTranspose) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1])
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1])
                 : "memory");
  } else if constexpr (!kTranspose) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  }
#endif
}

// ------------------------------------------------------------------------------------------------------------ products
// d += a b, a by rows and b by columns.

// T is bf16 or f16. a [16, 16]: a[0] = (g, 2 t), (g, 2 t + 1); a[1] = row g + 8; a[2] = column + 8; a[3] = both.
// b [16, 8]: b[0] = (2 t, g), (2 t + 1, g); b[1] = row + 8. d [16, 8]: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t),
// (g + 8, 2 t + 1). So ldmatrix x4 of a 16 x 16 tile by rows gives a (matrices top left, bottom left, top right, bottom
// right), and x2 gives b from its columns, or with kTranspose from its rows.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                            [[maybe_unused]] CallSite site = CallSite::current()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#ifdef PYOPS_SIMT
  simt::mma(std::is_same_v<T, bf16> ? simt::Mma::kBf16 : simt::Mma::kF16, d, a, b, site);
#else
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Operands are the bits of floats, of which the lower 13 are not looked at. a [16, 8]: (g, t), (g + 8, t), (g, t + 4),
// (g + 8, t + 4). b [8, 8]: (t, g), (t + 4, g). d as above.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef PYOPS_SIMT
  simt::mma(simt::Mma::kTf32, d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// a [8, 4]: (g, t). b [4, 8]: (t, g). d [8, 8]: (g, 2 t), (g, 2 t + 1).
__device__ __forceinline__ void mma_8x8x4_f64(double (&d)[2], double a, double b,
                                              [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef PYOPS_SIMT
  simt::mma_f64(d, a, b, site);
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
#endif
}

// ------------------------------------------------------------------------------------------------- asynchronous copies
// Global to shared memory, done at any time until a wait covers it. A wait is for the copies of the calling thread
// alone; what other threads copied may be read behind a barrier that stands after their waits.

// Copies kBytes, or writes zeros and reads nothing when not valid. Both addresses are multiples of kBytes. 4 and 8
// bytes go through L1, 16 pass it by.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid,
                                         [[maybe_unused]] CallSite site = CallSite::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef PYOPS_SIMT
  simt::copy_async(shared, global, kBytes, valid, site);
#else
  const uint32_t address = shared_address(shared);
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
#endif
}

// The thread's copies since its last commit become one group, also when there are none.
__device__ __forceinline__ void cp_async_commit([[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef PYOPS_SIMT
  simt::commit_copies(site);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all of the thread's groups but the N latest are complete.
template <int N>
__device__ __forceinline__ void cp_async_wait([[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef PYOPS_SIMT
  simt::wait_for_copies(N, site);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace pyops
