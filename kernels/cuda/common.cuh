// The vocabulary of the CUDA kernels: conversions, vector memory accesses, barriers, warp exchange, words exchanged by
// blocks, shared memory, Philox and the launch. Kernels reach the hardware only through these wrappers (no asm, no raw
// __syncthreads or __shfl_*, no __shared__, no cooperative groups, no cub), because the same sources are also compiled
// by g++ with PYOPS_SIMT, where simt.h provides the device and checks every access, barrier and exchange.
//
// `CallSite` is where a wrapper was called from. It is empty on the device; the host executor uses it in its reports
// and to switch one barrier or exchange off.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "../params/types.h"
#include "runtime.h"

#ifdef PYOPS_SIMT
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace pyops {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

#ifdef PYOPS_SIMT
using CallSite = simt::CallSite;
#else
struct CallSite {
  __device__ static constexpr CallSite current() { return {}; }
};
#endif

// ---------------------------------------------------------------------------------------------------- conversions
// Storage type to accumulation type (exact) and back (to nearest even; NaN stays NaN).

__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(float v) { return v; }
#ifdef PYOPS_SIMT
__device__ __forceinline__ float to_acc(bf16 v) { return simt::bf16_to_float(v.bits); }
__device__ __forceinline__ float to_acc(f16 v) { return simt::f16_to_float(v.bits); }
#else
__device__ __forceinline__ float to_acc(bf16 v) { return __bfloat162float(__ushort_as_bfloat16(v.bits)); }
__device__ __forceinline__ float to_acc(f16 v) { return __half2float(__ushort_as_half(v.bits)); }
#endif

template <typename T>
__device__ __forceinline__ T from_acc(acc_t<T> v) {
#ifdef PYOPS_SIMT
  if constexpr (std::is_same_v<T, bf16>) return T{simt::float_to_bf16(v)};
  if constexpr (std::is_same_v<T, f16>) return T{simt::float_to_f16(v)};
#else
  if constexpr (std::is_same_v<T, bf16>) return T{__bfloat16_as_ushort(__float2bfloat16_rn(v))};
  if constexpr (std::is_same_v<T, f16>) return T{__half_as_ushort(__float2half_rn(v))};
#endif
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) return v;
}

// -------------------------------------------------------------------------------------------------- vector accesses
// N elements in one access of at most 16 bytes. The address must be a multiple of its size.

template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
  __device__ __forceinline__ T& operator[](int i) { return v[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};

#ifndef PYOPS_SIMT
template <size_t bytes>
struct VecBits;
template <>
struct VecBits<2> {
  using type = unsigned short;
};
template <>
struct VecBits<4> {
  using type = unsigned int;
};
template <>
struct VecBits<8> {
  using type = uint2;
};
template <>
struct VecBits<16> {
  using type = uint4;
};
template <typename T, int N>
using vec_bits_t = typename VecBits<sizeof(T) * N>::type;
#endif

template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p, [[maybe_unused]] CallSite site = CallSite::current()) {
  static_assert(sizeof(T) * N <= 16, "one access moves at most 16 bytes");
  Vec<T, N> out;
#ifdef PYOPS_SIMT
  simt::check_access("load_vec", p, sizeof(out), site);
  memcpy(&out, p, sizeof(out));
#else
  const vec_bits_t<T, N> bits = *reinterpret_cast<const vec_bits_t<T, N>*>(p);
  memcpy(&out, &bits, sizeof(out));
#endif
  return out;
}

template <typename T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& v,
                                          [[maybe_unused]] CallSite site = CallSite::current()) {
  static_assert(sizeof(T) * N <= 16, "one access moves at most 16 bytes");
#ifdef PYOPS_SIMT
  simt::check_access("store_vec", p, sizeof(v), site);
  memcpy(p, &v, sizeof(v));
#else
  vec_bits_t<T, N> bits;
  memcpy(&bits, &v, sizeof(v));
  *reinterpret_cast<vec_bits_t<T, N>*>(p) = bits;
#endif
}

// Asks for the cache line at p, which will be read soon.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* p) {
#ifndef PYOPS_SIMT
  asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
#endif
}

// -------------------------------------------------------------------------------------- barriers, exchange, atomics
// Every lane named in `mask` must call with the same mask. Source lanes are relative to segments of `width` lanes.

#ifdef PYOPS_SIMT
__device__ __forceinline__ void sync_block(CallSite site = CallSite::current()) { simt::sync_block(site); }
__device__ __forceinline__ void sync_warp(unsigned mask = kFullMask, CallSite site = CallSite::current()) {
  simt::sync_warp(mask, site);
}
template <typename T>
__device__ __forceinline__ T shfl(T v, int lane, int width = kWarpSize, unsigned mask = kFullMask,
                                  CallSite site = CallSite::current()) {
  return simt::shuffle(simt::Shuffle::kIndex, v, lane, width, mask, site);
}
template <typename T>
__device__ __forceinline__ T shfl_down(T v, int delta, int width = kWarpSize, unsigned mask = kFullMask,
                                       CallSite site = CallSite::current()) {
  return simt::shuffle(simt::Shuffle::kDown, v, delta, width, mask, site);
}
template <typename T>
__device__ __forceinline__ T shfl_xor(T v, int lane_mask, int width = kWarpSize, unsigned mask = kFullMask,
                                      CallSite site = CallSite::current()) {
  return simt::shuffle(simt::Shuffle::kXor, v, lane_mask, width, mask, site);
}
__device__ __forceinline__ unsigned ballot(bool v, unsigned mask = kFullMask, CallSite site = CallSite::current()) {
  return simt::ballot(v, mask, site);
}
template <typename T>
__device__ __forceinline__ T atomic_add(T* p, T v) {
  return simt::atomic_add(p, v);
}
#else
__device__ __forceinline__ void sync_block(CallSite = CallSite::current()) { __syncthreads(); }
__device__ __forceinline__ void sync_warp(unsigned mask = kFullMask, CallSite = CallSite::current()) {
  __syncwarp(mask);
}
template <typename T>
__device__ __forceinline__ T shfl(T v, int lane, int width = kWarpSize, unsigned mask = kFullMask,
                                  CallSite = CallSite::current()) {
  return __shfl_sync(mask, v, lane, width);
}
template <typename T>
__device__ __forceinline__ T shfl_down(T v, int delta, int width = kWarpSize, unsigned mask = kFullMask,
                                       CallSite = CallSite::current()) {
  return __shfl_down_sync(mask, v, delta, width);
}
template <typename T>
__device__ __forceinline__ T shfl_xor(T v, int lane_mask, int width = kWarpSize, unsigned mask = kFullMask,
                                      CallSite = CallSite::current()) {
  return __shfl_xor_sync(mask, v, lane_mask, width);
}
__device__ __forceinline__ unsigned ballot(bool v, unsigned mask = kFullMask, CallSite = CallSite::current()) {
  return __ballot_sync(mask, v);
}
template <typename T>
__device__ __forceinline__ T atomic_add(T* p, T v) {
  return atomicAdd(p, v);
}
#endif

__device__ __forceinline__ bool warp_any(bool v, unsigned mask = kFullMask, CallSite site = CallSite::current()) {
  return ballot(v, mask, site) != 0;
}
__device__ __forceinline__ bool warp_all(bool v, unsigned mask = kFullMask, CallSite site = CallSite::current()) {
  return ballot(v, mask, site) == mask;
}

// --------------------------------------------------------------------------------- words that blocks exchange
// In global memory, by blocks that run together (launch_cooperative). A word arrives as a whole. What else a thread has
// stored may arrive later than a relaxed store, but not later than a release that another thread acquires.

__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* p,
                                                 [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef PYOPS_SIMT
  return simt::load_word(p, false, site);
#else
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
#endif
}

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* p,
                                                 [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef PYOPS_SIMT
  return simt::load_word(p, true, site);
#else
  uint64_t v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
#endif
}

__device__ __forceinline__ void store_relaxed(uint64_t* p, uint64_t v,
                                              [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef PYOPS_SIMT
  simt::store_word(p, v, false, site);
#else
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
#endif
}

__device__ __forceinline__ void store_release(uint64_t* p, uint64_t v,
                                              [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef PYOPS_SIMT
  simt::store_word(p, v, true, site);
#else
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
#endif
}

// A value and the number of the step that it belongs to, in one word: whoever finds the number has the value, without a
// fence.
__device__ __forceinline__ void store_stamped(uint64_t* p, uint32_t value, uint32_t stamp,
                                              CallSite site = CallSite::current()) {
  store_relaxed(p, uint64_t(stamp) << 32 | value, site);
}

// Waits until the first `count` of N words, `stride` apart, have the stamp.
template <int N>
__device__ __forceinline__ void await_stamped(const uint64_t* p, int stride, int count, uint32_t stamp,
                                              uint32_t (&value)[N], CallSite site = CallSite::current()) {
  bool all;
  do {
    all = true;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint64_t word = i < count ? load_relaxed(p + i * stride, site) : uint64_t(stamp) << 32;
      value[i] = uint32_t(word);
      all = all && uint32_t(word >> 32) == stamp;
    }
#ifdef PYOPS_SIMT
    all = all || simt::await_is_off(site);
#endif
  } while (!all);
}

// --------------------------------------------------------------------------------------------------- shared memory
// The block's dynamic shared memory, the only one there is: seen as one struct, or as an array whose length the
// launch decides.

#ifndef PYOPS_SIMT
extern __shared__ __align__(128) unsigned char pyops_shared_memory[];
#endif

template <typename Storage>
__device__ __forceinline__ Storage& shared_storage([[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef PYOPS_SIMT
  return *static_cast<Storage*>(simt::shared_memory(sizeof(Storage), alignof(Storage), site));
#else
  return *reinterpret_cast<Storage*>(pyops_shared_memory);
#endif
}

template <typename T>
__device__ __forceinline__ T* shared_array(size_t byte_offset = 0,
                                           [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef PYOPS_SIMT
  return reinterpret_cast<T*>(static_cast<unsigned char*>(simt::shared_memory(0, alignof(T), site)) + byte_offset);
#else
  return reinterpret_cast<T*>(pyops_shared_memory + byte_offset);
#endif
}

// ------------------------------------------------------------------------------------------------------ reductions

// Sum over segments of `width` lanes (a power of two). Butterfly: fixed order, and every lane gets the same bits.
template <typename T>
__device__ __forceinline__ T warp_reduce_sum(T v, int width = kWarpSize, unsigned mask = kFullMask,
                                             CallSite site = CallSite::current()) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    if (offset < width) v += shfl_xor(v, offset, width, mask, site);
  }
  return v;
}

template <typename T, int N>
struct BlockReduceStorage {
  T partial[2][N][kWarpSize];
};

// Sums of N values over a one-dimensional block of whole warps, in fixed order; every thread gets them. The two halves
// of the storage alternate, so one barrier per reduction is enough: a thread that writes a half again has passed the
// barrier of the reduction between, which every reader of that half reached after reading.
template <typename T, int N>
class BlockReduce {
 public:
  __device__ __forceinline__ explicit BlockReduce(BlockReduceStorage<T, N>& storage) : storage_(storage) {}

  __device__ __forceinline__ void sum(T (&v)[N]) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    T(&partial)[N][kWarpSize] = storage_.partial[half_];
    half_ ^= 1;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = warp_reduce_sum(v[i]);
      if (lane == 0) partial[i][warp] = v[i];
    }
    sync_block();
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = warp_reduce_sum(lane < warps ? partial[i][lane] : T(0));
  }

  __device__ __forceinline__ T sum(T v) {
    static_assert(N == 1);
    T values[1] = {v};
    sum(values);
    return values[0];
  }

 private:
  BlockReduceStorage<T, N>& storage_;
  int half_ = 0;
};

// ---------------------------------------------------------------------------------------------------------- Philox

struct Philox {
  uint32_t lane[4];
};

// Philox-4x32-10 (Salmon, Moraes, Dror and Shaw 2011).
__device__ __forceinline__ Philox philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0,
                                                uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * c0, product1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ key0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ key1;
    c3 = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// ---------------------------------------------------------------------------------------------------------- launch
// Launches `kernel` on `stream`, never synchronises, and throws std::runtime_error when the launch is refused. Kernels
// take their parameters as `const __grid_constant__ Params p`.

#ifndef PYOPS_SIMT
void launch_kernel(const char* name, const void* kernel, dim3 grid, dim3 block, size_t smem_bytes, bool cooperative,
                   stream_t stream, void** params);
#endif

template <typename... Params>
void launch_as(bool cooperative, const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
               [[maybe_unused]] stream_t stream, const std::type_identity_t<Params>&... params) {
#ifdef PYOPS_SIMT
  simt::launch(name, grid, block, smem_bytes, cooperative, [&] { kernel(params...); });
#else
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&params))...};
  launch_kernel(name, reinterpret_cast<const void*>(kernel), grid, block, smem_bytes, cooperative, stream, pointers);
#endif
}

template <typename... Params>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, stream_t stream,
            const std::type_identity_t<Params>&... params) {
  launch_as(false, name, kernel, grid, block, smem_bytes, stream, params...);
}

// All blocks run together; refused where they do not fit.
template <typename... Params>
void launch_cooperative(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
                        stream_t stream, const std::type_identity_t<Params>&... params) {
  launch_as(true, name, kernel, grid, block, smem_bytes, stream, params...);
}

}  // namespace pyops
