"""The benchmark's own claims: wrong results are found, ratios mean what they say, regressions change the exit status.
No assertion depends on how long anything takes."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import __main__ as cli
from bench import bench_layer_norm, compare, harness, plot
from bench.case import Case, InputSet, Judge, Provider

CPU = torch.device("cpu")


def report(ours=False, us=None, correct=True, failure=""):
    times = {"min_us": us, "q25_us": us, "median_us": us, "q75_us": us}
    return {"ours": ours, "correct": correct, "failure": failure, "errors": {"y": 1e-7}, "peak_bytes": 8, **times}


def entry(name="case", mode="fwd", **providers):
    """A case of a result file, with times in microseconds: ours=10.0, torch=20.0, or a ready report."""
    reports = {n: p if isinstance(p, dict) else report(n.startswith("ours"), p) for n, p in providers.items()}
    fields = {"op": "layer_norm", "group": "LayerNorm", "bytes": 1000, "floor_us": 1.0}
    return {"name": name, "dtype": "fp32", "mode": mode, "providers": reports, **fields}


def result(*cases, **machine):
    facts = {"cpu": "a", "gpu": None, "torch": "2", "threads": 2}
    return {"machine": facts | machine, "settings": {"device": "cpu"}, "cases": list(cases)}


# ---- ratios ----


def test_ratio_is_to_the_fastest_correct_peer():
    wrong = report(us=1.0, correct=False, failure="y is wrong")
    case = entry(ours=10.0, torch=30.0, compile=20.0, cheat=wrong)
    assert compare.fastest_peer(case) == ("compile", 20.0)
    assert compare.ratio(case, "ours") == 2.0
    assert compare.ratio(case, "ours", among={"torch"}) == 3.0


def test_no_ratio_when_ours_is_wrong_or_no_peer_is_right():
    wrong = report(us=1.0, correct=False)
    assert compare.ratio(entry(ours=report(True, 1.0, correct=False), torch=9.0), "ours") is None
    assert compare.ratio(entry(ours=10.0, torch=wrong), "ours") is None


def test_headline_is_the_geometric_mean_and_names_the_worst_case():
    cases = [
        entry("a", ours=10.0, torch=40.0),
        entry("b", ours=10.0, torch=10.0),
        entry("c", "bwd", ours=1.0, torch=3.0),
    ]
    cases.append(entry("d", ours=report(True, correct=False), torch=1.0))
    rows = {row["mode"]: row for row in compare.headline(cases)}
    assert rows["fwd"]["geometric_mean"] == pytest.approx(2.0)
    assert (rows["fwd"]["worst_case"], rows["fwd"]["worst_ratio"]) == ("b", 1.0)
    assert (rows["fwd"]["cases"], rows["fwd"]["without_ratio"]) == (3, 1)
    assert rows["bwd"]["geometric_mean"] == pytest.approx(3.0)


# ---- compare ----


def run_compare(tmp_path, before, after, *options):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (before, after)):
        path.write_text(json.dumps(content))
    return cli.main(["compare", *map(str, paths), *options])


BEFORE = result(entry("a", ours=10.0, torch=20.0), entry("b", ours=10.0, torch=20.0))


@pytest.mark.parametrize(
    ("after", "status"),
    [
        (result(entry("a", ours=10.0, torch=20.0), entry("b", ours=10.0, torch=20.0)), 0),
        # One case of ours became 1.5 times slower beside the same peer.
        (result(entry("a", ours=15.0, torch=20.0), entry("b", ours=10.0, torch=20.0)), 1),
        # Within the bound of 1.3.
        (result(entry("a", ours=12.5, torch=20.0), entry("b", ours=10.0, torch=20.0)), 0),
        # The whole machine is 3 times slower: the ratios did not move.
        (result(entry("a", ours=30.0, torch=60.0), entry("b", ours=30.0, torch=60.0)), 0),
        # A faster peer that the first run did not have is no regression of ours.
        (result(entry("a", ours=10.0, torch=20.0, liger=2.0), entry("b", ours=10.0, torch=20.0)), 0),
        # Ours is wrong now, though faster.
        (result(entry("a", ours=report(True, 1.0, correct=False), torch=20.0)), 1),
        # Nothing in common.
        (result(entry("z", ours=10.0, torch=20.0)), 2),
    ],
)
def test_compare_exit_status(tmp_path, after, status):
    assert run_compare(tmp_path, BEFORE, after) == status


def test_compare_bound_is_an_option(tmp_path):
    after = result(entry("a", ours=15.0, torch=20.0))
    assert run_compare(tmp_path, BEFORE, after, "--bound", "1.6") == 0
    assert run_compare(tmp_path, BEFORE, after, "--bound", "1.4") == 1


def test_compare_says_what_it_saw(tmp_path, capsys):
    after = result(entry("a", ours=15.0, torch=20.0), threads=1)
    run_compare(tmp_path, BEFORE, after)
    printed = capsys.readouterr().out
    assert "threads" in printed
    assert "not in the second run" in printed
    assert "1 regressed" in printed


@pytest.mark.parametrize("options", [["missing.json", "missing.json"], ["a", "b", "--bound", "0.5"]])
def test_compare_refuses_bad_arguments(options):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *options])
    assert stopped.value.code == 2


# ---- verification ----


def scale_case(dtype=torch.float32, **fields):
    """y = x * weight, (R, C) by (C,)."""

    def inputs(generator, device):
        shapes = {"x": (64, 32), "weight": (32,)}
        randn = {n: torch.randn(s, generator=generator, device=device, dtype=torch.float32) for n, s in shapes.items()}
        return {n: t.to(dtype).requires_grad_() for n, t in randn.items()}

    costs = {mode: 2 * 64 * 32 * dtype.itemsize for mode in ("fwd", "bwd", "fwd_bwd")}
    fields = {"nbytes": costs, "flops": costs} | fields
    eager = torch.mul
    return Case("toy", "scale", "toy", (64, 32), dtype, inputs, eager, lambda _: eager, **fields)


class WithGradient(torch.autograd.Function):
    """x * weight, whose gradient of the weight is off by a factor."""

    @staticmethod
    def forward(ctx, x, weight, factor):
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        return x * weight

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy * weight, (dy * x).sum(0) * ctx.factor, None


def overwrite_input(x, weight):
    y = x * weight
    x.detach().mul_(2)
    return y


class OverwritesGradient(WithGradient):
    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dweight = (dy * x).sum(0)
        return dy.mul_(weight), dweight, None


def one_element_off(x, weight):
    """Too little to show in the norm of 2,048 elements."""
    y = x * weight
    with torch.no_grad():
        y[3, 5] += 5e-4
    return y


@pytest.mark.parametrize(
    ("fn", "mode", "failure"),
    [
        (lambda x, w: w * x, "fwd_bwd", ""),
        (lambda x, w: WithGradient.apply(x, w, 1.0), "fwd_bwd", ""),
        (lambda x, w: WithGradient.apply(x, w, 1.01), "fwd", ""),
        (lambda x, w: WithGradient.apply(x, w, 1.01), "bwd", "dweight is wrong"),
        (lambda x, w: x * w * 1.001, "fwd", "y is wrong"),
        (one_element_off, "fwd", "y is wrong"),
        (lambda x, w: x * w * math.nan, "fwd", "y is wrong"),
        (lambda x, w: (x * w).double(), "fwd", "torch.float64, not"),
        (lambda x, w: (x * w)[:1], "fwd", "(1, 32)"),
        (overwrite_input, "fwd", "writes to its inputs"),
        (lambda x, w: OverwritesGradient.apply(x, w, 1.0), "bwd", "writes to its inputs"),
    ],
)
def test_wrong_providers_are_found(fn, mode, failure):
    provider = Provider("p", fn)
    Judge(scale_case(), mode, 1, CPU).verify(provider)
    assert failure in provider.failure
    assert bool(provider.failure) == bool(failure)


def test_unwritten_elements_of_ours_are_found():
    """Fresh memory is mostly zeros, and x is zero here: only the poison tells that nothing was written."""
    case = scale_case()

    def inputs(generator, device):
        return {n: torch.zeros_like(t).requires_grad_() for n, t in scale_case().inputs(generator, device).items()}

    case = Case(**{f: getattr(case, f) for f in case.__dataclass_fields__} | {"inputs": inputs})
    provider = Provider("ours", lambda *_: torch.empty(64, 32), ours=True)
    Judge(case, "fwd", 1, CPU).verify(provider, poison=True)
    assert "y is wrong" in provider.failure
    assert not torch.are_deterministic_algorithms_enabled()


def test_inputs_are_restored_for_the_next_provider():
    judge = Judge(scale_case(), "fwd", 1, CPU)
    judge.verify(Provider("bad", overwrite_input))
    good = Provider("good", torch.mul)
    judge.verify(good)
    assert not good.failure


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_definition_itself_is_accepted_in_every_dtype(dtype):
    for case in bench_layer_norm.cases("cpu", dtype):
        if math.prod(case.shape) < 1 << 18:
            for mode in set(case.modes) - {"bwd"}:
                provider = Provider("torch", case.eager)
                Judge(case, mode, 5, CPU).verify(provider)
                assert not provider.failure, (case.name, mode)


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize(
    ("drop", "failure"),
    [
        (lambda x: F.dropout(x, 0.1), ""),
        (lambda x: F.dropout(x, 0.15), "keeps"),
        (lambda x: x, "keeps"),
        (lambda x: F.dropout(x, 0.1) * 0.9, "y is wrong"),  # not scaled by 1 / (1 - p)
    ],
)
def test_dropout_is_judged_by_its_own_mask(drop, failure, prenorm):
    case = bench_layer_norm.add_layer_norm((64, 96), torch.float32, 0.1, prenorm=prenorm)

    def run(x, residual, weight, bias):
        h = drop(x) + residual
        y = F.layer_norm(h, (96,), weight, bias, bench_layer_norm.EPS)
        return (y, h) if prenorm else y

    provider = Provider("p", run)
    Judge(case, "fwd_bwd", 3, CPU).verify(provider)
    assert failure in provider.failure
    assert bool(provider.failure) == bool(failure)


def test_mask_is_read_right_where_a_gradient_is_zero_by_itself():
    """In bf16 dsum and the gradient through the norm cancel in one of a thousand elements."""
    case = bench_layer_norm.add_layer_norm((16, 96), torch.float64, 0.1)
    args = [t.detach() for t in InputSet(case, 1, CPU).args]
    mask = (torch.rand(16, 96, generator=torch.Generator().manual_seed(1)) >= 0.1).double()
    y = F.layer_norm(args[0] * mask / 0.9 + args[1], (96,), args[2], args[3], bench_layer_norm.EPS)
    zero = torch.zeros(16, 96, dtype=torch.bool)
    for kept in (0, 1):
        zero[tuple((mask == kept).nonzero()[3])] = True
    got = {"y": y, "dx": mask.masked_fill(zero, 0), "dresidual": torch.ones(16, 96).masked_fill(zero, 0)}
    torch.testing.assert_close(case.reference(got, *args)[0], y, rtol=0, atol=1e-12)


# ---- measurement ----


@pytest.fixture(scope="module")
def bench():
    # `fresh`: the test process keeps its own malloc settings.
    small = harness.Bench("cpu", quick=True, threads=1, fresh=True)
    small.rounds = 3
    small.matmul_peaks = dict.fromkeys(harness.DTYPE_NAMES.values(), 1e3)
    return small


def test_measure_marks_the_wrong_and_survives_the_broken(bench):
    def broken(*_):
        raise RuntimeError("no kernel image")

    providers = [
        Provider("ours", torch.mul, ours=True),
        Provider("torch", lambda x, w: w * x),
        Provider("wrong", lambda x, w: x * w + 1),
        Provider("broken", broken),
    ]
    measured = bench.measure(scale_case(), "fwd", providers)
    reports = measured["providers"]
    assert {n: r["correct"] for n, r in reports.items()} == {
        "ours": True,
        "torch": True,
        "wrong": False,
        "broken": False,
    }
    assert reports["wrong"]["median_us"] > 0
    assert reports["broken"]["failure"] == "RuntimeError: no kernel image"
    assert reports["broken"]["median_us"] is None
    assert set(compare.correct_peers(measured)) == {"torch"}
    assert compare.ratio(measured, "ours") == reports["torch"]["median_us"] / reports["ours"]["median_us"]
    assert all(reports[n]["samples"] == bench.rounds for n in ("ours", "torch", "wrong"))
    json.dumps(measured)


def test_a_provider_that_goes_wrong_during_timing_is_found(bench):
    calls = 0

    def drifts(x, weight):
        nonlocal calls
        calls += 1
        return x * weight * (1 if calls < 5 else 2)

    measured = bench.measure(scale_case(), "fwd", [Provider("drifts", drifts, ours=True)])
    assert "y is wrong" in measured["providers"]["drifts"]["failure"]


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd_bwd", "host_fwd", "host_fwd_bwd"])
def test_modes_run_what_they_name(mode):
    seen = {"forward with gradient": 0, "forward without": 0, "backward": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx, dy):
            x, weight = ctx.saved_tensors
            seen["backward"] += 1
            return dy * weight, (dy * x).sum(0)

    def run(x, weight):
        seen["forward with gradient" if torch.is_grad_enabled() else "forward without"] += 1
        return Counted.apply(x, weight)

    chosen = [InputSet(scale_case(), seed, CPU) for seed in range(4)]
    provider, kept = Provider("p", run, strides=((32, 1),)), []
    timed = harness.batch(mode, provider, chosen, kept.append)
    before = dict(seen)
    timed()
    during = {name: n - before[name] for name, n in seen.items()}
    assert len(kept) == 4
    assert during == {
        "forward with gradient": 4 if mode.endswith("fwd_bwd") else 0,
        "forward without": 4 if mode.endswith("fwd") else 0,
        "backward": 4 if mode.endswith("bwd") else 0,
    }


def test_providers_take_turns_on_inputs_that_are_not_warm(bench):
    """No provider runs on the inputs that the one before it has just read."""
    log = []

    def logged(name):
        def run(x, weight):
            log.append((name, x.data_ptr()))
            return x * weight

        return Provider(name, run, strides=((32, 1),))

    names, sets = ("a", "b", "c"), [InputSet(scale_case(), seed, CPU) for seed in range(5)]
    bench._time("fwd", [logged(name) for name in names], sets, host=False)
    pointers = [pointer for _, pointer in log]
    assert set(pointers) == {s.args[0].data_ptr() for s in sets}
    assert all(first != second for first, second in itertools.pairwise(pointers))
    turns = [name for (before, _), (name, _) in itertools.pairwise(log) if name != before]
    assert all(turns.count(name) >= bench.rounds - 1 for name in names)


def test_gpu_clock_spins_longer_until_the_host_is_hidden(monkeypatch):
    """The start event has passed before the work is queued in the first two attempts, and not in the third."""
    passed, spins, prepared = iter([True, True, False]), [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def query(self):
            return next(passed)

        def elapsed_time(self, _):
            return 0.25  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert harness.CudaClock()(lambda: lambda: prepared.append(1)) == 250_000
    assert len(prepared) == 3
    assert spins[0] < spins[1] < spins[2]


def test_gradients_come_in_the_layout_of_the_output():
    case = bench_layer_norm.layer_norm2d((2, 8, 4, 4), torch.float32, channels_last=False)
    given = InputSet(case, 1, CPU)
    strides = ((128, 1, 32, 8),)
    (grad,) = given.grads_like(strides)
    assert grad.stride() == strides[0]
    assert torch.equal(grad, given.grads[0])
    assert given.grads_like(strides)[0] is grad
    assert given.grads_like((given.grads[0].stride(),))[0] is given.grads[0]


def test_peak_memory_counts_what_lives_at_once():
    def run():
        a = torch.empty(1 << 18)  # 1 MiB each
        b = a + 1
        del a
        return b + 1

    assert 2 << 20 <= harness.peak_memory(CPU, lambda: run) < (2 << 20) + 4096


def test_input_sets_exceed_the_cache():
    assert harness.set_count(1 << 20, 4 << 20) * (1 << 20) > 8 << 20
    assert harness.set_count(1 << 30, 4 << 20) == 2
    assert harness.set_count(100, 4 << 20) == 64


def test_floor_is_the_larger_of_bytes_and_flops(bench):
    bench.copy_peaks[1 << 16] = 10.0  # GB/s, i.e. bytes per nanosecond
    by_bytes = scale_case(nbytes={"fwd": 1 << 16}, flops={"fwd": 1})
    by_flops = scale_case(nbytes={"fwd": 1 << 16}, flops={"fwd": 1 << 26})
    assert bench.floor_ns(by_bytes, "fwd") == (1 << 16) / 10
    assert bench.floor_ns(by_flops, "fwd") == (1 << 26) / 1e3
    assert bench.floor_ns(by_bytes, "host_fwd") is None


def test_layer_norm_bytes():
    """4096x1024 in bf16 by hand: 8 MiB per tensor, 2 KiB per parameter, 4 bytes per statistic."""
    tensor, parameter, statistic = 8 << 20, 2048, 4 * 4096
    plain = bench_layer_norm.layer_norm((4096, 1024), torch.bfloat16).nbytes
    assert plain["fwd"] == 2 * tensor + 2 * parameter
    assert plain["bwd"] == 3 * tensor + 4 * parameter + 2 * statistic
    assert plain["fwd_bwd"] == plain["fwd"] + plain["bwd"] + 2 * statistic
    rms = bench_layer_norm.rms_norm((4096, 1024), torch.bfloat16).nbytes
    assert rms["bwd"] == 3 * tensor + 2 * parameter + statistic
    fused = bench_layer_norm.add_layer_norm((4096, 1024), torch.bfloat16, 0.1, prenorm=True).nbytes
    assert (fused["fwd"], fused["bwd"]) == (4 * tensor + 2 * parameter, 5 * tensor + 4 * parameter + 2 * statistic)


# ---- the command ----


def test_command_writes_a_complete_result(tmp_path, capsys):
    file, folder = tmp_path / "out" / "r.json", tmp_path / "plots"
    options = [
        "--quick",
        "--fresh",
        "--threads",
        "1",
        "--dtype",
        "fp32",
        "--peers",
        "^torch$",
        "--only",
        "^layer_norm 8x64",
    ]
    threads = torch.get_num_threads()
    try:
        status = cli.main(["layer_norm", *options, "--json", str(file), "--plot", str(folder)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert status == 0, printed
    content = json.loads(file.read_text())
    assert {"schema", "machine", "settings", "peaks", "cases", "headline", "interrupted"} <= content.keys()
    assert {"cpu", "cores", "threads", "isa", "torch", "triton", "gcc", "pyops", "revision"} <= content[
        "machine"
    ].keys()
    assert [c["mode"] for c in content["cases"]] == ["host_fwd", "host_fwd_bwd"]
    for case in content["cases"]:
        assert case["threads"] == 1
        assert case["input_sets"] == 1
        assert set(case["providers"]) == {"pyops cpu", "torch"}
        for measured in case["providers"].values():
            assert measured["correct"], measured["failure"]
            assert measured["min_us"] <= measured["q25_us"] <= measured["median_us"] <= measured["q75_us"]
            assert measured["peak_bytes"] >= 8 * 64 * 4
            assert measured["errors"]["y"] < 1e-6
    assert [row["mode"] for row in content["headline"]] == ["host_fwd", "host_fwd_bwd"]
    assert len(list(folder.glob("*.png"))) == 2
    assert "geometric mean" in printed
    assert cli.main(["compare", str(file), str(file)]) == 0


def test_exit_status_tells_that_ours_failed(capsys):
    console = cli.Console(width=200)
    base = {"peaks": {"copy_gb_per_s": {}, "matmul_gflop_per_s": {}}, "interrupted": False}

    def status(*cases):
        return cli.report(result(*cases) | base | {"headline": compare.headline(list(cases))}, console)

    assert status(entry(ours=10.0, torch=20.0)) == 0
    assert status(entry(ours=10.0, torch=report(us=1.0, correct=False, failure="y is wrong"))) == 0
    assert status(entry(ours=report(True, 1.0, correct=False, failure="dx is wrong"), torch=2.0)) == 1
    assert "dx is wrong" in capsys.readouterr().out
    assert status(entry(torch=20.0)) == 1  # nothing of ours was measured


@pytest.mark.parametrize(
    "options",
    [["attention_typo"], ["all", "--dtype", "fp8"], ["all", "--only", "["], ["all", "--threads", "0"]],
)
def test_command_refuses_bad_arguments(options):
    with pytest.raises(SystemExit) as stopped:
        cli.main(options)
    assert stopped.value.code == 2


def test_plot_draws_failed_and_host_cases(tmp_path):
    failed = entry("b", ours=report(True, correct=False), torch=9.0)
    cases = [entry("a", ours=10.0, torch=20.0), failed, entry("h", "host_fwd", ours=3.0, torch=2.0)]
    written = plot.draw(result(*cases), tmp_path)
    assert [path.name for path in written] == ["layer_norm_cpu_fwd.png", "layer_norm_cpu_host_fwd.png"]
    assert all(path.stat().st_size > 5000 for path in written)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while inductor is imported
def test_torch_compile_is_compiled_anew_for_each_case():
    """Nine shapes exceed Dynamo's recompile limit of one function; none may fall back to eager."""
    from torch._dynamo.utils import counters

    from bench import peers

    for rows in range(1, 10):
        case = bench_layer_norm.layer_norm((rows, 32), torch.float32)
        (provider,) = peers.providers(case, [peers.Compile()], [])
        counters.clear()
        Judge(case, "fwd", 1, CPU).verify(provider)
        assert not provider.failure
        assert counters["stats"]["unique_graphs"] == 1
