"""pyops.replace: what it changes, what it leaves alone and says why, and that undo() is exact."""

import copy
import fnmatch
import io
import pickle
import time

import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import pyops
from pyops.replace import _SWAPS

TORCH_CLASSES = [swap.torch_class for swap in _SWAPS]
FUSED = {swap.torch_class: swap.fused_class for swap in _SWAPS}


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, dim)
        self.norm2 = nn.RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.linear(self.norm1(x)))


class Model(nn.Module):
    def __init__(self, dim: int = 16, depth: int = 3):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))


NORMS = [f"blocks.{i}.{name}" for i in range(3) for name in ("norm1", "norm2")] + ["norm"]


class Doubled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def built(cls: type) -> nn.Module:
    """A layer of this class, with 8 features."""
    return cls(8) if "Norm" in cls.__name__ else cls(8, 2)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def replaced_paths(report: object) -> list[str]:
    return [row.path for row in report.replaced]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules whose fused forward was called, in order. Not by hooks: these would switch fast paths off."""
    called = []
    for fused in FUSED.values():

        def counting(self: nn.Module, *args, forward=fused.forward, **options) -> Tensor:
            called.append(self)
            return forward(self, *args, **options)

        monkeypatch.setattr(fused, "forward", counting)
    return called


# ---- what changes ----


@pytest.mark.parametrize("swap", _SWAPS, ids=lambda swap: swap.torch_class.__name__)
def test_fused_class_adds_no_state(swap) -> None:
    """Otherwise a module that was replaced would lack it, and one that was restored would keep it."""
    # nn.RNNBase is the class of its own that an nn.LSTM, GRU and RNN has the state of.
    shared = nn.RNNBase if issubclass(swap.torch_class, nn.RNNBase) else swap.torch_class
    assert issubclass(swap.fused_class, shared)
    assert built(swap.fused_class).__dict__.keys() == built(swap.torch_class).__dict__.keys()


def test_replaces_and_keeps_everything_else(calls: list) -> None:
    model = Model()
    model.blocks[1].eval()
    tensors = {name: id(t) for name, t in model.named_parameters()}
    before = [(type(m), m.training, m.__dict__.copy()) for m in model.modules()]
    report = pyops.replace(model)

    assert replaced_paths(report) == NORMS
    assert [row.code for row in report.rows] == ["ok"] * len(NORMS)
    for module, (cls, training, attributes) in zip(model.modules(), before):
        assert type(module) is FUSED.get(cls, cls)
        assert module.training is training
        assert module.__dict__ == attributes
    assert {name: id(t) for name, t in model.named_parameters()} == tensors
    model(torch.randn(2, 16))
    assert calls == [m for m in model.modules() if type(m) in FUSED.values()]


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    names, parameters = zip(*model.named_parameters())
    return {"y": y, **dict(zip(names, torch.autograd.grad(y.square().sum(), parameters)))}


def assert_same_results(ours: nn.Module, model: nn.Module, x: Tensor) -> None:
    """In float64, where a mistake stands out of the rounding of a whole model."""
    expected = results(model, x)
    with Oracle("replaced model") as oracle:
        oracle.check_all("float64", results(ours, x), expected, expected)


def test_same_outputs_and_gradients() -> None:
    model = Model(dim=48).double()
    replaced = copy.deepcopy(model)
    pyops.replace(replaced)
    assert_same_results(replaced, model, torch.randn(5, 7, 48).double())


@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_the_model_itself_is_a_layer(cls: type) -> None:
    model = built(cls)
    report = pyops.replace(model)
    assert type(model) is FUSED[cls]
    assert replaced_paths(report)[0] == ""
    assert "(model)" in str(report)
    report.undo()
    assert type(model) is cls


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}, {"device": "meta"}], ids=str)
def test_layers_without_some_tensors(options: dict) -> None:
    model = nn.LayerNorm(8, **options)
    assert len(pyops.replace(model).replaced) == 1
    model = model.to_empty(device="cpu")
    model.reset_parameters()
    assert model(torch.randn(2, 8)).shape == (2, 8)


def test_shared_module_is_replaced_once() -> None:
    shared = nn.LayerNorm(8)
    model = nn.ModuleDict({"first": shared, "inner": nn.Sequential(nn.Linear(8, 8), shared)})
    report = pyops.replace(model)
    (row,) = report.rows
    assert (row.action, row.code, row.paths) == ("replaced", "tied", ("first", "inner.1"))
    assert "inner.1" in row.reason
    assert model["first"] is model["inner"][1]
    assert report.undo() == 1
    assert type(shared) is nn.LayerNorm


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    model[1].weight = model[0].weight
    pyops.replace(model)
    assert model[1].weight is model[0].weight
    assert len(list(model.parameters())) == 3


def test_hooks_still_fire() -> None:
    fired = []
    model = nn.LayerNorm(8)
    model.register_forward_pre_hook(lambda *_: fired.append("before"))
    model.register_forward_hook(lambda *_: fired.append("after"))
    model.register_full_backward_hook(lambda *_: fired.append("backward"))
    assert len(pyops.replace(model).replaced) == 1
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert fired == ["before", "after", "backward"]


def test_pruning_works_through_a_hook() -> None:
    model = prune.random_unstructured(nn.LayerNorm(8), "weight", amount=4)
    pyops.replace(model)
    model(torch.randn(2, 8)).sum().backward()
    assert (model(torch.randn(2, 8)) == 0).any(dim=0).sum() == 4
    assert model.weight_orig.grad.count_nonzero() <= 4


# ---- undo, second call, dry run ----


def test_undo_is_exact() -> None:
    model = Model()
    before, state = classes(model), [module.__dict__.copy() for module in model.modules()]
    report = pyops.replace(model)
    assert report.undo() == len(NORMS)
    assert classes(model) == before
    assert [module.__dict__ for module in model.modules()] == state
    assert "(undone)" in str(report)


def test_undo_works_once() -> None:
    model = Model()
    report = pyops.replace(model)
    report.undo()
    pyops.replace(model)
    assert report.undo() == 0
    assert type(model.norm) is pyops.nn.LayerNorm


def test_undo_leaves_what_changed_since() -> None:
    model = Model()
    report = pyops.replace(model)
    parametrize.register_parametrization(model.norm, "weight", nn.ReLU())
    changed = type(model.norm)
    assert report.undo() == len(NORMS) - 1
    assert type(model.norm) is changed


def test_undo_does_not_reach_copies_or_other_reports() -> None:
    model = Model()
    first = pyops.replace(model, only="norm")
    second = pyops.replace(model)
    copied = copy.deepcopy(model)
    assert second.undo() == len(NORMS) - 1
    assert type(model.norm) is pyops.nn.LayerNorm
    assert type(copied.blocks[0].norm1) is pyops.nn.LayerNorm
    assert first.undo() == 1
    assert type(model.norm) is nn.LayerNorm


def test_second_call_changes_nothing() -> None:
    model = Model()
    pyops.replace(model)
    before = classes(model)
    report = pyops.replace(model)
    assert classes(model) == before
    assert report.replaced == []
    assert {(row.action, row.code) for row in report.rows} == {("kept", "already")}
    assert report.undo() == 0
    assert classes(model) == before


def test_dry_run_changes_nothing() -> None:
    model = Model()
    before = classes(model)
    plan = pyops.replace(model, dry_run=True)
    assert classes(model) == before
    assert plan.dry_run
    assert plan.undo() == 0
    assert "dry run" in str(plan)
    assert "undone" not in str(plan)
    report = pyops.replace(model)
    assert plan.rows == report.rows
    assert not report.dry_run


# ---- what is left alone ----


class Wrapper(torch.Tensor):
    """A tensor subclass, as a DTensor or a quantised tensor is."""


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(nn.LayerNorm(8), "weight", nn.ReLU())


def patched() -> nn.Module:
    module = nn.LayerNorm(8)
    module.forward = lambda x: x
    return module


def quantised() -> nn.Module:
    weight, bias = nn.LayerNorm(8).parameters()
    return torch.ao.nn.quantized.LayerNorm((8,), weight, bias, 1.0, 0)


def prepared_for_quantisation() -> nn.Module:
    module = nn.LayerNorm(8)
    module.qconfig = object()
    return module


def wrapped_weight() -> nn.Module:
    module = nn.LayerNorm(8)
    module.weight = nn.Parameter(torch.ones(8).as_subclass(Wrapper))
    return module


LEFT_ALONE = [
    (lambda: Doubled(8), "subclass"),
    (parametrized, "parametrized"),
    (patched, "patched"),
    (quantised, "quantised"),
    (prepared_for_quantisation, "quantised"),
    (wrapped_weight, "tensor_subclass"),
    (lambda: nn.LayerNorm(8, dtype=torch.complex64, device="meta"), "dtype"),
    (lambda: nn.LayerNorm(8, dtype=torch.float8_e4m3fn, device="meta"), "dtype"),
    (lambda: torch.jit.script(nn.LayerNorm(8)), "scripted"),
    (lambda: torch.jit.trace(nn.LayerNorm(8), torch.randn(2, 8)), "scripted"),
    (lambda: pyops.nn.LayerNorm(8), "already"),
    (lambda: pyops.nn.LayerNorm2d(8), "already"),
    (lambda: type("Derived", (pyops.nn.LayerNorm,), {})(8), "already"),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("build", "code"), LEFT_ALONE)
@pytest.mark.parametrize("nested", [False, True])
def test_left_alone_with_a_reason(build, code: str, nested: bool) -> None:
    module = build()
    model = nn.Sequential(nn.Linear(8, 8), module) if nested else module
    before = classes(model)
    (row,) = pyops.replace(model).rows
    assert (row.action, row.code) == ("kept", code)
    assert row.reason
    assert classes(model) == before


def test_other_modules_have_no_row() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.Dropout())
    report = pyops.replace(model)
    assert report.rows == []
    assert str(report) == "0 replaced, 0 kept, of 4 modules"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_sharded_modules_are_left_alone() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Sequential(fully_shard(nn.LayerNorm(8), mesh=mesh), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
        fully_shard(model[1], mesh=mesh)
        before = classes(model)
        assert [(row.path, row.code) for row in pyops.replace(model).rows] == [("0", "fsdp"), ("1.1", "fsdp")]
        assert classes(model) == before

        (row,) = pyops.replace(distribute_module(nn.LayerNorm(8), mesh)).rows
        assert row.code == "tensor_subclass"
        assert "DTensor" in row.reason

        replaced_first = Model()
        report = pyops.replace(replaced_first)
        fully_shard(replaced_first.norm, mesh=mesh)
        assert isinstance(replaced_first.norm, pyops.nn.LayerNorm)
        replaced_first(torch.randn(2, 16)).sum().backward()
        assert report.undo() == len(NORMS) - 1
    finally:
        torch.distributed.destroy_process_group()


# ---- only and skip ----

SELECTIONS = [
    ({"only": "norm"}, ["norm"]),
    ({"only": "blocks.1"}, ["blocks.1.norm1", "blocks.1.norm2"]),
    ({"only": "blocks.*.norm1"}, ["blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1"]),
    ({"only": ["norm", "blocks.[02].norm2"]}, ["blocks.0.norm2", "blocks.2.norm2", "norm"]),
    ({"only": nn.RMSNorm}, ["blocks.0.norm2", "blocks.1.norm2", "blocks.2.norm2"]),
    ({"only": Block, "skip": nn.RMSNorm}, ["blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1"]),
    ({"only": "layer_norm"}, NORMS),
    ({"only": ()}, []),
    ({"only": "*"}, NORMS),
    ({"only": ""}, NORMS),
    ({"only": {"norm": "any iterable will do"}}, ["norm"]),
    ({"only": "norm", "skip": "norm"}, []),
    ({"skip": "blocks"}, ["norm"]),
    ({"skip": "layer_norm"}, []),
    ({"skip": ["head", nn.Linear]}, NORMS),
    ({"skip": {"blocks.0", "blocks.1.*"}}, ["blocks.2.norm1", "blocks.2.norm2", "norm"]),
    ({"skip": ()}, NORMS),
]


@pytest.mark.parametrize(("arguments", "expected"), SELECTIONS)
def test_only_and_skip(arguments: dict, expected: list[str]) -> None:
    model = Model()
    report = pyops.replace(model, **arguments)
    assert replaced_paths(report) == expected
    assert [row.path for row in report.rows] == NORMS
    for path, module in model.named_modules():
        assert (type(module) in FUSED.values()) == (path in expected)
    for row in report.kept:
        assert row.code in ("only", "skip")
        assert row.reason


def test_a_shared_module_obeys_all_its_paths() -> None:
    shared = nn.LayerNorm(8)
    model = nn.ModuleDict({"first": shared, "second": shared})
    assert pyops.replace(model, skip="second").rows[0].code == "skip"
    assert pyops.replace(model, only="second").rows[0].action == "replaced"


def test_family_and_class_may_be_absent() -> None:
    """One script serves many models: what pyops knows need not be in each of them."""
    model = nn.Sequential(nn.Linear(8, 8))
    for entry in ("layer_norm", nn.RMSNorm, pyops.nn.LayerNorm):
        assert pyops.replace(model, only=entry, skip=entry).rows == []


ERRORS = [
    ({"only": "encoder.norm"}, ValueError, "only must match a module of the model by path or class, .*'encoder.norm'"),
    ({"only": ["norm", "Norm"]}, ValueError, "only must match .*got 'Norm'"),
    ({"skip": "norm3"}, ValueError, "skip must match .*got 'norm3'"),
    ({"only": nn.Conv2d}, ValueError, "only must match .*got nn.Conv2d"),
    ({"only": "norm", "skip": Doubled}, ValueError, "skip must match .*got .*Doubled"),
    ({"only": 3}, TypeError, "only must hold .*got 3"),
    ({"only": ["norm", None]}, TypeError, "only must hold .*got None"),
    ({"skip": int}, TypeError, "skip must hold .*got <class 'int'>"),
    ({"skip": nn.ReLU()}, TypeError, r"skip must hold .*got ReLU\(\)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_bad_selection_changes_nothing(arguments: dict, error: type, message: str) -> None:
    model = Model()
    before = classes(model)
    with pytest.raises(error, match=f"^replace: {message}"):
        pyops.replace(model, **arguments)
    assert classes(model) == before


@pytest.mark.parametrize("model", [None, torch.nn.functional.layer_norm, nn.LayerNorm, [nn.LayerNorm(8)]])
def test_model_must_be_a_module(model: object) -> None:
    with pytest.raises(TypeError, match=r"^replace: model must be a torch\.nn\.Module, got"):
        pyops.replace(model)


# ---- attention and the layers around it ----

ENCODER_LAYERS = [
    ({}, True),
    ({"norm_first": True, "activation": "gelu"}, True),
    ({"batch_first": False}, False),
    ({"bias": False}, False),
    ({"nhead": 1}, False),
    ({"activation": torch.tanh}, False),
]


def encoder_layer(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(
        **{"d_model": 16, "nhead": 4, "dim_feedforward": 32, "batch_first": True, **options}
    )


@pytest.mark.parametrize(("options", "bypassed"), ENCODER_LAYERS)
def test_fast_path_note_tells_the_truth(options: dict, bypassed: bool, calls: list) -> None:
    """Of a layer that is left alone itself."""
    layer = encoder_layer(**options)
    rows = pyops.replace(layer, only=["layer_norm", nn.MultiheadAttention]).replaced
    assert [row.path for row in rows] == ["self_attn", "norm1", "norm2"]
    assert [row.code for row in rows] == ["fastpath" if bypassed else "ok"] * 3

    children = [layer.norm1, layer.self_attn] if layer.norm_first else [layer.self_attn, layer.norm1]
    children.append(layer.norm2)
    x = torch.randn(2, 5, 16)
    layer(x)
    assert calls == children, "training runs the replacement"
    calls.clear()
    layer.eval()
    layer(x)
    assert calls == children, "eval() with gradients runs it"
    calls.clear()
    with torch.no_grad():
        layer(x)
    assert calls == ([] if bypassed else children)


@pytest.mark.parametrize("options", [options for options, _ in ENCODER_LAYERS])
def test_a_replaced_encoder_layer_has_no_fast_path(options: dict, calls: list) -> None:
    layer = encoder_layer(**options).eval()
    original = copy.deepcopy(layer)
    rows = pyops.replace(layer).rows
    assert [(row.path, row.code) for row in rows] == [(p, "ok") for p in ("", "self_attn", "norm1", "norm2")]
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), original(x))
    # The norms behind an addition run with it, not by themselves.
    norms = [layer.norm1] if layer.norm_first else []
    assert calls == [layer, *norms, layer.self_attn]


def test_fast_path_needs_equal_eps(calls: list) -> None:
    layer = encoder_layer().eval()
    layer.norm1.eps = 1e-3
    assert [row.code for row in pyops.replace(layer, only="layer_norm").replaced] == ["ok", "ok"]
    with torch.no_grad():
        layer(torch.randn(2, 5, 16))
    assert calls == [layer.norm1, layer.norm2]


def test_fast_path_can_be_switched_off(calls: list) -> None:
    layer = encoder_layer().eval()
    pyops.replace(layer, only="layer_norm")
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            layer(torch.randn(2, 5, 16))
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert calls == [layer.norm1, layer.norm2]


def test_fast_path_of_a_whole_encoder() -> None:
    class Layer(nn.TransformerEncoderLayer):
        pass

    model = nn.TransformerEncoder(Layer(16, 4, 32, batch_first=True), 2, norm=nn.LayerNorm(16))
    codes = {row.path: row.code for row in pyops.replace(model).rows}
    assert codes.pop("norm") == "ok"
    assert codes.pop("layers.0") == codes.pop("layers.1") == "subclass"
    assert len(codes) == 6
    assert set(codes.values()) == {"fastpath"}


def test_a_child_seen_before_its_layer_knows_of_it() -> None:
    """The norm comes first in the model, but the layer that holds it too is replaced."""
    layer = encoder_layer()
    model = nn.ModuleDict({"norm": layer.norm1, "layer": layer})
    assert [row.code for row in pyops.replace(model, dry_run=True).rows] == ["tied", "ok", "ok", "ok"]
    assert pyops.replace(model, skip=nn.TransformerEncoderLayer, only="norm").rows[0].code == "skip"
    assert pyops.replace(model, only="norm").rows[0].code == "fastpath"


def test_encoder_layer_with_exchanged_children() -> None:
    layer = encoder_layer()
    layer.norm1 = nn.Identity()
    assert [row.code for row in pyops.replace(layer).rows] == ["ok"] * 3


def test_out_proj_is_left_alone() -> None:
    """It belongs to the attention, which reads its tensors."""
    attention = nn.MultiheadAttention(16, 4)
    before = type(attention.out_proj)
    (row,) = pyops.replace(attention).rows
    assert (row.path, row.action) == ("", "replaced")
    assert type(attention.out_proj) is before


@pytest.mark.parametrize("name", ["_sa_block", "_ff_block"])
def test_patched_parts_of_a_layer(name: str) -> None:
    layer = encoder_layer()
    setattr(layer, name, getattr(layer, name))
    row = pyops.replace(layer).rows[0]
    assert (row.action, row.code) == ("kept", "patched")
    assert name in row.reason


def test_a_family_is_its_layers_only() -> None:
    """Not what they hold: the norms of a Transformer do not belong to its attention."""
    everything = {"attention": ["", "self_attn"], "layer_norm": ["norm1", "norm2"]}
    for family, paths in everything.items():
        assert replaced_paths(pyops.replace(encoder_layer(), only=family)) == paths
        (other,) = everything.keys() - {family}
        assert replaced_paths(pyops.replace(encoder_layer(), skip=other)) == paths
    assert len(pyops.replace(encoder_layer(), only=nn.TransformerEncoderLayer).replaced) == 4
    assert pyops.replace(encoder_layer(), skip=nn.TransformerEncoderLayer).replaced == []


# ---- saving, copying, compiling ----


def quiet_compile(test):
    """Dynamo warns about what it does itself."""
    for message in (".*should not be instantiated:DeprecationWarning", "The .grad attribute of a Tensor:UserWarning"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


def test_state_dict_round_trip() -> None:
    model, other = Model(), Model()
    state = copy.deepcopy(model.state_dict())
    pyops.replace(model)
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert other.load_state_dict(model.state_dict()) == model.load_state_dict(other.state_dict())


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle, through_save])
def test_copies_stay_replaced(clone) -> None:
    model = Model().eval()
    pyops.replace(model)
    copied = clone(model)
    assert classes(copied) == classes(model)
    x = torch.randn(3, 16)
    assert torch.equal(copied(x), model(x))


@quiet_compile
@pytest.mark.usefixtures("fresh_compile")
def test_replaced_model_compiles_as_one_graph() -> None:
    model = Model(depth=1).double()
    replaced = copy.deepcopy(model)
    pyops.replace(replaced)
    replaced.compile(fullgraph=True, backend="aot_eager")
    assert_same_results(replaced, model, torch.randn(5, 16).double())


def compile_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compile_layer(model: nn.Module) -> nn.Module:
    model[1] = torch.compile(model[1], backend="eager")
    return model


def compile_layer_in_place(model: nn.Module) -> nn.Module:
    model[1].compile(backend="eager")
    return model


@quiet_compile
@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("compiler", [compile_whole, compile_in_place, compile_layer, compile_layer_in_place])
def test_compiled_model_notices_the_exchange(compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyops.nn.LayerNorm, "forward", lambda _, x: torch.zeros_like(x))
    model = compiler(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    x = torch.randn(3, 8)
    expected = model(x)
    report = pyops.replace(model)
    assert [row.code for row in report.rows] == ["compiled"]
    assert model(x).count_nonzero() == 0
    report.undo()
    assert torch.equal(model(x), expected)


# ---- the report ----


def test_report_is_an_aligned_table() -> None:
    model = nn.Sequential(Model(), Doubled(16))
    report = pyops.replace(model, skip="0.blocks.0")
    head, rule, *lines, total = str(report).splitlines()
    starts = [head.index(name) for name in ("path", "type", "action", "code", "reason")]
    assert all(rule[start] == "-" for start in starts)
    assert len(lines) == len(report.rows) == len(NORMS) + 1
    for line, row in zip(lines, report.rows):
        for start, cell in zip(starts, (row.path, row.type, row.action, row.code, row.reason)):
            assert line[start:].startswith(cell)
            assert start == 0 or line[start - 2 : start] == "  "
    assert total == f"{len(report.replaced)} replaced, {len(report.kept)} kept, of 18 modules"
    assert repr(report) == f"<ReplaceReport: {total}>"
    assert fnmatch.filter(lines, "1 *Doubled *kept *subclass *is not exactly nn.LayerNorm")


def test_a_thousand_modules_take_no_time() -> None:
    model = nn.Sequential(*(Model(dim=2) for _ in range(80)))
    start = time.process_time()
    report = pyops.replace(model, only=["*.blocks.*", nn.LayerNorm], skip="7.*")
    str(report)
    assert time.process_time() - start < 0.2
    assert len(list(model.modules())) > 1000
