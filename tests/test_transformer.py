"""Modules built of several operations against torch's own: numbers, masks, structure, transforms, containers."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import pytest
import torch
from conftest import TARGETS, Target
from oracle import Oracle
from torch import Tensor, nn

import pyops
from pyops import transformer

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MODULES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
OURS = {module: getattr(pyops.nn, module.__name__) for module in MODULES}


@pytest.fixture(params=[t for t in TARGETS if t.name in ("eager", "cpu")], ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A backend, forced on everything in the test. The kernels themselves are tested with their operations."""
    name, device = request.param.name, request.param.device
    x = torch.empty(1, 1, 2, 8, device=device)
    chosen = pyops.explain("attention", x, x, x, backend=name).chosen
    if chosen != name:
        pytest.skip(f"{name} does not serve attention: {chosen}")
    with pyops.use_backend(name):
        yield request.param


def generator(text: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(str(text).encode()))


def tensors_of(results: Any) -> dict[str, Tensor]:
    """The tensors of a module's result, by name."""
    results = results if isinstance(results, tuple) else (results,)
    return {f"result {i}": t for i, t in enumerate(results) if t is not None}


def gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs and, for fixed incoming gradients, those of the leaves that took part."""
    incoming = [torch.randn(y.shape, generator=generator(name)).to(y) for name, y in outputs.items()]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), incoming, allow_unused=True)
    grads = {f"d {name}": g for name, g in zip(leaves, found) if g is not None}
    return {name: y.detach() for name, y in outputs.items()} | grads


def run(module: nn.Module, inputs: dict[str, Any], masks: bool = True) -> dict[str, Tensor]:
    """Results and gradients of all parameters and all floating inputs, with ``masks`` those among them too; but for one
    that is said to be causal, which is not read."""
    leaves = dict(module.named_parameters())
    given, known = {}, {}
    causal = inputs.get("is_causal") or inputs.get("tgt_is_causal")
    for name, value in inputs.items():
        constant = name.endswith("mask") and (not masks or (causal and "padding" not in name))
        if isinstance(value, Tensor) and value.is_floating_point() and not constant:
            # One tensor under several names stays one: that is what makes it self-attention.
            value = known.setdefault(id(value), value.detach().clone().requires_grad_())
            leaves[name] = value
        given[name] = value
    return gradients(tensors_of(module(**given)), leaves)


def pooled(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """All results of a call as one tensor, and all gradients as another, each in units of the power of two below its
    largest element. The largest error among many scatters less than that of each: of thousands of single results, some
    are off by more than twice torch's error by luck alone."""
    kinds: dict[str, list[Tensor]] = {"results": [], "gradients": []}
    for name, t in found.items():
        most = exact[name].abs().max().item() if exact[name].numel() else 0.0
        unit = 2.0 ** -math.floor(math.log2(most)) if most > 0 else 1.0
        kinds["gradients" if name.startswith("d ") else "results"].append((t * unit).flatten())
    return {kind: torch.cat(tensors) for kind, tensors in kinds.items()}


def judge(oracle: Oracle, case: object, mine: nn.Module, theirs: nn.Module, inputs: dict[str, Any]) -> None:
    """By the tolerance rule: the same parameters and inputs through our module, torch's, and torch's in float64."""
    mine.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    known: dict[int, Tensor] = {}
    wide = {
        name: known.setdefault(id(t), t.double()) if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    # In 16 bits a mask that wants a gradient would drive torch from its fused operator to one that rounds otherwise.
    masks = next(theirs.parameters()).dtype.itemsize > 2
    found, expected, reference = run(mine, inputs, masks), run(theirs, inputs, masks), run(exact, wide, masks)
    for name in found.keys() | expected.keys():
        assert found[name].shape == expected[name].shape, f"{case} {name}"
        assert found[name].dtype == expected[name].dtype, f"{case} {name}"
    oracle.check_all(case, *(pooled(results, reference) for results in (found, expected, reference)))


def randomised(module: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """All parameters random, the biases and norms too; of the size that initialisation gives the matrices."""
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator(name))
        if "norm" in name and name.endswith("weight"):
            values = 1 + values / 4
        elif parameter.dim() > 1:
            values = values / math.sqrt(parameter.shape[-1])
        parameter.data = values.to(device, dtype)
    return module.to(device)


# ---- multi-head attention ----

E, HEADS, B, L, S = 24, 4, 3, 6, 9


@dataclass(frozen=True)
class Case:
    """One call of a MultiheadAttention. Its text names what differs from the default."""

    inputs: str = "self"  # "memory": key is value; "three": all different; "sizes": with kdim and vdim
    options: tuple[str, ...] = ()  # constructor arguments that are not at their default
    padding: str = ""  # "bool", "float"
    mask: str = ""  # "bool", "float", "bool3", "float3", "causal", "float causal"
    weights: str = ""  # "mean", "heads"
    batch: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        named = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ", ".join(f"{name}={value}" for name, value in named.items()) or "default"

    def arguments(self) -> dict[str, Any]:
        """Of the constructor."""
        given: dict[str, Any] = {"embed_dim": E, "num_heads": HEADS, "bias": "no bias" not in self.options}
        if self.inputs == "sizes":
            given |= {"kdim": 10, "vdim": 14}
        return given | {name: name in self.options for name in ("batch_first", "add_bias_kv", "add_zero_attn")}


def mha_inputs(case: Case, device: str) -> dict[str, Any]:
    g = generator(case)
    keys = L if case.inputs == "self" else S
    sizes = {"query": (L, E), "key": (keys, 10 if case.inputs == "sizes" else E)}
    sizes["value"] = (keys, 14 if case.inputs == "sizes" else E)

    def normal(length: int, size: int) -> Tensor:
        shape = (length, size)
        if case.batch:
            shape = (B, length, size) if "batch_first" in case.options else (length, B, size)
        return torch.randn(shape, generator=g).to(device, case.dtype)

    t: dict[str, Any] = {"query": normal(*sizes["query"])}
    if case.inputs == "self":
        t |= {"key": t["query"], "value": t["query"]}
    else:
        t["key"] = normal(*sizes["key"])
        t["value"] = t["key"] if case.inputs == "memory" else normal(*sizes["value"])

    def mask(kind: str, shape: tuple[int, ...]) -> Tensor:
        """Hides some keys, but not the first one: what nobody sees is NaN in torch."""
        hidden = torch.rand(shape, generator=g) < 0.4
        hidden[..., 0] = False
        if "causal" in kind:
            hidden = torch.ones(shape, dtype=torch.bool).triu(1)
        if "float" not in kind:
            return hidden.to(device)
        values = torch.zeros(shape) if "causal" in kind else torch.randn(shape, generator=g)
        return values.masked_fill(hidden, -math.inf).to(device, case.dtype)

    if case.padding:
        t["key_padding_mask"] = mask(case.padding, (B, keys) if case.batch else (keys,))
    if case.mask:
        heads = (B if case.batch else 1) * HEADS
        t["attn_mask"] = mask(case.mask, (heads, L, keys) if "3" in case.mask else (L, keys))
        t["is_causal"] = "causal" in case.mask
    return t | {"need_weights": bool(case.weights), "average_attn_weights": case.weights != "heads"}


INPUTS = ("self", "memory", "three", "sizes")
OPTIONS = [(), ("batch_first",), ("no bias",), ("batch_first", "add_bias_kv"), ("add_zero_attn",)]
OPTIONS += [("batch_first", "add_bias_kv", "add_zero_attn"), ("no bias", "add_bias_kv", "add_zero_attn")]
PADDINGS = ("", "bool", "float")
MASKS = ("", "bool", "float", "bool3", "float3", "causal", "float causal")
WEIGHTS = ("", "mean", "heads")


def mha_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every 23rd of all combinations; 23 has no factor in common with the number of values of any field."""
    everything = itertools.product(INPUTS, OPTIONS, PADDINGS, MASKS, WEIGHTS, (True, False))
    for values in itertools.islice(everything, 0, None, 23):
        yield Case(*values, dtype)


def pair(case: Case, device: str) -> tuple[nn.Module, nn.Module]:
    arguments = {**case.arguments(), "dtype": case.dtype, "device": device}
    return pyops.nn.MultiheadAttention(**arguments), randomised(nn.MultiheadAttention(**arguments), device, case.dtype)


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multihead_attention(target: Target, dtype: torch.dtype) -> None:
    """Results, weights and the gradients of all parameters, inputs and masks."""
    with Oracle(f"MultiheadAttention on {target}") as oracle:
        for case in mha_cases(dtype):
            judge(oracle, case, *pair(case, target.device), mha_inputs(case, target.device))


class Calls:
    """Records what scaled_dot_product_attention was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple] = []

        def recording(*args: Any, **options: Any) -> Tensor:
            self.seen.append(args)
            return pyops.scaled_dot_product_attention(*args, **options)

        monkeypatch.setattr(transformer, "scaled_dot_product_attention", recording)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize(
    ("padding", "mask", "shape", "causal"),
    [
        ("", "", None, False),
        ("bool", "", (B, 1, 1, L), False),
        ("float", "", (B, 1, 1, L), False),
        ("", "bool", (1, 1, L, L), False),
        ("", "float3", (B, HEADS, L, L), False),
        ("bool", "bool", (B, 1, L, L), False),
        ("bool", "float", (B, 1, L, L), False),
        ("float", "bool3", (B, HEADS, L, L), False),
        ("", "causal", None, True),
        ("bool", "float causal", (B, 1, 1, L), True),
    ],
)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_masks_stay_as_small_as_they_are(
    calls: Calls, padding: str, mask: str, shape: tuple | None, causal: bool, weights: str
) -> None:
    case = Case("self", ("batch_first",), padding, mask, weights)
    mine, _ = pair(case, "cpu")
    mine(**mha_inputs(case, "cpu"))
    ((_, _, _, given, p, is_causal),) = calls.seen
    if causal and weights:  # torch reads the mask then
        shape = (B if padding else 1, 1, L, L)
    assert (None if given is None else tuple(given.shape)) == shape
    assert is_causal == (causal and not weights)
    assert p == 0.0


@pytest.mark.parametrize("padding", ["", "bool"])
def test_a_causal_mask_is_not_read(padding: str) -> None:
    """Its values do not matter once is_causal says what they are."""
    case = Case("self", ("batch_first",), padding, "float causal")
    mine, _ = pair(case, "cpu")
    inputs = mha_inputs(case, "cpu")
    expected = mine(**inputs)
    found = mine(**{**inputs, "attn_mask": torch.full((L, L), math.nan)})
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_masks_at_infinity(weights: str) -> None:
    """A key at +inf takes its row, also in the weights; a key that the padding hides stays hidden. No NaN anywhere."""
    mine = pyops.nn.MultiheadAttention(E, HEADS, batch_first=True)
    x = torch.randn(2, 3, E, requires_grad=True)
    mask = torch.tensor([[0.0, math.inf, 0.0], [math.inf, 0.0, 0.0], [0.0, 0.0, -math.inf]])
    padding = torch.tensor([[0.0, 0.0, 0.0], [-math.inf, 0.0, 0.0]])
    options = {"need_weights": bool(weights), "average_attn_weights": weights == "mean"}
    out, found = mine(x, x, x, padding, attn_mask=mask, **options)
    gradients = torch.autograd.grad(out.sum() + (0 if found is None else found[..., 0].sum()), [x, mine.in_proj_weight])
    assert all(t.isfinite().all() for t in (out, *gradients))
    if found is not None:
        rows = found if weights == "mean" else found[:, 0]
        assert torch.equal(rows[0, :2], torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
        assert not rows[1, :, 0].any()


@pytest.mark.parametrize(("inputs", "tensors"), [("self", 1), ("memory", 2), ("three", 3), ("sizes", 3)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_projections_are_views(calls: Calls, inputs: str, tensors: int, batch_first: bool) -> None:
    """q, k and v lie where the products left them."""
    case = Case(inputs, ("batch_first",) if batch_first else ())
    mine, _ = pair(case, "cpu")
    out, _ = mine(**mha_inputs(case, "cpu"))
    assert len({t.untyped_storage().data_ptr() for t in calls.seen[0][:3]}) == tensors
    assert out.is_contiguous()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "kinds", [("bool", ""), ("float", ""), ("bool", "float3"), ("bool", "bool"), ("bool", "causal")]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_without_keys_attends_to_nothing(
    target: Target, kinds: tuple[str, str], weights: str, dtype: torch.dtype
) -> None:
    """The second sample is all padding: the rest is what torch has without it, and it has gradients of 0 (in torch:
    NaN, pytorch issue 41508)."""
    case = Case("self", ("batch_first",), *kinds, weights, dtype=dtype)
    inputs = mha_inputs(case, target.device)
    padding = inputs["key_padding_mask"]
    padding[1] = True if padding.dtype == torch.bool else -math.inf
    mine, theirs = pair(case, target.device)
    mine.load_state_dict(theirs.state_dict())
    seen = [0, 2]

    def results(module: nn.Module, inputs: dict[str, Any], samples: list[int]) -> dict[str, Tensor]:
        x = inputs["query"].detach().requires_grad_()
        outputs = tensors_of(module(**{**inputs, "query": x, "key": x, "value": x}))
        picked = {name: y[samples] for name, y in outputs.items()}
        found = gradients(picked, {"x": x, **dict(module.named_parameters())})
        return found | {"d x": found["d x"][samples]}

    def without(inputs: dict[str, Any]) -> dict[str, Any]:
        mask = inputs.get("attn_mask")
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (B, HEADS))[seen].flatten(0, 1)
        return {**inputs, "query": inputs["query"][seen], "key_padding_mask": padding[seen], "attn_mask": mask}

    def wide(inputs: dict[str, Any]) -> dict[str, Any]:
        return {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}

    with warnings.catch_warnings(), Oracle("the other samples") as oracle:
        warnings.filterwarnings("ignore", "Support for mismatched")
        theirs_found = results(theirs, without(inputs), [0, 1])
        exact = results(copy.deepcopy(theirs).double(), wide(without(inputs)), [0, 1])
        oracle.check_all(case, results(mine, inputs, seen), theirs_found, exact)

    x = inputs["query"].detach().requires_grad_()
    out, found = mine(**{**inputs, "query": x, "key": x, "value": x})
    assert torch.equal(out[1], mine.out_proj.bias.expand_as(out[1]))
    assert found is None or not found[1].any()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        everything = gradients(tensors_of((out, found)), {"x": x, **dict(mine.named_parameters())})
    assert all(t.isfinite().all() for t in everything.values())
    assert not everything["d x"][1].any()


@pytest.mark.parametrize("bias", [torch.finfo(torch.float32).min, -1e30])
def test_a_row_of_equal_values_is_an_average(target: Target, bias: float) -> None:
    mha = pyops.nn.MultiheadAttention(E, HEADS, batch_first=True, device=target.device)
    x = torch.randn(1, L, E, device=target.device)
    _, weights = mha(x, x, x, key_padding_mask=torch.full((1, L), bias, device=target.device))
    assert torch.equal(weights, torch.full_like(weights, 1 / L))


def test_weights_under_autocast() -> None:
    """Computed in float32, whatever autocast makes of products."""
    q, k = torch.randn(2, B, HEADS, L, 8)
    expected = transformer._attention_weights(q, k, None, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transformer._attention_weights(q, k, None, False), expected)


@pytest.mark.parametrize("average", [False, True])
def test_returned_weights_are_those_that_were_used(average: bool) -> None:
    """With dropout too; torch returns them dropped, and so do we."""
    mha = randomised(pyops.nn.MultiheadAttention(E, HEADS, dropout=0.4, batch_first=True), dtype=torch.float64)
    x = torch.randn(B, L, E, dtype=torch.float64)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[0, 4:] = True
    torch.manual_seed(1)
    out, weights = mha(x, x, x, padding, average_attn_weights=False)
    v = torch.nn.functional.linear(x, mha.in_proj_weight[2 * E :], mha.in_proj_bias[2 * E :])
    heads = weights @ v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(out, mha.out_proj(heads.transpose(1, 2).flatten(2)))
    if average:
        torch.manual_seed(1)
        _, mean = mha(x, x, x, padding)
        torch.testing.assert_close(mean, weights.mean(1))
    kept = mha.eval()(x, x, x, padding, average_attn_weights=False)[1]
    dropped = weights == 0
    assert 0.2 < (dropped & (kept > 0)).sum() / (kept > 0).sum() < 0.6
    torch.testing.assert_close(weights[~dropped], kept[~dropped] / 0.6)


def test_dropout_belongs_to_training(calls: Calls) -> None:
    mha = pyops.nn.MultiheadAttention(E, HEADS, dropout=0.25)
    x = torch.randn(L, B, E)
    first = mha(x, x, x, need_weights=False)[0]
    mha.eval()(x, x, x, need_weights=False)
    mha.eval()(x, x, x)
    assert [args[4] for args in calls.seen] == [0.25, 0.0, 0.0]
    assert not torch.equal(mha.train()(x, x, x, need_weights=False)[0], first)
    torch.manual_seed(3)
    first = mha(x, x, x, need_weights=False)[0]
    torch.manual_seed(3)
    assert torch.equal(mha(x, x, x, need_weights=False)[0], first)


def test_hint_and_appended_keys() -> None:
    """torch's two answers: the mask shows bias_k to every query, the hint alone hides it."""
    case = Case("self", ("batch_first", "add_bias_kv"), mask="causal")
    mine, theirs = pair(case, "cpu")
    mine.load_state_dict(theirs.state_dict())
    inputs = mha_inputs(case, "cpu")
    hinted, shown = mine(**inputs)[0], mine(**{**inputs, "need_weights": True})[0]
    torch.testing.assert_close(hinted, theirs(**inputs)[0])
    torch.testing.assert_close(shown, theirs(**{**inputs, "need_weights": True})[0])
    assert not torch.allclose(hinted, shown)


@pytest.mark.usefixtures("target")
def test_gradcheck() -> None:
    """First and second order, through result and weights, with a query that sees nothing."""
    mha = randomised(pyops.nn.MultiheadAttention(4, 2, batch_first=True), dtype=torch.float64)
    shapes = ((2, 3, 4), (2, 2, 4), (4, 3, 2))
    x, memory, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    hidden = torch.zeros(shapes[2], dtype=torch.bool)
    hidden[0, 1] = True

    def call(x: Tensor, memory: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return mha(x, memory, memory, attn_mask=bias.masked_fill(hidden, -math.inf))

    assert torch.autograd.gradcheck(call, (x, memory, bias))
    assert torch.autograd.gradgradcheck(call, (x, memory, bias))


# ---- nested tensors ----


def nested(lengths: tuple[int, ...], size: int = E, dtype: torch.dtype = torch.float32) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its nested tensors a prototype
        return torch.nested.nested_tensor([torch.randn(n, size, dtype=dtype) for n in lengths])


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_nested_sequences_are_calls_of_their_own(target: Target, weights: bool, memory: bool) -> None:
    mha = randomised(pyops.nn.MultiheadAttention(E, HEADS, batch_first=True)).to(target.device)
    x = nested((5, 1, 4)).to(target.device)
    keys = nested((3, 7, 2)).to(target.device) if memory else x
    out, found = mha(x, keys, keys, need_weights=weights)
    assert out.is_nested
    for i, (query, key, y) in enumerate(zip(x.unbind(), keys.unbind(), out.unbind(), strict=True)):
        alone, w = mha(query, key, key)
        torch.testing.assert_close(y, alone)
        if weights:
            torch.testing.assert_close(found[i, : len(query), : len(key)], w)
            assert found[i].count_nonzero() == w.count_nonzero()


def test_nested_tensors_as_torch(target: Target) -> None:
    """Where torch takes them: without gradients, in eval(). One sequence is empty."""
    theirs = randomised(nn.MultiheadAttention(E, HEADS, batch_first=True), target.device).eval()
    mine = pyops.nn.MultiheadAttention(E, HEADS, batch_first=True, device=target.device).eval()
    mine.load_state_dict(theirs.state_dict())
    x = nested((5, 0, 2)).to(target.device)
    with torch.no_grad():
        for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            (y, w), (expected, v) = mine(x, x, x, **options), theirs(x, x, x, **options)
            torch.testing.assert_close(y.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
            if w is not None:
                torch.testing.assert_close(w, torch.where(v.isnan(), 0.0, v))


def test_nested_tensors_have_gradients() -> None:
    mha = randomised(pyops.nn.MultiheadAttention(E, HEADS, batch_first=True))
    parts = [torch.randn(n, E, requires_grad=True) for n in (4, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.as_nested_tensor(parts)
    out, _ = mha(x, x, x, need_weights=False)
    found = torch.autograd.grad(torch.cat(out.unbind()).square().sum(), [*parts, *mha.parameters()])
    alone = sum(mha(part, part, part)[0].square().sum() for part in parts)
    for mine, expected in zip(found, torch.autograd.grad(alone, [*parts, *mha.parameters()])):
        torch.testing.assert_close(mine, expected)


# ---- errors ----

x, y = torch.randn(B, L, E), torch.randn(B, S, E)
WRONG: list[tuple[dict, dict, type, str]] = [
    # arguments, constructor options, error, message
    ({"query": x[None]}, {}, ValueError, "query must have 3 dimensions, or 2 without a batch, got shape"),
    ({"key": y[0]}, {}, ValueError, "key must have 3 dimensions like query, got shape"),
    ({"value": y[..., :3]}, {}, ValueError, "value must have 24 features, got shape"),
    ({"value": y[:, 1:]}, {}, ValueError, r"value must have the length and batch of key, \(3, 9\), got \(3, 8\)"),
    ({"query": x[1:]}, {}, ValueError, "key must have the batch size of query, 2, got shape"),
    ({"key": y}, {"kdim": 5, "vdim": 24}, ValueError, "key must have 5 features"),
    ({"key_padding_mask": torch.zeros(B, S).byte()}, {}, TypeError, "key_padding_mask must be bool or floating"),
    ({"key_padding_mask": torch.zeros(B, L)}, {}, ValueError, r"key_padding_mask must have shape \(3, 9\), got"),
    ({"attn_mask": torch.zeros(S, L)}, {}, ValueError, r"attn_mask must have shape \(6, 9\) or \(12, 6, 9\), got"),
    ({"attn_mask": torch.zeros(B, L, S)}, {}, ValueError, r"attn_mask must have shape .*, got \(3, 6, 9\)"),
    ({"is_causal": True}, {}, ValueError, "attn_mask must be given beside is_causal=True"),
    ({"query": nested((2, 3))}, {}, TypeError, "key must be nested, strided, .* where one of the inputs is nested"),
    ({"query": "nested", "attn_mask": torch.zeros(L, S)}, {}, ValueError, "attn_mask must be None for nested inputs"),
    ({"query": "nested"}, {"batch_first": False}, ValueError, "batch_first must be True for nested inputs, got"),
    ({"query": "nested"}, {"add_bias_kv": True}, ValueError, "add_bias_kv must be None for nested inputs, got one"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), WRONG)
def test_errors(arguments: dict, options: dict, error: type, message: str) -> None:
    mha = pyops.nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **options})
    given = {"query": x, "key": y, "value": y, **arguments}
    if arguments.get("query") == "nested":
        given |= dict.fromkeys(("query", "key", "value"), nested((2, 3)))
    with pytest.raises(error, match=f"^MultiheadAttention: {message}"):
        mha(**given)


# ---- the Transformer's layers ----

LAYER_OPTIONS = [
    {"norm_first": norm_first, "batch_first": batch_first, **more}
    for norm_first, batch_first in itertools.product((False, True), (False, True))
    for more in ({}, {"bias": False}, {"activation": "gelu", "layer_norm_eps": 1e-3}, {"activation": torch.tanh})
]


def layer_inputs(decoder: bool, options: dict, dtype: torch.dtype, device: str, masks: str, batch: bool) -> dict:
    named = [(name, getattr(value, "__name__", value)) for name, value in options.items()]  # the same in every process
    g = generator((decoder, named, masks, batch))

    def normal(length: int) -> Tensor:
        shape = (length, E) if not batch else (B, length, E) if options["batch_first"] else (length, B, E)
        return torch.randn(shape, generator=g).to(device, dtype)

    def padding(length: int) -> Tensor:
        hidden = torch.rand((B, length) if batch else (length,), generator=g) < 0.4
        hidden[..., 0] = False
        return hidden.to(device)

    def mask(columns: int) -> Tensor:
        hidden = torch.rand((L, columns), generator=g) < 0.4
        hidden[:, 0] = False
        return hidden.to(device)

    first = "tgt" if decoder else "src"
    t: dict[str, Any] = {first: normal(L)}
    if decoder:
        t["memory"] = normal(S)
    if "padding" in masks:
        t[f"{first}_key_padding_mask"] = padding(L)
        if decoder:
            t["memory_key_padding_mask"] = padding(S)
    if "mask" in masks:
        t[f"{first}_mask"] = mask(L)
        if decoder:
            t["memory_mask"] = mask(S)
    if "causal" in masks:
        t[f"{first}_mask"] = nn.Transformer.generate_square_subsequent_mask(L, device=device, dtype=dtype)
        t["tgt_is_causal" if decoder else "is_causal"] = True
    return t


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", MODULES[1:], ids=lambda m: m.__name__)
def test_layers(target: Target, module: type, dtype: torch.dtype) -> None:
    """Results and the gradients of all parameters and inputs."""
    turn = itertools.cycle(itertools.product(("", "padding", "mask", "causal", "padding causal"), (True, False)))
    decoder = module is nn.TransformerDecoderLayer
    with Oracle(f"{module.__name__} on {target}") as oracle:
        for options, _ in itertools.product(LAYER_OPTIONS, range(3)):
            masks, batch = next(turn)
            arguments = {"d_model": E, "nhead": HEADS, "dim_feedforward": 40, "dropout": 0.0, **options}
            if dtype == torch.bfloat16:  # whose rounding carries values across the kink of relu
                arguments.setdefault("activation", "gelu")
            theirs = randomised(module(**arguments), target.device, dtype)
            mine = OURS[module](**arguments, device=target.device, dtype=dtype)
            inputs = layer_inputs(decoder, options, dtype, target.device, masks, batch)
            judge(oracle, f"{options} {masks} {batch}", mine, theirs, inputs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("module", MODULES[1:], ids=lambda m: m.__name__)
def test_dropout_of_everything(target: Target, module: type, norm_first: bool) -> None:
    """With p = 1 there is no chance in dropout: what is left is torch's."""
    arguments = {"d_model": E, "nhead": HEADS, "dim_feedforward": 40, "dropout": 1.0, "norm_first": norm_first}
    theirs = randomised(module(**arguments), target.device)
    mine = OURS[module](**arguments, device=target.device)
    options = {"batch_first": False}
    inputs = layer_inputs(module is nn.TransformerDecoderLayer, options, torch.float32, target.device, "", True)
    with Oracle("p = 1") as oracle:
        judge(oracle, "p = 1", mine, theirs, inputs)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The dropout probabilities of the calls of add_layer_norm."""
    seen = []

    def recording(*args: Any, p: float, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(p)
        return pyops.add_layer_norm(*args, p=p, **options)

    monkeypatch.setattr(transformer, "add_layer_norm", recording)
    return seen


@pytest.mark.parametrize(
    ("module", "norm_first", "count"),
    [
        (nn.TransformerEncoderLayer, False, 2),
        (nn.TransformerEncoderLayer, True, 1),
        (nn.TransformerDecoderLayer, False, 3),
        (nn.TransformerDecoderLayer, True, 2),
    ],
)
def test_dropout_addition_and_norm_are_one_pass(module: type, norm_first: bool, count: int, fused: list) -> None:
    layer = OURS[module](E, HEADS, 40, dropout=0.125, norm_first=norm_first)
    args = (torch.randn(L, B, E),) * (2 if module is nn.TransformerDecoderLayer else 1)
    layer(*args)
    assert fused == [0.125] * count
    fused.clear()
    layer.dropout1.p = 0.5
    layer(*args)
    assert fused == [0.5] + [0.125] * (count - 1)
    fused.clear()
    layer.eval().dropout1.train()
    layer(*args)
    assert fused == [0.5] + [0.0] * (count - 1), "each dropout has a mode of its own"


class Halved(nn.Module):
    """A dropout of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


CHANGES: list[tuple[str, Callable[[nn.Module], object], int]] = [
    # what is done to a layer, how, and the passes that stay fused
    ("norm hook", lambda layer: layer.norm1.register_forward_hook(lambda _, __, out: out + 1), 1),
    ("norm pre-hook", lambda layer: layer.norm2.register_forward_pre_hook(lambda _, args: (2 * args[0],)), 1),
    ("own norm", lambda layer: setattr(layer, "norm1", nn.Identity()), 1),
    ("RMSNorm", lambda layer: setattr(layer, "norm1", nn.RMSNorm(E)), 1),
    ("stock norm", lambda layer: setattr(layer.norm1, "__class__", nn.LayerNorm), 1),
    ("norm of two dimensions", lambda layer: setattr(layer, "norm1", pyops.nn.LayerNorm((L, E))), 1),
    ("patched norm", lambda layer: setattr(layer.norm1, "forward", lambda x: x + 3), 1),
    ("own dropout", lambda layer: setattr(layer, "dropout1", Halved()), 2),
    ("dropout hook", lambda layer: layer.dropout2.register_forward_hook(lambda _, __, out: out * 3), 2),
    ("own feed-forward", lambda layer: setattr(layer, "linear2", nn.Sequential(nn.Linear(40, E), nn.Tanh())), 2),
]


@pytest.mark.parametrize(("change", "count"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_changed_children_are_called(change: Callable, count: int, fused: list) -> None:
    """A child that is not what the layer was built with, or that somebody watches, does what it does in torch."""
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    theirs = nn.TransformerEncoderLayer(E, HEADS, 40, **options)
    mine = pyops.nn.TransformerEncoderLayer(E, HEADS, 40, **options)
    for layer in (theirs, mine):
        torch.manual_seed(5)
        change(layer)
        layer.double()
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(B, L, E, dtype=torch.float64)
    torch.testing.assert_close(mine(x), theirs(x))
    assert len(fused) == count


def test_dropout_before_an_own_norm() -> None:
    """Nothing is fused, but the dropout is there: with p = 1, x alone is left."""
    layer = pyops.nn.TransformerEncoderLayer(E, HEADS, 40, dropout=1.0)
    layer.norm1 = layer.norm2 = nn.Identity()
    x = torch.randn(L, B, E)
    assert torch.equal(layer(x), x)


def test_memory_efficient_norm_keeps_its_option(fused: list) -> None:
    layer = pyops.nn.TransformerEncoderLayer(E, HEADS, 40, dropout=0.0)
    x = torch.randn(L, B, E)
    expected = layer(x)
    fused.clear()
    layer.norm1.memory_efficient = True
    torch.testing.assert_close(layer(x), expected)
    assert len(fused) == 1


@pytest.mark.parametrize("module", MODULES[1:], ids=lambda m: m.__name__)
def test_children_and_initial_values(module: type) -> None:
    """The children have pyops classes, and equal seeds give torch's parameters."""
    torch.manual_seed(0)
    theirs = module(E, HEADS, 40, bias=False)
    torch.manual_seed(0)
    mine = OURS[module](E, HEADS, 40, bias=False, backend="eager")
    known = {nn.LayerNorm: pyops.nn.LayerNorm, nn.MultiheadAttention: pyops.nn.MultiheadAttention}
    for child, other in zip(mine.children(), theirs.children(), strict=True):
        assert type(child) is known.get(type(other), type(other))
        assert getattr(child, "backend", "eager") == "eager"
    for (name, ours), (other, expected) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_unknown_backend_is_refused(module: type) -> None:
    layer = OURS[module](E, HEADS, backend="quantum")
    count = {nn.MultiheadAttention: 3, nn.TransformerEncoderLayer: 1, nn.TransformerDecoderLayer: 2}[module]
    with pytest.raises(ValueError, match="backend must be one of"):
        layer(*(torch.randn(L, B, E),) * count)


# ---- saving, copying, compiling, transforming ----


def example(module: type, **options: Any) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Our module, torch's with the same parameters, and inputs with a padding mask."""
    given = {"batch_first": True, "dtype": torch.float64, **options}
    if module is nn.MultiheadAttention:
        case = Case("self", ("batch_first",), "bool", "float", dtype=given["dtype"])
        theirs, mine = (cls(E, HEADS, **given) for cls in (module, OURS[module]))
        inputs = mha_inputs(case, "cpu") | {"need_weights": True}
    else:
        theirs, mine = (cls(E, HEADS, 40, **{"dropout": 0.0, **given}) for cls in (module, OURS[module]))
        decoder = module is nn.TransformerDecoderLayer
        inputs = layer_inputs(decoder, {"batch_first": True}, given["dtype"], "cpu", "padding mask", True)
    randomised(theirs, dtype=given["dtype"])
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs, inputs


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In float64, mostly: what is asked here is whether the way was the right one, not how well it rounds."""
    assert found.keys() == expected.keys()
    for name, t in found.items():
        torch.testing.assert_close(t, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def assert_same(found: Any, expected: Any) -> None:
    assert_close(tensors_of(found), tensors_of(expected))


@pytest.fixture(params=MODULES, ids=lambda m: m.__name__)
def module(request: pytest.FixtureRequest) -> type:
    return request.param


pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched:UserWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo, of itself; the next one too
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:The PyTorch API of nested tensors:UserWarning",
)


def test_state_dict_both_ways(module: type) -> None:
    mine, theirs, inputs = example(module)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for parameter in mine.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict(mine.state_dict())
    assert_same(mine(**inputs), theirs(**inputs))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(module: type, clone: Callable) -> None:
    mine, _, inputs = example(module)
    copied = clone(mine)
    assert [type(m) for m in copied.modules()] == [type(m) for m in mine.modules()]
    assert_same(copied(**inputs), mine(**inputs))


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.full)])
def test_compiles_as_one_graph(module: type, dynamic: bool) -> None:
    mine, theirs, inputs = example(module)
    compiled = copy.deepcopy(mine)
    compiled.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_close(run(compiled, inputs), run(theirs, inputs))


@pytest.mark.usefixtures("fresh_compile")
def test_compiles_with_dropout_and_hints(module: type) -> None:
    mine, _, inputs = example(module, dropout=0.3, dtype=torch.float32)
    name = next(n for n in ("attn_mask", "src_mask", "tgt_mask") if n in inputs)
    inputs[name] = nn.Transformer.generate_square_subsequent_mask(L)
    inputs["tgt_is_causal" if name == "tgt_mask" else "is_causal"] = True
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    results = [tensors_of(compiled(**inputs))["result 0"] for _ in range(2)]
    assert not torch.equal(*results)
    results[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mine.parameters())


def test_exports(module: type) -> None:
    mine, _, inputs = example(module)
    mine.eval()
    program = torch.export.export(mine, (), inputs)
    assert_same(program.module()(**inputs), mine(**inputs))


def test_traces(module: type) -> None:
    mine, _, _ = example(module, dtype=torch.float32)
    mine.eval()
    args = (torch.randn(B, L, E),) * {nn.MultiheadAttention: 3, nn.TransformerEncoderLayer: 1}.get(module, 2)
    expected = mine(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(torch.jit.trace(mine, args)(*args), expected)
    graph = torch.fx.symbolic_trace(mine)
    assert_same(graph(*args), expected)
    assert "_multihead_attention" in graph.code


def test_functional_call_and_grad(module: type) -> None:
    """torch.func sees the parameters that it hands in; vmap gives the gradients of each sample."""
    mine, _, _ = example(module)
    count = {nn.MultiheadAttention: 3, nn.TransformerEncoderLayer: 1}.get(module, 2)
    x = torch.randn(4, 1, L, E, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        results = torch.func.functional_call(mine, parameters, (x,) * count)
        return tensors_of(results)["result 0"].square().sum()

    parameters = {name: p.detach() for name, p in mine.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        alone = torch.autograd.grad(loss(dict(mine.named_parameters()), sample), list(mine.parameters()))
        for name, expected in zip(parameters, alone):
            torch.testing.assert_close(found[name][i], expected)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, forward = torch.func.jvp(lambda p: loss(p, x[0]), (parameters,), (tangents,))
    expected = sum((g * t).sum() for g, t in zip(torch.func.grad(loss)(parameters, x[0]).values(), tangents.values()))
    torch.testing.assert_close(forward, expected)


@pytest.mark.parametrize("kind", ["autocast", "half", "bfloat16"])
def test_sixteen_bits(module: type, kind: str) -> None:
    """Types as torch's, numbers as the tolerance rule says."""
    mine, theirs, inputs = example(module, dtype=torch.float32)
    exact = copy.deepcopy(theirs).double()
    wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    if kind == "autocast":

        def call(m: nn.Module) -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return tensors_of(m(**inputs))
    else:
        dtype = getattr(torch, kind.replace("half", "float16"))
        mine, theirs = mine.to(dtype), theirs.to(dtype)
        exact.load_state_dict(theirs.state_dict())
        narrow = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
        wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in narrow.items()}

        def call(m: nn.Module) -> dict[str, Tensor]:
            return tensors_of(m(**narrow))

    with Oracle(kind) as oracle:
        oracle.check_all(module, call(mine), call(theirs), tensors_of(exact(**wide)))


def test_meta_device(module: type) -> None:
    """Shapes without numbers, as torch gives them."""
    mine, theirs, inputs = example(module, dtype=torch.float32)
    moved = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in inputs.items()}
    found, expected = tensors_of(mine.to("meta")(**moved)), tensors_of(theirs.to("meta")(**moved))
    assert {n: (t.shape, t.dtype, t.device) for n, t in found.items()} == {
        n: (t.shape, t.dtype, t.device) for n, t in expected.items()
    }


@pytest.mark.parametrize("size", ["batch", "length"])
def test_empty_inputs(module: type, size: str) -> None:
    mine, _, _ = example(module, dtype=torch.float32)
    empty = torch.randn((0, L, E) if size == "batch" else (B, 0, E), requires_grad=True)
    results = tensors_of(mine(*(empty,) * {nn.MultiheadAttention: 3, nn.TransformerEncoderLayer: 1}.get(module, 2)))
    assert results["result 0"].shape == empty.shape
    results["result 0"].sum().backward()
    assert empty.grad.shape == empty.shape


# ---- inside torch's containers ----


def stacked(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Transformer, nn.Transformer, dict]:
    """torch's Transformer, a replaced copy of it, and its inputs."""
    given = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 40, "dropout": 0.0, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor")
        theirs = randomised(nn.Transformer(E, HEADS, **given), dtype=dtype)
    mine = copy.deepcopy(theirs)
    g = generator(options)
    batch_first = options.get("batch_first", False)
    src, tgt = (
        torch.randn((B, n, E) if batch_first else (n, B, E), generator=g, dtype=torch.float64).to(dtype) for n in (S, L)
    )
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, 5:] = padding[2, 2:] = True
    inputs = {"src": src, "tgt": tgt, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    inputs["tgt_mask"] = nn.Transformer.generate_square_subsequent_mask(L, dtype=dtype)
    return mine, theirs, inputs


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.usefixtures("target")
def test_replaced_transformer(norm_first: bool, batch_first: bool) -> None:
    """In training and in eval(), where torch's encoder takes its nested-tensor path; and back again."""
    mine, theirs, inputs = stacked(norm_first=norm_first, batch_first=batch_first)
    report = pyops.replace(mine)
    assert not report.kept
    assert {row.code for row in report.rows} == {"ok"}
    hints = {"tgt_is_causal": True}
    assert_close(run(mine, inputs | hints), run(theirs, inputs | hints))
    with torch.no_grad():
        assert_same(mine.eval()(**inputs), theirs.eval()(**inputs))
    report.undo()
    assert [type(m) for m in mine.modules()] == [type(m) for m in theirs.modules()]
    with torch.no_grad():
        assert torch.equal(mine(**inputs), theirs(**inputs))


def test_encoder_of_our_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built from them, torch's encoder still hands over nested tensors in eval(), and they are served."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 40, batch_first=True), 2)
    mine = nn.TransformerEncoder(pyops.nn.TransformerEncoderLayer(E, HEADS, 40, batch_first=True), 2)
    mine.load_state_dict(theirs.state_dict())
    nested_calls = []
    forward = pyops.nn.TransformerEncoderLayer.forward

    def recording(self: nn.Module, src: Tensor, *args: Any, **options: Any) -> Tensor:
        nested_calls.append(src.is_nested)
        return forward(self, src, *args, **options)

    monkeypatch.setattr(pyops.nn.TransformerEncoderLayer, "forward", recording)
    x = torch.randn(B, L, E)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[0, 2:] = True
    with torch.no_grad():
        found = mine.eval()(x, src_key_padding_mask=padding)
        assert_same(found, theirs.eval()(x, src_key_padding_mask=padding))
        assert nested_calls == [True, True]
        assert not found[0, 2:].any()
        padding[1] = True
        assert not mine(x, src_key_padding_mask=padding)[1].any()


def test_encoder_around_torchs_attention() -> None:
    """A layer whose attention was left alone hands nested tensors on to it."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 40, batch_first=True), 2).eval()
    mine = copy.deepcopy(theirs)
    pyops.replace(mine, skip=nn.MultiheadAttention)
    assert type(mine.layers[0].self_attn) is nn.MultiheadAttention
    assert type(mine.layers[0]) is pyops.nn.TransformerEncoderLayer
    x, padding = torch.randn(B, L, E), torch.zeros(B, L, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        assert_same(mine(x, src_key_padding_mask=padding), theirs(x, src_key_padding_mask=padding))


@pytest.mark.usefixtures("fresh_compile")
def test_replaced_transformer_compiles() -> None:
    mine, theirs, inputs = stacked(batch_first=True)
    pyops.replace(mine)
    mine.compile(fullgraph=True, backend="aot_eager")
    hints = {"src_is_causal": False, "tgt_is_causal": True}
    assert_close(run(mine, inputs | hints), run(theirs, inputs | hints))


# ---- torch's own cases of these modules ----

CONTAINERS = (nn.TransformerEncoder, nn.Transformer)


@cache
def torchs_cases() -> dict[type, Any]:
    pytest.importorskip("expecttest", reason="torch's internal test tools need the package expecttest")
    from torch.testing._internal.common_modules import module_db

    return {info.module_cls: info for info in module_db if info.module_cls in (*MODULES, *CONTAINERS)}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cls", [*MODULES, *CONTAINERS], ids=lambda m: m.__name__)
def test_torchs_cases(target: Target, cls: type, training: bool) -> None:
    """torch's constructor arguments and inputs: results and gradients, and its own reference where it has one. Their
    sizes of 3 and 4 make norms and softmax so ill-conditioned that rounding says nothing."""
    info, dtype = torchs_cases()[cls], torch.float64
    names = {nn.MultiheadAttention: ("query", "key", "value"), nn.TransformerDecoderLayer: ("tgt", "memory")}
    checked = 0
    for case in info.module_inputs_func(info, target.device, dtype, requires_grad=True, training=training):
        theirs = cls(*case.constructor_input.args, **case.constructor_input.kwargs).train(training)
        mine = copy.deepcopy(randomised(theirs, target.device, dtype))
        assert pyops.replace(mine).replaced
        args, kwargs = case.forward_input.args, case.forward_input.kwargs
        inputs = dict(zip(names.get(cls, ("src", "tgt")), args)) | kwargs
        assert_close(run(mine, inputs), run(theirs, inputs))
        if case.reference_fn is not None:
            assert_same(mine(**inputs), case.reference_fn(theirs, *args, **kwargs))
        checked += 1
    assert checked > 5
