"""Cases of the layer_norm row. R rows, C features, s bytes per element, w = 3 C s bytes of parameters and gradients.

Bytes that must move: forward reads x and writes y, 2 R C s. Backward reads dy and x and writes dx, 3 R C s. With the
residual, forward reads two and writes two tensors, 4 R C s; backward reads dy and the sum, and writes dx and, under
dropout, a separate dresidual. Statistics, 4 or 8 bytes per row, count. FLOPs per element: forward 8 (mean 1, centre 1,
variance 2, scale 1, affine 2, cast 1), backward 16; RMSNorm 5 and 11. All cases are bound by bytes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .case import Case, Wrong, as_tuple

OP = "layer_norm"
EPS = 1e-5

# What the ratios must reach on a CPU with AVX-512, by group, mode and dtype.
CPU_GOALS = {
    ("LayerNorm", "fwd", "fp32"): 1.3,
    ("LayerNorm", "fwd_bwd", "fp32"): 1.5,
    ("LayerNorm", "fwd", "bf16"): 1.5,
    ("LayerNorm", "fwd_bwd", "bf16"): 1.5,
    ("dropout + add + LayerNorm", "fwd_bwd", "fp32"): 2.0,
    ("dropout + add + LayerNorm", "fwd_bwd", "bf16"): 2.0,
}
HOST_GOALS = {"host_fwd": 1 / 1.1, "host_fwd_bwd": 1 / 1.35}  # of torch's own operator, any device

# (R, C), label, whether it belongs to the quick selection.
LAYER_NORM = {
    "cpu": [
        ((197, 768), "ViT b1", True),
        ((1576, 768), "ViT b8", True),
        ((4096, 768), "BERT 8x512", False),
        ((4096, 1024), "", True),
        ((2048, 4096), "", False),
        ((8192, 128), "", False),
        ((64, 8192), "", False),
        ((4096, 384), "", False),
    ],
    "cuda": [
        ((16384, 1024), "", True),
        ((16384, 4096), "", True),
        ((8192, 8192), "", False),
        ((4096, 16384), "", False),
        ((131072, 128), "", False),
        ((1024, 65536), "", False),
        ((8192, 768), "BERT 16x512", False),
    ],
}
RMS_NORM = {
    "cpu": [((2048, 4096), True), ((4096, 768), False)],
    "cuda": [((16384, 4096), True), ((8192, 8192), False), ((131072, 128), False)],
}
ADD_LAYER_NORM = {
    "cpu": [((1576, 768), True), ((4096, 768), False), ((4096, 1024), False)],
    "cuda": [((16384, 1024), True), ((16384, 4096), False), ((8192, 8192), False)],
}
LAYER_NORM_2D = {
    "cpu": [((8, 96, 56, 56), False), ((8, 384, 14, 14), True)],
    "cuda": [((64, 96, 56, 56), False), ((256, 384, 14, 14), True)],
}


def _tensors(shape, channels: int, dtype: torch.dtype, residual=False, bias=True, memory_format=None):
    def inputs(generator, device):
        def randn(*size):
            return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

        named = {"x": randn(*shape)}
        if residual:
            named["residual"] = randn(*shape)
        named["weight"] = 1 + 0.25 * randn(channels)
        if bias:
            named["bias"] = 0.25 * randn(channels)
        if memory_format is not None:
            named["x"] = named["x"].to(memory_format=memory_format)
        return {name: t.to(dtype).requires_grad_() for name, t in named.items()}

    return inputs


def _cost(rows: int, channels: int, dtype: torch.dtype, rms=False, residual=False, p=0.0, dsum=False):
    size, elements = dtype.itemsize, rows * channels
    stats = rows * (8 if dtype == torch.float64 else 4) * (1 if rms else 2)
    params = channels * size * (1 if rms else 2)
    fwd = (4 if residual else 2) * elements * size + params
    written = 2 if residual and p > 0 else 1
    bwd = (2 + written + dsum) * elements * size + 2 * params + stats
    dropout = 2 * (p > 0)
    flops = {"fwd": (5 if rms else 8) * elements, "bwd": (11 if rms else 16) * elements}
    flops = {mode: n + (residual + dropout) * elements for mode, n in flops.items()}
    flops["fwd_bwd"] = flops["fwd"] + flops["bwd"]
    return {"fwd": fwd, "bwd": bwd, "fwd_bwd": fwd + stats + bwd}, flops


def layer_norm(shape, dtype: torch.dtype, **fields) -> Case:
    rows, channels = shape
    nbytes, flops = _cost(rows, channels, dtype)

    def ours(backend):
        import pyops

        def run(x, weight, bias):
            return pyops.layer_norm(x, (channels,), weight, bias, EPS, backend=backend)

        return run

    def eager(x, weight, bias):
        return F.layer_norm(x, (channels,), weight, bias, EPS)

    inputs = _tensors(shape, channels, dtype)
    fields = {"group": "LayerNorm", "nbytes": nbytes, "flops": flops, "params": {"eps": EPS}} | fields
    return Case(OP, "layer_norm", shape=shape, dtype=dtype, inputs=inputs, eager=eager, ours=ours, **fields)


def rms_norm(shape, dtype: torch.dtype, **fields) -> Case:
    rows, channels = shape
    nbytes, flops = _cost(rows, channels, dtype, rms=True)

    def ours(backend):
        import pyops

        def run(x, weight):
            return pyops.rms_norm(x, (channels,), weight, EPS, backend=backend)

        return run

    def eager(x, weight):
        return F.rms_norm(x, (channels,), weight, EPS)

    inputs = _tensors(shape, channels, dtype, bias=False)
    fields = {"group": "RMSNorm", "nbytes": nbytes, "flops": flops, "params": {"eps": EPS}} | fields
    return Case(OP, "rms_norm", shape=shape, dtype=dtype, inputs=inputs, eager=eager, ours=ours, **fields)


def add_layer_norm(shape, dtype: torch.dtype, p: float, prenorm=False, **fields) -> Case:
    """Post-norm blocks use y alone, pre-norm blocks the sum as well (`prenorm`)."""
    rows, channels = shape
    nbytes, flops = _cost(rows, channels, dtype, residual=True, p=p, dsum=prenorm)

    def norm(h, weight, bias):
        y = F.layer_norm(h, (channels,), weight, bias, EPS)
        return (y, h) if prenorm else y

    def eager(x, residual, weight, bias):
        return norm((F.dropout(x, p) if p > 0 else x) + residual, weight, bias)

    def ours(backend):
        import pyops

        def run(x, residual, weight, bias):
            y, total = pyops.add_layer_norm(x, residual, weight, bias, p=p, eps=EPS, backend=backend)
            return (y, total) if prenorm else y

        return run

    def reference(got, x, residual, weight, bias):
        """The mask is read from dx, which is zero where x was dropped; where the whole gradient is zero, the reading
        that fits y is taken. The mask must have the right density."""

        def outputs(kept):
            return as_tuple(norm(x * kept / (1 - p) + residual, weight, bias))

        kept = got["dx"] != 0
        unclear = ~kept & (got["dresidual"] == 0)
        if unclear.any():
            error_dropped, error_kept = ((outputs(m)[0] - got["y"]).abs() for m in (kept, kept | unclear))
            kept = kept | (unclear & (error_kept < error_dropped))
        share, slack = kept.double().mean().item(), 6 * math.sqrt(p * (1 - p) / kept.numel())
        if abs(share - (1 - p)) > slack:
            raise Wrong(f"keeps {share:.4f} of x, not {1 - p:.4f}")
        return outputs(kept)

    inputs = _tensors(shape, channels, dtype, residual=True)
    label = f"p={p:g}" + (" prenorm" if prenorm else "")
    fields = {"group": "dropout + add + LayerNorm", "modes": ("fwd_bwd",), "label": label} | fields
    fields = {"nbytes": nbytes, "flops": flops, "params": {"eps": EPS, "p": p, "prenorm": prenorm}} | fields
    fields |= {"outputs": ("y", "sum") if prenorm else ("y",), "reference": reference if p > 0 else None}
    return Case(OP, "add_layer_norm", shape=shape, dtype=dtype, inputs=inputs, eager=eager, ours=ours, **fields)


def layer_norm2d(shape, dtype: torch.dtype, channels_last: bool, **fields) -> Case:
    batch, channels, height, width = shape
    nbytes, flops = _cost(batch * height * width, channels, dtype)

    def ours(backend):
        import pyops

        def run(x, weight, bias):
            return pyops.layer_norm2d(x, weight, bias, EPS, backend=backend)

        return run

    def eager(x, weight, bias):
        return F.layer_norm(x.permute(0, 2, 3, 1), (channels,), weight, bias, EPS).permute(0, 3, 1, 2)

    memory_format = torch.channels_last if channels_last else None
    inputs = _tensors(shape, channels, dtype, memory_format=memory_format)
    label = "channels_last" if channels_last else "NCHW"
    fields = {"group": "LayerNorm2d", "label": label, "nbytes": nbytes, "flops": flops} | fields
    fields |= {"params": {"eps": EPS, "channels_last": channels_last}}
    return Case(OP, "layer_norm2d", shape=shape, dtype=dtype, inputs=inputs, eager=eager, ours=ours, **fields)


def goal(device: str, group: str, mode: str, dtype: str) -> float | None:
    """The ratio that a row of the headline must reach, where one is set."""
    if group == "host cost, layer_norm":
        return HOST_GOALS[mode]
    return CPU_GOALS.get((group, mode, dtype)) if device == "cpu" else None


def cases(device: str, dtype: torch.dtype) -> list[Case]:
    found = [layer_norm(s, dtype, label=label, quick=quick) for s, label, quick in LAYER_NORM[device]]
    found += [rms_norm(s, dtype, quick=quick) for s, quick in RMS_NORM[device]]
    found += [add_layer_norm(s, dtype, p, quick=quick) for s, quick in ADD_LAYER_NORM[device] for p in (0.1, 0.0)]
    found += [add_layer_norm(s, dtype, 0.1, prenorm=True) for s, _ in ADD_LAYER_NORM[device][1:2]]
    found += [
        layer_norm2d(s, dtype, channels_last, quick=quick)
        for s, quick in LAYER_NORM_2D[device]
        for channels_last in (False, True)
    ]
    host = {"nbytes": {}, "flops": {}, "modes": ("host_fwd", "host_fwd_bwd"), "quick": True}
    found.append(layer_norm((8, 64), dtype, **host, group="host cost, layer_norm"))
    host["group"] = "host cost, others"  # no goal: torch has no such operator, or a slow one
    found += [
        rms_norm((8, 64), dtype, **host),
        add_layer_norm((8, 64), dtype, 0.1, **host | {"modes": ("host_fwd_bwd",)}),
        layer_norm2d((1, 64, 2, 4), dtype, False, **host),
    ]
    return found
