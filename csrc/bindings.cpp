// Table of contents of the extension. The module is pyops._C, or the SIMT executor's test module.
#include "bindings.h"

#include "plain.h"

#ifndef PYOPS_SIMT
#include "cpu_isa.h"
#endif

#ifndef PYOPS_MODULE_NAME
#define PYOPS_MODULE_NAME _C
#endif

PYBIND11_MODULE(PYOPS_MODULE_NAME, m) {
  m.doc() = "Compiled kernels of pyops.";
  m.def("set_torch_objects", [](const pybind11::object& torch, const pybind11::tuple& watchers) {
    const pybind11::object tensor = torch.attr("Tensor");
    const auto keep = [](const pybind11::object& object) { return object.inc_ref().ptr(); };
    pyops::torch_objects = {
        .tensor = keep(tensor),
        .parameter = keep(torch.attr("nn").attr("Parameter")),
        .is_neg = keep(tensor.attr("is_neg")),
        .contiguous = keep(tensor.attr("contiguous")),
        .empty_like = keep(torch.attr("empty_like")),
        .empty = keep(torch.attr("empty")),
        .float32 = keep(torch.attr("float32")),
        .float64 = keep(torch.attr("float64")),
        .cpu = keep(torch.attr("device")("cpu")),
        .is_grad_enabled = keep(torch.attr("is_grad_enabled")),
        .get_num_threads = keep(torch.attr("get_num_threads")),
        .watchers = keep(watchers),
        .forward_ad = keep(torch.attr("autograd").attr("forward_ad").attr("__dict__")),
    };
  });
  pyops::bind_attention(m);
  pyops::bind_layer_norm(m);
  pyops::bind_recurrent(m);
#ifndef PYOPS_SIMT
  m.attr("cpu_isa") = pyops::cpu_isa_name(pyops::cpu_isa());
  m.attr("cpu_isa_best") = pyops::cpu_isa_name(pyops::cpu_isa_best());
#ifdef PYOPS_WITH_CUDA
  m.attr("cuda_archs") = PYOPS_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = pybind11::none();
#endif
#endif
}
