"""One call of a LayerNorm function as data: its inputs, our results, torch's own results and the float64 ones."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import Tensor

import pyops
from pyops.philox import draw_seed, keep_mask

SEED = 11  # of torch's generator when a call draws its dropout mask
_SHORT = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Case:
    """A call. Its text names what differs from the default."""

    op: str = "layer_norm"
    shape: tuple[int, ...] = (5, 33)
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None  # where it differs from dtype
    dims: int = 1
    affine: str = "wb"  # which of weight and bias there are
    zero_centred: bool = False
    memory_efficient: bool = False
    p: float = 0.0
    eps: float = 1e-5
    layout: str = "dense"

    def __str__(self) -> str:
        named = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        named |= {"shape": self.shape, "dtype": self.dtype, "op": self.op}
        del named["op"]
        text = ", ".join(f"{name}={_SHORT.get(value, value)}" for name, value in named.items())
        return f"{self.op}({text})"

    @property
    def features(self) -> tuple[int, ...]:
        """Shape of weight and bias."""
        return (self.shape[-3],) if self.op == "layer_norm2d" else self.shape[len(self.shape) - self.dims :]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of t with other strides or another alignment; rows that share memory take values of the first ones."""
    if layout == "dense" or t.dim() == 0:
        return t.clone()
    if layout == "rows":  # dense features, rows further apart
        buffer = t.new_full((*t.shape[:-1], t.shape[-1] + 3), torch.nan)
        return buffer[..., : t.shape[-1]].copy_(t)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "batch_second":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "step":
        buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
        return buffer[..., ::2].copy_(t)
    if layout == "offset":  # dense, but one element past an aligned address
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
    if layout == "expanded":
        return t[:1].clone().expand(t.shape)
    if layout == "overlapping":  # row i starts at element i of one buffer
        return (
            t.new_empty(t.shape[0] + t.shape[-1] - 1)
            .copy_(t.flatten()[: t.shape[0] + t.shape[-1] - 1])
            .unfold(0, t.shape[-1], 1)
        )
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    raise ValueError(layout)


def spread(case: Case, values: Tensor) -> Tensor:
    """Up to four features are kept apart: rows of nearly equal ones are so ill-conditioned that the rounding of the
    mean decides, and who comes closer is luck."""
    count = torch.Size(case.features).numel()
    if count > 4:
        return values
    steps = 4 * torch.arange(count, dtype=values.dtype, device=values.device)
    return values / 4 + steps.reshape((-1, 1, 1) if case.op == "layer_norm2d" else case.features)


def inputs(case: Case, device: str) -> dict[str, Tensor]:
    """x, residual, weight, bias (leaves that want gradients), dy and dsum, the same on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def normal(shape: Iterable[int]) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def placed(values: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
        return laid_out(values.to(device, dtype), layout)

    param = case.param_dtype or case.dtype
    flat = case.layout if case.layout in ("transposed", "step", "offset") else "dense"
    t = {"x": placed(spread(case, normal(case.shape) * 2 + 0.5), case.dtype, case.layout)}
    if case.op == "add_layer_norm":
        t["residual"] = placed(spread(case, normal(case.shape)), case.dtype, case.layout)
    if "w" in case.affine:
        weight = normal(case.features)
        if case.memory_efficient:  # x is divided by it
            weight = weight.tanh() / 2 + (0.0 if case.zero_centred else 1.0)
        t["weight"] = placed(weight, param, flat)
    if "b" in case.affine:
        t["bias"] = placed(normal(case.features), param, flat)
    t = {name: value.detach().requires_grad_() for name, value in t.items()}
    t["dy"] = placed(normal(case.shape), case.dtype, case.layout)
    if case.op == "add_layer_norm":
        t["dsum"] = placed(normal(case.shape), case.dtype, case.layout)
    return t


def call(case: Case, t: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    """The outputs of the function under test, with the dropout mask of SEED."""
    torch.manual_seed(SEED)
    return apply(case, t, backend)


def apply(case: Case, t: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    """The outputs of the function under test; can be compiled, and takes its sizes from x."""
    x, weight, bias = t["x"], t.get("weight"), t.get("bias")
    options = {"zero_centred": case.zero_centred, "backend": backend}
    if case.op == "add_layer_norm":
        y, total = pyops.add_layer_norm(x, t["residual"], weight, bias, p=case.p, eps=case.eps, **options)
        return {"y": y, "sum": total}
    options["memory_efficient"] = case.memory_efficient
    if case.op == "layer_norm2d":
        return {"y": pyops.layer_norm2d(x, weight, bias, case.eps, **options)}
    shape = tuple(x.shape[x.dim() - case.dims :])
    if case.op == "rms_norm":
        return {"y": pyops.rms_norm(x, shape, weight, case.eps, **options)}
    return {"y": pyops.layer_norm(x, shape, weight, bias, case.eps, **options)}


def with_gradients(outputs: dict[str, Tensor], t: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, and the gradients of every leaf as d<name>."""
    leaves = {name: value for name, value in t.items() if value.requires_grad}
    used = {name: o for name, o in outputs.items() if o.requires_grad}
    gradients = torch.autograd.grad(list(used.values()), list(leaves.values()), [t[f"d{name}"] for name in used])
    named = {f"d{name}": g for name, g in zip(leaves, gradients)}
    return {name: o.detach() for name, o in outputs.items()} | named


def dropout_mask(case: Case, device: torch.device) -> Tensor:
    """True where the call keeps an element of x."""
    torch.manual_seed(SEED)
    C = case.shape[-1]
    return keep_mask(draw_seed(device), torch.Size(case.shape).numel() // C, C, case.p).reshape(case.shape)


def torch_outputs(case: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same outputs from torch's own operators, in the dtypes of t.

    Where torch has no such operator (parameters of another dtype, 1 + weight in 16 bits), it is torch's float32
    operator, rounded once.
    """
    x, weight, bias = t["x"], t.get("weight"), t.get("bias")
    dtype = x.dtype
    outputs = {}
    if case.op == "add_layer_norm":
        if case.p > 0:
            scale = 1 / (1 - case.p) if case.p < 1 else 0.0
            x = torch.where(dropout_mask(case, x.device), x * scale, torch.zeros_like(x))
        outputs["sum"] = x = x + t["residual"]
    wide = dtype.itemsize == 2 and ((case.param_dtype or case.dtype) != case.dtype or case.zero_centred)
    if wide:
        x, weight, bias = (None if v is None else v.float() for v in (x, weight, bias))
    if weight is not None and case.zero_centred:
        weight = 1 + weight
    if case.op == "rms_norm":
        y = F.rms_norm(x, case.features, weight, case.eps)
    elif case.op == "layer_norm2d":
        y = F.layer_norm(x.movedim(-3, -1), case.features, weight, bias, case.eps).movedim(-1, -3)
    else:
        y = F.layer_norm(x, case.features, weight, bias, case.eps)
    return {"y": y.to(dtype)} | outputs


def torch_from_output(case: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients in torch operators that, like memory_efficient, know only the rounded y."""
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    over = -3 if case.op == "layer_norm2d" else tuple(range(-case.dims, 0))
    y = torch_outputs(case, t)["y"].detach()
    x, dy = t["x"].detach().to(wide), t["dy"].to(wide)

    def parameter(name: str, default: float) -> Tensor:
        missing = torch.full(case.features, default, dtype=wide, device=y.device)
        value = t[name].detach().to(wide) if name in t else missing
        return value[:, None, None] if case.op == "layer_norm2d" else value

    weight, bias = parameter("weight", 0.0 if case.zero_centred else 1.0) + case.zero_centred, parameter("bias", 0.0)
    second = x.square().mean(over, True) if case.op == "rms_norm" else x.var(over, correction=0, keepdim=True)
    rstd = torch.rsqrt(second + case.eps)
    xhat = (y.to(wide) - bias) / weight
    g = dy * weight
    mean_g = 0.0 if case.op == "rms_norm" else g.mean(over, True)
    results = {"y": y, "dx": (rstd * (g - mean_g - xhat * (g * xhat).mean(over, True))).to(case.dtype)}
    param = case.param_dtype or case.dtype
    for name, terms in (("weight", dy * xhat), ("bias", dy)):
        if name in t:
            terms = terms.movedim(-3, -1) if case.op == "layer_norm2d" else terms
            results[f"d{name}"] = terms.sum(tuple(range(terms.dim() - len(case.features)))).to(param)
    return results


def ours(case: Case, t: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    return with_gradients(call(case, t, backend), t)


def torch_own(case: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """What torch itself reaches in these dtypes."""
    if case.memory_efficient:
        return torch_from_output(case, t)
    return with_gradients(torch_outputs(case, t), t)


def exact_outputs(case: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs written out: no operator of torch's or ours that could share a mistake."""
    outputs = {}
    h = t["x"]
    if case.op == "add_layer_norm":
        if case.p > 0:
            h = h * dropout_mask(case, h.device) * (1 / (1 - case.p) if case.p < 1 else 0.0)
        outputs["sum"] = h = h + t["residual"]
    if case.op == "layer_norm2d":
        h = h.movedim(-3, -1)
    over = tuple(range(-case.dims, 0))
    centred = h if case.op == "rms_norm" else h - h.mean(over, keepdim=True)
    y = centred / (centred.square().mean(over, keepdim=True) + case.eps).sqrt()
    if "weight" in t:
        y = y * (t["weight"] + 1 if case.zero_centred else t["weight"])
    if "bias" in t:
        y = y + t["bias"]
    return {"y": y.movedim(-1, -3) if case.op == "layer_norm2d" else y} | outputs


def exact(case: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float64 results for the same (rounded) inputs."""
    wide = {n: v.detach().to(torch.float64, memory_format=torch.contiguous_format) for n, v in t.items()}
    for name in wide:
        wide[name].requires_grad_(t[name].requires_grad)
    return with_gradients(exact_outputs(case, wide), wide)


def scales(case: Case, t: dict[str, Tensor]) -> dict[str, float]:
    """Units for the gradients of one or two features, whose largest element may be 0.

    There xhat is 0 or +-1 whatever x is, so dx vanishes by construction and float64 shows its own rounding; and a
    single sum over the rows may happen to cancel. Their terms are the measure.
    """
    if torch.Size(case.features).numel() > 2 or not t["x"].numel():
        return {}
    x, dy = t["x"].detach().double(), t["dy"].double()
    if case.op == "add_layer_norm":
        x = x + t["residual"].detach().double()
    over = -3 if case.op == "layer_norm2d" else tuple(range(-case.dims, 0))
    second = x.square().mean(over) if case.op == "rms_norm" else x.var(over, correction=0)
    weight = t["weight"].detach().double().abs().max() + case.zero_centred if "weight" in t else 1.0
    dh = (torch.rsqrt(second + case.eps).max() * weight * dy.abs().max()).item()
    total = dy.norm().item()
    return {"dx": dh, "dresidual": dh, "dweight": total, "dbias": total}


def judge(oracle: Oracle, case: Case, target: Any) -> None:
    """Outputs and every gradient of one call against the tolerance rule."""
    t = inputs(case, target.device)
    oracle.check_all(case, ours(case, t, target.name), torch_own(case, t), exact(case, t), scales(case, t))
