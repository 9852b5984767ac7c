"""Drop-in modules: subclasses of torch's own, on the functions of :mod:`pyops`."""

from .layer_norm import LayerNorm, LayerNorm2d, RMSNorm
from .transformer import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "LayerNorm",
    "LayerNorm2d",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
