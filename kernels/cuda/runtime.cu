// Host side of kernels/cuda: current device and checked kernel launches.
#include "runtime.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "common.cuh"

namespace pyops {
#ifdef PYOPS_SIMT

int multiprocessor_count() { return simt::multiprocessor_count(); }
size_t max_shared_bytes() { return simt::max_shared_bytes(); }

DeviceGuard::DeviceGuard(int) : previous_(0) {}
DeviceGuard::~DeviceGuard() = default;

#else

namespace {

constexpr size_t kDefaultSharedBytes = 48 * 1024;  // above this a kernel must opt in
constexpr int kMaxDevices = 64;
constexpr int kUnchanged = -1;

void check(cudaError_t error, const char* what, const char* of = "") {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the sticky copy, so that the next launch does not report it again
  throw std::runtime_error(std::string("cuda: ") + what + of + " failed: " + cudaGetErrorString(error));
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

}  // namespace

namespace {

template <cudaDeviceAttr kAttribute>
int attribute() {
  static std::atomic<int> cached[kMaxDevices];
  const int device = current_device();
  int value = device < kMaxDevices ? cached[device].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    check(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute");
    if (device < kMaxDevices) cached[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

}  // namespace

int multiprocessor_count() { return attribute<cudaDevAttrMultiProcessorCount>(); }
size_t max_shared_bytes() { return attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

DeviceGuard::DeviceGuard(int device) : previous_(current_device()) {
  if (device == previous_) {
    previous_ = kUnchanged;
  } else {
    check(cudaSetDevice(device), "cudaSetDevice");
  }
}

DeviceGuard::~DeviceGuard() {
  if (previous_ != kUnchanged) cudaSetDevice(previous_);
}

void launch_kernel(const char* name, const void* kernel, dim3 grid, dim3 block, size_t smem_bytes, bool cooperative,
                   stream_t stream, void** params) {
  constexpr const char* kWhat = "launch of ";
  if (smem_bytes > kDefaultSharedBytes) {
    const cudaFuncAttribute limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(kernel, limit, static_cast<int>(smem_bytes)), kWhat, name);
  }
  const auto on = static_cast<cudaStream_t>(stream);
  check(cooperative ? cudaLaunchCooperativeKernel(kernel, grid, block, params, smem_bytes, on)
                    : cudaLaunchKernel(kernel, grid, block, params, smem_bytes, on),
        kWhat, name);
}

#endif
}  // namespace pyops
