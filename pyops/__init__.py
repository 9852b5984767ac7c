"""Fused neural-network kernels for PyTorch on CPU, CUDA and Triton, with gradients of every order."""

import torch

from . import nn
from .attention import scaled_dot_product_attention, varlen_attention
from .backend import explain, use_backend
from .layer_norm import add_layer_norm, layer_norm, layer_norm2d, rms_norm
from .recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from .replace import replace

__version__ = "0.1.0"

__all__ = [
    "add_layer_norm",
    "explain",
    "gru",
    "gru_cell",
    "layer_norm",
    "layer_norm2d",
    "lstm",
    "lstm_cell",
    "nn",
    "replace",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
    "use_backend",
    "varlen_attention",
]

# torch.fx keeps a call of pyops.<name> as one node: it patches the namespace that the caller looks into.
for _name in sorted({*__all__} - {"explain", "nn", "replace", "use_backend"}):
    torch.fx.wrap(_name)
