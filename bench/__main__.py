"""python -m bench <op|all> [--device cpu|cuda] [--dtype fp32,bf16] [--quick] [--json FILE] [--plot DIR] [--only REGEX]
python -m bench compare before.json after.json [--bound 1.3]

Measures every case of bench_<op>.py against torch, torch.compile and the specialised peers that are installed, prints
what was found, and exits with 1 when one of our own results was wrong or missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import compare
from .case import DTYPES, Case
from .harness import Bench
from .peers import OURS, peers, providers

HERE = Path(__file__).parent
STEMS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(module: str) -> str | None:
    try:
        return getattr(importlib.import_module(module), "__version__", None)
    except ImportError:
        return None


def _instruction_set() -> str | None:
    try:
        from pyops import _C
    except ImportError:
        return None
    return _C.cpu_isa


def machine(bench: Bench) -> dict:
    """Whatever is needed to know whether two results can be compared."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    compiler = os.environ.get("CXX") or shutil.which("g++") or ""
    cuda = bench.device.type == "cuda"
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": bench.threads,
        "isa": _instruction_set(),
        "gpu": torch.cuda.get_device_name(bench.device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cache_bytes": bench.cache_bytes,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gcc": _output(compiler, "-dumpfullversion") if compiler else None,
        "pyops": _version("pyops"),
        "revision": _output("git", "describe", "--always", "--dirty") or None,
        "load_average": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def our_backends(device: str) -> tuple[list[str], dict[str, str]]:
    """The backends of ours that can run on `device`, and the reason for each other one."""
    try:
        from pyops import backend
    except ImportError as error:
        return [], dict.fromkeys(OURS[device], f"pyops cannot be imported: {error}")
    probe = torch.empty(0, device=device)
    reasons = {name: backend.BACKENDS[name].unusable(probe) or "" for name in OURS[device]}
    return [n for n, why in reasons.items() if not why], {n: why for n, why in reasons.items() if why}


def select(stems: list[str], device: str, dtypes: list[torch.dtype], quick: bool, only: str) -> list[Case]:
    modules = [importlib.import_module(f".bench_{stem}", __package__) for stem in stems]
    every = [case for module in modules for dtype in dtypes for case in module.cases(device, dtype)]
    return [case for case in every if (case.quick or not quick) and re.search(only, case.name)]


def goal(device: str, row: dict) -> float | None:
    module = importlib.import_module(f".bench_{row['op']}", __package__)
    return module.goal(device, row["group"], row["mode"], row["dtype"]) if hasattr(module, "goal") else None


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def case_table(cases: list[dict]) -> Table:
    table = Table(title="every case (ratio: fastest correct peer / ours)")
    for column in ("case", "dtype", "mode", "ours"):
        table.add_column(column, no_wrap=True)
    for column in ("us", "IQR %", "fastest peer", "us", "ratio", "GB/s", "% peak", "memory", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for case in cases:
        peer = compare.fastest_peer(case)
        theirs = case["providers"][peer[0]] if peer else None
        for name in compare.our_names(case) or [None]:
            row = [case["name"], case["dtype"], case["mode"], name or "-"]
            ours = case["providers"].get(name)
            ratio = compare.ratio(case, name) if name else None
            if ours is None or ours["median_us"] is None:
                row += ["-", "-"]
            else:
                spread = 100 * (ours["q75_us"] - ours["q25_us"]) / ours["median_us"]
                row += [_number(ours["median_us"], ".1f"), _number(spread, ".0f")]
            row += [peer[0], _number(peer[1], ".1f")] if peer else ["-", "-"]
            style = "" if ratio is None else "red" if ratio < 0.95 else "green" if ratio >= 1 else "yellow"
            row.append(f"[{style}]{ratio:.2f}[/]" if style else "-")
            row += [_number((ours or {}).get("gb_per_s"), ".1f"), _number((ours or {}).get("percent_of_peak"), ".0f")]
            memory = error = None
            if ours and theirs and ours["peak_bytes"] and theirs["peak_bytes"]:
                memory = ours["peak_bytes"] / theirs["peak_bytes"]
            torch_errors = case["providers"].get("torch", {}).get("errors", {})
            shared = [k for k in torch_errors if ours and torch_errors[k] > 0 and k in ours["errors"]]
            if shared:
                error = max(ours["errors"][k] / torch_errors[k] for k in shared)
            table.add_row(*row, _number(memory), _number(error))
    return table


def headline_table(rows: list[dict], device: str) -> Table:
    table = Table(title="geometric mean of the ratios to the fastest correct peer")
    for column in ("op", "group", "mode", "dtype", "ours"):
        table.add_column(column, no_wrap=True)
    for column in ("cases", "mean", "goal", "worst", "worst case", "median % peak"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        wanted, mean = goal(device, row), row["geometric_mean"]
        style = "" if mean is None else "green" if mean >= (wanted or 1) else "red" if mean < 0.95 else "yellow"
        count = str(row["cases"]) + (f" ({row['without_ratio']} without)" if row["without_ratio"] else "")
        table.add_row(
            *(row[k] for k in ("op", "group", "mode", "dtype", "ours")),
            count,
            f"[{style}]{mean:.2f}[/]" if style else "-",
            _number(wanted),
            _number(row["worst_ratio"]),
            row["worst_case"] or "-",
            _number(row["median_percent_of_peak"], ".0f"),
        )
    return table


def noisy(cases: list[dict], bound: float = 0.25) -> tuple[int, int]:
    """How many of all medians have quartiles further apart than `bound` of the median."""
    reports = [r for case in cases for r in case["providers"].values() if r["median_us"]]
    return sum(r["q75_us"] - r["q25_us"] > bound * r["median_us"] for r in reports), len(reports)


def problems(cases: list[dict]) -> list[tuple[bool, str]]:
    """(is it ours, what went wrong) for every provider that failed."""
    found = []
    for case in cases:
        for name, report in case["providers"].items():
            if not report["correct"]:
                where = f"{case['name']} {case['dtype']} {case['mode']}"
                found.append((report["ours"], f"{name}: {where}: {report['failure']}"))
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", choices=[*STEMS, "all"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="fp32,bf16", help=f"of {','.join(DTYPES)} (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer cases, 7 rounds instead of 15")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--modes", default="", metavar="REGEX", help="modes that match entirely, e.g. 'fwd|bwd'")
    parser.add_argument("--peers", default="", metavar="REGEX", help="peers whose name matches, e.g. '^torch$'")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--fresh", action="store_true", help="CPU: outputs in memory fresh from the system")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="DIR")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    args = parser.parse_args(argv)
    names = args.dtype.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        parser.error(f"--dtype must be of {', '.join(DTYPES)}, got {unknown[0]}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    for option in ("only", "modes", "peers"):
        try:
            re.compile(getattr(args, option))
        except re.error as error:
            parser.error(f"--{option} must be a regular expression, got {getattr(args, option)!r} ({error})")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    args.dtypes = [DTYPES[name] for name in names]
    args.stems = STEMS if args.op == "all" else [args.op]
    return args


def run(args: argparse.Namespace, console: Console) -> dict:
    """Measures what `args` select. Interrupted, it returns what was measured so far."""
    selected = select(args.stems, args.device, args.dtypes, args.quick, args.only)
    work = [(case, [m for m in case.modes if re.fullmatch(args.modes or ".*", m)]) for case in selected]
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args.device, args.quick, args.threads, args.fresh)
    backends, missing = our_backends(args.device)
    usable_peers, absent = peers(args.device)
    usable_peers = [peer for peer in usable_peers if re.search(args.peers, peer.name)]
    for name, why in (missing | absent).items():
        console.print(f"[dim]without {name}: {escape(why)}[/]")
    result = {
        "schema": 1,
        "machine": machine(bench),
        "settings": {
            "device": args.device,
            "quick": args.quick,
            "rounds": bench.rounds,
            "fresh_outputs": args.fresh,
            "without": missing | absent,
        },
        "interrupted": False,
        "peaks": {},
        "cases": [],
        "headline": [],
    }
    load = result["machine"]["load_average"]
    if args.device == "cpu" and load > 0.5:
        console.print(f"[yellow]the machine is not idle (load average {load:.1f}): expect wide spreads[/]")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=sum(len(modes) for _, modes in work))
        try:
            for case, modes in work:
                for mode in modes:
                    progress.update(task, description=f"{case.name} {str(case.dtype).removeprefix('torch.')} {mode}")
                    measured = bench.measure(case, mode, providers(case, usable_peers, backends))
                    result["cases"].append(measured)
                    progress.advance(task)
        except KeyboardInterrupt:
            result["interrupted"] = True
            console.print("[yellow]interrupted: what follows is what was measured until then[/]")
    result["peaks"] = {
        "copy_gb_per_s": {str(size): rate for size, rate in sorted(bench.copy_peaks.items())},
        "matmul_gflop_per_s": bench.matmul_peaks,
    }
    result["headline"] = compare.headline(result["cases"])
    return result


def report(result: dict, console: Console) -> int:
    """Prints the tables; the exit status."""
    if result["cases"]:
        console.print(case_table(result["cases"]))
    if result["headline"]:
        console.print(headline_table(result["headline"], result["settings"]["device"]))
    copies = ", ".join(f"{int(s) / 2**20:g} MiB {r:.0f}" for s, r in result["peaks"]["copy_gb_per_s"].items())
    matmuls = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in result["peaks"]["matmul_gflop_per_s"].items())
    console.print(f"copy GB/s, by bytes per call: {copies or '-'}; matrix product GFLOP/s: {matmuls or '-'}")
    console.print("memory: peak bytes, ours / that peer's; error: worst of ours / torch's, both against float64")
    wide, medians = noisy(result["cases"])
    if wide > medians / 10:
        console.print(f"[yellow]{wide} of {medians} medians have a spread above 25 %: repeat on an idle machine[/]")
    failed = problems(result["cases"])
    for ours, text in failed:
        console.print(f"{'[bold red]OURS FAILED[/]' if ours else '[yellow]peer failed[/]'} {escape(text)}")
    if not result["headline"]:
        why = "" if result["cases"] else ": no case matches (--list names them)"
        console.print(f"[bold red]nothing of ours was measured{why}[/]")
    return int(result["interrupted"] or not result["headline"] or any(ours for ours, _ in failed))


def main(argv: list[str]) -> int:
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    args = parse(argv)
    console = compare.console_of_stdout()
    if args.list:
        for case in select(args.stems, args.device, args.dtypes, args.quick, args.only):
            console.print(escape(f"{case.name} {str(case.dtype).removeprefix('torch.')}: {', '.join(case.modes)}"))
        return 0
    result = run(args, console)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        from . import plot

        for path in plot.draw(result, args.plot):
            console.print(f"wrote {path}")
    return report(result, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
