"""Which backend serves a call, what is said about it, and by which way the call goes."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_GPU
from layer_norm_cases import Case, call, inputs, ours
from torch import Tensor
from torch.autograd import forward_ad

import pyops
from pyops import backend
from pyops.backend import BACKENDS, FLOATING, Backend

ROOT = Path(__file__).parents[1]
OPERATIONS = ("layer_norm", "rms_norm", "add_layer_norm", "layer_norm2d")


class Recorder:
    """The CPU kernels, with a list of what was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.kernels = BACKENDS["cpu"].load("layer_norm")

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.kernels, name)

        def recorded(*args: Any) -> Any:
            self.calls.append(name)
            return function(*args)

        return recorded if name.startswith("layer_norm_") else function


def a_case(op: str) -> Case:
    return Case(op=op, shape=(2, 5, 3, 3) if op == "layer_norm2d" else (4, 9), affine="w" if op == "rms_norm" else "wb")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A backend "recorder"."""
    kernels = Recorder()
    monkeypatch.setitem(BACKENDS, "recorder", Backend("recorder", lambda _: kernels, lambda _: None))
    yield kernels
    backend.leaf.cache_clear()


# ---- the choice ----


def test_automatic_choice() -> None:
    x = torch.randn(2, 3)
    assert backend.choose("layer_norm", x, None) == "cpu"
    assert backend.choose("layer_norm", x, "eager") == "eager"
    if HAS_GPU:
        assert backend.choose("layer_norm", x.cuda(), None) == "cuda"


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_function_runs_on_the_named_backend(op: str, recorder: Recorder) -> None:
    case = a_case(op)
    t = inputs(case, "cpu")
    ours(case, t, "recorder")
    assert recorder.calls == ["layer_norm_fwd", "layer_norm_bwd_workspace", "layer_norm_bwd"]
    recorder.calls.clear()
    ours(case, t, "eager")
    ours(case, t, "cpu")
    ours(case, t, None)
    assert recorder.calls == []
    with pyops.use_backend("recorder"):
        ours(case, t, None)
    assert len(recorder.calls) == 3


@pytest.mark.parametrize("module", [pyops.nn.LayerNorm(9), pyops.nn.RMSNorm(9), pyops.nn.LayerNorm2d(9)], ids=repr)
def test_modules_run_on_the_named_backend(module: Any, recorder: Recorder) -> None:
    x = torch.randn(2, 9, 3, 9)
    module.backend = "recorder"
    module(x)
    module.backend = None
    module(x)
    with pyops.use_backend("recorder"):
        module(x)
    assert recorder.calls == ["layer_norm_fwd"] * 2


def test_backward_stays_on_the_backend_of_forward(recorder: Recorder) -> None:
    x = torch.randn(4, 9, requires_grad=True)
    with pyops.use_backend("recorder"):
        y = pyops.layer_norm(x, 9)
    y.sum().backward()
    assert recorder.calls == ["layer_norm_fwd", "layer_norm_bwd"]


def test_use_backend_nests_and_restores(recorder: Recorder) -> None:
    x = torch.randn(4, 9)
    with pyops.use_backend("recorder"):
        with pyops.use_backend("eager"):
            pyops.layer_norm(x, 9)
        with pyops.use_backend(None):
            pyops.layer_norm(x, 9)
        assert recorder.calls == []
        pyops.layer_norm(x, 9, backend="cpu")
        assert recorder.calls == []
        with pytest.raises(KeyError), pyops.use_backend("eager"):
            raise KeyError
        thread = threading.Thread(target=lambda: pyops.layer_norm(x, 9))
        thread.start()
        thread.join()
        assert recorder.calls == ["layer_norm_fwd"]
    pyops.layer_norm(x, 9)
    assert recorder.calls == ["layer_norm_fwd"]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"^use_backend: backend must be one of eager, cpu, cuda, .*, got 'fpga'"):
        pyops.use_backend("fpga").__enter__()
    with pytest.raises(ValueError, match=r"^layer_norm: backend must be one of .*, got 'fpga'"):
        pyops.layer_norm(torch.randn(2, 3), 3, backend="fpga")


def refusal(name: str, x: Tensor | None = None) -> str:
    """What a call on this backend is refused with."""
    with pytest.raises(ValueError) as caught:
        pyops.layer_norm(torch.randn(2, 3) if x is None else x, 3, backend=name)
    return str(caught.value)


def test_named_backend_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_stem: str) -> None:
        pytest.fail("a backend that cannot serve was loaded")

    monkeypatch.setitem(BACKENDS, "absent", Backend("absent", load, lambda _: 'it is not here; use "eager"'))
    expected = "layer_norm: backend must be able to serve x, got 'absent': it is not here; use \"eager\""
    assert refusal("absent") == expected
    with pyops.use_backend("absent"), pytest.raises(ValueError, match="it is not here"):
        pyops.layer_norm(torch.randn(2, 3), 3)
    module = pyops.nn.LayerNorm(3, backend="absent")
    with pytest.raises(ValueError, match="it is not here"):
        module(torch.randn(2, 3))


def test_reason_and_remedy_of_cuda() -> None:
    message = refusal("cuda")
    if backend._C.cuda_archs is None:
        assert "was not built" in message
        assert "reinstall with nvcc" in message
    else:
        assert "serves CUDA tensors, not cpu" in message


def test_reason_and_remedy_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "serves CUDA tensors (CPU tensors under TRITON_INTERPRET=1), not cpu" in refusal("triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert "triton is not installed; pip install triton" in refusal("triton")


def test_reason_of_cpu() -> None:
    assert "serves CPU tensors, not meta" in refusal("cpu", torch.empty(2, 3, device="meta"))


def test_falling_back_to_torch_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_logged", set())
    x = torch.empty(2, 3, device="meta")
    with caplog.at_level(logging.INFO, logger="pyops"):
        for _ in range(3):
            pyops.layer_norm(x, 3)
        pyops.rms_norm(x, 3)
    messages = [record.getMessage() for record in caplog.records if record.name == "pyops"]
    assert len(messages) == 2
    assert messages[0].startswith("layer_norm on meta tensors runs torch's own operators (")


def test_nothing_is_said_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="pyops"):
        pyops.layer_norm(torch.randn(2, 3), 3)
    assert not caplog.records


# ---- explain ----


def test_explain() -> None:
    x = torch.randn(2, 3)
    found = pyops.explain("layer_norm", x, 3)
    assert found.chosen == "cpu"
    assert set(found.reasons) == set(BACKENDS)
    assert found.reasons["cpu"] == "chosen"
    assert found.reasons["eager"] == "could, when asked for by name"
    assert found.reasons["cuda"].startswith("cannot: ")
    lines = str(found).splitlines()
    assert lines[0] == "layer_norm runs on cpu"
    assert len(lines) == 1 + len(BACKENDS)
    assert pyops.explain("rms_norm", x=x, normalized_shape=3).chosen == "cpu"


def test_explain_a_named_backend() -> None:
    x = torch.randn(2, 3)
    assert pyops.explain("layer_norm", x, 3, backend="eager").reasons["eager"] == "chosen: asked for by name"
    with pyops.use_backend("eager"):
        assert pyops.explain("add_layer_norm", x, x).chosen == "eager"
    refused = pyops.explain("layer_norm", torch.empty(2, 3, device="meta"), 3, backend="cpu")
    assert refused.chosen.startswith("nothing (layer_norm: backend must")
    assert pyops.explain("layer_norm", torch.empty(2, 3, device="meta"), 3).chosen == "torch"


def test_explain_errors() -> None:
    with pytest.raises(ValueError, match=r"^explain: op must be one of layer_norm, .*, got 'softmax'"):
        pyops.explain("softmax", torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"^explain: x must be a torch.Tensor, got int"):
        pyops.explain("layer_norm", 3)
    with pytest.raises(TypeError, match=r"^explain: x must be a torch.Tensor, got NoneType"):
        pyops.explain("layer_norm", weight=torch.ones(3))


def test_explain_asks_x_alone(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_logged", set())
    x, meta = torch.randn(2, 3), torch.empty(3, device="meta")
    assert pyops.explain("layer_norm", weight=meta, x=x).chosen == "cpu"
    assert pyops.explain("layer_norm", torch.ones(2, 3, dtype=torch.int64), 3).chosen.startswith(
        "nothing (layer_norm: x"
    )
    assert pyops.explain("layer_norm", meta, 3).chosen == "torch"
    assert not caplog.records  # explaining is not a use


def test_built_architectures() -> None:
    """A GPU runs machine code of its major version up to its minor one, "a" code of itself alone, and older PTX."""
    for archs, served, refused in [
        ("80;90a", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        ("90a", [(9, 0)], [(8, 0), (8, 9), (10, 0), (12, 0)]),
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0), (7, 5)]),
    ]:
        assert all(backend._runs_on(archs, *capability) for capability in served)
        assert not any(backend._runs_on(archs, *capability) for capability in refused)


@pytest.mark.parametrize("op", OPERATIONS)
def test_explain_tells_the_truth(op: str, recorder: Recorder) -> None:
    case = a_case(op)
    t = {n: v.detach() for n, v in inputs(case, "cpu").items()}
    assert pyops.explain(op, t["x"], backend="recorder").chosen == "recorder"
    call(case, t, "recorder")
    assert recorder.calls == ["layer_norm_fwd"]


# ---- the way ----


def operators_of(f: Any) -> list[str]:
    """The operators of pyops that a profiler sees."""
    with torch.profiler.profile() as profile:
        f()
    return [event.name for event in profile.events() if event.name.startswith("pyops::")]


def test_plain_calls_avoid_the_dispatcher() -> None:
    """A small call would spend most of its time there."""
    for case in (Case(), a_case("rms_norm"), Case(op="add_layer_norm", p=0.2), Case(memory_efficient=True)):
        t = inputs(case, "cpu")
        assert operators_of(lambda case=case, t=t: ours(case, t, "cpu")) == []
        with torch.no_grad():
            assert operators_of(lambda case=case, t=t: call(case, t, "cpu")) == []


SAME_BITS = [
    *({"op": op, **options} for op in OPERATIONS for options in ({}, {"zero_centred": True})),
    *({"op": op, "memory_efficient": True} for op in OPERATIONS if op != "add_layer_norm"),
    {"op": "add_layer_norm", "p": 0.3},
    {"op": "layer_norm2d", "layout": "channels_last"},
]


@pytest.mark.parametrize("options", SAME_BITS, ids=str)
def test_both_ways_give_the_same_bits(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, no-grad forward and backward all in C++, and by way of Python; also above the size where the statistics
    are kept."""
    image = options["op"] == "layer_norm2d"
    rows = [(9, 33), (9, 64), (3, 4, 40), (0, 5), (400, 50)]
    shapes = [(2, 9, 3, 5), (0, 4, 2, 2), (2, 40, 16, 17)] if image else rows
    ways = {"C++": BACKENDS["cpu"].load, "Python": lambda _: None}
    for shape, dtype, affine in itertools.product(shapes, FLOATING, ["wb", "w", "b", ""]):
        if options["op"] == "rms_norm" and "b" in affine:
            continue
        case = Case(shape=shape, dtype=dtype, affine=affine, **options)
        t = inputs(case, "cpu")
        results = []
        for kernels in ways.values():
            with monkeypatch.context() as patch:
                patch.setattr(importlib.import_module("pyops.layer_norm"), "cpu_kernels", kernels)
                results.append(ours(case, t, "cpu"))
                with torch.no_grad():
                    results[-1] |= {f"{n} without grad": v for n, v in call(case, t, "cpu").items()}
        assert results[0].keys() == results[1].keys()
        for name, direct in results[0].items():
            assert torch.equal(direct, results[1][name]), (str(case), name)


def test_unused_sum_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that autograd does not send stays None down to the kernels: no zeros are made and read."""
    seen = []
    kernels = BACKENDS["cpu"].load("layer_norm")

    class Watching(Recorder):
        def layer_norm_bwd(self, dy: Tensor, dsum: Tensor | None, *rest: Any) -> None:
            seen.append(dsum)
            kernels.layer_norm_bwd(dy, dsum, *rest)

    watching = Watching()
    monkeypatch.setitem(BACKENDS, "watching", Backend("watching", lambda _: watching, lambda _: None))
    x = torch.randn(4, 9, requires_grad=True)
    y, total = pyops.add_layer_norm(x, x, backend="watching")
    y.sum().backward(retain_graph=True)
    assert seen == [None]
    (y.sum() + total.sum()).backward()
    assert isinstance(seen[1], Tensor)


def test_is_plain() -> None:
    x = torch.randn(2, 3)
    assert backend.is_plain(x, None, torch.nn.Parameter(x))
    assert not backend.is_plain(x.as_subclass(type("Sub", (Tensor,), {})))
    assert not backend.is_plain(torch.randn(2, 3, dtype=torch.complex64).conj().imag)
    assert not backend.is_plain(torch._efficientzerotensor((2, 3)))
    with torch._subclasses.FakeTensorMode():
        assert not backend.is_plain(x)
    seen = []
    torch.vmap(lambda x: seen.append(backend.is_plain(x)) or x)(x)
    torch.func.grad(lambda x: seen.append(backend.is_plain(x)) or x.sum())(x)
    assert seen == [False, False]
    assert backend.is_plain(x)


def test_forward_ad_level_left_open_elsewhere() -> None:
    """A dual level takes the definition even for tensors that are not dual, and leaves the result right."""
    x = torch.randn(2, 3)
    expected = pyops.layer_norm(x, 3, backend="eager")
    with forward_ad.dual_level():
        assert torch.equal(pyops.layer_norm(x, 3, backend="cpu"), expected)
    assert backend.is_plain(x)


MISSING = """
import sys
import torch
owner, _, name = sys.argv[1].rpartition(".")
delattr(eval(owner), name)
import pyops
x = torch.randn(5, 33, requires_grad=True)
with torch.profiler.profile() as profile:
    y = pyops.layer_norm(x, 33, backend="cpu")
    (dx,) = torch.autograd.grad(y.square().sum(), x)
names = {event.name for event in profile.events()}
assert "pyops::layer_norm_fwd" in names or "forward_ad" in owner, sorted(names)
expected = torch.nn.functional.layer_norm(x, (33,))
torch.testing.assert_close(y, expected)
torch.testing.assert_close(dx, torch.autograd.grad(expected.square().sum(), x)[0])
"""


@pytest.mark.parametrize(
    "name",
    [
        "torch._C._len_torch_dispatch_stack",
        "torch._C._functorch.is_legacy_batchedtensor",
        "torch.autograd.forward_ad._current_level",
    ],
)
def test_missing_private_name(name: str) -> None:
    """Where a later torch lacks what the guard asks, every call takes a way that is always right, if slower."""
    run = [sys.executable, "-c", MISSING, name]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
