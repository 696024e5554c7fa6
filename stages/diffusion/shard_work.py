"""A shard of stage one while it is asked for: answers go in, and finished rollouts come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from stages.background_writer import Drawn
from stages.diffusion.answers import Answer
from stages.diffusion.draws import Draw
from stages.diffusion.facts import FAILED, NOT_ASKED
from stages.diffusion.forward_rows import ForwardShard, HostRows, checksums
from stages.diffusion.target_sums import target_crc
from stages.diffusion.trajectories import STATES, TrajectoryShard, ended
from stages.rollout import NOT_FINITE_SHARE, NotFinite, too_many
from stages.sampling import keyed_seed
from store.encoding import COLUMN, Array

Shard = ForwardShard | TrajectoryShard


class Piece(NamedTuple):
    """Some rows of a shard, answered, for the thread of the writer."""

    shard: int
    collect: Callable[[], list[Drawn]] | None
    """What makes rollouts of them; None where another worker has committed the shard."""
    last: bool
    """Whether the shard has no others."""


@dataclass
class _Rollouts:
    """Rows of a shard, in order, cut into its rollouts; in the thread of the writer."""

    seed: int
    """Of the run."""
    draws: Sequence[Draw]
    rows: int
    """Rows of each rollout."""
    rest: dict[str, Array] = field(default_factory=dict)
    """Rows of a rollout of which others are still to come."""
    done: int = 0

    def add(self, arrays: Mapping[str, Array]) -> list[Drawn]:
        """Take rows of all arrays of the store, and return the rollouts that they complete."""
        if self.rest:
            arrays = {n: np.concatenate([self.rest[n], values]) for n, values in arrays.items()}
        whole = len(arrays[f"{COLUMN}status"]) // self.rows
        starts = range(0, whole * self.rows, self.rows)
        rollouts = [
            self._drawn(
                draw, {n: values[start : start + self.rows] for n, values in arrays.items()}
            )
            for draw, start in zip(self.draws[self.done :], starts, strict=False)
        ]
        self.rest = {n: values[whole * self.rows :] for n, values in arrays.items()}
        self.done += whole
        return rollouts

    def _drawn(self, draw: Draw, arrays: dict[str, Array]) -> Drawn:
        seed = keyed_seed(self.seed, *draw.key)
        # The weight of the sample is that of all its rollouts, and stands in samples.parquet.
        return Drawn(draw.key, arrays, "end", 1.0, seed, draw.drawn)


class ShardWork:
    """A shard that is being asked for."""

    def __init__(
        self, number: int, shard: Shard, draws: Sequence[Draw], *, predicted: bool, seed: int
    ) -> None:
        """Take a shard and its variations; without `predicted` they are their own targets."""
        self.number, self.shard, self.predicted = number, shard, predicted
        self._rollouts = _Rollouts(seed, draws, shard.each)
        self._rows = self._left = len(draws) * shard.each
        """Rows of the store, and those that are still to come."""
        self._failed = 0

    def answered(self, rows: HostRows, answer: Answer) -> Piece:
        """Return rows with what was predicted of them; raises NotFinite where too many failed."""
        self._failed += int((answer.status == FAILED).sum())
        refuse_failed(self._failed, self._rows)
        status = answer.status
        if isinstance(self.shard, TrajectoryShard):
            status = ended(answer)
        return self._piece(rows.columns | answer.arrays, status)

    def not_asked(self, rows: HostRows) -> Piece:
        """Return rows of samples that are their own target."""
        count = next(iter(rows.columns.values())).shape[:2]
        return self._piece(rows.columns, np.full(count, NOT_ASKED, np.uint8))

    def _piece(self, arrays: Mapping[str, Array], status: Array) -> Piece:
        self._left -= status.size
        collect = partial(_collect, self._rollouts, arrays, status)
        return Piece(self.number, collect, not self._left)


def _collect(rollouts: _Rollouts, arrays: Mapping[str, Array], status: Array) -> list[Drawn]:
    """Add what follows from the arrays [b, r, ...] of a batch, and cut it into rollouts."""
    flat = {name: values.reshape(-1, *values.shape[2:]) for name, values in arrays.items()}
    flat[f"{COLUMN}status"] = status.reshape(-1)
    sums = [target_crc(flat, row) for row in range(status.size)]
    flat[f"{COLUMN}target_crc"] = np.array(sums, np.uint32)
    if STATES in flat:
        sums_of = checksums(flat[STATES][:, 0])
        flat |= {f"{COLUMN}{name}": values for name, values in sums_of.items()}
    return rollouts.add(flat)


def refuse_failed(failed: int, planned: int) -> None:
    """Raise NotFinite when too many of a shard's `planned` rows have failed."""
    if too_many(failed, planned):
        raise NotFinite(
            f"{failed} of the {planned} rows of a shard have a prediction that is NaN or infinite, "
            f"and at most {NOT_FINITE_SHARE:.0%} may; nothing of this shard was stored. Check the "
            "model's weights, set rollout.precision: bf16 or fp32, or, where numbers are beyond "
            "65504, rollout.target.dtype: float32"
        )
