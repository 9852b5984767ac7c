// A torch.Tensor as the kernels see it, without a torch header or a torch symbol: the type caster asks the DLPack C
// exchange API that torch.Tensor carries (torch >= 2.10). Right for any strided, grad-requiring, bf16 or zero-size
// tensor; silently wrong for negative views, zero tensors, fake and dual tensors, which pyops/backend.py keeps away.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels/params/types.h"
#include "dlpack.h"

namespace pyops {

// A view borrows: the Python argument keeps the tensor alive for the duration of the call. None gives an undefined
// view.
struct TensorView {
  DLTensor t{};
  bool defined = false;

  explicit operator bool() const { return defined; }
  int64_t size(int i) const { return t.shape[i]; }
  int64_t stride(int i) const { return t.strides[i]; }
  bool is_cpu() const { return t.device.device_type == kDLCPU; }
  bool is_cuda() const { return t.device.device_type == kDLCUDA; }

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
    return n;
  }
  bool is_contiguous() const {  // as torch says it: an empty tensor always is
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      if (t.shape[i] != 1 && t.strides[i] != expected) return false;
      expected *= t.shape[i];
    }
    return true;
  }
  template <typename T>
  T* data() const {
    return defined ? reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset) : nullptr;
  }
};

template <typename T>
constexpr DLDataType dl_dtype();
template <>
constexpr DLDataType dl_dtype<double>() {
  return {kDLFloat, 64, 1};
}
template <>
constexpr DLDataType dl_dtype<float>() {
  return {kDLFloat, 32, 1};
}
template <>
constexpr DLDataType dl_dtype<f16>() {
  return {kDLFloat, 16, 1};
}
template <>
constexpr DLDataType dl_dtype<bf16>() {
  return {kDLBfloat, 16, 1};
}
template <>
constexpr DLDataType dl_dtype<int64_t>() {
  return {kDLInt, 64, 1};
}
template <>
constexpr DLDataType dl_dtype<int32_t>() {
  return {kDLInt, 32, 1};
}
template <>
constexpr DLDataType dl_dtype<bool>() {
  return {kDLBool, 8, 1};
}

template <typename T>
bool has_dtype(const TensorView& v) {
  constexpr DLDataType d = dl_dtype<T>();
  return v.t.dtype.code == d.code && v.t.dtype.bits == d.bits && v.t.dtype.lanes == d.lanes;
}

inline bool same_dtype(const TensorView& a, const TensorView& b) {
  return a.t.dtype.code == b.t.dtype.code && a.t.dtype.bits == b.t.dtype.bits;
}

template <typename T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>, Tag<W>): T the dtype of x, W that of the parameters (T, or float beside a 16-bit T).
template <typename F>
void dispatch_dtypes(const char* op, const TensorView& x, const TensorView& weight, F&& f) {
  const bool mixed = weight && has_dtype<float>(weight);
  if (has_dtype<float>(x)) return f(Tag<float>{}, Tag<float>{});
  if (has_dtype<double>(x)) return f(Tag<double>{}, Tag<double>{});
  if (has_dtype<bf16>(x)) return mixed ? f(Tag<bf16>{}, Tag<float>{}) : f(Tag<bf16>{}, Tag<bf16>{});
  if (has_dtype<f16>(x)) return mixed ? f(Tag<f16>{}, Tag<float>{}) : f(Tag<f16>{}, Tag<f16>{});
  throw std::invalid_argument(std::string(op) + ": x must be float64, float32, bfloat16 or float16");
}

// Memory safety only: meaning is checked in Python, so a failure here is a caller that went around it.
inline void require(bool ok, const char* op, const char* rule) {
  if (!ok) throw std::invalid_argument(std::string(op) + ": " + rule);
}

// Dense, of dtype T, on the device of `like`, with `numel` elements; an undefined view passes.
template <typename T>
T* dense(const TensorView& v, const TensorView& like, int64_t numel, const char* op, const char* rule) {
  if (!v) return nullptr;
  require(has_dtype<T>(v) && v.t.device.device_type == like.t.device.device_type &&
              v.t.device.device_id == like.t.device.device_id && v.numel() == numel && v.is_contiguous(),
          op, rule);
  return v.data<T>();
}

inline const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  static const DLPackExchangeAPI* api = nullptr;  // one table per process: torch has one
  if (api != nullptr) return api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  auto* found = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (found == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  if (found->header.version.major != DLPACK_MAJOR_VERSION || found->dltensor_from_py_object_no_sync == nullptr) {
    return nullptr;
  }
  return api = found;
}

// The stream that torch currently uses on the device of v.
inline void* current_stream(const TensorView& v) {
  void* stream = nullptr;
  const DLPackExchangeAPI* api = exchange_api(nullptr);
  if (api->current_work_stream(v.t.device.device_type, v.t.device.device_id, &stream) != 0) {
    throw pybind11::error_already_set();
  }
  return stream;
}

}  // namespace pyops

namespace pybind11::detail {

template <>
struct type_caster<pyops::TensorView> {
  PYBIND11_TYPE_CASTER(pyops::TensorView, const_name("torch.Tensor | None"));

  bool load(handle src, bool) {
    if (src.is_none()) return true;
    const DLPackExchangeAPI* api = pyops::exchange_api(Py_TYPE(src.ptr()));
    if (api == nullptr) return false;
    if (api->dltensor_from_py_object_no_sync(src.ptr(), &value.t) != 0) {
      PyErr_Clear();
      return false;
    }
    value.defined = true;
    return true;
  }
};

}  // namespace pybind11::detail
