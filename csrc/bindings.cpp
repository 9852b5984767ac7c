// Table of contents of the extension. The module is pyops._C, or the SIMT executor's test module.
#include "bindings.h"

#ifndef PYOPS_SIMT
#include "cpu_isa.h"
#endif

#ifndef PYOPS_MODULE_NAME
#define PYOPS_MODULE_NAME _C
#endif

PYBIND11_MODULE(PYOPS_MODULE_NAME, m) {
  m.doc() = "Compiled kernels of pyops.";
  pyops::bind_layer_norm(m);
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
