// What the LayerNorm kernels share: how a block's threads divide rows and columns, loads and stores that convert, and
// dropout. layer_norm.cu has the overview.
#pragma once

#include "common.cuh"

namespace pyops {

constexpr int kMaxThreads = 512;  // to a block; leaves 128 registers to a thread
constexpr int kFewThreads = 256;  // leaves 255; also to a block of the backward kernels where a row needs fewer

// How the threads of a block share rows and columns.
struct Tiling {
  int slots;     // rows a block takes at a time
  int lanes;     // threads that share a row
  int chunk;     // columns those hold at a time
  int64_t last;  // first column of the last chunk
};

// ---------------------------------------------------------------------------------------------------------- layouts
// Which columns of which row a thread owns: vectors v = 0 .. kVecs - 1 of kN columns, the first at `first` in each
// chunk. vec_step() is their distance in memory; pointers are moved by it, vector by vector, because the compiler keeps
// the products v * vec_step() in registers for the whole kernel. sum() adds up to two values over the threads of a
// slot; each of them gets the sums, formed in the same order.

constexpr int kMaxSums = 2;

// P == 1: a slot is a power of two of neighbouring threads or whole warps; those of a warp own consecutive columns.
template <typename A, int kN, int kVecs>
class RowLayout {
 public:
  static constexpr bool kFused = true;  // there may be residual and dropout
  static size_t shared_bytes(const Tiling&) { return sizeof(Storage); }

  __device__ __forceinline__ RowLayout(const Tiling& t, int64_t, int64_t, int64_t)
      : slot(threadIdx.x / t.lanes),
        lane(threadIdx.x % t.lanes),
        first((lane / kWarpSize * kWarpSize * kVecs + lane % kWarpSize) * kN),
        lanes_(t.lanes),
        step_(min(t.lanes, kWarpSize) * kN) {}

  __device__ __forceinline__ int column(int v) const { return first + v * step_; }
  __device__ __forceinline__ int64_t offset(int64_t r, int64_t stride, int64_t start) const {
    return r * stride + start + first;
  }
  __device__ __forceinline__ int vec_step() const { return step_; }

  // The two halves of the storage alternate, so that one barrier is enough.
  template <int K>
  __device__ __forceinline__ void sum(A (&v)[K]) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const A other = shfl_xor(v[i], distance);
        if (distance < lanes_) v[i] += other;  // the exchange itself without a branch
      }
    }
    if (lanes_ <= kWarpSize) return;
    const int warp = threadIdx.x / kWarpSize, thread = threadIdx.x % kWarpSize, warps = lanes_ / kWarpSize;
    A(&partial)[kMaxSums][kWarpSize] = shared_storage<Storage>().partial[half_];
    half_ ^= 1;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if (thread == 0) partial[i][warp] = v[i];
    }
    sync_block();
#pragma unroll
    for (int i = 0; i < K; ++i) v[i] = warp_reduce_sum(thread < warps ? partial[i][slot * warps + thread] : A(0));
  }

  const int slot, lane, first;

 private:
  struct Storage {
    A partial[2][kMaxSums][kWarpSize];
  };
  const int lanes_, step_;
  int half_ = 0;
};

// P > 1: neighbouring threads take neighbouring rows (pixels), each some consecutive channels of its own; a slot's
// threads are `slots` apart.
template <typename A, int kN, int kVecs>
class PixelLayout {
 public:
  static_assert(kN == 1);
  static constexpr bool kFused = false;
  static size_t shared_bytes(const Tiling& t) { return sizeof(A) * 2 * kMaxSums * t.slots * t.lanes; }

  __device__ __forceinline__ PixelLayout(const Tiling& t, int64_t R, int64_t C, int64_t P)
      : slot(threadIdx.x % t.slots),
        lane(threadIdx.x / t.slots),
        first(lane * kVecs),
        lanes_(t.lanes),
        slots_(t.slots),
        C_(C),
        P_(P),
        narrow_(R <= UINT32_MAX) {}

  __device__ __forceinline__ int column(int v) const { return first + v; }
  __device__ __forceinline__ int64_t offset(int64_t r, int64_t, int64_t start) const {
    const int64_t image = narrow_ ? int64_t(uint32_t(r) / uint32_t(P_)) : r / P_;
    return r + (image * (C_ - 1) + start + first) * P_;
  }
  __device__ __forceinline__ int64_t vec_step() const { return P_; }

  template <int K>
  __device__ __forceinline__ void sum(A (&v)[K]) {
    A* const partial = shared_array<A>() + half_ * kMaxSums * blockDim.x;  // [K, lanes, slots]
    half_ ^= 1;
#pragma unroll
    for (int i = 0; i < K; ++i) partial[i * blockDim.x + threadIdx.x] = v[i];
    sync_block();
#pragma unroll
    for (int i = 0; i < K; ++i) {
      v[i] = 0;
      for (int j = 0; j < lanes_; ++j) v[i] += partial[i * blockDim.x + j * slots_ + slot];
    }
  }

  const int slot, lane, first;

 private:
  const int lanes_, slots_;
  const int64_t C_, P_;
  const bool narrow_;
  int half_ = 0;
};

// ---------------------------------------------------------------------------------------------------------- helpers

// Elements of T in one access when kN neighbours are wanted.
template <typename T, int kN>
constexpr int kPiece = kN * sizeof(T) > 16 ? 16 / sizeof(T) : kN;

// a / b, to two units in the last place: without the slow path of the exact division, and its registers.
__device__ __forceinline__ float divide(float a, float b) {
#ifdef PYOPS_SIMT
  return a / b;
#else
  return __fdividef(a, b);
#endif
}
__device__ __forceinline__ double divide(double a, double b) { return a / b; }

// Vectors that stay in registers. 16-bit elements in pairs: the compiler gives each one a register of its own
// otherwise.
template <typename T, int kN>
using Packed = std::conditional_t<sizeof(T) == 2 && kN % 2 == 0, Vec<uint32_t, (kN + 1) / 2>, Vec<T, kN>>;

template <typename T, int kN>
constexpr int kWords = (sizeof(Packed<T, kN>) + 3) / 4;  // registers that one takes

template <int kN, typename T>
__device__ __forceinline__ Packed<T, kN> load_packed(const T* from) {
  if constexpr (std::is_same_v<Packed<T, kN>, Vec<T, kN>>) {
    return load_vec<kN>(from);
  } else {
    return load_vec<kN / 2>(reinterpret_cast<const uint32_t*>(from));
  }
}

template <typename T, typename P>
__device__ __forceinline__ void store_packed(T* to, const P& packed) {
  if constexpr (sizeof(packed[0]) == sizeof(T)) {
    store_vec(to, packed);
  } else {
    store_vec(reinterpret_cast<uint32_t*>(to), packed);
  }
}

template <typename T, int kN, typename A>
__device__ __forceinline__ Packed<T, kN> pack(const A (&from)[kN]) {
  Packed<T, kN> packed;
  if constexpr (std::is_same_v<Packed<T, kN>, Vec<T, kN>>) {
#pragma unroll
    for (int i = 0; i < kN; ++i) packed[i] = from_acc<T>(from[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      packed[i] = from_acc<T>(from[2 * i]).bits | uint32_t(from_acc<T>(from[2 * i + 1]).bits) << 16;
    }
  }
  return packed;
}

template <typename T, int kN, typename A>
__device__ __forceinline__ void unpack(const Packed<T, kN>& packed, A (&to)[kN]) {
  if constexpr (std::is_same_v<T, bf16> && kN % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const uint32_t bits = i % 2 == 0 ? packed[i / 2] << 16 : packed[i / 2] & 0xffff0000u;
      memcpy(&to[i], &bits, sizeof(bits));
    }
  } else {
    Vec<T, kN> elements;
    memcpy(&elements, &packed, sizeof(elements));
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = to_acc(elements[i]);
  }
}

// kN elements of a tensor; zeros where there is no such tensor.
template <int kN, typename T, typename A>
__device__ __forceinline__ void load_as(const T* tensor, int64_t offset, A (&to)[kN]) {
  constexpr int kWidth = kPiece<T, kN>;
#pragma unroll
  for (int i = 0; i < kN; i += kWidth) {
    Packed<T, kWidth> piece = {};
    if (tensor != nullptr) piece = load_packed<kWidth>(tensor + offset + i);
    A part[kWidth];
    unpack<T, kWidth>(piece, part);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) to[i + j] = part[j];
  }
}

template <typename T, int kN, typename A>
__device__ __forceinline__ void store_as(T* to, const A (&from)[kN]) {
  constexpr int kWidth = kPiece<T, kN>;
#pragma unroll
  for (int i = 0; i < kN; i += kWidth) {
    A part[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) part[j] = from[i + j];
    store_packed(to + i, pack<T>(part));
  }
}

// weight_offset + weight of kN columns. Without weight the launchers set weight_offset to 1.
template <int kN, typename A>
__device__ __forceinline__ void load_scale(const auto& p, int64_t c, A (&scale)[kN]) {
  load_as(p.weight, c, scale);
#pragma unroll
  for (int i = 0; i < kN; ++i) scale[i] += p.weight_offset;
}

// Which elements of row r dropout keeps, for kVecs vectors of kN columns, the first at c and `step` columns apart: bit
// v * kN + i stands for element i of vector v. A rolled loop: unrolled, Philox's keys fill twenty registers.
template <int kN, int kVecs>
__device__ __forceinline__ uint32_t kept_by_dropout(const auto& p, int64_t r, int64_t c, int step) {
  static_assert(kN * kVecs <= 32);
  constexpr int kGroup = kN < 4 ? kN : 4;  // elements that share a counter
  const uint32_t key0 = uint32_t(p.seed[0]), key1 = uint32_t(p.seed[0] >> 32), stream = uint32_t(p.seed[1]);
  uint32_t kept = 0;
#pragma unroll 1
  for (int at = 0; at < kN * kVecs; at += kGroup) {
    const int64_t column = c + at / kN * step + at % kN;
    const Philox random = philox4x32_10(uint32_t(column / 4), uint32_t(r), uint32_t(r >> 32), stream, key0, key1);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      uint32_t bits = random.lane[i];
      if (kGroup == 1 && column % 4 == 1) bits = random.lane[1];
      if (kGroup < 4 && column % 4 >= 2) bits = random.lane[2 + i % 2];
      if (kGroup == 1 && column % 4 == 3) bits = random.lane[3];
      kept |= uint32_t((bits >> 8) >= p.drop_threshold) << (at + i);
    }
  }
  return kept;
}

// Vectors whose mask is formed at a time.
template <int kN, int kVecs>
constexpr int kMaskedVecs = kN * kVecs < 32 ? kVecs : 32 / kN;

template <int kN, typename A>
__device__ __forceinline__ void apply_dropout(uint32_t kept, A scale, A (&value)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) value[i] = kept >> i & 1 ? value[i] * scale : A(0);
}

}  // namespace pyops
