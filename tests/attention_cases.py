"""One call of an attention function as data: its inputs, our results, torch's own results and the float64 ones.

The float64 results come from a formula of this file's own, written for clarity; it shares nothing with the definition
in pyops/attention.py but the dropout mask.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import Tensor

import pyops
from pyops import attention
from pyops.philox import draw_seed, keep_mask

if TYPE_CHECKING:
    from conftest import Target

SEED = 11  # of torch's generator when a call draws its dropout mask
_SHORT = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

# The CUDA kernels, run by the SIMT executor, have the limits that they have on a GPU.
attention.LIMITS["simt"] = attention.LIMITS["cuda"]
attention.NEEDS_ALIGNED_ROWS.add("simt")


@dataclass(frozen=True)
class Case:
    """A call. Its text names what differs from the default."""

    shape: tuple[int, int, int, int] = (2, 2, 17, 16)  # of query: B, Hq, L, E
    S: int = 23
    Hk: int | None = None  # key heads, where fewer than Hq
    Ev: int | None = None  # where it differs from E
    dtype: torch.dtype = torch.float32
    mask: str = ""  # "bool", "bias" (dtype of query) or "float" (float32)
    mask_dims: str = "ls"  # those of b, h, l, s that are not broadcast
    is_causal: bool = False
    causal: str = "top-left"
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    alibi: str = ""  # the dimensions of the slopes: "h" or "bh"
    sinks: bool = False
    p: float = 0.0
    scale: float | None = None
    lse: bool = False
    layout: str = "dense"
    lengths: tuple[tuple[int, int], ...] = ()  # of queries and keys: packed sequences. shape then gives Hq and E

    def __str__(self) -> str:
        named = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        named = {"shape": self.shape, "S": self.S, "dtype": self.dtype} | named
        if self.lengths:
            del named["S"]
        return ", ".join(f"{name}={_SHORT.get(value, value)}" for name, value in named.items())

    @property
    def sizes(self) -> dict[str, int]:
        """B, H, L and S of the scores, by letter."""
        B, H, L, _ = self.shape
        if self.lengths:
            longest = [max(n) for n in zip(*self.lengths)]
            return {"b": len(self.lengths), "h": H, "l": longest[0], "s": longest[1]}
        return {"b": B, "h": H, "l": L, "s": self.S}

    def served_by(self, backend: str) -> bool:
        """Whether the kernels of a backend serve it; limits are refused loudly, which has tests of its own."""
        limit = attention.LIMITS.get(backend)
        E = self.shape[-1]
        q, v = (torch.empty(0, n, dtype=self.dtype) for n in (E, self.Ev or E))
        return limit is None or limit(q, q, v) is None


def on(backend: Target, cases: Iterable[Case]) -> list[Case]:
    """The cases that the backend serves. Triton's interpreter multiplies the raw bits of bfloat16."""
    raw = backend.name == "triton" and backend.device == "cpu"
    return [c for c in cases if c.served_by(backend.name) and not (raw and c.dtype == torch.bfloat16)]


def dtype_of(backend: Target) -> torch.dtype:
    """float32, or the dtype that the kernels of the backend have in its place."""
    return torch.float16 if backend.name in ("simt", "cuda") else torch.float32


def pairwise(seed: int = 0, **factors: Sequence[Any]) -> Iterator[Case]:
    """Calls in which every pair of values of any two factors occurs: greedily, the best of some random ones.

    A factor is a field of Case with its values, or has dicts of several fields for values.
    """
    generator = random.Random(seed)
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(factors[names[a]]))
        for j in range(len(factors[names[b]]))
    }

    def pairs(chosen: Sequence[int]) -> set[tuple[int, int, int, int]]:
        return {(a, chosen[a], b, chosen[b]) for a, b in itertools.combinations(range(len(names)), 2)}

    while missing:
        a, i, b, j = min(missing)
        candidates = []
        for _ in range(30):
            chosen = [generator.randrange(len(factors[name])) for name in names]
            chosen[a], chosen[b] = i, j
            candidates.append(chosen)
        best = max(candidates, key=lambda chosen: len(pairs(chosen) & missing))
        missing -= pairs(best)
        settings: dict[str, Any] = {}
        for name, n in zip(names, best):
            value = factors[name][n]
            settings |= value if isinstance(value, dict) else {name: value}
        yield valid(Case(**settings))


def valid(case: Case) -> Case:
    """The nearest call that has a meaning, and more than one key for a query: else its gradients are mere rounding."""
    if case.is_causal and case.window is not None and (case.window[1] or 0) > 0:
        case = replace(case, window=(case.window[0], None))
    if case.is_causal and case.shape[2] == 1 and not case.lengths:
        case = replace(case, causal="bottom-right")
    limited = case.window is not None and any(n is not None and n >= 0 for n in case.window)
    if case.causal == "bottom-right" and not (case.is_causal or limited or case.alibi):
        case = replace(case, causal="top-left")
    return case


# ---- inputs ----


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of t with other strides or another alignment; dimensions that share memory take the first values."""
    if layout == "dense":
        return t.clone(memory_format=torch.contiguous_format)
    if layout == "heads_last":  # as a projection leaves them: (B, L, H, E)
        return t.transpose(-2, -3).contiguous().transpose(-2, -3)
    if layout == "slices":  # one of three that lie side by side: (B, L, 3, H, E)
        last = t.transpose(-2, -3)
        buffer = t.new_full((*last.shape[:-2], 3, *last.shape[-2:]), torch.nan)
        return buffer[..., 1, :, :].copy_(last).transpose(-2, -3)
    if layout == "step":
        buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
        return buffer[..., ::2].copy_(t)
    if layout == "offset":  # dense, but one element past an aligned address, with rows of odd length
        buffer = t.new_full((t[..., 0].numel() * (t.shape[-1] + 1) + 1,), torch.nan)
        return buffer[1:].view(*t.shape[:-1], t.shape[-1] + 1)[..., :-1].copy_(t)
    if layout == "expanded":  # one batch entry and one head for all
        return t[:1, :1].clone().expand(t.shape)
    if layout == "features_first":  # (B, H, E, L)
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    raise ValueError(layout)


def inputs(case: Case, device: str) -> dict[str, Tensor]:
    """q, k, v, mask, sinks (leaves that want gradients), slopes, dout and dlse, the same on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    B, H, L, E = case.shape
    S, Hk, Ev = case.S, case.Hk or H, case.Ev or E
    if case.lengths:
        L, S = (sum(n) for n in zip(*case.lengths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def placed(values: Tensor) -> Tensor:
        values = values.to(device, case.dtype)
        return values if case.lengths and case.layout == "dense" else laid_out(values, case.layout)

    if case.lengths:
        t = {"q": placed(normal(L, H, E)), "k": placed(normal(S, Hk, E)), "v": placed(normal(S, Hk, Ev))}
        t["dout"], t["dlse"] = placed(normal(L, H, Ev)), normal(L, H)
    else:
        t = {"q": placed(normal(B, H, L, E)), "k": placed(normal(B, Hk, S, E)), "v": placed(normal(B, Hk, S, Ev))}
        t["dout"], t["dlse"] = placed(normal(B, H, L, Ev)), normal(B, H, L)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    t["dlse"] = t["dlse"].to(device, acc)
    if case.mask:
        t["mask"] = random_mask(case, generator).to(device)
    if case.sinks:
        t["sinks"] = normal(H).to(device, case.dtype)
    if case.alibi:
        shape = (case.sizes["b"], H) if case.alibi == "bh" else (H,)
        t["slopes"] = torch.rand(*shape, generator=generator).to(device)
    for name in ("q", "k", "v", "mask", "sinks"):
        if name in t and t[name].is_floating_point():
            t[name] = t[name].detach().requires_grad_()
    if not case.lse:
        del t["dlse"]
    return t


def random_mask(case: Case, generator: torch.Generator) -> Tensor:
    """bool: mostly True, with a fully masked row or two; floating: a bias, with some -inf."""
    shape = [n if d in case.mask_dims else 1 for d, n in case.sizes.items()]
    hidden = torch.rand(*shape, generator=generator) < 0.2
    if case.mask == "bool":
        mask = ~hidden
        if "s" in case.mask_dims:
            mask[0, 0, 0] = False
        return mask
    mask = torch.randn(*shape, generator=generator)
    mask[hidden] = -math.inf
    return mask.to(torch.float32 if case.mask == "float" else case.dtype)


# ---- our results ----


def options(case: Case) -> dict[str, Any]:
    """The keyword arguments that are no tensors."""
    return {
        "is_causal": case.is_causal, "causal": case.causal, "window": case.window, "softcap": case.softcap,
        "dropout_p": case.p, "scale": case.scale, "return_lse": case.lse, "enable_gqa": case.Hk is not None,
    }  # fmt: skip


def ends(case: Case, device: torch.device | str) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    queries, keys = ([0, *itertools.accumulate(n)] for n in zip(*case.lengths))
    cu = [torch.tensor(n, dtype=torch.int32, device=device) for n in (queries, keys)]
    return *cu, case.sizes["l"], case.sizes["s"]


def apply(case: Case, t: Mapping[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    """The outputs of the function under test; can be compiled, and takes its sizes from the tensors."""
    tensors = {"attn_mask": t.get("mask"), "alibi_slopes": t.get("slopes"), "sinks": t.get("sinks")}
    arguments = options(case) | tensors | {"backend": backend}
    if case.lengths:
        results = pyops.varlen_attention(t["q"], t["k"], t["v"], *ends(case, t["q"].device), **arguments)
    else:
        results = pyops.scaled_dot_product_attention(t["q"], t["k"], t["v"], **arguments)
    return dict(zip(("out", "lse"), results)) if case.lse else {"out": results}


def call(case: Case, t: Mapping[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    """The outputs of the function under test, with the dropout mask of SEED."""
    torch.manual_seed(SEED)
    return apply(case, t, backend)


def leaves_of(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: v for n, v in t.items() if v.requires_grad}


def with_gradients(outputs: dict[str, Tensor], t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    leaves = leaves_of(t)
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [t[f"d{n}"] for n in outputs])
    return {n: o.detach() for n, o in outputs.items()} | {f"d{n}": g for n, g in zip(leaves, found)}


def ours(case: Case, t: Mapping[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    """Outputs and gradients of the function under test."""
    return with_gradients(call(case, t, backend), t)


# ---- references ----


def formula(case: Case, t: Mapping[str, Tensor], keep: Tensor | None) -> dict[str, Tensor]:
    """out and lse of one batch without packing, in the arithmetic of its tensors."""
    q, k, v, mask = t["q"], t["k"], t["v"], t.get("mask")
    H, L, S = q.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if case.scale is None else case.scale)
    if case.softcap:
        s = case.softcap * (s / case.softcap).tanh()
    i, j = torch.arange(L, device=q.device)[:, None], torch.arange(S, device=q.device)
    ahead = j - i - (S - L if case.causal == "bottom-right" else 0)  # how far the key lies behind the diagonal
    left, right = case.window or (None, None)
    hidden = torch.zeros(L, S, dtype=torch.bool, device=q.device)
    if case.is_causal:
        hidden = hidden | (ahead > 0)
    if left is not None and left >= 0:
        hidden = hidden | (ahead < -left)
    if right is not None and right >= 0:
        hidden = hidden | (ahead > right)
    if "slopes" in t:
        slopes = t["slopes"].to(q.dtype)
        s = s - slopes.reshape(-1, H, 1, 1) * ahead.abs()
    top = None
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        hidden = hidden | (mask == -math.inf)
        top = (mask == math.inf) & ~hidden
        s = s + mask.masked_fill(mask.isinf(), 0).to(q.dtype)
    hidden = hidden.expand(s.shape)
    if top is not None:  # keys at +inf share their row
        top = top.expand(s.shape)
        topped = top.any(-1, keepdim=True)
        s = torch.where(topped, s - s.detach(), s)
        hidden = hidden | (topped & ~top)
    dead = hidden.all(-1, keepdim=True)
    s = s.masked_fill(hidden & ~dead, -math.inf).masked_fill(dead, 0)
    if "sinks" in t:
        sink = t["sinks"].to(q.dtype).reshape(-1, 1, 1).expand(*s.shape[:-1], 1)
        s = torch.cat([s.masked_fill(dead, -math.inf), sink], -1)
        p, lse = s.softmax(-1)[..., :-1], s.logsumexp(-1)
    else:
        p = s.softmax(-1) * ~dead
        lse = s.logsumexp(-1).masked_fill(dead[..., 0], -math.inf)
    if top is not None:
        lse = lse.masked_fill(topped[..., 0], math.inf)
    if keep is not None:
        p = p * keep * (1 / (1 - case.p) if case.p < 1 else 0.0)
    return {"out": p @ v, "lse": lse}


def dropout_mask(case: Case, q: Tensor) -> list[Tensor] | None:
    """The mask that every backend draws after torch.manual_seed(SEED), for each sequence (one, without packing)."""
    if case.p == 0:
        return None
    torch.manual_seed(SEED)
    seed = draw_seed(q.device)
    B, H, L, _ = case.shape
    if not case.lengths:
        return [keep_mask(seed, B * H * L, case.S, case.p).reshape(B, H, L, case.S)]
    start, masks = 0, []
    for queries, keys in case.lengths:
        rows = torch.arange(H, device=q.device)[:, None] * q.shape[0] + torch.arange(queries, device=q.device) + start
        masks.append(keep_mask(seed, rows, keys, case.p)[None])
        start += queries
    return masks


def sequences(case: Case, t: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each packed sequence, as a batch of one."""
    ends = [0, 0]
    for b, lengths in enumerate(case.lengths):
        (q0, k0), ends = ends, [n + m for n, m in zip(ends, lengths)]
        one = {n: t[n][a:e].transpose(0, 1)[None] for n, a, e in
               (("q", q0, ends[0]), ("k", k0, ends[1]), ("v", k0, ends[1]))}  # fmt: skip
        if "mask" in t:
            mask = t["mask"][b : b + 1] if "b" in case.mask_dims else t["mask"]
            mask = mask[:, :, : lengths[0]] if "l" in case.mask_dims else mask
            one["mask"] = mask[..., : lengths[1]] if "s" in case.mask_dims else mask
        if "slopes" in t:
            one["slopes"] = t["slopes"][b] if case.alibi == "bh" else t["slopes"]
        if "sinks" in t:
            one["sinks"] = t["sinks"]
        yield one


def in_math(case: Case, t: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The formula computed in ``dtype``, and its gradients."""
    leaves = {n: v.detach().requires_grad_() for n, v in leaves_of(t).items()}
    used = {n: v.to(dtype) if v.is_floating_point() else v for n, v in (dict(t) | leaves).items()}
    keep = dropout_mask(case, t["q"])
    if case.lengths:
        parts = [formula(case, one, None if keep is None else keep[b]) for b, one in enumerate(sequences(case, used))]
        outputs = {n: torch.cat([p[n][0].transpose(0, 1) for p in parts]) for n in ("out", "lse")}
    else:
        outputs = formula(case, used, None if keep is None else keep[0])
    if dtype.itemsize == 2:
        outputs["lse"] = outputs["lse"].float()
    outputs = {n: o for n, o in outputs.items() if n == "out" or case.lse}
    incoming = {f"d{n}": t[f"d{n}"].to(o.dtype) for n, o in outputs.items()}
    results = with_gradients(outputs, leaves | incoming)
    return results


def exact(case: Case, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float64 results, their gradients included."""
    wide = {n: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v
            for n, v in t.items()}  # fmt: skip
    return in_math(case, wide, torch.float64)


def torch_own(case: Case, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torch's results of the same dtype: its own operator, or the formula where that cannot express the call."""
    _, H, L, _ = case.shape
    if case.lengths or case.softcap or case.sinks or case.p or case.lse:
        results = in_math(case, t, case.dtype)
        if case.lse and case.dtype.itemsize == 2:  # which is never rounded to 16 bits
            results["lse"] = in_math(case, t, torch.float32)["lse"]
        return results
    leaves = {n: v.detach().requires_grad_() for n, v in leaves_of(t).items()}
    all_t = dict(t) | leaves
    mask = all_t.get("mask")
    is_causal = case.is_causal
    left, right = case.window or (None, None)
    if case.window or case.alibi or (is_causal and (mask is not None or case.causal == "bottom-right")):
        i, j = torch.arange(L, device=t["q"].device)[:, None], torch.arange(case.S, device=t["q"].device)
        ahead = j - i - (case.S - L if case.causal == "bottom-right" else 0)
        seen = torch.ones(L, case.S, dtype=torch.bool, device=t["q"].device)
        if is_causal:
            seen = seen & (ahead <= 0)
        if left is not None and left >= 0:
            seen = seen & (ahead >= -left)
        if right is not None and right >= 0:
            seen = seen & (ahead <= right)
        is_causal = False
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        if case.alibi or (mask is not None and mask.dtype != torch.bool):
            bias = torch.zeros((), dtype=torch.float32, device=t["q"].device)
            if case.alibi:
                bias = bias - t["slopes"].reshape(-1, H, 1, 1) * ahead.abs()
            if mask is not None and mask.dtype != torch.bool:
                bias = bias + mask
            mask = bias.masked_fill(~seen, -math.inf)
        else:
            mask = seen
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(case.dtype)
    out = F.scaled_dot_product_attention(
        all_t["q"], all_t["k"], all_t["v"], mask, is_causal=is_causal, scale=case.scale, enable_gqa=case.Hk is not None
    )
    return with_gradients({"out": out}, leaves | {"dout": t["dout"]})


def judge(oracle: Oracle, case: Case, backend: Target) -> None:
    """Outputs and every gradient of a case."""
    t = inputs(case, backend.device)
    check(oracle, case, t, ours(case, t, backend.name))


def check(
    oracle: Oracle, case: Case, t: Mapping[str, Tensor], results: Mapping[str, Tensor], *, cancelled: bool = False
) -> None:
    """Results of a case, given or computed in other ways.

    ``cancelled``: the gradients that pass through the softmax are judged by the size of their terms, for cases of
    chance, in which those may cancel. Where a query sees one key they always do, and rounding is what is left. The
    gradients of sinks always are: each is a sum over all rows, and of a few heads none may be large.
    """
    theirs, wide = torch_own(case, t), exact(case, t)
    scales = {}
    largest = {n: t[n].detach().abs().max().item() if t[n].numel() else 0.0 for n in ("q", "k", "v", "dout")}
    term = largest["dout"] * largest["v"] * math.sqrt(t["v"].shape[-1]) / 4
    factors = {"dq": largest["k"], "dk": largest["q"], "dmask": 1.0, "dsinks": 1.0}
    for name in wide.keys() & factors.keys():
        size, found = term * factors[name], wide[name].abs().max().item() if wide[name].numel() else 0.0
        if size > 0 and found < (size if cancelled or name == "dsinks" else 1e-6 * size):
            scales[name] = size
    if "dmask" in wide and results["dmask"].dtype == theirs["dmask"].dtype:
        # Formed from the result, which is rounded to the dtype of query.
        results, theirs = ({**r, "dmask": r["dmask"].to(case.dtype)} for r in (results, theirs))
    oracle.check_all(case, results, theirs, wide, scales)
