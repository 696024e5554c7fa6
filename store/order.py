"""In which order training reads rollouts: pure functions of a few integers.

The order of an epoch depends on the lengths of the rollouts, the seed and the epoch, on nothing
else: any batch size, world size or number of workers walks the same sequence, and a run resumes
from the seed and the number of rollouts taken. Random keys are raw Philox output, which numpy
promises never to change (its shuffles it may).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np

from store.schema import require

Array = np.ndarray[Any, np.dtype[np.int64]]

BUFFER_SHARDS = 4
NEIGHBOURS = 64


@dataclass(frozen=True, eq=False)
class Order:
    """The infinite sequence of rollouts that training reads."""

    lengths: tuple[Array, ...]
    """Timesteps of every rollout, one [R] array per committed shard."""
    seed: int
    buffer_shards: int = BUFFER_SHARDS
    """Shards whose rollouts are mixed; a reader holds this many in memory."""
    neighbours: int = NEIGHBOURS
    """Rollouts of similar length that stay together, in shuffled runs."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[Array],
        seed: int,
        buffer_shards: int = BUFFER_SHARDS,
        neighbours: int = NEIGHBOURS,
    ) -> Self:
        """Order over `PredictionStore.lengths()`; raises ValueError for counts below 1."""
        require(buffer_shards >= 1, "buffer_shards", buffer_shards, ">= 1", "use 1 to mix least")
        require(neighbours >= 1, "neighbours", neighbours, ">= 1", "use 1 to ignore lengths")
        total = sum(map(len, lengths))
        require(total >= 1, "number of rollouts", total, ">= 1", "commit a shard first")
        return cls(tuple(lengths), seed, buffer_shards, neighbours)

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.lengths)

    def epoch(self, epoch: int) -> Array:
        """[R, 2] int64 (index into `committed`, row in that shard): every rollout once."""
        return _epoch(self, epoch)

    def take(self, start: int, count: int) -> Array:
        """[count, 2] rollouts `start` to `start + count` of all epochs laid end to end.

        Global batch `step` of size B is `take(step * B, B)`; it may span two epochs.
        """
        parts = []
        while count > 0:
            epoch, position = divmod(start, len(self))
            part = self.epoch(epoch)[position : position + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)


def rank_share(batch: Array, rank: int, world_size: int) -> Array:
    """Rows of a global batch that one rank takes: every `world_size`-th from `rank`."""
    require(0 <= rank < world_size, "rank", rank, f"in [0, {world_size})", "pass torchrun's RANK")
    return batch[rank::world_size]


@lru_cache(maxsize=2)
def _epoch(order: Order, epoch: int) -> Array:
    shards = _shuffled(len(order.lengths), order.seed, epoch, 0)
    buffers = [
        shards[start : start + order.buffer_shards]
        for start in range(0, len(shards), order.buffer_shards)
    ]
    parts = [_buffer(order, epoch, number, buffer) for number, buffer in enumerate(buffers)]
    sequence = np.concatenate(parts)
    sequence.setflags(write=False)
    return sequence


def _buffer(order: Order, epoch: int, number: int, shards: Array) -> Array:
    """[R, 2] rollouts of some shards: shuffled, then runs of similar length in shuffled order."""
    counts = [len(order.lengths[shard]) for shard in shards]
    rows = np.concatenate([np.arange(count) for count in counts])
    lengths = np.concatenate([order.lengths[shard] for shard in shards])
    chance = _shuffled(len(rows), order.seed, epoch, 1, number)
    ranked = chance[np.argsort(lengths[chance], kind="stable")]
    rollouts = np.stack([np.repeat(shards, counts), rows], axis=1)[ranked]
    runs = np.split(rollouts, range(order.neighbours, len(rollouts), order.neighbours))
    return np.concatenate([runs[i] for i in _shuffled(len(runs), order.seed, epoch, 2, number)])


def _shuffled(count: int, *entropy: int) -> Array:
    """[count] a permutation that depends on the integers `entropy` alone."""
    generator = np.random.Philox(np.random.SeedSequence(entropy))
    return np.argsort(generator.random_raw(count), kind="stable")
