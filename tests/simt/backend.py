"""The backend `simt`: the CUDA kernels, run on the CPU by the executor.

Every tensor of a call is copied into memory that ends at a guard page, with the misalignment it had. Inputs become
read-only, outputs start as NaN, and the space between strided rows is NaN too. So a kernel that reads or writes outside
of its tensors, writes an input, or leaves an output unwritten cannot pass.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .build import build

_DIRECTION = ("gx", "w_hh", "b_n", "w_hr", "peephole", "ln_gates", "ln_cell")
_STATES = ("h0", "c0", "keep", "reset", "seed", "offsets")
ARGUMENTS = {
    "layer_norm_fwd": ("x", "residual", "weight", "bias", "seed", "y", "sum", "mean", "rstd"),
    "layer_norm_bwd": (
        *("dy", "dsum", "saved", "weight", "bias", "mean", "rstd", "seed"),
        *("dx", "dresidual", "dweight", "dbias", "workspace"),
    ),
    "attention_fwd": (
        *("q", "k", "v", "mask", "slopes", "sinks", "seed", "cu_q", "cu_k"),
        *("out", "residue", "stats", "workspace"),
    ),
    "attention_bwd": (
        *("dout", "dlse", "q", "k", "v", "mask", "slopes", "sinks", "seed", "cu_q", "cu_k", "out", "residue", "stats"),
        *("dq", "dk", "dv", "dmask", "workspace"),
    ),
    "recurrent_fwd": (
        *_DIRECTION,
        *(f"{name}_r" for name in _DIRECTION),
        *_STATES,
        *("y", "h_n", "c_n", "gates", "cells", "workspace"),
    ),
    "recurrent_bwd": (
        *("dy", "dh_n", "dc_n", "dcells", *_DIRECTION, *(f"{name}_r" for name in _DIRECTION), *_STATES),
        *("y", "gates", "cells", "products"),
        *("dgx", "dp", "dm", "dbias", "dpeephole", "dln_gates", "dln_cell", "dh0", "dc0", "workspace"),
    ),
}
OUTPUTS = {
    "layer_norm_fwd": {"y", "sum", "mean", "rstd"},
    "layer_norm_bwd": {"dx", "dresidual", "dweight", "dbias", "workspace"},
    "attention_fwd": {"out", "residue", "stats", "workspace"},
    "attention_bwd": {"dq", "dk", "dv", "dmask", "workspace"},
    "recurrent_fwd": {"y", "h_n", "c_n", "gates", "cells", "workspace"},
    "recurrent_bwd": {
        *("dgx", "dp", "dm", "dbias", "dpeephole", "dln_gates", "dln_cell", "dh0", "dc0", "workspace"),
    },
}


@dataclass(frozen=True)
class Site:
    """One place in the sources where a kernel waits, exchanges, or calls a matrix instruction."""

    kernel: str
    file: str
    line: int
    what: str
    calls: int


@dataclass(frozen=True)
class BankConflicts:
    """Of the accesses of warps to shared memory at one place; those that go through wrappers are seen, no others."""

    kernel: str
    file: str
    line: int
    what: str
    accesses: int  # of whole warps
    extra: int  # wavefronts beyond those that conflict-free accesses of this kind take


class Executor:
    """The controls of one built library (api.h)."""

    def __init__(self, path: Path):
        lib = self.lib = ctypes.PyDLL(str(path))  # PyDLL: the guarded memory is kept under the interpreter lock
        lib.simt_set_seed.argtypes = [ctypes.c_uint64]
        lib.simt_sites.restype = lib.simt_conflicts.restype = ctypes.c_char_p
        lib.simt_disable.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p]
        lib.simt_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p]
        lib.simt_alloc.restype = ctypes.c_void_p
        lib.simt_seal.argtypes = lib.simt_free.argtypes = [ctypes.c_void_p]
        lib.simt_free.restype = ctypes.c_size_t
        self.set_seed(int(os.environ.get("PYOPS_SIMT_SEED", "1")))

    def set_seed(self, seed: int) -> None:
        """Order of threads and blocks from now on; the reports name the seed."""
        self.lib.simt_set_seed(seed)

    def set_multiprocessors(self, count: int) -> None:
        self.lib.simt_set_multiprocessors(count)

    def record_sites(self, on: bool) -> None:
        self.lib.simt_record_sites(int(on))

    def sites(self) -> list[Site]:
        rows = [line.split("\t") for line in self.lib.simt_sites().decode().splitlines()]
        return [Site(kernel, file, int(line), what, int(calls)) for kernel, file, line, what, calls in rows]

    def record_bank_conflicts(self, on: bool) -> None:
        """Starts a new record, of all launches that follow, or ends it."""
        self.lib.simt_record_conflicts(int(on))

    def bank_conflicts(self) -> list[BankConflicts]:
        rows = [line.split("\t") for line in self.lib.simt_conflicts().decode().splitlines()]
        return [
            BankConflicts(kernel, file, int(line), what, *map(int, counts))
            for kernel, file, line, what, *counts in rows
        ]

    def disable(self, file: str, line: int, kernel: str = "") -> None:
        """Switches off what waits or exchanges at file:line, in one kernel or in all.

        A shuffle or ldmatrix then gives the lane's own, an mma adds nothing, an stmatrix stores nothing.
        """
        self.lib.simt_disable(file.encode(), line, kernel.encode())

    def enable_all(self) -> None:
        self.lib.simt_enable_all()


class Guarded:
    """A copy of a tensor between guard pages."""

    def __init__(self, lib: ctypes.PyDLL, name: str, tensor: torch.Tensor, is_output: bool):
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        size = span * tensor.element_size()
        self.lib, self.name, self.tensor, self.is_output = lib, name, tensor.detach(), is_output
        self.address = lib.simt_alloc(size, tensor.data_ptr() % 16, name.encode())
        buffer = (ctypes.c_char * size).from_address(self.address)
        self.view = torch.frombuffer(buffer, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
        if not is_output:
            # Of an expanded dimension one copy: its elements share memory.
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
            self.view[once].copy_(self.tensor[once])
            lib.simt_seal(self.address)

    def copy_back(self) -> None:
        if self.is_output:
            self.tensor.copy_(self.view)

    def free(self) -> int:
        """Unmaps the copy; returns how many bytes next to it were overwritten."""
        self.view = None
        return self.lib.simt_free(self.address)


def guarded_call(lib: ctypes.PyDLL, function, names: Sequence[str], outputs: set[str], args: tuple):
    """function(*args) with every non-empty tensor replaced by its guarded copy; args beyond names pass as they are."""
    copies: list[Guarded] = []
    damage: list[str] = []
    try:
        passed = list(args)
        for i, (name, arg) in enumerate(zip(names, args)):
            if isinstance(arg, torch.Tensor) and arg.numel() > 0:
                copies.append(Guarded(lib, name, arg, name in outputs))
                passed[i] = copies[-1].view
        result = function(*passed)
        for copy in copies:
            copy.copy_back()
    finally:
        passed = None
        for copy in copies:
            if overwritten := copy.free():
                damage.append(f"{overwritten} bytes next to {copy.name}")
    if damage:
        raise RuntimeError(f"simt: {function.__name__}: wrote {', '.join(damage)}")
    return result


class SimtBackend(Executor):
    """The functions of a backend."""

    def __init__(self, path: Path):
        spec = importlib.util.spec_from_file_location("_simt", path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        super().__init__(path)

    def layer_norm_fwd(self, *args) -> None:
        self._call("layer_norm_fwd", args)

    def layer_norm_bwd(self, *args) -> None:
        self._call("layer_norm_bwd", args)

    def layer_norm_bwd_workspace(self, *args) -> int:
        return self.module.layer_norm_bwd_workspace(*args)

    def attention_fwd(self, *args) -> None:
        self._call("attention_fwd", args)

    def attention_bwd(self, *args) -> None:
        self._call("attention_bwd", args)

    def attention_fwd_workspace(self, *args) -> int:
        return self.module.attention_fwd_workspace(*args)

    def attention_bwd_workspace(self, *args) -> int:
        return self.module.attention_bwd_workspace(*args)

    def recurrent_fwd(self, *args) -> None:
        self._call("recurrent_fwd", args)

    def recurrent_bwd(self, *args) -> None:
        self._call("recurrent_bwd", args)

    def recurrent_fwd_workspace(self, *args) -> int:
        return self.module.recurrent_fwd_workspace(*args)

    def recurrent_bwd_workspace(self, *args) -> int:
        return self.module.recurrent_bwd_workspace(*args)

    def _call(self, name: str, args: tuple) -> None:
        guarded_call(self.lib, getattr(self.module, name), ARGUMENTS[name], OUTPUTS[name], args)


@cache
def load() -> SimtBackend:
    """Builds and loads the module; later calls return the same one."""
    return SimtBackend(build("module"))
