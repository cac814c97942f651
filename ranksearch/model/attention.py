"""Opening `nn.MultiheadAttention`: the same attention with its projections as plain Linears, which then are lowered like any other.

torch computes the projections from parameters of the attention itself (`in_proj_weight`, packed), so there is no module to replace.
Self-attention is opened packed, one Linear of 3E outputs, whose factors at rank r take 4rE params against 6rE for three separate
ones; where query, key and value differ (cross-attention, or widths of their own) they stay three. Never per head: the heads
share their input, and a head's slice has few rows, so that hardly any rank of it is cheaper than dense (see `lowering/svd.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ranksearch.model.unfused import UnfusedEncoder, UnfusedEncoderLayer

IN_PROJ, OUT_PROJ = "in_proj", "out_proj"
QKV = ("q_proj", "k_proj", "v_proj")


def attention_refusal(module: Any) -> str | None:
    """Why an `nn.MultiheadAttention` cannot be opened; None where it can."""
    if type(module).forward is not nn.MultiheadAttention.forward or "forward" in vars(module):
        return f"{type(module).__name__} is an attention with a forward of its own."
    if module.bias_k is not None or module.add_zero_attn:
        return "its attention adds rows to keys and values (add_bias_kv, add_zero_attn)."
    if parametrize.is_parametrized(module) or parametrize.is_parametrized(module.out_proj):
        return "its weights are computed (a parametrization); remove that first."
    return hooks_refusal(module) or hooks_refusal(module.out_proj)


def hooks_refusal(module: Any, *, but: Any = None) -> str | None:
    """Why a module with hooks, other than `but`, cannot be replaced; None for one without."""
    before = [hook for hook in module._forward_pre_hooks.values() if hook is not but]
    if module._forward_hooks or before or module._backward_hooks:
        return "it has hooks, which a replacement would lose."
    return None


class OpenAttention(nn.MultiheadAttention):
    """Multi-head attention over plain Linears; takes and returns what `nn.MultiheadAttention` does, and still is one."""

    packed: bool
    __constants__ = [*nn.MultiheadAttention.__constants__, "packed"]  # noqa: RUF012

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.packed:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)  # type: ignore[operator]
        if query is key and key is value:
            q, k, v = self.in_proj(query).chunk(3, dim=-1)  # type: ignore[operator]
            return q, k, v
        q = self.in_proj(query).chunk(3, dim=-1)[0]  # type: ignore[operator]
        k = self.in_proj(key).chunk(3, dim=-1)[1]  # type: ignore[operator]
        return q, k, self.in_proj(value).chunk(3, dim=-1)[2]  # type: ignore[operator]

    def _heads(self, x: Tensor) -> Tensor:
        """[N, L, E] -> [N, heads, L, E / heads]"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

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
        """As `nn.MultiheadAttention.forward`: (output, attention weights or None)."""
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.mT * (q.shape[-1] ** -0.5)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout, training=self.training)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        mixed = mixed.transpose(1, 2).flatten(2)  # [N, L, E]
        if not batched:
            mixed = mixed.squeeze(0)
        elif not self.batch_first:
            mixed = mixed.transpose(0, 1)
        return self.out_proj(mixed), weights

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores: [N, heads, L, S] or what broadcasts to it; -inf hides."""
        whole: Tensor | None = None
        if attn_mask is not None:
            whole = _additive(attn_mask, q.dtype)
            whole = whole.unflatten(0, (-1, self.num_heads)) if whole.dim() == 3 else whole
        if padding is not None:
            hidden = _additive(padding, q.dtype).reshape(-1, 1, 1, k.shape[-2])
            whole = hidden if whole is None else whole + hidden
        return whole


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear that computes with these, the same parameters where they are some."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.clone())
    return layer


def open_attention_(model: nn.Module, paths: Iterable[str], parts: Set[str]) -> None:
    """Opens the attention that goes by the names `paths`, in place: packed, unless `parts`, to be lowered, name one of the three."""
    paths = list(paths)
    attention: Any = model.get_submodule(paths[0])
    _open_(attention, packed=attention.in_proj_weight is not None and not parts & set(QKV))
    for path in paths:
        leave_fused_(model, path)


def _open_(attention: Any, *, packed: bool) -> None:
    """Its own parameters become Linears, which share them; `packed` keeps query, key and value in one Linear."""
    weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, attention.embed_dim
    if packed:
        layers = {IN_PROJ: linear(weight, bias)}
    else:
        biases: Any = (None, None, None) if bias is None else bias.detach().split(width)
        weights = (
            (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            if weight is None
            else weight.detach().split(width)
        )
        layers = {name: linear(*pair) for name, *pair in zip(QKV, weights, biases, strict=True)}
    out = attention.out_proj
    layers[OUT_PROJ] = linear(out.weight, out.bias)
    attention._parameters.clear()
    attention._modules.clear()
    for name, layer in layers.items():
        attention._modules[name] = layer.train(attention.training)
    # what torch's encoder layers ask before they take a fused path of their own: not here
    attention._parameters |= dict.fromkeys(("in_proj_weight", "in_proj_bias"))
    attention._qkv_same_embed_dim = False
    attention.packed = packed
    own = type(attention)
    attention.__class__ = (
        OpenAttention if own is nn.MultiheadAttention else type(own.__name__, (OpenAttention, own), {})
    )


def set_module_(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` in the place `path`."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    leave_fused_(model, path)


_UNFUSED: dict[type, type] = {
    nn.TransformerEncoderLayer: UnfusedEncoderLayer,
    nn.TransformerEncoder: UnfusedEncoder,
}


def leave_fused_(model: nn.Module, path: str) -> None:
    """Makes torch's encoder layers around `path` forgo their fused path, which reads weights and calls no layers."""
    parts = path.split(".")
    for depth in range(len(parts)):
        ancestor: Any = model.get_submodule(".".join(parts[:depth]))
        if isinstance(ancestor, nn.TransformerEncoderLayer):
            ancestor.activation_relu_or_gelu = 0
        if isinstance(ancestor, nn.TransformerEncoder):
            ancestor.use_nested_tensor = False
        ancestor.__class__ = _UNFUSED.get(type(ancestor), type(ancestor))
