"""One operation = one row: every cell of every row exists, and no file lies outside."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The cells of the row of an operation.
ROW = {
    "boundary": "csrc/{op}.cpp",
    "params": "kernels/params/{op}.h",
    "cpu": "kernels/cpu/{op}.cpp",
    "cuda": "kernels/cuda/{op}.cu",
    "triton": "kernels/triton/{op}.py",
    "python": "pyops/{op}.py",
    "test": "tests/test_{op}.py",
    "bench": "bench/bench_{op}.py",
    "notes": "bench/notes/{op}.md",
}

# (operation, cell): why it has no such file.
MISSING: dict[tuple[str, str], str] = {}

# What belongs to no row, and why it is there. Patterns of fnmatch, where * stands for one path component.
SHARED_CSRC = ("bindings", "cpu_isa")
# transformer: modules built of several operations.
SHARED_PYTHON = ("__init__", "__main__", "autograd", "backend", "check", "nn", "philox", "replace", "transformer")
ALLOWED = {
    # the project
    "setup.py": "build", "pyproject.toml": "build", "Makefile": "build", "MANIFEST.in": "contents of the sdist",
    "requirements-dev.txt": "development tools", ".gitignore": "git", ".clang-format": "formatter", ".ci/run": "CI",
    "README.md": "manual", "ARCHITECTURE.md": "manual", "CONTRIBUTING.md": "manual", "CHANGELOG.md": "manual",
    "LICENSE": "licence", "docs/*": "manual",
    # shared by all rows
    "csrc/bindings.cpp": "table of contents of the extension", "csrc/cpu_isa.cpp": "choice of the instruction set",
    "csrc/*.h": "helpers of the boundary", "csrc/LICENSE.dlpack": "licence of dlpack.h",
    "kernels/params/types.h": "storage types", "kernels/cpu/*.h": "vectors, threads, random numbers",
    "kernels/cuda/*.h": "launchers' declarations", "kernels/cuda/*.cuh": "wrappers of instructions and launches",
    "kernels/cuda/runtime.cu": "device properties", "kernels/triton/__init__.py": "package",
    "pyops/py.typed": "typed package", "pyops/*.pyi": "types of the extension",
    "pyops/integrations/*.py": "other libraries",
    # tests, benches, examples
    "tests/conftest.py": "backends under test", "tests/oracle.py": "tolerance rule",
    "tests/test_*.py": "what belongs to no single operation", "tests/simt/*": "CUDA kernels on the CPU",
    "bench/__init__.py": "package", "bench/__main__.py": "command line", "bench/harness.py": "timing",
    "bench/*.py": "parts of the bench command", "bench/gpu.sh": "the bench on a GPU machine",
    "bench/results/*": "measurements", "bench/plots/*": "measurements", "examples/*": "models on real data",
}  # fmt: skip


def stems() -> list[str]:
    """The operations: sources of the boundary, and Python modules that are not shared."""
    found = {path.stem for path in (ROOT / "csrc").glob("*.cpp")} - set(SHARED_CSRC)
    return sorted(found | {path.stem for path in (ROOT / "pyops").glob("*.py")} - set(SHARED_PYTHON))


def files() -> list[str]:
    """Every file of the project: what git knows or would add; in an unpacked sdist, everything that is there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    pytest.skip("not a git checkout: nothing tells the project's files from built ones")


def belongs(name: str, pattern: str) -> bool:
    """fnmatch by path components."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def test_there_are_operations() -> None:
    assert "layer_norm" in stems()


@pytest.mark.parametrize("cell", ROW)
@pytest.mark.parametrize("op", stems())
def test_row_is_complete(op: str, cell: str) -> None:
    path = ROW[cell].format(op=op)
    if (op, cell) in MISSING:
        assert MISSING[op, cell], "a missing cell needs a reason"
        assert not (ROOT / path).exists(), f"{path} exists: take ({op!r}, {cell!r}) out of MISSING"
    else:
        assert (ROOT / path).exists(), f"{op} has no {path}"


def test_no_file_lies_outside() -> None:
    rows = [pattern.format(op=op) for op in stems() for pattern in ROW.values()]
    rows += [f"tests/{op}_cases.py" for op in stems()] + [f"tests/test_{op}_*.py" for op in stems()]
    rows += [f"pyops/{name}.py" for name in SHARED_PYTHON]
    outside = [name for name in files() if not any(belongs(name, pattern) for pattern in (*rows, *ALLOWED))]
    assert not outside, "no row and no entry of ALLOWED has these files"


def test_every_row_is_tested_on_its_own() -> None:
    """Files named after an operation belong to one that exists."""
    known = set(stems())
    for pattern in ("kernels/*/*.c*", "kernels/triton/*.py", "bench/notes/*.md", "bench/bench_*.py"):
        for path in ROOT.glob(pattern):
            stem = path.stem.removeprefix("bench_")
            shared = any(belongs(str(path.relative_to(ROOT)), p) for p in ALLOWED if not p.startswith("bench/*"))
            assert stem in known | {"models"} or shared or any(stem.startswith(op) for op in known), path


@pytest.mark.parametrize(
    ("folder", "forbidden"), [("kernels", r"torch|ATen|c10|pybind11"), ("csrc", r"torch|ATen|c10")]
)
def test_no_torch_headers(folder: str, forbidden: str) -> None:
    """Kernels know neither torch nor pybind11, and the boundary does not know torch: no upgrade of it breaks them."""
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            bad = re.findall(rf"#include [<\"](?:{forbidden})[/.\w]*", path.read_text())
            assert not bad, f"{path}: {bad}"


def test_kernels_use_wrappers_only() -> None:
    """What the SIMT executor has to see goes through two headers: no asm, no raw barrier, launch or shared memory."""
    forbidden = r"\basm\b|__syncthreads|__syncwarp|__shfl|<<<|__shared__|cooperative_groups|<cub/"
    for path in (ROOT / "kernels/cuda").glob("*.cu*"):
        if path.name in ("common.cuh", "mma.cuh"):  # the wrappers themselves
            continue
        text = re.sub(r"//.*", "", path.read_text())
        assert not re.findall(forbidden, text), path


def test_params_hold_no_functions() -> None:
    """A function there would be compiled once for each instruction set, and the linker would keep one."""
    for path in (ROOT / "kernels/params").glob("*.h"):
        text = re.sub(r"//.*", "", path.read_text())
        assert not re.findall(r"\)\s*(?:const\s*)?\{", text), path
