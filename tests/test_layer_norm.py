"""layer_norm, rms_norm, add_layer_norm and layer_norm2d: the numbers, on every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_norm_cases import (
    SEED,
    Case,
    call,
    dropout_mask,
    exact,
    exact_outputs,
    inputs,
    judge,
    ours,
    torch_outputs,
    torch_own,
)
from oracle import Oracle
from torch.autograd import gradcheck, gradgradcheck

import pyops
from pyops.philox import draw_seed, keep_mask, philox

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16, F64)

# Every function with every option that changes what it computes.
VARIANTS = [
    {"op": "layer_norm"},
    {"op": "layer_norm", "zero_centred": True},
    {"op": "layer_norm", "memory_efficient": True},
    {"op": "layer_norm", "memory_efficient": True, "zero_centred": True},
    {"op": "rms_norm", "affine": "w"},
    {"op": "rms_norm", "affine": "w", "zero_centred": True},
    {"op": "rms_norm", "affine": "w", "memory_efficient": True},
    {"op": "add_layer_norm"},
    {"op": "add_layer_norm", "p": 0.1},
    {"op": "add_layer_norm", "p": 0.5, "zero_centred": True},
    {"op": "layer_norm2d"},
    {"op": "layer_norm2d", "zero_centred": True},
    {"op": "layer_norm2d", "memory_efficient": True},
]
FUNCTIONS = [VARIANTS[0], VARIANTS[4], VARIANTS[8], VARIANTS[10]]


def label(variant: dict) -> str:
    return "-".join(str(v) if k == "op" else k if v is True else f"{k}={v}" for k, v in variant.items())


def shaped(variant: dict, rows: int, features: int) -> tuple[int, ...]:
    """A shape with this many rows and features; an image of an odd number of pixels for layer_norm2d."""
    return (2, features, rows, 3) if variant["op"] == "layer_norm2d" else (rows, features)


def sampled(cases: list[Case], backend: Target) -> list[Case]:
    """All cases; every third one for Triton's interpreter, which takes some 10 ms for a launch."""
    return cases[::3] if backend.name == "triton" and backend.device == "cpu" else cases


def judge_all(name: str, cases: list[Case], backend: Target, *, mean: bool = False) -> None:
    with Oracle(f"{name} on {backend}", mean=mean) as oracle:
        for case in cases:
            judge(oracle, case, backend)


# ---- the numbers ----


def test_forward(backend: Target) -> None:
    """Without gradients: the way that inference takes, which stores no statistics."""
    with Oracle(f"forward on {backend}") as oracle, torch.no_grad():
        for variant, dtype, features in itertools.product(VARIANTS, DTYPES, (48, 77, 600)):
            case = Case(shape=shaped(variant, 5, features), dtype=dtype, **variant)
            t = inputs(case, backend.device)
            wide = {n: v.double() for n, v in t.items()}
            oracle.check_all(case, call(case, t, backend.name), torch_outputs(case, t), exact_outputs(case, wide))


def test_backward(backend: Target) -> None:
    cases = [
        Case(shape=shaped(variant, 9, features), dtype=dtype, **variant)
        for variant, dtype, features in itertools.product(VARIANTS, DTYPES, (48, 77))
    ]
    judge_all("backward", sampled(cases, backend), backend, mean=True)


def test_affine(backend: Target) -> None:
    """No parameters, weight only, bias only, both; in the dtype of x, and in float32 beside 16-bit x."""
    cases = []
    for variant in VARIANTS:
        for affine in ("", "w") if variant["op"] == "rms_norm" else ("", "w", "b", "wb"):
            for dtype, param_dtype in ((F32, None), (BF16, None), (BF16, F32), (F16, F32)):
                case = {**variant, "affine": affine, "dtype": dtype, "param_dtype": param_dtype}
                cases.append(Case(shape=shaped(variant, 4, 40), **case))
    judge_all("parameters", sampled(cases, backend), backend, mean=True)


def test_normalized_shape(backend: Target) -> None:
    """One to three normalised dimensions, and no leading one."""
    cases = [
        Case(op=op, shape=shape, dims=dims, affine="w" if op == "rms_norm" else "wb", memory_efficient=efficient)
        for op in ("layer_norm", "rms_norm")
        for shape, dims in (((3, 2, 4, 5), 1), ((3, 2, 4, 5), 2), ((3, 2, 4, 5), 3), ((2, 4, 5), 3), ((17,), 1))
        for efficient in (False, True)
    ]
    judge_all("normalized_shape", cases, backend)


def test_edge_features(backend: Target) -> None:
    """One below, at and above 4, 8, 16 and 32 lanes and their multiples, and sizes that no vector divides."""
    sizes = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257)
    cases = [Case(shape=shaped(v, 3, C), dtype=d, **v) for v in FUNCTIONS for C in sizes for d in (F32, BF16)]
    sizes = (1, 3, 4, 5, 9, 33)
    cases += [Case(shape=shaped(v, 3, C), dtype=d, **v) for v in FUNCTIONS for C in sizes for d in (F16, F64)]
    judge_all("edge features", sampled(cases, backend), backend, mean=True)


def test_edge_rows(backend: Target) -> None:
    """Row counts around what a kernel takes at a time, and many rows of one feature."""
    cases = [Case(shape=shaped(v, R, 20), **v) for v in FUNCTIONS for R in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 17, 33, 65)]
    cases += [Case(shape=shaped(v, 700, C), dtype=d, **v) for v in FUNCTIONS for C in (1, 3) for d in (F32, BF16)]
    judge_all("edge rows", sampled(cases, backend), backend, mean=True)


# Just past what a kernel holds at once: 1,024 to 16,384 elements according to kernel and dtype. 4,099 and 16,385 divide
# by no vector. 70,001 passes 65,536, the most that some other kernels take.
@pytest.mark.parametrize("features", [1025, 4099, 8200, 16385, 16392, 70001])
def test_long_rows(backend: Target, features: int) -> None:
    variants = [VARIANTS[0], VARIANTS[4], VARIANTS[8], VARIANTS[2]]
    cases = [Case(shape=(2, features), dtype=F32, **variant) for variant in variants]
    cases += [Case(shape=(3, features), dtype=BF16, **VARIANTS[8])]
    if features <= 8200:
        cases += [Case(shape=(2, features), dtype=F64, **VARIANTS[0])]
    judge_all("long rows", cases, backend)


@pytest.mark.parametrize("variant", VARIANTS[10:], ids=label)
def test_many_channels(backend: Target, variant: dict) -> None:
    """Channels-first pixels that no longer fit the registers of a thread."""
    cases = [Case(shape=(1, C, 1, 5), dtype=d, **variant) for C in (65, 300, 1000, 4099) for d in (F32, BF16)]
    judge_all("many channels", cases, backend)


@pytest.mark.parametrize("layout", ["rows", "transposed", "batch_second", "step", "offset", "expanded", "overlapping"])
def test_strided_inputs(backend: Target, layout: str) -> None:
    """Every tensor of the call with these strides or this misalignment, incoming gradients included."""
    cases = [
        Case(shape=shape, dtype=dtype, layout=layout, **variant)
        for variant in [*VARIANTS[:1], *VARIANTS[2:3], *VARIANTS[4:5], *VARIANTS[8:9]]
        for dtype in (F32, BF16)
        for shape in ((6, 64), (6, 33), (3, 4, 40))
        if len(shape) == 2 or layout != "overlapping"
    ]
    judge_all(f"layout {layout}", cases, backend)


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
@pytest.mark.parametrize("shape", [(0, 7), (0, 1), (2, 0, 33)], ids=str)
def test_no_rows(backend: Target, variant: dict, shape: tuple[int, ...]) -> None:
    """Empty results, and parameter gradients of zero."""
    if variant["op"] == "layer_norm2d":
        shape = (0, shape[-1], 3, 5) if len(shape) == 2 else (2, shape[-1], 0, 5)
    case = Case(shape=shape, **variant)
    t = inputs(case, backend.device)
    results = ours(case, t, backend.name)
    for name, expected in exact(case, t).items():
        assert results[name].shape == expected.shape
        assert not results[name].any(), name


def test_extreme_values(backend: Target) -> None:
    """A mean far above the deviation, and scales from 1e-30 to 1e15 (whose square float32 still holds)."""

    changes = [(1.0, 2000.0), (1e15, 0.0), (1e-30, 0.0), (1e-5, 1.0)]
    with Oracle(f"extreme values on {backend}") as oracle:
        for variant, dtype, (scale, shift) in itertools.product(FUNCTIONS, (F32, F64), changes):
            case = Case(shape=shaped(variant, 6, 257), dtype=dtype, **variant)
            t = inputs(case, backend.device)
            for name in {"x", "residual"} & t.keys():
                t[name] = (t[name].detach() * scale + shift).requires_grad_()
            text = f"{case} * {scale} + {shift}"
            oracle.check_all(text, ours(case, t, backend.name), torch_own(case, t), exact(case, t))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_huge_values(backend: Target, dtype: torch.dtype) -> None:
    """1e30: float64 is exact; in float32 the variance overflows, and then the result is torch's."""
    case = Case(shape=(4, 33), dtype=dtype)
    t = inputs(case, backend.device)
    t["x"] = (t["x"].detach() * 1e30).requires_grad_()
    if dtype == F64:
        with Oracle(f"1e30 on {backend}") as oracle:
            oracle.check_all(case, ours(case, t, backend.name), torch_own(case, t), exact(case, t))
    else:
        y, expected = call(case, t, backend.name)["y"], torch_outputs(case, t)["y"]
        assert torch.equal(y.isnan(), expected.isnan())


def test_constant_rows(backend: Target) -> None:
    """The deviation is 0 and eps decides: y is the bias, up to the rounding of the mean times 1 / sqrt(eps)."""
    case = Case(shape=(4, 40))
    t = inputs(case, backend.device)
    value = torch.tensor([0.1, -3.0, 100.0, 0.0], device=backend.device)[:, None]
    t["x"] = value.expand(4, 40).clone().requires_grad_()
    mine, expected = ours(case, t, backend.name), exact(case, t)
    amplified = (value.abs().max() / math.sqrt(case.eps)).item()
    with Oracle(f"constant rows on {backend}") as oracle:
        oracle.check(case, mine["y"], expected["y"].float(), expected["y"], scale=amplified)
        oracle.check(case, mine["dx"], expected["dx"].float(), expected["dx"], scale=amplified)


@pytest.mark.parametrize("variant", FUNCTIONS, ids=label)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_bad_values_stay_in_their_row(backend: Target, variant: dict, bad: float) -> None:
    case = Case(shape=(4, 19, 3, 5) if variant["op"] == "layer_norm2d" else (6, 35), **{**variant, "p": 0.0})
    t = inputs(case, backend.device)
    clean = ours(case, t, backend.name)
    t["x"] = t["x"].detach().clone().requires_grad_()
    where = (2, slice(None), 1, 2) if variant["op"] == "layer_norm2d" else (2,)
    with torch.no_grad():
        t["x"][where][3] = bad
    marked = ours(case, t, backend.name)
    assert marked["y"][where].isnan().any()
    for name in ("y", "dx"):
        assert marked[name][where].isnan().any()
        kept = torch.ones_like(clean[name], dtype=torch.bool)
        kept[where] = False
        assert torch.equal(marked[name][kept], clean[name][kept]), name


@pytest.mark.parametrize("variant", FUNCTIONS, ids=label)
def test_eps_of_zero(backend: Target, variant: dict) -> None:
    """Rows with a deviation are right; one without is NaN, as in torch."""
    case = Case(shape=shaped(variant, 4, 21), **{**variant, "eps": 0.0, "p": 0.0})
    t = inputs(case, backend.device)
    judge_all("eps 0", [case], backend)
    for name in {"x", "residual"} & t.keys():
        t[name] = torch.zeros_like(t[name]).requires_grad_()
    y = call(case, t, backend.name)["y"]
    assert torch.equal(y.isnan(), torch_outputs(case, t)["y"].isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_streams_the_same_bits(dtype: torch.dtype) -> None:
    """Outputs that outgrow the cache (24 MiB of traffic per thread) go past it; half as many rows do not."""
    C, threads = 1024, torch.get_num_threads()
    R = (24 << 20) // (2 * C * dtype.itemsize)
    x, dy, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((R, C), (R, C), (C,), (C,)))

    def results(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x[rows].clone().requires_grad_()
        y = pyops.layer_norm(leaf, (C,), weight, bias, backend="cpu")
        return y.detach(), torch.autograd.grad(y, leaf, dy[rows])[0]

    torch.set_num_threads(1)
    try:
        whole, halves = results(slice(None)), zip(results(slice(R // 2)), results(slice(R // 2, R)))
    finally:
        torch.set_num_threads(threads)
    for streamed, plain in zip(whole, halves):
        assert torch.equal(streamed, torch.cat(plain))


def test_rms_norm_default_eps(backend: Target) -> None:
    """eps=None is torch's: the machine epsilon of the arithmetic. It shows where x is tiny."""
    for dtype in DTYPES:
        x = torch.full((2, 8), 1e-8 if dtype == F64 else 1e-4, dtype=dtype, device=backend.device)
        w = torch.ones(8, dtype=dtype, device=backend.device)
        y = pyops.rms_norm(x, 8, w, backend=backend.name)
        torch.testing.assert_close(y, torch.rms_norm(x, (8,), w))
        assert not torch.allclose(y.float(), torch.rms_norm(x, (8,), w, 1e-6).float(), rtol=0.05, atol=0)


# ---- gradients ----


def gradient_cases(dtype: torch.dtype) -> list[Case]:
    cases = [Case(shape=(2, 3, 2, 2) if v["op"] == "layer_norm2d" else (3, 5), dtype=dtype, **v) for v in VARIANTS]
    cases += [Case(shape=(2, 2, 3), dims=2, dtype=dtype), Case(affine="", shape=(3, 5), dtype=dtype)]
    cases += [Case(affine="b", shape=(3, 5), dtype=dtype), Case(op="rms_norm", affine="", shape=(3, 5), dtype=dtype)]
    return cases


@pytest.mark.parametrize("case", gradient_cases(F64), ids=str)
def test_gradcheck(backend: Target, case: Case) -> None:
    t = inputs(case, backend.device)
    names = [n for n, v in t.items() if v.requires_grad]

    def f(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(call(case, dict(zip(names, leaves)), backend.name).values())

    # By random directions on Triton's interpreter, where one call takes some 10 ms.
    assert gradcheck(f, [t[n] for n in names], fast_mode=backend.name == "triton")


@pytest.mark.parametrize("case", gradient_cases(F64), ids=str)
def test_gradgradcheck(backend: Target, case: Case) -> None:
    t = inputs(case, backend.device)
    names = [n for n, v in t.items() if v.requires_grad]

    def f(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(call(case, dict(zip(names, leaves)), backend.name).values())

    assert gradgradcheck(f, [t[n] for n in names], fast_mode=backend.name == "triton")


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[2], VARIANTS[4], VARIANTS[8], VARIANTS[10]], ids=label)
def test_third_order(backend: Target, variant: dict) -> None:
    """Gradients of every order: the third derivative equals that of the formula."""
    case = Case(shape=(2, 3, 2, 2) if variant["op"] == "layer_norm2d" else (3, 5), dtype=F64, **variant)
    t = inputs(case, backend.device)
    results = []
    for outputs in (call(case, t, backend.name), exact_outputs(case, t)):
        (first,) = torch.autograd.grad((outputs["y"] ** 2 * t["dy"]).sum(), t["x"], create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), t["x"], create_graph=True)
        results.append(torch.autograd.grad((second**2).sum(), t["x"])[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("variant", FUNCTIONS + VARIANTS[2:3], ids=label)
def test_only_some_gradients(backend: Target, variant: dict) -> None:
    """Any subset of the gradients: those that are asked for are right, the others are not formed."""
    case = Case(shape=shaped(variant, 7, 36), **variant)
    everything = inputs(case, backend.device)
    leaves = [n for n, v in everything.items() if v.requires_grad]
    with Oracle(f"subsets on {backend}") as oracle:
        for size in range(1, len(leaves)):
            for wanted in itertools.combinations(leaves, size):
                t = {n: v.detach().requires_grad_(n in wanted) for n, v in everything.items()}
                if case.memory_efficient:
                    judged = {n: r for n, r in torch_own(case, t).items() if n == "y" or n[1:] in wanted}
                else:
                    judged = torch_own(case, t)
                oracle.check_all(f"{case} {wanted}", ours(case, t, backend.name), judged, exact(case, t))


# ---- add_layer_norm ----


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout(backend: Target, p: float) -> None:
    """Outputs and gradients for the mask that the definition draws from the same seed."""
    cases = [
        Case(op="add_layer_norm", shape=shape, p=p, dtype=dtype)
        for shape in ((5, 33), (3, 4, 64), (2, 1030), (40, 1))
        for dtype in DTYPES
    ]
    judge_all(f"p={p}", cases, backend)


@pytest.mark.parametrize("used", ["y", "sum"])
def test_one_output_used(backend: Target, used: str) -> None:
    case = Case(op="add_layer_norm", shape=(5, 33), p=0.1)
    t = inputs(case, backend.device)
    unused = "dsum" if used == "y" else "dy"
    t[unused] = torch.zeros_like(t[unused])
    leaves = [t[n] for n in ("x", "residual", "weight", "bias")]
    output = call(case, t, backend.name)[used]
    gradients = torch.autograd.grad(output, leaves, t[f"d{used}"], allow_unused=True)
    own, wide = torch_own(case, t), exact(case, t)
    with Oracle(f"only {used} on {backend}") as oracle:
        for name, gradient in zip(("dx", "dresidual", "dweight", "dbias"), gradients):
            if gradient is None:
                assert not wide[name].any(), name
            else:
                oracle.check(name, gradient, own[name], wide[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 3), (65, 130), (3, 5000)], ids=str)
def test_equal_seeds_drop_the_same_elements(backend: Target, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """On every backend the mask is that of pyops.philox, in forward and in backward."""
    case = Case(op="add_layer_norm", shape=shape, p=0.3, dtype=dtype)
    t = inputs(case, backend.device)
    t["x"] = torch.ones_like(t["x"]).requires_grad_()
    t["residual"] = torch.zeros_like(t["residual"]).requires_grad_()
    keep = dropout_mask(case, t["x"].device)
    total = call(case, t, backend.name)["sum"]
    assert torch.equal(total != 0, keep)
    (dx,) = torch.autograd.grad(total, t["x"], torch.ones_like(total))
    assert torch.equal(dx != 0, keep)


def test_dropout_at_the_boundary(backend: Target) -> None:
    """An element is kept when the upper 24 bits of its lane are at least p * 2^24: exactly then, on every backend."""
    R, C = 3, 10
    torch.manual_seed(SEED)
    seed = draw_seed(torch.device(backend.device))
    lanes = philox(seed.cpu(), torch.arange(3)[None, :], torch.arange(R)[:, None])
    bits = (torch.stack(lanes, -1) >> 8).flatten(1)[:, :C]
    ones, zeros = torch.ones(R, C, device=backend.device), torch.zeros(R, C, device=backend.device)
    for threshold in bits[bits % 2 == 1][:3].tolist():  # odd: the last bit counts
        for step in (0, 1):
            torch.manual_seed(SEED)
            _, total = pyops.add_layer_norm(ones, zeros, p=(threshold + step) / 2**24, backend=backend.name)
            assert torch.equal(total.cpu() != 0, bits >= threshold + step)


def test_dropout_is_random(backend: Target) -> None:
    """The kept fraction is that of p, rows and calls are independent, and torch's seed repeats a call."""
    R, C, p = 64, 512, 0.25
    x, residual = torch.ones(R, C, device=backend.device), torch.zeros(R, C, device=backend.device)

    def kept() -> torch.Tensor:
        return pyops.add_layer_norm(x, residual, p=p, backend=backend.name)[1] != 0

    torch.manual_seed(SEED)
    first, second = kept(), kept()
    torch.manual_seed(SEED)
    assert torch.equal(first, kept())
    deviation = math.sqrt(p * (1 - p) / (R * C))
    assert abs(first.float().mean().item() - (1 - p)) < 5 * deviation
    # Two independent masks agree with probability p^2 + (1 - p)^2.
    agree = p * p + (1 - p) ** 2
    deviation = math.sqrt(agree * (1 - agree) / (R * C))
    for a, b in ((first, second), (first, first.roll(1, 0)), (first, first.roll(1, 1)), (first, first.roll(4, 1))):
        assert abs((a == b).float().mean().item() - agree) < 5 * deviation


def test_no_dropout_outside_of_training(backend: Target) -> None:
    x, residual = torch.randn(2, 6, 33, device=backend.device)
    state = torch.get_rng_state()
    y, total = pyops.add_layer_norm(x, residual, p=0.5, training=False, backend=backend.name)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, pyops.add_layer_norm(x, residual, backend=backend.name)[0])
    assert torch.equal(state, torch.get_rng_state()), "nothing random was drawn"


def test_philox_known_answers() -> None:
    """Three vectors of Random123's kat_vectors (philox4x32, 10 rounds)."""
    vectors = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]

    def signed(bits: int) -> int:
        return bits - 2**64 if bits >= 2**63 else bits

    for counter, key, expected in vectors:
        seed = torch.tensor([signed(key[0] | key[1] << 32), signed(counter[3])])
        row = torch.tensor(signed(counter[1] | counter[2] << 32))
        assert [lane.item() for lane in philox(seed, torch.tensor(counter[0]), row)] == expected


def test_keep_probability_at_its_ends() -> None:
    seed = torch.tensor([1, 2])
    assert keep_mask(seed, 9, 11, 0.0).all()
    assert not keep_mask(seed, 9, 11, 1.0).any()


# ---- layer_norm2d ----


@pytest.mark.parametrize("layout", ["dense", "channels_last", "transposed", "step"])
def test_images(backend: Target, layout: str) -> None:
    """Odd and even numbers of pixels, one pixel, one row of pixels; the layout of the result is that of x."""
    shapes = [(2, 16, 3, 5), (2, 33, 4, 4), (3, 20, 1, 1), (1, 8, 1, 67), (2, 1, 5, 5)]
    cases = [
        Case(op="layer_norm2d", shape=s, dtype=d, layout=layout, memory_efficient=e)
        for s in shapes
        for d in (F32, BF16)
        for e in (False, True)
    ]
    judge_all(f"images {layout}", cases, backend)
    t = inputs(cases[0], backend.device)
    y = call(cases[0], t, backend.name)["y"]
    (dx,) = torch.autograd.grad(y.sum(), t["x"])
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=memory_format)
    assert backend.name == "eager" or dx.is_contiguous(memory_format=memory_format)


def test_one_image(backend: Target) -> None:
    """(C, H, W), without a batch dimension."""
    judge_all("3-D", [Case(op="layer_norm2d", shape=(17, 3, 5), dtype=d) for d in DTYPES], backend)


def test_mixed_image_layouts(backend: Target) -> None:
    """Incoming gradients in another layout than x."""
    with Oracle(f"mixed layouts on {backend}") as oracle:
        for mine, other in (("channels_last", "dense"), ("dense", "channels_last")):
            case = Case(op="layer_norm2d", shape=(2, 12, 3, 5), layout=mine)
            t = inputs(case, backend.device)
            t["dy"] = inputs(Case(op="layer_norm2d", shape=(2, 12, 3, 5), layout=other), backend.device)["dy"]
            oracle.check_all(case, ours(case, t, backend.name), torch_own(case, t), exact(case, t))


# ---- the big grid ----


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_grid(backend: Target, variant: dict, dtype: torch.dtype) -> None:
    rows = (1, 4, 13, 130)
    sizes = (*range(1, 36), 48, 63, 64, 65, 96, 100, 127, 128, 129, 192, 255, 256, 257, 511, 512, 513, 768, 1000, 1024)
    cases = [Case(shape=shaped(variant, R, C), dtype=dtype, **variant) for C in sizes for R in rows if R * C < 20000]
    judge_all("grid", sampled(cases, backend), backend)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_and_layout(data: st.DataObject) -> None:
    """Shapes, strides and options that nobody thought of, on the CPU kernels."""
    variant = data.draw(st.sampled_from(VARIANTS))
    if variant["op"] == "layer_norm2d":
        shape = data.draw(st.tuples(*[st.integers(1, n) for n in (3, 40, 6, 9)]))
        layout = data.draw(st.sampled_from(["dense", "channels_last", "transposed", "step"]))
        dims = 1
    else:
        shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
        layout = data.draw(st.sampled_from(["dense", "rows", "transposed", "step", "offset", "expanded"]))
        dims = 1 if variant["op"] == "add_layer_norm" else data.draw(st.integers(1, len(shape)))
    case = Case(shape=shape, layout=layout, dims=dims, dtype=data.draw(st.sampled_from(DTYPES)), **variant)
    oracle = Oracle("")
    judge(oracle, case, Target("cpu", "cpu"))
    assert not oracle.failures
