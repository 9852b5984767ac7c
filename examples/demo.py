"""The main job of this package on a real model: `python -m examples.demo [--epochs N] [--out DIR]`.

Trains the Vision Transformer of this folder twice from the same start on the same batches, once as it is and once after
`pyops.replace(model)`, epoch by epoch in turn, so that both see the same load of the machine. Prints what was replaced,
accuracy, errors against float64 and times, and draws both loss curves. The exit status says whether the results agree;
times are reported, never judged.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

import pyops
from examples.comparison import (
    check_positive,
    disagreements,
    draw,
    errors,
    results,
    rotated,
    summary,
    time_calls,
    train,
)
from examples.vision_transformer import BATCH_SIZE, Trainer, VisionTransformer, accuracy, load_data

LEAST_ACCURACY = 0.95
MOST_ACCURACY_DIFFERENCE = 0.015  # 5 of 360 test images; rounding alone moves one or two
INFERENCE_REPEATS = 40
TIMED_STEPS = 40
KINDS = (nn.LayerNorm, nn.MultiheadAttention)


def _watched(model: nn.Module) -> dict[str, float]:
    """Where the seconds that each kind of layer takes, forward and backward, add up from now on, by hooks."""
    spent: dict[str, float] = {}
    start: dict[str, float] = {}

    def watch(module: nn.Module, kind: str) -> None:
        def enter(*_: object) -> None:
            start[kind] = time.perf_counter()

        def leave(*_: object) -> None:
            spent[kind] = spent.get(kind, 0.0) + time.perf_counter() - start[kind]

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        module.register_full_backward_pre_hook(enter)
        module.register_full_backward_hook(leave)

    for module in model.modules():
        for kind in KINDS:
            if isinstance(module, kind):
                watch(module, kind.__name__)
    return spent


def time_layers(models: dict[str, nn.Module], steps: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Median seconds of a training step by kind of layer, and of all of it; the models take turns."""
    spent = {name: _watched(model) for name, model in models.items()}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for turn in range(1 + TIMED_STEPS):  # the first one warms up
        for name in rotated(models, turn):
            spent[name].clear()
            began = time.perf_counter()
            steps[name]()
            samples[name].append(spent[name] | {"step": time.perf_counter() - began})
    return {
        name: {kind: statistics.median(sample[kind] for sample in taken[1:]) for kind in taken[0]}
        for name, taken in samples.items()
    }


def layers_table(times: dict[str, dict[str, float]]) -> Table:
    """What each kind of layer takes of a training step, stock and replaced."""
    columns = ("share of a stock step", "stock, ms", "pyops, ms", "stock / pyops")
    table = Table("", *(Column(name, justify="right") for name in columns))
    for kind in (kind.__name__ for kind in KINDS):
        stock, ours = times["stock"][kind], times["pyops"][kind]
        share = stock / times["stock"]["step"]
        table.add_row(kind, f"{share:.1%}", f"{1e3 * stock:.2f}", f"{1e3 * ours:.2f}", f"{stock / ours:.2f}")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n\n")[1])
    parser.add_argument("--epochs", type=int, default=30, help="passes over the data for each model (default 30)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the plot (default out/demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1; the model is too small for more)")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "epochs", "threads")
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    console = Console()

    train_images, train_labels, test_images, test_labels = load_data()
    torch.manual_seed(options.seed)
    stock = VisionTransformer()
    replaced = copy.deepcopy(stock)
    report = pyops.replace(replaced)
    models = {"stock": stock, "pyops": replaced}
    print(report, end="\n\n")

    batch = train_images[:BATCH_SIZE], train_labels[:BATCH_SIZE]
    exact = results(copy.deepcopy(stock).double(), batch[0].double(), batch[1])
    error = {name: errors(model, exact, *batch) for name, model in models.items()}

    probes = copy.deepcopy(models)
    steps = {name: Trainer(probe, *batch, epochs=1 + TIMED_STEPS).train_epoch for name, probe in probes.items()}
    layers = time_layers(probes, steps)
    trainers = {
        name: Trainer(model, train_images, train_labels, options.epochs, options.seed) for name, model in models.items()
    }
    epochs = train(trainers, options.epochs, console)
    test = {name: accuracy(model, test_images, test_labels) for name, model in models.items()}
    with torch.inference_mode():
        inference = time_calls({name: partial(model, test_images) for name, model in models.items()}, INFERENCE_REPEATS)

    parameters = sum(p.numel() for p in stock.parameters())
    console.print(f"{parameters:,} parameters, {options.threads} thread{'s' * (options.threads > 1)} (--threads)")
    scores = [("test accuracy", "{:.2%}", test)]
    times = [("inference, ms (median)", "{:.2f}", {name: 1e3 * s for name, s in inference.items()})]
    console.print(summary(scores, error, epochs, times))
    print("Errors are relative to float64, on one batch before training.")
    console.print(layers_table(layers))

    plot = options.out / "vision_transformer.png"
    draw(plot, "Vision Transformer on 8x8 digits, same start and batches", trainers)
    print(f"Loss curves: {plot}    Total: {time.perf_counter() - began:.0f} s")

    failures = verdict(len(report.replaced), test, error)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def verdict(replaced: int, test: dict[str, float], error: dict[str, tuple[float, float]]) -> list[str]:
    """What is wrong with the results, in words; empty when they agree."""
    failures = disagreements(replaced, error)
    for name, value in test.items():
        if not value >= LEAST_ACCURACY:
            failures.append(f"test accuracy of {name} is {value:.2%}, expected at least {LEAST_ACCURACY:.0%}")
    if not abs(test["stock"] - test["pyops"]) <= MOST_ACCURACY_DIFFERENCE:
        failures.append(f"the accuracies differ by more than {MOST_ACCURACY_DIFFERENCE:.1%}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
