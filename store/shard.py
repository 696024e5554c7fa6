"""What a shard holds: its record, its table of rollouts, and its rollouts in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
from pydantic import Field

from store.encoding import Array
from store.errors import RolloutNotFound, StoreError
from store.plan import Key, Plan
from store.schema import FORMAT_VERSION, FileSum, Record

ROLLOUTS_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("variation", pa.int64(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("stop_reason", pa.string(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=False),
    ]
)


class ShardRecord(Record):
    """The content of shard.json: what the shard holds, file by file."""

    format_version: int = Field(FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    shard: int
    """Number of the shard in the plan."""
    manifest: str
    """Checksum of the manifest of the store that the shard belongs to."""
    rows: int
    """N: timesteps of all rollouts."""
    rollouts: int
    """R: rollouts."""
    files: dict[str, FileSum]
    """Every file of the shard except shard.json, by its path below the shard."""


@dataclass(frozen=True)
class Timestep:
    """What is stored of one timestep."""

    sample_id: str
    variation: int
    timestep: int
    arrays: Mapping[str, Array]
    """Each [C, …], read-only; that of a column which is no latent is a number."""
    drawn: Mapping[str, int] = field(default_factory=dict)
    """What the variation drew, by name."""

    @property
    def codes(self) -> Array:
        """[C] codes drawn, uint16 or uint32."""
        return self.arrays["codes"]


@dataclass(frozen=True)
class Rollout:
    """All timesteps of one (sample, variation)."""

    sample_id: str
    variation: int
    arrays: Mapping[str, Array]
    """Each [T, C, …], a read-only view into its shard."""
    stop_reason: str
    weight: float
    """Weight in training, >= 0."""
    seed: int
    drawn: Mapping[str, int] = field(default_factory=dict)
    """What the variation drew, by name."""

    @property
    def codes(self) -> Array:
        """[T, C] codes drawn, uint16 or uint32."""
        return self.arrays["codes"]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, timestep: int) -> Timestep:
        if not 0 <= timestep < len(self):
            raise RolloutNotFound(
                f"timestep {timestep} of sample {self.sample_id!r}, variation {self.variation} "
                f"is not in [0, {len(self)}): the rollout has {len(self)} timesteps"
            )
        arrays = {name: array[timestep] for name, array in self.arrays.items()}
        return Timestep(self.sample_id, self.variation, timestep, arrays, self.drawn)


@dataclass(frozen=True)
class RolloutTable:
    """The content of rollouts.parquet but for the keys, which the plan has: R rollouts."""

    offsets: Array
    """[R + 1] int64: rollout r holds the rows offsets[r] to offsets[r + 1]."""
    stop_reasons: Sequence[str]
    """[R]."""
    weights: Array
    """[R] float64."""
    seeds: Array
    """[R] uint64."""
    drawn: Mapping[str, Array] = field(default_factory=dict)
    """[R] int64 each: what every variation drew, by the names of the manifest."""

    @property
    def lengths(self) -> Array:
        """[R] int64 timesteps of each rollout."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.weights)

    def rollout(self, row: int, key: Key, arrays: Mapping[str, Array]) -> Rollout:
        """The rollout of a row, whose key and arrays [T, …] are given."""
        reason, weight, seed = self.stop_reasons[row], self.weights.item(row), self.seeds.item(row)
        drawn = {name: values.item(row) for name, values in self.drawn.items()}
        return Rollout(key[0], key[1], arrays, reason, weight, seed, drawn)

    def row_of(self, timestep: int) -> int:
        """The rollout that holds a timestep of the shard; the last one for those behind its end."""
        row = int(np.searchsorted(self.offsets, timestep, side="right")) - 1
        return min(row, len(self) - 1)

    def to_table(self, keys: Sequence[Key]) -> pa.Table:
        """The content of rollouts.parquet."""
        columns = [
            [key[0] for key in keys],
            [key[1] for key in keys],
            self.offsets[:-1],
            self.lengths,
            list(self.stop_reasons),
            self.weights,
            self.seeds,
            *self.drawn.values(),
        ]
        return pa.table(columns, schema=_rollouts_schema(self.drawn))

    @classmethod
    def from_table(
        cls, table: pa.Table, plan: Plan, shard: int, rows: int, drawn: Sequence[str] = ()
    ) -> RolloutTable:
        """The rollouts of a shard of N = `rows` timesteps, checked against the plan.

        `drawn` names the columns that the manifest adds. Raises StoreError that says what is wrong.
        """
        if not table.schema.equals(_rollouts_schema(drawn)):
            raise StoreError(f"its columns are {table.schema.names}, not those of rollouts")
        start, lengths, variations, weights, seeds = (
            table[name].to_numpy() for name in ("start", "length", "variation", "weight", "seed")
        )
        planned = slice(plan.starts[shard], plan.starts[shard + 1])
        sample_ids = plan.sample_ids.take(pa.array(plan.samples[planned]))
        if not (
            table["sample_id"].combine_chunks().equals(sample_ids)
            and np.array_equal(variations, plan.variations[planned])
        ):
            raise StoreError("its keys are not the planned ones")
        offsets = np.append(start, rows)
        if offsets[0] != 0 or (np.diff(offsets) != lengths).any():
            raise StoreError("its rollouts do not lie end to end on the time axis")
        if (lengths < 1).any():
            raise StoreError("it holds a rollout without timesteps")
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise StoreError("it holds a weight that is no finite number >= 0")
        reasons = table["stop_reason"].combine_chunks().dictionary_encode()
        names = reasons.dictionary.to_pylist()  # each text once, however many rollouts share it
        shared = tuple(names[place] for place in reasons.indices.to_pylist())
        numbers = {name: table[name].to_numpy() for name in drawn}
        return cls(offsets, shared, weights, seeds, numbers)


def _rollouts_schema(drawn: Iterable[str]) -> pa.Schema:
    """The columns of rollouts.parquet of a store whose manifest adds some."""
    fields = (pa.field(name, pa.int64(), nullable=False) for name in drawn)
    return pa.schema([*ROLLOUTS_SCHEMA, *fields])


@dataclass(frozen=True)
class Shard:
    """All rollouts of a shard: `shard[row]` is one, `len(shard)` their number."""

    number: int
    plan: Plan
    arrays: Mapping[str, Array]
    """Each [N, …], read-only."""
    rollouts: RolloutTable

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """[R] (sample_id, variation)."""
        return self.plan[self.number]

    @property
    def offsets(self) -> Array:
        """[R + 1] int64: rollout r holds the rows offsets[r] to offsets[r + 1]."""
        return self.rollouts.offsets

    def __len__(self) -> int:
        return len(self.rollouts)

    def __getitem__(self, row: int) -> Rollout:
        row = range(len(self))[row]
        start, stop = self.offsets.item(row), self.offsets.item(row + 1)
        arrays = {name: array[start:stop] for name, array in self.arrays.items()}
        return self.rollouts.rollout(row, self.keys[row], arrays)

    def __iter__(self) -> Iterator[Rollout]:
        return (self[row] for row in range(len(self)))
