"""The clean room: `pip install .` with pip's default build isolation in a fresh environment, with and without CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import torch, pyops
from pyops import backend
x, w, b = torch.randn(5, 33), torch.randn(33), torch.randn(33)
want = torch.nn.functional.layer_norm(x, (33,), w, b)
assert torch.allclose(pyops.layer_norm(x, (33,), w, b, backend="cpu"), want, atol=1e-5)
import importlib.util
assert importlib.util.find_spec("pyops._triton.layer_norm") is not None
print(pyops.__file__, backend._C.cuda_archs)
"""


def _run(*command: str | Path, **kwargs: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cuda", ["0", "1"])
def test_clean_room(tmp_path: Path, cuda: str) -> None:
    """From the sdist alone: nothing of this checkout or of its environment is in reach."""
    if cuda == "1" and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed here: there are no CUDA objects to build")
    _run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=ROOT)
    (archive,) = tmp_path.glob("pyops_kernels-*.tar.gz")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYOPS", "TRITON", "VIRTUAL_ENV"))
    }
    environment.update(PYOPS_CUDA=cuda, PYOPS_CUDA_ARCHS="80", MAX_JOBS="2")
    if cuda == "0" and shutil.which("nvcc") is not None:
        # With CUDA it is built as a user builds it; this time what matters is that it can be, so without optimisation.
        compiler = tmp_path / "g++-O0"
        compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
        compiler.chmod(0o755)
        environment["CXX"] = str(compiler)
    torch_version = _run(sys.executable, "-c", "import torch; print(torch.__version__.split('+')[0])").strip()
    _run(python, "-m", "pip", "install", "--quiet", f"torch=={torch_version}", "numpy", env=environment)
    _run(python, "-m", "pip", "install", "--quiet", archive, env=environment)
    location, archs = _run(python, "-W", "ignore", "-c", CHECK, cwd=tmp_path, env=environment).split()
    assert str(tmp_path) in location
    assert archs == ("80" if cuda == "1" else "None")
