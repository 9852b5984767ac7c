"""layer_norm under what PyTorch does to functions: compile, export, torch.func, checkpointing, autocast, modes."""

from __future__ import annotations

import copy
import importlib
import io
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Target
from layer_norm_cases import SEED, Case, apply, call, exact, exact_outputs, inputs, ours, torch_outputs, torch_own
from oracle import Oracle
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import pyops
from pyops.backend import OPERATIONS
from pyops.layer_norm import Config

CASES = [
    Case(shape=(5, 33)),
    Case(shape=(3, 4, 40), memory_efficient=True, zero_centred=True),
    Case(op="rms_norm", shape=(5, 33), affine="w"),
    Case(op="rms_norm", shape=(5, 33), affine="w", memory_efficient=True),
    Case(op="add_layer_norm", shape=(5, 33)),
    Case(op="add_layer_norm", shape=(5, 33), p=0.3),
    Case(op="layer_norm2d", shape=(2, 9, 3, 5)),
    Case(op="layer_norm2d", shape=(2, 9, 3, 5), layout="channels_last"),
]
PLAIN = [c for c in CASES if c.p == 0]
MODULES = [pyops.nn.LayerNorm, pyops.nn.RMSNorm, pyops.nn.LayerNorm2d]


@pytest.fixture(params=["eager", "cpu"])
def quick(request: pytest.FixtureRequest) -> Target:
    """For transforms that act above the kernels: one way with kernels, one without."""
    return Target(request.param, "cpu")


def judge_results(label: str, case: Case, t: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    with Oracle(label) as oracle:
        oracle.check_all(case, results, torch_own(case, t), exact(case, t))


def leaves_of(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v for n, v in t.items() if v.requires_grad}


def objective(case: Case, t: dict[str, Tensor], backend: str | None) -> Tensor:
    """A scalar that uses every output, with the incoming gradients as weights."""
    return sum((o * t[f"d{n}"]).sum() for n, o in call(case, t, backend).items())


# ---- operators ----


def operator_arguments(case: Case, backend: Target) -> tuple[tuple, tuple]:
    """Arguments of pyops::layer_norm_fwd and pyops::layer_norm_bwd."""
    t = {n: v.detach() for n, v in inputs(case, backend.device).items()}
    seed = torch.tensor([3, 5], device=backend.device) if case.p else None
    config = Config(
        dims=case.dims, channels_first=case.op == "layer_norm2d", eps=case.eps, weight_offset=float(case.zero_centred),
        p=case.p, rms=case.op == "rms_norm", from_output=case.memory_efficient, backend=backend.name,
    )  # fmt: skip
    forward = (t["x"], t.get("residual"), t.get("weight"), t.get("bias"), seed, *config)
    y, total, stats = torch.ops.pyops.layer_norm_fwd(*forward)
    saved = y if case.memory_efficient else total if "residual" in t else t["x"]
    needs = [True, "residual" in t, "weight" in t, "bias" in t]
    backward = (t["dy"], t.get("dsum"), saved, t.get("weight"), t.get("bias"), stats, seed, *config, needs)
    return forward, backward


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators(kernels: Target, case: Case) -> None:
    """Schema, fake results, and what aot_autograd makes of them, by torch's own checker."""
    forward, backward = operator_arguments(case, kernels)
    tests = ("test_schema", "test_faketensor")
    if kernels.name == "cpu":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.pyops.layer_norm_fwd.default, forward, test_utils=tests)
    torch.library.opcheck(torch.ops.pyops.layer_norm_bwd.default, backward, test_utils=tests)


@pytest.mark.parametrize(
    "needs", [[True, False, False, False], [False, False, True, False], [False, False, False, True]]
)
def test_backward_operator_skips_gradients(needs: list[bool]) -> None:
    _, backward = operator_arguments(Case(), Target("cpu", "cpu"))
    torch.library.opcheck(torch.ops.pyops.layer_norm_bwd.default, (*backward[:-1], needs))
    for result, needed in zip(torch.ops.pyops.layer_norm_bwd(*backward[:-1], needs), needs):
        assert bool(result.numel()) == needed


# ---- torch.compile ----


def compiled_results(case: Case, t: dict[str, Tensor], backend: str | None, compiler: str) -> dict[str, Tensor]:
    """Outputs and gradients of the compiled function, which was first compiled for another shape."""

    def f(x: Tensor, others: dict[str, Tensor]) -> dict[str, Tensor]:
        return apply(case, {"x": x.neg().neg(), **others}, backend)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=compiler)
    small = (*(n + 1 for n in case.shape[:1]), *case.shape[1:])
    for shape in (small, case.shape):
        now = t if shape == case.shape else inputs(replace(case, shape=shape), t["x"].device.type)
        leaves = leaves_of(now)
        x = leaves.pop("x")
        torch.manual_seed(SEED)
        outputs = compiled(x, leaves)
        gradients = torch.autograd.grad(
            list(outputs.values()), list(leaves_of(now).values()), [now[f"d{n}"] for n in outputs]
        )
    return {n: o.detach() for n, o in outputs.items()} | {f"d{n}": g for n, g in zip(leaves_of(t), gradients)}


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compile(quick: Target, case: Case) -> None:
    """fullgraph, dynamic shapes, forward and backward; with an operation before it, so that backward goes on."""
    t = inputs(case, quick.device)
    judge_results(f"compiled on {quick}", case, t, compiled_results(case, t, quick.name, "aot_eager"))


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_compile_with_inductor(case: Case) -> None:
    """Through code generation. Dropout draws from the compiler's generator there, so only its statistics are known."""
    t = inputs(case, "cpu")
    results = compiled_results(case, t, "cpu", "inductor")
    if case.p == 0:
        judge_results("inductor", case, t, results)
    else:
        kept = results["dx"] != 0
        assert torch.equal(kept, results["sum"] != t["residual"])
        assert 0.4 < kept.float().mean() < 0.95


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("module_class", MODULES)
def test_compile_modules(quick: Target, module_class: type) -> None:
    """A module inside a model, one graph; recompiled for no second batch size."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), module_class(8, backend=quick.name), nn.ReLU())
    if module_class is not pyops.nn.LayerNorm2d:
        model = nn.Sequential(nn.Linear(3, 8), module_class(8, backend=quick.name), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (4, 7, 2):
        shape = (size, 3, 5, 6) if module_class is pyops.nn.LayerNorm2d else (size, 5, 3)
        x = torch.randn(shape)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        with torch.compiler.set_stance("fail_on_recompile" if size != 4 else "default"):
            actual = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fresh_compile")
def test_compile_when_nothing_is_named() -> None:
    """The automatic choice, use_backend and no gradients compile too."""
    x, w = torch.randn(4, 16), torch.randn(16)
    compiled = torch.compile(lambda x: pyops.layer_norm(x, 16, w) * 2, fullgraph=True, backend="aot_eager")
    expected = pyops.layer_norm(x, 16, w) * 2
    assert torch.equal(compiled(x), expected)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)
    with torch.inference_mode():
        assert torch.equal(compiled(x), expected)
    with pyops.use_backend("eager"):
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_compile_of_grad(quick: Target, case: Case) -> None:
    """compile(torch.func.grad(f)) ignores a custom backward of an opaque operator and would give zeros."""
    t = inputs(case, quick.device)
    x = t["x"].detach()
    others = {n: v.detach() for n, v in t.items() if n != "x"}

    def f(x: Tensor) -> Tensor:
        outputs = apply(case, {"x": x, **others}, quick.name)
        return sum((o * others[f"d{n}"]).sum() for n, o in outputs.items())

    result = torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")(x)
    assert result.any()
    with Oracle(f"compile of grad on {quick}") as oracle:
        oracle.check(case, result, torch_own(case, t)["dx"], exact(case, t)["dx"])


@pytest.mark.usefixtures("fresh_compile")
def test_compiled_double_backward_raises() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    y = torch.compile(lambda x: pyops.layer_norm(x, 16, backend="cpu"), fullgraph=True, backend="aot_eager")(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch's own access
@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5]], ids=str)
def test_compiled_autograd(quick: Target, case: Case) -> None:
    """The backward pass captured at run time."""
    t = inputs(case, quick.device)
    expected = ours(case, t, quick.name)
    outputs = call(case, t, quick.name)
    loss = sum((o * t[f"d{n}"]).sum() for n, o in outputs.items())
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    for name, leaf in leaves_of(t).items():
        torch.testing.assert_close(leaf.grad, expected[f"d{name}"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_make_fx(quick: Target, case: Case) -> None:
    """Tracing forward and backward, with symbolic sizes, then running the graph."""
    t = inputs(case, quick.device)
    names = list(leaves_of(t))

    def f(*leaves: Tensor) -> tuple[Tensor, ...]:
        used = dict(zip(names, leaves))
        loss = sum(o.square().sum() for o in apply(case, used, quick.name).values())
        return torch.autograd.grad(loss, leaves)

    torch.manual_seed(SEED)
    expected = f(*leaves_of(t).values())
    graph = torch.fx.experimental.proxy_tensor.make_fx(f, tracing_mode="symbolic")(*leaves_of(t).values())
    torch.manual_seed(SEED)
    for a, b in zip(graph(*leaves_of(t).values()), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("module_class", MODULES)
def test_export(quick: Target, module_class: type, strict: bool) -> None:
    """Exported with a dynamic batch size, saved, loaded."""
    module = module_class(8, backend=quick.name)
    nn.init.normal_(module.weight)
    shape = (3, 8, 5, 6) if module_class is pyops.nn.LayerNorm2d else (3, 5, 8)
    program = torch.export.export(
        module, (torch.randn(shape),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = torch.randn(7, *shape[1:])
    torch.testing.assert_close(loaded(x), module(x))


# ---- torch.func ----


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_func_grad(kernels: Target, case: Case) -> None:
    """torch.func.grad of every leaf equals autograd's."""
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    given = {n: v.detach() for n, v in t.items()}
    names = list(leaves_of(t))

    def f(*leaves: Tensor) -> Tensor:
        return objective(case, given | dict(zip(names, leaves)), kernels.name)

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
    "vmap of grad": lambda f, x, v: torch.func.vmap(torch.func.grad(lambda x, v: (f(x) * v).sum()))(x, v),
    "grad of vmap": lambda f, x, v: torch.func.grad(lambda x: (torch.func.vmap(f)(x) * v).sum())(x),
    "vmap of vmap": lambda f, x, v: torch.func.vmap(torch.func.vmap(f))(torch.stack([x, v])),
    "vmap over the last": lambda f, x, v: torch.func.vmap(f, in_dims=-1, out_dims=-1)(torch.stack([x, v], -1)),
    "chunked vmap": lambda f, x, _: torch.func.vmap(f, chunk_size=2)(x),
    "jacrev of jacrev": lambda f, x, _: torch.func.jacrev(torch.func.jacrev(f))(x[:1]),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch.func.linearize
@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2], CASES[3]], ids=str)
def test_func(kernels: Target, case: Case, name: str) -> None:
    """Every transform gives in float64 what it gives for the formula. (Nested forward mode over F.layer_norm of torch
    2.13 is wrong, so torch's own function is no reference here.)"""
    shape = (4, 5)
    generator = torch.Generator().manual_seed(5)
    x, v, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape, 5, 5))
    x, v, weight, bias = (a.to(kernels.device) for a in (x, v, weight / 4 + 1, bias))

    def mine(x: Tensor) -> Tensor:
        t = {"x": x, "weight": weight - float(case.zero_centred), "bias": bias}
        return apply(case, t, kernels.name)["y"]

    def theirs(x: Tensor) -> Tensor:
        t = {"x": x, "weight": weight - float(case.zero_centred)} | ({"bias": bias} if case.op == "layer_norm" else {})
        return exact_outputs(case, t)["y"]

    torch.testing.assert_close(DERIVATIVES[name](mine, x, v), DERIVATIVES[name](theirs, x, v))


@pytest.mark.parametrize("name", ["vmap of grad", "jvp", "jacrev", "hessian"])
def test_func_of_images(kernels: Target, name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x, v = (torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64).to(kernels.device) for _ in range(2))
    weight, bias = torch.randn(2, 3, generator=generator, dtype=torch.float64).to(kernels.device)

    def theirs(x: Tensor) -> Tensor:
        return exact_outputs(Case(op="layer_norm2d"), {"x": x, "weight": weight, "bias": bias})["y"]

    def mine(x: Tensor) -> Tensor:
        return pyops.layer_norm2d(x, weight, bias, backend=kernels.name)

    torch.testing.assert_close(DERIVATIVES[name](mine, x, v), DERIVATIVES[name](theirs, x, v))


def test_vmap_over_images_and_batches(kernels: Target) -> None:
    """Five dimensions while inside: batches of (N, C, H, W), contiguous and channels_last."""
    x = torch.randn(3, 2, 8, 3, 5, device=kernels.device)
    w = torch.randn(8, device=kernels.device)
    for batch in (x, x.movedim(2, -1).contiguous().movedim(-1, 2), x.transpose(0, 1)):
        result = torch.vmap(lambda x: pyops.layer_norm2d(x, w, backend=kernels.name))(batch)
        expected = torch.stack([pyops.layer_norm2d(one, w, backend=kernels.name) for one in batch])
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm"])
def test_vmap_over_weights(kernels: Target, op: str) -> None:
    """An ensemble: every member has its own parameters, x is shared or not; gradients too."""
    x, w, b = torch.randn(4, 9), torch.randn(3, 9), torch.randn(3, 9)
    x, w, b = (v.to(kernels.device) for v in (x, w, b))

    def one(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if op == "add_layer_norm":
            return pyops.add_layer_norm(x, x, w, b, backend=kernels.name)[0]
        return (
            pyops.rms_norm(x, 9, w, 1e-5, backend=kernels.name)
            if op == "rms_norm"
            else pyops.layer_norm(x, 9, w, b, backend=kernels.name)
        )

    for dims, xs in ((None, [x] * 3), (0, x.expand(3, 4, 9).contiguous())):
        xs_in = x if dims is None else xs
        result = torch.vmap(one, in_dims=(dims, 0, 0))(xs_in, w, b)
        torch.testing.assert_close(result, torch.stack([one(*args) for args in zip(xs, w, b)]))
        gradient = torch.vmap(torch.func.grad(lambda *a: one(*a).square().sum(), 1), in_dims=(dims, 0, 0))(xs_in, w, b)
        expected = [torch.func.grad(lambda *a: one(*a).square().sum(), 1)(*args) for args in zip(xs, w, b)]
        torch.testing.assert_close(gradient, torch.stack(expected))


def test_per_sample_gradients(kernels: Target) -> None:
    """vmap(grad) over functional_call of a model, against a loop over the samples."""
    model = nn.Sequential(
        nn.Linear(6, 8),
        pyops.nn.LayerNorm(8, backend=kernels.name),
        nn.Tanh(),
        pyops.nn.RMSNorm(8, backend=kernels.name),
    ).to(kernels.device)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x = torch.randn(5, 6, device=kernels.device)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    batched = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, one in enumerate(x):
        for name, gradient in torch.func.grad(loss)(parameters, one).items():
            torch.testing.assert_close(batched[name][i], gradient)


@pytest.mark.parametrize("randomness", ["different", "same", "error"])
def test_vmap_of_dropout(kernels: Target, randomness: str) -> None:
    x, residual = torch.ones(3, 40, 16, device=kernels.device), torch.zeros(3, 40, 16, device=kernels.device)

    def f(x: Tensor, residual: Tensor) -> Tensor:
        return pyops.add_layer_norm(x, residual, p=0.5, backend=kernels.name)[1] != 0

    batched = torch.vmap(f, randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            batched(x, residual)
        return
    kept = batched(x, residual)
    assert 0.4 < kept.float().mean() < 0.6
    equal = [torch.equal(kept[i], kept[j]) for i, j in ((0, 1), (1, 2), (0, 2))]
    assert equal == [randomness == "same"] * 3


def test_vmap_of_dropout_over_nothing(kernels: Target) -> None:
    x = torch.ones(0, 5, 16, device=kernels.device)
    y, total = torch.vmap(lambda x: pyops.add_layer_norm(x, x, p=0.5, backend=kernels.name), randomness="same")(x)
    assert y.shape == total.shape == x.shape


def test_vmap_of_dropout_gradients(kernels: Target) -> None:
    """Backward inside vmap regenerates the masks of forward."""
    x, residual = torch.ones(3, 40, 16, device=kernels.device), torch.zeros(3, 40, 16, device=kernels.device)

    def f(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = pyops.add_layer_norm(x, residual, p=0.5, backend=kernels.name)[1]
        return total.sum(), total

    dx, total = torch.vmap(torch.func.grad(f, has_aux=True), randomness="different")(x, residual)
    assert torch.equal(dx != 0, total != 0)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_forward_mode(backend: Target, case: Case) -> None:
    """Dual numbers: the tangent of y is that of the float64 formula."""
    t = {n: v.detach() for n, v in inputs(case, backend.device).items()}

    def tangent(t: dict[str, Tensor], name: str | None) -> Tensor:
        with forward_ad.dual_level():
            primal = t | {"x": forward_ad.make_dual(t["x"], t["dy"])}
            y = call(case, primal, name)["y"] if name else exact_y(case, primal)
            return forward_ad.unpack_dual(y).tangent

    wide = {n: v.double() for n, v in t.items()}
    with Oracle(f"forward mode on {backend}") as oracle:
        oracle.check(case, tangent(t, backend.name), torch_tangent(case, t), tangent(wide, None))


def exact_y(case: Case, t: dict[str, Tensor]) -> Tensor:
    return exact_outputs(case, t)["y"]


def torch_tangent(case: Case, t: dict[str, Tensor]) -> Tensor:
    """Of torch's own operators; by double backward, which all of them have."""
    x = t["x"].clone().requires_grad_()
    v = torch.zeros_like(t["dy"], requires_grad=True)
    (g,) = torch.autograd.grad(torch_outputs(case, t | {"x": x})["y"], x, v, create_graph=True)
    return torch.autograd.grad(g, v, t["dy"])[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batched_gradients(kernels: Target, case: Case) -> None:
    """is_grads_batched: several incoming gradients at once."""
    t = inputs(case, kernels.device)
    y = call(case, t, kernels.name)["y"]
    dy = torch.stack([t["dy"], t["dy"] * 2, t["dy"].flip(0)])
    leaves = list(leaves_of(t).values())
    batched = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for a, b in zip(batched, torch.autograd.grad(y, leaves, dy[i], retain_graph=True)):
            torch.testing.assert_close(a[i], b)


def test_legacy_jacobian(kernels: Target) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, device=kernels.device)
    for vectorize in (False, True):
        result = torch.autograd.functional.jacobian(
            lambda x: pyops.layer_norm(x, 5, backend=kernels.name), x, vectorize=vectorize
        )
        torch.testing.assert_close(result, torch.autograd.functional.jacobian(lambda x: F.layer_norm(x, (5,)), x))


# ---- checkpointing, saved tensors ----


def only_pyops(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    save = operator is torch.ops.pyops.layer_norm_fwd.default
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(only_pyops)},
}


@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_activation_checkpointing(kernels: Target, case: Case, options: dict) -> None:
    """Recomputed in backward, with the dropout mask of forward."""
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    names = list(leaves_of(t))

    def f(*leaves: Tensor) -> Tensor:
        return sum((o * t[f"d{n}"]).sum() for n, o in apply(case, dict(zip(names, leaves)), kernels.name).items())

    torch.manual_seed(SEED)
    checkpoint(f, *leaves_of(t).values(), **options).backward()
    for name in names:
        torch.testing.assert_close(t[name].grad, expected[f"d{name}"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_tensor_hooks(kernels: Target, case: Case) -> None:
    """What is saved passes through the user's hooks, and backward uses what they return."""
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    packed = []

    def pack(saved: Tensor) -> Tensor:
        packed.append(saved)
        return saved.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        outputs = call(case, t, kernels.name)
    assert any(saved.shape == t["x"].shape for saved in packed)
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves_of(t).values()), [t[f"d{n}"] for n in outputs])
    for name, gradient in zip(leaves_of(t), gradients):
        assert torch.equal(gradient, expected[f"d{name}"])


def peak_memory(f: Callable[[], Any]) -> int:
    """Bytes at the highest point of f beyond what it starts with, by torch's own record of its allocations."""
    f()
    with torch.profiler.profile(profile_memory=True) as profile:
        f()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "layout"), [*((op, "dense") for op in OPERATIONS), ("layer_norm2d", "channels_last")])
def test_peak_memory_is_not_above_torchs(op: str, layout: str, dtype: torch.dtype) -> None:
    """Many short rows: there the statistics weigh."""
    shape = (4, 64, 32, 32) if op == "layer_norm2d" else (4096, 32)
    case = Case(op=op, shape=shape, dtype=dtype, layout=layout, p=0.1 if op == "add_layer_norm" else 0.0)
    t = inputs(case, "cpu")

    def theirs() -> None:
        x, w, b = t["x"], t["weight"], t.get("bias")
        if op == "add_layer_norm":
            total = F.dropout(x, case.p) + t["residual"]
            torch.autograd.backward([F.layer_norm(total, shape[-1:], w, b), total], [t["dy"], t["dsum"]])
        elif op == "layer_norm2d":
            F.layer_norm(x.movedim(1, -1), (64,), w, b).movedim(-1, 1).backward(t["dy"])
        else:
            y = F.rms_norm(x, shape[-1:], w) if op == "rms_norm" else F.layer_norm(x, shape[-1:], w, b)
            y.backward(t["dy"])

    def mine() -> None:
        outputs = apply(case, t, "cpu")
        torch.autograd.backward(list(outputs.values()), [t[f"d{n}"] for n in outputs])

    peaks = {}
    for f in (theirs, mine):
        for leaf in leaves_of(t).values():
            leaf.grad = torch.zeros_like(leaf)
        peaks[f.__name__] = peak_memory(f)
    assert peaks["theirs"] > 0
    assert peaks["mine"] <= peaks["theirs"], peaks


# ---- autocast ----


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: Target, op: str, dtype: torch.dtype, cast_to: torch.dtype) -> None:
    """The dtype that torch's own function gives: float32 on GPUs, that of x on the CPU; keep_dtype keeps that of x."""
    x = torch.randn(4, 32, device=backend.device, dtype=dtype, requires_grad=True)
    weight = torch.randn(32, device=backend.device, dtype=dtype)
    mine, theirs = getattr(pyops, op), getattr(F, op)
    with torch.autocast(backend.device, dtype=cast_to):
        result, kept = (
            mine(x, (32,), weight, backend=backend.name),
            mine(x, (32,), weight, keep_dtype=True, backend=backend.name),
        )
        expected = theirs(x, (32,), weight)
    assert result.dtype == expected.dtype
    assert kept.dtype == dtype
    result.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("op", OPERATIONS)
def test_autocast_to_float(op: str, kernels: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where autocast asks for float32, every tensor is cast, gradients come back in its own dtype, and keep_dtype has
    its way. (A CPU never asks: the question is answered for it.)"""
    layer_norm = importlib.import_module("pyops.layer_norm")
    monkeypatch.setattr(layer_norm, "autocast_to_float", lambda x, keep_dtype: not keep_dtype)  # noqa: ARG005
    monkeypatch.setattr(layer_norm, "cpu_kernels", lambda _: None)  # the way of tensors on a GPU
    shape, affine = (2, 9, 3, 5) if op == "layer_norm2d" else (5, 33), "w" if op == "rms_norm" else "wb"
    case = Case(op=op, shape=shape, affine=affine, dtype=torch.bfloat16)
    t = inputs(case, kernels.device)
    wide = {n: v.detach().float() for n, v in t.items()}
    outputs = apply(case, t, kernels.name)
    for name, value in apply(case, wide, kernels.name).items():
        assert outputs[name].dtype == torch.float32
        assert torch.equal(outputs[name], value)
    leaves = leaves_of(t)
    gradients = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [t[f"d{n}"].float() for n in outputs]
    )
    assert {g.dtype for g in gradients} == {torch.bfloat16}
    arguments = {n: v.detach() for n, v in t.items() if not n.startswith("d")}
    if op in ("layer_norm", "rms_norm"):
        arguments["normalized_shape"] = (33,)
    kept = getattr(pyops, op)(**arguments, keep_dtype=True, backend=kernels.name)
    assert (kept if isinstance(kept, Tensor) else kept[0]).dtype == torch.bfloat16


def test_autocast_of_a_branch_beside_a_float32_stream(backend: Target) -> None:
    """The pre-norm block under autocast: a 16-bit branch and a float32 stream have a float32 sum, as in torch."""
    stream = torch.randn(3, 8, device=backend.device)
    linear, weight = nn.Linear(8, 8).to(backend.device), torch.randn(8, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        branch = linear(stream)
        y, total = pyops.add_layer_norm(branch, stream, weight, backend=backend.name)
        expected = F.layer_norm(branch + stream, (8,), weight)
    assert (branch.dtype, y.dtype, total.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.usefixtures("fresh_compile")
def test_compile_with_a_repeated_tensor(quick: Target) -> None:
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def f(x: Tensor, w: Tensor) -> Tensor:
        return pyops.add_layer_norm(x, x, w, w, backend=quick.name)[0] + pyops.rms_norm(w, (8,), w, backend=quick.name)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(3, 8)
    for mine, expected in zip(
        torch.autograd.grad(compiled(x, w), (x, w), upstream), torch.autograd.grad(f(x, w), (x, w), upstream)
    ):
        torch.testing.assert_close(mine, expected)


@pytest.mark.usefixtures("fresh_compile")
def test_autocast_inside_compile(quick: Target) -> None:
    layer = nn.Sequential(nn.Linear(8, 8), pyops.nn.LayerNorm(8, backend=quick.name), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, result = layer(x), compiled(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    with Oracle("autocast") as oracle:
        oracle.check("compiled", result, expected, copy.deepcopy(layer).double()(x.double()))


# ---- modes and unusual tensors ----


def test_functional_call(kernels: Target) -> None:
    module = pyops.nn.LayerNorm(8, backend=kernels.name).to(kernels.device)
    x, weight = torch.randn(3, 8, device=kernels.device), torch.randn(8, device=kernels.device)
    result = torch.func.functional_call(module, {"weight": weight}, (x,))
    assert torch.equal(result, pyops.layer_norm(x, 8, weight, module.bias, backend=kernels.name))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_tensors(kernels: Target, case: Case) -> None:
    """Shapes, dtypes and strides without values, forward and backward."""
    t = inputs(case, kernels.device)
    real = ours(case, t, kernels.name)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_t = {n: mode.from_tensor(v) for n, v in t.items()}
        outputs = apply(case, fake_t, kernels.name)
        leaves = leaves_of(fake_t)
        gradients = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), [fake_t[f"d{n}"] for n in outputs]
        )
    fakes = outputs | {f"d{n}": g for n, g in zip(leaves, gradients)}
    for name, value in real.items():
        assert fakes[name].shape == value.shape
        assert fakes[name].stride() == value.stride(), name
        assert fakes[name].dtype == value.dtype


def test_meta_tensors() -> None:
    x = torch.empty(3, 8, device="meta")
    assert pyops.layer_norm(x, 8).shape == (3, 8)
    assert all(o.device.type == "meta" for o in pyops.add_layer_norm(x, x))
    with pytest.raises(ValueError, match=r"^layer_norm: backend must be able to serve x, got 'cpu': it serves CPU"):
        pyops.layer_norm(x, 8, backend="cpu")


def test_flop_counter(kernels: Target) -> None:
    """torch counts no FLOPs for normalisations; ours must not break the count of the rest."""
    model = nn.Sequential(nn.Linear(8, 16), pyops.nn.LayerNorm(16, backend=kernels.name), nn.Linear(16, 8)).to(
        kernels.device
    )
    x = torch.randn(4, 8, device=kernels.device)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    forward = 2 * 4 * 8 * 16 * 2
    assert counter.get_total_flops() == forward + forward // 2 * 3  # the first layer needs no gradient of x


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
    x = torch.randn(3, 8, requires_grad=True)
    expected = pyops.layer_norm(x, 8, backend=kernels.name)
    (dx,) = torch.autograd.grad(expected.square().sum(), x)
    Logged.seen.clear()
    wrapped = Logged(x.detach()).requires_grad_()
    y = pyops.layer_norm(wrapped, 8, backend=kernels.name)
    assert type(y) is Logged
    assert torch.equal(y.wrapped, expected)
    (gradient,) = torch.autograd.grad(y.square().sum(), wrapped)
    assert torch.equal(gradient.wrapped, dx)
    assert {"pyops.layer_norm_fwd.default", "pyops.layer_norm_bwd.default"} <= set(Logged.seen)


class Named(Tensor):
    """The simplest subclass: no override."""


def test_plain_subclass(kernels: Target) -> None:
    x = torch.randn(3, 8, device=kernels.device)
    y = pyops.layer_norm(x.as_subclass(Named), 8, backend=kernels.name)
    assert torch.equal(y.as_subclass(Tensor), pyops.layer_norm(x, 8, backend=kernels.name))


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_mode(kernels: Target) -> None:
    """A mode sees one operator per direction, and changes no bit; also when only backward runs under it."""
    case = Case()
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    with Counting() as mode:
        observed = ours(case, t, kernels.name)
    assert mode.seen.count("pyops.layer_norm_fwd.default") == 1
    assert mode.seen.count("pyops.layer_norm_bwd.default") == 1
    y = call(case, t, kernels.name)["y"]
    with Counting() as mode:
        (dx,) = torch.autograd.grad(y, t["x"], t["dy"])
    assert mode.seen.count("pyops.layer_norm_bwd.default") == 1
    assert torch.equal(dx, expected["dx"])
    for name, value in expected.items():
        assert torch.equal(observed[name], value)


def test_negative_view(kernels: Target) -> None:
    """imag of a conjugate: the memory holds the values with the other sign."""
    z = torch.randn(5, 8, dtype=torch.complex64, device=kernels.device)
    x = z.conj().imag
    assert x.is_neg()
    w = torch.randn(8, dtype=torch.complex64, device=kernels.device).conj().imag
    expected = pyops.layer_norm(x.resolve_neg(), 8, w.resolve_neg(), backend=kernels.name)
    assert torch.equal(pyops.layer_norm(x, 8, w, backend=kernels.name), expected)
    leaf = torch.randn(5, 8, device=kernels.device, requires_grad=True)
    y = pyops.layer_norm(leaf, 8, backend=kernels.name)
    (dx,) = torch.autograd.grad(y, leaf, x, retain_graph=True)
    assert torch.equal(dx, torch.autograd.grad(y, leaf, x.resolve_neg())[0])


def test_zero_tensor(kernels: Target) -> None:
    """torch's zero tensors have no memory; autograd may send one as a gradient."""
    leaf = torch.randn(5, 8, device=kernels.device, requires_grad=True)
    zeros = torch._efficientzerotensor((5, 8), device=kernels.device)
    y = pyops.layer_norm(leaf, 8, backend=kernels.name)
    assert not torch.autograd.grad(y, leaf, zeros)[0].any()
    assert not pyops.layer_norm(zeros, 8, backend=kernels.name).any()
    y, total = pyops.add_layer_norm(leaf, zeros, backend=kernels.name)
    assert torch.equal(total, leaf)


def test_jagged_tensor() -> None:
    """torch's nested tensors: where no backend is named, what torch's operator gives."""
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    module = pyops.nn.LayerNorm(8)
    assert torch.equal(module(x).values(), F.layer_norm(x, (8,), module.weight, module.bias).values())


def test_jagged_tensor_options() -> None:
    """What torch's operator cannot express is refused."""
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    weight = torch.randn(8)
    result = pyops.layer_norm(x, 8, weight, zero_centred=True)
    assert torch.equal(result.values(), F.layer_norm(x, (8,), weight + 1).values())
    with pytest.raises(TypeError, match=r"^add_layer_norm: x must be a strided tensor, got a jagged one"):
        pyops.add_layer_norm(x, x)


def test_jit_trace() -> None:
    """A trace holds torch's own operators: it can be saved, and gives what the eager call gives."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = pyops.nn.LayerNorm(8), pyops.nn.RMSNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            y, total = pyops.add_layer_norm(self.first(x), x)
            return self.second(y) + total

    block, x = Block(), torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; it warns of Python values too
        traced = torch.jit.trace(block, torch.randn(3, 8))
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
    torch.testing.assert_close(traced(x), block(x))


def test_fx_keeps_calls_as_nodes() -> None:
    model = nn.Sequential(pyops.nn.LayerNorm(8), pyops.nn.RMSNorm(8))
    graph = torch.fx.Tracer()
    graph.is_leaf_module = lambda *_: False
    traced = torch.fx.GraphModule(model, graph.trace(model))
    assert {n.target.__name__ for n in traced.graph.nodes if n.op == "call_function"} == {"layer_norm", "rms_norm"}
    x = torch.randn(3, 8)
    assert torch.equal(traced(x), model(x))


def test_expanded_gradient(kernels: Target) -> None:
    """y.sum() sends a gradient whose strides are all 0."""
    case = Case(shape=(6, 40))
    t = inputs(case, kernels.device)
    t["dy"] = torch.ones(1, device=kernels.device).expand(6, 40)
    results = ours(case, t, kernels.name)
    judge_results(f"expanded gradient on {kernels}", case, t, results)


def test_data_parallel_like_threads(kernels: Target) -> None:
    """Backward runs on autograd's own thread when the graph lives on a device; here, on a user's second thread."""
    case = Case(op="add_layer_norm", p=0.2)
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    found: dict[str, Tensor] = {}
    outputs = call(case, t, kernels.name)

    def backward() -> None:
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves_of(t).values()), [t["dy"], t["dsum"]])
        found.update({f"d{n}": g for n, g in zip(leaves_of(t), gradients)})

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    for name, value in found.items():
        assert torch.equal(value, expected[name])
    assert len(found) == 4
