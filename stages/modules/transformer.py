"""Pre-norm transformer layers: for encoders and the local transformer, and for the decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn import functional

from stages.modules.attention import CrossAttention, Departure, KVCache, SelfAttention
from stages.modules.feed_forward import FeedForward, Routing

Layer = TypeVar("Layer", bound=nn.Module)


def stack(layers: Iterable[Layer]) -> Sequence[Layer]:
    """Register layers with the module they are assigned to, and keep their type."""
    return cast("Sequence[Layer]", nn.ModuleList(layers))


class TransformerLayer(nn.Module):
    """Self-attention and a dense feed-forward."""

    def __init__(self, d_model: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.attention = SelfAttention(d_model, heads)
        self.feed_forward_norm = nn.LayerNorm(d_model, bias=False)
        self.feed_forward = FeedForward(d_model, feed_forward)
        self.dropout = nn.Dropout(dropout)

    def _forward_feed(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x + y

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """Map `x` [B, T, E]; `mask` broadcasts to [B, H, T, T], True may be attended to."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, causal=causal))
        return self._forward_feed(x)

    def prefill(self, x: Tensor) -> tuple[Tensor, KVCache]:
        """Decode the positions `x` [n, P, E] at once, causally, and return the cache for `step`."""
        y, cache = self.attention.prefill(self.attention_norm(x), None, causal=True)
        return self._forward_feed(x + y), cache

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """Decode one new position `x` [n, 1, E]."""
        return self._forward_feed(x + self.attention.step(self.attention_norm(x), cache, None))


@dataclass(frozen=True)
class Memory:
    """What a decoder attends to."""

    states: Tensor
    """[B, L, E]."""
    mask: Tensor
    """[B, 1, 1, L] bool, True may be attended to."""


@dataclass(frozen=True)
class LayerState:
    """What one decoder layer remembers while it decodes."""

    cache: KVCache
    """Self-attention's keys and values of the positions so far."""
    memory: KVCache
    """Cross-attention's keys and values, projected once."""

    def drop(self, departure: Departure) -> None:
        """Keep the rows that still run."""
        self.cache.drop(departure)
        self.memory.drop(departure)


class DecoderState:
    """What decoding remembers: one state per layer, the masks, and every row's next position."""

    def __init__(
        self,
        layers: Sequence[LayerState],
        memory_mask: Tensor,
        prefix_mask: Tensor | None,
        next_position: Tensor,
    ) -> None:
        self.layers = layers
        self.memory_mask = memory_mask
        """[n, 1, 1, L] additive."""
        self.prefix_mask = prefix_mask
        """[n, 1, 1, P] additive; None where no prefix is padded."""
        self.next_position = next_position
        """[n] int64: the place of the next timestep."""

    def self_mask(self) -> Tensor | None:
        """Additive mask [n, 1, 1, length + 1] of the next position."""
        if self.prefix_mask is None:
            return None
        length = self.layers[0].cache.length + 1
        return functional.pad(self.prefix_mask, (0, length - self.prefix_mask.shape[-1]))

    def drop(self, departure: Departure) -> None:
        """Keep the rows that still run."""
        for layer in self.layers:
            layer.drop(departure)
        self.memory_mask = departure.kept(self.memory_mask)
        self.next_position = departure.kept(self.next_position)
        if self.prefix_mask is not None:
            self.prefix_mask = departure.kept(self.prefix_mask)


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to a memory, and a feed-forward of any kind.

    `feed_forward` maps x [B, T, E] and valid [B, T] (or None) to y and how it was routed, or is a
    dense `FeedForward`, which has no routing.
    """

    def __init__(self, d_model: int, heads: int, feed_forward: nn.Module, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.attention = SelfAttention(d_model, heads)
        self.cross_norm = nn.LayerNorm(d_model, bias=False)
        self.cross_attention = CrossAttention(d_model, heads)
        self.feed_forward_norm = nn.LayerNorm(d_model, bias=False)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def _forward_feed(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Routing | None]:
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, FeedForward):
            return x + self.dropout(self.feed_forward(normed)), None
        y, routing = self.feed_forward(normed, valid)
        return x + self.dropout(y), routing

    def forward(
        self, x: Tensor, mask: Tensor | None, valid: Tensor, memory: Memory, *, aligned: bool
    ) -> tuple[Tensor, Routing | None, Tensor | None]:
        """Map `x` [B, T, E] to (x, its routing, attention weights [B, H, T, L] if `aligned`).

        Without a `mask` ([B, 1, T, T] bool, itself causal) attention is plainly causal; `valid`
        [B, T] says which positions count in the routing.
        """
        y = self.attention(self.attention_norm(x), mask, causal=mask is None)
        x = x + self.dropout(y)
        attend = self.cross_attention
        keys, values = attend.project_memory(memory.states)
        weights = None
        if aligned:
            y, weights = attend.aligned(self.cross_norm(x), keys, values, memory.mask)
        else:
            y = attend(self.cross_norm(x), keys, values, memory.mask)
        x, routing = self._forward_feed(x + self.dropout(y), valid)
        return x, routing, weights

    def prefill(self, x: Tensor, mask: Tensor | None, memory: Memory) -> tuple[Tensor, LayerState]:
        """Decode the positions `x` [n, P, E] at once and return the state for `step`."""
        y, cache = self.attention.prefill(self.attention_norm(x), mask, causal=mask is None)
        keys, values = self.cross_attention.project_memory(memory.states)
        state = LayerState(cache, KVCache(keys.contiguous(), values.contiguous()))
        x = x + y
        x = x + self.cross_attention(self.cross_norm(x), keys, values, memory.mask)
        return self._forward_feed(x, None)[0], state

    def step(
        self, x: Tensor, state: LayerState, mask: Tensor | None, memory_mask: Tensor
    ) -> Tensor:
        """Decode one new position `x` [n, 1, E]; both masks are additive, [n, 1, 1, length]."""
        x = x + self.attention.step(self.attention_norm(x), state.cache, mask)
        keys, values = state.memory.view()
        x = x + self.cross_attention(self.cross_norm(x), keys, values, memory_mask)
        return self._forward_feed(x, None)[0]
