"""What a caller of attention may rely on beside the numbers: errors, the backend, autograd's rules, memory."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    Case,
    apply,
    call,
    check,
    dtype_of,
    ends,
    inputs,
    judge,
    ours,
)
from conftest import HAS_GPU, Target
from oracle import Oracle
from torch import Tensor

import pyops
from pyops import backend
from pyops.backend import BACKENDS, Backend

TESTS = Path(__file__).parent
ROOT = TESTS.parent
OPERATIONS = ("scaled_dot_product_attention", "varlen_attention")
PACKED = ((5, 7), (3, 3), (4, 2))


def supported(case: Case, target: Target) -> Case:
    """The case in a dtype that the kernels serve."""
    return replace(case, dtype=dtype_of(target))


# ---- the oracle sees mistakes ----


class Flawed:
    """The CPU kernels with one mistake in a result."""

    def __init__(self, kernels: Any, flaw: Callable[..., None]):
        self.kernels, self.flaw = kernels, flaw

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def attention_fwd(self, *args: Any) -> None:
        self.kernels.attention_fwd(*args)
        self.flaw("fwd", *args)

    def attention_bwd(self, *args: Any) -> None:
        self.kernels.attention_bwd(*args)
        self.flaw("bwd", *args)


def lose_a_key(way: str, *args: Any) -> None:
    if way == "bwd":
        args[15][:, :, -1] = 0  # dk


def lose_delta(way: str, *args: Any) -> None:
    if way == "bwd":
        dout, q, dq = args[0], args[2], args[14]
        dq += (dout.float().sum(-1, keepdim=True) * 1e-2 * q.float()).to(dq.dtype)


def shift_stats(way: str, *args: Any) -> None:
    if way == "fwd":
        args[11][1] *= 1.02  # l


def flip_dmask(way: str, *args: Any) -> None:
    if way == "bwd":
        args[17].neg_()


def nothing(*_args: Any) -> None:
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flaw", [lose_a_key, lose_delta, shift_stats, flip_dmask])
def test_oracle_sees_a_mistake(flaw: Callable, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key, one term or one sign wrong in one result, and the rule refuses it; without the mistake it does not."""
    kernels = BACKENDS["cpu"].load("attention")
    case = Case(mask="bias", mask_dims="hls", dtype=dtype)
    for mistake, refused in ((nothing, False), (flaw, True)):
        name = f"flawed-{mistake.__name__}"
        flawed = Backend(name, lambda _, m=mistake: Flawed(kernels, m), lambda _: None)
        monkeypatch.setitem(BACKENDS, name, flawed)
        oracle = Oracle("")
        judge(oracle, case, Target(name, "cpu"))
        assert bool(oracle.failures) == refused


# ---- errors ----


def good(op: str) -> dict[str, Any]:
    """Valid arguments: 4 query heads, 2 key heads."""
    if op == "varlen_attention":
        q, k, v = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 6)
        cu_q, cu_k, max_q, max_k = ends(Case(lengths=PACKED), "cpu")
        names = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        return names | {"max_seqlen_q": max_q, "max_seqlen_k": max_k, "enable_gqa": True}
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    return {"query": q, "key": k, "value": v, "enable_gqa": True}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Of both functions: argument, what is wrong, value, error, other arguments.
OPTIONS: list[tuple[str, str, Any, type[Exception], dict[str, Any]]] = [
    ("dropout_p", "negative", -0.1, ValueError, {}),
    ("dropout_p", "1", 1.0, ValueError, {}),
    ("dropout_p", "above 1", 1.5, ValueError, {}),
    ("dropout_p", "nan", math.nan, ValueError, {}),
    ("dropout_p", "text", "half", TypeError, {}),
    ("scale", "infinite", math.inf, ValueError, {}),
    ("scale", "nan", math.nan, ValueError, {}),
    ("scale", "text", "sqrt", TypeError, {}),
    ("softcap", "negative", -1.0, ValueError, {}),
    ("softcap", "infinite", math.inf, ValueError, {}),
    ("softcap", "nan", math.nan, ValueError, {}),
    ("softcap", "text", "high", TypeError, {}),
    ("causal", "unknown", "center", ValueError, {}),
    ("causal", "a bool", True, ValueError, {}),
    ("causal", "bottom-right alone", "bottom-right", ValueError, {}),
    ("causal", "bottom-right beside no limits", "bottom-right", ValueError, {"window": (-1, None)}),
    ("window", "one int", 5, TypeError, {}),
    ("window", "three ints", (1, 2, 3), TypeError, {}),
    ("window", "floats", (1.0, 2.0), TypeError, {}),
    ("window", "text", "ab", TypeError, {}),
    ("window", "below -1", (-2, 0), ValueError, {}),
    ("window", "beyond the diagonal", (3, 1), ValueError, {"is_causal": True}),
    ("attn_mask", "not a tensor", [True], TypeError, {}),
    ("attn_mask", "integer", torch.ones(1, 1, dtype=torch.int64), TypeError, {}),
    ("attn_mask", "wider than query", torch.ones(1, 1, dtype=torch.float64), TypeError, {}),
    ("attn_mask", "narrower than query", torch.ones(1, 1, dtype=torch.bfloat16), TypeError, {}),
    ("attn_mask", "size", torch.ones(3, 3), ValueError, {}),
    ("attn_mask", "too many dimensions", torch.ones(1, 1, 1, 1, 1), ValueError, {}),
    ("attn_mask", "device", torch.ones(1, 1, device="meta"), ValueError, {}),
    ("attn_mask", "sparse", torch.ones(1, 1).to_sparse(), TypeError, {}),
    ("alibi_slopes", "not a tensor", 0.5, TypeError, {}),
    ("alibi_slopes", "size", torch.ones(3), ValueError, {}),
    ("alibi_slopes", "heads of key", torch.ones(2), ValueError, {}),
    ("alibi_slopes", "rank", torch.ones(1, 1, 4), ValueError, {}),
    ("alibi_slopes", "integer", torch.ones(4, dtype=torch.int64), TypeError, {}),
    ("alibi_slopes", "device", torch.ones(4, device="meta"), ValueError, {}),
    ("alibi_slopes", "with a gradient", torch.ones(4, requires_grad=True), ValueError, {}),
    ("sinks", "not a tensor", 0.5, TypeError, {}),
    ("sinks", "size", torch.ones(2), ValueError, {}),
    ("sinks", "rank", torch.ones(2, 4), ValueError, {}),
    ("sinks", "integer", torch.ones(4, dtype=torch.int32), TypeError, {}),
    ("sinks", "device", torch.ones(4, device="meta"), ValueError, {}),
    ("backend", "unknown", "fpga", ValueError, {}),
    ("backend", "a list", ["cpu"], ValueError, {}),
]
DENSE: list[tuple[str, str, Any, type[Exception], dict[str, Any]]] = [
    ("query", "not a tensor", [1.0], TypeError, {}),
    ("query", "None", None, TypeError, {}),
    ("query", "integer", torch.ones(2, 4, 5, 8, dtype=torch.int64), TypeError, {}),
    ("query", "complex", torch.ones(2, 4, 5, 8, dtype=torch.complex64), TypeError, {}),
    ("query", "sparse", torch.ones(5, 8).to_sparse(), TypeError, {}),
    ("query", "rank 1", torch.ones(8), ValueError, {}),
    ("query", "no features", torch.ones(2, 4, 5, 0), ValueError, {"key": torch.ones(2, 2, 7, 0)}),
    ("key", "not a tensor", 3, TypeError, {}),
    ("key", "dtype", torch.ones(2, 2, 7, 8, dtype=torch.float64), TypeError, {}),
    ("key", "device", torch.ones(2, 2, 7, 8, device="meta"), ValueError, {}),
    ("key", "rank 1", torch.ones(8), ValueError, {}),
    ("key", "head size", torch.ones(2, 2, 7, 9), ValueError, {}),
    ("key", "heads that do not divide", torch.ones(2, 3, 7, 8), ValueError, {}),
    ("key", "no heads", torch.ones(2, 0, 7, 8), ValueError, {}),
    ("key", "batch", torch.ones(3, 2, 7, 8), ValueError, {}),
    ("key", "fewer heads without enable_gqa", torch.ones(2, 2, 7, 8), ValueError, {"enable_gqa": False}),
    ("value", "not a tensor", "v", TypeError, {}),
    ("value", "dtype", torch.ones(2, 2, 7, 6, dtype=torch.bfloat16), TypeError, {}),
    ("value", "device", torch.ones(2, 2, 7, 6, device="meta"), ValueError, {}),
    ("value", "length", torch.ones(2, 2, 8, 6), ValueError, {}),
    ("value", "no features", torch.ones(2, 2, 7, 0), ValueError, {}),
    ("value", "heads that do not divide", torch.ones(2, 3, 7, 6), ValueError, {}),
    ("value", "batch", torch.ones(3, 2, 7, 6), ValueError, {}),
]  # fmt: skip
VARLEN: list[tuple[str, str, Any, type[Exception], dict[str, Any]]] = [
    ("q", "not a tensor", None, TypeError, {}),
    ("q", "rank 4", torch.ones(1, 12, 4, 8), ValueError, {}),
    ("q", "integer", torch.ones(12, 4, 8, dtype=torch.int64), TypeError, {}),
    ("k", "rank 2", torch.ones(12, 8), ValueError, {}),
    ("k", "head size", torch.ones(12, 2, 9), ValueError, {}),
    ("k", "heads", torch.ones(12, 3, 8), ValueError, {}),
    ("k", "dtype", torch.ones(12, 2, 8, dtype=torch.float64), TypeError, {}),
    ("k", "device", torch.ones(12, 2, 8, device="meta"), ValueError, {}),
    ("v", "length", torch.ones(13, 2, 6), ValueError, {}),
    ("v", "no features", torch.ones(12, 2, 0), ValueError, {}),
    ("cu_seqlens_q", "not a tensor", [0, 5, 8, 12], TypeError, {}),
    ("cu_seqlens_q", "int64", torch.tensor([0, 5, 8, 12]), TypeError, {}),
    ("cu_seqlens_q", "rank", ints(0, 12)[None], ValueError, {}),
    ("cu_seqlens_q", "empty", ints(), ValueError, {}),
    ("cu_seqlens_q", "device", torch.zeros(4, dtype=torch.int32, device="meta"), ValueError, {}),
    ("cu_seqlens_q", "first not 0", ints(1, 5, 8, 12), ValueError, {}),
    ("cu_seqlens_q", "falls", ints(0, 8, 5, 12), ValueError, {}),
    ("cu_seqlens_q", "ends early", ints(0, 5, 8, 11), ValueError, {}),
    ("cu_seqlens_q", "ends late", ints(0, 5, 8, 13), ValueError, {}),
    ("cu_seqlens_k", "int64", torch.tensor([0, 7, 10, 12]), TypeError, {}),
    ("cu_seqlens_k", "ends late", ints(0, 7, 10, 13), ValueError, {}),
    ("cu_seqlens_k", "other length", ints(0, 7, 12), ValueError, {}),
    ("max_seqlen_q", "a float", 5.0, TypeError, {}),
    ("max_seqlen_q", "None", None, TypeError, {}),
    ("max_seqlen_q", "negative", -1, ValueError, {}),
    ("max_seqlen_q", "too small", 4, ValueError, {}),
    ("max_seqlen_k", "too small", 6, ValueError, {}),
    ("max_seqlen_k", "text", "7", TypeError, {}),
]
ERRORS = [
    pytest.param(op, argument, value, kind, others, id=f"{op}-{argument}-{what.replace(' ', '_')}")
    for op, wrong in zip(OPERATIONS, (OPTIONS + DENSE, OPTIONS + VARLEN))
    for argument, what, value, kind, others in wrong
]


@pytest.mark.parametrize("named", ["eager", "cpu", None], ids=lambda n: n or "chosen")
@pytest.mark.parametrize(("op", "argument", "value", "kind", "others"), ERRORS)
def test_errors(
    op: str,
    argument: str,
    value: Any,
    kind: type,
    others: dict[str, Any],
    named: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`<op>: <argument> must <rule>, got <value>`, on every backend alike, before anything is drawn or allocated."""
    arguments = {"backend": named, **good(op), **others, argument: value}
    state = torch.get_rng_state()

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        pytest.fail("work was done before the arguments were checked")

    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like", "zeros", "randint", "arange", "where"):
            patch.setattr(torch, name, refuse)
        with pytest.raises(kind) as caught:
            getattr(pyops, op)(**arguments)
    assert re.fullmatch(rf"{op}: {argument} must .+, got .+", str(caught.value), re.DOTALL), str(caught.value)
    assert torch.equal(state, torch.get_rng_state())


def test_good_arguments(backend: Target) -> None:
    """The arguments that test_errors spoils one at a time, and numbers of other types."""
    for op, changes in itertools.product(OPERATIONS, ({}, {"scale": 1, "window": [2, None], "dropout_p": 0})):
        arguments = {n: t.to(backend.device) if isinstance(t, Tensor) else t for n, t in good(op).items()}
        for name, t in arguments.items():
            if isinstance(t, Tensor) and t.is_floating_point():
                arguments[name] = torch.cat([t, t], -1)[..., :8].to(dtype_of(backend))
        getattr(pyops, op)(**arguments, **changes, backend=backend.name)


def test_remedies() -> None:
    """Where one option would help, the message names it."""
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    with pytest.raises(ValueError, match=r"have 4 heads, or 1 \(any divisor with enable_gqa=True\), got 2$"):
        pyops.scaled_dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match=r"key must have a number of heads that divides that of query, 4, got 3$"):
        pyops.scaled_dot_product_attention(q, k[:, :1].expand(-1, 3, -1, -1), k, enable_gqa=True)


# ---- which backend runs ----


@pytest.fixture
def without_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes other backends the automatic choice for CPU tensors."""

    def prefer(*names: str) -> None:
        monkeypatch.setattr(backend, "_CPU_IS_FIRST", False)
        monkeypatch.setitem(backend.PREFERRED, "cpu", names)
        backend._logged.clear()

    return prefer


def test_explain() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    for op in ("attention", "scaled_dot_product_attention"):
        found = pyops.explain(op, q, k, v, is_causal=True, enable_gqa=True)
        assert found.chosen == "cpu"
        assert found.reasons["eager"] == "could, when asked for by name"
        assert found.reasons["cuda"].startswith("cannot: it ")
    assert pyops.explain("attention", query=q, key=k, value=v).chosen == "cpu"
    assert pyops.explain("attention", q, k, value=v, backend="eager").chosen == "eager"
    packed = good("varlen_attention")
    assert pyops.explain("varlen_attention", packed["q"], packed["k"], v=packed["v"]).chosen == "cpu"
    with pytest.raises(TypeError, match=r"^explain: value must be a torch.Tensor, got NoneType"):
        pyops.explain("attention", q, k)
    refused = pyops.explain("attention", q.long(), k, v)
    assert refused.chosen.startswith("nothing (attention: query must have dtype")


def test_limits_of_cuda(without_cpu: Callable) -> None:
    """The CUDA kernels serve 16 bits and head sizes up to 256 that 8 divides; by name they say so, by choice the next
    one has the call. (Here by way of simt, which has the same limits.)"""
    without_cpu("simt", "triton")
    served = torch.randn(1, 1, 4, 16).half()
    refused = {
        "its kernels serve bfloat16 and float16, not torch.float32": (served.float(), served.float()),
        "its kernels serve head sizes up to 256 that 8 divides, not 12 and 12": (served[..., :12], served[..., :12]),
        "its kernels serve head sizes up to 256 that 8 divides, not 16 and 12": (served, served[..., :12]),
        "its kernels serve head sizes up to 256 that 8 divides, not 264 and 16": (served.repeat(1, 1, 1, 17)[..., :264],
                                                                                 served),
    }  # fmt: skip
    assert pyops.explain("attention", served, served, served).chosen == "simt"
    for reason, (q, v) in refused.items():
        found = pyops.explain("attention", q, q, v)
        assert found.chosen == ("triton" if not HAS_GPU else "torch")
        assert found.reasons["simt"] == f'cannot: {reason}; use "triton"'
        with pytest.raises(ValueError, match="must be able to serve query") as caught:
            pyops.scaled_dot_product_attention(q, q, v, backend="simt")
        assert str(caught.value).endswith(f"got 'simt': {reason}; use \"triton\"")


class SdpaCalls(torch.overrides.TorchFunctionMode):
    """Counts the calls of torch's own operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


FALLBACK = [
    (Case(), 1),
    (Case(Hk=1, is_causal=True), 1),
    (Case(mask="bias", mask_dims="bhls"), 1),
    (Case(mask="bool", scale=0.3), 1),
    (Case(mask="bool", is_causal=True), 0),
    (Case(is_causal=True, causal="bottom-right"), 0),
    (Case(window=(3, 3)), 0),
    (Case(softcap=2.0), 0),
    (Case(sinks=True), 0),
    (Case(alibi="h"), 0),
    (Case(lse=True), 0),
    (Case(dtype=torch.bfloat16, mask="float"), 0),
    (Case(lengths=PACKED), 0),
]


@pytest.mark.parametrize(("case", "calls"), FALLBACK, ids=str)
def test_where_no_backend_serves(
    case: Case, calls: int, without_cpu: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's own operator where it can express the call, else the definition; and one line tells of it."""
    without_cpu()
    t = inputs(case, "cpu")
    with caplog.at_level(logging.WARNING, "pyops"), SdpaCalls() as counter:
        for _ in range(2):
            results = ours(case, t, None)
    assert counter.count == 2 * calls
    assert len([r for r in caplog.records if "runs torch's own operators" in r.message]) == 1
    with Oracle("fallback") as oracle:
        check(oracle, case, t, results)


def test_meta_tensors() -> None:
    q, k = torch.empty(2, 4, 5, 8, device="meta"), torch.empty(2, 4, 7, 8, device="meta")
    assert pyops.scaled_dot_product_attention(q, k, k).shape == q.shape
    out, lse = pyops.scaled_dot_product_attention(q, k, k, softcap=2.0, return_lse=True)
    assert (out.device.type, lse.shape) == ("meta", (2, 4, 5))
    with pytest.raises(ValueError, match=r"backend must be able to serve query, got 'cpu': it serves CPU"):
        pyops.scaled_dot_product_attention(q, k, k, backend="cpu")


# ---- autograd's rules ----

CALLS = [
    Case(),
    Case(is_causal=True, p=0.3, lse=True),
    Case(mask="bias", mask_dims="hls", sinks=True),
    Case(mask="bias", mask_dims="bl", lse=True),
    Case(lengths=PACKED, alibi="bh", Hk=1),
    Case(layout="slices", softcap=3.0),
]


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_arguments_are_never_written(backend: Target, case: Case) -> None:
    """Neither inputs nor incoming gradients."""
    case = supported(case, backend)
    if case.lengths:
        case = replace(case, layout="dense")
    t = inputs(case, backend.device)
    before = {name: (v.detach().clone(), v._version) for name, v in t.items()}
    ours(case, t, backend.name)
    for name, (value, version) in before.items():
        assert torch.equal(t[name], value), name
        assert t[name]._version == version, name


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_results_are_new_memory(backend: Target, case: Case) -> None:
    """Writing into a result, in place, changes nothing else."""
    case = supported(case, backend)
    t = inputs(case, backend.device)
    results = ours(case, t, backend.name)
    pointers = [v.untyped_storage().data_ptr() for v in (*t.values(), *results.values())]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("case", CALLS[:5], ids=str)
def test_bits_repeat(backend: Target, case: Case) -> None:
    """The same bits in every output and gradient, run after run."""
    runs = {"eager": 3, "cpu": 100}.get(backend.name, 100 if backend.device == "cuda" else 3)
    case = supported(case, backend)
    t = inputs(case, backend.device)
    first = ours(case, t, backend.name)
    for _ in range(runs - 1):
        for name, again in ours(case, t, backend.name).items():
            assert torch.equal(first[name], again), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_repeat_in_parallel(dtype: torch.dtype) -> None:
    """Sizes that all threads share, 100 times, with sums over queries, heads and batch entries."""
    together = Case(
        shape=(2, 4, 150, 32), S=170, Hk=2, mask="bias", mask_dims="ls", sinks=True, is_causal=True, dtype=dtype
    )
    packed = Case(shape=(1, 4, 1, 32), lengths=((300, 520), (0, 4), (90, 30), (40, 300)), p=0.2, dtype=dtype)
    for case, threads in itertools.product((together, packed), (2, 3)):
        torch.set_num_threads(threads)
        t = inputs(case, "cpu")
        first = ours(case, t, "cpu")
        for _ in range(99):
            assert all(torch.equal(first[n], again) for n, again in ours(case, t, "cpu").items())


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (1, 1, 300, 16), (3, 5, 20, 16)], ids=str)
def test_thread_counts(shape: tuple[int, ...], threads: int) -> None:
    """Right for every thread count: few heads, many heads, one query of many keys; more threads than cores."""
    torch.set_num_threads(threads)
    with Oracle(f"{threads} threads") as oracle:
        for dtype, causal in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            case = Case(
                shape=shape, S=300, dtype=dtype, is_causal=causal, causal="bottom-right" if causal else "top-left"
            )
            judge(oracle, case, Target("cpu", "cpu"))


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_graph_used_twice(backend: Target, case: Case) -> None:
    """retain_graph: the second backward gives the same bits, and gradients add up."""
    case = supported(case, backend)
    t = inputs(case, backend.device)
    out = call(case, t, backend.name)["out"]
    out.backward(t["dout"], retain_graph=True)
    once = {n: v.grad.clone() for n, v in t.items() if v.grad is not None}
    out.backward(t["dout"])
    for name, gradient in once.items():
        assert torch.equal(t[name].grad, gradient + gradient), name
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward(t["dout"])


@pytest.mark.parametrize("changed", ["q", "k", "v", "mask", "sinks", "out"])
def test_saved_tensor_changed_in_place(kernels: Target, changed: str) -> None:
    case = supported(Case(mask="bias", mask_dims="hls", sinks=True), kernels)
    t = inputs(case, kernels.device)
    used = {n: v * 1 if v.requires_grad else v for n, v in t.items()}
    outputs = call(case, used, kernels.name)
    converted = changed == "sinks" and case.dtype != torch.float32  # then a copy was saved
    with torch.no_grad():
        (outputs | used)[changed].mul_(2)
    if converted:
        torch.autograd.grad(outputs["out"], t["q"], t["dout"])
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(outputs["out"], t["q"], t["dout"])


def test_no_graph_where_none_is_wanted(backend: Target) -> None:
    for case in CALLS:
        case = supported(case, backend)
        t = inputs(case, backend.device)
        with torch.no_grad():
            inference = call(case, t, backend.name)
            assert all(o.grad_fn is None for o in inference.values())
        with torch.inference_mode():
            assert call(case, t, backend.name)["out"].is_inference()
        detached = {n: v.detach() for n, v in t.items()}
        assert not call(case, detached, backend.name)["out"].requires_grad
        for name, training in call(case, t, backend.name).items():
            assert torch.equal(inference[name], training), f"{case} {name}"


def test_bool_mask_and_slopes_have_no_gradient(backend: Target) -> None:
    case = supported(Case(mask="bool", alibi="h"), backend)
    t = inputs(case, backend.device)
    assert ours(case, t, backend.name).keys() == {"out", "dq", "dk", "dv"}


@pytest.mark.parametrize("layout", ["dense", "heads_last", "slices"])
def test_memory_order(backend: Target, layout: str) -> None:
    """Heads join without a copy: the result lies in memory as (B, L, H, Ev). Gradients follow their inputs."""
    case = supported(Case(shape=(2, 3, 5, 16), S=7, Ev=8, layout=layout), backend)
    t = inputs(case, backend.device)
    results = ours(case, t, backend.name)
    assert results["out"].transpose(1, 2).is_contiguous()
    if backend.name != "eager":
        for name in ("q", "k", "v"):
            gradient = results[f"d{name}"]
            assert (gradient if layout == "dense" else gradient.transpose(1, 2)).is_contiguous()
    three = t["q"].detach()[0]
    assert pyops.scaled_dot_product_attention(three, three, three, backend=backend.name).is_contiguous()


def test_mask_gradient_has_the_masks_dtype(backend: Target) -> None:
    for dtype, kind in ((dtype_of(backend), "bias"), (torch.float16, "float")):
        case = Case(mask=kind, mask_dims="hs", dtype=dtype)
        t = inputs(case, backend.device)
        dmask = ours(case, t, backend.name)["dmask"]
        assert (dmask.dtype, dmask.shape) == (t["mask"].dtype, t["mask"].shape)
    if backend.name in ("eager", "cpu"):
        case = Case(mask="float", dtype=torch.float64)
        assert ours(case, inputs(case, "cpu"), backend.name)["dmask"].dtype == torch.float32


def test_every_element_is_written(backend: Target) -> None:
    """torch's deterministic mode fills new memory with NaN: none of it reaches a result."""
    torch.use_deterministic_algorithms(True)
    try:
        with Oracle(f"deterministic mode on {backend}") as oracle:
            for case in CALLS:
                judge(oracle, supported(case, backend), backend)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- memory ----

MEMORY = """
import resource, sys, torch, pyops
torch.set_num_threads(2)

def run(L, mode, D):
    q, k, v = (torch.randn(1, 1, L, D, requires_grad=True) for _ in range(3))
    options = {
        "plain": {}, "long": {},
        "causal": {"is_causal": True}, "dropout": {"dropout_p": 0.1}, "lse": {"return_lse": True},
        "padding": {"attn_mask": torch.ones(1, 1, 1, L, dtype=torch.bool)},
        "bias of keys": {"attn_mask": torch.randn(L, requires_grad=True)},
        "bias of queries": {"attn_mask": torch.randn(L, 1, requires_grad=True)},
    }[mode]
    out = pyops.scaled_dot_product_attention(q, k, v, **options, backend="cpu")
    (out[0] if mode == "lse" else out).sum().backward()

mode = sys.argv[1]
run(256, mode, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(*((32768, mode, 64) if mode == "long" else (8192, mode, 16)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


MODES = ["plain", "bias of keys", "bias of queries"]
MODES += [pytest.param(mode, marks=pytest.mark.full) for mode in ("causal", "dropout", "lse", "padding", "long")]


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_linear(mode: str) -> None:
    """Forward and backward at 8,192 x 8,192: the scores alone would be 256 MiB. "long": at 32,768 x 32,768, 4 GiB; its
    inputs, results and gradients are 64 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, mode], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) * 1024 < (200_000_000 if mode == "long" else 32 << 20)


def test_offsets_beyond_32_bits(kernels: Target) -> None:
    """Views over more than 2^31 elements, of which few are touched (virtual memory): strides between batch entries and
    between rows, of a mask and of an incoming gradient too."""
    if kernels.name == "simt":
        pytest.skip("the executor poisons what lies between the rows")
    case = Case(shape=(2, 1, 3, 16), S=3, mask="bool", mask_dims="bls", dtype=torch.float16)
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    far = dict(t)
    for name, dim in (("q", 0), ("k", 2), ("v", 2), ("mask", 0), ("dout", 2)):
        value = t[name].detach()
        strides = list(value.contiguous().stride())
        strides[dim] = (2**31 + 64) // (value.shape[dim] - 1)
        if dim == 2:
            strides[0] = strides[1] = 64
        size = sum((n - 1) * s for n, s in zip(value.shape, strides)) + 1
        try:
            view = torch.empty(size, dtype=value.dtype, device=value.device).as_strided(value.shape, strides)
        except RuntimeError:
            pytest.skip("this machine does not lend that much address space")
        far[name] = view.copy_(value).requires_grad_(t[name].requires_grad)
    for name, result in ours(case, far, kernels.name).items():
        assert torch.equal(result, expected[name]), name


# ---- threads, processes, instruction sets ----


ISA_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from types import SimpleNamespace
import torch
from attention_cases import Case, exact, inputs, judge, ours, pairwise, torch_own
from oracle import Oracle
from pyops import backend
assert backend._C.cpu_isa == {level!r}, backend._C.cpu_isa
sizes = [dict(shape=(2, 2, 17, 16), S=23), dict(shape=(1, 4, 33, 24), S=70, Hk=2, Ev=8),
         dict(shape=(2, 3, 1, 64), S=140), dict(shape=(1, 2, 130, 40), S=64, Ev=65),
         dict(shape=(1, 2, 20, 5), S=19, Ev=3)]
masks = [dict(), dict(mask="bool", mask_dims="bs"), dict(mask="bias", mask_dims="hls"), dict(mask="float")]
with Oracle({level!r}, mean=True) as oracle:
    for case in pairwise(4, size=sizes, dtype=(torch.float32, torch.bfloat16, torch.float16, torch.float64), mask=masks,
                         is_causal=(False, True), softcap=(0.0, 3.0), p=(0.0, 0.2), alibi=("", "h"), lse=(False, True)):
        judge(oracle, case, SimpleNamespace(name="cpu", device="cpu"))
    # Backward must find forward's scores again to the bit: one key has all of the weight.
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(shape=(1, 1, 20, 64), S=300, scale=1e5, dtype=dtype)
        t = inputs(case, "cpu")
        oracle.check(case, ours(case, t, "cpu")["dv"], torch_own(case, t)["dv"], exact(case, t)["dv"])
print(oracle.cases)
"""
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")


@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(backend._C.cpu_isa_best) + 1] if backend._C else ())
def test_instruction_set(level: str) -> None:
    """The kernels compiled for every instruction set of this processor are right."""
    script = ISA_SCRIPT.format(tests=str(TESTS), level=level)
    environment = os.environ | {"PYOPS_CPU_ISA": level}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 50


# ---- jagged nested tensors ----


def jagged(*lengths: int, heads: int = 2, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf (B, j, H, E)."""
    generator = torch.Generator().manual_seed(sum(lengths))
    parts = [torch.randn(n, heads, size, generator=generator).to(dtype) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("changes", [{}, {"is_causal": True}, {"window": (2, 1)}, {"return_lse": True}], ids=str)
def test_jagged(backend: Target, changes: dict[str, Any]) -> None:
    """(B, H, j, E), as torch's own function takes it: one call for each sequence, of the same values."""
    if backend.device == "cuda":
        pytest.skip("made on the CPU here")
    leaves = [jagged(*n, dtype=dtype_of(backend)) for n in ((5, 3, 4), (7, 2, 4))]
    query, key = (t.transpose(1, 2) for t in leaves)
    out = pyops.scaled_dot_product_attention(query, key, key, **changes, backend=backend.name)
    out, lse = out if changes.get("return_lse") else (out, None)
    assert out.is_nested
    assert out.shape == query.shape
    gradients = torch.autograd.grad(out.values().float().square().sum(), leaves)
    for b, (q, k) in enumerate(zip(leaves[0].unbind(), leaves[1].unbind())):
        q, k = (t.detach().transpose(0, 1)[None].requires_grad_() for t in (q, k))
        alone = pyops.scaled_dot_product_attention(q, k, k, **changes, backend=backend.name)
        alone, alone_lse = alone if lse is not None else (alone, None)
        torch.testing.assert_close(out.transpose(1, 2).unbind()[b].transpose(0, 1)[None], alone)
        if lse is not None:
            torch.testing.assert_close(lse.transpose(1, 2).unbind()[b].transpose(0, 1)[None], alone_lse)
        for nested, gradient in zip(gradients, torch.autograd.grad(alone.float().square().sum(), (q, k))):
            torch.testing.assert_close(nested.unbind()[b].transpose(0, 1)[None], gradient)


@pytest.mark.parametrize("is_causal", [False, True])
def test_jagged_compiles(is_causal: bool) -> None:
    x = jagged(5, 3, 4).detach().transpose(1, 2)

    def f(x: Tensor) -> Tensor:
        return pyops.scaled_dot_product_attention(x, x, x, is_causal=is_causal, backend="cpu")

    expected = f(x)
    found = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found.values(), expected.values())


def test_jagged_is_explained() -> None:
    x = jagged(5, 3, 4).transpose(1, 2)
    explanation = pyops.explain("scaled_dot_product_attention", x, x, x)
    assert explanation.chosen == "cpu"
    assert explanation.reasons["cpu"] == "chosen"


def test_jagged_errors() -> None:
    query, other = jagged(5, 3).transpose(1, 2), jagged(4, 4).transpose(1, 2)
    sdpa = pyops.scaled_dot_product_attention
    with pytest.raises(TypeError, match=r"key must be jagged, of shape \(B, H, j, E\), when query is nested, got str"):
        sdpa(query, "key", query)
    with pytest.raises(TypeError, match=r"key must be jagged, .*, got torch.strided of "):
        sdpa(query, torch.randn(2, 2, 5, 8), query)
    with pytest.raises(TypeError, match=r"query must be jagged"):
        sdpa(jagged(5, 3), query, query)
    with pytest.raises(ValueError, match=r"value must have the lengths of key"):
        sdpa(query, query, other)
    with pytest.raises(ValueError, match=r"key must have the batch size of query, 2, got 1"):
        sdpa(query, jagged(5).transpose(1, 2), jagged(5).transpose(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once per process that these are a prototype
        strided = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 4, 8)])
    with pytest.raises(TypeError, match=r"query must be jagged"):
        sdpa(strided, strided, strided)
    with pytest.raises(TypeError, match=r"key must be jagged, .*, got a strided nested one"):
        sdpa(query, strided, strided)
    with pytest.raises(TypeError, match=r"key must be a strided tensor, got a nested one"):
        sdpa(torch.randn(2, 2, 5, 8), query, query)


# ---- dropout draws one seed ----


def test_no_randomness_without_dropout(backend: Target) -> None:
    case = supported(Case(mask="bool"), backend)
    t = inputs(case, backend.device)
    state = torch.get_rng_state()
    apply(case, t, backend.name)
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_beside_math(backend: Target) -> None:
    """dropout_p applies whenever it is above 0, as in torch: there is no training flag."""
    case = supported(Case(p=0.5), backend)
    t = inputs(case, backend.device)
    torch.manual_seed(1)
    first = apply(case, t, backend.name)["out"]
    second = apply(case, t, backend.name)["out"]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, apply(case, t, backend.name)["out"])
