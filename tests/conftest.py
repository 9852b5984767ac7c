"""Which backends the tests run on, and what every test may rely on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# libgomp reads it once: with spinning threads, two test processes on two cores spend their time waiting for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when triton is imported. With a GPU, triton runs there for real.
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent))

import simt  # noqa: E402 (needs the path above)

from pyops.backend import BACKENDS, Backend  # noqa: E402 (may import triton)

BACKENDS["simt"] = Backend(
    "simt",
    lambda _: simt.load(),
    lambda x: None if x.device.type == "cpu" else f"it serves CPU tensors, not {x.device.type}",
)


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes with numpy, which warns of the overflows and 0 / 0 that some tests are about.
    config.addinivalue_line("filterwarnings", "ignore:.* encountered in:RuntimeWarning:triton.runtime.interpreter")
    # torch warns of itself: its forward-mode rules are TorchScript, its compiler instantiates autograd.Function.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:.*should not be instantiated:DeprecationWarning:torch")


@dataclass(frozen=True)
class Target:
    """A backend and the device of the tensors that it is given."""

    name: str
    device: str

    def __str__(self) -> str:
        return f"{self.name}-on-gpu" if self.device == "cuda" and self.name != "cuda" else self.name


TARGETS = [Target("eager", "cpu"), Target("cpu", "cpu"), Target("simt", "cpu")]
TARGETS += [Target("cuda", "cuda"), Target("triton", "cuda")] if HAS_GPU else [Target("triton", "cpu")]


@pytest.fixture(params=TARGETS, ids=str)
def backend(request: pytest.FixtureRequest) -> Target:
    """Every backend that this machine can run. Without a GPU that is: eager, the CPU kernels, the CUDA kernels in the
    SIMT executor (`simt`), and the Triton kernels in Triton's interpreter."""
    return request.param


@pytest.fixture(params=[target for target in TARGETS if target.name != "eager"], ids=str)
def kernels(request: pytest.FixtureRequest) -> Target:
    """The backends that have kernels, for what eager leaves to the torch operators that it consists of."""
    return request.param


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """The same random numbers in every run, and no thread count, default dtype or compiled code left behind."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def fresh_compile() -> Iterator[None]:
    """For tests that compile: nothing from earlier tests counts against the recompilation limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
