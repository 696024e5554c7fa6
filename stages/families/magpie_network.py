"""MagpieTTS over NeMo's modules: a parallel pass to train and score, and incremental decoding.

NeMo's own cached decoding recomputes all positions in most of each layer, and lets padded context
weigh in; here a step computes its own position alone, and every sequence is computed as if it were
alone: its timesteps follow its own context, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.families.magpie_layers import (
    Router,
    cross_attention,
    feed_forward,
    feed_step,
    positions_of,
    prefilled,
    self_attention,
    self_step,
    text_memory,
)
from stages.families.nemo_archive import quiet
from stages.modules.attention import KVCache, additive, causal_mask
from stages.modules.transformer import DecoderState, LayerState

with quiet():
    from nemo.collections.tts.models import MagpieTTSModel
    from nemo.collections.tts.modules.magpietts_modules import LocalTransformerType


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch as tensors."""

    text: Tensor
    """[B, L] int64 token ids, the end token included."""
    text_lengths: Tensor
    """[B] int64."""
    unconditional: Tensor
    """[B] bool: rows whose conditions are dropped."""
    context: Tensor | None
    """[B, P, S] int64: codes of the context clip with its special ids, stacked; None where the
    contexts are baked into the model."""
    context_lengths: Tensor | None
    """[B] int64, in stacked positions."""
    speakers: Tensor | None
    """[B] int64: which baked context; None where contexts are codes."""

    def to(self, device: torch.device) -> Conditions:
        """Return them on a device."""
        present = {name: x.to(device) for name, x in vars(self).items() if x is not None}
        return replace(self, **present)


@dataclass(frozen=True)
class Encoded:
    """What the decoder reads of the conditions; with two branches rows take turns."""

    memory: Tensor
    """[n, L, E]: the encoded text."""
    memory_valid: Tensor
    """[n, L] bool."""
    prefix: Tensor
    """[n, P, E]: the encoded context, before the timesteps."""
    prefix_valid: Tensor
    """[n, P] bool, a row's own positions first."""


@dataclass(frozen=True)
class Positions:
    """The most positions that the parts of a model take."""

    text: int
    """Of the text encoder: tokens, the end token included."""
    context: int
    """Of the context encoder."""
    decoder: int
    """Of the decoder: context and timesteps together."""


@dataclass(frozen=True)
class Prediction:
    """What one parallel pass computes."""

    hidden: dict[str, Tensor]
    """By group of streams, what its head reads: `backbone` [n, T, 1, E], `local` [n, T, S, W]."""
    losses: dict[str, Tensor]
    """`experts`: NeMo's auxiliary loss of the routers, already weighted; none without experts."""
    metrics: dict[str, Tensor]
    """How the routers spread the positions; none without experts."""


class MagpieNetwork(nn.Module):
    """The trainable parts of a MagpieTTS model, with S streams per timestep and V ids each."""

    def __init__(self, model: MagpieTTSModel, *, local: bool) -> None:
        """Take NeMo's model; `local` says whether its local transformer predicts streams too."""
        super().__init__()
        self.model = model
        self.streams: int = model.num_audio_codebooks * model.frame_stacking_factor
        self.vocabulary: int = model.num_all_tokens_per_codebook
        self.begin_id: int = model.audio_bos_id
        self.local = local and model.local_transformer_type == LocalTransformerType.AR

    @property
    def positions(self) -> Positions:
        """The most positions of each part."""
        model = self.model
        return Positions(
            positions_of(model.encoder),
            positions_of(model.context_encoder),
            positions_of(model.decoder),
        )

    # Conditions

    def encode(self, conditions: Conditions, branches: int = 1) -> Encoded:
        """Encode text and context once; the unconditional branch needs neither.

        NeMo drops conditions by reading zeros: one position of text, and the whole context.
        """
        model = self.model
        valid = _valid(conditions.text_lengths, conditions.text.shape[1])
        embedded = model.embed_text(conditions.text, valid)
        memory = model.encoder(embedded, valid, cond=None, cond_mask=None)["output"]
        prefix, prefix_valid = self._context(conditions)
        if branches == 2:
            memory, prefix = (_with_zeros(x) for x in (memory, prefix))
            valid, prefix_valid = (x.repeat_interleave(2, 0) for x in (valid, prefix_valid))
        dropped = _dropped(conditions.unconditional, branches)
        first = torch.arange(valid.shape[1], device=valid.device) == 0
        keep = ~dropped[:, None, None]
        return Encoded(
            memory * keep, torch.where(dropped[:, None], first, valid), prefix * keep, prefix_valid
        )

    def context_positions(self, conditions: Conditions) -> Tensor:
        """Positions of the context of every row, [B] int64."""
        if conditions.context_lengths is not None:
            return conditions.context_lengths
        lengths: Tensor = self.model.baked_context_embedding_len
        return lengths.to(self.model.final_proj.weight.device)[conditions.speakers]

    def _context(self, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Return the context [B, P, E] and which of it counts [B, P]."""
        model = self.model
        if conditions.speakers is not None:
            flat = model.baked_context_embedding(conditions.speakers)
            baked = flat.unflatten(-1, (-1, model.cfg.decoder.d_model))
            lengths = self.context_positions(conditions)
            width = int(lengths.max())
            return baked[:, :width], _valid(lengths, width)
        assert conditions.context is not None
        assert conditions.context_lengths is not None
        valid = _valid(conditions.context_lengths, conditions.context.shape[1])
        embedded = self.embed(conditions.context) * valid.unsqueeze(-1)
        encoder: Any = model.context_encoder
        return encoder(embedded, valid, cond=None, cond_mask=None)["output"], valid

    def embed(self, codes: Tensor) -> Tensor:
        """Mean of the embeddings of stacked codes [..., S]: [..., E]."""
        embeddings = self.model.audio_embeddings
        total: Tensor = embeddings[0](codes[..., 0])
        for stream in range(1, self.streams):
            total = total + embeddings[stream](codes[..., stream])
        return total / self.streams

    # The parallel pass

    def forward(
        self,
        codes: Tensor,
        lengths: Tensor,
        conditions: Conditions,
        branches: int = 1,
        local: bool = True,
    ) -> Prediction:
        """Predict every timestep of codes [B, T, C] from those before it.

        `lengths` [B] int64; codes beyond them are never read. The first S streams are the history,
        the rest, where there are any, what the local transformer is fed. With two branches all
        results have 2 B rows. Without `local` the local transformer is left alone.
        """
        encoded = self.encode(conditions, branches)
        codes, lengths = (x.repeat_interleave(branches, 0) for x in (codes, lengths))
        valid = _valid(lengths, codes.shape[1])
        clean = torch.where(valid.unsqueeze(-1), codes, self.begin_id)
        x, mask, counted = self._inputs(clean[..., : self.streams], valid, encoded)
        memory_mask = encoded.memory_valid[:, None, None, :]
        routers = []
        for layer in self.model.decoder.layers:
            x = x + self_attention(layer, x, mask)
            x = x + cross_attention(layer, x, *text_memory(layer, encoded.memory), memory_mask)
            fed, router = feed_forward(layer, x, counted)
            x = x + fed
            if router is not None:
                routers.append(router)
        decoder = self.model.decoder
        hidden = decoder.dropout_out(decoder.norm_out(x[:, encoded.prefix.shape[1] :]))
        states = {"backbone": hidden.unsqueeze(-2)}
        if self.local and local:
            states["local"] = self._local_states(hidden, clean[..., self.streams :], valid)
        losses, metrics = self._router_terms(routers, counted)
        return Prediction(states, losses, metrics)

    def _inputs(
        self, codes: Tensor, valid: Tensor, encoded: Encoded
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lay context and timesteps in a row: x [n, P + T, E], mask [n, 1, ., .], counted."""
        begin = torch.full_like(codes[:, :1], self.begin_id)
        embedded = self.embed(torch.cat([begin, codes[:, :-1]], 1))
        counted = torch.cat([encoded.prefix_valid, valid], 1)
        # Timesteps follow a row's own context; the columns of a longer one's are left out.
        place = (counted.cumsum(1) - 1).clamp(min=0)
        decoder = self.model.decoder
        x = torch.cat([encoded.prefix, embedded], 1)
        if decoder.position_embeddings is not None:
            x = x + decoder.position_embeddings(place)
        return decoder.dropout(x), causal_mask(counted), counted

    def _local_states(self, hidden: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
        """States [n, T, S, W] of the local transformer from [n, T, E] and its codes [n, T, S].

        Its loss trains it, its heads and the embeddings, not the decoder (as in NeMo). Nothing is
        computed beyond the lengths.
        """
        model, rows = self.model, valid.nonzero(as_tuple=True)
        inputs = [hidden.detach()[rows]]
        fed = codes[rows]
        for stream in range(self.streams - 1):
            inputs.append(self._embed_stream(fed[:, stream], stream))
        x = model.local_transformer_in_projection(torch.stack(inputs, 1))
        ones = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        y = model.local_transformer(x, ones)["output"]
        y = model.local_transformer_audio_out_projection(y)
        states: Tensor = y.new_zeros(*valid.shape, *y.shape[1:]).index_put(rows, y)
        return states

    def _embed_stream(self, codes: Tensor, stream: int) -> Tensor:
        embedded: Tensor = self.model.audio_in_projection(
            self.model.audio_embeddings[stream](codes)
        )
        return embedded

    def _router_terms(
        self, routers: Sequence[Router], counted: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """NeMo's loss over all layers together, and what the log says of the routers."""
        if not routers:
            return {}, {}
        layers, mask = len(routers), counted.repeat(len(routers), 1)
        logits = torch.cat([router.logits for router in routers])
        probabilities = torch.cat([router.probabilities for router in routers])
        loss = self.model.moe_auxiliary_loss(
            router_logits=logits, router_probs=probabilities, x_mask=mask
        )[-1]
        with torch.no_grad():
            experts = torch.stack([router.experts for router in routers])[:, counted]
            visits = F.one_hot(experts.flatten(1), logits.shape[-1]).float().mean(1)
            entropy = torch.special.entr(probabilities.float()).sum(-1)[mask].mean()
        if torch.is_grad_enabled():
            loss = loss + self._nothing_of_the_unvisited(visits)
        least, most = visits.aminmax(dim=-1)
        metrics = {
            "expert_usage_min": least.sum() / layers,
            "expert_usage_max": most.sum() / layers,
        }
        return {"experts": loss}, metrics | {"router_entropy": entropy}

    def _nothing_of_the_unvisited(self, visits: Tensor) -> Tensor:
        """0 that depends on every expert without a visit, by visits [layers, X].

        Data parallel training waits for the gradients of all parameters, and NeMo leaves them out.
        """
        nothing = visits.new_zeros(())
        for layer, expert in (visits == 0).nonzero().tolist():
            for parameter in self.model.decoder.layers[layer].pos_ff.experts[expert].parameters():
                nothing = nothing + 0.0 * parameter.sum()
        return nothing

    # Heads

    def head_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the linear heads: by group of streams weight [S, V, D] and bias [S, V].

        In float32 at least: guidance would multiply what a head rounds in bfloat16.
        """
        final = self.model.final_proj
        shape = (self.streams, self.vocabulary)
        heads = {"backbone": (final.weight.view(*shape, -1), final.bias.view(*shape))}
        if self.local:
            projections = list(self.model.local_transformer_out_projections)
            weight = torch.stack([projection.weight for projection in projections])
            heads["local"] = weight, torch.stack([projection.bias for projection in projections])
        wide = torch.promote_types(final.weight.dtype, torch.float32)
        return {group: (x.to(wide), bias.to(wide)) for group, (x, bias) in heads.items()}

    # Incremental decoding

    def start(self, encoded: Encoded, timesteps: int) -> DecoderState:
        """Decode the context at once and make room for `timesteps` more."""
        decoder, x = self.model.decoder, encoded.prefix
        if decoder.position_embeddings is not None:
            x = x + decoder.position_embeddings.weight[: x.shape[1]]
        valid = encoded.prefix_valid
        mask = causal_mask(valid)
        memory_mask = encoded.memory_valid[:, None, None, :]
        states = []
        for layer in decoder.layers:
            keys, values = text_memory(layer, encoded.memory)
            y, cache = prefilled(layer, x, mask, timesteps)
            x = x + y
            x = x + cross_attention(layer, x, keys, values, memory_mask)
            x = x + feed_forward(layer, x, valid)[0]
            states.append(LayerState(cache, KVCache(keys.contiguous(), values.contiguous())))
        full = bool(valid.all())
        return DecoderState(
            states,
            additive(memory_mask, x.dtype),
            None if full else additive(valid[:, None, None, :], x.dtype),
            valid.sum(1),
        )

    def step(self, previous: Tensor, state: DecoderState) -> Tensor:
        """Decode one timestep after codes `previous` [n, S]: the decoder's output [n, E]."""
        decoder = self.model.decoder
        x = self.embed(previous)
        if decoder.position_embeddings is not None:
            x = x + decoder.position_embeddings(state.next_position)
        x, mask = x.unsqueeze(1), state.self_mask()
        for layer, held in zip(decoder.layers, state.layers, strict=True):
            x = x + self_step(layer, x, held.cache, mask)
            x = x + cross_attention(layer, x, *held.memory.view(), state.memory_mask)
            x = x + feed_step(layer, x)
        state.next_position = state.next_position + 1
        hidden: Tensor = decoder.norm_out(x[:, 0])
        return hidden

    def local_states(self, hidden: Tensor) -> Generator[Tensor, Tensor, None]:
        """Decode the streams of one timestep after `hidden` [n, E]; send back what each became.

        A generator: it yields the state [n, W] of a stream and is sent its codes [n] int64.
        """
        model, embedded = self.model, hidden
        transformer = model.local_transformer
        caches: list[KVCache] = []
        for stream in range(self.streams):
            x = model.local_transformer_in_projection(embedded)
            x = (x + transformer.position_embeddings.weight[stream]).unsqueeze(1)
            for number, layer in enumerate(transformer.layers):
                if stream == 0:
                    y, cache = prefilled(layer, x, None, self.streams)
                    caches.append(cache)
                else:
                    y = self_step(layer, x, caches[number], None)
                x = x + y
                x = x + feed_step(layer, x)
            state = model.local_transformer_audio_out_projection(transformer.norm_out(x[:, 0]))
            codes = yield state
            embedded = self._embed_stream(codes, stream)


def _valid(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def _with_zeros(values: Tensor) -> Tensor:
    """Let a row of zeros follow every row of [B, ...]: [2 B, ...]."""
    return torch.stack([values, torch.zeros_like(values)], 1).flatten(0, 1)


def _dropped(unconditional: Tensor, branches: int) -> Tensor:
    if branches == 1:
        return unconditional
    return torch.stack([unconditional, torch.ones_like(unconditional)], 1).flatten()
