"""Batches for training: the recording's own codes, or a store's rollouts with their targets.

Which sequences a batch holds is a pure function of the lengths, the seed and the position in the
run (`store.order`), so any batch size and any number of processes may continue a run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from stages.config import OptimizerConfig, TrainConfig
from stages.distributed import Place
from stages.errors import UserError
from stages.family import Family, Predicted, Sample
from stages.host_batches import HostBatch, Span, TargetBatch, host_batch, restored_batch
from stages.host_memory import HostMemory
from stages.loader import Loader
from stages.loss_config import Mean
from stages.losses import element_weights
from stages.sample_checks import require_taught
from stages.targets import load_heads, read_scales
from store import PredictionStore
from store.order import Array, Order, rank_share
from store.plan import Key, Plan


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
    """[B, T, C] float32: 1 for every code that is predicted, else 0."""

    @cached_property
    def weight(self) -> float:
        """Sum of the weights of the predictions."""
        return float(self.element_weights.sum())


class DatasetBatches:
    """Micro-batches of a dataset's own codes, for this process's share of every global batch.

    Raises `UserError` for a sample that has nothing to learn from.
    """

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
        for sample, codes in zip(samples, self._codes, strict=True):
            require_taught(family, sample, codes)
        self._predicted = family.predicted
        self._order = Order.of([np.array([len(codes) for codes in self._codes])], seed)

    def batches(self, position: int) -> list[CodeBatch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""
        epochs = (position + np.arange(self._config.batch_size)) // len(self._order)
        rows = self._order.take(position, self._config.batch_size)[:, 1]
        share = rank_share(np.stack([rows, epochs], 1), self._place.rank, self._place.world_size)
        return [self._batch(part) for part in _micro(share, self._config.micro_batch_size)]

    def _batch(self, share: np.ndarray) -> CodeBatch:
        """`share` is [B, 2]: index of the sample, epoch."""
        device = self._place.device
        codes = [self._codes[index] for index, _ in share]
        lengths = torch.tensor([len(c) for c in codes])
        padded = pad_sequence(codes, batch_first=True)
        ones = torch.ones(len(codes)), torch.ones(padded.shape[2])
        predicted = None if self._predicted is None else self._predicted(padded)
        weights = element_weights(lengths, *ones, padded.shape[1], predicted)
        return CodeBatch(
            samples=[self._samples[index] for index, _ in share],
            epochs=share[:, 1].tolist(),
            codes=padded.to(device),
            lengths=lengths.to(device),
            element_weights=weights.to(device),
        )


@dataclass(frozen=True)
class BatchReader:
    """Reads one process's micro-batches of a store; with it, it may travel to other processes."""

    store: PredictionStore
    order: Order
    """Over the shards that are committed in `store`."""
    batch_size: int
    micro_batch_size: int | None
    rank: int
    world_size: int
    memory: HostMemory
    """Where batches are read into."""
    mean: Mean = "predictions"
    """Over what the loss of a batch is a mean."""
    groups: frozenset[str] | None = None
    """The groups of streams whose predictions count; None for all."""
    predicted: Predicted | None = None
    """What tells which of their codes are predicted; None where all are."""

    def __call__(self, position: int) -> list[HostBatch]:
        """Return the micro-batches of the global batch that starts at `position`.

        Raises `UserError` where nothing of the global batch has a weight, or a rollout has nothing
        that is predicted.
        """
        rollouts = self.order.take(position, self.batch_size)
        epochs = self.order.epochs(position, self.batch_size)
        batch = np.column_stack([rollouts, epochs])
        share = rank_share(batch, self.rank, self.world_size)
        batches = [self._read(part) for part in _micro(share, self.micro_batch_size)]
        if self.store.is_remote:
            self._expect(position + self.batch_size)
        if not any(batch.arrays["weights"].any() for batch in batches):
            self._require_weight(rollouts)
        return batches

    def _expect(self, position: int) -> None:
        """Have the shards downloaded that will be read from `position` on."""
        following = self.order.take(position, self.order.longest_buffer)
        places = dict.fromkeys(following[:, 0].tolist())
        self.store.expect([self.store.committed[place] for place in places])

    def _require_weight(self, rollouts: Array) -> None:
        """Refuse a global batch [n, 2] whose rollouts weigh nothing, also those of other ranks."""
        shards = [self.store.committed[place] for place in rollouts[:, 0].tolist()]
        rows = rollouts[:, 1].tolist()
        tables = {shard: self.store.rollout_table(shard) for shard in dict.fromkeys(shards)}
        if any(tables[shard].weights.item(row) for shard, row in zip(shards, rows, strict=True)):
            return
        sample_id, variation = self.store.plan[shards[0]][rows[0]]
        reason = tables[shards[0]].stop_reasons[rows[0]]
        raise UserError(
            f"a batch of {len(rows)} rollouts has nothing to learn from, for all of them weigh 0: "
            f"the first, {sample_id!r} variation {variation}, ended by {reason!r}. Raise "
            "optimizer.batch_size, or roll out again with weights above 0 in rollout.sampler"
        )

    def _read(self, part: Array) -> HostBatch:
        """`part` is [B, 3]: place of the shard, row in the shard, epoch."""
        shards = [self.store.committed[place] for place in part[:, 0].tolist()]
        held = {shard: self.store.shard(shard) for shard in dict.fromkeys(shards)}
        rows, epochs = part[:, 1].tolist(), part[:, 2].tolist()
        spans = [Span.of_shard(held[s], row) for s, row in zip(shards, rows, strict=True)]
        samples = self.store.samples_at(shards, rows)
        return host_batch(
            self.store.manifest, spans, samples, epochs, self.memory, self.mean, self.groups,
            self.predicted,
        )  # fmt: skip


class StoreBatches:
    """Micro-batches of a store's rollouts, for this process's share of every global batch.

    They are read ahead as `config.loader` says; `close` ends that. Only predictions of the streams
    of `groups` count, where they are given, and of their codes those that `predicted` marks.
    """

    def __init__(
        self,
        store: PredictionStore,
        config: TrainConfig,
        seed: int,
        place: Place,
        groups: Collection[str] | None = None,
        predicted: Predicted | None = None,
    ) -> None:
        self._manifest, self._device = store.manifest, place.device
        loss = config.loss.terms_config
        self._scale, self._seed = loss.guidance_scale, seed
        self._heads = _heads(store, place.device)
        samples = planned_samples(store.plan, store.committed)
        silent = None if place.rank == 0 else True
        bar = partial(tqdm, unit="shard", desc="lengths", leave=False, disable=silent)
        order = Order.of(
            store.lengths(bar),
            seed,
            config.buffer_shards,
            config.neighbours,
            samples if config.variations == "one" else None,
        )
        pin = config.loader.pin_memory and place.device.type == "cuda"
        reader = BatchReader(
            store,
            order,
            config.optimizer.batch_size,
            config.optimizer.micro_batch_size,
            place.rank,
            place.world_size,
            # A process has no device to pin memory for.
            HostMemory(pin=pin and not config.loader.workers),
            loss.mean,
            None if groups is None else frozenset(groups),
            predicted,
        )
        self._loader = Loader(
            reader, config.loader, config.optimizer.batch_size, _pinned if pin else None
        )

    def batches(self, position: int) -> list[HostBatch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""
        return self._loader[position]

    def restored(self, batch: HostBatch, groups: Collection[str] | None = None) -> TargetBatch:
        """Move a micro-batch to the device: one at a time, or they would be there together.

        Of its streams those of `groups` are kept, where they are given.
        """
        scale = read_scales(self._scale, self._seed, batch.keys, batch.epochs)
        return restored_batch(batch, self._manifest, self._heads, self._device, scale, groups)

    def close(self) -> None:
        """End the thread or the processes that read ahead."""
        self._loader.close()


def _pinned(batches: list[HostBatch]) -> list[HostBatch]:
    return [batch.pin_memory() for batch in batches]


def planned_samples(plan: Plan, shards: Sequence[int]) -> Array:
    """Return the number of the sample of every rollout of some shards, [R] int64."""
    parts = [plan.samples[plan.starts[shard] : plan.starts[shard + 1]] for shard in shards]
    return np.concatenate(parts).astype(np.int64)


def _heads(store: PredictionStore, device: torch.device) -> dict[str, Tensor] | None:
    return load_heads(store.heads, device) if store.manifest.heads else None


def _micro(share: np.ndarray, micro_batch_size: int | None) -> Iterator[np.ndarray]:
    """Cut a process's share of a global batch into micro-batches; it may be empty."""
    size = micro_batch_size or max(len(share), 1)
    for start in range(0, len(share), size):
        yield share[start : start + size]


def rollout_batches(
    store: PredictionStore,
    keys: Sequence[Key],
    size: int,
    device: torch.device,
    groups: Collection[str] | None = None,
    predicted: Predicted | None = None,
) -> Iterator[TargetBatch]:
    """Yield the rollouts of `keys` in order, `size` at a time.

    Branches that are stored apart are mixed at the scale at which the codes were drawn. Of the
    streams those of `groups` are kept, where they are given; of their codes those count that
    `predicted` marks.
    """
    manifest, heads, memory = store.manifest, _heads(store, device), HostMemory()
    scale = manifest.guidance.scale if manifest.branches == "both" else None
    for start in range(0, len(keys), size):
        rollouts = [store[key] for key in keys[start : start + size]]
        samples = store.samples_of([rollout.sample_id for rollout in rollouts])
        spans = [Span.of(rollout) for rollout in rollouts]
        batch = host_batch(
            manifest, spans, samples, [0] * len(spans), memory, groups=groups, predicted=predicted
        )
        yield restored_batch(batch, manifest, heads, device, scale, groups)
