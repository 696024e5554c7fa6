"""A language model of transformers' as a decoder of audio codes: one pass, or a token at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from stages.architecture import Architecture, parameters_by_part, product_flops
from stages.families.hugging_face import Cache, CacheLayerMixin, DynamicCache, PreTrainedModel
from stages.families.weights import project
from stages.modules.attention import Departure, KVCache, additive, causal_mask
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

    def start(self, prompts: Sequence[Tensor], branches: int, tokens: int) -> Decoding:
        """Read prompts [P] each and return the state for `step`, with room for so many tokens.

        Those of a row's branches follow each other.
        """
        parts = [_Read.of(self.decoder, prompts[i::branches], self.device) for i in range(branches)]
        return Decoding(self.decoder, parts, tokens)


@dataclass(frozen=True)
class _Read:
    """Prompts of one branch, read together: those without conditions are far shorter."""

    lengths: Tensor
    """[m] int64: ids of each prompt, which are the last of those that were read."""
    hidden: Tensor
    """[m, D]: what predicts the first token after each."""
    layers: Sequence[tuple[Tensor, Tensor]]
    """Keys and values of every layer, [m, H, L, D] each."""

    @classmethod
    def of(cls, decoder: PreTrainedModel, prompts: Sequence[Tensor], device: torch.device) -> _Read:
        lengths = torch.tensor([len(prompt) for prompt in prompts]).to(device)
        ids = pad_sequence(list(prompts), batch_first=True, padding_side="left").to(device)
        places = torch.arange(ids.shape[1], device=device) - (ids.shape[1] - lengths[:, None])
        padded = len({len(prompt) for prompt in prompts}) > 1
        cache = DynamicCache()
        decoded = decoder(
            input_ids=ids, position_ids=places.clamp(min=0), cache=cache, use_cache=True,
            attention_mask=causal_mask(places >= 0) if padded else None,
        )  # fmt: skip
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        return cls(lengths, decoded.last_hidden_state[:, -1], layers)

    @property
    def width(self) -> int:
        """L: ids that were read of each."""
        return self.layers[0][0].shape[2]


class Decoding:
    """What decoding remembers: keys, values and mask of every row, and its next position."""

    def __init__(self, decoder: PreTrainedModel, parts: Sequence[_Read], tokens: int) -> None:
        self._decoder = decoder
        width = max(part.width for part in parts)
        by_layer = zip(*(part.layers for part in parts), strict=True)
        self._layers = [_RowsLayer.of(layers, width, tokens) for layers in by_layer]
        self._cache = Cache(layers=self._layers)
        self._next = _alternating([part.lengths for part in parts])
        places = torch.arange(width, device=self._next.device)
        valid = places >= width - self._next[:, None]
        padded = len({part.width for part in parts}) > 1 or not bool(valid.all())
        # Added to the scores: torch would make that of a mask of truth values in every layer.
        self._mask = additive(valid, decoder.dtype) if padded else None
        self.tokens = 0
        """Tokens read after the prompts."""
        self.hidden = _alternating([part.hidden for part in parts])
        """[n, D]: what predicts the next token of each row."""

    def step(self, ids: Tensor) -> None:
        """Read the next token of each row, ids [n]."""
        if self._mask is not None:
            self._mask = functional.pad(self._mask, (0, 1))
        decoded = self._decoder(
            input_ids=ids.unsqueeze(1), position_ids=self._next.unsqueeze(1), cache=self._cache,
            use_cache=True,
            attention_mask=None if self._mask is None else self._mask[:, None, None, :],
        )  # fmt: skip
        self.hidden = decoded.last_hidden_state[:, -1]
        self._next = self._next + 1
        self.tokens += 1

    def drop(self, departure: Departure) -> None:
        """Keep the rows that still run."""
        for layer in self._layers:
            layer.drop(departure)
        self._next, self.hidden = departure.kept(self._next), departure.kept(self.hidden)
        if self._mask is not None:
            self._mask = departure.kept(self._mask)


def _alternating(parts: Sequence[Tensor]) -> Tensor:
    """Rows [n · m, ...] that take turns between n parts [m, ...]."""
    return torch.stack(list(parts), 1).flatten(0, 1)


class _RowsLayer(CacheLayerMixin):  # type: ignore[misc] # where the package is not checked
    """Keys and values of one layer in memory that is allocated once, from which rows may leave.

    Attention reads views of what is there, and finished rows cost nothing: transformers' static
    layer attends over its whole room, and keeps its rows.
    """

    def __init__(self, kept: KVCache) -> None:
        super().__init__()
        self._kept = kept

    @classmethod
    def of(cls, parts: Sequence[tuple[Tensor, Tensor]], width: int, tokens: int) -> _RowsLayer:
        """Hold the prompts of all branches, padded on the left to `width`, with room for tokens."""
        keys, values = [
            _alternating([functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in tensors])
            for tensors in zip(*parts, strict=True)
        ]
        return cls(KVCache.with_room(keys, values, tokens))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the prompts are there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [n, H, 1, D] of one token; return all there are."""
        self._kept.append(key_states, value_states)
        return self._kept.view()

    def drop(self, departure: Departure) -> None:
        """Keep the rows that still run."""
        self._kept.drop(departure)

    def get_seq_length(self) -> int:
        """Tokens that are there."""
        return self._kept.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that are there after so many more, and how many are left out before them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return that there is no limit: the memory grows where it was asked for too little."""
        return -1


def joined(prompts: Sequence[Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Put tokens [n, N] behind prompts [P] each, all but the last, where nobody waits for them.

    Returns ids [n, L], of which those behind a row's own mean nothing, and the ids of each prompt
    [n], both on the device of the tokens.
    """
    device = tokens.device
    before = torch.tensor([len(prompt) for prompt in prompts]).to(device, non_blocking=True)
    padded = pad_sequence(list(prompts), batch_first=True).to(device, non_blocking=True)
    places = torch.arange(padded.shape[1] + tokens.shape[1] - 1, device=device)
    behind = places - before[:, None]
    spoken = tokens.gather(1, behind.clamp(0, tokens.shape[1] - 1))
    said = padded[:, places.clamp(max=padded.shape[1] - 1)]
    return torch.where(behind < 0, said, spoken), before


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
    parts = parameters_by_part(_sizes(network))
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


def _sizes(network: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield every parameter's part of the model, and how many numbers it stands for.

    The weight of a quantized layer is packed, so its shape says nothing.
    """
    for name, parameter in network.named_parameters():
        layer = network.get_submodule(name.rpartition(".")[0])
        size = parameter.numel()
        if isinstance(layer, nn.Linear) and name.endswith(".weight"):
            size = layer.in_features * layer.out_features
        yield _part(name), size


def _part(name: str) -> str:
    """Part of the model that a parameter belongs to, below the wrappers of whole models."""
    if ".lora_" in name:
        return "adapters"
    *_, part = re.split(r"(?:^|\.)(?:base_model|model)(?=\.)", name)
    return part.removeprefix(".")
