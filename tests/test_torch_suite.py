"""torch's own samples and module cases of what pyops replaces, run through pyops: an oracle from outside."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from conftest import TARGETS, Target
from layer_norm_cases import Case, exact, scales, with_gradients
from oracle import Oracle
from torch import Tensor

import pyops
from pyops import attention

FUNCTIONS = {
    "nn.functional.layer_norm": lambda x, shape, weight=None, bias=None, eps=1e-5, **o: pyops.layer_norm(
        x, shape, weight, bias, eps, **o
    ),
    "nn.functional.rms_norm": lambda x, shape, weight=None, eps=None, **o: pyops.rms_norm(x, shape, weight, eps, **o),
    "native_layer_norm": lambda x, shape, weight, bias, eps, **o: pyops.layer_norm(x, shape, weight, bias, eps, **o),
}
RECURRENT = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
MODULES = ("LayerNorm", "RMSNorm", *RECURRENT)
ATTENTION = "nn.functional.scaled_dot_product_attention"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(
    params=[pytest.param(t, marks=() if t.name in ("eager", "cpu") else pytest.mark.full, id=str(t)) for t in TARGETS]
)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@cache
def operators() -> dict[str, Any]:
    """torch's descriptions of the operators."""
    pytest.importorskip("expecttest", reason="torch's internal test tools need the package expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.name: op for op in op_db if op.name in (*FUNCTIONS, ATTENTION)}


@cache
def modules() -> dict[str, Any]:
    pytest.importorskip("expecttest", reason="torch's internal test tools need the package expecttest")
    from torch.testing._internal.common_modules import module_db

    return {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in MODULES}


def incoming(y: Tensor) -> Tensor:
    """A gradient for y, the same in every dtype."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)


def samples(name: str, target: Target, dtype: torch.dtype) -> Iterator[Any]:
    """torch's samples; their negative eps, which pyops refuses, with the other sign."""
    op = operators()[name]
    if dtype not in op.supported_dtypes(target.device):
        return
    for sample in op.sample_inputs(target.device, dtype, requires_grad=True):
        sample.args = tuple(abs(a) if isinstance(a, float) else a for a in sample.args)
        sample.kwargs = {n: abs(a) if isinstance(a, float) else a for n, a in sample.kwargs.items()}
        yield sample


def judge_sample(oracle: Oracle, target: Target, name: str, sample: Any) -> None:
    """Outputs and gradients of pyops and of torch's operator, on the very tensors of the sample."""
    x, args, kwargs = sample.input, sample.args, sample.kwargs
    shape, *rest = args
    given = dict(zip(("weight", "bias", "eps") if "layer" in name else ("weight", "eps"), rest)) | kwargs
    t = {"x": x} | {n: v for n, v in given.items() if isinstance(v, Tensor)}
    t["dy"] = incoming(x)
    eps = given.get("eps")
    if eps is None:
        eps = 1e-5 if "layer" in name else torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    case = Case(
        op=name.split(".")[-1].removeprefix("native_"), shape=tuple(x.shape), dtype=x.dtype, dims=len(shape), eps=eps
    )
    y = operators()[name].op(x, *args, **kwargs)
    theirs = {"y": y if isinstance(y, Tensor) else y[0]}
    mine = {"y": FUNCTIONS[name](x, *args, **kwargs, backend=target.name)}
    oracle.check_all(case, with_gradients(mine, t), with_gradients(theirs, t), exact(case, t), scales(case, t))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_samples(target: Target, name: str) -> None:
    """Every sample input in every dtype that torch supports."""
    with Oracle(f"{name} on {target}") as oracle:
        for dtype in DTYPES:
            for sample in samples(name, target, dtype):
                judge_sample(oracle, target, name, sample)


@pytest.mark.parametrize("name", ["nn.functional.layer_norm", "nn.functional.rms_norm"])
def test_noncontiguous_samples(target: Target, name: str) -> None:
    """The samples with every tensor spread out in memory."""
    with Oracle(f"{name} on {target}") as oracle:
        for sample in samples(name, target, torch.float32):
            judge_sample(oracle, target, name, sample.noncontiguous())


@pytest.mark.parametrize("name", ["nn.functional.rms_norm", "native_layer_norm"])
def test_error_inputs(target: Target, name: str) -> None:
    """What torch refuses, pyops refuses, in its own words. (torch has no error inputs for F.layer_norm.)"""
    for case in operators()[name].error_inputs(target.device):
        sample = case.sample_input
        with pytest.raises((ValueError, TypeError), match=r"^\w+: \w+ must .*, got "):
            FUNCTIONS[name](sample.input, *sample.args, **sample.kwargs, backend=target.name)


def attention_samples(target: Target, dtype: torch.dtype) -> Iterator[Any]:
    """torch's samples of attention that the backend serves and that drop nothing: dropout is not torch's here."""
    name = target.name if target.name in attention.LIMITS else "cuda" if target.name == "simt" else None
    limit = attention.LIMITS.get(name)
    raw = target.name == "triton" and target.device == "cpu" and dtype == torch.bfloat16
    for sample in operators()[ATTENTION].sample_inputs(target.device, dtype, requires_grad=True):
        served = limit is None or limit(sample.input, *sample.args[:2]) is None
        if served and not raw and not sample.kwargs.get("dropout_p"):
            yield sample


@pytest.mark.parametrize("spread_out", [False, True], ids=["dense", "noncontiguous"])
def test_attention_samples(target: Target, spread_out: bool) -> None:
    """torch's samples of attention in every dtype: ranks, broadcasting, masks, causal; outputs and gradients. Their
    scores are so far apart that one key has nearly all the weight: gradients are judged by the size of their terms."""
    with Oracle(f"attention on {target}") as oracle:
        for dtype in DTYPES:
            for sample in attention_samples(target, dtype):
                sample = sample.noncontiguous() if spread_out else sample
                own = [sample.input, *sample.args]
                wide = [t.detach().double().requires_grad_(t.requires_grad) for t in own]
                mask = sample.kwargs.get("attn_mask")
                wide_kwargs = sample.kwargs | ({} if mask is None or mask.dtype == torch.bool else
                                               {"attn_mask": mask.double()})  # fmt: skip
                outputs = [
                    pyops.scaled_dot_product_attention(*own, **sample.kwargs, backend=target.name),
                    operators()[ATTENTION].op(*own, **sample.kwargs),
                    operators()[ATTENTION].op(*wide, **wide_kwargs),
                ]
                results = []
                for out, tensors in zip(outputs, (own, own, wide)):
                    gradients = torch.autograd.grad(out, tensors, incoming(out))
                    results.append({"out": out.detach()} | dict(zip(("dq", "dk", "dv"), gradients)))
                shapes = [tuple(t.shape) for t in own]
                q, k, v = (t.detach().abs().max().item() for t in own)
                term = incoming(outputs[0]).abs().max().item() * v
                scales = {"dq": term * k, "dk": term * q}
                oracle.check_all(f"{dtype} {shapes} {sample.kwargs}", *results, scales)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules(target: Target, name: str) -> None:
    """torch's cases of its modules: constructor, forward, gradients, and torch's own reference where it has one."""
    info = modules()[name]
    mine_class = getattr(pyops.nn, name)
    checked = 0
    with Oracle(f"{name} on {target}") as oracle:
        for dtype in (torch.float32, torch.float64):
            for case in info.module_inputs_func(info, target.device, dtype, requires_grad=True, training=True):
                args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
                options = {**kwargs, "device": target.device, "dtype": dtype}
                theirs, mine = info.module_cls(*args, **options), mine_class(*args, **options, backend=target.name)
                for parameter in theirs.parameters():
                    torch.nn.init.normal_(parameter)
                mine.load_state_dict(theirs.state_dict())
                reference = copy.deepcopy(theirs).double()
                x = case.forward_input.args[0]
                outcomes = [module_results(m, x.double() if m is reference else x) for m in (mine, theirs, reference)]
                oracle.check_all(f"{dtype} {case.desc or args}", *outcomes)
                if case.reference_fn is not None:
                    torch.testing.assert_close(mine(x), case.reference_fn(theirs, x))
                checked += 1
    assert checked > 0


def module_results(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    leaves = {"x": x} | dict(module.named_parameters())
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), incoming(y))))


def leaves_of(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [t for each in tree for t in leaves_of(each)] if isinstance(tree, (tuple, list)) else []


def mapped(f: Any, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return f(tree)
    return type(tree)(mapped(f, each) for each in tree) if isinstance(tree, (tuple, list)) else tree


def recurrent_results(module: torch.nn.Module, args: tuple, wide: bool) -> dict[str, Tensor]:
    args = mapped(lambda t: (t.double() if wide else t).detach().requires_grad_(), args)
    outputs = leaves_of(module(*args))
    leaves = [*leaves_of(args), *module.parameters()]
    grads = torch.autograd.grad(outputs, leaves, [incoming(y) for y in outputs])
    named = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return named | {f"gradient {i}": g for i, g in enumerate(grads)}


def spread_out(t: Tensor) -> Tensor:
    """The same numbers, every second one in memory."""
    wide = t.new_zeros(*t.shape, 2)
    wide[..., 0] = t.detach()
    return wide[..., 0].requires_grad_(t.requires_grad)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own layers
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_modules(target: Target, name: str) -> None:
    """torch's cases of its recurrent modules, in training and in evaluation: outputs and gradients; in float64 also
    those of second order, and with nothing dense in memory, both of which torch expects to fail on CUDA."""
    info = modules()[name]
    checked = 0
    with Oracle(f"{name} on {target}") as oracle:
        for dtype, training in itertools.product((torch.float32, torch.float64), (True, False)):
            for case in info.module_inputs_func(info, target.device, dtype, requires_grad=True, training=training):
                args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
                options = {**kwargs, "device": target.device, "dtype": dtype}
                theirs = info.module_cls(*args, **options).train(training)
                mine = getattr(pyops.nn, name)(*args, **options, backend=target.name).train(training)
                mine.load_state_dict(theirs.state_dict())
                reference = copy.deepcopy(theirs).double()
                given = case.forward_input.args
                outcomes = [recurrent_results(m, given, m is reference) for m in (mine, theirs, reference)]
                # Tensors of a few numbers, all of which may be small by chance.
                largest = max(g.abs().max().item() for n, g in outcomes[2].items() if n.startswith("gradient"))
                scales = {n: largest for n in outcomes[2] if n.startswith("gradient")}
                oracle.check_all(f"{dtype} {training} {args} {kwargs} {case.desc}", *outcomes, scales)
                checked += 1
                if dtype != torch.float64 or not training:
                    continue
                wanted = recurrent_results(mine, given, False)
                for parameter in mine.parameters():
                    parameter.data = spread_out(parameter.data)
                found = recurrent_results(mine, mapped(spread_out, given), False)
                for n, t in wanted.items():
                    torch.testing.assert_close(found[n], t)
                if target.name != "triton" or target.device == "cuda":
                    tensors = [t.detach().requires_grad_() for t in leaves_of(given)]

                    def outputs(*some: Tensor, module: Any = mine, given: Any = given) -> tuple[Tensor, ...]:
                        rest = iter(some)
                        return tuple(leaves_of(module(*mapped(lambda _: next(rest), given))))

                    torch.autograd.gradgradcheck(outputs, tensors, atol=1e-6, fast_mode=True)
    assert checked > 0
