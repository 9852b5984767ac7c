"""The SIMT executor: runs kernels/cuda/*.cu on the CPU for the tests. `load()` gives the backend."""

from .backend import Executor, SimtBackend, Site, guarded_call, load
from .build import build

__all__ = ["Executor", "SimtBackend", "Site", "build", "guarded_call", "load"]
