"""scaled_dot_product_attention and varlen_attention: the numbers, on every backend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    SEED,
    Case,
    call,
    check,
    dropout_mask,
    dtype_of,
    ends,
    exact,
    inputs,
    judge,
    leaves_of,
    on,
    ours,
    pairwise,
    torch_own,
    valid,
)
from conftest import TARGETS, Target
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import pyops
from pyops.philox import draw_seed, keep_mask, philox

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16, F64)

# Lengths and head sizes that no tile divides, one query, one key, grouped queries, a wider and a narrower value.
SIZES = [
    {"shape": (2, 2, 17, 16), "S": 23},
    {"shape": (1, 4, 33, 24), "S": 16, "Hk": 2, "Ev": 8},
    {"shape": (2, 3, 1, 64), "S": 40, "Hk": 1},
    {"shape": (1, 2, 64, 40), "S": 64, "Ev": 64},
    {"shape": (2, 2, 7, 8), "S": 1},
    {"shape": (1, 2, 20, 5), "S": 19, "Ev": 3},
]
MASKS = [
    {"mask": ""},
    {"mask": "bool", "mask_dims": "bs"},
    {"mask": "bool", "mask_dims": "ls"},
    {"mask": "bias", "mask_dims": "bhls"},
    {"mask": "bias", "mask_dims": "hls"},
    {"mask": "float", "mask_dims": "bs"},
]
OPTIONS: dict[str, Any] = {
    "is_causal": (False, True), "causal": ("top-left", "bottom-right"), "window": (None, (4, 2), (None, 3), (5, None)),
    "softcap": (0.0, 3.0), "alibi": ("", "h", "bh"), "sinks": (False, True), "p": (0.0, 0.2), "lse": (False, True),
}  # fmt: skip


def is_interpreted(backend: Target) -> bool:
    """Triton's interpreter, where a call takes 10 to 100 ms."""
    return backend.name == "triton" and backend.device == "cpu"


def judge_all(name: str, cases: Iterable[Case], backend: Target, *, mean: bool = False, every: int = 1) -> None:
    """``every``: which part of the cases the interpreter takes; the mean is left to the others."""
    cases = on(backend, cases)
    if is_interpreted(backend) and every > 1:
        cases, mean = cases[::every], False
    with Oracle(f"{name} on {backend}", mean=mean) as oracle:
        for case in cases:
            judge(oracle, case, backend)


# ---- the numbers ----


def test_forward(backend: Target) -> None:
    """Without gradients: the way that inference takes."""
    cases = pairwise(1, size=SIZES, dtype=DTYPES, mask=MASKS, **{n: OPTIONS[n] for n in ("is_causal", "sinks", "p")})
    with Oracle(f"forward on {backend}") as oracle, torch.no_grad():
        for case in on(backend, cases)[:: 3 if is_interpreted(backend) else 1]:
            case = replace(case, lse=True)
            t = inputs(case, backend.device)
            with torch.enable_grad():
                theirs, wide = torch_own(case, t), exact(case, t)
            results = call(case, t, backend.name)
            oracle.check_all(case, results, *({n: r[n] for n in results} for r in (theirs, wide)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_few_queries(threads: int) -> None:
    """Decoding on the CPU: without gradients, up to 4 rows read keys in place, and threads share those of one head."""
    sizes = [
        {"shape": (2, 8, 1, 64), "S": 1100, "Hk": 2}, {"shape": (1, 2, 4, 136), "S": 1025, "Ev": 72},
        {"shape": (1, 1, 2, 65), "S": 4100, "Ev": 33}, {"shape": (1, 4, 3, 64), "S": 1500},
        {"shape": (1, 8, 1, 64), "Hk": 4, "lengths": ((1, 0), (2, 1030), (1, 1200), (0, 5))},
    ]  # fmt: skip
    masks = [*MASKS[:3], {"mask": "bias", "mask_dims": "hl"}, {"mask": "float", "mask_dims": "bs"}]
    cases = pairwise(2, size=sizes, dtype=DTYPES, mask=masks, **OPTIONS)
    torch.set_num_threads(threads)
    with Oracle("few queries") as oracle:
        for case in (replace(case, lse=True) for case in cases):
            t = inputs(case, "cpu")
            theirs, wide = torch_own(case, t), exact(case, t)
            with torch.no_grad():
                results = call(case, t, "cpu")
            oracle.check_all(case, results, *({n: r[n] for n in results} for r in (theirs, wide)))


def test_combinations(backend: Target) -> None:
    """Every value of every option beside every value of every other one, with every gradient."""
    cases = pairwise(size=SIZES, dtype=DTYPES, mask=MASKS, layout=("dense", "heads_last", "slices"), **OPTIONS)
    judge_all("combinations", cases, backend, mean=True, every=2)


def test_as_precise_as_torch(backend: Target) -> None:
    """What torch's operator can express, judged by that operator alone."""
    sizes = [{"shape": (2, 2, 40, 32), "S": 40}, {"shape": (1, 4, 33, 64), "S": 70, "Hk": 2}, {"shape": (1, 1, 65, 16)}]
    cases = [
        Case(**size, **mask, dtype=dtype, is_causal=causal)
        for size, mask, dtype, causal in itertools.product(sizes, MASKS[:3], (F32, BF16, F16), (False, True))
    ]
    judge_all("torch's own", cases, backend, mean=True, every=7)


@pytest.mark.parametrize("mask", ["bool", "bias", "float"])
def test_masks(backend: Target, mask: str) -> None:
    """Broadcast in any dimensions, along the keys too; the gradient has the shape of the mask."""
    dims = ("", "s", "l", "ls", "bs", "hl", "bls", "hls", "bhl", "bhls")
    dtypes = (F16, BF16) if mask == "float" else (F32, F16)
    cases = [
        Case(shape=(2, 3, 9, 8), S=13, mask=mask, mask_dims=d, dtype=dtype, lse=n % 3 == 0)
        for n, (d, dtype) in enumerate(itertools.product(dims, dtypes))
    ]
    judge_all(f"{mask} masks", cases, backend, every=3)


def test_heads(backend: Target) -> None:
    """Grouped queries, down to one key head for all."""
    cases = [
        Case(shape=(2, H, 9, 16), S=12, Hk=Hk, dtype=dtype, is_causal=causal)
        for (H, Hk) in ((4, 2), (6, 2), (5, 1), (3, 3))
        for dtype in (F32, F16)
        for causal in (False, True)
    ]
    judge_all("heads", cases, backend, every=5)


def test_few_queries_and_many_keys(backend: Target) -> None:
    """The keys of one head in several parts, which share a sink, where a backend cuts them."""
    case = Case(
        shape=(1, 4, 2, 16), S=300, Hk=2, mask="bias", mask_dims="ls", sinks=True, lse=True, dtype=dtype_of(backend)
    )
    judge_all("few queries", [case, replace(case, mask="", is_causal=True, causal="bottom-right")], backend)


WINDOWS = [None, (0, 0), (3, 0), (0, 4), (None, 2), (6, None), (-1, 1), (100, 100), (2**63 - 1, 2**63 - 1)]


def test_windows(backend: Target) -> None:
    """Both corners, more queries than keys and more keys than queries; some queries see nothing."""
    cases = [
        valid(Case(shape=(1, 2, L, 16), S=S, window=w, is_causal=c, causal=corner, dtype=dtype_of(backend)))
        for (L, S) in ((20, 20), (9, 21), (21, 9))
        for w in WINDOWS
        for c in (False, True)
        for corner in ("top-left", "bottom-right")
    ]
    judge_all("windows", dict.fromkeys(cases), backend, every=7)


def test_scales(backend: Target) -> None:
    cases = [Case(scale=scale, dtype=dtype) for scale in (1.0, 0.0, -0.5, 2, 1e-20) for dtype in (F32, F16)]
    judge_all("scales", cases, backend, every=3)


def test_edge_lengths(backend: Target) -> None:
    """One below, at and above what the kernels take at a time."""
    edges = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 192)
    pairs = [*zip(edges, edges[::-1]), (1, 1), (64, 64), (128, 128), (129, 129), (64, 65), (65, 64), (128, 192)]
    cases = [Case(shape=(1, 1, L, 16), S=S, dtype=d, is_causal=L % 2 > 0) for L, S in pairs for d in (F32, F16, BF16)]
    judge_all("lengths", cases, backend, every=5)


def test_edge_head_sizes(backend: Target) -> None:
    """Around vectors and powers of two, and values of another size."""
    sizes = [(n, n) for n in (1, 2, 3, 7, 8, 9, 15, 16, 17, 21, 31, 33, 40, 63, 65, 72, 96, 128, 160, 256)]
    sizes += [(8, 64), (64, 8), (1, 5), (5, 1), (192, 128), (128, 256)]
    cases = [
        Case(shape=(1, 1, 6, E), S=9, Ev=Ev, dtype=d, is_causal=n % 2 > 0)
        for n, (E, Ev) in enumerate(sizes)
        for d in (F32, BF16, F16)
    ]
    judge_all("head sizes", cases, backend, every=5)


@pytest.mark.parametrize("head_size", [257, 320, 512])
def test_large_head_sizes(backend: Target, head_size: int) -> None:
    case = Case(shape=(1, 2, 5, head_size), S=7)
    if not case.served_by(backend.name):
        pytest.skip("the CUDA kernels leave them to Triton")
    judge_all("large heads", [case, replace(case, Ev=8), replace(case, dtype=F64)], backend, every=3)


@pytest.mark.parametrize("layout", ["heads_last", "slices", "step", "offset", "expanded", "features_first"])
def test_strided_inputs(backend: Target, layout: str) -> None:
    """Every tensor of the call with these strides or this misalignment, incoming gradients included."""
    cases = [
        Case(shape=(2, 4, 9, E), S=11, Hk=Hk, dtype=dtype, layout=layout, is_causal=Hk is None)
        for dtype, E, Hk in ((F32, 16, None), (F16, 16, 2), (F32, 5, 2), (BF16, 24, None))
    ]
    judge_all(f"layout {layout}", cases, backend, every=3)


@pytest.mark.parametrize("layout", ["transposed", "step", "expanded", "keys first"])
def test_strided_masks(backend: Target, layout: str) -> None:
    case = Case(shape=(2, 2, 9, 8), S=12, mask="bias", mask_dims="bhls", dtype=dtype_of(backend))
    with Oracle(f"mask {layout} on {backend}") as oracle:
        for kind in ("bool", "bias"):
            case = replace(case, mask=kind)
            t = inputs(case, backend.device)
            mask = t["mask"].detach()
            if layout == "transposed":
                mask = mask.transpose(0, 3).contiguous().transpose(0, 3)
            elif layout == "step":
                mask = mask.new_zeros(2, 2, 9, 24)[..., ::2].copy_(mask)
            elif layout == "expanded":
                mask = mask[:1, :, :, :1].clone().expand(mask.shape)
            else:
                mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
            t["mask"] = mask.requires_grad_(kind == "bias")
            check(oracle, case, t, ours(case, t, backend.name))


EMPTY = [(0, 2, 3, 8, 4), (2, 0, 3, 8, 4), (2, 2, 0, 8, 4), (2, 2, 3, 8, 0), (0, 0, 0, 8, 0)]


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_empty(backend: Target, sizes: tuple[int, ...], sinks: bool) -> None:
    """Empty results; without keys, results of 0, an lse of -inf or the sink, and gradients of zero."""
    *shape, S = sizes
    for mask in ({"mask": ""}, {"mask": "bias", "mask_dims": "bhls"}):
        case = Case(shape=tuple(shape), S=S, lse=True, dtype=dtype_of(backend), sinks=sinks)
        t = inputs(case, backend.device)
        if mask["mask"]:
            B, H, L, _ = shape
            t["mask"] = torch.zeros(B, H, L, S, dtype=case.dtype, device=backend.device, requires_grad=True)
        results = ours(case, t, backend.name)
        assert results["out"].shape == t["dout"].shape
        assert not results["out"].any()
        expected = t["sinks"].detach().float()[:, None] if sinks else torch.tensor(-math.inf, device=backend.device)
        torch.testing.assert_close(results["lse"], expected.expand_as(results["lse"]))
        for name, leaf in leaves_of(t).items():
            assert results[f"d{name}"].shape == leaf.shape
            if name == "sinks" and S == 0:
                torch.testing.assert_close(results["dsinks"].float(), t["dlse"].sum((0, 2)), rtol=1e-2, atol=1e-3)
            else:
                assert not results[f"d{name}"].any(), name


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_ranks(backend: Target, rank: int) -> None:
    """Two, three and five dimensions are four with other names."""
    lead = {2: (), 3: (3,), 5: (2, 1, 2)}[rank]
    dtype = dtype_of(backend)
    q, k, v, dout = (torch.randn(*lead, n, 8, device=backend.device).to(dtype) for n in (5, 7, 7, 5))
    bias = torch.randn(*lead, 5, 7, device=backend.device).to(dtype)
    four = (math.prod(lead[:-1]), lead[-1]) if lead else (1, 1)

    def results(shape: tuple[int, ...]) -> list[Tensor]:
        given = [t.reshape(*shape, *t.shape[-2:]).detach().requires_grad_() for t in (q, k, v, bias)]
        out, lse = pyops.scaled_dot_product_attention(*given, return_lse=True, backend=backend.name)
        assert out.shape == (*shape, 5, 8)
        assert lse.shape == (*shape, 5)
        gradients = torch.autograd.grad([out, lse], given, [dout.reshape(out.shape), torch.ones_like(lse)])
        return [out, lse, *gradients]

    for mine, expected in zip(results(lead), results(four)):
        assert torch.equal(mine.flatten(), expected.flatten())


BROADCAST = [
    ((2, 3, 5, 8), (3, 7, 8), (3, 7, 8), None),
    ((2, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 8), (7,)),
    ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), (5, 1)),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 4), ()),
    ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 1, 1, 7)),
    ((5, 8), (2, 3, 7, 8), (7, 8), (3, 5, 7)),
    ((1, 5, 8), (3, 7, 8), (3, 7, 8), (3, 5, 7)),
    ((2, 1, 3, 5, 8), (4, 3, 7, 8), (2, 4, 3, 7, 8), (2, 1, 1, 5, 7)),
    ((2, 1, 3, 5, 8), (4, 1, 7, 8), (1, 1, 1, 7, 8), (4, 1, 1, 7)),
]


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_broadcasting(backend: Target, shapes: tuple) -> None:
    """Batch dimensions, single heads and masks broadcast; gradients have the shapes of what was given."""
    dtype = dtype_of(backend)
    if not Case(shape=(1, 1, 1, 8), Ev=shapes[2][-1], dtype=dtype).served_by(backend.name):
        pytest.skip("the CUDA kernels leave the head size to Triton")
    *tensors, mask = (None if s is None else torch.randn(s, device=backend.device).to(dtype) for s in shapes)
    given = [t.requires_grad_() for t in (*tensors, mask) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in given]

    def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        s = q @ k.transpose(-1, -2) / math.sqrt(8)
        return (s if mask is None else s + mask).softmax(-1) @ v

    mine, theirs, exact_out = (
        pyops.scaled_dot_product_attention(*given, backend=backend.name), formula(*given), formula(*wide)
    )  # fmt: skip
    dout = torch.randn(mine.shape, device=backend.device).to(dtype)
    with Oracle(f"broadcasting on {backend}") as oracle:
        oracle.check("out", mine, theirs, exact_out)
        for i, gradients in enumerate(zip(
            torch.autograd.grad(mine, given, dout), torch.autograd.grad(theirs, given, dout),
            torch.autograd.grad(exact_out, wide, dout.double()),
        )):  # fmt: skip
            oracle.check(f"gradient {i}", *gradients)


def test_heads_of_value(backend: Target) -> None:
    """With enable_gqa, key and value may have different numbers of heads, as in torch."""
    dtype = dtype_of(backend)
    q, k, v = (torch.randn(2, H, 5, 8, device=backend.device).to(dtype).requires_grad_() for H in (6, 3, 2))
    out = pyops.scaled_dot_product_attention(q, k, v, enable_gqa=True, backend=backend.name)
    expected = pyops.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(3, 1), backend=backend.name
    )
    assert torch.equal(out, expected)
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v))):
        assert torch.equal(a, b)


# ---- packed sequences ----

LENGTHS = [
    ((5, 7), (3, 3), (9, 1)),
    ((1, 20), (17, 33), (0, 4), (4, 0), (0, 0), (2, 2)),
    ((30, 30),),
    ((0, 3), (4, 4)),
]


def test_packed(backend: Target) -> None:
    """Sequences of any lengths, none included, with every option."""
    lengths = [{"lengths": n, "shape": (1, 4, 1, 16), "Hk": hk} for n, hk in zip(LENGTHS, (2, None, 4, 1))]
    masks = [*MASKS[:5], {"mask": "float", "mask_dims": "bhl"}, {"mask": "bias", "mask_dims": "l"}]
    cases = pairwise(3, lengths=lengths, dtype=DTYPES, mask=masks, **OPTIONS)
    judge_all("packed", cases, backend, mean=True, every=5)


def test_packed_layouts(backend: Target) -> None:
    cases = [
        Case(lengths=((5, 7), (3, 3), (9, 4)), shape=(1, 2, 1, 8), dtype=d, layout=layout)
        for layout in ("heads_last", "step", "offset", "features_first")
        for d in (F32, F16)
    ]
    judge_all("packed layouts", cases, backend, every=3)


def test_packed_is_the_loop(backend: Target) -> None:
    """A packed call gives the bits of one call for each sequence."""
    case = Case(lengths=LENGTHS[0], shape=(1, 2, 1, 16), is_causal=True, causal="bottom-right", dtype=dtype_of(backend))
    t = inputs(case, backend.device)
    packed = ours(case, t, backend.name)
    q0 = k0 = 0
    for queries, keys in case.lengths:
        parts = {"q": (q0, queries), "k": (k0, keys), "v": (k0, keys), "dout": (q0, queries)}
        one = {n: t[n].detach()[start : start + count].transpose(0, 1)[None] for n, (start, count) in parts.items()}
        one = {n: v.requires_grad_(n != "dout") for n, v in one.items()}
        alone = ours(replace(case, lengths=()), one, backend.name)
        for name, start, count in (("out", q0, queries), ("dq", q0, queries), ("dk", k0, keys), ("dv", k0, keys)):
            torch.testing.assert_close(packed[name][start : start + count], alone[name][0].transpose(0, 1))
        q0, k0 = q0 + queries, k0 + keys


def test_packed_without_tokens(backend: Target) -> None:
    for lengths in (((0, 0),), ((3, 0), (2, 0)), ((0, 4),)):
        case = Case(lengths=lengths, shape=(1, 2, 1, 8), lse=True, dtype=dtype_of(backend))
        t = inputs(case, backend.device)
        results = ours(case, t, backend.name)
        assert not any(r.any() for n, r in results.items() if n != "lse")
        assert (results["lse"] == -math.inf).all()
    empty = torch.zeros(1, dtype=torch.int32, device=backend.device)
    x = torch.empty(0, 2, 8, device=backend.device, dtype=dtype_of(backend))
    assert pyops.varlen_attention(x, x, x, empty, empty, 0, 0, backend=backend.name).shape == (0, 2, 8)


def test_packed_with_room(backend: Target) -> None:
    """max_seqlen may exceed the longest sequence; it decides the shape of a mask, and nothing else."""
    case = Case(lengths=LENGTHS[0], shape=(1, 2, 1, 8), dtype=dtype_of(backend))
    t = inputs(case, backend.device)
    cu_q, cu_k, max_q, max_k = ends(case, backend.device)
    for extra in (1, 100, 2**40):
        out = pyops.varlen_attention(
            t["q"], t["k"], t["v"], cu_q, cu_k, max_q + extra, max_k + extra, backend=backend.name
        )
        torch.testing.assert_close(out, call(case, t, backend.name)["out"])


# ---- what other kernels got wrong ----


def test_low_scores(backend: Target) -> None:
    """64 keys beyond a multiple of 128, and a log-sum-exp far below -88 (pytorch#196678: NaN in dq on H100)."""
    cases = [
        Case(shape=(1, 1, 8, 16), S=S, mask=mask, mask_dims="s", dtype=dtype, lse=True)
        for S in (64, 192)
        for dtype in (F32, F16)
        for mask in ("bool", "bias")
    ]
    with Oracle(f"low scores on {backend}") as oracle:
        for case in on(backend, cases):
            t = inputs(case, backend.device)
            for name, shift in (("q", 7.0), ("k", -8.0)):
                t[name] = (t[name].detach() / 8 + shift).requires_grad_()
            results = ours(case, t, backend.name)
            assert results["lse"].max() < -150
            check(oracle, case, t, results)


def test_float_mask_beside_half(backend: Target) -> None:
    """Read as what it is (pytorch#191612: misread in silence)."""
    cases = [
        Case(shape=(1, 2, 5, 8), S=9, dtype=d, mask="float", mask_dims=dims)
        for d in (F16, BF16)
        for dims in ("ls", "bhls")
    ]
    with Oracle(f"float mask on {backend}") as oracle:
        for case in on(backend, cases):
            t = inputs(case, backend.device)
            theirs = torch_own(case, t)
            t["mask"] = (t["mask"].detach() + 3000.0).requires_grad_()  # 16 bits do not hold such steps
            results = ours(case, t, backend.name)
            oracle.check(case, results["out"], theirs["out"], exact(case, t)["out"])
            assert results["dmask"].dtype == F32


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_rows_without_keys(backend: Target, p: float) -> None:
    """Padding that hides every key of one sequence: results and gradients of 0, and no NaN beside them."""
    case = Case(shape=(2, 2, 5, 8), S=9, mask="bool", mask_dims="bs", lse=True, p=p, dtype=dtype_of(backend))
    for kind in ("bool", "bias"):
        t = inputs(replace(case, mask=kind), backend.device)
        hidden = torch.tensor([False] * 7 + [True] * 2 + [True] * 9, device=backend.device).reshape(2, 1, 1, 9)
        mask = ~hidden if kind == "bool" else torch.where(hidden, -math.inf, 0.0).to(case.dtype)
        t["mask"] = mask.requires_grad_(kind == "bias")
        results = ours(case, t, backend.name)
        assert all(r.isfinite().all() for n, r in results.items() if n != "lse")
        assert (results["lse"][1] == -math.inf).all()
        for name in ("out", "dq", "dk", "dv", *(("dmask",) if kind == "bias" else ())):
            assert not results[name][1].any(), name
            assert results[name][0].any(), name
        with Oracle(f"padding on {backend}") as oracle:
            check(oracle, replace(case, mask=kind), t, results)


def test_single_query_with_dropout(backend: Target) -> None:
    cases = [Case(shape=(2, 2, 1, 16), S=S, p=0.4, dtype=d) for S in (1, 33, 65) for d in (F32, F16)]
    judge_all("one query", cases, backend)


EXTREME = {"lowest": None, "-inf": -math.inf, "inf": math.inf, "1e30": 1e30, "-1e30": -1e30}


@pytest.mark.parametrize("value", EXTREME)
def test_extreme_biases(backend: Target, value: str) -> None:
    """A row of finfo.min is an average over its keys, of -inf is empty, keys at +inf share their row."""
    cases = [Case(shape=(1, 2, 4, 8), S=6, mask="bias", mask_dims="ls", dtype=dtype) for dtype in (F32, F64, F16)]
    with Oracle(f"{value} on {backend}") as oracle:
        for case in on(backend, cases):
            t = inputs(case, backend.device)
            number = EXTREME[value] or torch.finfo(case.dtype).min
            mask = torch.zeros(4, 6, dtype=case.dtype, device=backend.device)
            mask[1] = mask[2, 3:] = mask[3, 2] = number
            t["mask"] = mask.requires_grad_()
            results = ours(case, t, backend.name)
            check(oracle, case, t, results)
            if value == "lowest" and case.dtype != F16:
                torch.testing.assert_close(results["out"][:, :, 1], t["v"].detach().mean(2))


def test_lse_of_extreme_biases(backend: Target) -> None:
    """+inf where a key is at +inf, -inf without keys, large where they are at finfo.min; its gradients stay finite."""
    case = Case(shape=(1, 2, 4, 8), S=6, mask="float", mask_dims="ls", lse=True, dtype=dtype_of(backend))
    t = inputs(case, backend.device)
    mask = torch.zeros(4, 6, device=backend.device)
    mask[0], mask[1, 2], mask[2] = -math.inf, math.inf, torch.finfo(F32).min
    t["mask"] = mask.requires_grad_()
    results = ours(case, t, backend.name)
    lse = results["lse"][0]
    assert (lse[:, 0] == -math.inf).all()
    assert (lse[:, 1] == math.inf).all()
    assert (lse[:, 2] < -1e38).all()
    assert lse[:, 2:].isfinite().all()
    assert all(r.isfinite().all() for n, r in results.items() if n != "lse")
    # Equal keys share the lse's gradient.
    shares = results["dmask"][2] - ours(case, t | {"dlse": torch.zeros_like(t["dlse"])}, backend.name)["dmask"][2]
    expected = (t["dlse"][0, :, 2].sum() / 6).expand(6)
    torch.testing.assert_close(shares.float(), expected, rtol=1e-2, atol=1e-3)


def test_large_scores(backend: Target) -> None:
    """Scores of thousands, where one key has all the weight, and an lse that float16 does not hold."""
    cases = [Case(shape=(1, 2, 9, 16), S=12, scale=500.0, lse=True, dtype=d, is_causal=True) for d in (F32, F64, F16)]
    judge_all("large scores", cases, backend)


@pytest.mark.parametrize("sizes", [(9, 300, 64), (2, 1100, 64), (70, 140, 64), (70, 40, 136)], ids=str)
def test_backward_finds_the_scores_again(backend: Target, sizes: tuple[int, int, int]) -> None:
    """To the bit, whichever kernel forward took: else weights of 1 are something else in dv."""
    L, S, E = sizes
    case = Case(shape=(1, 1, L, E), S=S, scale=500.0, dtype=F16)
    t = inputs(case, backend.device)
    results, theirs, wide = ours(case, t, backend.name), torch_own(case, t), exact(case, t)
    with Oracle(f"{sizes} on {backend}") as oracle:
        for name in ("out", "dv"):
            oracle.check(name, results[name], theirs[name], wide[name])


@pytest.mark.parametrize("sinks", [(-math.inf, 0.3), (math.inf, 0.3), (-math.inf, math.inf)], ids=str)
@pytest.mark.parametrize("S", [0, 5])
def test_infinite_sinks(backend: Target, S: int, sinks: tuple[float, float]) -> None:
    """-inf is no sink; +inf takes everything, as a key at +inf does; neither has a gradient."""
    case = Case(shape=(1, 2, 4, 8), S=S, lse=True, sinks=True, dtype=dtype_of(backend))
    t = inputs(case, backend.device)
    t["sinks"] = torch.tensor(sinks, device=backend.device, dtype=case.dtype).requires_grad_()
    results, expected = ours(case, t, backend.name), ours(case, t, "eager")
    for name, value in expected.items():
        assert name == "lse" or value.isfinite().all()
        torch.testing.assert_close(results[name], value, rtol=1e-2, atol=1e-3)
    assert not results["dsinks"][t["sinks"].isinf()].any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, "NaN with a payload"])
def test_bad_values_stay_in_their_row(backend: Target, bad: float | str) -> None:
    """A query that is NaN or infinite spoils its own row and no other one."""
    case = Case(shape=(1, 2, 9, 16), S=12, dtype=dtype_of(backend))
    t = inputs(case, backend.device)
    clean = ours(case, t, backend.name)
    q = t["q"].detach().clone()
    q[:, 0, 4, 3] = math.nan if isinstance(bad, str) else bad
    if isinstance(bad, str):
        q.view({2: torch.int16, 4: torch.int32}[q.element_size()])[:, 0, 4, 3] += 1
    t["q"] = q.requires_grad_()
    marked = ours(case, t, backend.name)
    kept = torch.ones(2, 9, dtype=torch.bool, device=backend.device)
    kept[0, 4] = False
    for name in ("out", "dq"):
        assert marked[name][:, ~kept].isnan().any()
        assert torch.equal(marked[name][:, kept], clean[name][:, kept]), name
    assert torch.equal(marked["dk"][:, 1], clean["dk"][:, 1])


# ---- gradients ----


def gradient_cases() -> list[Case]:
    small: dict[str, Any] = {"shape": (1, 2, 3, 4), "S": 5, "dtype": F64}
    everything = {"mask": "bias", "sinks": True, "softcap": 2.0, "alibi": "h", "p": 0.3, "lse": True}
    return [
        Case(**small),
        Case(**small, is_causal=True, causal="bottom-right"),
        Case(**small, window=(1, 1)),
        Case(**small, mask="bool", mask_dims="bls", lse=True),
        Case(**small, mask="bias", mask_dims="hls"),
        Case(**small, mask="bias", mask_dims="l", lse=True, sinks=True),
        Case(**small, softcap=1.5, scale=0.7),
        Case(**small, alibi="bh"),
        Case(**small, sinks=True),
        Case(**small, p=0.4),
        Case(**small, lse=True),
        Case(**small | {"shape": (1, 4, 3, 4)}, Hk=2, Ev=3),
        Case(**small, **everything),
        Case(shape=(1, 2, 1, 3), lengths=((2, 3), (3, 1), (0, 2)), dtype=F64, is_causal=True),
        Case(shape=(1, 2, 1, 3), lengths=((2, 3), (3, 1), (1, 0)), dtype=F64, mask_dims="bls", **everything),
    ]


def leaf_function(case: Case, backend: Target) -> tuple[Any, list[Tensor]]:
    """The outputs as a function of what has a gradient, which leaves out an infinite bias or lse."""
    t = inputs(case, backend.device)
    if "mask" in t and t["mask"].is_floating_point():
        finite = torch.where(t["mask"].isinf(), 0.0, t["mask"]).detach()
        t["mask"] = finite.requires_grad_()
    leaves = leaves_of(t)

    def f(*given: Tensor) -> tuple[Tensor, ...]:
        outputs = call(case, t | dict(zip(leaves, given)), backend.name)
        if "lse" in outputs:
            outputs["lse"] = torch.where(outputs["lse"].isinf(), 0.0, outputs["lse"])
        return tuple(outputs.values())

    return f, list(leaves.values())


@pytest.fixture(params=[target for target in TARGETS if target.name in ("eager", "cpu", "triton")], ids=str)
def differentiated(request: pytest.FixtureRequest) -> Target:
    """The backends that have float64."""
    return request.param


@pytest.mark.parametrize("case", gradient_cases(), ids=str)
def test_gradcheck(differentiated: Target, case: Case) -> None:
    """By random directions on Triton's interpreter."""
    assert gradcheck(*leaf_function(case, differentiated), fast_mode=differentiated.name == "triton")


@pytest.mark.parametrize("case", gradient_cases(), ids=str)
def test_gradgradcheck(differentiated: Target, case: Case) -> None:
    """The second order is that of the definition: one backend with kernels stands for all."""
    if differentiated.name == "triton":
        pytest.skip("its first order is checked")
    assert gradgradcheck(*leaf_function(case, differentiated))


def test_third_order() -> None:
    """Gradients of every order: the third derivative equals that of the definition."""
    case = Case(shape=(1, 1, 3, 4), S=4, dtype=F64, is_causal=True)
    t = inputs(case, "cpu")
    results = []
    for name in ("cpu", "eager"):
        out = call(case, t, name)["out"]
        (first,) = torch.autograd.grad((out**2 * t["dout"]).sum(), t["q"], create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), t["k"], create_graph=True)
        results.append(torch.autograd.grad((second**2).sum(), t["v"])[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("infinite", [-math.inf, math.inf])
def test_double_backward_has_no_nan(backend: Target, infinite: float) -> None:
    """Rows without a key, rows at +inf and single infinite entries, in derivatives of both orders."""
    case = Case(shape=(1, 2, 4, 8), S=6, mask="bias", mask_dims="ls", lse=True, dtype=dtype_of(backend))
    t = inputs(case, backend.device)
    mask = t["mask"].detach()[0, 0].nan_to_num(neginf=0.0)
    mask[1] = mask[2, 1:3] = mask[0, 5] = infinite
    t["mask"] = mask.requires_grad_()
    outputs = call(case, t, backend.name)
    leaves = leaves_of(t)
    loss = (outputs["out"] ** 2).sum() + torch.where(outputs["lse"].isinf(), 0.0, outputs["lse"]).square().sum()
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), list(leaves.values()))
    for gradient in (*first, *second):
        assert gradient.isfinite().all()
        assert gradient.any()
    dead = mask == infinite
    assert not first[3][dead].any()
    assert not second[3][dead].any()


@pytest.mark.parametrize("mask_dims", ["hls", "hl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_peaked_weights(kernels: Target, dtype: torch.dtype, mask_dims: str) -> None:
    """Scores as T5's, unscaled: delta nearly cancels. 16-bit gradients on the CPU are the exact ones, rounded; the GPU
    kernels round factors of products too."""
    case = Case((1, 2, 40, 64), 50, dtype=dtype, scale=1.0, mask="bias", mask_dims=mask_dims, sinks=True, lse=True)
    if not on(kernels, [case]):
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16")
    t = inputs(case, kernels.device)
    expected, found = exact(case, t), ours(case, t, kernels.name)
    for name, want in expected.items():
        if name != "lse":
            rounded = (want.to(found[name].dtype).double() - want).norm()
            floor = torch.finfo(torch.float32).eps * 32 * want.norm()
            most = (1.2 if kernels.name == "cpu" else 1.8) * rounded + floor
            assert (found[name].double() - want).norm() < most, name


@pytest.mark.parametrize("sinks", [False, True])
def test_only_some_gradients(backend: Target, sinks: bool) -> None:
    """Any subset of the gradients: those that are asked for are those of the full set."""
    case = Case(shape=(1, 4, 9, 16), S=12, Hk=2, mask="bias", mask_dims="hls", sinks=sinks, dtype=dtype_of(backend))
    everything = inputs(case, backend.device)
    expected = ours(case, everything, backend.name)
    names = list(leaves_of(everything))
    for size in (1, len(names) - 1) if is_interpreted(backend) else range(1, len(names)):
        for wanted in itertools.combinations(names, size):
            t = {n: v.detach().requires_grad_(n in wanted) for n, v in everything.items()}
            results = ours(case, t, backend.name)
            assert results.keys() == {"out", *(f"d{n}" for n in wanted)}
            for name, value in results.items():
                torch.testing.assert_close(value, expected[name], msg=f"{name} of {wanted}")


def test_lse_alone(backend: Target) -> None:
    """Its gradient, where the result is not used: values have none."""
    case = Case(lse=True, sinks=True, is_causal=True, dtype=dtype_of(backend))
    t = inputs(case, backend.device)
    lse = call(case, t, backend.name)["lse"]
    found = torch.autograd.grad(lse, [t["q"], t["k"], t["sinks"]], t["dlse"])
    silent = t | {"dout": torch.zeros_like(t["dout"])}
    theirs, wide = torch_own(case, silent), exact(case, silent)
    with Oracle(f"lse on {backend}") as oracle:
        for name, gradient in zip(("dq", "dk", "dsinks"), found):
            oracle.check(name, gradient, theirs[name], wide[name])


def test_mask_with_one_value_for_all_keys(kernels: Target) -> None:
    """It shifts all scores of a row: out does not change, so its gradient is 0, to the bit; the lse's passes."""
    case = Case(shape=(2, 2, 5, 8), S=9, mask="bias", mask_dims="bl", dtype=dtype_of(kernels))
    t = inputs(case, kernels.device)
    assert not ours(case, t, kernels.name)["dmask"].any()
    case = replace(case, lse=True)
    t = inputs(case, kernels.device) | {"dout": torch.zeros_like(t["dout"])}
    dmask = ours(case, t, kernels.name)["dmask"]
    alive = t["mask"] > -math.inf
    torch.testing.assert_close(dmask, (t["dlse"].sum(1)[:, None, :, None] * alive).to(dmask.dtype))


# ---- dropout ----


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_dropout(backend: Target, p: float) -> None:
    """Results and gradients for the mask that the definition draws from the same seed."""
    cases = [
        Case(shape=shape, S=S, p=p, dtype=d, is_causal=c)
        for (shape, S), c in zip((((2, 2, 9, 16), 13), ((1, 2, 70, 8), 67), ((1, 1, 5, 16), 130)), (True, False, False))
        for d in (F32, F16, BF16)
    ]
    judge_all(f"p={p}", cases, backend, every=3)


@pytest.mark.parametrize("lengths", [(), ((3, 9), (5, 2), (4, 16))], ids=["dense", "packed"])
def test_equal_seeds_drop_the_same_elements(backend: Target, lengths: tuple) -> None:
    """On every backend the mask is that of pyops.philox, in forward and in backward: values and incoming gradients that
    are unit matrices show the dropped softmax itself."""
    case = Case(shape=(2, 3, 16, 8), S=16, Ev=16, p=0.4, dtype=dtype_of(backend), lengths=lengths)
    t = inputs(case, backend.device)
    masks = dropout_mask(case, t["q"])
    unit = torch.eye(16, device=backend.device, dtype=case.dtype)
    if not lengths:
        t["v"] = unit.expand(2, 3, 16, 16).clone().requires_grad_()
        t["dout"] = unit.expand(2, 3, 16, 16).contiguous()
        results = ours(case, t, backend.name)
        assert torch.equal(results["out"] != 0, masks[0])
        assert torch.equal(results["dv"] != 0, masks[0].transpose(-1, -2))
        return
    t["v"] = torch.cat([unit[:keys] for _, keys in lengths])[:, None].expand(-1, 3, -1).clone().requires_grad_()
    t["dout"] = torch.cat([unit[:queries] for queries, _ in lengths])[:, None].expand(-1, 3, -1).contiguous()
    results = ours(case, t, backend.name)
    q0 = k0 = 0
    for mask, (queries, keys) in zip(masks, lengths):
        out, dv = results["out"][q0 : q0 + queries, :, :keys], results["dv"][k0 : k0 + keys, :, :queries]
        assert torch.equal(out.transpose(0, 1) != 0, mask[0])
        assert torch.equal(dv.permute(1, 2, 0) != 0, mask[0])
        q0, k0 = q0 + queries, k0 + keys


def test_dropout_at_the_boundary(backend: Target) -> None:
    """An element is kept when the upper 24 bits of its lane are at least p * 2^24: exactly then, on every backend."""
    torch.manual_seed(SEED)
    seed = draw_seed(torch.device(backend.device))
    lanes = philox(seed.cpu(), torch.arange(2)[None, :], torch.arange(4)[:, None])
    bits = (torch.stack(lanes, -1) >> 8).flatten(1)
    dtype = dtype_of(backend)
    v = torch.eye(8, device=backend.device, dtype=dtype)[None, None]
    k = torch.zeros_like(v)
    for threshold in bits[bits % 2 == 1][:2].tolist():  # odd: the last bit counts
        for step in (0, 1):
            torch.manual_seed(SEED)
            out = pyops.scaled_dot_product_attention(
                k[:, :, :4], k, v, dropout_p=(threshold + step) / 2**24, backend=backend.name
            )
            assert torch.equal(out[0, 0].cpu() != 0, bits >= threshold + step)


def test_dropout_is_random(backend: Target) -> None:
    """The kept fraction is that of p, rows and calls are independent, and torch's seed repeats a call."""
    L, S, p = 64, 128, 0.25
    dtype = dtype_of(backend)
    q, k = (torch.zeros(1, 2, n, 8, device=backend.device, dtype=dtype) for n in (L, S))
    v = torch.eye(S, device=backend.device, dtype=dtype).expand(1, 2, S, S)

    def kept() -> Tensor:
        return pyops.scaled_dot_product_attention(q, k, v, dropout_p=p, backend=backend.name) != 0

    torch.manual_seed(SEED)
    first, second = kept(), kept()
    torch.manual_seed(SEED)
    assert torch.equal(first, kept())
    count = first.numel()
    assert abs(first.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    # Two independent masks agree with probability p^2 + (1 - p)^2.
    agree = p * p + (1 - p) ** 2
    deviation = math.sqrt(agree * (1 - agree) / count)
    for a, b in ((first, second), (first, first.roll(1, 1)), (first, first.roll(1, 2)), (first, first.roll(4, 3))):
        assert abs((a == b).float().mean().item() - agree) < 5 * deviation


def test_rows_have_numbers() -> None:
    """keep_mask by number is keep_mask by count, beyond 32 bits too."""
    seed = torch.tensor([5, 7])
    assert torch.equal(
        keep_mask(seed, torch.arange(12).reshape(3, 4), 9, 0.5), keep_mask(seed, 12, 9, 0.5).reshape(3, 4, 9)
    )
    far = keep_mask(seed, torch.tensor([3, 3 + 2**32]), 64, 0.5)
    assert not torch.equal(far[0], far[1])


# ---- any call ----


@settings(derandomize=True, max_examples=100, deadline=None)
@given(data=st.data())
def test_any_call(data: st.DataObject) -> None:
    """Shapes, strides and options that nobody thought of, on the CPU kernels."""
    judge_any(data, Target("cpu", "cpu"), 40, DTYPES)


@pytest.mark.full
@pytest.mark.parametrize("backend", TARGETS, ids=str)
@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=st.data())
def test_any_call_on_other_kernels(backend: Target, data: st.DataObject) -> None:
    judge_any(data, backend, 20 if is_interpreted(backend) else 70, DTYPES if backend.name != "simt" else (F16, BF16))


def judge_any(data: st.DataObject, backend: Target, longest: int, dtypes: tuple) -> None:
    heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    step = 8 if backend.name in ("simt", "cuda") else 1
    size = st.integers(1, 24).map(lambda n: n if step == 1 else 8 * ((n + 7) // 8))
    chosen: dict[str, Any] = {name: data.draw(st.sampled_from(values)) for name, values in OPTIONS.items()}
    chosen["window"] = data.draw(st.none() | st.tuples(*[st.none() | st.integers(-1, longest)] * 2))
    packed = data.draw(st.booleans())
    if packed:
        n = st.integers(0, longest // 2)
        chosen["lengths"] = tuple(data.draw(st.lists(st.tuples(n, n), min_size=1, max_size=4)))
    case = Case(
        shape=(data.draw(st.integers(1, 3)), heads * group, data.draw(st.integers(1, longest)), data.draw(size)),
        S=data.draw(st.integers(1, longest)),
        Hk=heads,
        Ev=data.draw(size),
        dtype=data.draw(st.sampled_from(dtypes)),
        mask=data.draw(st.sampled_from(("", "bool", "bias", "float"))),
        mask_dims=data.draw(st.sampled_from(("s", "ls", "bs", "bhls", "hl", "hls"))),
        layout=data.draw(st.sampled_from(("dense", "heads_last", "slices", "step", "offset", "features_first"))),
        **chosen,
    )
    case = valid(case)
    if packed and 0 in case.sizes.values():
        case = replace(case, mask="")
    if packed and case.layout == "slices":
        case = replace(case, layout="dense")
    if not on(backend, [case]):
        return
    oracle = Oracle("")
    t = inputs(case, backend.device)
    check(oracle, case, t, ours(case, t, backend.name), cancelled=True)
    assert not oracle.failures


# ---- the big grids ----

# Queries and keys of flash-attention's own tests, and head sizes of torch's.
FLASH_LENGTHS = [
    (1, 1), (64, 128), (128, 192), (256, 256), (239, 1), (799, 3), (113, 203), (113, 128), (128, 217), (113, 211),
    (108, 256), (256, 512), (384, 256), (640, 128), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
]  # fmt: skip
GRID_OPTIONS: list[dict[str, Any]] = [
    {}, {"window": (70, None)}, {"softcap": 15.0}, {"mask": "bool", "mask_dims": "bs"}, {"p": 0.1},
]  # fmt: skip
HEAD_SIZES = (8, 16, 21, 32, 64, 72, 96, 128, 160, 192, 203, 256)


@pytest.mark.full
@pytest.mark.parametrize("lengths", FLASH_LENGTHS, ids=str)
def test_length_grid(backend: Target, lengths: tuple[int, int]) -> None:
    L, S = lengths
    cases = [
        valid(Case(shape=(1, 2, L, E), S=S, Hk=1, dtype=d, is_causal=c, causal="bottom-right", **options))
        for n, (E, d, c) in enumerate(itertools.product((64, 128), (F32, BF16, F16), (False, True)))
        for options in [
            ({}, {"window": (70, None)}, {"softcap": 15.0}, {"mask": "bool", "mask_dims": "bs"}, {"p": 0.1})[n % 5]
        ]
    ]
    if L * S > 300_000 and backend.name == "simt":
        cases = cases[:2] + cases[-2:]
    judge_all("lengths", cases, backend, every=len(cases))


@pytest.mark.full
def test_longest(backend: Target) -> None:
    if backend.name == "simt" or is_interpreted(backend):
        pytest.skip("hours for an interpreter")
    cases = [Case(shape=(1, 1, n, 64), S=n, dtype=d, is_causal=True) for n in (4096, 4224) for d in (F32, BF16)]
    judge_all("longest", cases, backend)


@pytest.mark.full
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_size_grid(backend: Target, head_size: int) -> None:
    cases = [
        valid(Case(shape=(2, 4, L, head_size), S=S, Hk=2, dtype=d, is_causal=c, mask=m, mask_dims="hls"))
        for (L, S), d, c, m in itertools.product(((4, 8), (143, 64), (64, 587)), DTYPES, (False, True), ("", "bias"))
    ]
    if not on(backend, cases):
        pytest.skip("the CUDA kernels leave the head size to Triton")
    judge_all("head sizes", cases, backend, every=10 if head_size <= 128 else 24)


@pytest.mark.full
def test_more_combinations(backend: Target) -> None:
    """Other samples of all options, with larger sizes."""
    sizes = [{"shape": (2, 4, 130, 64), "S": 190, "Hk": 2}, {"shape": (1, 3, 70, 128), "S": 65, "Hk": 1},
             {"shape": (3, 2, 65, 32), "S": 129, "Ev": 64}, {"shape": (1, 2, 128, 80), "S": 128}]  # fmt: skip
    for seed in range(3):
        cases = pairwise(
            10 + seed, size=sizes, dtype=DTYPES, mask=MASKS, layout=("dense", "heads_last", "offset"), **OPTIONS
        )
        judge_all("more combinations", cases, backend, every=20)
