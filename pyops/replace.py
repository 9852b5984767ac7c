"""replace(): give the layers of a model their pyops classes, in place, and take it back.

Only `module.__class__` changes, to a subclass of the exact torch class that adds no state. Parameters, buffers, hooks,
training mode, tied weights and state_dict keys belong to the object and stay as they are; undo is one assignment.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import nn as fused
from .backend import FLOATING


@dataclass(frozen=True)
class _Swap:
    stem: str
    torch_class: type[nn.Module]
    fused_class: type[nn.Module]


_SWAPS = (
    _Swap("layer_norm", nn.LayerNorm, fused.LayerNorm),
    _Swap("layer_norm", nn.RMSNorm, fused.RMSNorm),
    _Swap("attention", nn.MultiheadAttention, fused.MultiheadAttention),
    _Swap("attention", nn.TransformerEncoderLayer, fused.TransformerEncoderLayer),
    _Swap("attention", nn.TransformerDecoderLayer, fused.TransformerDecoderLayer),
    _Swap("recurrent", nn.LSTM, fused.LSTM),
    _Swap("recurrent", nn.GRU, fused.GRU),
    _Swap("recurrent", nn.RNN, fused.RNN),
    _Swap("recurrent", nn.LSTMCell, fused.LSTMCell),
    _Swap("recurrent", nn.GRUCell, fused.GRUCell),
    _Swap("recurrent", nn.RNNCell, fused.RNNCell),
)
_STEMS = tuple(dict.fromkeys(swap.stem for swap in _SWAPS))

_Entries = str | type[nn.Module] | Iterable[str | type[nn.Module]] | None


@dataclass(frozen=True)
class Row:
    """One module that pyops has a class for."""

    path: str  # "" for the model itself; the first one of a module that has several
    type: str  # class before the call
    action: str  # "replaced" or "kept"
    code: str
    reason: str
    paths: tuple[str, ...]  # every path of the module


class ReplaceReport:
    """What `pyops.replace` did. `print(report)` shows it as a table; `undo()` takes it back."""

    def __init__(self, rows: list[Row], num_modules: int, dry_run: bool, swapped: list[tuple[nn.Module, _Swap]]):
        self.rows = rows
        self.dry_run = dry_run
        self._num_modules = num_modules
        self._swapped = swapped
        self._undone = False

    @property
    def replaced(self) -> list[Row]:
        """Rows of the modules that changed their class, or would have without dry_run."""
        return [row for row in self.rows if row.action == "replaced"]

    @property
    def kept(self) -> list[Row]:
        """Rows of the modules that were left alone."""
        return [row for row in self.rows if row.action == "kept"]

    def undo(self) -> int:
        """Gives every replaced module its torch class back and returns how many.

        A module whose class changed again since (parametrized, wrapped by FSDP) is left alone. A second call does
        nothing.
        """
        restored = 0
        for module, swap in self._swapped:
            if type(module) is swap.fused_class:
                module.__class__ = swap.torch_class
                restored += 1
        self._swapped = []
        self._undone = not self.dry_run
        return restored

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._summary()}>"

    def __str__(self) -> str:
        head = ("path", "type", "action", "code", "reason")
        lines = [head, *((row.path or "(model)", row.type, row.action, row.code, row.reason) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        lines.insert(1, tuple("-" * width for width in widths))
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([*(table if self.rows else []), self._summary()])

    def _summary(self) -> str:
        text = f"{len(self.replaced)} replaced, {len(self.kept)} kept, of {self._num_modules} modules"
        if self.dry_run:
            return f"{text} (dry run: nothing was changed)"
        return f"{text} (undone)" if self._undone else text


def replace(model: nn.Module, *, only: _Entries = None, skip: _Entries = None, dry_run: bool = False) -> ReplaceReport:
    """Gives the layers of `model` their pyops classes, in place.

    Args:
        model: any module, also a single layer. Call this before the model is traced, quantised or sharded; `undo()`
            it before torch.jit.script, which takes no pyops module.
        only: replace nothing but these. One entry or several, each of them
            a stem, "layer_norm", "attention" or "recurrent" (the layers of that family; this reading wins over a path
            of the same name),
            a module path with shell-style wildcards ("encoder.*.norm1"), or a module class.
            A path or class selects the modules that it matches and everything inside them. None: everything.
        skip: leave these alone; wins over `only`.
        dry_run: report what would happen and change nothing.

    Returns: a report with one row per module that pyops has a class for. Codes of the rows:

        replaced  ok               nothing to add
                  tied             one module at several paths; `row.paths` lists them
                  fastpath         inside an nn.TransformerEncoderLayer that is not replaced. In eval() without
                                   gradients that layer runs a fused operator which reads the weights of its children
                                   and never calls them, so the replacement serves training.
                                   `torch.backends.mha.set_fastpath_enabled(False)` turns the operator off
                  compiled         compiled before; it recompiles at its next call
        kept      already          has a pyops class
                  only, skip       not selected
                  subclass         a class derived from torch's: its behaviour is unknown
                  patched          `forward` is set on the instance, which hides that of any class; or a part of it that
                                   the pyops class does not call (`_sa_block`, `_mha_block`, `_ff_block`)
                  parametrized     by torch.nn.utils.parametrize
                  scripted         by torch.jit
                  quantised        a quantised module, or one prepared for it
                  fsdp             sharded; replace first, shard then
                  tensor_subclass  a parameter is no plain tensor (DTensor, torchao)
                  dtype            a parameter is not float64, float32, bfloat16 or float16

    Raises: TypeError, ValueError on bad arguments, before anything is changed. A path or class that matches nothing in
    the model is an error.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = None if only is None else _select("only", only, modules)
    skipped = _Selection({}, {}) if skip is None else _select("skip", skip, modules)

    paths_of: dict[int, list[str]] = {}  # by id(): the same module, not an equal one
    for path, module in modules.items():
        paths_of.setdefault(id(module), []).append(path)

    found, swapped = [], []
    for paths in paths_of.values():
        module = modules[paths[0]]
        swap = _find_swap(module)
        if swap is None:
            continue
        lineage = [path for leaf in paths for path in _lineage(leaf)]
        parents = [modules[path] for path in lineage if modules[path] is not module]
        refusal = _refusal(module, swap, parents) or _unselected(paths, lineage, chosen, skipped)
        if not refusal:
            swapped.append((module, swap))
        found.append((paths, module, swap, parents, refusal))

    rows, exchanged = [], {id(module) for module, _ in swapped}
    for paths, module, swap, parents, refusal in found:
        code, reason = refusal or _note(module, swap, paths, parents, exchanged)
        action = "kept" if refusal else "replaced"
        rows.append(Row(paths[0], _class_name(type(module)), action, code, reason, tuple(paths)))

    if dry_run:
        swapped = []
    for module, swap in swapped:
        module.__class__ = swap.fused_class
    return ReplaceReport(rows, len(paths_of), dry_run, swapped)


@dataclass(frozen=True)
class _Selection:
    """What `only` or `skip` matched: paths, and the text of the entry that did."""

    alone: dict[str, str]  # of the modules of a family
    within: dict[str, str]  # of modules that stand for everything inside them

    def match(self, paths: Iterable[str], lineage: Iterable[str]) -> str | None:
        """The entry that selects the module with these paths, or None."""
        hits = [self.within[path] for path in lineage if path in self.within]
        hits += [self.alone[path] for path in paths if path in self.alone]
        return hits[0] if hits else None


def _select(argument: str, entries: _Entries, modules: dict[str, nn.Module]) -> _Selection:
    entries = [entries] if isinstance(entries, (str, type)) or not isinstance(entries, Iterable) else list(entries)
    known = {cls for swap in _SWAPS for cls in (swap.torch_class, swap.fused_class)}
    selection = _Selection({}, {})
    for entry in entries:
        if isinstance(entry, type) and issubclass(entry, nn.Module):
            text = _class_name(entry)
            paths = [path for path, module in modules.items() if isinstance(module, entry)]
        elif isinstance(entry, str):
            text = repr(entry)
            if entry in _STEMS:
                paths = [path for path, module in modules.items() if (s := _find_swap(module)) and s.stem == entry]
            else:
                paths = [path for path in modules if fnmatchcase(path, entry)]
        else:
            raise TypeError(f"replace: {argument} must hold module paths, module classes or stems, got {entry!r}")
        if not paths and entry not in _STEMS and entry not in known:
            stems = ", ".join(map(repr, _STEMS))
            raise ValueError(
                f"replace: {argument} must match a module of the model by path or class, or be a stem ({stems}), "
                f"got {text}"
            )
        (selection.alone if entry in _STEMS else selection.within).update(dict.fromkeys(paths, text))
    return selection


def _lineage(path: str) -> list[str]:
    """The path and those of all that contain it: "a.b" gives ["", "a", "a.b"]."""
    names = path.split(".") if path else []
    return [".".join(names[:i]) for i in range(len(names) + 1)]


def _find_swap(module: nn.Module) -> _Swap | None:
    for swap in _SWAPS:
        if isinstance(module, (swap.torch_class, swap.fused_class)):
            return swap
        if isinstance(module, torch.jit.ScriptModule) and module.original_name == swap.torch_class.__name__:
            return swap
    return None


def _refusal(module: nn.Module, swap: _Swap, parents: list[nn.Module]) -> tuple[str, str] | None:
    cls = type(module)
    if isinstance(module, swap.fused_class):
        return "already", f"is a {_class_name(swap.fused_class)}"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted", "TorchScript holds its own forward; replace before torch.jit.trace"
    if parametrize.is_parametrized(module):
        return "parametrized", "torch.nn.utils.parametrize computes its parameters through a class of its own"
    if cls.__module__.startswith("torch.ao.") or getattr(module, "qconfig", None) is not None:
        return "quantised", "is quantised or prepared for it, which goes by torch's class"
    if any(_is_fsdp(m) for m in (module, *parents)):
        return "fsdp", "is sharded by FSDP; replace before sharding"
    if cls is not swap.torch_class:
        return "subclass", f"is not exactly {_class_name(swap.torch_class)}"
    for name in ("forward", "_sa_block", "_mha_block", "_ff_block"):
        if name in module.__dict__:
            return "patched", f"{name} is set on the instance, which hides that of any class"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return "tensor_subclass", f"{name} is a {type(parameter).__name__}, not a plain tensor"
        if parameter.dtype not in FLOATING:
            return "dtype", f"{name} is {parameter.dtype}"
    return None


def _unselected(
    paths: list[str], lineage: list[str], chosen: _Selection | None, skipped: _Selection
) -> tuple[str, str] | None:
    entry = skipped.match(paths, lineage)
    if entry is not None:
        return "skip", f"matches skip={entry}"
    if chosen is not None and chosen.match(paths, lineage) is None:
        return "only", "matches no entry of only"
    return None


def _note(
    module: nn.Module, swap: _Swap, paths: list[str], parents: list[nn.Module], exchanged: set[int]
) -> tuple[str, str]:
    """What the user should know about a replaced module; the first note gives the code. ``exchanged``: the id() of all
    modules that get another class."""
    notes = []
    if any(_has_fast_path(m) for m in parents if id(m) not in exchanged):
        notes.append(("fastpath", "TransformerEncoderLayer bypasses it in eval() without grad"))
    if any(_is_compiled(m) for m in (module, *parents)):
        notes.append(("compiled", "recompiles at the next call"))
    if len(paths) > 1:
        notes.append(("tied", f"also at {', '.join(paths[1:])}"))
    code = notes[0][0] if notes else "ok"
    return code, "; ".join([f"now {_class_name(swap.fused_class)}", *(text for _, text in notes)])


def _is_fsdp(module: nn.Module) -> bool:
    # By name: importing torch.distributed.fsdp takes long, and is not possible in every build of torch.
    names = {base.__name__ for base in type(module).__mro__}
    return not names.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _has_fast_path(module: nn.Module) -> bool:
    """The lasting conditions of nn.TransformerEncoderLayer.forward; mode, hooks, autocast change from call to call."""
    if not isinstance(module, nn.TransformerEncoderLayer) or isinstance(module, fused.TransformerEncoderLayer):
        return False
    try:
        return bool(
            module.self_attn.batch_first
            and module.self_attn.in_proj_bias is not None
            and module.activation_relu_or_gelu
            and module.norm1.eps == module.norm2.eps
            and module.self_attn.num_heads % 2 == 0
        )
    except AttributeError:  # a child was exchanged for one that the fused operator cannot read
        return False


def _class_name(cls: type) -> str:
    for package, short in (("torch.nn.", "nn"), ("pyops.", "pyops.nn")):
        if cls.__module__.startswith(package):
            return f"{short}.{cls.__qualname__}"
    return cls.__qualname__ if cls.__module__ == "__main__" else f"{cls.__module__}.{cls.__qualname__}"
