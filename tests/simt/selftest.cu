// Small kernels that prove the executor: some correct, some with one seeded fault each. Names ending in _fault are
// wrong on purpose. tests/test_simt.py says what must be seen of each.
#include "../../kernels/cuda/common.cuh"

#include <stdexcept>
#include <string>

#include "api.h"

namespace pyops {
namespace {

struct Params {
  const float* x;
  float* y;
  int64_t n;
  int variant;
};

using BlockSum = BlockReduceStorage<float, 1>;

// y[block] = sum of the block's slice of x, reduced twice so that both halves of the storage are used.
__global__ void block_sum_kernel(const __grid_constant__ Params p) {
  BlockReduce<float, 1> reduce(shared_storage<BlockSum>());
  float total = 0.0f;
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) total += p.x[blockIdx.x * p.n + i];
  const float mean = reduce.sum(total) / float(p.n);
  float centred = 0.0f;
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) centred += p.x[blockIdx.x * p.n + i] - mean;
  const float rest = reduce.sum(centred);
  if (threadIdx.x == 0) p.y[blockIdx.x] = mean * float(p.n) + rest;
}

// Reverses the block's slice through shared memory, three times.
__global__ void reverse_kernel(const __grid_constant__ Params p) {
  float* buffer = shared_array<float>();
  const unsigned i = threadIdx.x, last = blockDim.x - 1;
  float v = p.x[blockIdx.x * blockDim.x + i];
  for (int round = 0; round < 3; ++round) {
    buffer[i] = v;
    sync_block();
    v = buffer[last - i];
    sync_block();
  }
  p.y[blockIdx.x * blockDim.x + i] = v;
}

// Each lane hands its value to the next through shared memory of its warp.
__global__ void warp_rotate_kernel(const __grid_constant__ Params p) {
  float* buffer = shared_array<float>();
  const unsigned i = threadIdx.x, next = i / kWarpSize * kWarpSize + (i + 1) % kWarpSize,
                 first = blockIdx.x * blockDim.x;
  buffer[i] = p.x[first + i];
  sync_warp();
  p.y[first + i] = buffer[next];
}

// y[0] += sum of x by atomics from every block.
__global__ void atomic_sum_kernel(const __grid_constant__ Params p) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) atomic_add(p.y, p.x[i]);
}

// y[1 + k] = the k-th thread of the grid to run; y[0] counts them.
__global__ void order_kernel(const __grid_constant__ Params p) {
  const float ticket = atomic_add(p.y, 1.0f);
  p.y[1 + int(ticket)] = float(blockIdx.x * blockDim.x + threadIdx.x);
}

// atomic_sum_kernel without atomics: threads of different blocks write one address.
__global__ void block_race_fault(const __grid_constant__ Params p) {
  if (threadIdx.x == 0) p.y[0] = p.y[0] + p.x[blockIdx.x];
}

// y = one exchange or vote per variant; the Python reference knows the same table.
__global__ void exchange_kernel(const __grid_constant__ Params p) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, lane = i % kWarpSize;
  const float v = p.x[i];
  float out = 0.0f;
  if (p.variant == 0) out = shfl(v, 5);
  if (p.variant == 1) out = shfl(v, int(lane * 7 % 32));
  if (p.variant == 2) out = shfl(v, 3, 8);
  if (p.variant == 3) out = shfl_down(v, 4);
  if (p.variant == 4) out = shfl_down(v, 3, 16);
  if (p.variant == 5) out = shfl_xor(v, 16);
  if (p.variant == 6) out = shfl_xor(v, 1, 4);
  if (p.variant == 7) out = warp_reduce_sum(v);
  if (p.variant == 8) out = warp_reduce_sum(v, 8);
  if (p.variant == 9) out = float(ballot(v > 0.0f) >> 8 & 0xffff);
  if (p.variant == 10) out = float(warp_any(v > 2.5f)) + 2.0f * float(warp_all(v > -2.5f));
  if (p.variant == 11 && lane < 16) out = shfl_xor(v, 8, 16, 0x0000ffffu);
  if (p.variant == 11 && lane >= 16) out = shfl_xor(v, 4, 16, 0xffff0000u);
  if (p.variant == 12) out = float(shfl_xor(double(v) + 0x1p-40, 2) - 0x1p-40);
  p.y[i] = out;
}

__global__ void convert_kernel(const __grid_constant__ Params p) {
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
    p.y[i] = p.variant == 0 ? to_acc(from_acc<bf16>(p.x[i])) : to_acc(from_acc<f16>(p.x[i]));
  }
}

__global__ void philox_kernel(const __grid_constant__ Params p) {
  const uint32_t f = uint32_t(p.variant);  // 0 or all ones, the reference's own test vectors
  const Philox r = philox4x32_10(f, f, f, f, f, f);
  memcpy(p.y, r.lane, sizeof r.lane);
}

__global__ void vector_copy_kernel(const __grid_constant__ Params p) {
  const int64_t i = threadIdx.x * 4;
  if (i < p.n) store_vec(p.y + i, load_vec<4>(p.x + i));
}

__global__ void read_fault(const __grid_constant__ Params p) {
  p.y[threadIdx.x] = p.x[int64_t(threadIdx.x) + p.variant];
}

__global__ void write_fault(const __grid_constant__ Params p) { p.y[int64_t(threadIdx.x) + p.variant] = 1.0f; }

__global__ void write_input_fault(const __grid_constant__ Params p) { const_cast<float*>(p.x)[threadIdx.x] = 0.0f; }

__global__ void raw_vector_fault(const __grid_constant__ Params p) {
  struct alignas(16) Four {
    float v[4];
  };
  *reinterpret_cast<Four*>(p.y) = *reinterpret_cast<const Four*>(p.x);
}

__global__ void shared_overrun_fault(const __grid_constant__ Params p) {
  shared_array<float>()[threadIdx.x + p.variant] = 1.0f;
  sync_block();
  p.y[threadIdx.x] = shared_array<float>()[threadIdx.x];
}

struct TwoArrays {
  float a[32], b[32];
};

__global__ void array_index_fault(const __grid_constant__ Params p) {
  auto& shared = shared_storage<TwoArrays>();
  shared.a[threadIdx.x + p.variant] = 1.0f;
  sync_block();
  p.y[threadIdx.x] = shared.a[threadIdx.x];
}

// Faulty only when variant > 0: threads from `variant` on skip the barrier.
__global__ void divergent_barrier_fault(const __grid_constant__ Params p) {
  if (p.variant == 0 || int(threadIdx.x) < p.variant) sync_block();
  p.y[threadIdx.x] = 1.0f;
}

__global__ void two_barriers_fault(const __grid_constant__ Params p) {
  if (int(threadIdx.x) < p.variant) {
    sync_block();
  } else {
    sync_block();
  }
  p.y[threadIdx.x] = 1.0f;
}

__global__ void missing_lane_fault(const __grid_constant__ Params p) {
  float v = p.x[threadIdx.x];
  if (int(threadIdx.x) < p.variant) v = shfl_xor(v, 1);
  p.y[threadIdx.x] = v;
}

__global__ void foreign_lane_fault(const __grid_constant__ Params p) {
  p.y[threadIdx.x] = threadIdx.x < 16 ? shfl_xor(p.x[threadIdx.x], 16, 32, 0x0000ffffu) : 0.0f;
}

__global__ void uninitialised_shared_fault(const __grid_constant__ Params p) {
  float* buffer = shared_array<float>();
  if (threadIdx.x > 0) buffer[threadIdx.x] = 0.0f;
  sync_block();
  p.y[threadIdx.x] = buffer[threadIdx.x];
}

__global__ void stack_overflow_fault(const __grid_constant__ Params p) {
  volatile float large[1 << 16];
  for (int i = (1 << 16) - 1; i >= 0; --i) large[i] = p.x[0];
  p.y[threadIdx.x] = large[p.variant];
}

__global__ void division_fault(const __grid_constant__ Params p) {
  p.y[threadIdx.x] = float(int(threadIdx.x) / p.variant);
}

// 1000 switches per thread and nothing else.
__global__ void switch_kernel(const __grid_constant__ Params p) {
  for (int64_t i = 0; i < p.n; ++i) sync_block();
}

struct Case {
  const char* name;
  void (*kernel)(Params);
};

#define CASE(kernel) {#kernel, kernel}
constexpr Case kCases[] = {CASE(block_sum_kernel),
                           CASE(reverse_kernel),
                           CASE(warp_rotate_kernel),
                           CASE(atomic_sum_kernel),
                           CASE(order_kernel),
                           CASE(block_race_fault),
                           CASE(exchange_kernel),
                           CASE(convert_kernel),
                           CASE(philox_kernel),
                           CASE(vector_copy_kernel),
                           CASE(read_fault),
                           CASE(write_fault),
                           CASE(write_input_fault),
                           CASE(raw_vector_fault),
                           CASE(shared_overrun_fault),
                           CASE(array_index_fault),
                           CASE(divergent_barrier_fault),
                           CASE(two_barriers_fault),
                           CASE(missing_lane_fault),
                           CASE(foreign_lane_fault),
                           CASE(uninitialised_shared_fault),
                           CASE(stack_overflow_fault),
                           CASE(division_fault),
                           CASE(switch_kernel)};
#undef CASE

}  // namespace
}  // namespace pyops

// Runs a kernel by name; returns the report, or null when there is none.
SIMT_API const char* selftest_run(const char* name, unsigned blocks, unsigned threads, size_t smem_bytes,
                                  const float* x, float* y, int64_t n, int variant) {
  static std::string report;
  try {
    for (const auto& [kernel_name, kernel] : pyops::kCases) {
      if (strcmp(kernel_name, name) != 0) continue;
      pyops::launch(kernel_name, kernel, blocks, threads, smem_bytes, nullptr, {x, y, n, variant});
      return nullptr;
    }
    report = std::string("no kernel ") + name;
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}
