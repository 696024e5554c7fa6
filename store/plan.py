"""The plan: the fixed list of (sample, variation) → shard, independent of who works on it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from store.errors import StoreError
from store.schema import MAX_SAMPLE_ID_BYTES

Key = tuple[str, int]

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("variation", pa.int64(), nullable=False),
        pa.field("shard", pa.int64(), nullable=False),
    ]
)
MAX_VARIATION = 2**31
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Plan:
    """Planned rollouts, shard by shard: `plan[shard]` lists its keys, `len(plan)` counts shards."""

    keys: tuple[Key, ...]
    """(sample_id, variation) of every planned rollout, in the order of the shards."""
    starts: tuple[int, ...]
    """[shards + 1] index into `keys` of the first rollout of each shard, then their number."""

    @classmethod
    def of(cls, shards: Iterable[Iterable[Key]]) -> Plan:
        """Plan from the keys of each shard.

        Raises StoreError for a duplicate key, an empty shard, an invalid sample id or variation.
        """
        keys: list[Key] = []
        starts = [0]
        for shard in shards:
            keys.extend(shard)
            starts.append(len(keys))
        plan = cls(tuple(keys), tuple(starts))
        plan._check()
        return plan

    @classmethod
    def lay_out(cls, sample_ids: Sequence[str], variations: int, rollouts_per_shard: int) -> Plan:
        """Cut samples × variations into shards: all samples of variation 0, then of 1, and so on.

        Neighbours in a shard are different samples, so a part of the shards is a fair part of the
        data. Raises StoreError.
        """
        for name, value in (("variations", variations), ("rollouts_per_shard", rollouts_per_shard)):
            if value < 1:
                raise StoreError(f"{name} is {value} but must be >= 1: correct it in the plan")
        keys = [(sample_id, v) for v in range(variations) for sample_id in sample_ids]
        cuts = range(0, len(keys), rollouts_per_shard)
        return cls.of(keys[cut : cut + rollouts_per_shard] for cut in cuts)

    @classmethod
    def from_table(cls, table: pa.Table, source: str) -> Plan:
        """Plan from plan.parquet; raises StoreError naming `source`."""
        if not table.schema.equals(SCHEMA):
            raise StoreError(
                f"{source} has the columns {table.schema.names}, not a plan's: restore"
            )
        shard = table["shard"].to_numpy()
        steps = np.diff(shard, prepend=-1)
        if not np.isin(steps, (0, 1)).all() or shard[:1].tolist() != [0]:
            raise StoreError(f"{source} does not count its shards 0, 1, 2, …: restore it")
        keys = zip(table["sample_id"].to_pylist(), table["variation"].to_pylist(), strict=True)
        plan = cls(tuple(keys), (*map(int, np.flatnonzero(steps)), len(shard)))
        try:
            plan._check()
        except StoreError as error:
            raise StoreError(f"{source}: {error}") from error
        return plan

    def to_table(self) -> pa.Table:
        """The content of plan.parquet: sample_id, variation, shard, one row per rollout."""
        shard = np.repeat(np.arange(len(self)), np.diff(self.starts))
        columns = [[key[0] for key in self.keys], [key[1] for key in self.keys], shard]
        return pa.table(columns, schema=SCHEMA)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, shard: int) -> tuple[Key, ...]:
        if not 0 <= shard < len(self):
            raise IndexError(
                f"shard {shard} is not planned: the plan has shards 0 to {len(self) - 1}"
            )
        return self.keys[self.starts[shard] : self.starts[shard + 1]]

    def __iter__(self) -> Iterator[tuple[Key, ...]]:
        return (self[shard] for shard in range(len(self)))

    @cached_property
    def positions(self) -> dict[Key, int]:
        """Index into `keys` of every key."""
        return {key: position for position, key in enumerate(self.keys)}

    def locate(self, key: Key) -> tuple[int, int] | None:
        """(shard, row in the shard) of a key; None when it is not planned."""
        position = self.positions.get(key)
        if position is None:
            return None
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        return shard, position - self.starts[shard]

    def _check(self) -> None:
        if not self.keys:
            raise StoreError("the plan holds no rollout: give at least one sample and variation")
        empty = np.flatnonzero(np.diff(self.starts) == 0)
        if len(empty):
            raise StoreError(f"shard {empty[0]} of the plan is empty: leave it out")
        for sample_id in dict.fromkeys(key[0] for key in self.keys):
            check_sample_id(sample_id)
        for sample_id, variation in self.keys:
            if type(variation) is not int or not 0 <= variation < MAX_VARIATION:
                raise StoreError(
                    f"variation {variation!r} of sample {sample_id!r} must be an integer in "
                    f"[0, {MAX_VARIATION}): number the variations from 0"
                )
        if len(self.positions) != len(self.keys):
            twice = next(key for at, key in enumerate(self.keys) if self.positions[key] != at)
            raise StoreError(
                f"the plan holds the key (sample {twice[0]!r}, variation {twice[1]}) twice: "
                "a store with colliding keys is refused; make sample ids unique"
            )


def check_sample_id(sample_id: object) -> None:
    """Refuse what cannot name a sample: any non-empty text without control characters may.

    Raises StoreError for other types, control characters, lone surrogates, or over 512 bytes.
    """
    advice = "rename it in the dataset"
    if not isinstance(sample_id, str) or not sample_id:
        raise StoreError(f"sample id {sample_id!r} must be a non-empty string: {advice}")
    if CONTROL_CHARACTER.search(sample_id):
        raise StoreError(f"sample id {sample_id!r} holds a control character: {advice}")
    if LONE_SURROGATE.search(sample_id):
        raise StoreError(f"sample id {sample_id!r} is no valid Unicode: {advice}")
    size = len(sample_id.encode())
    if size > MAX_SAMPLE_ID_BYTES:
        raise StoreError(
            f"sample id {sample_id[:40]!r}… has {size} bytes, the limit is "
            f"{MAX_SAMPLE_ID_BYTES}: {advice}"
        )
