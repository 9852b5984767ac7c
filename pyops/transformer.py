"""Modules built of several operations: multi-head attention and the layers of the Transformer.

Vaswani et al., "Attention Is All You Need" (2017); Xiong et al., "On Layer Normalization in the Transformer
Architecture" (2020) for ``norm_first``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import held_bias, scaled_dot_product_attention, varlen_attention
from .backend import without_autocast
from .layer_norm import LayerNorm, add_layer_norm

_has_global_hooks = nn.modules.module._has_any_global_hook


# ---- validation ----


def _fail(argument: str, rule: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"MultiheadAttention: {argument} must {rule}, got {got}")


def _check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        _fail(name, "be bool or floating-point", mask.dtype, TypeError)
    if tuple(mask.shape) not in shapes:
        _fail(name, f"have shape {' or '.join(map(str, shapes))}", tuple(mask.shape))


def _check(inputs: Sequence[Tensor], features: Sequence[int], num_heads: int, batch_first: bool,
           key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:  # fmt: skip
    """Raises unless the call has a meaning. ``features``: those of query, key and value."""
    query, key, value = inputs
    dims = query.dim()
    if dims not in (2, 3):
        _fail("query", "have 3 dimensions, or 2 without a batch", f"shape {tuple(query.shape)}")
    for name, t, size in zip(("query", "key", "value"), inputs, features):
        if t.dim() != dims:
            _fail(name, f"have {dims} dimensions like query", f"shape {tuple(t.shape)}")
        if t.shape[-1] != size:
            _fail(name, f"have {size} features", f"shape {tuple(t.shape)}")
    if value.shape[:-1] != key.shape[:-1]:
        _fail("value", f"have the length and batch of key, {tuple(key.shape[:-1])}", tuple(value.shape[:-1]))
    if dims == 2:
        B, L, S = 1, query.shape[0], key.shape[0]
    else:
        (B, L), (keys, S) = (t.shape[:2] if batch_first else t.shape[1::-1] for t in (query, key))
        if keys != B:
            _fail("key", f"have the batch size of query, {B}", f"shape {tuple(key.shape)}")
    _check_mask("key_padding_mask", key_padding_mask, (B, S) if dims == 3 else (S,))
    _check_mask("attn_mask", attn_mask, (L, S), (B * num_heads, L, S))


def _check_nested(inputs: Sequence[Tensor], features: Sequence[int], batch_first: bool, others: dict) -> None:
    for name, t, size in zip(("query", "key", "value"), inputs, features):
        if not t.is_nested or t.layout != torch.strided or t.dim() != 3:
            got = f"{'nested, ' * t.is_nested}{t.layout}, of {t.dim()} dimensions"
            _fail(name, "be nested, strided, and have 3 dimensions, where one of the inputs is nested", got, TypeError)
        if t.size(2) != size:
            _fail(name, f"have {size} features", t.size(2))
    if not batch_first:
        _fail("batch_first", "be True for nested inputs", batch_first)
    for name, value in others.items():
        if value is not None:
            _fail(name, "be None for nested inputs", "one")


# ---- multi-head attention ----


def _project(
    query: Tensor, key: Tensor, value: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, heads: tuple[int, int]
) -> tuple[Tensor, ...]:
    """q, k and v, (..., num_heads, head_dim): views of one product as far as the inputs are one tensor."""
    if len(weights) == 1:
        (weight,) = weights
        E = weight.shape[-1]
        if query is key and key is value:
            return F.linear(query, weight, bias).unflatten(-1, (3, *heads)).unbind(-3)
        if key is value:
            w_q, w_kv = weight.split([E, 2 * E])
            b_q, b_kv = (None, None) if bias is None else bias.split([E, 2 * E])
            k, v = F.linear(key, w_kv, b_kv).unflatten(-1, (2, *heads)).unbind(-3)
            return F.linear(query, w_q, b_q).unflatten(-1, heads), k, v
        weights = weight.split(E)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    q, k, v = (F.linear(t, w, b).unflatten(-1, heads) for t, w, b in zip((query, key, value), weights, biases))
    return q, k, v


def _merged(padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """One mask of scaled_dot_product_attention (True where a key is seen, or added to the scores) for the two of
    nn.MultiheadAttention (True where it is hidden, or added), as small as broadcasting allows."""
    if padding is None or mask is None:
        one = mask if padding is None else padding
        return one.logical_not() if one is not None and one.dtype == torch.bool else one
    if padding.dtype == mask.dtype == torch.bool:
        return (padding | mask).logical_not()
    if padding.dtype == torch.bool:
        return torch.where(padding, -math.inf, mask)
    if mask.dtype == torch.bool:
        return torch.where(mask, -math.inf, padding)
    # A key that one of them hides stays hidden, whatever the other says.
    return torch.where((padding == -math.inf) | (mask == -math.inf), -math.inf, padding + mask)


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The probabilities of scaled_dot_product_attention, in float32 (float64); 0 in a row without a visible key."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    with without_autocast(q.device):
        s = torch.matmul(q.to(acc) / math.sqrt(q.shape[-1]), k.to(acc).transpose(-2, -1))
    hidden = None
    if mask is not None and mask.dtype == torch.bool:
        hidden = mask.logical_not()
    elif mask is not None:
        bias, hidden = held_bias(mask.to(acc))
        s = s + bias
    if is_causal:
        above = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        hidden = above if hidden is None else hidden | above
    if hidden is None:
        return torch.softmax(s, -1)
    # A row of nothing but -inf would have a softmax of NaN, also in backward; its scores stay, its weights become 0.
    empty = hidden.all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(hidden & ~empty, -math.inf), -1).masked_fill(empty, 0.0)


def _undropped(v: Tensor, p: float) -> tuple[Tensor, float]:
    """Modules take p = 1, the functions do not: then nothing is left of the values."""
    return (v * 0.0, 0.0) if p == 1.0 else (v, p)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, is_causal: bool, weights: bool, backend: str | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of [B, H, L, D], and its weights."""
    if weights and p > 0.0:
        # They are what is multiplied. The fused function's dropout, repeated in torch operators, would take longer.
        dropped = F.dropout(_attention_weights(q, k, mask, is_causal), p)
        return torch.matmul(dropped.to(v.dtype), v), dropped
    v, p = _undropped(v, p)
    out = scaled_dot_product_attention(q, k, v, mask, p, is_causal, backend=backend)
    return out, _attention_weights(q, k, mask, is_causal) if weights else None


def _attend_rows(
    qkv: Sequence[Tensor], lengths: tuple[list[int], list[int]], p: float, weights: bool, backend: str | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of sequences packed as [T, H, D], and its weights, padded with 0 to [B, H, L, S]. ``lengths``: of the
    queries and of the keys."""
    L, S = (max(those, default=0) for those in lengths)
    if not weights:
        cu_q, cu_k = (
            torch.tensor([0, *itertools.accumulate(those)], dtype=torch.int32).to(qkv[0].device) for those in lengths
        )
        q, k, v = qkv
        v, p = _undropped(v, p)
        return varlen_attention(q, k, v, cu_q, cu_k, L, S, dropout_p=p, backend=backend), None
    outs, padded = [], []
    for one in zip(*(t.split(those) for t, those in zip(qkv, (*lengths, lengths[1])))):
        out, w = _attend(*(t.transpose(0, 1)[None] for t in one), None, p, False, True, backend)
        outs.append(out[0].transpose(0, 1))
        padded.append(F.pad(w, (0, S - w.shape[-1], 0, L - w.shape[-2])))
    return torch.cat(outs), torch.cat(padded)


def _rows(nested: Tensor) -> tuple[Tensor, list[int]]:
    """The sequences of a nested tensor one behind the other, and their lengths."""
    sequences = nested.unbind()
    return torch.cat(sequences), [len(sequence) for sequence in sequences]


def _nested(rows: Tensor, lengths: list[int]) -> Tensor:
    return torch.nested.as_nested_tensor(list(rows.split(lengths)))


def _multihead_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_proj_weights: tuple[Tensor, ...],
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
    add_zero_attn: bool,
    dropout_p: float,
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
    batch_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """The forward of :class:`MultiheadAttention` as a function of tensors, which torch.fx keeps as one node."""
    E = out_proj_weight.shape[0]
    heads = (num_heads, E // num_heads)
    inputs = (query, key, value)
    features = (E, *(w.shape[-1] for w in (in_proj_weights * 3)[1:3]))
    if is_causal and attn_mask is None:
        _fail("attn_mask", "be given beside is_causal=True, which only says that the mask is causal", None)
    if query.is_nested or key.is_nested or value.is_nested:
        others = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "add_bias_kv": bias_k}
        _check_nested(inputs, features, batch_first, others | {"add_zero_attn": add_zero_attn or None})
        packed = {id(t): _rows(t) for t in inputs}
        (query, lengths), (key, lengths_k), (value, lengths_v) = (packed[id(t)] for t in inputs)
        if lengths_v != lengths_k or len(lengths_k) != len(lengths):
            _fail("value", "have the lengths of key, and both the batch size of query", f"{lengths_v}, {lengths_k}")
        qkv = _project(query, key, value, in_proj_weights, in_proj_bias, heads)
        out, weights = _attend_rows(qkv, (lengths, lengths_k), dropout_p, need_weights, backend)
        out = _nested(F.linear(out.flatten(1), out_proj_weight, out_proj_bias), lengths)
        if weights is not None:
            weights = (weights.mean(1) if average_attn_weights else weights).to(query.dtype)
        return out, weights

    _check(inputs, features, num_heads, batch_first, key_padding_mask, attn_mask)
    q, k, v = _project(query, key, value, in_proj_weights, in_proj_bias, heads)
    batched = query.dim() == 3
    if not batched:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    elif not batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    B = q.shape[0]  # [B, L, H, D]
    padding = key_padding_mask
    if padding is not None:
        padding = (padding if batched else padding[None])[:, None, None]
    mask = attn_mask
    if mask is not None:
        mask = mask.unflatten(0, (B, num_heads)) if mask.dim() == 3 else mask[None, None]

    is_causal = is_causal and not need_weights  # as torch, which takes the hint only where the mask is of no other use
    appended = (bias_k is not None) + add_zero_attn
    if bias_k is not None:
        rows = (t.to(k.dtype).view(1, 1, *heads).expand(B, -1, -1, -1) for t in (bias_k, bias_v))
        k, v = (torch.cat(pair, 1) for pair in zip((k, v), rows))
    if add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (k, v))
    if appended:
        padding, mask = (None if t is None else F.pad(t, (0, appended)) for t in (padding, mask))
        # All queries see these keys in the mask, and none by the hint.
        is_causal = is_causal and padding is None
    mask = _merged(padding, None if is_causal else mask)

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, weights = _attend(q, k, v, mask, dropout_p, is_causal, need_weights, backend)
    out = out.transpose(1, 2).flatten(2)
    if not batched:
        out = out.squeeze(0)
    elif not batch_first:
        out = out.transpose(0, 1)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    if weights is not None:
        weights = (weights.mean(1) if average_attn_weights else weights).to(q.dtype)
        weights = weights if batched else weights.squeeze(0)
    return out, weights


# torch.fx then keeps a call as one node.
for _name in ("_multihead_attention", "add_layer_norm"):
    torch.fx.wrap(_name)


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on :func:`pyops.scaled_dot_product_attention`; same parameters and state_dict.

    Masks keep torch's meaning: True hides a key, numbers are added to the scores. They are merged only where both are
    given, and stay as small as broadcasting allows: a key_padding_mask is never spread over queries or heads. With
    is_causal, attn_mask is not read. With need_weights the result still comes from the fused function, and the weights
    are computed beside it; only with dropout as well, both are torch operators.

    Nested tensors: strided ones, in training too, also as the key and value of other queries.

    Args:
        backend: "eager", "cpu", "cuda" or "triton"; None chooses (see :func:`pyops.explain`). The others are torch's.

    Differs from torch.nn.MultiheadAttention: a query that sees no key gets an attention of 0 and zero gradients, with
    need_weights too, instead of NaN; one code path, so eval() computes what training does; is_causal without attn_mask
    always raises, and with a key_padding_mask the hint is taken too; errors are ValueError and
    TypeError; masks may be of two kinds; dropout without need_weights drops other elements than torch with the same
    seed.
    """

    # A class attribute, so that an nn.MultiheadAttention whose class is exchanged has it too.
    backend: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if backend is not None:
            self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if self._qkv_same_embed_dim:
            weights = (self.in_proj_weight,)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return _multihead_attention(
            query, key, value, weights, self.in_proj_bias, self.bias_k, self.bias_v,
            self.out_proj.weight, self.out_proj.bias, key_padding_mask, attn_mask,
            num_heads=self.num_heads, add_zero_attn=self.add_zero_attn,
            dropout_p=self.dropout if self.training else 0.0, need_weights=need_weights,
            average_attn_weights=average_attn_weights, is_causal=is_causal, batch_first=self.batch_first,
            backend=self.backend,
        )  # fmt: skip


# ---- the Transformer's layers ----


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooks or _has_global_hooks() or "forward" in module.__dict__)


def _add_norm(branch: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(total), total) of total = residual + dropout(branch): in one pass, or by the modules where one of them is
    not what it was built as, or has hooks that would see the difference."""
    p = 0.0
    if type(dropout) is nn.Dropout and _is_bare(dropout):
        p = dropout.p if dropout.training else 0.0
    else:
        branch = dropout(branch)
    if type(norm) is LayerNorm and _is_bare(norm) and len(norm.normalized_shape) == 1 and not norm.memory_efficient:
        results = add_layer_norm(
            branch, residual, norm.weight, norm.bias, p=p, eps=norm.eps, zero_centred=norm.zero_centred,
            keep_dtype=norm.keep_dtype, backend=norm.backend,
        )  # fmt: skip
        return results[0], results[1]
    total = residual + F.dropout(branch, p)
    return norm(total), total


def _adopt(layer: nn.Module, backend: str | None) -> None:
    """Gives the children of a new layer the classes of pyops."""
    for child in layer.children():
        for fused in (MultiheadAttention, LayerNorm):
            if type(child) is fused.__base__:
                child.__class__ = fused
                if backend is not None:
                    child.backend = backend


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on pyops; same arguments, parameters and state_dict.

        x = norm1(x + dropout1(self_attn(x)))        x = x + dropout1(self_attn(norm1(x)))     with norm_first
        x = norm2(x + dropout2(ff(x)))               x = x + dropout2(ff(norm2(x)))
        ff(x) = linear2(dropout(activation(linear1(x))))

    Dropout, addition and the normalisation that follows them are one pass (:func:`pyops.add_layer_norm`).

    Args:
        backend: as in :class:`MultiheadAttention`, for the layer's attention and norms. The others are torch's.

    Differs from torch.nn.TransformerEncoderLayer: no operator of its own in eval(), so the children are always called
    (an nn.TransformerEncoder around it may still make its input a nested tensor, which is served); attention differs as
    in :class:`MultiheadAttention`; dropout drops other elements with the same seed. ``_sa_block`` is not called.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        _adopt(self, backend)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=False,
                is_causal=is_causal,
            )[0]  # fmt: skip

        if not (isinstance(src, Tensor) and src.is_nested):
            return self._sublayers(src, attend)
        rows, lengths = _rows(src)
        return _nested(self._sublayers(rows, lambda x: _rows(attend(_nested(x, lengths)))[0]), lengths)

    def _sublayers(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            y, x = _add_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            return x + self._ff_block(y)
        x, _ = _add_norm(attend(x), x, self.dropout1, self.norm1)
        y = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return _add_norm(y, x, self.dropout2, self.norm2)[0]


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer on pyops; same arguments, parameters and state_dict.

        x = norm1(x + dropout1(self_attn(x)))                   with norm_first the norms stand inside the branches, as
        x = norm2(x + dropout2(multihead_attn(x, memory)))      in :class:`TransformerEncoderLayer`
        x = norm3(x + dropout3(ff(x)))

    Dropout, addition and the normalisation that follows them are one pass (:func:`pyops.add_layer_norm`).

    Args:
        backend: as in :class:`MultiheadAttention`, for the layer's attention and norms. The others are torch's.

    Differs from torch.nn.TransformerDecoderLayer: attention differs as in :class:`MultiheadAttention`; dropout drops
    other elements with the same seed. ``_sa_block`` and ``_mha_block`` are not called.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        _adopt(self, backend)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, need_weights=False,
                is_causal=tgt_is_causal,
            )[0]  # fmt: skip

        def attend_memory(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x, memory, memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask, need_weights=False,
                is_causal=memory_is_causal,
            )[0]  # fmt: skip

        x = tgt
        if self.norm_first:
            y, x = _add_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            y, x = _add_norm(attend_memory(y), x, self.dropout2, self.norm3)
            return x + self._ff_block(y)
        x, _ = _add_norm(attend(x), x, self.dropout1, self.norm1)
        x, _ = _add_norm(attend_memory(x), x, self.dropout2, self.norm2)
        y = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return _add_norm(y, x, self.dropout3, self.norm3)[0]
