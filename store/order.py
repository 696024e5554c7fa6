"""In which order training reads rollouts: pure functions of a few integers.

The order of an epoch depends on the lengths of the rollouts, the seed and the epoch, on nothing
else: any batch size, world size or number of workers walks the same sequence, and a run resumes
from the seed and the number of rollouts taken. Random keys are raw Philox output, which numpy
promises never to change (its shuffles it may).

An epoch shuffles the shards and cuts them into buffers. Within a buffer the rollouts are ranked by
length (at random where equal) and cut into runs of neighbours; the runs are shuffled. Runs begin
at multiples of their size, counted over all epochs: what a buffer lacks at its ends to a whole run
is left to the buffers beside it. So a batch whose size divides that of a run lies within one, its
rollouts are alike in length, and little of it is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Self

import numpy as np

from store.schema import require

Array = np.ndarray[Any, np.dtype[np.int64]]

BUFFER_SHARDS = 4
NEIGHBOURS = 64
SHARDS, TIES, RUNS, VARIATIONS = range(4)
"""What random numbers are for; part of their key."""


@dataclass(frozen=True, eq=False)
class Order:
    """The infinite sequence of rollouts that training reads."""

    lengths: Array
    """[R] int64 timesteps of every rollout, shard after shard."""
    starts: Array
    """[shards + 1] int64 index of the first rollout of each shard, then their number."""
    samples: Array | None
    """[R] int64 number of the sample of every rollout: an epoch draws one rollout of each.

    None where an epoch holds every rollout.
    """
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
        samples: Array | None = None,
    ) -> Self:
        """Order over `PredictionStore.lengths()`; raises ValueError for counts below 1.

        With `samples` [R], the sample of every rollout as a number from 0, an epoch draws one
        rollout of each sample.
        """
        require(buffer_shards >= 1, "buffer_shards", buffer_shards, ">= 1", "use 1 to mix least")
        require(neighbours >= 1, "neighbours", neighbours, ">= 1", "use 1 to ignore lengths")
        starts = np.cumsum([0, *map(len, lengths)])
        total = int(starts[-1])
        require(total >= 1, "number of rollouts", total, ">= 1", "commit a shard first")
        if samples is not None:
            limit = f"{total}, one for each rollout"
            require(len(samples) == total, "number of samples", len(samples), limit, "correct it")
        return cls(np.concatenate(lengths), starts, samples, seed, buffer_shards, neighbours)

    def __len__(self) -> int:
        """Rollouts of an epoch."""
        return len(self.lengths) if self.samples is None else len(self._variations[1])

    @property
    def buffers(self) -> int:
        """Buffers of an epoch."""
        return -(-(len(self.starts) - 1) // self.buffer_shards)

    @property
    def longest_buffer(self) -> int:
        """Rollouts that a buffer holds at most."""
        return int(np.diff(self.starts).max()) * self.buffer_shards

    def epoch(self, epoch: int) -> Array:
        """[len, 2] int64 (index into `committed`, row in that shard), each at most once."""
        return _epoch(self, epoch)

    def epochs(self, start: int, count: int) -> Array:
        """[count] int64 the epoch of every rollout that `take` returns."""
        return (start + np.arange(count)) // len(self)

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

    @cached_property
    def _variations(self) -> tuple[Array, Array, Array]:
        """Rollouts by sample [R], and for every sample that has any: number, first place there."""
        assert self.samples is not None
        by_sample = np.argsort(self.samples, kind="stable")
        numbers, first = np.unique(self.samples[by_sample], return_index=True)
        return by_sample, numbers, first

    def _drawn(self, epoch: int) -> Array:
        """[len] rollouts of an epoch, rising."""
        if self.samples is None:
            return np.arange(len(self.lengths))
        by_sample, numbers, first = self._variations
        counts = np.diff(first, append=len(by_sample)).astype(np.uint64)
        chance = _random(int(numbers[-1]) + 1, self.seed, epoch, VARIATIONS)[numbers]
        # The upper half times n, divided by 2^32, is uniform in [0, n).
        chosen = ((chance >> np.uint64(32)) * counts) >> np.uint64(32)
        return np.sort(by_sample[first + chosen.astype(np.int64)])


def rank_share(batch: Array, rank: int, world_size: int) -> Array:
    """Rows of a global batch that one rank takes: every `world_size`-th from `rank`."""
    require(0 <= rank < world_size, "rank", rank, f"in [0, {world_size})", "pass torchrun's RANK")
    return batch[rank::world_size]


@lru_cache(maxsize=2)
def _epoch(order: Order, epoch: int) -> Array:
    rollouts = order._drawn(epoch)
    shards = np.searchsorted(order.starts, rollouts, side="right") - 1
    ranks = _ranks(_random(len(order.starts) - 1, order.seed, epoch, SHARDS))
    buffers = ranks[shards] // order.buffer_shards
    ties = _random(len(order.lengths), order.seed, epoch, TIES)[rollouts]
    ranked = np.lexsort((ties, order.lengths[rollouts], buffers))
    sequence = ranked[_arranged(buffers[ranked], order, epoch)]
    found = np.stack([shards, rollouts - order.starts[shards]], axis=1)[sequence]
    found.setflags(write=False)
    return found


def _arranged(buffers: Array, order: Order, epoch: int) -> Array:
    """[R] places of an epoch's rollouts after their runs were shuffled.

    `buffers` [R] is the buffer of each, rising; within a buffer they lie by rising length.
    """
    numbers, first, buffer, sizes = np.unique(
        buffers, return_index=True, return_inverse=True, return_counts=True
    )
    run = order.neighbours
    head = np.minimum(-(epoch * len(order) + first) % run, sizes)
    tail = (sizes - head) % run
    # Two parts of a run that meet are both the shortest of their buffers, or both the longest.
    longest_first = (epoch * order.buffers + numbers) % 2 == 0

    rank = np.arange(len(buffers)) - first[buffer]
    from_head = np.where(longest_first[buffer], sizes[buffer] - 1 - rank, rank)
    part = (from_head >= head[buffer]).astype(np.int8) + (from_head >= (sizes - tail)[buffer])
    runs = np.cumsum(sizes // run + 1)[buffer] - (from_head - head[buffer]) // run
    chance = _random(int(runs.max()) + 1, order.seed, epoch, RUNS)[runs]
    return np.lexsort((rank, chance, part, buffer))


def _ranks(keys: np.ndarray[Any, np.dtype[np.uint64]]) -> Array:
    """[n] place of each key among all of them, sorted."""
    ranks = np.empty(len(keys), np.int64)
    ranks[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    return ranks


def _random(count: int, *entropy: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """[count] random integers that depend on the integers `entropy` alone."""
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
