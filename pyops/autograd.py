"""One description of an operation, and the autograd Functions made from it.

A :class:`Rule` says what an operation computes, what it saves and how its gradients come about. From it are made

* ``direct``: for the call that most calls are; forward and backward are one call of the compiled extension each;
* ``plain``: ctx-style, for other eager calls and for torch.compile and torch.export (Dynamo traces it);
* ``functorch``: with ``setup_context`` and a generated vmap rule, over the registered operators, for torch.func;
* ``backward``: the gradients as a Function of their own, used under ``create_graph`` and torch.func, whose backward is
  the vjp of the rule's differentiable formula. That gives gradients of every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from . import backend

Tensors = Sequence[torch.Tensor | None]
_PLAIN = backend.PLAIN_TYPES


class Rule:
    """What an operation is: tensors (or None), and plain values in ``config``, with which its schema ends.

    ``direct`` chooses between the backend itself and the registered operator.
    """

    name: str
    config: type  # of the named tuple
    n_tensors: int
    n_saved: int
    n_grads: int
    recomputed: Sequence[int] = ()  # saved tensors through which `formula` sends no gradient

    @staticmethod
    def forward(direct: bool, tensors: Tensors, config: tuple) -> tuple:
        """Runs the leaf; every result, a tuple of tensors or None."""
        raise NotImplementedError

    @staticmethod
    def outputs(results: tuple, config: tuple) -> tuple:
        """The results that carry a gradient."""
        raise NotImplementedError

    @staticmethod
    def constants(results: tuple, config: tuple) -> tuple:  # noqa: ARG004
        """The results that callers see and that carry none."""
        return ()

    @staticmethod
    def saved(tensors: Tensors, results: tuple, config: tuple) -> tuple:
        """What backward reads: ``n_saved`` tensors or None."""
        raise NotImplementedError

    @staticmethod
    def backward(direct: bool, grads: Tensors, saved: Tensors, config: tuple, needs: Sequence[bool]) -> tuple:
        """Runs the backward leaf; a gradient (or None) for each tensor, from ``n_grads`` incoming ones."""
        raise NotImplementedError

    @staticmethod
    def backward_direct(ctx: Any, saved: Tensors, grads: Tensors) -> tuple | None:
        """What ``direct`` returns from backward, for dense plain gradients and no further order; None for any other."""
        raise NotImplementedError

    @staticmethod
    def formula(grads: Tensors, saved: Tensors, config: tuple, needs: Sequence[bool]) -> tuple:
        """The same gradients in differentiable torch operators."""
        raise NotImplementedError


# ---- what the operations share ----


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over ``dtype`` are formed and statistics are stored."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fail(op: str, argument: str, rule: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{op}: {argument} must {rule}, got {got}")


def present(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """An operator's output, also where there is none: schemas have no optional results."""
    return like.new_empty(0) if t is None else t


def batched_first(t: torch.Tensor | None, dim: int | None, size: int) -> torch.Tensor | None:
    """The batch dimension in front, expanded where there is none."""
    if t is None:
        return None
    return t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)


def per_sample(op: Callable, info: Any, in_dims: tuple, args: tuple) -> tuple:
    """One call for each sample: with dropout, every sample has the mask that it would have alone."""
    if info.batch_size == 0:
        one = [a.new_zeros(a.shape[:d] + a.shape[d + 1 :]) if isinstance(d, int) else a for a, d in zip(args, in_dims)]
        results = tuple(r.new_empty(0, *r.shape) for r in op(*one))
        return results, (0,) * len(results)
    runs = []
    for i in range(info.batch_size):
        picked = [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims)]
        runs.append(op(*picked))
    results = tuple(torch.stack(r) for r in zip(*runs))
    return results, (0,) * len(results)


def distinct(tensors: Tensors) -> list[torch.Tensor | None]:
    """Views in the place of repeated tensors: Dynamo takes each input of a Function once."""
    return [
        t.view_as(t) if t is not None and any(t is other for other in tensors[:i]) else t for i, t in enumerate(tensors)
    ]


# ---- the Functions ----


def make(rule: type[Rule]) -> tuple[Callable, type, type]:
    """The ways into autograd of a rule: (direct, plain.apply, functorch.apply).

    ``direct(done, *tensors)``, where ``done`` holds the outputs, the saved tensors and the config of a forward that has
    run already, and the tensors are the first ones of the rule (those that can have a gradient).
    ``plain(direct, config, *tensors)``; ``functorch(config, *tensors)``.
    """
    n_saved, n_grads, backward_direct = rule.n_saved, rule.n_grads, rule.backward_direct

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple:
            grads, saved = args[:n_grads], args[n_grads : n_grads + n_saved]
            config, needs = args[-2], args[-1]
            found = rule.backward(backend.is_plain(*grads, *saved), grads, saved, config, needs)
            # A Function whose inputs are saved outside of forward may not return one of them.
            return tuple(r.clone() if any(r is g for g in grads if g is not None) else r for r in found)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            ctx.save_for_backward(*inputs[:-2])
            ctx.config, ctx.needs = inputs[-2:]
            ctx.present = [o is not None for o in output]
            ctx.set_materialize_grads(True)

        @staticmethod
        def backward(ctx: Any, *grads_of_grads: torch.Tensor | None) -> tuple:
            inputs = ctx.saved_tensors
            constant = {n_grads + i for i in rule.recomputed}
            at = [i for i, t in enumerate(inputs) if t is not None and t.is_floating_point() and i not in constant]

            def formula(*tensors: torch.Tensor) -> tuple:
                full = list(inputs)
                for i, t in zip(at, tensors):
                    full[i] = t
                results = rule.formula(full[:n_grads], full[n_grads:], ctx.config, ctx.needs)
                return tuple(r for r, here in zip(results, ctx.present) if here)

            cotangents = tuple(g for g, here in zip(grads_of_grads, ctx.present) if here)
            _, vjp = torch.func.vjp(formula, *(inputs[i] for i in at))
            found = dict(zip(at, vjp(cotangents)))
            return *(found.get(i) for i in range(len(inputs))), None, None

    def differentiate(direct: bool, grads: tuple, saved: Tensors, config: tuple, needs: Sequence[bool]) -> tuple:
        grads += (None,) * (n_grads - len(grads))
        if torch.is_grad_enabled() and not backend.is_compiling():
            return Backward.apply(*grads, *saved, config, tuple(needs))
        # Asked again: batched gradients and compiled autograd bring other tensors than forward saw. What was saved was
        # plain then, and the types tell whether a hook has put something else in its place.
        direct = direct and backend.is_plain(*grads) and all(t is None or type(t) in _PLAIN for t in saved)
        return rule.backward(direct, grads, saved, config, needs)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, done: tuple, *tensors: Any) -> Any:  # noqa: ARG004
            outputs, saved, ctx.config = done
            ctx.save_for_backward(*saved)
            if type(outputs) is tuple:
                ctx.set_materialize_grads(False)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
            saved = ctx.saved_tensors  # once: a checkpoint counts how often
            if not backend.is_compiling():
                found = backward_direct(ctx, saved, grads)
                if found is not None:
                    return found
            needs = ctx.needs_input_grad[1:]
            padded = needs + (False,) * (rule.n_tensors - len(needs))
            found = differentiate(True, grads, saved, rule.config(*ctx.config), padded)
            return (None, *found[: len(needs)])

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, direct: bool, config: tuple, *tensors: Any) -> Any:
            results = rule.forward(direct, tensors, config)
            outputs = rule.outputs(results, config)
            ctx.save_for_backward(*rule.saved(tensors, results, config))
            ctx.direct, ctx.config = direct, config
            ctx.set_materialize_grads(False)
            constants = rule.constants(results, config)
            if constants:
                ctx.mark_non_differentiable(*constants)
                return *outputs, *constants
            return outputs[0] if len(outputs) == 1 else outputs

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
            needs = ctx.needs_input_grad[2:]
            return (None, None, *differentiate(ctx.direct, grads[:n_grads], ctx.saved_tensors, ctx.config, needs))

    class Functorch(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(config: tuple, *tensors: Any) -> tuple:
            return rule.forward(False, tensors, config)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            ctx.config = inputs[0]
            ctx.save_for_backward(*rule.saved(inputs[1:], output, ctx.config))
            carries = rule.outputs(output, ctx.config)
            ctx.mark_non_differentiable(*(o for o in output if o is not None and not any(o is c for c in carries)))
            ctx.slots = [i for i, o in enumerate(output) if any(o is c for c in carries)]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
            carried = tuple(grads[i] for i in ctx.slots)
            needs = ctx.needs_input_grad[1:]
            return (None, *differentiate(False, carried, ctx.saved_tensors, ctx.config, needs))

    for cls, kind in ((Direct, "Direct"), (Plain, ""), (Functorch, "Functorch"), (Backward, "Backward")):
        cls.__name__ = cls.__qualname__ = f"{rule.name}{kind}Function"
        node = getattr(cls, "_backward_cls", cls)  # what grad_fn shows
        node.__name__ = node.__qualname__ = f"{rule.name}{kind}FunctionBackward"
    # Function.apply without its look at torch.func, which the caller of `direct` has ruled out.
    return super(torch.autograd.Function, Direct).apply, Plain.apply, Functorch.apply
