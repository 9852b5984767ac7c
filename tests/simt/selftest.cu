// Small kernels that prove the executor: some correct, some with one seeded fault each. Names ending in _fault are
// wrong on purpose. tests/test_simt.py says what must be seen of each.
#include "../../kernels/cuda/mma.cuh"

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

// ---- matrix instructions. x and y hold the registers of the lanes as they are.

template <typename To, typename From>
void copy_bits(To& to, const From* from) {
  memcpy(&to, from, sizeof to);
}

// d += a b, p.n times. Each lane has ten words: a, b and d; doubles fill eight of them.
__global__ void mma_kernel(const __grid_constant__ Params p) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  const float* in = p.x + i * 10;
  if (p.variant == 3) {
    double operands[2], d[2];
    copy_bits(operands, in);
    copy_bits(d, in + 4);
    for (int64_t j = 0; j < p.n; ++j) mma_8x8x4_f64(d, operands[0], operands[1]);
    memcpy(p.y + i * 4, d, sizeof d);
    return;
  }
  uint32_t a[4], b[2];
  float d[4];
  copy_bits(a, in);
  copy_bits(b, in + 4);
  copy_bits(d, in + 6);
  for (int64_t j = 0; j < p.n; ++j) {
    if (p.variant == 0) mma_16x8x16<bf16>(d, a, b);
    if (p.variant == 1) mma_16x8x16<f16>(d, a, b);
    if (p.variant == 2) mma_16x8x8_tf32(d, a, b);
  }
  memcpy(p.y + i * 4, d, sizeof d);
}

// One row of shared memory per thread; lanes take them in this order.
__device__ int shuffled_row(int i) { return i * 13 % 64; }

template <int N, bool kTranspose>
void load_and_keep(const Vec<float, 4>* rows, float* y) {
  uint32_t r[N];
  ldmatrix<N, kTranspose>(r, rows + shuffled_row(threadIdx.x));
  memcpy(y, r, sizeof r);
}

template <int N, bool kTranspose>
void store_from(const float* x, Vec<float, 4>* rows) {
  uint32_t r[N];
  copy_bits(r, x);
  stmatrix<N, kTranspose>(rows + shuffled_row(threadIdx.x), r);
}

// Of 64 threads. Each has a row of x, and four registers of y.
__global__ void ldmatrix_kernel(const __grid_constant__ Params p) {
  auto* rows = shared_array<Vec<float, 4>>();
  const int64_t i = (blockIdx.x * 64 + threadIdx.x) * 4;
  store_vec(rows[threadIdx.x].v, load_vec<4>(p.x + i));
  sync_block();
  if (p.variant == 0) load_and_keep<1, false>(rows, p.y + i);
  if (p.variant == 1) load_and_keep<1, true>(rows, p.y + i);
  if (p.variant == 2) load_and_keep<2, false>(rows, p.y + i);
  if (p.variant == 3) load_and_keep<2, true>(rows, p.y + i);
  if (p.variant == 4) load_and_keep<4, false>(rows, p.y + i);
  if (p.variant == 5) load_and_keep<4, true>(rows, p.y + i);
}

// The reverse: four registers of x, a row of y.
__global__ void stmatrix_kernel(const __grid_constant__ Params p) {
  auto* rows = shared_array<Vec<float, 4>>();
  const int64_t i = (blockIdx.x * 64 + threadIdx.x) * 4;
  if (p.variant == 0) store_from<1, false>(p.x + i, rows);
  if (p.variant == 1) store_from<1, true>(p.x + i, rows);
  if (p.variant == 2) store_from<2, false>(p.x + i, rows);
  if (p.variant == 3) store_from<2, true>(p.x + i, rows);
  if (p.variant == 4) store_from<4, false>(p.x + i, rows);
  if (p.variant == 5) store_from<4, true>(p.x + i, rows);
  sync_block();
  store_vec(p.y + i, load_vec<4>(rows[threadIdx.x].v));
}

__global__ void matrix_fault(const __grid_constant__ Params p) {
  char* rows = shared_array<char>();
  uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (p.variant == 0) ldmatrix<4, false>(a, rows + threadIdx.x * 16 + 8);
  if (p.variant == 1) ldmatrix<4, false>(a, rows + threadIdx.x * 16 + 16);
  if (p.variant == 2) stmatrix<2, false>(rows - 16, b);
  if (p.variant == 3 && threadIdx.x > 0) mma_16x8x16<bf16>(d, a, b);
  if (p.variant == 4) {
    if (threadIdx.x < 16) {
      mma_16x8x16<bf16>(d, a, b);
    } else {
      mma_16x8x16<bf16>(d, a, b);
    }
  }
  if (p.variant == 5 && threadIdx.x < 31) ldmatrix<2, false>(b, rows);
  p.y[threadIdx.x] = d[0];
}

// ---- asynchronous copies

template <int kBytes>
void copy_across(const Params& p) {
  constexpr int kFloats = kBytes / 4;
  float* buffer = shared_array<float>();
  const unsigned i = threadIdx.x, other = blockDim.x - 1 - i, first = blockIdx.x * blockDim.x;
  const bool valid = i % 3 != 1;
  cp_async<kBytes>(buffer + i * kFloats, valid ? p.x + (first + i) * kFloats : nullptr, valid);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  for (int j = 0; j < kFloats; ++j) p.y[(first + i) * kFloats + j] = buffer[other * kFloats + j];
}

// Reverses the block's elements of 4, 8 or 16 bytes; every third is zero instead.
__global__ void copy_kernel(const __grid_constant__ Params p) {
  if (p.variant == 0) copy_across<4>(p);
  if (p.variant == 1) copy_across<8>(p);
  if (p.variant == 2) copy_across<16>(p);
}

// y = sums over p.n tiles of four floats per thread, each read by another thread than copied it, through a ring of
// three.
__global__ void pipeline_kernel(const __grid_constant__ Params p) {
  constexpr int kStages = 3;
  float* ring = shared_array<float>();
  const unsigned i = threadIdx.x, other = blockDim.x - 1 - i;
  const auto copy = [&](int64_t tile) {
    const float* from = p.x + ((blockIdx.x * p.n + tile) * blockDim.x + i) * 4;
    cp_async<16>(ring + (tile % kStages * blockDim.x + i) * 4, from, true);
  };
  for (int64_t tile = 0; tile < kStages - 1; ++tile) {
    if (tile < p.n) copy(tile);
    cp_async_commit();
  }
  float sum = 0.0f;
  for (int64_t tile = 0; tile < p.n; ++tile) {
    cp_async_wait<kStages - 2>();
    sync_block();  // and everyone has read the tile whose place the next copy takes
    if (tile + kStages - 1 < p.n) copy(tile + kStages - 1);
    cp_async_commit();
    const Vec<float, 4> v = load_vec<4>(ring + (tile % kStages * blockDim.x + other) * 4);
    for (int j = 0; j < 4; ++j) sum += v[j];
  }
  p.y[blockIdx.x * blockDim.x + i] = sum;
}

// The thread's own copy: y = its source. Faulty when variant > 0: 1 reads before the wait, 2 writes the source, 3 the
// destination.
__global__ void early_fault(const __grid_constant__ Params p) {
  float* own = shared_array<float>() + threadIdx.x;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  p.y[i] = p.x[i];
  *own = 7.0f;
  cp_async<4>(own, p.y + i, true);
  cp_async_commit();
  if (p.variant == 2) p.y[i] = -1.0f;
  if (p.variant == 3) *own = -1.0f;
  const float early = p.variant == 1 ? *own : 0.0f;
  cp_async_wait<0>();
  p.y[i] = p.variant == 1 ? early : *own;
}

__global__ void copy_fault(const __grid_constant__ Params p) {
  float* buffer = shared_array<float>();
  const unsigned i = threadIdx.x;
  if (p.variant == 0) cp_async<16>(buffer + blockDim.x, p.x, true);
  if (p.variant == 1) cp_async<16>(buffer + i, p.x, true);
  if (p.variant == 2) cp_async<8>(buffer, p.x + 1, true);
  if (p.variant == 3) cp_async<4>(buffer + i, p.x + i + 1, true);
  if (p.variant == 4) {
    cp_async<4>(buffer + i, p.x + i, true);
    cp_async_wait<0>();
  }
  if (p.variant == 5) {
    cp_async<4>(buffer + i, p.x + i, true);
    cp_async_commit();
    cp_async_commit();
    cp_async_wait<2>();
  }
  if (p.variant < 4) {
    cp_async_commit();
    cp_async_wait<0>();
  }
  p.y[i] = 1.0f;
}

// ---- bank conflicts. One access of a warp per variant; tests/test_simt.py has the table.
__global__ void conflict_kernel(const __grid_constant__ Params p) {
  float* buffer = shared_array<float>();
  const int i = threadIdx.x;
  uint32_t r[4] = {};
  if (p.variant == 0) ldmatrix<4, false>(r, buffer + i * 32);
  if (p.variant == 1) ldmatrix<4, true>(r, buffer + i * 32 + i % 8 * 4);
  if (p.variant == 2) ldmatrix<4, false>(r, buffer + i * 36);
  if (p.variant == 3) stmatrix<4, false>(buffer + i * 32, r);
  if (p.variant == 4) load_vec<4>(buffer + i * 4);
  if (p.variant == 5) load_vec<4>(buffer + i * 32);
  if (p.variant == 6) load_vec<2>(buffer + i * 8);
  if (p.variant == 7) load_vec<1>(buffer + 5);
  if (p.variant == 8) store_vec(buffer + i * 32, Vec<float, 1>{});
  if (p.variant == 9) load_vec<1>(reinterpret_cast<const uint16_t*>(buffer) + i);
  if (p.variant == 10) cp_async<16>(buffer + i * 4, p.x, true);
  if (p.variant == 11) cp_async<16>(buffer + i * 32, p.x, true);
  if (p.variant == 12 && i < 16) load_vec<1>(buffer + i * 64);
  if (p.variant == 13) load_vec<4>(p.x);
  cp_async_commit();
  cp_async_wait<0>();
  p.y[i] = 1.0f;
}

// Blocks of a cooperative launch hand numbers to each other n times: thread i of each sums what the threads i of all
// blocks have. The words lie in two halves by turns. Variant 1: in one half, so that numbers are lost; variant 2:
// thread 5 of block 1 writes none.
__global__ void words_kernel(const __grid_constant__ Params p) {
  const int i = threadIdx.x, threads = blockDim.x, blocks = gridDim.x;
  uint64_t* const words = reinterpret_cast<uint64_t*>(p.y + blocks * threads);
  uint32_t own = uint32_t(p.x[blockIdx.x * threads + i]);
  for (int round = 0; round < p.n; ++round) {
    uint64_t* const turn = words + (p.variant == 1 ? 0 : round % 2) * blocks * threads;
    if (p.variant != 2 || blockIdx.x != 1 || i != 5) store_stamped(turn + blockIdx.x * threads + i, own, round + 1);
    uint32_t found[4], sum = 0;
    await_stamped(turn + i, threads, blocks, uint32_t(round + 1), found);
    for (int b = 0; b < blocks; ++b) sum += found[b];
    own = (own + sum) % 1009;
  }
  p.y[blockIdx.x * threads + i] = float(own);
}

// Block 0 writes a number and raises a flag, the others wait for the flag and read the number. Variant 0: all words,
// ordered by release and acquire; variant 1: by nothing. Variants 2 and 3: the same with a plain number.
__global__ void flag_kernel(const __grid_constant__ Params p) {
  uint64_t* const words = reinterpret_cast<uint64_t*>(p.y + blockDim.x * gridDim.x);
  const bool plain = p.variant >= 2, ordered = p.variant % 2 == 0;
  const int i = threadIdx.x;
  uint64_t *const number = words + 2 * i, *const flag = number + 1;
  if (blockIdx.x == 0) {
    const uint64_t v = uint64_t(p.x[i]);
    if (plain) {
      *number = v;
    } else {
      store_relaxed(number, v);
    }
    if (ordered) {
      store_release(flag, 1);
    } else {
      store_relaxed(flag, 1);
    }
    p.y[i] = float(v);
    return;
  }
  while ((ordered ? load_acquire(flag) : load_relaxed(flag)) != 1) {
  }
  p.y[blockIdx.x * blockDim.x + i] = float(plain ? *number : load_relaxed(number));
}

struct Case {
  const char* name;
  void (*kernel)(Params);
  bool cooperative = false;
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
                           CASE(switch_kernel),
                           CASE(mma_kernel),
                           CASE(ldmatrix_kernel),
                           CASE(stmatrix_kernel),
                           CASE(matrix_fault),
                           CASE(copy_kernel),
                           CASE(pipeline_kernel),
                           CASE(early_fault),
                           CASE(copy_fault),
                           CASE(conflict_kernel),
                           {"words_kernel", words_kernel, true},
                           {"words_fault", words_kernel},
                           {"flag_kernel", flag_kernel, true}};
#undef CASE

}  // namespace
}  // namespace pyops

// Runs a kernel by name; returns the report, or null when there is none.
SIMT_API const char* selftest_run(const char* name, unsigned blocks, unsigned threads, size_t smem_bytes,
                                  const float* x, float* y, int64_t n, int variant) {
  static std::string report;
  try {
    for (const auto& [kernel_name, kernel, cooperative] : pyops::kCases) {
      if (strcmp(kernel_name, name) != 0) continue;
      pyops::launch_as(cooperative, kernel_name, kernel, blocks, threads, smem_bytes, nullptr, {x, y, n, variant});
      return nullptr;
    }
    report = std::string("no kernel ") + name;
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}
