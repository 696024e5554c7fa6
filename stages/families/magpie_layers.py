"""NeMo's transformer layers, taken apart: whole sequences, and one position after the other.

Dropout acts where NeMo's own forward has it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.modules.attention import KVCache, attend, merge


@dataclass(frozen=True)
class Router:
    """What the router of one layer decided."""

    logits: Tensor
    """[n, T, X]."""
    probabilities: Tensor
    """[n, T, X]."""
    experts: Tensor
    """[n, T, A] int64, -1 at padded positions."""


def positions_of(transformer: Any) -> int:
    """The most positions that a transformer of NeMo's takes."""
    table = transformer.position_embeddings
    if table is not None:
        return int(table.num_embeddings)
    mask = getattr(transformer.layers[0].self_attention, "causal_mask", None)
    return sys.maxsize if mask is None else int(mask.shape[-1])


def _project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [n, H, T, D] of x [n, T, E]."""
    shape = (3, attention.n_heads, attention.d_head)
    q, k, v = attention.qkv_net(x).unflatten(-1, shape).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _attended(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    dropout = attention.dropout.p if attention.training else 0.0
    y = attend(q, k, v, mask, dropout=dropout)
    out: Tensor = attention.dropout(merge(y, attention.o_net))
    return out


def self_attention(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Attend within x [n, T, E]; `mask` [n, 1, T, T] bool, True may be attended to."""
    attention = layer.self_attention
    return _attended(attention, *_project(attention, layer.norm_self(x)), mask)


def prefilled(layer: Any, x: Tensor, mask: Tensor | None, timesteps: int) -> tuple[Tensor, KVCache]:
    """Do what `self_attention` does and keep keys and values, with room for more timesteps."""
    attention = layer.self_attention
    q, k, v = _project(attention, layer.norm_self(x))
    return _attended(attention, q, k, v, mask), KVCache.with_room(k, v, timesteps)


def self_step(layer: Any, x: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor:
    """Attend from one position x [n, 1, E] to those before it and itself; `mask` is additive."""
    attention = layer.self_attention
    q, k, v = _project(attention, layer.norm_self(x))
    cache.append(k, v)
    return _attended(attention, q, *cache.view(), mask)


def text_memory(layer: Any, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [n, H, L, D] of the encoded text [n, L, E]."""
    attention = layer.cross_attention
    shape = (2, attention.n_heads, attention.d_head)
    normed = layer.norm_xattn_memory(memory)
    k, v = attention.kv_net(normed).unflatten(-1, shape).permute(2, 0, 3, 1, 4).unbind(0)
    return k, v


def cross_attention(layer: Any, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attend from x [n, T, E] to the text; `mask` [n, 1, 1, L] is bool or additive."""
    attention = layer.cross_attention
    queries = attention.q_net(layer.norm_xattn_query(x))
    q = queries.unflatten(-1, (attention.n_heads, attention.d_head)).transpose(1, 2)
    return _attended(attention, q, keys, values, mask)


def feed_forward(layer: Any, x: Tensor, counted: Tensor) -> tuple[Tensor, Router | None]:
    """Feed x [n, T, E] forward; padded positions visit no expert."""
    normed = layer.norm_pos_ff(x)
    if not layer.use_moe:
        return layer.pos_ff(normed, counted), None
    return _through_experts(layer.pos_ff, normed, counted)


def _through_experts(feed: Any, x: Tensor, counted: Tensor) -> tuple[Tensor, Router]:
    """Feed x [n, T, E] through the experts that the router chooses for each position that counts.

    NeMo's own dispatch adds up in the type of x what experts return in that of autocast, which
    fails; here they multiply in that type, and their sum is taken in float32.
    """
    weights, chosen, logits, probabilities = _routed(feed.router, x, counted)
    flat, active = x.flatten(0, 1), chosen.shape[-1]
    visits, shares = chosen.flatten(), weights.flatten()
    # Padded positions visit -1 and so come first; the device is waited for once.
    padded, *counts = torch.bincount(visits + 1, minlength=len(feed.experts) + 1).tolist()
    order = visits.argsort(stable=True)[padded:]
    total = torch.zeros_like(flat, dtype=torch.promote_types(x.dtype, torch.float32))
    for expert, places in zip(feed.experts, torch.split(order, counts), strict=True):
        if len(places):
            rows = places // active
            y = feed.dropout(_pointwise(expert, feed.non_linearity, flat[rows]))
            total = total.index_add(0, rows, y.to(total.dtype) * shares[places].unsqueeze(-1))
    return total.to(x.dtype).view_as(x), Router(logits, probabilities, chosen)


def _routed(router: Any, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ask a router in float32: of bfloat16, positions would go to other experts."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = {"router.weight": router.router.weight.to(wide)}
    with torch.autocast(x.device.type, enabled=False):
        routed: tuple[Tensor, Tensor, Tensor, Tensor] = torch.func.functional_call(
            router, weight, (x.to(wide), counted)
        )
    return routed


def _pointwise(feed: Any, non_linearity: Any, x: Tensor) -> Tensor:
    """Feed x [..., E] forward as products, several times as fast as convolutions of width 1."""
    proj, out = (feed[name].conv for name in ("proj", "o_net"))
    inner = non_linearity(F.linear(x, proj.weight[..., 0], proj.bias))
    return F.linear(inner, out.weight[..., 0], out.bias)


def feed_step(layer: Any, x: Tensor) -> Tensor:
    """Feed one position x [n, 1, E] forward."""
    normed, feed = layer.norm_pos_ff(x), layer.pos_ff
    if layer.use_moe:
        ones = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return _through_experts(feed, normed, ones)[0]
    parts = {"proj": feed.proj, "o_net": feed.o_net}
    return _pointwise(parts, feed.non_linearity, normed)
