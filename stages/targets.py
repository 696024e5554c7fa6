"""What a loss reads: the forms that stored targets take in memory.

They are on whatever device the loss runs and keep the types of the store, so a batch of them is as
small as its bytes; `rows` lifts the few timesteps that a loss is about to read to float32.
`stages.reduction` is the way into the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from stages.errors import UserError
from stages.guidance import guide
from stages.sampling import keyed_generator
from stages.support import require_scale
from store.schema import Dense, Full, Hidden, Manifest, Sampled, TopK

LEAST_KEPT_MASS = 2.0**-24
"""What a tail that is everything leaves to the kept ids: half a step of float32 below 1."""


@dataclass(frozen=True)
class Forbidden:
    """The ids that are masked on both sides: no stream, or not every stream, can predict them."""

    ids: Tensor
    """[F] int64: forbidden in every stream."""
    beyond: Tensor | None
    """[C, V] bool: beyond the vocabulary of the stream; None where all streams have V ids."""

    @classmethod
    def of(cls, manifest: Manifest, device: torch.device | str) -> Forbidden:
        """Return what a manifest forbids, as tensors on `device`."""
        return cls.of_ids(manifest.forbidden, manifest.vocabularies, device)

    @classmethod
    def of_ids(
        cls, ids: tuple[int, ...], vocabularies: tuple[int, ...], device: torch.device | str
    ) -> Forbidden:
        """Return `ids`, and those beyond the vocabulary of each stream, as tensors on `device`."""
        return _forbidden(ids, vocabularies, torch.device(device))

    def filled(self, logits: Tensor, value: float = float("-inf")) -> Tensor:
        """Return logits [..., C, V] with `value` at the forbidden ids; themselves without any."""
        if len(self.ids):
            logits = logits.index_fill(-1, self.ids, value)
        return logits if self.beyond is None else logits.masked_fill(self.beyond, value)

    def fill_(self, logits: Tensor, value: float = float("-inf")) -> Tensor:
        """Put `value` at the forbidden ids of logits [..., C, V], in place."""
        if len(self.ids):
            logits.index_fill_(-1, self.ids, value)
        return logits if self.beyond is None else logits.masked_fill_(self.beyond, value)

    def allowed(self, logits: Tensor) -> Tensor:
        """Return how many ids of each stream are allowed, [C, 1] in the type of `logits`."""
        ones = torch.ones_like(logits[0])  # [C, V]
        return self.fill_(ones, 0.0).sum(-1, keepdim=True)


@cache
def _forbidden(
    ids: tuple[int, ...], vocabularies: tuple[int, ...], device: torch.device
) -> Forbidden:
    """Copied to the device once per process: a copy per block would wait for it every time."""
    with torch.inference_mode(False):  # so that training may use it too
        places = torch.tensor(ids, dtype=torch.int64, device=device)
        if min(vocabularies) == max(vocabularies):
            return Forbidden(places, None)
        sizes = torch.tensor(vocabularies).unsqueeze(-1)
        return Forbidden(places, (torch.arange(max(vocabularies)) >= sizes).to(device))


@dataclass(frozen=True)
class DenseTarget:
    """The teacher's whole guided distribution."""

    logits: Tensor
    """[..., C, V] of any floating dtype, up to a constant per row; -inf at forbidden ids."""
    levels: Tensor | None = None
    """[..., C] float32: the constants, where they are known."""

    def rows(self, index: Tensor) -> DenseTarget:
        """Return timesteps `index` [n] of the flattened [B, T], in float32 at least.

        With levels these are the logits themselves.
        """
        logits = _lifted(self.logits, index)
        if self.levels is not None:
            logits = logits + _lifted(self.levels, index).unsqueeze(-1)
        return DenseTarget(logits)


@dataclass(frozen=True)
class Mixture:
    """Both branches of what the teacher predicted, mixed when rows of them are read."""

    cond: Tensor
    """[B, T, ...] of any floating dtype."""
    other: Tensor
    """[B, T, ...], likewise: the unconditional branch, or `cond` minus it."""
    scale: Tensor
    """[B, T] float32: the guidance scale of every timestep."""
    differs: bool = False
    """Whether `other` is the difference."""

    def rows(self, index: Tensor) -> Tensor:
        """Return timesteps `index` [n] of the flattened [B, T], guided, in float32 at least."""
        cond, other = _lifted(self.cond, index), _lifted(self.other, index)
        scale = self.scale.flatten().index_select(0, index)
        uncond = cond - other if self.differs else other
        return guide(cond, uncond, scale[(...,) + (None,) * (cond.dim() - 1)])


@dataclass(frozen=True)
class BranchedTarget:
    """Both branches of the teacher's distribution."""

    logits: Mixture
    """Of [B, T, C, V], -inf at forbidden ids."""
    forbidden: Forbidden

    def rows(self, index: Tensor) -> DenseTarget:
        """Return the guided logits of timesteps `index` [n] of the flattened [B, T]."""
        return DenseTarget(self.forbidden.fill_(_lifted(self.logits, index)))


@dataclass(frozen=True)
class LinearHead:
    """The teacher's output head of one group of streams."""

    streams: tuple[int, ...]
    """The C_g places of the group on the axis C."""
    weight: Tensor
    """[C_g, V, D] float32."""
    bias: Tensor
    """[C_g, V] float32."""

    def logits(self, states: Tensor) -> Tensor:
        """Return logits [n, C_g, V] of states [n, H, D], H being 1 or C_g."""
        if states.shape[1] == 1:
            flat = torch.addmm(self.bias.flatten(), states[:, 0], self.weight.flatten(0, 1).T)
            return flat.view(states.shape[0], *self.bias.shape)
        by_stream = torch.bmm(states.transpose(0, 1), self.weight.transpose(1, 2))
        return by_stream.transpose(0, 1) + self.bias


@dataclass(frozen=True)
class HiddenTarget:
    """The states that the teacher's linear heads read; rows of them become a `DenseTarget`."""

    states: tuple[Tensor | Mixture, ...]
    """One [B, T, H, D] per head, guided or both branches: guidance commutes with a linear head."""
    heads: tuple[LinearHead, ...]
    forbidden: Forbidden

    def states_at(self, index: Tensor) -> tuple[Tensor, ...]:
        """Return the guided states [n, H, D] of every head, in float32 at least.

        `index` [n] are timesteps of the flattened [B, T].
        """
        return tuple(_lifted(states, index) for states in self.states)

    def rows(self, index: Tensor) -> DenseTarget:
        """Return the guided logits of timesteps `index` [n] of the flattened [B, T].

        Their last bits depend on n, for so do those of a matrix product.
        """
        device = index.device.type
        with torch.autocast(device, enabled=False):  # the heads multiply in float32
            parts = [
                head.logits(states)
                for head, states in zip(self.heads, self.states_at(index), strict=True)
            ]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        places = [place for head in self.heads for place in head.streams]
        if places != sorted(places):
            order = torch.tensor(places, device=index.device).argsort()
            logits = logits.index_select(1, order)
        return DenseTarget(self.forbidden.fill_(logits))


@dataclass(frozen=True)
class SparseTarget:
    """The teacher's likeliest ids, and the mass that lies outside them."""

    ids: Tensor
    """[..., C, K] of any integer dtype, rising."""
    logits: Tensor
    """[..., C, K] of any floating dtype, relative to the row maximum."""
    tail_logmass: Tensor
    """[..., C, temperatures] float32: log of the probability outside `ids`."""
    temperatures: tuple[float, ...]
    """The temperatures of `tail_logmass`."""
    moments: Tensor | None = None
    """[..., C, 2] float32: mean and standard deviation of all allowed logits, or None."""
    tail_ids: Tensor | None = None
    """[..., C, M]: ids drawn outside `ids` at temperature 1, or None."""

    def rows(self, index: Tensor) -> SparseTarget:
        """Return timesteps `index` [n] of the flattened [B, T]: ids int64, the rest float32."""
        return SparseTarget(
            _lifted(self.ids, index),
            _lifted(self.logits, index),
            _lifted(self.tail_logmass, index),
            self.temperatures,
            None if self.moments is None else _lifted(self.moments, index),
            None if self.tail_ids is None else _lifted(self.tail_ids, index),
        )

    def logprobs(self, temperature: float | Tensor) -> Tensor:
        """Return log-probabilities [..., C, K + 1] of the ids and, last, of all others together.

        `temperature` is that of all rows, or [..., C, 1] one of those stored for each. Raises
        `UserError` for a temperature whose tail was not stored: it cannot be recovered from the
        kept ids (the tail has as many shapes as there are temperatures).
        """
        # Rounding of two logsumexp may lift the mass of a tail that is nearly everything over 1.
        tail = self._tail(temperature).clamp_max(-LEAST_KEPT_MASS)
        plain = isinstance(temperature, float) and temperature == 1.0
        logits = self.logits if plain else self.logits / temperature
        kept = logits.log_softmax(-1).add_(log1mexp(tail))
        return torch.cat([kept, tail], -1)

    def _tail(self, temperature: float | Tensor) -> Tensor:
        """[..., C, 1] log of the probability outside `ids`."""
        if isinstance(temperature, Tensor):
            tail = self.tail_logmass[..., :1]
            for place, listed in enumerate(self.temperatures[1:], start=1):
                at_listed = self.tail_logmass[..., place : place + 1]
                tail = torch.where(temperature == listed, at_listed, tail)
            return tail
        if temperature not in self.temperatures:
            raise UserError(
                f"distillation temperature {temperature} is not among those the store keeps the "
                f"tail for, {list(self.temperatures)} (manifest.json, target.temperatures): train "
                "at one of these, or roll out again with this temperature listed"
            )
        return self.tail_logmass[..., self.temperatures.index(temperature), None]


@dataclass(frozen=True)
class SampledTarget:
    """Ids drawn from the teacher's guided distribution at temperature 1, without filters."""

    ids: Tensor
    """[..., C, N] of any integer dtype, rising with repeats."""

    def rows(self, index: Tensor) -> SampledTarget:
        """Return timesteps `index` [n] of the flattened [B, T], in int64."""
        return SampledTarget(_lifted(self.ids, index))


@dataclass(frozen=True)
class ContinuousTarget:
    """What the teacher predicted for continuous streams, guided."""

    values: Tensor | Mixture
    """[..., C, *shape] of any floating dtype, guided or both branches; of rows always guided."""

    def rows(self, index: Tensor) -> ContinuousTarget:
        """Return timesteps `index` [n] of the flattened [B, T], in float32 at least."""
        return ContinuousTarget(_lifted(self.values, index))


Rows = DenseTarget | SparseTarget | SampledTarget | ContinuousTarget
"""What `rows` returns: tensors [n, C, ...] that a loss computes with."""
RestoredTarget = Rows | BranchedTarget | HiddenTarget
"""What `restore` returns: tensors [B, T, C, ...] as small as in the store."""


def _lifted(values: Tensor | Mixture, index: Tensor) -> Tensor:
    """Rows of [B, T, ...] by their place in B·T: int64, or a float of 32 bits at least."""
    if isinstance(values, Mixture):
        return values.rows(index)
    taken = values.flatten(0, 1).index_select(0, index)
    if not taken.is_floating_point():
        return taken.long()
    return taken.float() if taken.itemsize < 4 else taken


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0 without cancellation (Mächler, 2012)."""
    return torch.where(x > -0.6931, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def restore(
    arrays: Mapping[str, np.ndarray | Tensor],
    manifest: Manifest,
    heads: Mapping[str, Tensor] | None,
    device: torch.device | str,
    scale: float | Tensor | None = None,
) -> RestoredTarget:
    """Turn stored arrays [B, T, ...] (without target prefix) into the form a loss reads.

    `heads` are those of a `hidden` store, loaded once by `load_heads`. With `branches: both`,
    `scale` is the guidance scale to mix at, one number or one per rollout [B]; the result equals
    what a store written at that scale holds, up to a constant per row and what rounding the
    branches costs: at most (|s| + |1 - s| + 1)·u·m per logit, where m is the largest stored
    magnitude and u is 2^-11 for float16 and 2^-22 for float32 (whose logits are differences
    already). For `hidden` the same holds of the states. Raises `UserError` for a scale where the
    store holds guided targets, and for none where it holds both branches.
    """
    require_scale(manifest.branches, manifest.guidance.scale, scale is not None)
    tensors = {
        name: torch.as_tensor(values).to(device, non_blocking=True)
        for name, values in arrays.items()
    }
    match manifest.target:
        case TopK() as target:
            return SparseTarget(
                tensors["ids"],
                tensors["logits"],
                tensors["tail_logmass"],
                target.temperatures,
                tensors.get("moments"),
                tensors.get("tail_ids"),
            )
        case Sampled():
            return SampledTarget(tensors["ids"])
        case Full():
            return _full(tensors, Forbidden.of(manifest, device), scale)
        case Hidden():
            return _hidden(tensors, manifest, heads or {}, Forbidden.of(manifest, device), scale)
        case Dense():
            return _dense(tensors, scale)


Tensors = Mapping[str, Tensor]
Scale = float | Tensor | None


def _full(tensors: Tensors, forbidden: Forbidden, scale: Scale) -> DenseTarget | BranchedTarget:
    if scale is None:
        return DenseTarget(tensors["logits"], tensors.get("levels"))
    cond, uncond = tensors["cond"], tensors["uncond"]
    return BranchedTarget(Mixture(cond, uncond, _scales(scale, cond)), forbidden)


def _hidden(
    tensors: Tensors, manifest: Manifest, heads: Tensors, forbidden: Forbidden, scale: Scale
) -> HiddenTarget:
    groups = [head.group for head in manifest.heads]
    states = tuple(_states(tensors, group, scale) for group in groups)
    linear = tuple(_linear_head(manifest, group, heads) for group in groups)
    return HiddenTarget(states, linear, forbidden)


def _states(tensors: Tensors, group: str, scale: Scale) -> Tensor | Mixture:
    if scale is None:
        return tensors[group]
    cond, uncond = tensors[f"cond.{group}"], tensors[f"uncond.{group}"]
    return Mixture(cond, uncond, _scales(scale, cond))


def _dense(tensors: Tensors, scale: Scale) -> ContinuousTarget:
    if scale is None:
        return ContinuousTarget(tensors["guided"])
    cond = tensors["cond"]
    return ContinuousTarget(Mixture(cond, tensors["delta"], _scales(scale, cond), differs=True))


def _scales(scale: float | Tensor, like: Tensor) -> Tensor:
    """[B, T] float32: one scale for all rollouts, or each its own."""
    scales = torch.as_tensor(scale, dtype=torch.float32, device=like.device)
    return scales.reshape(-1, 1).expand(like.shape[:2])


def _linear_head(manifest: Manifest, group: str, heads: Mapping[str, Tensor]) -> LinearHead:
    places = tuple(i for i, stream in enumerate(manifest.streams) if stream.group == group)
    return LinearHead(places, heads[f"{group}.weight"], heads[f"{group}.bias"])


def load_heads(heads: Mapping[str, np.ndarray], device: torch.device | str) -> dict[str, Tensor]:
    """Copy the heads of a store, `GROUP.weight` and `GROUP.bias`, to `device`."""
    return {name: torch.tensor(values, device=device) for name, values in heads.items()}


def read_scales(
    setting: float | tuple[float, float] | None,
    seed: int,
    keys: Sequence[tuple[str | int, ...]],
    epochs: Sequence[int],
) -> Tensor | None:
    """Return the guidance scale [B] float32 at which each rollout of a batch is read, or None.

    A range (low, high) draws one uniformly per rollout and epoch, keyed by (seed, *key, epoch):
    neither the batch nor the process changes it. A key is (sample_id, variation), or that of a row.
    """
    if setting is None:
        return None
    if not isinstance(setting, tuple):
        return torch.full((len(keys),), setting)
    low, high = setting
    drawn = [
        keyed_generator(seed, "guidance scale", *key, epoch).random()
        for key, epoch in zip(keys, epochs, strict=True)
    ]
    return torch.tensor([low + (high - low) * share for share in drawn])
