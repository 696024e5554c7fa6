"""Multi-head attention that decodes incrementally: nothing is computed twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CACHE_BLOCK = 64
"""Timesteps by which a cache grows at least."""


def additive(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask (True may be attended to) into the 0 / -inf form that is added to scores."""
    return torch.zeros_like(valid, dtype=dtype).masked_fill(~valid, float("-inf"))


def causal_mask(valid: Tensor) -> Tensor:
    """Causal attention to valid positions [B, T] only: [B, 1, T, T] bool.

    Every position may attend to itself, so that padded rows stay finite; nobody reads them.
    """
    size = valid.shape[1]
    everywhere = torch.ones(size, size, dtype=torch.bool, device=valid.device)
    allowed = everywhere.tril() & valid[:, None, :]
    return (allowed | torch.eye(size, dtype=torch.bool, device=valid.device)).unsqueeze(1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of queries [B, H, T, D] to keys and values [B, H, L, D]: [B, H, T, D].

    `dropout` is the share of attention weights that are dropped.

    On the CPU it is computed in float32 whatever the type: torch's fused kernel is several times
    slower in bfloat16 there (2.14: a training step of a small model takes 1.5 times as long).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), mask, dropout, is_causal=causal
        )
    return y.to(q.dtype)


def merge(heads: Tensor, out: nn.Linear) -> Tensor:
    """Join the heads of [B, H, T, D] and project them with `out` to [B, T, E]."""
    merged: Tensor = out(heads.transpose(1, 2).flatten(2))
    return merged


@dataclass(frozen=True)
class Departure:
    """Which rows of a batch end, and which of the running ones take their places.

    Moving only as many rows as have ended is cheaper than copying all caches.
    """

    holes: Tensor
    """[m] int64: rows below `count` that ended."""
    movers: Tensor
    """[m] int64: running rows from `count` on."""
    count: int
    """Rows that still run."""

    @classmethod
    def of(cls, running: Tensor) -> Departure:
        """Plan it for `running` [b] bool; waits for the device."""
        count = int(running.sum())
        places = torch.arange(len(running), device=running.device)
        return cls(places[:count][~running[:count]], places[count:][running[count:]], count)

    def kept(self, values: Tensor) -> Tensor:
        """Values [count, ...] of the running rows, from those of all rows [b, ...]; a copy."""
        values = values.clone()
        values[self.holes] = values[self.movers]
        return values[: self.count]

    def of_branches(self, branches: int) -> Departure:
        """Return the same plan for rows of which each is there once per branch."""
        branch = torch.arange(branches, device=self.holes.device)
        return Departure(
            (self.holes[:, None] * branches + branch).flatten(),
            (self.movers[:, None] * branches + branch).flatten(),
            self.count * branches,
        )


class KVCache:
    """Keys and values of the positions decoded so far, [n, H, capacity, D] each.

    Rows that have ended are overwritten by rows that still run, so that the running ones always
    are the first `rows`, and attention reads views of them without copying.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.rows, self.length = keys.shape[0], keys.shape[2]

    @classmethod
    def with_room(cls, keys: Tensor, values: Tensor, timesteps: int) -> KVCache:
        """Hold [n, H, L, D] with room for as many `timesteps`, so that no step has to copy all."""
        cache = cls(*(F.pad(x, (0, 0, 0, timesteps)) for x in (keys, values)))
        cache.length = keys.shape[2]
        return cache

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add one position, [rows, H, 1, D] each."""
        if self.length == self.keys.shape[2]:
            self._grow()
        self.keys[: self.rows, :, self.length] = keys[:, :, 0]
        self.values[: self.rows, :, self.length] = values[:, :, 0]
        self.length += 1

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the running rows, [rows, H, length, D] each."""
        return (
            self.keys[: self.rows, :, : self.length],
            self.values[: self.rows, :, : self.length],
        )

    def drop(self, departure: Departure) -> None:
        """Keep the rows that still run."""
        for tensor in (self.keys, self.values):
            moved = tensor[departure.movers, :, : self.length]
            tensor[departure.holes, :, : self.length] = moved
        self.rows = departure.count

    def _grow(self) -> None:
        extra = max(CACHE_BLOCK, self.length)
        self.keys = F.pad(self.keys[: self.rows], (0, 0, 0, extra))
        self.values = F.pad(self.values[: self.rows], (0, 0, 0, extra))


class SelfAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
        """Attend within `x` [B, T, E]; `mask` broadcasts to [B, H, T, T], True may be attended to.

        `causal` needs no mask; a masked causal attention brings both in `mask`.
        """
        q, k, v = self._project(x)
        y = attend(q, k, v, mask, causal=causal)
        return merge(y, self.out)

    def prefill(self, x: Tensor, mask: Tensor | None, *, causal: bool) -> tuple[Tensor, KVCache]:
        """Do what `forward` does and keep the keys and values for `step`."""
        q, k, v = self._project(x)
        y = attend(q, k, v, mask, causal=causal)
        return merge(y, self.out), KVCache(k.contiguous(), v.contiguous())

    def step(self, x: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor:
        """Attend from one new position `x` [n, 1, E] to all before it and itself.

        `mask` [n, 1, 1, length] is additive and covers the new position too.
        """
        q, k, v = self._project(x)
        cache.append(k, v)
        y = attend(q, *cache.view(), mask)
        return merge(y, self.out)


class CrossAttention(nn.Module):
    """Attention from the decoder to a memory whose keys and values are projected once."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, L, D] of a memory [B, L, E]."""
        kv = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)
        return k, v

    def _queries(self, x: Tensor) -> Tensor:
        queries: Tensor = self.query(x)
        return queries.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attend from `x` [B, T, E]; `mask` broadcasts to [B, H, T, L]."""
        y = attend(self._queries(x), keys, values, mask)
        return merge(y, self.out)

    def aligned(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do what `forward` does and return the attention weights [B, H, T, L] float32 too.

        Written out, because the fused attention never forms its weights; `mask` is bool.
        """
        q = self._queries(x)
        scores = (q @ keys.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        y = weights.to(values.dtype) @ values
        return merge(y, self.out), weights
