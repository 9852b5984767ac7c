// The question of pyops.backend.is_plain for one tensor, and torch's allocator, asked from C++: a small call spends
// more time on such questions in Python than in its kernel.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "tensor_view.h"

namespace pyops {

// Objects of torch that pyops/backend.py hands over on import; never released (they outlive the module).
struct TorchObjects {
  PyObject* tensor = nullptr;      // torch.Tensor
  PyObject* parameter = nullptr;   // torch.nn.Parameter
  PyObject* is_neg = nullptr;      // torch.Tensor.is_neg
  PyObject* contiguous = nullptr;  // torch.Tensor.contiguous
  PyObject* empty_like = nullptr;
  PyObject* empty = nullptr;
  PyObject* float32 = nullptr;
  PyObject* float64 = nullptr;
  PyObject* cpu = nullptr;  // torch.device("cpu")
  PyObject* is_grad_enabled = nullptr;
  PyObject* get_num_threads = nullptr;
  PyObject* watchers = nullptr;  // a tuple of functions: a true answer of any of them means that something is watching
  PyObject* forward_ad = nullptr;  // the module's dict
};
inline TorchObjects torch_objects;

inline PyObject* checked(PyObject* object) {
  if (object == nullptr) throw pybind11::error_already_set();
  return object;
}

inline bool ask(PyObject* question) {
  PyObject* answer = checked(PyObject_CallNoArgs(question));
  const int truth = PyObject_IsTrue(answer);
  Py_DECREF(answer);
  return truth != 0;
}

// pyops.backend.is_quiet, but for its first question: code that a compiler traces does not come here.
inline bool is_quiet() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch_objects.watchers); ++i) {
    if (ask(PyTuple_GET_ITEM(torch_objects.watchers, i))) return false;
  }
  static PyObject* const name = PyUnicode_InternFromString("_current_level");
  PyObject* level = PyDict_GetItem(torch_objects.forward_ad, name);
  return level != nullptr && PyLong_Check(level) && PyLong_AsLong(level) < 0;
}

inline int get_num_threads() {
  PyObject* answer = checked(PyObject_CallNoArgs(torch_objects.get_num_threads));
  const long threads = PyLong_AsLong(answer);
  Py_DECREF(answer);
  return static_cast<int>(threads);
}

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
  if (view.t.data == nullptr && view.numel() > 0) return false;  // a zero tensor
  PyObject* answer = checked(PyObject_CallOneArg(torch_objects.is_neg, src));
  Py_DECREF(answer);  // True and False are immortal in effect
  return answer == Py_False;
}

inline bool requires_grad(pybind11::handle t) {
  if (t.is_none()) return false;
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  PyObject* answer = checked(PyObject_GetAttr(t.ptr(), name));
  Py_DECREF(answer);
  return answer == Py_True;
}

// A view of a tensor that is known to be plain, or of None.
inline TensorView view(pybind11::handle src) { return src.cast<TensorView>(); }

// torch.empty_like(src), of a contiguous tensor.
inline pybind11::object empty_like(pybind11::handle src) {
  return pybind11::reinterpret_steal<pybind11::object>(
      checked(PyObject_CallOneArg(torch_objects.empty_like, src.ptr())));
}

inline pybind11::object contiguous(pybind11::handle src) {
  return pybind11::reinterpret_steal<pybind11::object>(
      checked(PyObject_CallOneArg(torch_objects.contiguous, src.ptr())));
}

// torch.empty, on the CPU.
inline pybind11::object empty(const std::vector<int64_t>& sizes, PyObject* dtype) {
  // torch reads sizes that are given one by one faster than a tuple of them.
  static PyObject* const names = pybind11::make_tuple("dtype", "device").release().ptr();
  std::vector<pybind11::object> held;
  for (const int64_t size : sizes) held.push_back(pybind11::int_(size));
  std::vector<PyObject*> args;
  for (const pybind11::object& size : held) args.push_back(size.ptr());
  args.push_back(dtype);
  args.push_back(torch_objects.cpu);  // whatever the default device is
  return pybind11::reinterpret_steal<pybind11::object>(
      checked(PyObject_Vectorcall(torch_objects.empty, args.data(), sizes.size(), names)));
}

// torch.empty(rows, the sizes of a CPU tensor that are not normalised), in the type that its statistics have.
inline pybind11::object empty_statistics(int rows, const TensorView& like, int dims, bool channels_first) {
  std::vector<int64_t> sizes = {rows};
  const int last = like.t.ndim - (channels_first ? 3 : dims);
  sizes.insert(sizes.end(), like.t.shape, like.t.shape + last);
  if (channels_first) sizes.insert(sizes.end(), like.t.shape + last + 1, like.t.shape + like.t.ndim);
  return empty(sizes, has_dtype<double>(like) ? torch_objects.float64 : torch_objects.float32);
}

}  // namespace pyops
