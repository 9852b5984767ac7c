"""How the examples compare a model as it is with the same model after `pyops.replace`: errors, training, times.

The models take turns at all that is timed, so that they see the same load of the machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from torch import Tensor, nn

MOST_ERROR_RATIO = 2.0
ROUNDING_FLOOR = 4.5 * torch.finfo(torch.float32).eps

Row = tuple[str, str, dict[str, float]]  # label, format, value by name of the model


class Trainer(Protocol):
    """One model with its data and optimizer."""

    losses: list[float]  # of every step

    def train_epoch(self) -> float:
        """One pass over the data and its mean loss."""


def check_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} must be at least 1, got {value}")


def errors(model: nn.Module, exact: dict[str, Tensor], *batch: Tensor) -> tuple[float, float]:
    """Largest error of the outputs and of any gradient, each in units of the largest element of its exact tensor."""
    found = results(model, *batch)
    error = {name: ((found[name].double() - t).abs().max() / t.abs().max()).item() for name, t in exact.items()}
    outputs = error.pop("outputs")
    return outputs, max(error.values())


def results(model: nn.Module, *batch: Tensor) -> dict[str, Tensor]:
    """Outputs of one batch, whose last tensor holds the classes wanted, and the gradients of its loss."""
    *inputs, wanted = batch
    outputs = model(*inputs)
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(outputs.flatten(0, -2), wanted.flatten()), parameters)
    return {"outputs": outputs.detach(), **dict(zip(names, gradients))}


def train(trainers: dict[str, Trainer], epochs: int, console: Console) -> dict[str, list[float]]:
    """Trains all models, one epoch of each in turn; returns the seconds of every epoch."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=epochs * len(trainers))
        for epoch in range(epochs):
            for name in rotated(trainers, epoch):
                start = time.perf_counter()
                loss = trainers[name].train_epoch()
                seconds[name].append(time.perf_counter() - start)
                progress.update(task, advance=1, description=f"epoch {epoch + 1:2d}  {name:<6}  loss {loss:.3f}")
    return seconds


def time_calls(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in rotated(calls, repeat):
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def draw(path: Path, title: str, trainers: dict[str, Trainer]) -> None:
    """Loss of every step of both runs, and how far apart they are."""
    (first, one), (second, other) = trainers.items()
    figure = Figure(figsize=(8, 6), constrained_layout=True)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(one.losses, color="tab:gray", linewidth=2.5, label=first)
    above.plot(other.losses, color="tab:red", linewidth=0.9, label=second)
    above.set(ylabel="training loss", yscale="log", title=title)
    above.legend()
    below.plot([abs(a - b) or float("nan") for a, b in zip(one.losses, other.losses)], ".", color="tab:blue")
    below.set(xlabel="step", ylabel="difference", yscale="log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def summary(
    scores: list[Row],
    error: dict[str, tuple[float, float]],
    epochs: dict[str, list[float]],
    inference: list[Row],
) -> Table:
    """What was measured, by name of the model, and the quotients of errors and times."""
    costs = [
        ("largest error of outputs", "{:.1e}", {name: outputs for name, (outputs, _) in error.items()}),
        ("largest error of gradients", "{:.1e}", {name: gradients for name, (_, gradients) in error.items()}),
        ("training, s per epoch (median)", "{:.3f}", {name: statistics.median(s) for name, s in epochs.items()}),
        ("training, s in all", "{:.1f}", {name: sum(s) for name, s in epochs.items()}),
        *inference,
    ]
    table = Table("", *(Column(name, justify="right") for name in ("stock", "pyops", "stock / pyops")))
    for label, form, value in scores:
        table.add_row(label, form.format(value["stock"]), form.format(value["pyops"]))
    for label, form, value in costs:
        ratio = value["stock"] / value["pyops"]
        table.add_row(label, form.format(value["stock"]), form.format(value["pyops"]), f"{ratio:.2f}")
    return table


def disagreements(replaced: int, error: dict[str, tuple[float, float]]) -> list[str]:
    """What is wrong with the replaced model before any training, in words; empty when it computes what stock does."""
    failures = [] if replaced else ["no layer was replaced"]
    for what, stock, ours in zip(("outputs", "gradients"), error["stock"], error["pyops"]):
        most = MOST_ERROR_RATIO * stock + ROUNDING_FLOOR
        if not ours <= most:
            failures.append(f"the error of {what} is {ours:.1e}, expected at most {most:.1e}")
    return failures


def rotated(names: dict[str, object], turn: int) -> list[str]:
    """The names in another order at every turn, so that none always runs first."""
    names = list(names)
    return names[turn % len(names) :] + names[: turn % len(names)]
