"""Autoregression over the codebooks of one timestep."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stages.architecture import feed_forward_flops, product_flops
from stages.model_config import LocalTransformerConfig
from stages.modules.attention import KVCache
from stages.modules.transformer import TransformerLayer, stack

FEED_FORWARD_MULTIPLE = 4
"""Width of the feed-forward over the width of the local transformer."""


class LocalTransformer(nn.Module):
    """A small causal transformer: the decoder's output, then one code after the other.

    Position 0 reads the decoder's hidden state, position s the code of stream s − 1; position s
    predicts stream s, with a head of its own.
    """

    def __init__(
        self,
        d_model: int,
        config: LocalTransformerConfig,
        *,
        streams: int,
        vocabulary: int,
        dropout: float,
    ) -> None:
        super().__init__()
        width = config.d_model
        self.read_hidden = nn.Linear(d_model, width, bias=False)
        self.read_code = nn.Linear(d_model, width, bias=False)
        self.position = nn.Parameter(torch.empty(streams, width))
        self.layers = stack(
            TransformerLayer(width, config.heads, FEED_FORWARD_MULTIPLE * width, dropout)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width, bias=False)
        self.heads = nn.Parameter(torch.empty(streams, width, vocabulary))

    @torch.no_grad()
    def adopt_codebooks(self, vectors: Tensor) -> None:
        """Let the heads start as a random projection of code vectors [codebooks, codes, D]."""
        codebooks, codes, size = vectors.shape
        width = self.heads.shape[1]
        rows = vectors @ torch.randn(size, width) / math.sqrt(3 * size * width)
        frames = self.heads.shape[0] // codebooks
        self.heads[:, :, :codes] = rows.transpose(1, 2).repeat(frames, 1, 1)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """States of all streams at once, each for the head of its own.

        `hidden` [N, E] and `embedded` codes [N, S, E] give [N, S, W], W being the width.
        """
        first = self.read_hidden(hidden).unsqueeze(1)
        x = torch.cat([first, self.read_code(embedded[:, :-1])], 1) + self.position
        for layer in self.layers:
            x = layer(x, causal=True)
        states: Tensor = self.norm(x)
        return states

    def start(self, hidden: Tensor) -> tuple[Tensor, list[KVCache]]:
        """State of stream 0 from `hidden` [n, E]: [n, W], and the caches for `step`."""
        x = self.read_hidden(hidden).unsqueeze(1) + self.position[:1]
        caches = []
        for layer in self.layers:
            x, cache = layer.prefill(x)
            caches.append(cache)
        state: Tensor = self.norm(x[:, 0])
        return state, caches

    def step(self, embedded: Tensor, stream: int, caches: list[KVCache]) -> Tensor:
        """State [n, W] of `stream` ≥ 1 from the embedded code [n, E] of the stream before."""
        x = self.read_code(embedded).unsqueeze(1) + self.position[stream : stream + 1]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.step(x, cache)
        state: Tensor = self.norm(x[:, 0])
        return state

    def predict_stream(self, state: Tensor, stream: int) -> Tensor:
        """Logits [n, V] of one stream from its state [n, W]."""
        logits: Tensor = state @ self.heads[stream]
        return logits

    def flops(self, d_model: int) -> int:
        """FLOPs of one timestep's streams, attention among them left out (`Architecture`)."""
        streams, width, vocabulary = self.heads.shape
        attention = product_flops((width, 4 * width))
        layer = attention + feed_forward_flops(width, FEED_FORWARD_MULTIPLE * width)
        position = product_flops((d_model, width), (width, vocabulary)) + len(self.layers) * layer
        return streams * position
