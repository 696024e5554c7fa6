"""A language model of transformers' as a decoder of audio codes: one pass, or a token at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from stages.architecture import Architecture, parameters_by_part, product_flops
from stages.families.hugging_face import Cache, CacheLayerMixin, PreTrainedModel
from stages.families.weights import project
from stages.modules.attention import Departure, KVCache, causal_mask
from stages.slot_layout import SlotLayout

PROBE = 4
"""Tokens on which a model's own logits are compared with those of its head."""


class CausalLMNetwork(nn.Module):
    """A causal language model whose head is applied to the ids that each slot can have.

    `model` is transformers' own, possibly with adapters in its layers. With `full` the head gives
    all ids of the model, in every slot.
    """

    columns: Tensor

    def __init__(self, model: PreTrainedModel, layout: SlotLayout, *, full: bool) -> None:
        super().__init__()
        self.model = model
        self.layout, self.full = layout, full
        columns = torch.stack([layout.columns(slot) for slot in range(layout.slots)])
        self.register_buffer("columns", columns, persistent=False)

    @property
    def decoder(self) -> PreTrainedModel:
        """The model without its head."""
        return self.model.get_decoder()

    @property
    def head(self) -> nn.Linear:
        """The output head over all ids."""
        return cast("nn.Linear", self.model.get_output_embeddings())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def vocabulary(self) -> int:
        """V: codes of a stream."""
        return self.head.weight.shape[0] if self.full else self.columns.shape[1]

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight [S, V, D] and bias [S, V] of each slot's codes, with gradients."""
        weight, bias, slots = self.head.weight, self.head.bias, self.layout.slots
        if self.full:
            whole = weight.expand(slots, -1, -1)
            return whole, None if bias is None else bias.expand(slots, -1)
        flat = self.columns.flatten()
        rows = weight.index_select(0, flat).view(*self.columns.shape, -1)
        return rows, None if bias is None else bias[self.columns]

    def layout_ids(self, codes: Tensor) -> Tensor:
        """Ids [T, S] of codes [T, S]."""
        return codes if self.full else self.layout.to_vocabulary(codes)

    def adopt_codebooks(self, vectors: Tensor) -> None:
        """Let codes of near `vectors` [S, codes, D] have rows that are near, of their usual size.

        Rows of audio ids become random projections of the vectors, drawn from the global generator:
        one for the input, and another for the output where the model does not tie the two.
        """
        size = vectors.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
        rows = self.columns[:, : vectors.shape[1]]
        tables = {id(table): table for table in (self._embedding.weight, self.head.weight)}
        for table in tables.values():
            drawn = project(vectors / size, table.shape[1])
            with torch.no_grad():
                table[rows] = drawn * self.model.config.initializer_range

    @property
    def _embedding(self) -> nn.Embedding:
        return cast("nn.Embedding", self.model.get_input_embeddings())

    def slot_ids(self, codes: Tensor, slot: int) -> Tensor:
        """Ids [n] of codes [n] of one slot."""
        return codes if self.full else self.columns[slot][codes]

    def forward(self, ids: Tensor, before: Tensor, count: int) -> Tensor:
        """States [n, count, D] that predict the tokens behind `before` [n] of ids [n, L].

        Rows are padded on the right: a causal model never sees what follows. States behind a row's
        own ids mean nothing.
        """
        hidden: Tensor = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        places = before[:, None] - 1 + torch.arange(count, device=ids.device)
        places = places.clamp(max=ids.shape[1] - 1)
        return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def start(self, prompts: Sequence[Tensor], tokens: int) -> Decoding:
        """Read prompts [P] each and return the state for `step`, with room for so many tokens."""
        return Decoding(self.decoder, prompts, tokens, self.device)


class Decoding:
    """What decoding remembers: keys, values and mask of every row, and its next position."""

    def __init__(
        self, decoder: PreTrainedModel, prompts: Sequence[Tensor], tokens: int, device: torch.device
    ) -> None:
        self._decoder = decoder
        layers = decoder.config.num_hidden_layers
        self._layers = [_RowsLayer(tokens) for _ in range(layers)]
        self._cache = Cache(layers=self._layers)
        lengths = torch.tensor([len(prompt) for prompt in prompts]).to(device)
        ids = pad_sequence(list(prompts), batch_first=True, padding_side="left").to(device)
        width = ids.shape[1]
        places = torch.arange(width, device=device) - (width - lengths[:, None])
        padded = len({len(prompt) for prompt in prompts}) > 1
        self._valid = places >= 0 if padded else None
        self._next = lengths
        mask = None if self._valid is None else causal_mask(self._valid)
        self.tokens = 0
        """Tokens read after the prompts."""
        self.hidden = self._decode(ids, places.clamp(min=0), mask)
        """[n, D]: what predicts the next token of each row."""

    def step(self, ids: Tensor) -> None:
        """Read the next token of each row, ids [n]."""
        mask = None
        if self._valid is not None:
            length = self._layers[0].get_seq_length() + 1
            missing = length - self._valid.shape[1]
            self._valid = functional.pad(self._valid, (0, missing), value=True)
            mask = self._valid[:, None, None, :]
        self.hidden = self._decode(ids.unsqueeze(1), self._next.unsqueeze(1), mask)
        self._next = self._next + 1
        self.tokens += 1

    def drop(self, departure: Departure) -> None:
        """Keep the rows that still run."""
        for layer in self._layers:
            layer.drop(departure)
        self._next, self.hidden = departure.kept(self._next), departure.kept(self.hidden)
        if self._valid is not None:
            self._valid = departure.kept(self._valid)

    def _decode(self, ids: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        decoded = self._decoder(
            input_ids=ids, position_ids=places, attention_mask=mask, cache=self._cache,
            use_cache=True,
        )  # fmt: skip
        hidden: Tensor = decoded.last_hidden_state[:, -1]
        return hidden


class _RowsLayer(CacheLayerMixin):  # type: ignore[misc] # where the package is not checked
    """Keys and values of one layer in memory that is allocated once, from which rows may leave.

    Attention reads views of what is there, and finished rows cost nothing: transformers' static
    layer attends over its whole room, and keeps its rows.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._kept: KVCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold the prompt, with room for the tokens to come."""
        self._kept = KVCache.with_room(key_states, value_states, self._room)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [n, H, L, D], L being 1 after the prompt; return all there are."""
        if self._kept is None:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        self._kept.append(key_states, value_states)
        return self._kept.view()

    def drop(self, departure: Departure) -> None:
        """Keep the rows that still run."""
        if self._kept is not None:
            self._kept.drop(departure)

    def get_seq_length(self) -> int:
        """Tokens that are there."""
        return 0 if self._kept is None else self._kept.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that are there after so many more, and how many are left out before them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return that there is no limit: the memory grows where it was asked for too little."""
        return -1


def packed(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Join the parts of each row to ids [n, L], padded on the right."""
    return pad_sequence([torch.cat(list(row)) for row in rows], batch_first=True)


@torch.no_grad()
def head_error(model: PreTrainedModel) -> float:
    """Largest difference of a model's own logits from its head times its states, on a few ids."""
    head = model.get_output_embeddings()
    ids = torch.arange(PROBE, device=head.weight.device).unsqueeze(0)
    own = model(input_ids=ids, use_cache=False).logits
    ours = head(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    return float((own - ours).abs().max() / own.abs().max().clamp(min=1e-6))


def architecture_of(network: CausalLMNetwork) -> Architecture:
    """How large a network is and what decoding a timestep, S tokens of it, costs."""
    decoder = network.decoder
    parts = parameters_by_part((_part(name), x.numel()) for name, x in network.named_parameters())
    matrices = [
        (layer.in_features, layer.out_features)
        for layer in decoder.modules()
        if isinstance(layer, nn.Linear)
    ]
    head = (network.head.weight.shape[1], network.vocabulary)
    flops = network.layout.slots * product_flops(*matrices, head)
    total = sum(parts.values())
    return Architecture(
        parameters=total, parts=parts, active_parameters=total,
        flops_per_timestep=flops, dense_flops_per_timestep=flops,
    )  # fmt: skip


def _part(name: str) -> str:
    """Part of the model that a parameter belongs to, below the wrappers of whole models."""
    if ".lora_" in name:
        return "adapters"
    *_, part = re.split(r"(?:^|\.)(?:base_model|model)(?=\.)", name)
    return part.removeprefix(".")
