"""Cases of the recurrent row. T steps, B sequences, H hidden units and as many features, one layer.

FLOPs: forward 4 T B G H^2 (two products, G gates), backward twice that; the gates are not counted. Bytes that must
move: forward reads x and the weights and writes y; backward reads x, y, dy and the weights, and writes dx and the
gradients of the weights. Large batches are bound by FLOPs, a batch of 1 by reading W_hh from the cache in each step.
"""

from __future__ import annotations

import torch

from .case import Case

OP = "recurrent"
CELL, ONE, BATCH, REST = "cell step", "LSTM, B = 1", "LSTM, B 8 to 64", "GRU, RNN, packed, projected"

# What the ratios must reach on a CPU with AVX-512, by group, mode and dtype.
CPU_GOALS = {
    (CELL, "fwd", "fp32"): 3.0,
    (CELL, "fwd", "bf16"): 2.0,
    (CELL, "fwd_bwd", "fp32"): 3.0,
    (CELL, "fwd_bwd", "bf16"): 2.0,
    (ONE, "fwd", "fp32"): 3.5,
    (ONE, "fwd", "bf16"): 3.5,
    (ONE, "fwd_bwd", "fp32"): 1.5,
    (ONE, "fwd_bwd", "bf16"): 1.7,
    (BATCH, "fwd", "fp32"): 1.3,
    (BATCH, "fwd", "bf16"): 1.3,
    (BATCH, "fwd_bwd", "fp32"): 1.5,
    (BATCH, "fwd_bwd", "bf16"): 1.7,
    (REST, "fwd", "fp32"): 3.0,
    (REST, "fwd", "bf16"): 3.0,
    (REST, "fwd_bwd", "fp32"): 3.0,
    (REST, "fwd_bwd", "bf16"): 3.0,
}

# What stands beside (T, B, H): function, other fields of a case, whether it belongs to the quick selection.
SHAPES = [
    ((20, 1, 64), "lstm", {"group": ONE}, True),
    ((100, 1, 128), "lstm", {"group": ONE}, False),
    ((100, 1, 256), "lstm", {"group": ONE}, False),
    ((500, 1, 256), "lstm", {"group": ONE}, False),
    ((20, 1, 512), "lstm", {"group": ONE}, False),
    ((20, 8, 128), "lstm", {"group": BATCH}, False),
    ((100, 8, 256), "lstm", {"group": BATCH}, False),
    ((20, 32, 64), "lstm", {"group": BATCH}, False),
    ((100, 32, 128), "lstm", {"group": BATCH}, True),
    ((500, 32, 128), "lstm", {"group": BATCH}, False),
    ((100, 32, 256), "lstm", {"group": BATCH}, False),
    ((20, 32, 512), "lstm", {"group": BATCH}, False),
    ((20, 32, 1024), "lstm", {"group": BATCH}, False),
    ((20, 64, 256), "lstm", {"group": BATCH}, False),
    ((200, 16, 64), "lstm", {"group": BATCH, "label": "8 features", "features": 8}, False),
    ((20, 1, 64), "gru", {"group": REST}, True),
    ((100, 8, 256), "gru", {"group": REST}, False),
    ((100, 32, 128), "gru", {"group": REST}, False),
    ((20, 32, 512), "gru", {"group": REST}, False),
    ((100, 8, 256), "rnn", {"group": REST}, False),
    ((100, 32, 128), "rnn", {"group": REST}, False),
    ((100, 32, 128), "lstm", {"group": REST, "label": "packed", "packed": True}, True),
    ((100, 32, 128), "gru", {"group": REST, "label": "packed", "packed": True}, False),
    ((100, 32, 256), "lstm", {"group": REST, "label": "proj 64", "proj": 64}, False),
    ((1, 1, 64), "lstm_cell", {"group": CELL}, True),
    ((1, 8, 128), "lstm_cell", {"group": CELL}, False),
    ((1, 64, 256), "lstm_cell", {"group": CELL}, False),
    ((1, 1, 64), "gru_cell", {"group": CELL}, False),
    ((1, 8, 128), "gru_cell", {"group": CELL}, False),
    ((1, 64, 256), "gru_cell", {"group": CELL}, False),
    ((1, 8, 128), "rnn_cell", {"group": CELL}, False),
]
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def recurrent(shape, function: str, dtype: torch.dtype, packed=False, proj=0, features=0, **fields):
    T, B, H = shape
    kind = function.removesuffix("_cell")
    is_cell, G, P = function.endswith("_cell"), GATES[kind], proj or H
    n_in = features or H
    sizes = [B] * T
    if packed:  # lengths from a quarter of T to T
        lengths = torch.linspace(T, T / 4, B).long()
        sizes = [(lengths > t).sum().item() for t in range(T)]
    batch_sizes = torch.tensor(sizes)
    rows = sum(sizes)

    def inputs(generator, device):
        def randn(*size, scale=1.0):
            made = torch.randn(size, generator=generator, device=device, dtype=torch.float32) * scale
            return made.to(dtype).requires_grad_()

        x = randn(B, n_in) if is_cell else randn(rows, n_in) if packed else randn(T, B, n_in)
        named = {"x": x, "w_ih": randn(G * H, n_in, scale=H**-0.5), "w_hh": randn(G * H, P, scale=P**-0.5)}
        named |= {"b_ih": randn(G * H, scale=H**-0.5), "b_hh": randn(G * H, scale=H**-0.5)}
        if proj:
            named["w_hr"] = randn(P, H, scale=H**-0.5)
        state = (B,) if is_cell else (1, B)
        named["h0"] = randn(*state, P)
        if kind == "lstm":
            named["c0"] = randn(*state, H)
        return named

    def split(args):
        """x, the weights (w_hr last), and hx as torch's function takes it."""
        x, *rest = args
        states = 2 if kind == "lstm" else 1
        weights, hx = rest[:-states], rest[-states:]
        return x, weights, tuple(hx) if kind == "lstm" else hx[0]

    def eager(*args):
        x, weights, hx = split(args)
        name = {"rnn": "rnn_tanh"}.get(kind, kind)
        if is_cell:
            return getattr(torch, f"{name}_cell")(x, hx, *weights)
        function = getattr(torch._VF, name)
        if packed:
            return function(x, batch_sizes, hx, weights, True, 1, 0.0, False, False)
        return function(x, hx, weights, True, 1, 0.0, False, False, False)

    def ours(backend):
        from torch.nn.utils.rnn import PackedSequence

        import pyops

        def run(*args):
            x, weights, hx = split(args)
            if is_cell:
                return getattr(pyops, function)(x, hx, *weights, backend=backend)
            weights = [(*weights, None) if len(weights) == 4 else weights]
            output, state = getattr(pyops, kind)(
                PackedSequence(x, batch_sizes) if packed else x, hx, weights, backend=backend
            )
            states = state if kind == "lstm" else (state,)
            return (output.data if packed else output, *states)

        return run

    size = dtype.itemsize
    weights, io = G * H * (n_in + P) * size, rows * (n_in + P) * size
    flops = 2 * rows * G * H * (n_in + P)
    nbytes = {"fwd": weights + io, "bwd": 2 * (weights + io), "fwd_bwd": 3 * (weights + io)}
    counted = {"fwd": flops, "bwd": 2 * flops, "fwd_bwd": 3 * flops}
    fields = {"modes": ("fwd", "fwd_bwd"), "nbytes": nbytes, "flops": counted} | fields
    fields["params"] = {"steps": T, "packed": packed, "proj": proj, "features": n_in}
    outputs = ("h", "c") if function == "lstm_cell" else ("h",) if is_cell else ("y", "h", "c")[: G // 4 + 2]
    return Case(
        OP, function, shape=shape, dtype=dtype, inputs=inputs, eager=eager, ours=ours, outputs=outputs, **fields
    )


def goal(device: str, group: str, mode: str, dtype: str) -> float | None:
    """The ratio that a row of the headline must reach, where one is set."""
    return CPU_GOALS.get((group, mode, dtype)) if device == "cpu" else None


def cases(device: str, dtype: torch.dtype) -> list[Case]:  # noqa: ARG001
    return [recurrent(shape, function, dtype, quick=quick, **f) for shape, function, f, quick in SHAPES]
