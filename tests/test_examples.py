"""The examples: the architectures do what their text says, train, and the demo judges its results rightly."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn

import pyops
from examples import demo
from examples.vision_transformer import (
    PatchEmbedding,
    Trainer,
    VisionTransformer,
    accuracy,
    jitter,
    load_data,
)

ROOT = Path(__file__).parent.parent


def test_readme_example(capsys: pytest.CaptureFixture) -> None:
    """The Python of the README runs as it stands, and does what its comments say."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert type(names["model"][1]) is pyops.nn.LayerNorm
    assert "add_layer_norm runs on" in capsys.readouterr().out
    names["report"].undo()
    assert type(names["model"][1]) is nn.LayerNorm


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return load_data()


def test_data(data: tuple) -> None:
    train_images, train_labels, test_images, test_labels = data
    assert train_images.shape == (1437, 1, 8, 8)
    assert test_images.shape == (360, 1, 8, 8)
    assert (train_images.min(), train_images.max()) == (-1, 1)
    assert train_labels.bincount().min() >= 139
    assert test_labels.bincount().min() >= 34
    seen = {image.numpy().tobytes() for image in train_images}
    assert not any(image.numpy().tobytes() in seen for image in test_images)
    for ours, again in zip(data, load_data()):
        assert torch.equal(ours, again)


def test_patch_embedding_reads_one_patch_per_token() -> None:
    embed = PatchEmbedding(patch_size=2, channels=3, dim=5)
    images = torch.randn(1, 3, 4, 6)
    tokens = embed(images)
    assert tokens.shape == (1, 6, 5)
    images[:, :, 2:4, 0:2] += 1  # second row of patches, first column
    assert (embed(images) != tokens).any(dim=2).tolist() == [[False, False, False, True, False, False]]


@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (2, 1, 8, 8)), ({"image_size": 12, "patch_size": 4, "channels": 3, "classes": 7}, (3, 3, 12, 12))],
)
def test_model_shapes(options: dict, shape: tuple) -> None:
    model = VisionTransformer(**options, dim=16, depth=2, heads=2, mlp_dim=32)
    assert model(torch.randn(shape)).shape == (shape[0], options.get("classes", 10))


def test_positions_tell_patches_apart() -> None:
    """Without them a Transformer could not see that patches changed places."""
    model = VisionTransformer(dim=16, depth=2, heads=2, mlp_dim=32).double()
    images = torch.randn(2, 1, 8, 8).double()
    swapped = images.roll(2, dims=3)
    assert (model(images) - model(swapped)).abs().max() > 1e-4
    model.positions.data.zero_()
    torch.testing.assert_close(model(images), model(swapped))


def test_jitter_moves_a_little() -> None:
    image = torch.full((1, 1, 8, 8), -1.0)
    image[..., 3:5, 3:5] = 1.0
    moved = jitter(image.expand(500, -1, -1, -1))
    assert moved.shape == (500, 1, 8, 8)
    assert moved.min() >= -1
    assert moved.max() <= 1
    assert len({m.numpy().tobytes() for m in moved}) == 500
    mass = (moved + 1).sum(dim=(1, 2, 3))
    columns = torch.arange(8.0)
    for dim in (2, 3):
        centre = ((moved + 1).sum(dim=(1, 5 - dim)) * columns).sum(dim=1) / mass
        assert 0.3 < (centre - 3.5).abs().max() < 0.6, "half a pixel, and the rotation of an off-centre corner"


def test_training_lowers_the_loss_and_repeats(data: tuple) -> None:
    """On one batch, jittered anew at every step."""
    torch.set_num_threads(1)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = VisionTransformer(dim=32, depth=2, heads=4, mlp_dim=64)
        trainer = Trainer(model, data[0][:64], data[1][:64], epochs=50)
        losses.append([trainer.train_epoch() for _ in range(50)])
    assert losses[0] == losses[1] == trainer.losses
    assert losses[0][-1] < 0.75 * losses[0][0]
    assert accuracy(model, data[0][:64], data[1][:64]) > 0.3, "three times chance"


def test_replaced_model_agrees(data: tuple) -> None:
    model = VisionTransformer().double()
    replaced = copy.deepcopy(model)
    assert len(pyops.replace(replaced).replaced) == 13
    batch = data[0][:8].double(), data[1][:8]
    exact = demo.results(model, *batch)
    with Oracle("vision transformer") as oracle:
        oracle.check_all("float64", demo.results(replaced, *batch), exact, exact)


# ---- demo ----


def test_errors_are_relative_to_the_exact_result(data: tuple) -> None:
    model = VisionTransformer(dim=16, depth=1, heads=2, mlp_dim=32)
    batch = data[0][:4], data[1][:4]
    exact = demo.results(copy.deepcopy(model).double(), batch[0].double(), batch[1])
    right = demo.errors(model, exact, *batch)
    assert all(0 < error < 1e-5 for error in right)

    doubled = {name: t * 2 if name == "outputs" else t for name, t in exact.items()}
    assert demo.errors(model, doubled, *batch) == (pytest.approx(0.5, rel=1e-4), right[1])
    wrong = {name: t * 2 if name == "norm.weight" else t for name, t in exact.items()}
    assert demo.errors(model, wrong, *batch) == (right[0], pytest.approx(0.5, rel=1e-4))


def test_layers_are_parts_of_a_step() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), pyops.nn.LayerNorm(64))
    x = torch.randn(64, 64)
    times = demo.time_layers({"stock": model}, {"stock": lambda: model(x).sum().backward()})["stock"]
    assert set(times) == {"LayerNorm", "step"}
    assert 0 < times["LayerNorm"] < times["step"]
    assert set(demo.time_layers({"stock": nn.Linear(64, 64)}, {"stock": lambda: None})["stock"]) == {"step"}


GOOD = {"replaced": 9, "test": {"stock": 0.97, "pyops": 0.96}, "error": {"stock": (1e-6, 1e-6), "pyops": (2e-6, 2e-6)}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"replaced": 0}, "no layer was replaced"),
        ({"test": {"stock": 0.97, "pyops": 0.949}}, "test accuracy of pyops"),
        ({"test": {"stock": 0.949, "pyops": 0.95}}, "test accuracy of stock"),
        ({"test": {"stock": 0.97, "pyops": float("nan")}}, "test accuracy of pyops"),
        ({"test": {"stock": 0.99, "pyops": 0.97}}, "accuracies differ"),
        ({"error": {"stock": (1e-6, 1e-6), "pyops": (3e-6, 1e-6)}}, "error of outputs"),
        ({"error": {"stock": (1e-6, 1e-6), "pyops": (1e-6, 3e-6)}}, "error of gradients"),
        ({"error": {"stock": (1e-6, 1e-6), "pyops": (1e-6, float("nan"))}}, "error of gradients"),
    ],
    ids=str,
)
def test_verdict(change: dict, message: str | None) -> None:
    failures = demo.verdict(**{**GOOD, **change})
    assert bool(failures) == (message is not None)
    assert message is None or message in failures[0]


def test_demo_that_trained_too_little_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TIMED_STEPS", 2)
    monkeypatch.setattr(demo, "INFERENCE_REPEATS", 2)
    assert demo.main(["--epochs", "1", "--out", str(tmp_path)]) == 1
    output, errors = capsys.readouterr()
    for text in (
        "13 replaced, 0 kept",
        "blocks.0.norm1",
        "test accuracy",
        "largest error of gradients",
        "share of a stock",
    ):
        assert text in output
    assert "FAILED: test accuracy of stock is" in errors
    assert "error of" not in errors
    assert (tmp_path / "vision_transformer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--epochs", "--threads"])
def test_demo_refuses_bad_arguments(option: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        demo.main([option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.full
def test_demo(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "vision_transformer.png").exists()
