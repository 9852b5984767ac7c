"""Attention under what PyTorch does to functions: compile, export, torch.func, checkpointing, autocast, modes."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    SEED,
    Case,
    apply,
    call,
    check,
    dtype_of,
    ends,
    exact,
    formula,
    inputs,
    leaves_of,
    ours,
    with_gradients,
)
from conftest import TARGETS, Target
from oracle import Oracle
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import pyops
from pyops import attention
from pyops.attention import Config

SMALL: dict[str, Any] = {"shape": (2, 2, 9, 16), "S": 11}
PACKED: dict[str, Any] = {"shape": (1, 2, 1, 16), "lengths": ((5, 7), (3, 3), (4, 2))}
CASES = [
    Case(**SMALL),
    Case(**SMALL, Hk=1, Ev=8, is_causal=True, causal="bottom-right", layout="heads_last"),
    Case(**SMALL, mask="bias", mask_dims="hls", sinks=True, lse=True),
    Case(**SMALL, mask="bool", mask_dims="bs", softcap=2.0, window=(4, 3)),
    Case(**SMALL, mask="bias", mask_dims="bl", alibi="bh", lse=True),
    Case(**SMALL, p=0.3),
    Case(**PACKED, is_causal=True),
    Case(**PACKED, mask="bias", mask_dims="bls", alibi="h", sinks=True, lse=True, p=0.3),
]
PLAIN = [c for c in CASES if c.p == 0]
DENSE = [c for c in PLAIN if not c.lengths]


@pytest.fixture(params=["eager", "cpu"])
def quick(request: pytest.FixtureRequest) -> Target:
    """For transforms that act above the kernels: one way with kernels, one without."""
    return Target(request.param, "cpu")


@pytest.fixture(params=[target for target in TARGETS if target.name in ("cpu", "triton")], ids=str)
def wide_kernels(request: pytest.FixtureRequest) -> Target:
    """The kernels that have float64."""
    return request.param


def with_eager(cases: list[Any], of_eager: list[Any]) -> list[Any]:
    """Parameters (target, case): all cases on the CPU kernels; of the definition, which takes the compiler ten times as
    long, ``of_eager`` in the quick tier."""
    chosen = [pytest.param(Target("cpu", "cpu"), case, id=f"cpu-{case}") for case in cases]
    marks = {True: (), False: (pytest.mark.full,)}
    return chosen + [
        pytest.param(Target("eager", "cpu"), case, id=f"eager-{case}", marks=marks[case in of_eager]) for case in cases
    ]


def judge_results(label: str, case: Case, t: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    with Oracle(label) as oracle:
        check(oracle, case, t, results)


def served(case: Case, target: Target) -> Case:
    return replace(case, dtype=dtype_of(target))


# ---- operators ----


def operator_arguments(case: Case, backend: Target) -> tuple[tuple, tuple]:
    """Arguments of pyops::attention_fwd and pyops::attention_bwd."""
    t = {n: v.detach() for n, v in inputs(case, backend.device).items()}
    seed = torch.tensor([3, 5], device=backend.device) if case.p else None
    left, right = case.window or (-1, -1)
    cu_q, cu_k, max_q, max_k = ends(case, backend.device) if case.lengths else (None, None, 0, 0)
    config = Config(
        scale=case.scale, left=left, right=0 if case.is_causal else right, bottom_right=case.causal == "bottom-right",
        softcap=case.softcap, p=case.p, max_q=max_q, max_k=max_k, return_lse=case.lse,
        differentiated=True, backend=backend.name,
    )  # fmt: skip
    if case.lengths:
        t |= {n: t[n].transpose(0, 1)[None] for n in ("q", "k", "v", "dout")}
        t |= {"dlse": t["dlse"].transpose(0, 1)[None]} if case.lse else {}
    slopes, sinks = t.get("slopes"), t.get("sinks")
    if slopes is not None:
        slopes = slopes.expand(case.sizes["b"], case.sizes["h"]).contiguous()
    sinks = None if sinks is None else sinks.float()
    mask = t.get("mask")
    tensors = (t["q"], t["k"], t["v"], mask, slopes, sinks, seed, cu_q, cu_k)
    out, _, residue, stats = torch.ops.pyops.attention_fwd(*tensors, *config)
    residue = residue if residue.numel() else None
    needs = [True, True, True, mask is not None and mask.is_floating_point(), sinks is not None]
    return (*tensors, *config), (t["dout"], t.get("dlse"), *tensors, out, residue, stats, *config, needs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators(kernels: Target, case: Case) -> None:
    """Schema, fake results, and what aot_autograd makes of them, by torch's own checker."""
    forward, backward = operator_arguments(served(case, kernels), kernels)
    tests = ("test_schema", "test_faketensor")
    if kernels.name == "cpu":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.pyops.attention_fwd.default, forward, test_utils=tests)
    torch.library.opcheck(torch.ops.pyops.attention_bwd.default, backward, test_utils=tests)


def test_backward_operator_skips_gradients() -> None:
    _, backward = operator_arguments(CASES[2], Target("cpu", "cpu"))
    for at in range(5):
        needs = [i == at for i in range(5)]
        torch.library.opcheck(torch.ops.pyops.attention_bwd.default, (*backward[:-1], needs))
        for result, needed in zip(torch.ops.pyops.attention_bwd(*backward[:-1], needs), needs):
            assert bool(result.numel()) == needed


# ---- torch.compile ----


def compiled_results(case: Case, t: dict[str, Tensor], backend: str | None, compiler: str) -> dict[str, Tensor]:
    """Outputs and gradients of the compiled function, which was first compiled for another shape."""

    def f(q: Tensor, others: dict[str, Tensor]) -> dict[str, Tensor]:
        return apply(case, {"q": q.neg().neg(), **others}, backend)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=compiler)
    B, H, L, E = case.shape
    other = case if case.lengths else replace(case, shape=(B + 1, H, L + 2, E), S=case.S + 3)
    for chosen in (other, case):
        now = t if chosen is case else inputs(other, t["q"].device.type)
        used = {n: v for n, v in now.items() if n not in ("q", "dout", "dlse")}
        torch.manual_seed(SEED)
        results = with_gradients(compiled(now["q"], used), now)
    return results


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize(("target", "case"), with_eager(CASES, [CASES[3]]))
def test_compile(target: Target, case: Case) -> None:
    """fullgraph, dynamic shapes, forward and backward; with an operation before it, so that backward goes on."""
    t = inputs(case, target.device)
    judge_results(f"compiled on {target}", case, t, compiled_results(case, t, target.name, "aot_eager"))


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=str)
def test_compile_with_inductor(case: Case) -> None:
    """Through code generation. Dropout draws from the compiler's generator there, so only its statistics are known."""
    if case.p:
        case = replace(case, Ev=case.S)
    t = inputs(case, "cpu")
    if case.p:
        t["v"] = torch.eye(case.S).expand(2, 2, -1, -1).clone().requires_grad_()
    results = compiled_results(case, t, "cpu", "inductor") if case.p == 0 else None
    if results is not None:
        judge_results("inductor", case, t, results)
        return
    compiled = torch.compile(lambda t: apply(case, t, "cpu")["out"] * 1, fullgraph=True)
    out = compiled({n: v for n, v in t.items() if n != "dout"})
    assert 0.5 < (out != 0).float().mean() < 0.9
    (dv,) = torch.autograd.grad(out, t["v"], torch.ones_like(out))
    assert torch.equal((dv != 0).all(-1), (out != 0).any(-2)), "backward has the mask of forward"


@pytest.mark.usefixtures("fresh_compile")
def test_compile_of_one_graph_for_all_lengths(quick: Target) -> None:
    """No second compilation for other lengths, batch sizes or packings."""

    def f(q: Tensor, cu: Tensor, longest: int) -> Tensor:
        packed = pyops.varlen_attention(q, q, q, cu, cu, longest, longest, is_causal=True, backend=quick.name)
        x = q.transpose(0, 1)[None]
        return packed + pyops.scaled_dot_product_attention(x, x, x, backend=quick.name)[0].transpose(0, 1)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((5, 4), (3, 9, 2), (7, 2, 11, 4)):
        q = torch.randn(sum(lengths), 2, 8, requires_grad=True)
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        with torch.compiler.set_stance("fail_on_recompile" if len(lengths) > 2 else "default"):
            actual = compiled(q, cu, max(lengths))
        expected = f(q, cu, max(lengths))
        torch.testing.assert_close(actual, expected)
        for a, b in zip(torch.autograd.grad(actual.sum(), q), torch.autograd.grad(expected.sum(), q)):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fresh_compile")
def test_compile_when_nothing_is_named() -> None:
    """The automatic choice, use_backend, no gradients and one tensor for all three inputs compile too."""
    q = torch.randn(2, 2, 9, 8, requires_grad=True)
    compiled = torch.compile(
        lambda q: pyops.scaled_dot_product_attention(q, q, q, is_causal=True) * 2, fullgraph=True, backend="aot_eager"
    )
    expected = pyops.scaled_dot_product_attention(q, q, q, is_causal=True) * 2
    assert torch.equal(compiled(q), expected)
    gradients = [torch.autograd.grad(y.square().sum(), q)[0] for y in (compiled(q), expected)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert torch.equal(compiled(q), expected)
    with torch.inference_mode():
        assert torch.equal(compiled(q.detach()), expected)
    with pyops.use_backend("eager"):
        torch.testing.assert_close(compiled(q), expected)


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize(("target", "case"), with_eager(PLAIN, []))
def test_compile_of_grad(target: Target, case: Case) -> None:
    """compile(torch.func.grad(f)) ignores a custom backward of an opaque operator and would give zeros."""
    t = {n: v.detach() for n, v in inputs(case, target.device).items()}

    def f(q: Tensor) -> Tensor:
        return (apply(case, t | {"q": q}, target.name)["out"] * t["dout"]).sum()

    result = torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")(t["q"])
    assert result.any()
    torch.testing.assert_close(result, torch.func.grad(f)(t["q"]))


@pytest.mark.usefixtures("fresh_compile")
def test_compiled_double_backward_raises() -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    compiled = torch.compile(
        lambda q: pyops.scaled_dot_product_attention(q, q, q, backend="cpu"), fullgraph=True, backend="aot_eager"
    )
    (dq,) = torch.autograd.grad(compiled(q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dq.sum().backward()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch's own access
@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize(("target", "case"), with_eager([CASES[0], CASES[2], CASES[5], CASES[6]], []))
def test_compiled_autograd(target: Target, case: Case) -> None:
    """The backward pass captured at run time."""
    t = inputs(case, target.device)
    expected = ours(case, t, target.name)
    loss = sum((o * t[f"d{n}"]).sum() for n, o in call(case, t, target.name).items())
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    for name, leaf in leaves_of(t).items():
        torch.testing.assert_close(leaf.grad, expected[f"d{name}"])


@pytest.mark.parametrize(("target", "case"), with_eager(CASES, [CASES[3]]))
def test_make_fx(target: Target, case: Case) -> None:
    """Tracing forward and backward, with symbolic sizes, then running the graph."""
    t = inputs(case, target.device)
    names, values = leaves_of(t).keys(), list(leaves_of(t).values())

    def f(*leaves: Tensor) -> tuple[Tensor, ...]:
        used = t | dict(zip(names, leaves))
        return tuple(with_gradients(apply(case, used, target.name), used).values())

    torch.manual_seed(SEED)
    expected = f(*values)
    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    graph = make_fx(f, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*values)
    torch.manual_seed(SEED)
    for a, b in zip(graph(*values), expected):
        torch.testing.assert_close(a, b)


class SelfAttention(nn.Module):
    """A small causal block, as users write it."""

    def __init__(self, backend: str | None, **options: Any):
        super().__init__()
        self.qkv, self.out, self.backend, self.options = nn.Linear(16, 48), nn.Linear(16, 16), backend, options

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, 2, 8)).transpose(1, 3)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        y = pyops.scaled_dot_product_attention(q, k, v, is_causal=True, backend=self.backend, **self.options)
        return self.out(y.transpose(1, 2).flatten(2))


EXPORTED = [{}, {"softcap": 5.0, "window": (3, 0), "causal": "bottom-right"}]


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("target", "options"), with_eager(EXPORTED, []))
def test_export(target: Target, options: dict[str, Any], strict: bool) -> None:
    """Exported with dynamic batch size and length, saved, loaded."""
    module = SelfAttention(target.name, **options)
    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    program = torch.export.export(module, (torch.randn(3, 7, 16),), dynamic_shapes=(dims,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = torch.randn(5, 12, 16)
    torch.testing.assert_close(loaded(x), module(x))


# ---- torch.func ----


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_func_grad(kernels: Target, case: Case) -> None:
    """torch.func.grad of every leaf equals autograd's."""
    case = served(case, kernels)
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    given = {n: v.detach() for n, v in t.items()}
    names = list(leaves_of(t))

    def f(*leaves: Tensor) -> Tensor:
        outputs = call(case, given | dict(zip(names, leaves)), kernels.name)
        finite = {n: torch.where(o.isinf(), 0.0, o) for n, o in outputs.items()}
        return sum((o.float() * given[f"d{n}"]).sum() for n, o in finite.items())

    gradients = torch.func.grad(f, argnums=tuple(range(len(names))))(*(given[n] for n in names))
    for name, gradient in zip(names, gradients):
        torch.testing.assert_close(gradient, expected[f"d{name}"])


DERIVATIVES = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,)),
    "linearize": lambda f, x, v: torch.func.linearize(f, x)[1](v),
    "vjp": lambda f, x, v: torch.func.vjp(f, x)[1](v),
    "jacrev": lambda f, x, _: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, _: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, v: torch.func.hessian(lambda x: (f(x) * v).sum())(x),
    "grad of grad": lambda f, x, v: torch.func.grad(
        lambda x: (torch.func.grad(lambda x: (f(x) * v).sum())(x) ** 2).sum()
    )(x),
    "jvp of grad": lambda f, x, v: torch.func.jvp(torch.func.grad(lambda x: (f(x) ** 2 * v).sum()), (x,), (v,)),
    "grad of jvp": lambda f, x, v: torch.func.grad(lambda x: (torch.func.jvp(f, (x,), (v,))[1] ** 2).sum())(x),
    "vmap of grad": lambda f, x, v: torch.func.vmap(torch.func.grad(lambda x, v: (f(x) * v).sum()))(
        torch.stack([x, v]), torch.stack([v, x])
    ),
    "grad of vmap": lambda f, x, v: torch.func.grad(lambda x: torch.func.vmap(f)(x).square().sum())(
        torch.stack([x, v])
    ),
    "vmap of vmap": lambda f, x, v: torch.func.vmap(torch.func.vmap(f))(torch.stack([x, v]).repeat(2, 1, 1, 1)[None]),
    "vmap over the last": lambda f, x, v: torch.func.vmap(f, in_dims=-1, out_dims=-1)(torch.stack([x, v], -1)),
    "chunked vmap": lambda f, x, v: torch.func.vmap(f, chunk_size=2)(torch.stack([x, v, x])),
}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "options": {"softcap": 2.0, "window": (2, 1), "scale": 0.7},
    "sinks": {"sinks": torch.tensor([0.3, -0.2], dtype=torch.float64)},
    "bias": {"attn_mask": torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(2, 3, 5)},
    "mask": {"attn_mask": torch.arange(15).reshape(3, 5) % 4 > 0},
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch.func.linearize
@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("options", FUNCTIONS.values(), ids=FUNCTIONS)
def test_func(wide_kernels: Target, options: dict[str, Any], name: str) -> None:
    """Every transform gives in float64 what it gives for the formula. x is the query; keys and values depend on it."""
    interpreted = wide_kernels.name == "triton" and wide_kernels.device == "cpu"
    if interpreted and not ("vmap" in name or (name == "jacrev" and "sinks" in options)):
        pytest.skip("the CPU kernels stand for the interpreter")
    generator = torch.Generator().manual_seed(5)
    x, v = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(wide_kernels.device) for _ in range(2))
    others = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64).to(wide_kernels.device)
    options = {n: o.to(wide_kernels.device) if isinstance(o, Tensor) else o for n, o in options.items()}
    fields = {n: o for n, o in options.items() if not isinstance(o, Tensor)}
    case = Case(shape=(1, 2, 3, 4), S=5, dtype=torch.float64, **fields)

    def tensors(x: Tensor) -> dict[str, Tensor]:
        return {"q": x[None], "k": torch.cat([x, others], -2)[None], "v": torch.cat([others, x], -2)[None].sin()}

    def mine(x: Tensor) -> Tensor:
        t = {n: a[0] for n, a in tensors(x).items()}
        out, lse = pyops.scaled_dot_product_attention(
            t["q"], t["k"], t["v"], **options, return_lse=True, backend=wide_kernels.name
        )
        return out + lse[..., None]

    def theirs(x: Tensor) -> Tensor:
        given = {"mask": options.get("attn_mask"), "sinks": options.get("sinks")}
        outputs = formula(case, tensors(x) | {n: o for n, o in given.items() if o is not None}, None)
        return outputs["out"][0] + outputs["lse"][0, ..., None]

    torch.testing.assert_close(DERIVATIVES[name](mine, x, v), DERIVATIVES[name](theirs, x, v))


BATCHED = {
    "query": (0, None, None, None),
    "key and value": (None, 0, 0, None),
    "all": (0, 0, 0, None),
    "mask": (None, None, None, 0),
    "all and mask": (0, 0, 0, 0),
    "other dimensions": (2, 1, 3, 1),
    "mask of one batch entry": (0, 0, 0, "one"),
}


@pytest.mark.parametrize("which", BATCHED)
@pytest.mark.parametrize("kind", ["bool", "bias", ""])
def test_vmap(kernels: Target, which: str, kind: str) -> None:
    """What is vmapped and what is shared, in any combination; gradients too."""
    *dims, mask_dim = BATCHED[which]
    if not kind and mask_dim is not None:
        pytest.skip("has no mask")
    if kind != "bias" and kernels.name == "triton" and kernels.device == "cpu":
        pytest.skip("the CPU kernels stand for the interpreter")
    dtype, N, B = dtype_of(kernels), 3, 2
    shapes = [(B, 2, 5, 8), (B, 2, 7, 8), (B, 2, 7, 8)]
    tensors = [torch.randn(N, *s).to(kernels.device, dtype).movedim(0, d) if d is not None
               else torch.randn(s).to(kernels.device, dtype) for s, d in zip(shapes, dims)]  # fmt: skip
    if kind:
        shape = (B if mask_dim != "one" else 1, 1, 5, 7)
        mask_dim = 0 if mask_dim == "one" else mask_dim
        mask = torch.randn(shape if mask_dim is None else (N, *shape)).to(kernels.device, dtype)
        mask = mask if mask_dim in (None, 0) else mask.movedim(0, mask_dim)
        tensors.append(mask > -0.5 if kind == "bool" else mask)
        dims.append(mask_dim)

    def one(*args: Tensor) -> Tensor:
        return pyops.scaled_dot_product_attention(*args, backend=kernels.name)

    def alone(f: Callable, i: int) -> Any:
        return f(*(t if d is None else t.select(d, i) for t, d in zip(tensors, dims)))

    batched = torch.vmap(one, in_dims=tuple(dims))(*tensors)
    torch.testing.assert_close(batched, torch.stack([alone(one, i) for i in range(N)]))
    count = 4 if kind == "bias" else 3
    grad = torch.func.grad(lambda *args: one(*args).float().square().sum(), argnums=tuple(range(count)))
    gradients = torch.vmap(grad, in_dims=tuple(dims))(*tensors)
    for i in range(N):
        for mine, expected in zip(gradients, alone(grad, i)):
            torch.testing.assert_close(mine[i], expected)


def test_vmap_over_heads_parameters(kernels: Target) -> None:
    """An ensemble whose members have their own slopes and sinks."""
    dtype = dtype_of(kernels)
    q, k = (torch.randn(2, 2, n, 8).to(kernels.device, dtype) for n in (5, 7))
    slopes, sinks = torch.rand(3, 2, device=kernels.device), torch.randn(3, 2, device=kernels.device)

    def f(slopes: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return pyops.scaled_dot_product_attention(
            q, k, k, alibi_slopes=slopes, sinks=sinks, return_lse=True, backend=kernels.name
        )

    for dims in ((0, None), (None, 0), (0, 0)):
        given = [t if d == 0 else t[0] for t, d in zip((slopes, sinks), dims)]
        batched = torch.vmap(f, in_dims=dims)(*given)
        for i in range(3):
            for mine, expected in zip(batched, f(*(t if d is None else t[i] for t, d in zip(given, dims)))):
                torch.testing.assert_close(mine[i], expected)


def test_vmap_of_packed(kernels: Target) -> None:
    case = served(CASES[6], kernels)
    t = inputs(case, kernels.device)
    q = torch.stack([t["q"].detach(), t["q"].detach().flip(0)])

    def f(q: Tensor) -> Tensor:
        return apply(case, t | {"q": q}, kernels.name)["out"]

    torch.testing.assert_close(torch.vmap(f)(q), torch.stack([f(one) for one in q]))


def test_vmap_over_nothing(kernels: Target) -> None:
    q = torch.randn(0, 2, 5, 8, device=kernels.device, dtype=dtype_of(kernels))
    for p in (0.0, 0.5):
        out = torch.vmap(
            lambda q, p=p: pyops.scaled_dot_product_attention(q, q, q, dropout_p=p, backend=kernels.name),
            randomness="same",
        )(q)
        assert out.shape == q.shape


@pytest.mark.parametrize("randomness", ["different", "same", "error"])
def test_vmap_of_dropout(kernels: Target, randomness: str) -> None:
    dtype = dtype_of(kernels)
    q = torch.zeros(3, 1, 16, 8, device=kernels.device, dtype=dtype)
    v = torch.eye(16, device=kernels.device, dtype=dtype)[None]

    def f(q: Tensor) -> Tensor:
        return pyops.scaled_dot_product_attention(q, q, v, dropout_p=0.5, backend=kernels.name) != 0

    batched = torch.vmap(f, randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            batched(q)
        return
    kept = batched(q)
    assert 0.4 < kept.float().mean() < 0.6
    equal = [torch.equal(kept[i], kept[j]) for i, j in ((0, 1), (1, 2), (0, 2))]
    assert equal == [randomness == "same"] * 3


def test_vmap_of_dropout_gradients(kernels: Target) -> None:
    """Backward inside vmap regenerates the masks of forward: with unit matrices both show it."""
    dtype = dtype_of(kernels)
    q = torch.zeros(3, 1, 16, 8, device=kernels.device, dtype=dtype)
    unit = torch.eye(16, device=kernels.device, dtype=dtype)[None]

    def f(v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        out = pyops.scaled_dot_product_attention(q, q, v, dropout_p=0.5, backend=kernels.name)
        return (out * unit).sum(), out

    dv, out = torch.vmap(torch.func.grad(f, has_aux=True), in_dims=(None, 0), randomness="different")(unit, q)
    assert torch.equal(dv != 0, out.transpose(-1, -2) != 0)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_forward_mode(backend: Target, case: Case) -> None:
    """Dual numbers: the product of an output's tangent with an incoming gradient is that of the inputs' tangents with
    their gradients."""
    case = served(case, backend)
    t = inputs(case, backend.device)
    tangents = {n: torch.randn(t[n].shape).to(t[n]) for n in ("q", "k", "v")}
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(t[n].detach(), tangent) for n, tangent in tangents.items()}
        outputs = call(case, {n: v.detach() for n, v in t.items()} | duals, backend.name)
        found = {n: forward_ad.unpack_dual(o).tangent.double() for n, o in outputs.items()}
    for name, tangent in found.items():
        silent = {f"d{n}": torch.zeros_like(t[f"d{n}"]) for n in found if n != name}
        gradients = exact(case, t | silent)
        expected = sum((gradients[f"d{n}"] * v.double()).sum() for n, v in tangents.items())
        terms = tangent * t[f"d{name}"].double()
        assert abs(terms.sum() - expected) < 2e-3 * terms.abs().sum()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batched_gradients(kernels: Target, case: Case) -> None:
    """is_grads_batched: several incoming gradients at once."""
    case = replace(served(case, kernels), lse=False)
    t = inputs(case, kernels.device)
    out = call(case, t, kernels.name)["out"]
    dout = torch.stack([t["dout"], t["dout"] * 2, t["dout"].flip(0)])
    leaves = list(leaves_of(t).values())
    batched = torch.autograd.grad(out, leaves, dout, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for a, b in zip(batched, torch.autograd.grad(out, leaves, dout[i], retain_graph=True)):
            torch.testing.assert_close(a[i], b)


def test_legacy_jacobian(wide_kernels: Target) -> None:
    q = torch.randn(1, 1, 3, 4, dtype=torch.float64, device=wide_kernels.device)
    expected = torch.autograd.functional.jacobian(lambda q: F.scaled_dot_product_attention(q, q, q), q)
    for vectorize in (False, True):
        result = torch.autograd.functional.jacobian(
            lambda q: pyops.scaled_dot_product_attention(q, q, q, backend=wide_kernels.name), q, vectorize=vectorize
        )
        torch.testing.assert_close(result, expected)


# ---- checkpointing, saved tensors ----


def only_pyops(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    save = operator is torch.ops.pyops.attention_fwd.default
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(only_pyops)},
}


@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5], CASES[7]], ids=str)
def test_activation_checkpointing(kernels: Target, case: Case, options: dict) -> None:
    """Recomputed in backward, with the dropout mask of forward."""
    case = replace(served(case, kernels), lse=False)
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    names = list(leaves_of(t))

    def f(*leaves: Tensor) -> Tensor:
        return apply(case, t | dict(zip(names, leaves)), kernels.name)["out"]

    torch.manual_seed(SEED)
    checkpoint(f, *leaves_of(t).values(), **options).backward(t["dout"])
    for name in names:
        torch.testing.assert_close(t[name].grad, expected[f"d{name}"])


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7]], ids=str)
def test_saved_tensor_hooks(kernels: Target, case: Case) -> None:
    """What is saved passes through the user's hooks, and backward uses what they return."""
    case = served(case, kernels)
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    packed = []

    def pack(saved: Tensor) -> Tensor:
        packed.append(saved)
        return saved.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        outputs = call(case, t, kernels.name)
    assert packed
    for name, value in with_gradients(outputs, t).items():
        assert torch.equal(value, expected[name])


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["eager", "cpu", None])
def test_autocast(name: str | None, dtype: torch.dtype, cast_to: torch.dtype) -> None:
    """The dtype of autocast, but for float64, as in torch; gradients come back in the dtype of the inputs, and nothing
    within is cast a second time."""
    leaves = [torch.randn(2, 2, n, 16, dtype=dtype, requires_grad=True) for n in (5, 7, 7)]
    with torch.autocast("cpu", dtype=cast_to):
        out = pyops.scaled_dot_product_attention(*leaves, backend=name)
        theirs = F.scaled_dot_product_attention(*leaves)
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    assert out.dtype == theirs.dtype == (dtype if dtype == torch.float64 else cast_to)
    assert {g.dtype for g in gradients} == {dtype}
    cast = [t.detach().to(out.dtype).requires_grad_() for t in leaves]
    expected = pyops.scaled_dot_product_attention(*cast, backend=name)
    assert torch.equal(out, expected)
    for mine, other in zip(gradients, torch.autograd.grad(expected.float().square().sum(), cast)):
        assert torch.equal(mine, other.to(dtype))


def test_autocast_of_masks_and_mixed_inputs(backend: Target) -> None:
    """float32 masks stay what they are, of other dtypes are cast; query, key and value may differ before the cast."""
    if backend.device == "cuda":
        pytest.skip("autocast of the CPU")
    q, k = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 7, 16).half()
    masks = [torch.randn(5, 7, requires_grad=True), torch.randn(5, 7).half().requires_grad_(), torch.rand(5, 7) > 0.3]
    with torch.autocast("cpu", dtype=torch.float16):
        for mask in masks:
            out = pyops.scaled_dot_product_attention(q, k, k, mask, backend=backend.name)
            plain = pyops.scaled_dot_product_attention(q.half(), k, k, mask, backend=backend.name)
            assert out.dtype == torch.float16
            assert torch.equal(out, plain)
            if mask.requires_grad:
                assert torch.autograd.grad(out.float().sum(), mask)[0].dtype == mask.dtype


@pytest.mark.usefixtures("fresh_compile")
def test_autocast_inside_compile(quick: Target) -> None:
    module, x = SelfAttention(quick.name), torch.randn(3, 7, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, result = module(x), compiled(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_double_backward_under_autocast(name: str) -> None:
    """The definition's own products are not cast."""
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = pyops.scaled_dot_product_attention(q, q, q, backend=name)
            (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
            results.append(torch.autograd.grad(dq.square().sum(), q)[0])
    torch.testing.assert_close(*results)


# ---- modes and unusual tensors ----


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_tensors(kernels: Target, case: Case) -> None:
    """Shapes, dtypes and strides without values, forward and backward."""
    case = served(case, kernels)
    t = inputs(case, kernels.device)
    real = ours(case, t, kernels.name)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_t = {n: mode.from_tensor(v) for n, v in t.items()}
        fakes = with_gradients(apply(case, fake_t, kernels.name), fake_t)
    for name, value in real.items():
        assert fakes[name].shape == value.shape
        assert fakes[name].stride() == value.stride(), name
        assert fakes[name].dtype == value.dtype


def test_flop_counter(kernels: Target) -> None:
    """What torch's counter knows of torch's own attention: products over all pairs, five of them in backward."""
    dtype = dtype_of(kernels)
    q, k, v = (torch.randn(2, H, n, E, device=kernels.device, dtype=dtype, requires_grad=True)
               for H, n, E in ((4, 5, 16), (2, 7, 16), (2, 7, 8)))  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        pyops.scaled_dot_product_attention(q, k, v, enable_gqa=True, backend=kernels.name).sum().backward()
    pairs = 2 * 4 * 5 * 7
    found = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert found == {"pyops.attention_fwd": 2 * pairs * (16 + 8), "pyops.attention_bwd": 2 * pairs * (3 * 16 + 2 * 8)}
    case = served(CASES[6], kernels)
    t = inputs(case, kernels.device)
    with FlopCounterMode(display=False) as counter:
        apply(case, t, kernels.name)
    assert counter.get_total_flops() == 2 * 2 * (5 * 7 + 3 * 3 + 4 * 2) * (16 + 16)


class Logged(Tensor):
    """Sees every operator, like the wrapper subclasses of quantisation and distributed libraries."""

    seen: list[str] = []

    @staticmethod
    def __new__(cls, wrapped: Tensor) -> Logged:
        return Tensor._make_wrapper_subclass(cls, wrapped.shape, strides=wrapped.stride(), dtype=wrapped.dtype)

    def __init__(self, wrapped: Tensor):
        self.wrapped = wrapped

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))

        def unwrap(v: Any) -> Any:
            return v.wrapped if isinstance(v, Logged) else v

        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        return torch.utils._pytree.tree_map(lambda v: Logged(v) if isinstance(v, Tensor) else v, func(*args, **kwargs))


def test_wrapper_subclass(kernels: Target) -> None:
    """The subclass sees the operators, forward and backward, and the kernels see its inner tensors."""
    if kernels.device == "cuda":
        pytest.skip("the wrapper of this test has no device")
    q = torch.randn(1, 2, 5, 8, dtype=dtype_of(kernels), requires_grad=True)
    expected = pyops.scaled_dot_product_attention(q, q, q, is_causal=True, backend=kernels.name)
    (dq,) = torch.autograd.grad(expected.square().sum(), q)
    Logged.seen.clear()
    wrapped = Logged(q.detach()).requires_grad_()
    out = pyops.scaled_dot_product_attention(wrapped, wrapped, wrapped, is_causal=True, backend=kernels.name)
    assert type(out) is Logged
    assert torch.equal(out.wrapped, expected)
    (gradient,) = torch.autograd.grad(out.square().sum(), wrapped)
    assert torch.equal(gradient.wrapped, dq)
    assert {"pyops.attention_fwd.default", "pyops.attention_bwd.default"} <= set(Logged.seen)


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [CASES[2], CASES[7]], ids=str)
def test_dispatch_mode(kernels: Target, case: Case) -> None:
    """A mode sees one operator per direction, and changes no bit; also when only backward runs under it."""
    case = served(case, kernels)
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    with Counting() as mode:
        observed = ours(case, t, kernels.name)
    assert mode.seen.count("pyops.attention_fwd.default") == 1
    assert mode.seen.count("pyops.attention_bwd.default") == 1
    outputs = call(case, t, kernels.name)
    with Counting() as mode:
        late = with_gradients(outputs, t)
    assert mode.seen.count("pyops.attention_bwd.default") == 1
    for name, value in expected.items():
        assert torch.equal(observed[name], value)
        assert torch.equal(late[name], value)


def operators_of(f: Callable[[], Any]) -> list[str]:
    """The operators of pyops that a profiler sees."""
    with torch.profiler.profile() as profile:
        f()
    return [event.name for event in profile.events() if event.name.startswith("pyops::")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_calls_avoid_the_dispatcher(case: Case) -> None:
    """A small call would spend most of its time there."""
    t = inputs(case, "cpu")
    assert operators_of(lambda: ours(case, t, "cpu")) == []
    with torch.no_grad():
        assert operators_of(lambda: call(case, t, "cpu")) == []


def test_negative_view(kernels: Target) -> None:
    """imag of a conjugate: the memory holds the values with the other sign. (Of float16 there is no complex.)"""
    if kernels.name in ("simt", "cuda"):
        pytest.skip("the kernels serve 16 bits")
    q, k, v, dout = (
        torch.randn(1, 2, 5, 8, dtype=torch.complex64, device=kernels.device).conj().imag for _ in range(4)
    )
    assert q.is_neg()

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pyops.scaled_dot_product_attention(q, k, v, backend=kernels.name)

    expected = f(q.resolve_neg(), k.resolve_neg(), v.resolve_neg())
    assert torch.equal(f(q, k, v), expected)
    leaf = q.resolve_neg().clone().requires_grad_()
    out = f(leaf, k, v)
    (dq,) = torch.autograd.grad(out, leaf, dout, retain_graph=True)
    assert torch.equal(dq, torch.autograd.grad(out, leaf, dout.resolve_neg())[0])


def test_zero_tensor(kernels: Target) -> None:
    """torch's zero tensors have no memory; autograd may send one as a gradient."""
    dtype = dtype_of(kernels)
    leaf = torch.randn(1, 2, 5, 8, device=kernels.device, dtype=dtype, requires_grad=True)
    zeros = torch._efficientzerotensor((1, 2, 5, 8), device=kernels.device, dtype=dtype)
    out = pyops.scaled_dot_product_attention(leaf, leaf, leaf, backend=kernels.name)
    assert not torch.autograd.grad(out, leaf, zeros)[0].any()
    assert not pyops.scaled_dot_product_attention(leaf, leaf, zeros, backend=kernels.name).any()


def test_expanded_gradient(kernels: Target) -> None:
    """out.sum() sends a gradient whose strides are all 0."""
    case = served(CASES[0], kernels)
    t = inputs(case, kernels.device)
    t["dout"] = torch.ones(1, device=kernels.device, dtype=case.dtype).expand(t["dout"].shape)
    judge_results(f"expanded gradient on {kernels}", case, t, ours(case, t, kernels.name))


def test_jit_trace() -> None:
    """A trace holds torch's own operators: it can be saved, and gives what the eager call gives."""
    module, x = SelfAttention(None, softcap=3.0), torch.randn(3, 7, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; it warns of Python values too
        traced = torch.jit.trace(module, x)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
    torch.testing.assert_close(traced(x), module(x))


class Traced(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return attention.scaled_dot_product_attention(q, k, k, is_causal=True)


def test_fx_keeps_calls_as_nodes() -> None:
    traced = torch.fx.symbolic_trace(Traced())
    called = [n.target.__name__ for n in traced.graph.nodes if n.op == "call_function"]
    assert called == ["scaled_dot_product_attention"]
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    assert torch.equal(traced(q, k), Traced()(q, k))
    public = torch.fx.symbolic_trace(lambda q, k: pyops.layer_norm(pyops.scaled_dot_product_attention(q, k, k), (8,)))
    expected = pyops.layer_norm(pyops.scaled_dot_product_attention(q, k, k), (8,))
    assert torch.equal(public(q, k), expected)


def test_backward_on_another_thread(kernels: Target) -> None:
    """Backward runs on autograd's own thread when the graph lives on a device; here, on a user's second thread."""
    case = served(CASES[5], kernels)
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    found: dict[str, Tensor] = {}
    outputs = call(case, t, kernels.name)
    thread = threading.Thread(target=lambda: found.update(with_gradients(outputs, t)))
    thread.start()
    thread.join()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name])
