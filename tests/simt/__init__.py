"""The SIMT executor: runs kernels/cuda/*.cu on the CPU for the tests. `load()` gives the backend."""

from .backend import BankConflicts, Executor, SimtBackend, Site, guarded_call, load
from .build import build

__all__ = ["BankConflicts", "Executor", "SimtBackend", "Site", "build", "guarded_call", "load"]
