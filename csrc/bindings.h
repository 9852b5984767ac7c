// One bind_<op> per operation; setup.py finds csrc/<op>.cpp by its stem.
#pragma once
#include <pybind11/pybind11.h>

namespace pyops {

void bind_attention(pybind11::module_& m);
void bind_layer_norm(pybind11::module_& m);
void bind_recurrent(pybind11::module_& m);

}  // namespace pyops
