"""Batches for training: the recording's own codes, or a store's rollouts with their targets.

Which sequences a batch holds is a pure function of the lengths, the seed and the position in the
run (`store.order`), so any batch size and any number of processes may continue a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.config import OptimizerConfig, TrainConfig
from stages.distributed import Place
from stages.errors import UserError
from stages.family import Family, Sample
from stages.losses import element_weights
from stages.targets import RestoredTarget, restore
from store import PredictionStore
from store.order import Order, rank_share

Key = tuple[str, int]


@dataclass(frozen=True)
class CodeBatch:
    """Recordings of a micro-batch, padded to the longest."""

    samples: Sequence[Sample]
    epochs: Sequence[int]
    """How often each sample was seen before; keys what is random about it."""
    codes: Tensor
    """[B, T, C] int64; what lies beyond a length is 0 and never read."""
    lengths: Tensor
    """[B] int64."""
    element_weights: Tensor
    """[B, T, C] float32: 1 for every prediction that counts, else 0."""

    @cached_property
    def weight(self) -> float:
        """Sum of the weights of the predictions."""
        return float(self.element_weights.sum())


@dataclass(frozen=True)
class TargetBatch:
    """Rollouts of a micro-batch with what the teacher predicted, padded to the longest."""

    samples: Sequence[Sample]
    codes: Tensor
    """[B, T, C] int64; what lies beyond a length is 0 and never read."""
    lengths: Tensor
    """[B] int64."""
    target: RestoredTarget
    """[B, T, C, ...]; NaN beyond a length, so that reading there shows."""
    element_weights: Tensor
    """[B, T, C] float32: the rollout's weight, 0 beyond its length."""

    @cached_property
    def weight(self) -> float:
        """Sum of the weights of the predictions."""
        return float(self.element_weights.sum())


class DatasetBatches:
    """Micro-batches of a dataset's own codes, for this process's share of every global batch."""

    def __init__(
        self,
        family: Family,
        samples: Sequence[Sample],
        config: OptimizerConfig,
        seed: int,
        place: Place,
    ) -> None:
        if not samples:
            raise UserError("the train split of the dataset is empty: prepare one with samples")
        self._samples, self._place, self._config = samples, place, config
        self._codes = [family.reference_codes(sample) for sample in samples]
        self._order = Order.of([np.array([len(codes) for codes in self._codes])], seed)

    def batches(self, position: int) -> list[CodeBatch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""
        epochs = (position + np.arange(self._config.batch_size)) // len(self._order)
        rows = self._order.take(position, self._config.batch_size)[:, 1]
        share = rank_share(np.stack([rows, epochs], 1), self._place.rank, self._place.world_size)
        return [self._batch(part) for part in _micro(share, self._config)]

    def _batch(self, share: np.ndarray) -> CodeBatch:
        """`share` is [B, 2]: index of the sample, epoch."""
        device = self._place.device
        codes = [self._codes[index] for index, _ in share]
        lengths = torch.tensor([len(c) for c in codes], device=device)
        padded = pad_sequence(codes, batch_first=True).to(device)
        ones = torch.ones(len(codes), device=device), torch.ones(padded.shape[2], device=device)
        return CodeBatch(
            samples=[self._samples[index] for index, _ in share],
            epochs=share[:, 1].tolist(),
            codes=padded,
            lengths=lengths,
            element_weights=element_weights(lengths, *ones, padded.shape[1]),
        )


class StoreBatches:
    """Micro-batches of a store's rollouts, for this process's share of every global batch."""

    def __init__(
        self, store: PredictionStore, config: TrainConfig, seed: int, place: Place
    ) -> None:
        self._store, self._place, self._config = store, place, config.optimizer
        self._order = Order.of(store.lengths(), seed, config.buffer_shards)

    def batches(self, position: int) -> list[TargetBatch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""
        place, config = self._place, self._config
        chosen = self._order.take(position, config.batch_size)
        share = rank_share(chosen, place.rank, place.world_size)
        return [
            rollout_batch(self._store, [self._key(*row) for row in part], place.device)
            for part in _micro(share, config)
        ]

    def _key(self, shard: int, row: int) -> Key:
        return self._store.plan[self._store.committed[shard]][row]


def _micro(share: np.ndarray, config: OptimizerConfig) -> Iterator[np.ndarray]:
    """Cut a process's share of a global batch into micro-batches; it may be empty."""
    size = config.micro_batch_size or max(len(share), 1)
    for start in range(0, len(share), size):
        yield share[start : start + size]


def rollout_batch(
    store: PredictionStore,
    keys: Sequence[Key],
    device: torch.device,
    heads: Mapping[str, Tensor] | None = None,
    scale: float | Tensor | None = None,
) -> TargetBatch:
    """Read rollouts of a store into one padded batch on `device`; `restore` says what else."""
    rollouts = [store[key] for key in keys]
    lengths = torch.tensor([len(r.codes) for r in rollouts], device=device)
    prefix = f"{store.manifest.target.kind}."
    arrays = {
        name.removeprefix(prefix): _pad([r.arrays[name] for r in rollouts])
        for name in rollouts[0].arrays
        if name.startswith(prefix)
    }
    codes = _pad([r.codes for r in rollouts]).long().to(device)
    weights = torch.tensor([r.weight for r in rollouts], device=device)
    streams = torch.ones(codes.shape[2], device=device)
    return TargetBatch(
        samples=[store.sample(sample_id) for sample_id, _ in keys],
        codes=codes,
        lengths=lengths,
        target=restore(arrays, store.manifest, heads, device, scale),
        element_weights=element_weights(lengths, weights, streams, codes.shape[1]),
    )


def rollout_batches(
    store: PredictionStore, keys: Sequence[Key], size: int, device: torch.device
) -> Iterator[TargetBatch]:
    """Yield the rollouts of `keys` in order, `size` at a time."""
    for start in range(0, len(keys), size):
        yield rollout_batch(store, keys[start : start + size], device)


def _pad(arrays: Sequence[np.ndarray]) -> Tensor:
    """Stack arrays [T, ...] of different lengths to [B, T, ...]; beyond is NaN, or id 0."""
    longest = max(len(array) for array in arrays)
    first = arrays[0]
    fill = np.nan if first.dtype.kind == "f" else 0
    padded = np.full((len(arrays), longest, *first.shape[1:]), fill, first.dtype)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return torch.from_numpy(padded)
