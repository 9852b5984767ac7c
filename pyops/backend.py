"""Which implementation serves a call, and by which way it is reached.

Four backends have one meaning: ``eager`` (plain differentiable PyTorch, the definition), ``cpu`` and ``cuda`` (the
compiled extension ``pyops._C``), ``triton``. A backend is a module with ``<op>_fwd``, ``<op>_bwd`` and
``<op>_bwd_workspace``. Whether one can serve a call is decided from facts, never by trying.

A plain eager call goes straight to the backend. Under anything that needs to see an operator (torch.compile, tracing,
functorch, dispatch modes, tensor subclasses, negative or zero tensors) the same leaf is called as ``torch.ops.pyops``;
:func:`is_plain` asks the question.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

logger = logging.getLogger("pyops")

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


@dataclass
class Backend:
    """One implementation: how its leaves are loaded, and why it would not serve a tensor (None when it would)."""

    name: str
    load: Callable[[str], ModuleType | None]  # by stem
    unusable: Callable[[torch.Tensor], str | None]


try:
    _C: ModuleType | None = importlib.import_module("pyops._C")
    _C_ERROR = ""
except ImportError as error:
    _C, _C_ERROR = None, str(error)


def _remedy() -> str:
    return "correct the variable" if "PYOPS_CPU_ISA" in _C_ERROR else "reinstall pyops"


def _cpu_unusable(x: torch.Tensor) -> str | None:
    if _C is None:
        return f'the extension cannot be loaded ({_C_ERROR}); {_remedy()}, or use "eager"'
    if x.device.type != "cpu":
        return f"it serves CPU tensors, not {x.device.type}"
    return None


def _cuda_unusable(x: torch.Tensor) -> str | None:
    if _C is None:
        return f'the extension cannot be loaded ({_C_ERROR}); {_remedy()}, or use "triton" or "eager"'
    if _C.cuda_archs is None:
        return 'it was not built (no nvcc at install, or PYOPS_CUDA=0); use "triton", or reinstall with nvcc'
    if x.device.type != "cuda":
        return f"it serves CUDA tensors, not {x.device.type}"
    if torch.version.hip is not None:
        return 'it serves NVIDIA GPUs; use "triton"'
    if not _runs_on(_C.cuda_archs, *torch.cuda.get_device_capability(x.device)):
        return (
            f'it was built for {_C.cuda_archs}, which {x.device} does not run; use "triton", '
            "or reinstall with PYOPS_CUDA_ARCHS"
        )
    return None


def _runs_on(archs: str, major: int, minor: int) -> bool:
    """Whether a GPU of this compute capability has machine code among ``archs``, or PTX (of the lowest plain one)."""
    plain = [int(a) for a in archs.split(";") if a.isdigit()]
    own = f"{major}{minor}a" in archs.split(";") or any(a // 10 == major and a % 10 <= minor for a in plain)
    return own or (bool(plain) and min(plain) <= 10 * major + minor)


def _triton_unusable(x: torch.Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if x.device.type != "cuda" and not (interpreted and x.device.type == "cpu"):
        return f"it serves CUDA tensors (CPU tensors under TRITON_INTERPRET=1), not {x.device.type}"
    if x.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"it needs compute capability 8.0, {x.device} has less"
    return None


BACKENDS = {
    "eager": Backend("eager", lambda _: None, lambda _: None),
    "cpu": Backend("cpu", lambda _: _C, _cpu_unusable),
    "cuda": Backend("cuda", lambda _: _C, _cuda_unusable),
    "triton": Backend("triton", lambda stem: importlib.import_module(f"pyops._triton.{stem}"), _triton_unusable),
}
# Which backends are considered for a device when none is named, best first.
PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_CPU_IS_FIRST = _C is not None

# The public functions, for explain(): their module, and the arguments that decide (the first one above all).
FUNCTIONS = {
    "layer_norm": ("layer_norm", ("x",)),
    "rms_norm": ("layer_norm", ("x",)),
    "add_layer_norm": ("layer_norm", ("x",)),
    "layer_norm2d": ("layer_norm", ("x",)),
    "scaled_dot_product_attention": ("attention", ("query", "key", "value")),
    "attention": ("attention", ("query", "key", "value")),
    "varlen_attention": ("attention", ("q", "k", "v")),
    "lstm": ("recurrent", ("input",)),
    "gru": ("recurrent", ("input",)),
    "rnn": ("recurrent", ("input",)),
    "lstm_cell": ("recurrent", ("input",)),
    "gru_cell": ("recurrent", ("input",)),
    "rnn_cell": ("recurrent", ("input",)),
}
OPERATIONS = tuple(name for name, (stem, _) in FUNCTIONS.items() if stem == "layer_norm")
SERVES_JAGGED = ("layer_norm", "rms_norm")  # by torch's own operator

_forced: str | None = None


def _constant_when_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result without its import of torch._dynamo, which takes two seconds."""
    function._dynamo_marked_constant = True
    return function


def check_name(op: str, name: object) -> None:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, or None, got {name!r}")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, every pyops function whose ``backend`` is not given runs on ``name``.

    Args:
        name: "eager", "cpu", "cuda" or "triton"; None restores the automatic choice. Blocks nest. The choice is
            process-wide, like torch's own switches, so that autograd's threads see it.
    """
    global _forced
    if name is not None:
        check_name("use_backend", name)
    before = _forced
    _forced = name
    try:
        yield
    finally:
        _forced = before


Limit = Callable[[str], "str | None"]


def choose(op: str, x: torch.Tensor, name: str | None, limit: Limit | None = None) -> str:
    """The backend that runs ``op`` on a tensor like ``x``: a name of BACKENDS, or "torch" where none serves it.

    A named backend is used or refused with the reason and the remedy; it is never replaced by another one. ``limit``
    tells why a backend's kernels of this operation do not serve the call (None when they do); those of the CPU serve
    every call.
    """
    if name is None:
        name = _forced
    if _CPU_IS_FIRST and name in (None, "cpu") and x.is_cpu and not x.is_nested:
        return "cpu"
    chosen, why = _choose(op, x, name, limit)
    if chosen == "torch":
        _log_fallback(op, "jagged nested tensors" if x.is_nested else f"{x.device.type} tensors", why)
    return chosen


def _unusable(name: str, x: torch.Tensor, limit: Limit | None) -> str | None:
    """Why a backend does not serve the call; None when it does."""
    reason = BACKENDS[name].unusable(x)
    return limit(name) if reason is None and limit is not None else reason


def _choose(op: str, x: torch.Tensor, name: str | None, limit: Limit | None = None) -> tuple[str, str]:
    """The name, and for "torch" the reason."""
    if name is not None:
        check_name(op, name)
    if x.is_nested:
        if op not in SERVES_JAGGED:
            raise TypeError(f"{op}: x must be a strided tensor, got a jagged one")
        if name in (None, "eager"):
            return "torch", "no backend serves them"
    if name is None:
        reasons = {}
        for candidate in PREFERRED.get(x.device.type, ()):
            reasons[candidate] = _unusable(candidate, x, limit)
            if reasons[candidate] is None:
                return candidate, ""
        return "torch", "; ".join(f"{n}: {why}" for n, why in reasons.items()) or "no backend serves them"
    reason = "it serves strided tensors, not jagged ones" if x.is_nested else _unusable(name, x, limit)
    if reason is not None:
        raise ValueError(f"{op}: backend must be able to serve {FUNCTIONS[op][1][0]}, got {name!r}: {reason}")
    return name, ""


_logged: set[tuple[str, str]] = set()


@_constant_when_compiled
def _log_fallback(op: str, what: str, reasons: str) -> None:
    if (op, what) not in _logged:
        _logged.add((op, what))
        logger.warning("%s on %s runs torch's own operators (%s)", op, what, reasons)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: the backend that would run, and for each other one why it would not."""

    op: str
    chosen: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} runs on {self.chosen}"]
        lines += [f"  {name:<7} {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(op: str, *args: object, backend: str | None = None, **kwargs: object) -> Explanation:
    """Which backend would run ``pyops.<op>(*args, **kwargs)``, and why each other one would not.

    Args:
        op: the name of a pyops function, "layer_norm" for instance.
        args, kwargs: its arguments, positional or by name; nothing is computed, and only the tensors that decide are
            looked at: x, or query, key and value, or input.
        backend: as in the function itself.

    Returns:
        Explanation: ``chosen`` and ``reasons`` by backend; its ``str`` is a table.
    """
    if op not in FUNCTIONS:
        raise ValueError(f"explain: op must be one of {', '.join(FUNCTIONS)}, got {op!r}")
    stem, names = FUNCTIONS[op]
    tensors = [*args[: len(names)], *(kwargs.get(name) for name in names[len(args) :])]
    tensors = [t.data if isinstance(t, PackedSequence) else t for t in tensors]
    for name, tensor in zip(names, tensors):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"explain: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if op == "scaled_dot_product_attention":  # a jagged call runs on the values, packed
        tensors = [t.transpose(1, 2).values() if t.layout == torch.jagged and t.dim() == 4 else t for t in tensors]
    limits = getattr(importlib.import_module(f"pyops.{stem}"), "LIMITS", {})

    def limit(name: str) -> str | None:
        return limits[name](*tensors) if name in limits else None

    x = tensors[0]
    reasons = {}
    wanted = backend if backend is not None else _forced
    try:
        if x.dtype not in FLOATING:
            raise TypeError(f"{op}: {names[0]} must have dtype float64, float32, bfloat16 or float16, got {x.dtype}")
        chosen, _ = _choose(op, x, wanted, limit)
    except (TypeError, ValueError) as error:
        chosen = f"nothing ({error})"
    for name in BACKENDS:
        reason = _unusable(name, x, limit)
        if name == chosen:
            reasons[name] = "chosen" if wanted is None else "chosen: asked for by name"
        elif reason is not None:
            reasons[name] = f"cannot: {reason}"
        elif wanted is not None:
            reasons[name] = f"could, but {wanted!r} was asked for"
        elif name in PREFERRED.get(x.device.type, ()):
            reasons[name] = (
                f"could, but {chosen} comes first" if chosen in BACKENDS else f"cannot: {names[0]} is refused"
            )
        else:
            reasons[name] = "could, when asked for by name"
    if chosen == "torch":
        reasons["torch"] = "chosen: torch's own operators"
    return Explanation(op, chosen, reasons)


@functools.cache
def leaf(name: str, stem: str) -> ModuleType:
    """The module that holds a backend's ``<stem>_fwd`` and ``<stem>_bwd``."""
    module = BACKENDS[name].load(stem)
    assert module is not None, f"backend {name} has no kernels"
    return module


def cpu_kernels(name: str | None) -> ModuleType | None:
    """pyops._C when ``name`` (None: the choice in force) leaves CPU tensors to it."""
    return _C if (_forced or "cpu" if name is None else name) == "cpu" else None


# ---- which way a call takes ----


def _private(name: str, default: Callable) -> Callable:
    """A private function of torch._C, or a default that makes every call take the operator's way."""
    return getattr(torch._C, name, default)


_dispatch_modes = _private("_len_torch_dispatch_stack", lambda: 1)
_functorch_active = _private("_are_functorch_transforms_active", lambda: True)
# The vmap of is_grads_batched is an older one, which functorch does not know.
_is_legacy_batched = getattr(_private("_functorch", None), "is_legacy_batchedtensor", lambda _: True)
_is_tracing = _private("_is_tracing", torch.jit.is_tracing)
is_compiling = torch.compiler.is_dynamo_compiling


if _C is not None:
    _C.set_torch_objects(torch, (_dispatch_modes, _functorch_active, _is_tracing))


def _forward_ad_active() -> bool:
    return getattr(forward_ad, "_current_level", 0) >= 0


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on there; some devices (meta) have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast_to_float(x: torch.Tensor, keep_dtype: bool) -> bool:
    """torch's rule for normalisations: off the CPU, autocast computes and returns them in float32."""
    if x.is_cpu or keep_dtype:
        return False
    return is_autocast(x.device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """For arithmetic that has one type, whatever autocast would make of its products."""
    if is_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def is_quiet() -> bool:
    """Nothing is watching: no compiler, tracer, dispatch mode, functorch transform or forward AD."""
    return not (
        is_compiling()
        or _dispatch_modes()
        or _functorch_active()
        or _is_tracing()
        or getattr(forward_ad, "_current_level", 0) >= 0
    )


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether the compiled kernels may read these tensors' memory directly."""
    if not is_quiet():
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) not in PLAIN_TYPES or t.is_neg() or t._is_zerotensor() or _is_legacy_batched(t):
            return False
    return True


def functorch_active() -> bool:
    """Inside vmap, grad, vjp, ... of torch.func (not forward AD alone)."""
    return _functorch_constant() if is_compiling() else _functorch_active()


@_constant_when_compiled
def _functorch_constant() -> bool:
    return _functorch_active()


def needs_definition() -> bool:
    """Forward AD, torch.jit.trace, and functorch inside torch.compile: only plain torch operators are right there."""
    if is_compiling():
        return _functorch_constant() or _forward_ad_constant()
    return _is_tracing() or _forward_ad_active()


@_constant_when_compiled
def _forward_ad_constant() -> bool:
    return _forward_ad_active()


# ---- what waits for a module that an import of pyops does not load ----


class _AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, action: Callable[[], None]):
        self.module, self.action = module, action

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:  # noqa: ARG002
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        load, action = spec.loader.exec_module, self.action

        def exec_module(module: ModuleType) -> None:
            load(module)
            action()

        spec.loader.exec_module = exec_module
        return spec


def when_imported(module: str, action: Callable[[], None]) -> None:
    """Calls ``action`` once ``module`` is loaded, now or later."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(module, action))
