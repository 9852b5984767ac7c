// What host code needs to know of the CUDA runtime; compiles without the CUDA toolkit.
#pragma once
#include <stddef.h>

namespace pyops {

using stream_t = void*;  // cudaStream_t

// Of the current device (cached per device).
int multiprocessor_count();
size_t max_shared_bytes();  // of a block

// Makes `device` current for the lifetime of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

}  // namespace pyops
