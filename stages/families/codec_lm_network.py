"""The network of `codec_lm`: text encoder, causal decoder with cross-attention, parallel heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.architecture import (
    Architecture,
    feed_forward_flops,
    parameters_by_part,
    product_flops,
)
from stages.config import DatasetFacts
from stages.errors import UserError
from stages.families.weights import project
from stages.model_config import CodecLMConfig
from stages.modules.alignment import diagonal_loss
from stages.modules.attention import additive, causal_mask
from stages.modules.feed_forward import Experts, FeedForward, Routing
from stages.modules.local_transformer import LocalTransformer
from stages.modules.transformer import (
    DecoderLayer,
    DecoderState,
    Memory,
    TransformerLayer,
    stack,
)

EMBEDDING_SIZE = 0.3
"""Root mean square of fresh embeddings and positions."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch as tensors."""

    text: Tensor
    """[B, L] int64 character ids, 0 beyond the end."""
    text_lengths: Tensor
    """[B] int64."""
    speaker: Tensor
    """[B] int64."""
    unconditional: Tensor
    """[B] bool: rows whose conditions are dropped."""
    context: Tensor | None = None
    """[B, P, S] int64 context codes, padded on the left."""
    context_lengths: Tensor | None = None
    """[B] int64."""

    def branches(self, count: int) -> Conditions:
        """Repeat each row: with 2 branches rows 2i are conditional and 2i + 1 unconditional."""
        if count == 1:
            return self

        def twice(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat_interleave(2, 0)

        unconditional = torch.stack(
            [self.unconditional, torch.ones_like(self.unconditional)], 1
        ).flatten()
        return Conditions(
            text=self.text.repeat_interleave(2, 0),
            text_lengths=self.text_lengths.repeat_interleave(2, 0),
            speaker=self.speaker.repeat_interleave(2, 0),
            unconditional=unconditional,
            context=twice(self.context),
            context_lengths=twice(self.context_lengths),
        )


@dataclass(frozen=True)
class Prediction:
    """What one parallel pass computes."""

    hidden: dict[str, Tensor]
    """By group of streams, what its head reads: `backbone` [B, T, 1, E], `local` [B, T, S, W]."""
    routing: Routing | None
    """Of all layers together; None without experts."""
    alignment: Tensor | None
    """Diagonal attention loss, float32 scalar, where it was asked for."""


class CodecLMNetwork(nn.Module):
    """Predicts the codes of the next timestep from text, speaker, context and earlier codes.

    S streams per timestep (`frames_per_step` × codebooks), V ids each: the codec's codes, then the
    begin id, then the end id. With a local transformer C = 2 S streams are predicted: S by the
    decoder's parallel heads and S by the local transformer.
    """

    def __init__(self, config: CodecLMConfig, facts: DatasetFacts) -> None:
        super().__init__()
        self.config = config
        self.streams = config.frames_per_step * facts.codebooks
        self.codes = facts.codes_per_codebook
        self.vocabulary = facts.codes_per_codebook + 2
        self.begin_id = facts.codes_per_codebook
        width = config.d_model
        self.code_embedding = nn.Embedding(self.streams * self.vocabulary, width)
        self.timestep_position = nn.Parameter(torch.empty(config.max_timesteps, width))
        self.text_embedding = nn.Embedding(len(facts.alphabet), width)
        self.text_position = nn.Parameter(torch.empty(config.max_characters, width))
        self.null_text = nn.Parameter(torch.empty(width))
        self.speaker_embedding = nn.Embedding(len(facts.speakers) + 1, width)
        self.text_encoder = self._encoder(config.text_layers)
        self.text_norm = nn.LayerNorm(width, bias=False)
        self.has_context = facts.context_frames > 0
        if self.has_context:
            self.null_context = nn.Parameter(torch.empty(width))
            self.context_encoder = self._encoder(config.context_layers)
            self.context_norm = nn.LayerNorm(width, bias=False)
        self.decoder = stack(self._decoder_layer() for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, self.streams * self.vocabulary, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.local = (
            LocalTransformer(
                width,
                config.local_transformer,
                streams=self.streams,
                vocabulary=self.vocabulary,
                dropout=config.dropout,
            )
            if config.local_transformer is not None
            else None
        )

    def _encoder(self, layers: int) -> Sequence[TransformerLayer]:
        config = self.config
        return stack(
            TransformerLayer(config.d_model, config.heads, config.feed_forward, config.dropout)
            for _ in range(layers)
        )

    def _decoder_layer(self) -> DecoderLayer:
        config = self.config
        feed_forward = (
            FeedForward(config.d_model, config.feed_forward)
            if config.experts is None
            else Experts(config.d_model, config.feed_forward, config.experts)
        )
        return DecoderLayer(config.d_model, config.heads, feed_forward, config.dropout)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights from the global generator.

        Maps are normal with variance 1 / (3 fan-in), less by the depth where they write to the
        residual, as in GPT-2. Embeddings and the sum of a timestep's code embeddings have one size,
        and positions are sinusoids of that size (1706.03762): were text much smaller than
        its position, the decoder would learn to place the text long before it learns to read it.
        """
        depth = 2 * max(1, self.config.decoder_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name in ("timestep_position", "text_position"):
                parameter.copy_(EMBEDDING_SIZE * sinusoids(*parameter.shape))
            elif "embedding" in name or parameter.dim() == 1:
                share = self.streams if name == "code_embedding.weight" else 1
                nn.init.normal_(parameter, std=EMBEDDING_SIZE / math.sqrt(share))
            else:
                fan_in = parameter.shape[-1 if name.endswith("weight") else -2]
                residual = name.endswith(("out.weight", "down.weight", "feed_forward.down"))
                nn.init.normal_(parameter, std=(3 * fan_in * (depth if residual else 1)) ** -0.5)

    @torch.no_grad()
    def adopt_codebooks(self, vectors: Tensor) -> None:
        """Start from what the audio codec's codes mean: `vectors` [codebooks, codes, D] float32.

        Codes whose vectors are near get embeddings and output rows that are near: both become
        random projections of the vectors (one for the input, one for the output), drawn from the
        global generator. Codebooks of small vectors are raised by the square root of their size in
        the input, so that the last ones of a residual quantiser are not lost, and wholly in the
        output. Begin and end ids keep their fresh rows.
        """
        size = vectors.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
        width, rows = self.config.d_model, self._rows_by_codebook(vectors)
        inputs = project(vectors / size.sqrt(), width)
        scale = EMBEDDING_SIZE / inputs.square().mean((1, 2)).sum().sqrt()
        self.code_embedding.weight[rows] = scale / math.sqrt(self.config.frames_per_step) * inputs
        self.head.weight[rows] = project(vectors / size, width) * (3 * width) ** -0.5
        if self.local is not None:
            self.local.adopt_codebooks(vectors / size)

    def _rows_by_codebook(self, vectors: Tensor) -> Tensor:
        """Rows [frames, codebooks, codes] of the stacked tables that hold the codec's codes."""
        codebooks, codes = vectors.shape[:2]
        expected = (self.streams // self.config.frames_per_step, self.codes)
        if (codebooks, codes) != expected:
            raise UserError(
                f"the audio codec has {codebooks} codebooks of {codes} codes, but the model was "
                f"built for {expected[0]} of {expected[1]}: prepare the dataset again"
            )
        stream = torch.arange(self.streams).view(-1, codebooks, 1)
        return stream * self.vocabulary + torch.arange(codes)

    def embed(self, codes: Tensor) -> Tensor:
        """Sum the embeddings of codes [..., S] to [..., E]."""
        rows = (codes + self._offsets(codes)).reshape(-1, self.streams)
        summed: Tensor = F.embedding_bag(rows, self.code_embedding.weight, mode="sum")
        return summed.view(*codes.shape[:-1], -1)

    def _offsets(self, codes: Tensor) -> Tensor:
        return torch.arange(self.streams, device=codes.device) * self.vocabulary

    def _encode_text(self, conditions: Conditions) -> Memory:
        """Encode the text.

        An unconditional row has one position, the learned null: nothing tells it the length.
        """
        length = conditions.text.shape[1]
        index = torch.arange(length, device=conditions.text.device)
        valid = index < conditions.text_lengths[:, None]
        x = self.dropout(self.text_embedding(conditions.text) + self.text_position[:length])
        for layer in self.text_encoder:
            x = layer(x, valid[:, None, None, :])
        dropped = conditions.unconditional[:, None]
        states = torch.where(dropped[..., None], self.null_text.to(x.dtype), self.text_norm(x))
        return Memory(states, torch.where(dropped, index == 0, valid)[:, None, None, :])

    def _prefix(self, conditions: Conditions) -> tuple[Tensor, Tensor | None]:
        """Positions before the first code: context, then speaker, padded on the left.

        Returns [B, P, E] and which positions are valid, [B, P] bool, or None if all are.
        """
        null_speaker = self.speaker_embedding.num_embeddings - 1
        ids = torch.where(conditions.unconditional, null_speaker, conditions.speaker)
        speaker = self.speaker_embedding(ids).unsqueeze(1)
        if conditions.context is None or conditions.context_lengths is None:
            return speaker, None
        context, valid = self._encode_context(conditions.context, conditions.context_lengths)
        dropped = conditions.unconditional[:, None]
        context = torch.where(dropped[..., None], self.null_context.to(context.dtype), context)
        # The null is one position, so that it does not tell the context's length.
        last = torch.arange(valid.shape[1], device=valid.device) == valid.shape[1] - 1
        valid = torch.where(dropped, last, valid)
        always = torch.ones_like(valid[:, :1])
        return torch.cat([context, speaker], 1), torch.cat([valid, always], 1)

    def _encode_context(self, codes: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode context codes [B, P, S], padded on the left, to [B, P, E] and valid [B, P]."""
        width = codes.shape[1]
        place = torch.arange(width, device=codes.device) - (width - lengths[:, None])
        valid = place >= 0
        x = self.embed(codes) + self.timestep_position[place.clamp(min=0)]
        for layer in self.context_encoder:
            x = layer(x, valid[:, None, None, :])
        return self.context_norm(x), valid

    def _inputs(self, codes: Tensor, valid: Tensor) -> Tensor:
        """Embed what precedes each timestep of `codes` [B, T, S]: [B, T, E]."""
        clean = torch.where(valid.unsqueeze(-1), codes, self.begin_id)
        begin = torch.full_like(clean[:, :1], self.begin_id)
        previous = torch.cat([begin, clean[:, :-1]], 1)
        if self.training:
            previous = self._disturb(previous)
        return self.embed(previous) + self.timestep_position[: codes.shape[1]]

    def _disturb(self, previous: Tensor) -> Tensor:
        """Replace some codes of `previous` [B, T, S] at random, and hide whole timesteps.

        A decoder that is fed the right codes can live off them and never learn to read; hidden
        timesteps make it ask the text. How many are hidden differs from row to row, from none to
        twice the mean, so that undisturbed rows occur in training too.
        """
        config = self.config
        if config.code_noise > 0:
            noise = torch.randint_like(previous, self.codes)
            drawn = torch.rand(previous.shape, device=previous.device) < config.code_noise
            previous = torch.where(drawn & (previous != self.begin_id), noise, previous)
        if config.timestep_noise > 0:
            rows, timesteps = previous.shape[:2]
            rate = 2 * config.timestep_noise * torch.rand(rows, 1, device=previous.device)
            hidden = torch.rand(rows, timesteps, device=previous.device) < rate
            previous = previous.masked_fill(hidden.unsqueeze(-1), self.begin_id)
        return previous

    def forward(
        self,
        codes: Tensor,
        lengths: Tensor,
        conditions: Conditions,
        alignment: bool = False,
        local: bool = True,
    ) -> Prediction:
        """Predict every timestep of `codes` [B, T, S] from those before it, up to the heads.

        `lengths` [B] int64; codes beyond them are never read, and states beyond them mean nothing.
        Without `local` the local transformer is left alone.
        """
        timesteps = codes.shape[1]
        valid = torch.arange(timesteps, device=codes.device) < lengths[:, None]
        memory = self._encode_text(conditions)
        prefix, prefix_valid = self._prefix(conditions)
        start = prefix.shape[1]
        x = torch.cat([prefix, self._inputs(codes, valid)], 1)
        x = self.dropout(x)
        keys = F.pad(valid, (start, 0), value=True)
        mask = None
        if prefix_valid is not None:
            keys = torch.cat([prefix_valid, valid], 1)
            mask = causal_mask(keys)
        routings = []
        maps = []
        for layer in self.decoder:
            x, routing, weights = layer(x, mask, keys, memory, aligned=alignment)
            if routing is not None:
                routings.append(routing)
            if weights is not None:
                maps.append(weights[:, :, start:])
        hidden = self.norm(x[:, start:])
        aligned = self._alignment(maps, conditions, lengths) if alignment else None
        together = Routing.of_layers(routings) if routings else None
        return Prediction(self._states(hidden, codes, valid, local), together, aligned)

    def _states(
        self, hidden: Tensor, codes: Tensor, valid: Tensor, local: bool
    ) -> dict[str, Tensor]:
        """What each head reads, from decoder outputs [B, T, E]; codes [B, T, S] feed the local."""
        states = {"backbone": hidden.unsqueeze(-2)}
        if self.local is not None and local:
            clean = torch.where(valid.unsqueeze(-1), codes, self.begin_id).flatten(0, 1)
            embedded = self.code_embedding(clean + self._offsets(codes))
            states["local"] = self.local(hidden.flatten(0, 1), embedded).view(*codes.shape, -1)
        return states

    def _alignment(self, maps: list[Tensor], conditions: Conditions, lengths: Tensor) -> Tensor:
        losses = [
            diagonal_loss(map_, conditions.text_lengths, lengths, ~conditions.unconditional)
            for map_ in maps
        ]
        return torch.stack(losses).mean()

    def start(self, conditions: Conditions) -> DecoderState:
        """Encode conditions and prefix once, for `step`."""
        memory = self._encode_text(conditions)
        x, valid = self._prefix(conditions)
        mask = None if valid is None else causal_mask(valid)
        states = []
        for layer in self.decoder:
            x, state = layer.prefill(x, mask, memory)
            states.append(state)
        prefix_mask = None if valid is None else additive(valid[:, None, None, :], x.dtype)
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return DecoderState(states, additive(memory.mask, x.dtype), prefix_mask, first)

    def step(self, previous: Tensor, state: DecoderState) -> Tensor:
        """Decode one timestep after codes `previous` [n, S]: the decoder's output [n, E]."""
        x = (self.embed(previous) + self.timestep_position[state.next_position]).unsqueeze(1)
        mask = state.self_mask()
        for layer, layer_state in zip(self.decoder, state.layers, strict=True):
            x = layer.step(x, layer_state, mask, state.memory_mask)
        state.next_position = state.next_position + 1
        hidden: Tensor = self.norm(x[:, 0])
        return hidden

    def predict_parallel(self, hidden: Tensor) -> Tensor:
        """Logits [..., S, V] of all streams at once from decoder outputs [..., E]."""
        logits: Tensor = self.head(hidden)
        return logits.view(*hidden.shape[:-1], self.streams, self.vocabulary)

    def head_weights(self) -> dict[str, Tensor]:
        """The linear heads: by group of streams, [S, V, D] in the model's type."""
        weights = {"backbone": self.head.weight.view(self.streams, self.vocabulary, -1)}
        if self.local is not None:
            weights["local"] = self.local.heads.transpose(1, 2)
        return weights

    def embed_stream(self, codes: Tensor, stream: int) -> Tensor:
        """Embeddings [n, E] of the codes [n] of one stream."""
        embedded: Tensor = self.code_embedding(codes + stream * self.vocabulary)
        return embedded


def architecture_of(network: CodecLMNetwork) -> Architecture:
    """How large a network is and what decoding a timestep costs."""
    config, parts = (
        network.config,
        parameters_by_part(
            (name, parameter.numel()) for name, parameter in network.named_parameters()
        ),
    )
    count, active = (config.experts.experts, config.experts.active) if config.experts else (0, 0)
    width, hidden, layers = config.d_model, config.feed_forward, config.decoder_layers
    # Queries, keys, values and output of self-attention; queries and output of cross-attention.
    decoder = layers * product_flops((width, 6 * width))
    heads = product_flops((width, network.streams * network.vocabulary))
    rest = decoder + heads + (network.local.flops(width) if network.local is not None else 0)
    sparse = layers * feed_forward_flops(width, hidden, experts=count, active=active)
    idle = layers * (count - active) * 2 * width * hidden
    return Architecture(
        parameters=sum(parts.values()),
        parts=parts,
        active_parameters=sum(parts.values()) - idle,
        flops_per_timestep=rest + sparse,
        dense_flops_per_timestep=rest + layers * feed_forward_flops(width, max(count, 1) * hidden),
        experts=count,
        active_experts=active,
    )


def sinusoids(length: int, width: int) -> Tensor:
    """Sinusoidal positions [length, width] with a root mean square of 1."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(length).unsqueeze(-1) * rates
    table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]
    return math.sqrt(2.0) * table
