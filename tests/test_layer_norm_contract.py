"""What a caller may rely on beside the numbers: errors, autograd's rules, untouched arguments, equal bits, modules."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from conftest import Target
from layer_norm_cases import Case, call, inputs, judge, ours
from oracle import Oracle
from torch import Tensor, nn

import pyops
from pyops.backend import BACKENDS, Backend

OPERATIONS = ("layer_norm", "rms_norm", "add_layer_norm", "layer_norm2d")


# ---- the oracle itself ----


class Flawed:
    """The CPU kernels with one mistake in a result."""

    def __init__(self, kernels: Any, flaw: Callable[..., None]):
        self.kernels, self.flaw = kernels, flaw

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def layer_norm_bwd(self, *args: Any) -> None:
        self.kernels.layer_norm_bwd(*args)
        self.flaw(*args)


def drop_mean_g(dy, _dsum, _saved, weight, _bias, _mean, rstd, _seed, dx, *_):
    dx += ((dy * weight).float().mean(-1) * rstd).to(dx.dtype)[:, None]


def flip_dbias(*args):
    args[11].neg_()


def lose_a_row(*args):
    dy, dbias = args[0], args[11]
    dbias -= dy[-1]


def nothing(*_args):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flaw", [drop_mean_g, flip_dbias, lose_a_row])
def test_oracle_sees_a_mistake(flaw: Callable, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sign or one term wrong in one gradient, and the rule refuses it; without the mistake it does not."""
    kernels = BACKENDS["cpu"].load("layer_norm")
    case = Case(shape=(6, 65), dtype=dtype)
    for mistake, refused in ((nothing, False), (flaw, True)):
        name = f"flawed-{mistake.__name__}"
        flawed = Backend(name, lambda _, m=mistake: Flawed(kernels, m), lambda _: None)
        monkeypatch.setitem(BACKENDS, name, flawed)
        oracle = Oracle("")
        judge(oracle, case, Target(name, "cpu"))
        assert bool(oracle.failures) == refused


def test_oracle_sees_a_tenth_too_much_everywhere() -> None:
    """No single case is over 2 x torch's error, but their mean is over 1 x."""
    exact_result = torch.linspace(1, 2, 50, dtype=torch.float64)
    theirs = (exact_result + 1e-4).float()

    def judged(deviation: float) -> None:
        with Oracle("", mean=True) as oracle:
            for i in range(120):
                oracle.check(i, (exact_result + deviation).float(), theirs, exact_result)

    judged(0.9e-4)
    with pytest.raises(AssertionError, match=r"errors are 1\.1 x torch's in geometric mean"):
        judged(1.1e-4)


def test_oracle_refuses_what_it_cannot_judge() -> None:
    one = torch.ones(3, dtype=torch.float64)
    nan = torch.tensor([1.0, math.nan, 1.0])
    inf = torch.tensor([math.inf])
    wrong = {
        "NaN": (nan, one.float(), one),
        "no NaN": (one.float(), nan, nan.double()),
        "infinity of the other sign": (inf, -inf, -inf.double()),
        "shape": (torch.ones(1), one.float(), one),
        "dtype": (one.half(), one.float(), one),
        "not zero": (one.float(), torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
    }
    for name, (mine, theirs, reference) in wrong.items():
        oracle = Oracle("")
        oracle.check(name, mine, theirs, reference)
        assert oracle.failures, name
    with pytest.raises(AssertionError, match="no case was checked"), Oracle("empty"):
        pass
    few = Oracle("few", mean=True)
    few.check("", one.float(), one.float(), one)
    with pytest.raises(AssertionError, match="too few for a mean"), few:
        pass
    with pytest.raises(AssertionError, match="reference must be float64"):
        Oracle("").check("", one.float(), one.float(), one.float())


# ---- errors ----


def good(op: str) -> dict[str, Any]:
    """Valid arguments."""
    x = torch.randn(2, 4, 3, 5) if op == "layer_norm2d" else torch.randn(3, 4)
    arguments: dict[str, Any] = {"x": x, "weight": torch.ones(4)}
    if op in ("layer_norm", "rms_norm"):
        arguments["normalized_shape"] = (4,)
    if op != "rms_norm":
        arguments["bias"] = torch.zeros(4)
    if op == "add_layer_norm":
        arguments["residual"] = torch.randn(3, 4)
    return arguments


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta feature
    SPARSE_ROWS = torch.ones(3, 4).to_sparse_csr()

WRONG: list[tuple[str, str, Any, type[Exception]]] = [
    # argument, what is wrong, value, error
    ("x", "not a tensor", [1.0, 2.0], TypeError),
    ("x", "None", None, TypeError),
    ("x", "integer", torch.ones(3, 4, dtype=torch.int64), TypeError),
    ("x", "complex", torch.ones(3, 4, dtype=torch.complex64), TypeError),
    ("x", "sparse", torch.ones(3, 4).to_sparse(), TypeError),
    ("x", "csr", SPARSE_ROWS, TypeError),
    ("x", "mkldnn", torch.ones(3, 4).to_mkldnn(), TypeError),
    ("weight", "sparse", torch.ones(4).to_sparse(), TypeError),
    ("residual", "sparse", torch.ones(3, 4).to_sparse(), TypeError),
    ("weight", "not a tensor", 1.0, TypeError),
    ("weight", "integer", torch.ones(4, dtype=torch.int32), TypeError),
    ("weight", "size", torch.ones(7), ValueError),
    ("weight", "rank", torch.ones(4, 1), ValueError),
    ("weight", "wider than x", torch.ones(4, dtype=torch.float64), TypeError),
    ("weight", "narrower than x", torch.ones(4, dtype=torch.bfloat16), TypeError),
    ("weight", "device", torch.ones(4, device="meta"), ValueError),
    ("bias", "not a tensor", "zeros", TypeError),
    ("bias", "size", torch.ones(7), ValueError),
    ("bias", "device", torch.ones(4, device="meta"), ValueError),
    ("bias", "dtype", torch.ones(4, dtype=torch.float64), TypeError),
    ("residual", "missing", None, TypeError),
    ("residual", "shape", torch.ones(4, 3), ValueError),
    ("residual", "broadcastable shape", torch.ones(1, 4), ValueError),
    ("residual", "dtype", torch.ones(3, 4, dtype=torch.float64), TypeError),
    ("residual", "device", torch.ones(3, 4, device="meta"), ValueError),
    ("normalized_shape", "empty", (), ValueError),
    ("normalized_shape", "a zero", (0,), ValueError),
    ("normalized_shape", "negative", (-1,), ValueError),
    ("normalized_shape", "a float", 4.0, TypeError),
    ("normalized_shape", "floats", (4.0,), TypeError),
    ("normalized_shape", "None", None, TypeError),
    ("normalized_shape", "text", "4", TypeError),
    ("normalized_shape", "a tensor", torch.tensor(4), TypeError),
    ("eps", "negative", -1e-5, ValueError),
    ("eps", "nan", math.nan, ValueError),
    ("eps", "infinite", math.inf, ValueError),
    ("eps", "text", "small", TypeError),
    ("eps", "an int beyond floats", 10**400, ValueError),
    ("p", "negative", -0.1, ValueError),
    ("p", "above 1", 1.5, ValueError),
    ("p", "nan", math.nan, ValueError),
    ("p", "text", "half", TypeError),
    ("backend", "unknown", "fpga", ValueError),
    ("backend", "empty", "", ValueError),
    ("backend", "a list", ["cpu"], ValueError),
]
ACCEPTS = {
    "layer_norm": {"x", "weight", "bias", "normalized_shape", "eps", "backend"},
    "rms_norm": {"x", "weight", "normalized_shape", "eps", "backend"},
    "add_layer_norm": {"x", "weight", "bias", "residual", "eps", "p", "backend"},
    "layer_norm2d": {"x", "weight", "bias", "eps", "backend"},
}
ERRORS = [
    pytest.param(op, argument, value, kind, id=f"{op}-{argument}-{what.replace(' ', '_')}")
    for op in OPERATIONS
    for argument, what, value, kind in WRONG
    if argument in ACCEPTS[op]
]
ERRORS += [
    pytest.param("layer_norm2d", "x", torch.randn(3, 4), ValueError, id="layer_norm2d-x-rank_2"),
    pytest.param("layer_norm2d", "x", torch.randn(1, 2, 3, 4, 5), ValueError, id="layer_norm2d-x-rank_5"),
    pytest.param("layer_norm2d", "x", torch.randn(1, 0, 3, 4), ValueError, id="layer_norm2d-x-no_channels"),
    pytest.param("layer_norm", "x", torch.randn(3, 5), ValueError, id="layer_norm-x-size"),
    pytest.param("layer_norm", "x", torch.tensor(1.0), ValueError, id="layer_norm-x-scalar"),
    pytest.param("rms_norm", "x", torch.randn(3, 5), ValueError, id="rms_norm-x-size"),
    pytest.param("add_layer_norm", "x", torch.tensor(1.0), ValueError, id="add_layer_norm-x-scalar"),
    pytest.param("add_layer_norm", "x", torch.randn(3, 0), ValueError, id="add_layer_norm-x-no_features"),
]


@pytest.mark.parametrize("named", ["eager", "cpu", None], ids=lambda n: n or "chosen")
@pytest.mark.parametrize(("op", "argument", "value", "kind"), ERRORS)
def test_errors(
    op: str, argument: str, value: Any, kind: type, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`<op>: <argument> must <rule>, got <value>`, on every backend alike, before anything is drawn or allocated."""
    arguments = {"backend": named, **good(op), argument: value}
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    before = {n: t.clone() for n, t in tensors.items() if t.device.type == "cpu" and t.layout is torch.strided}
    state = torch.get_rng_state()

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        pytest.fail("work was done before the arguments were checked")

    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like", "zeros", "randint"):
            patch.setattr(torch, name, refuse)
        with pytest.raises(kind) as caught:
            getattr(pyops, op)(**arguments)
    assert re.fullmatch(rf"{op}: {argument} must .+, got .+", str(caught.value), re.DOTALL), str(caught.value)
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor), name


def test_parameters_of_two_dtypes() -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"^layer_norm: bias must have the dtype of weight, .*, got torch.float32"):
        pyops.layer_norm(x, 4, torch.ones(4, dtype=torch.bfloat16), torch.zeros(4))


def test_size_beyond_int64() -> None:
    with pytest.raises(ValueError, match=r"^layer_norm: x must end in the dimensions of normalized_shape "):
        pyops.layer_norm(torch.randn(3, 4), (2**70,))


def test_bad_module_arguments() -> None:
    with pytest.raises(TypeError, match=r"^LayerNorm2d: num_channels must be an int, got tuple"):
        pyops.nn.LayerNorm2d((3, 4))


def test_good_arguments(backend: Target) -> None:
    """The arguments that test_errors spoils one at a time."""
    for op in OPERATIONS:
        arguments = {n: t.to(backend.device) if isinstance(t, Tensor) else t for n, t in good(op).items()}
        getattr(pyops, op)(**arguments, backend=backend.name)
    x = torch.randn(3, 4, device=backend.device)
    for shape in (4, (4,), [4], torch.Size([4])):
        pyops.layer_norm(x, shape, backend=backend.name)
    pyops.layer_norm(x, 4, eps=0, backend=backend.name)
    for number in (numpy.int32(4), (numpy.int64(4),)):
        pyops.layer_norm(x, number, eps=numpy.float32(1e-5), backend=backend.name)
    with torch.device("meta"):  # the default device has no say in a call on given tensors
        y = pyops.layer_norm(x.requires_grad_(), (4,), backend=backend.name)
        assert torch.autograd.grad(y.sum(), x)[0].device == x.device


# ---- autograd's rules ----

CALLS = [
    Case(),
    Case(memory_efficient=True),
    Case(op="rms_norm", affine="w"),
    Case(op="add_layer_norm", p=0.3),
    Case(op="layer_norm2d", shape=(2, 9, 3, 5)),
    Case(op="layer_norm2d", shape=(2, 9, 3, 5), layout="channels_last"),
    Case(dtype=torch.bfloat16, layout="rows"),
]


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_arguments_are_never_written(backend: Target, case: Case) -> None:
    """Neither inputs nor incoming gradients, also when they are dense and of the result's shape."""
    t = inputs(case, backend.device)
    before = {name: (v.detach().clone(), v._version) for name, v in t.items()}
    ours(case, t, backend.name)
    for name, (value, version) in before.items():
        assert torch.equal(t[name], value), name
        assert t[name]._version == version, name


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_results_are_new_memory(backend: Target, case: Case) -> None:
    """Writing into a result, in place, changes nothing else."""
    t = inputs(case, backend.device)
    results = ours(case, t, backend.name)
    pointers = [v.untyped_storage().data_ptr() for v in (*t.values(), *results.values())]
    gradients = {"dx", "dresidual"} & results.keys()
    if len(gradients) == 2 and case.p == 0:  # then they are one tensor, which autograd copies where it accumulates
        pointers.remove(results["dresidual"].untyped_storage().data_ptr())
    assert len(set(pointers)) == len(pointers)


PARALLEL = [Case(shape=(600, 70)), Case(op="layer_norm2d", shape=(2, 40, 20, 21)), Case(op="add_layer_norm", p=0.3)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", PARALLEL, ids=str)
def test_bits_repeat(backend: Target, case: Case, threads: int) -> None:
    """Five runs, the same bits in every output and gradient: sums over rows have one order."""
    if backend.name == "triton" and backend.device == "cpu" and case.shape[0] == 600:
        case = Case(shape=(90, 70))
    torch.set_num_threads(threads)
    t = inputs(case, backend.device)
    first = ours(case, t, backend.name)
    for _ in range(4):
        for name, again in ours(case, t, backend.name).items():
            assert torch.equal(first[name], again), name


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_graph_used_twice(backend: Target, case: Case) -> None:
    """retain_graph: the second backward gives the same bits, and gradients add up."""
    t = inputs(case, backend.device)
    y = call(case, t, backend.name)["y"]
    y.backward(t["dy"], retain_graph=True)
    once = {n: v.grad.clone() for n, v in t.items() if v.grad is not None}
    y.backward(t["dy"])
    for name, gradient in once.items():
        assert torch.equal(t[name].grad, gradient + gradient), name


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_graph_used_up(backend: Target, case: Case) -> None:
    t = inputs(case, backend.device)
    y = call(case, t, backend.name)["y"]
    y.backward(t["dy"])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(t["dy"])


# What backward reads: h or y, and the weight.
SAVED = [
    (Case(), "x"),
    (Case(), "weight"),
    (Case(memory_efficient=True), "y"),
    (Case(memory_efficient=True), "bias"),
    (Case(op="add_layer_norm"), "sum"),
    (Case(op="rms_norm", affine="w"), "x"),
    (Case(op="layer_norm2d", shape=(2, 9, 3, 5)), "x"),
    (Case(op="layer_norm2d", shape=(2, 9, 3, 5), layout="channels_last"), "x"),
]


@pytest.mark.parametrize(("case", "changed"), SAVED, ids=str)
def test_saved_tensor_changed_in_place(kernels: Target, case: Case, changed: str) -> None:
    t = inputs(case, kernels.device)
    used = {n: v * 1 if v.requires_grad else v for n, v in t.items()}
    outputs = call(case, used, kernels.name)
    with torch.no_grad():
        (outputs | used)[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs["y"], t["x"], t["dy"])


def test_memory_efficient_keeps_no_input(kernels: Target) -> None:
    """x may be overwritten after the call: backward reads y."""
    case = Case(memory_efficient=True)
    t = inputs(case, kernels.device)
    expected = ours(case, t, kernels.name)
    used = {n: v * 1 if v.requires_grad else v for n, v in t.items()}
    y = call(case, used, kernels.name)["y"]
    with torch.no_grad():
        used["x"].zero_()
    (dx,) = torch.autograd.grad(y, t["x"], t["dy"])
    assert torch.equal(dx, expected["dx"])


def test_mutated_output(backend: Target) -> None:
    """An in-place operation on y is allowed when backward does not read y."""
    case = Case()
    t = inputs(case, backend.device)
    y = call(case, t, backend.name)["y"]
    y.mul_(2)
    (dx,) = torch.autograd.grad(y, t["x"], t["dy"])
    half = ours(case, t, backend.name)["dx"]
    assert torch.equal(dx, ours(case, t | {"dy": t["dy"] * 2}, backend.name)["dx"])
    assert not torch.equal(dx, half)


def test_no_graph_where_none_is_wanted(backend: Target) -> None:
    t = inputs(Case(), backend.device)
    with torch.no_grad():
        assert call(Case(), t, backend.name)["y"].grad_fn is None
    with torch.inference_mode():
        y = call(Case(), t, backend.name)["y"]
        assert y.is_inference()
    detached = {n: v.detach() for n, v in t.items()}
    assert not call(Case(), detached, backend.name)["y"].requires_grad
    for case in CALLS:
        t = inputs(case, backend.device)
        with torch.no_grad():
            inference = call(case, t, backend.name)
        for name, training in call(case, t, backend.name).items():
            assert torch.equal(inference[name], training), f"{case} {name}"


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_sum_alone(backend: Target, p: float, create_graph: bool) -> None:
    """Where y is not used, the parameters have no gradient, as behind torch's own operators."""
    case = Case(op="add_layer_norm", p=p)
    t = inputs(case, backend.device)
    total = call(case, t, backend.name)["sum"]
    leaves = [t[n] for n in ("x", "residual", "weight", "bias")]
    dx, dresidual, dweight, dbias = torch.autograd.grad(
        total, leaves, t["dsum"], allow_unused=True, create_graph=create_graph
    )
    kept = (total - t["residual"] != 0) if p else torch.ones_like(total, dtype=torch.bool)
    torch.testing.assert_close(dx, torch.where(kept, t["dsum"] / (1 - p), 0.0))
    assert torch.equal(dresidual, t["dsum"])
    assert dweight is None
    assert dbias is None


@pytest.mark.parametrize("case", [*CALLS, Case(shape=(5, 64)), Case(op="rms_norm", affine="w", shape=(5, 64))], ids=str)
def test_any_subset_of_gradients(backend: Target, case: Case) -> None:
    """What else is wanted changes no gradient."""
    t = inputs(case, backend.device)
    names = [n for n, v in t.items() if v.requires_grad]

    def gradients(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        given = {n: v.detach().requires_grad_(n in wanted) for n, v in t.items()}
        outputs = {n: y for n, y in call(case, given, backend.name).items() if y.requires_grad}
        leaves = [given[n] for n in wanted]
        return dict(zip(wanted, torch.autograd.grad(list(outputs.values()), leaves, [t[f"d{n}"] for n in outputs])))

    expected = gradients(tuple(names))
    for count in range(1, len(names)):
        for wanted in itertools.combinations(names, count):
            for name, gradient in gradients(wanted).items():
                torch.testing.assert_close(gradient, expected[name], msg=f"{name} of {wanted}")


def test_gradient_of_none_is_not_needed(backend: Target) -> None:
    """Hooks, and a gradient that autograd never sends, as in any torch operator."""
    t = inputs(Case(op="add_layer_norm"), backend.device)
    seen = []
    t["x"].register_hook(lambda g: seen.append(g) or g * 2)
    y, _ = call(Case(op="add_layer_norm"), t, backend.name).values()
    y.backward(t["dy"])
    assert torch.equal(t["x"].grad, seen[0] * 2)
    assert torch.equal(t["residual"].grad, seen[0]), "the hook's change stays with x"


# ---- modules ----

MODULES = [
    (nn.LayerNorm, pyops.nn.LayerNorm, (33,), {}),
    (nn.LayerNorm, pyops.nn.LayerNorm, ((4, 5),), {"eps": 1e-3}),
    (nn.LayerNorm, pyops.nn.LayerNorm, (33,), {"elementwise_affine": False}),
    (nn.LayerNorm, pyops.nn.LayerNorm, (33,), {"bias": False}),
    (nn.RMSNorm, pyops.nn.RMSNorm, (33,), {}),
    (nn.RMSNorm, pyops.nn.RMSNorm, ((4, 5),), {"eps": 1e-3}),
    (nn.RMSNorm, pyops.nn.RMSNorm, (33,), {"elementwise_affine": False}),
]


@pytest.mark.parametrize(("theirs", "mine", "args", "kwargs"), MODULES, ids=str)
def test_module_is_drop_in(backend: Target, theirs: type, mine: type, args: tuple, kwargs: dict) -> None:
    """Subclass, same constructor, parameters, state_dict, repr and results."""
    reference, module = theirs(*args, **kwargs).to(backend.device), mine(*args, **kwargs).to(backend.device)
    assert isinstance(module, theirs)
    assert repr(module) == repr(reference)
    assert module.state_dict().keys() == reference.state_dict().keys()
    for name, parameter in reference.named_parameters():
        nn.init.normal_(parameter)
        assert module.get_parameter(name).shape == parameter.shape
    module.load_state_dict(reference.state_dict())
    module.backend = backend.name
    shape = (6, *((args[0],) if isinstance(args[0], int) else args[0]))
    results = {}
    with Oracle(f"{mine.__name__} on {backend}") as oracle:
        for label, m in (("ours", module), ("torch", reference), ("exact", reference)):
            dtype = torch.float64 if label == "exact" else torch.float32
            m = copy.deepcopy(m).to(dtype)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
            x = x.to(backend.device, dtype).requires_grad_()
            y = m(x)
            y.backward(torch.cos(torch.arange(y.numel(), device=y.device)).reshape(y.shape).to(y.dtype))
            results[label] = {"y": y, "x": x.grad} | {n: p.grad for n, p in m.named_parameters()}
        oracle.check_all("module", results["ours"], results["torch"], results["exact"])


@pytest.mark.parametrize("module_class", [pyops.nn.LayerNorm, pyops.nn.RMSNorm, pyops.nn.LayerNorm2d])
def test_module_survives(module_class: type) -> None:
    """deepcopy, pickle, torch.save of the whole module and of its state, options included; .to() of its parameters."""
    module = module_class(7, zero_centred=True, memory_efficient=True, keep_dtype=True, backend="cpu")
    nn.init.normal_(module.weight)
    x = torch.randn(2, 7, 3, 5) if module_class is pyops.nn.LayerNorm2d else torch.randn(4, 7)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is module_class
        assert other.zero_centred
        assert other.memory_efficient
        assert other.keep_dtype
        assert other.backend == "cpu"
        assert torch.equal(other(x), expected)
    fresh = module_class(7, zero_centred=True)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), expected)
    assert module.double()(x.double()).dtype == torch.float64


def test_module_options() -> None:
    """Zero-centred weights start at 0, so that the module starts as the usual one; the class swap has the defaults."""
    x = torch.randn(4, 9)
    for plain, zero in itertools.product((pyops.nn.LayerNorm, pyops.nn.RMSNorm), (False, True)):
        module = plain(9, zero_centred=zero)
        assert module.weight.eq(0.0 if zero else 1.0).all()
        assert torch.equal(module(x), plain(9)(x))
    for theirs, mine in ((nn.LayerNorm, pyops.nn.LayerNorm), (nn.RMSNorm, pyops.nn.RMSNorm)):
        swapped = theirs(9)
        nn.init.normal_(swapped.weight)
        swapped.__class__ = mine
        fresh = mine(9)
        fresh.load_state_dict(swapped.state_dict())
        assert torch.equal(swapped(x), fresh(x))


def test_image_module(backend: Target) -> None:
    module = pyops.nn.LayerNorm2d(12, backend=backend.name).to(backend.device)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    case = Case(op="layer_norm2d", shape=(2, 12, 3, 5))
    t = inputs(case, backend.device)
    expected = call(case, t | {"weight": module.weight, "bias": module.bias}, backend.name)["y"]
    assert torch.equal(module(t["x"]), expected)
    assert isinstance(module, nn.LayerNorm)
    assert module.normalized_shape == (12,)


def test_every_element_is_written(backend: Target) -> None:
    """torch's deterministic mode fills new memory with NaN: none of it reaches a result."""
    torch.use_deterministic_algorithms(True)
    try:
        with Oracle(f"deterministic mode on {backend}") as oracle:
            for case in CALLS:
                judge(oracle, case, backend)
    finally:
        torch.use_deterministic_algorithms(False)
