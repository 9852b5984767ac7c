"""Who is measured. A peer is a class with one method per function it can serve: `layer_norm(case)` returns a callable
of the case's inputs, or None where it cannot serve that case. Adding a peer is adding a class to PEERS."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .case import Case, Provider


class Peer:
    """Base: a peer on any device, without functions."""

    name = ""
    devices = ("cpu", "cuda")
    package = ""  # must be importable

    def unavailable(self, device: str) -> str:
        """Why it cannot run at all, or an empty string."""
        if device not in self.devices:
            return f"not for {device}"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return ""

    def provide(self, case: Case) -> Callable | None:
        method = getattr(self, case.function, None)
        return method(case) if method else None


class Eager(Peer):
    name = "torch"

    def provide(self, case: Case) -> Callable:
        return case.eager


class Compile(Peer):
    """The definition through torch.compile, compiled anew for each case."""

    name = "compile"
    options: dict = {}

    def provide(self, case: Case) -> Callable | None:
        if case.params.get("steps", 0) > 20:  # it unrolls the steps: minutes for a case
            return None
        return torch.compile(case.eager, dynamic=False, **self.options)


class CompileMaxAutotune(Compile):
    name = "compile max-autotune"
    devices = ("cuda",)
    options = {"mode": "max-autotune-no-cudagraphs"}


class TorchCells(Peer):
    """A loop of torch's own cells, as it is written where a step needs more than nn.LSTM offers."""

    name = "torch cells"

    def lstm(self, case: Case) -> Callable | None:
        if case.params["packed"] or case.params["proj"]:
            return None

        def run(x, w_ih, w_hh, b_ih, b_hh, h0, c0):
            h, c, ys = h0[0], c0[0], []
            for step in x.unbind(0):
                h, c = torch.lstm_cell(step, (h, c), w_ih, w_hh, b_ih, b_hh)
                ys.append(h)
            return torch.stack(ys), h[None], c[None]

        return run

    def _one_state(self, case: Case, cell: Callable) -> Callable | None:
        if case.params["packed"]:
            return None

        def run(x, w_ih, w_hh, b_ih, b_hh, h0):
            h, ys = h0[0], []
            for step in x.unbind(0):
                h = cell(step, h, w_ih, w_hh, b_ih, b_hh)
                ys.append(h)
            return torch.stack(ys), h[None]

        return run

    def gru(self, case: Case) -> Callable | None:
        return self._one_state(case, torch.gru_cell)

    def rnn(self, case: Case) -> Callable | None:
        return self._one_state(case, torch.rnn_tanh_cell)


class SdpaMath(Peer):
    """One of the kernels behind F.scaled_dot_product_attention, which chooses by itself otherwise."""

    name = "sdpa math"
    kernel = "MATH"

    def attention(self, case: Case) -> Callable:
        kernel = getattr(SDPBackend, self.kernel)

        def run(*args):
            with sdpa_kernel(kernel):
                return case.eager(*args)

        return run


class SdpaFlash(SdpaMath):
    name = "sdpa flash"
    kernel = "FLASH_ATTENTION"


class SdpaEfficient(SdpaMath):
    name = "sdpa mem-efficient"
    devices = ("cuda",)
    kernel = "EFFICIENT_ATTENTION"


class SdpaCudnn(SdpaMath):
    name = "sdpa cudnn"
    devices = ("cuda",)
    kernel = "CUDNN_ATTENTION"


class Liger(Peer):
    """Liger-Kernel (Triton). `in_place=False`: its default overwrites the incoming gradient."""

    name = "liger"
    devices = ("cuda",)
    package = "liger_kernel"

    def layer_norm(self, case: Case) -> Callable | None:
        from liger_kernel.ops import LigerLayerNormFunction

        if case.dtype == torch.float64:
            return None
        eps = case.params["eps"]
        return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, eps)

    def rms_norm(self, case: Case) -> Callable | None:
        from liger_kernel.ops import LigerRMSNormFunction

        if case.dtype == torch.float64:
            return None
        eps = case.params["eps"]
        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


class Quack(Peer):
    """quack (CuTe DSL). Its LayerNorm has no autograd and takes float32 parameters only, so it is wrapped here and
    serves float32 cases; its RMSNorm serves all."""

    name = "quack"
    devices = ("cuda",)
    package = "quack"

    def layer_norm(self, case: Case) -> Callable | None:
        from quack.rmsnorm import layernorm_bwd, layernorm_fwd

        if case.dtype != torch.float32:
            return None
        eps = case.params["eps"]

        class LayerNorm(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, bias):
                y, rstd, mean = layernorm_fwd(x, weight, bias, eps, return_rstd=True, return_mean=True)
                ctx.save_for_backward(x, weight, rstd, mean)
                return y

            @staticmethod
            def backward(ctx, dy):
                x, weight, rstd, mean = ctx.saved_tensors
                return layernorm_bwd(x, weight, dy, rstd, mean)

        def layer_norm(x, weight, bias):
            if torch.is_grad_enabled():
                return LayerNorm.apply(x, weight, bias)
            return layernorm_fwd(x, weight, bias, eps)

        return layer_norm

    def rms_norm(self, case: Case) -> Callable | None:
        from quack import rmsnorm

        if case.dtype == torch.float64:
            return None
        eps = case.params["eps"]
        return lambda x, weight: rmsnorm(x, weight, eps=eps)


PEERS = (Eager, Compile, CompileMaxAutotune, TorchCells, SdpaMath, SdpaFlash, SdpaEfficient, SdpaCudnn, Liger, Quack)
OURS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def peers(device: str) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run on `device`, and for each other one the reason why not."""
    every = [peer() for peer in PEERS]
    reasons = {peer.name: peer.unavailable(device) for peer in every}
    return [p for p in every if not reasons[p.name]], {name: why for name, why in reasons.items() if why}


def providers(case: Case, usable_peers: list[Peer], backends: list[str]) -> list[Provider]:
    """Fresh providers for one case. Dynamo forgets earlier cases, so that no recompile limit is ever reached."""
    torch._dynamo.reset()
    found = [Provider(f"pyops {backend}", case.ours(backend), ours=True) for backend in backends]
    for peer in usable_peers:
        fn = peer.provide(case)
        if fn is not None:
            found.append(Provider(peer.name, fn))
    return found
