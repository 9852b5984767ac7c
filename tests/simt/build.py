"""Builds the SIMT executor with g++ and ninja into build/simt; no CUDA toolkit is needed.

module    _simt.so: csrc and kernels/cuda as a Python module that runs the CUDA kernels on the CPU
selftest  libselftest.so: the executor's own small kernels, called through ctypes
tsan      simt_tsan: both as a program under ThreadSanitizer, whose runtime must be in a process first

    python tests/simt/build.py [--tsan]
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pybind11
from ninja import ninja_syntax

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "simt"
OUTPUTS = {"module": "_simt.so", "selftest": "libselftest.so", "tsan": "simt_tsan"}

FLAGS = [
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-DPYOPS_SIMT"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror=return-type"),
]
# Array bounds, alignment and shifts are checked by the compiler; faults.cpp reports what it finds.
CHECKS = ["-fsanitize=bounds-strict,alignment,shift", "-fno-sanitize-recover=all"]
# Variables without a value start as a pattern (g++ 12): what a device leaves to chance must not look right here.
PATTERN = "-ftrivial-auto-var-init=pattern"
EXECUTOR = ["executor", "warp", "matrix", "copies", "words", "conflicts", "sites", "memory", "faults"]
EXECUTOR_FLAGS = ["-O3", "-ffp-contract=off"]  # contracted products would make results depend on the processor


def compiler_accepts(cxx: str, flag: str) -> bool:
    command = [cxx, flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def write_ninja(path: Path) -> None:
    cxx = os.environ.get("CXX", "g++")
    checks = [*CHECKS, PATTERN] if compiler_accepts(cxx, PATTERN) else CHECKS
    includes = [f"-I{ROOT / 'tests/simt'}", f"-I{ROOT / 'kernels/cuda'}"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-DPYOPS_MODULE_NAME=_simt"]
    with path.open("w") as file:
        n = ninja_syntax.Writer(file)
        n.variable("cxx", cxx)
        n.rule("compile", "$cxx $flags -MMD -MF $out.d -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
        n.rule("link", "$cxx $flags $in -o $out")

        def compile_all(sources: list[Path], kind: str, flags: list[str]) -> list[str]:
            objects = []
            for source in sources:
                objects.append(f"{kind}/{source.name}.o")
                n.build(objects[-1], "compile", str(source), variables={"flags": [*FLAGS, *includes, *flags]})
            return objects

        executor = [HERE / f"{stem}.cpp" for stem in EXECUTOR]
        kernels = sorted((ROOT / "kernels/cuda").glob("*.cu"))
        boundary = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if not path.stem.startswith("cpu_")]

        plain = compile_all(executor, "executor", EXECUTOR_FLAGS)
        checked = {source.stem: obj for source, obj in zip(kernels, compile_all(kernels, "kernels", ["-O2", *checks]))}
        module = compile_all(boundary, "csrc", ["-O1", *python])
        n.build(OUTPUTS["module"], "link", [*module, *checked.values(), *plain], variables={"flags": "-shared"})

        selftest = compile_all([HERE / "selftest.cu"], "selftest", ["-O2", *checks])
        n.build(OUTPUTS["selftest"], "link", [*selftest, checked["runtime"], *plain], variables={"flags": "-shared"})

        # The executor itself stays uninstrumented: it tells the sanitizer what its switches mean.
        told = compile_all(executor, "tsan/executor", [*EXECUTOR_FLAGS, "-DPYOPS_SIMT_TSAN"])
        watched = compile_all(
            [*kernels, HERE / "selftest.cu", HERE / "tsan_main.cpp"],
            "tsan/kernels",
            ["-O1", "-g1", "-fsanitize=thread", "-Wno-maybe-uninitialized"],
        )
        n.build(OUTPUTS["tsan"], "link", [*watched, *told], variables={"flags": "-fsanitize=thread"})


@cache
def build(target: str) -> Path:
    """Brings a target up to date, once per process, and returns its path. Several processes may call it at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_ninja(BUILD / "build.ninja")
        command = [sys.executable, "-m", "ninja", "-C", str(BUILD), f"-j{os.environ.get('MAX_JOBS', os.cpu_count())}"]
        result = subprocess.run([*command, OUTPUTS[target]], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"building {OUTPUTS[target]} failed:\n{result.stdout}{result.stderr}")
    return BUILD / OUTPUTS[target]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tsan", action="store_true", help="build the ThreadSanitizer program too")
    targets = ["module", "selftest"] + (["tsan"] if parser.parse_args().tsan else [])
    for name in targets:
        print(build(name))
