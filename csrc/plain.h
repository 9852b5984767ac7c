// The question of pyops.backend.is_plain for one tensor, and torch's allocator, asked from C++: a small call spends
// more time on such questions in Python than in its kernel.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "tensor_view.h"

namespace pyops {

// Objects of torch that pyops/backend.py hands over on import; never released (they outlive the module).
struct TorchObjects {
  PyObject* tensor = nullptr;         // torch.Tensor
  PyObject* parameter = nullptr;      // torch.nn.Parameter
  PyObject* is_neg = nullptr;         // torch.Tensor.is_neg
  PyObject* is_zerotensor = nullptr;  // torch.Tensor._is_zerotensor
  PyObject* contiguous = nullptr;     // torch.Tensor.contiguous
  PyObject* empty_like = nullptr;
  PyObject* empty = nullptr;
  PyObject* float32 = nullptr;
  PyObject* float64 = nullptr;
  PyObject* cpu = nullptr;  // torch.device("cpu")
};
inline TorchObjects torch_objects;

// Views `src` when it is exactly a CPU Tensor or Parameter: enough for a tensor that was plain when it was saved, which
// may have been replaced by a hook since. None gives an undefined view.
inline bool view_again(PyObject* src, TensorView& view) {
  if (src == Py_None) return true;
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(src));
  if (type != torch_objects.tensor && type != torch_objects.parameter) return false;
  const DLPackExchangeAPI* api = exchange_api(Py_TYPE(src));
  if (api == nullptr) return false;
  if (api->dltensor_from_py_object_no_sync(src, &view.t) != 0) {
    PyErr_Clear();
    return false;
  }
  return view.defined = view.is_cpu();
}

// The same, and neither a negative view nor a zero tensor: CPU kernels may read its memory.
inline bool view_plain(PyObject* src, TensorView& view) {
  if (!view_again(src, view)) return false;
  if (!view) return true;
  for (PyObject* question : {torch_objects.is_neg, torch_objects.is_zerotensor}) {
    PyObject* answer = PyObject_CallOneArg(question, src);
    if (answer == nullptr) throw pybind11::error_already_set();
    Py_DECREF(answer);  // True and False are immortal in effect
    if (answer != Py_False) return false;
  }
  return true;
}

inline bool requires_grad(pybind11::handle t) {
  if (t.is_none()) return false;
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  PyObject* answer = PyObject_GetAttr(t.ptr(), name);
  if (answer == nullptr) throw pybind11::error_already_set();
  Py_DECREF(answer);
  return answer == Py_True;
}

// A view of a tensor that is known to be plain, or of None.
inline TensorView view(pybind11::handle src) { return src.cast<TensorView>(); }

// torch.empty_like(src), of a contiguous tensor.
inline pybind11::object empty_like(pybind11::handle src) {
  PyObject* out = PyObject_CallOneArg(torch_objects.empty_like, src.ptr());
  if (out == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(out);
}

inline pybind11::object contiguous(pybind11::handle src) {
  PyObject* out = PyObject_CallOneArg(torch_objects.contiguous, src.ptr());
  if (out == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(out);
}

// torch.empty(rows, the sizes of a CPU tensor that are not normalised), in the type that its statistics have.
inline pybind11::object empty_statistics(int rows, const TensorView& like, int dims, bool channels_first) {
  // torch reads sizes that are given one by one faster than a tuple of them.
  static PyObject* const names = pybind11::make_tuple("dtype", "device").release().ptr();
  std::vector<pybind11::object> sizes = {pybind11::int_(rows)};
  const int last = like.t.ndim - (channels_first ? 3 : dims);
  for (int i = 0; i < last; ++i) sizes.push_back(pybind11::int_(like.size(i)));
  if (channels_first) {
    for (int i = last + 1; i < like.t.ndim; ++i) sizes.push_back(pybind11::int_(like.size(i)));
  }
  std::vector<PyObject*> args;
  for (const pybind11::object& size : sizes) args.push_back(size.ptr());
  args.push_back(has_dtype<double>(like) ? torch_objects.float64 : torch_objects.float32);
  args.push_back(torch_objects.cpu);  // whatever the default device is
  PyObject* out = PyObject_Vectorcall(torch_objects.empty, args.data(), sizes.size(), names);
  if (out == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(out);
}

}  // namespace pyops
