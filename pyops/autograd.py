"""One description of an operation, three autograd Functions.

A :class:`Rule` says what an operation computes, what it saves and how its gradients come about. From it are made

* ``plain``: ctx-style, for eager calls and for torch.compile and torch.export (Dynamo traces it; it is the cheapest);
* ``functorch``: with ``setup_context`` and a generated vmap rule, over the registered operators, for torch.func;
* ``backward``: the gradients as a Function of their own, used under ``create_graph`` and torch.func, whose backward is
  the vjp of the rule's differentiable formula. That gives gradients of every order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import backend

Tensors = Sequence[torch.Tensor | None]


class Rule:
    """What an operation is: tensors (or None), and plain values in ``config``, with which its schema ends.

    ``direct`` chooses between the backend itself and the registered operator.
    """

    name: str
    n_saved: int
    n_grads: int

    @staticmethod
    def forward(direct: bool, tensors: Tensors, config: tuple) -> tuple:
        """Runs the leaf; every result, a tuple of tensors or None."""
        raise NotImplementedError

    @staticmethod
    def outputs(results: tuple, config: tuple) -> tuple:
        """The results that carry a gradient."""
        raise NotImplementedError

    @staticmethod
    def saved(tensors: Tensors, results: tuple, config: tuple) -> tuple:
        """What backward reads: ``n_saved`` tensors or None."""
        raise NotImplementedError

    @staticmethod
    def backward(direct: bool, grads: Tensors, saved: Tensors, config: tuple, needs: Sequence[bool]) -> tuple:
        """Runs the backward leaf; a gradient (or None) for each tensor, from ``n_grads`` incoming ones."""
        raise NotImplementedError

    @staticmethod
    def backward_common(grads: Tensors, saved: Tensors, config: tuple, needs: Sequence[bool]) -> tuple | None:
        """Everything that ``plain`` returns from backward, for the call that most calls are; None for any other."""
        raise NotImplementedError

    @staticmethod
    def formula(grads: Tensors, saved: Tensors, config: tuple, needs: Sequence[bool]) -> tuple:
        """The same gradients in differentiable torch operators."""
        raise NotImplementedError


def make(rule: type[Rule]) -> tuple[type, type]:
    """The (plain, functorch) Functions of a rule.

    ``plain.apply(done, direct, config, *tensors)``, where ``done`` is None, or the outputs and the saved tensors of a
    forward that has run already; its backward then tries ``backward_common`` first.
    ``functorch.apply(config, *tensors)``.
    """
    n_saved, n_grads = rule.n_saved, rule.n_grads

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple:
            grads, saved = args[:n_grads], args[n_grads : n_grads + n_saved]
            config, needs = args[-2], args[-1]
            return rule.backward(backend.is_plain(*grads, *saved), grads, saved, config, needs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            ctx.save_for_backward(*inputs[:-2])
            ctx.config, ctx.needs = inputs[-2:]
            ctx.present = [o is not None for o in output]
            ctx.set_materialize_grads(True)

        @staticmethod
        def backward(ctx: Any, *grads_of_grads: torch.Tensor | None) -> tuple:
            inputs = ctx.saved_tensors
            at = [i for i, t in enumerate(inputs) if t is not None and t.is_floating_point()]

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

    def differentiate(ctx: Any, grads: tuple, needs: Sequence[bool]) -> tuple:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling():
            return Backward.apply(*grads, *saved, ctx.config, tuple(needs))
        # Asked again: batched gradients and compiled autograd bring other tensors than forward saw. What was saved was
        # plain then, and its type tells whether a hook has put something else in its place.
        direct = ctx.direct and backend.is_plain(*grads) and type(saved[0]) in backend.PLAIN_TYPES
        return rule.backward(direct, grads, saved, ctx.config, needs)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, done: tuple | None, direct: bool, config: tuple, *tensors: Any) -> Any:
            if done is None:
                results = rule.forward(direct, tensors, config)
                done = rule.outputs(results, config), rule.saved(tensors, results, config)
                ctx.common = False
            else:
                ctx.common = True
            outputs, saved = done
            ctx.save_for_backward(*saved)
            ctx.direct, ctx.config = direct, config
            ctx.set_materialize_grads(False)
            return outputs[0] if len(outputs) == 1 else outputs

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
            if ctx.common and not torch.is_grad_enabled():
                found = rule.backward_common(grads, ctx.saved_tensors, ctx.config, ctx.needs_input_grad)
                if found is not None:
                    return found
            grads = grads + (None,) * (n_grads - len(grads))
            return (None, None, None, *differentiate(ctx, grads, ctx.needs_input_grad[3:]))

    class Functorch(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(config: tuple, *tensors: Any) -> tuple:
            return rule.forward(False, tensors, config)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            ctx.direct, ctx.config = False, inputs[0]
            ctx.save_for_backward(*rule.saved(inputs[1:], output, ctx.config))
            carries = rule.outputs(output, ctx.config)
            ctx.mark_non_differentiable(*(o for o in output if o is not None and not any(o is c for c in carries)))
            ctx.slots = [i for i, o in enumerate(output) if any(o is c for c in carries)]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
            carried = tuple(grads[i] for i in ctx.slots)
            carried += (None,) * (n_grads - len(carried))
            return (None, *differentiate(ctx, carried, ctx.needs_input_grad[1:]))

    for cls, kind in ((Plain, ""), (Functorch, "Functorch"), (Backward, "Backward")):
        cls.__name__ = cls.__qualname__ = f"{rule.name}{kind}Function"
    return Plain, Functorch
