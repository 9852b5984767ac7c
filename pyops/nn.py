"""Drop-in modules: subclasses of torch's own, on the functions of :mod:`pyops`."""

from .layer_norm import LayerNorm, LayerNorm2d, RMSNorm

__all__ = ["LayerNorm", "LayerNorm2d", "RMSNorm"]
