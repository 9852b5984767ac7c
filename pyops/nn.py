"""Drop-in modules: subclasses of torch's own, on the functions of :mod:`pyops`."""

from .layer_norm import LayerNorm, LayerNorm2d, RMSNorm
from .recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .transformer import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "LayerNorm2d",
    "MultiheadAttention",
    "RMSNorm",
    "RNNCell",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
