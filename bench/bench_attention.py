"""Cases of the attention row. B sequences, H query and Hk key heads, L queries, S keys, head size D.

FLOPs: forward 4 B H L S D (two products), backward 2.5 times that (five products), half of it under a causal mask; the
softmax is not counted. Bytes that must move: forward reads q, k, v and writes out; backward reads these and dout and
writes dq, dk, dv; an additive bias is read once in each, its gradient written once. All cases but decoding are bound by
FLOPs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .case import Case

OP = "attention"
PLAIN, OPTIONS, OTHERS = "attention", "attention with mask, bias, dropout, GQA", "attention, other shapes"

# What the ratios must reach on a CPU with AVX-512, by group, mode and dtype.
CPU_GOALS = {
    (PLAIN, "fwd", "fp32"): 2.5,
    (PLAIN, "fwd", "bf16"): 4.0,
    (PLAIN, "fwd_bwd", "fp32"): 2.2,
    (PLAIN, "fwd_bwd", "bf16"): 3.5,
    (OPTIONS, "fwd", "fp32"): 3.0,
    (OPTIONS, "fwd", "bf16"): 3.0,
    (OPTIONS, "fwd_bwd", "fp32"): 3.0,
    (OPTIONS, "fwd_bwd", "bf16"): 3.0,
}

DECODE = {"group": OTHERS, "modes": ("fwd",)}
# What stands beside (B, H, L, D): label, other fields of a case, whether it belongs to the quick selection.
CASES = {
    "cpu": [
        ((1, 12, 197, 64), "ViT b1", {}, True),
        ((8, 12, 197, 64), "ViT b8", {}, False),
        ((8, 12, 512, 64), "BERT", {}, False),
        ((1, 8, 1024, 64), "causal", {"causal": True}, True),
        ((1, 4, 4096, 64), "causal", {"causal": True}, False),
        ((1, 8, 1024, 128), "causal", {"causal": True}, False),
        ((1, 2, 4096, 128), "causal", {"causal": True}, False),
        ((1, 1, 4096, 64), "one head", {"group": OTHERS}, False),
        ((8, 12, 512, 64), "BERT padding mask", {"mask": "padding", "group": OPTIONS}, True),
        ((2, 8, 512, 64), "boolean mask L x S", {"mask": "boolean", "group": OPTIONS}, False),
        ((2, 8, 512, 64), "T5 bias with gradient", {"mask": "bias", "scale": 1.0, "group": OPTIONS}, True),
        ((2, 12, 512, 64), "dropout 0.1", {"dropout": 0.1, "group": OPTIONS}, False),
        ((1, 16, 1024, 64), "GQA 16:4 causal", {"heads": 4, "causal": True, "group": OPTIONS}, False),
        ((8, 12, 64, 64), "cross 1024", {"keys": 1024, "group": OTHERS}, False),
        ((1, 32, 1, 64), "decode 4096", {"keys": 4096} | DECODE, True),
        ((1, 32, 1, 128), "decode 4096 GQA 32:8", {"keys": 4096, "heads": 8} | DECODE, False),
    ],
    "cuda": [
        *(((4, 16, n, d), "causal" if causal else "", {"causal": causal}, n == 2048)
          for n in (2048, 4096, 8192, 16384) for d in (64, 128) for causal in (False, True)),
        ((8, 16, 2048, 64), "padding mask", {"mask": "padding", "group": OPTIONS}, True),
        ((2, 16, 2048, 64), "boolean mask L x S", {"mask": "boolean", "group": OPTIONS}, False),
        ((4, 16, 2048, 64), "bias with gradient", {"mask": "bias", "group": OPTIONS}, True),
        ((4, 16, 2048, 128), "bias with gradient", {"mask": "bias", "group": OPTIONS}, False),
        ((4, 16, 2048, 64), "dropout 0.1", {"dropout": 0.1, "group": OPTIONS}, False),
        ((4, 32, 4096, 128), "GQA 32:8 causal", {"heads": 8, "causal": True, "group": OPTIONS}, False),
        ((16, 32, 1, 128), "decode 8192 GQA 32:8", {"keys": 8192, "heads": 8} | DECODE, True),
    ],
}  # fmt: skip


def _mask(kind: str, B: int, H: int, L: int, S: int, randn) -> torch.Tensor | None:
    if kind == "padding":  # sequences of 3/8 to all of the length
        lengths = torch.linspace(3 * S / 8, S, B).long()
        return (torch.arange(S) < lengths[:, None])[:, None, None].to(randn(1).device)
    if kind == "boolean":
        return randn(B, 1, L, S) > 0
    if kind == "bias":
        return randn(1, H, L, S)
    return None


def attention(
    shape, dtype: torch.dtype, causal=False, mask="", scale=None, dropout=0.0, heads=None, keys=None, **fields
):
    B, H, L, D = shape
    Hk, S = heads or H, keys or L
    gqa = Hk != H

    def inputs(generator, device):
        def randn(*size):
            return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

        # As the projections of a Transformer layer leave them: (B, L, H, D) in memory.
        sizes = {"query": (B, L, H, D), "key": (B, S, Hk, D), "value": (B, S, Hk, D)}
        # T5 leaves out the scale, and its weights of the query begin smaller by as much.
        factor = {"query": D**-0.5 if scale == 1.0 else 1.0}
        named = {
            name: (randn(*size) * factor.get(name, 1.0)).to(dtype).transpose(1, 2).requires_grad_()
            for name, size in sizes.items()
        }
        attn_mask = _mask(mask, B, H, L, S, randn)
        if attn_mask is not None:
            named["attn_mask"] = attn_mask if mask != "bias" else attn_mask.to(dtype).requires_grad_()
        return named

    options = {"dropout_p": dropout, "is_causal": causal, "scale": scale, "enable_gqa": gqa}

    def eager(query, key, value, attn_mask=None):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)

    def ours(backend):
        import pyops

        def run(query, key, value, attn_mask=None):
            return pyops.scaled_dot_product_attention(query, key, value, attn_mask, **options, backend=backend)

        return run

    def undropped(got, query, key, value, attn_mask=None):  # noqa: ARG001
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options | {"dropout_p": 0.0})

    size = dtype.itemsize
    ends = (B * H * L * D * 2 + B * Hk * S * D * 2) * size
    bias = H * L * S * size if mask == "bias" else 0
    flops = 4 * B * H * L * S * D // (2 if causal else 1)
    nbytes = {"fwd": ends + bias, "bwd": 2 * ends + 2 * bias, "fwd_bwd": 3 * ends + 3 * bias}
    counted = {"fwd": flops, "bwd": flops * 5 // 2, "fwd_bwd": flops * 7 // 2}
    fields = {"group": PLAIN, "modes": ("fwd", "fwd_bwd"), "nbytes": nbytes, "flops": counted} | fields
    fields["params"] = {"causal": causal, "mask": mask, "scale": scale, "dropout": dropout, "heads": Hk, "keys": S}
    if dropout:
        # Elements of independent weights: dropping a share p of them moves the result by sqrt(p / (1 - p)) of itself.
        fields |= {"reference": undropped, "tolerance": 1.5 * (dropout / (1 - dropout)) ** 0.5}
    return Case(
        OP, "attention", shape=shape, dtype=dtype, inputs=inputs, eager=eager, ours=ours, outputs=("out",), **fields
    )


def goal(device: str, group: str, mode: str, dtype: str) -> float | None:
    """The ratio that a row of the headline must reach, where one is set."""
    return CPU_GOALS.get((group, mode, dtype)) if device == "cpu" else None


def cases(device: str, dtype: torch.dtype) -> list[Case]:
    return [attention(shape, dtype, label=label, quick=quick, **f) for shape, label, f, quick in CASES[device]]
