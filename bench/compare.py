"""Arithmetic over results (plain dictionaries, see __main__), and `python -m bench compare`.

A ratio is the time of the fastest correct peer over our time, both of the same run; above 1 we are faster. Two runs
are compared by their ratios, not by their times: a slower machine or a busier one slows both sides.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table


def key(case: dict) -> tuple[str, str, str]:
    return case["name"], case["dtype"], case["mode"]


def usable(report: dict) -> bool:
    return report["correct"] and report["median_us"] is not None


def correct_peers(case: dict) -> dict[str, float]:
    """Median time of every peer that gave right results."""
    return {n: r["median_us"] for n, r in case["providers"].items() if not r["ours"] and usable(r)}


def fastest_peer(case: dict, among: Iterable[str] | None = None) -> tuple[str, float] | None:
    times = correct_peers(case)
    chosen = {n: t for n, t in times.items() if among is None or n in among}
    return min(chosen.items(), key=lambda item: item[1]) if chosen else None


def ratio(case: dict, ours: str, among: Iterable[str] | None = None) -> float | None:
    """Fastest correct peer (of `among`) over ours. None where either is missing or wrong."""
    report, peer = case["providers"].get(ours), fastest_peer(case, among)
    if report is None or peer is None or not usable(report):
        return None
    return peer[1] / report["median_us"]


def our_names(case: dict) -> list[str]:
    return [n for n, r in case["providers"].items() if r["ours"]]


def headline(cases: list[dict]) -> list[dict]:
    """Per group, mode, dtype and backend of ours: geometric mean of the ratios, and the worst case by name."""
    rows: dict[tuple, list[tuple[dict, str]]] = defaultdict(list)
    for case in cases:
        for ours in our_names(case):
            rows[case["op"], case["group"], case["mode"], case["dtype"], ours].append((case, ours))
    result = []
    for (op, group, mode, dtype, ours), members in rows.items():
        ratios = {case["name"]: ratio(case, ours) for case, _ in members}
        known = {name: r for name, r in ratios.items() if r is not None}
        worst = min(known, key=known.get) if known else None
        shares = [case["providers"][ours].get("percent_of_peak") for case, _ in members]
        shares = [s for s in shares if s is not None]
        result.append(
            {
                "op": op,
                "group": group,
                "mode": mode,
                "dtype": dtype,
                "ours": ours,
                "cases": len(ratios),
                "without_ratio": len(ratios) - len(known),
                "geometric_mean": math.exp(statistics.fmean(map(math.log, known.values()))) if known else None,
                "worst_ratio": known[worst] if known else None,
                "worst_case": worst,
                "median_percent_of_peak": statistics.median(shares) if shares else None,
            }
        )
    return result


def compare(before: dict, after: dict) -> list[dict]:
    """One row per case, mode and backend of ours in `before`, with both ratios over the peers that both runs have.
    `change` is how many times worse the ratio became; None where one run lacks the case."""
    newer = {key(case): case for case in after["cases"]}
    rows = []
    for case in before["cases"]:
        for ours in our_names(case):
            row = {"case": key(case), "ours": ours, "before": None, "after": None, "change": None, "note": ""}
            rows.append(row)
            other = newer.get(key(case))
            if other is None or ours not in other["providers"]:
                row["note"] = "not in the second run"
                continue
            common = correct_peers(case).keys() & correct_peers(other).keys()
            row["before"], row["after"] = ratio(case, ours, common), ratio(other, ours, common)
            if usable(case["providers"][ours]) and not usable(other["providers"][ours]):
                row["note"] = f"wrong now: {other['providers'][ours]['failure']}"
                row["change"] = math.inf
            elif row["before"] is None or row["after"] is None:
                row["note"] = "no ratio (no correct peer in common, or ours was wrong before)"
            else:
                row["change"] = row["before"] / row["after"]
    return rows


def console_of_stdout() -> Console:
    """Without a terminal (a log file) rich would fold tables to 80 columns."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description="Compare the same-run ratios of two result files. Exit status: 0 no regression, 1 a case became "
        "worse by more than the bound or wrong, 2 the runs have no comparable case.",
    )
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--bound", type=float, default=1.3, help="accepted factor per case (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="list every case, not only those that changed by 10 %%")
    args = parser.parse_args(argv)
    if args.bound < 1:
        parser.error(f"--bound must be at least 1, got {args.bound}")
    runs = []
    for path in (args.before, args.after):
        try:
            with open(path) as file:
                runs.append(json.load(file))
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
    console = console_of_stdout()
    for field in ("cpu", "gpu", "torch", "threads"):
        old, new = (run["machine"].get(field) for run in runs)
        if old != new:
            console.print(f"[yellow]the runs differ in {field}: {old} and {new}[/]")
    rows = compare(*runs)
    judged = [r for r in rows if r["change"] is not None]
    regressions = [r for r in judged if r["change"] > args.bound]

    table = Table(title=f"ratio to the fastest correct peer, bound {args.bound}")
    for column in ("case", "dtype", "mode", "ours"):
        table.add_column(column)
    for column in ("before", "after", "x worse"):
        table.add_column(column, justify="right")
    table.add_column("note")

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    for r in rows:
        changed = r["change"] is None or not 1 / 1.1 < r["change"] < 1.1
        if args.all or changed:
            style = "bold red" if r in regressions else ""
            numbers = [number(r[k]) for k in ("before", "after", "change")]
            table.add_row(*r["case"], r["ours"], *numbers, r["note"], style=style)
    if table.row_count:
        console.print(table)
    finite = [r["change"] for r in judged if 0 < r["change"] < math.inf]
    overall = math.exp(statistics.fmean(map(math.log, finite))) if finite else math.nan
    console.print(
        f"{len(judged)} of {len(rows)} cases compared, {len(regressions)} regressed; "
        f"geometric mean of the changes x{overall:.3f}"
    )
    if not judged:
        return 2
    return 1 if regressions else 0
