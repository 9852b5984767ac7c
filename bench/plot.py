"""Draws a result: per operation and mode, the ratio of every case, and its distance from the machine's own peak."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import compare

BACKEND_COLOURS = ("#1f5fa8", "#3a9d6b", "#8a5fb0")
PEER_MARKS = ("o", "s", "^", "D", "v", "P")
MODE_TITLES = {
    "fwd": "forward",
    "bwd": "backward",
    "fwd_bwd": "forward + backward",
    "host_fwd": "host cost per call, forward",
    "host_fwd_bwd": "host cost per call, forward + backward",
}


def _label(case: dict) -> str:
    return f"{case['name']}  {case['dtype']}"


def _ratios(axes, cases: list[dict], backends: list[str]) -> None:
    height = 0.8 / max(len(backends), 1)
    longest = 1.0
    for k, name in enumerate(backends):
        for row, case in enumerate(cases):
            ratio = compare.ratio(case, name)
            y = row + (k - (len(backends) - 1) / 2) * height
            if ratio is None:
                report = case["providers"].get(name)
                if report is not None and not report["correct"]:
                    axes.text(0.02, y, "failed", va="center", color="#b02a2a", fontsize=8)
                continue
            longest = max(longest, ratio)
            axes.barh(y, ratio, height * 0.9, color=BACKEND_COLOURS[k % len(BACKEND_COLOURS)])
            colour = "#b02a2a" if ratio < 0.95 else "black"
            axes.text(ratio, y, f" {ratio:.2f}", va="center", fontsize=8, color=colour)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, longest * 1.12)
    axes.set_xlabel("fastest correct peer's time / ours")


def _speeds(axes, cases: list[dict], backends: list[str], peer_names: list[str], host: bool) -> None:
    """GB/s against what a copy of as many bytes reaches, or microseconds for host cost."""

    def value(report: dict | None) -> float | None:
        if report is None or not compare.usable(report):
            return None
        return report["median_us"] if host else report.get("gb_per_s")

    for k, name in enumerate(backends):
        points = [(row, value(case["providers"].get(name))) for row, case in enumerate(cases)]
        height = 0.8 / len(backends)
        for row, reached in points:
            if reached is not None:
                y = row + (k - (len(backends) - 1) / 2) * height
                axes.barh(y, reached, height * 0.9, color=BACKEND_COLOURS[k % len(BACKEND_COLOURS)])
    for mark, name in zip(PEER_MARKS, peer_names):
        points = [(value(case["providers"].get(name)), row) for row, case in enumerate(cases)]
        points = [p for p in points if p[0] is not None]
        if points:
            axes.scatter(*zip(*points), marker=mark, s=26, facecolor="white", edgecolor="#333333", zorder=3)
    if not host:
        for row, case in enumerate(cases):
            if case["floor_us"]:
                peak = case["bytes"] / case["floor_us"] / 1e3
                axes.plot([peak, peak], [row - 0.42, row + 0.42], color="#b02a2a", linewidth=2, zorder=4)
    axes.set_xlim(left=0)
    axes.set_xlabel("microseconds per call, one thread" if host else "GB/s")


def _legend(figure, backends: list[str], peer_names: list[str], host: bool) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=BACKEND_COLOURS[k % 3], label=n) for k, n in enumerate(backends)]
    handles += [
        plt.Line2D([], [], marker=mark, color="none", markerfacecolor="white", markeredgecolor="#333333", label=name)
        for mark, name in zip(PEER_MARKS, peer_names)
    ]
    if not host:
        handles.append(plt.Line2D([], [], color="#b02a2a", linewidth=2, label="peak measured in the same run"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False, fontsize=9)


def draw(result: dict, folder: Path) -> list[Path]:
    """Writes <op>_<device>_<mode>.png into `folder`; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    panels: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for case in result["cases"]:
        panels[case["op"], case["mode"]].append(case)
    machine, device = result["machine"], result["settings"]["device"]
    written = []
    for (op, mode), cases in panels.items():
        cases = sorted(cases, key=lambda c: (c["group"], c["dtype"]))
        backends = list(dict.fromkeys(n for c in cases for n in compare.our_names(c)))
        every = dict.fromkeys(n for c in cases for n, r in c["providers"].items() if not r["ours"])
        host = mode.startswith("host")
        size = (13, 1.9 + 0.3 * len(cases) * max(1, 0.6 * len(backends)))
        figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
        _ratios(left, cases, backends)
        _speeds(right, cases, backends, list(every), host)
        left.set_yticks(range(len(cases)), [_label(c) for c in cases], fontsize=8)
        left.set_ylim(len(cases) - 0.4, -0.6)
        for axes in (left, right):
            axes.grid(axis="x", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
        figure.suptitle(f"{op}: {MODE_TITLES.get(mode, mode)} ({where}, torch {machine['torch']})", fontsize=11)
        _legend(figure, backends, list(every), host)
        path = folder / f"{op}_{device}_{mode}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written
