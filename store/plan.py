"""The plan: the fixed list of (sample, variation) → shard, independent of who works on it."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from store.errors import StoreError
from store.schema import MAX_BUCKETS, MAX_SAMPLE_ID_BYTES
from store.text_index import TextIndex

Key = tuple[str, int]
Integers = np.ndarray[Any, np.dtype[np.int32]]
Buckets = np.ndarray[Any, np.dtype[np.int16]]
Offsets = np.ndarray[Any, np.dtype[np.int64]]

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("variation", pa.int64(), nullable=False),
        pa.field("shard", pa.int64(), nullable=False),
    ]
)
BUCKET = pa.field("bucket", pa.int16(), nullable=False)
"""Column of a plan whose shards are of several buckets."""
EMPTY = pa.nulls(0, pa.string())  # pa.array would import pandas where it is installed
MAX_VARIATION = 2**31
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
RE2_CONTROL_CHARACTER = r"[\x00-\x1f\x7f-\x{9f}]"


@dataclass(frozen=True, eq=False)
class Plan:
    """Planned rollouts, shard by shard: `plan[shard]` lists its keys, `len(plan)` counts shards.

    It holds columns, not keys: a million rollouts take some tens of megabytes.
    """

    index: TextIndex
    """Numbers of the planned samples, by first appearance."""
    samples: Integers
    """[R] int32 number of the sample of every rollout, in the order of the shards."""
    variations: Integers
    """[R] int32."""
    starts: Offsets
    """[shards + 1] int64 index of the first rollout of each shard, then their number."""
    buckets: Buckets | None = None
    """[shards] int16 number of the bucket of each shard; None where the manifest has none."""

    @classmethod
    def of(cls, shards: Iterable[Iterable[Key]], buckets: Sequence[int] | None = None) -> Plan:
        """Plan from the keys of each shard, and the bucket of each where the manifest has some.

        Raises StoreError for a duplicate key, an empty shard, an invalid sample id or variation,
        and for buckets that are not one number of the manifest's for each shard.
        """
        sample_ids: list[str] = []
        variations: list[int] = []
        starts = [0]
        for shard in shards:
            for sample_id, variation in shard:
                sample_ids.append(sample_id)
                variations.append(variation)
            starts.append(len(sample_ids))
        _check_variations(sample_ids, variations)
        return cls._encoded(
            _sample_column(sample_ids),
            np.array(variations, np.int32),
            np.array(starts, np.int64),
            None if buckets is None else _bucket_column(buckets, len(starts) - 1),
        )

    @classmethod
    def lay_out(cls, sample_ids: Sequence[str], variations: int, rollouts_per_shard: int) -> Plan:
        """Cut samples × variations into shards: all samples of variation 0, then of 1, and so on.

        Neighbours in a shard are different samples, so a part of the shards is a fair part of the
        data. Raises StoreError.
        """
        for name, value in (("variations", variations), ("rollouts_per_shard", rollouts_per_shard)):
            if value < 1:
                raise StoreError(f"{name} is {value} but must be >= 1: correct it in the plan")
        index, samples = TextIndex.encode(_sample_column(sample_ids))
        count = len(samples) * variations
        plan = cls(
            index,
            np.tile(samples, variations),
            np.repeat(np.arange(variations, dtype=np.int32), len(samples)),
            np.append(np.arange(0, count, rollouts_per_shard), count),
        )
        return plan._checked()

    @classmethod
    def from_table(cls, table: pa.Table, source: str) -> Plan:
        """Plan from plan.parquet; raises StoreError naming `source`."""
        if not table.schema.equals(SCHEMA) and not table.schema.equals(SCHEMA.append(BUCKET)):
            raise StoreError(
                f"{source} has the columns {table.schema.names}, not a plan's: restore"
            )
        shard = table["shard"].to_numpy()
        steps = np.diff(shard, prepend=-1)
        if not np.isin(steps, (0, 1)).all() or shard[:1].tolist() != [0]:
            raise StoreError(f"{source} does not count its shards 0, 1, 2, …: restore it")
        chunks, variations = table["sample_id"].chunks, table["variation"].to_numpy()
        # `combine_chunks` copies even a single one.
        ids = chunks[0] if len(chunks) == 1 else pa.concat_arrays([EMPTY, *chunks])
        try:
            _check_range(ids, variations)
            starts = np.append(np.flatnonzero(steps), len(shard))
            buckets = None
            if BUCKET.name in table.schema.names:
                rows = table[BUCKET.name].to_numpy()
                buckets = rows[starts[:-1]]
                if not np.array_equal(rows, np.repeat(buckets, np.diff(starts))):
                    raise StoreError("a shard is of several buckets: restore it")
            return cls._encoded(ids, variations.astype(np.int32), starts, buckets)
        except StoreError as error:
            raise StoreError(f"{source}: {error}") from error

    @classmethod
    def _encoded(
        cls,
        sample_ids: pa.StringArray,
        variations: Integers,
        starts: Offsets,
        buckets: Buckets | None,
    ) -> Self:
        index, samples = TextIndex.encode(sample_ids)
        return cls(index, samples, variations, starts, buckets)._checked()

    def to_table(self) -> pa.Table:
        """The content of plan.parquet: one row per rollout.

        Its sample_id, variation and shard, and, where the plan has buckets, that of the shard.
        """
        shard = np.repeat(np.arange(len(self)), self.sizes)
        columns = [self.sample_ids.take(pa.array(self.samples)), self.variations, shard]
        schema = SCHEMA
        if self.buckets is not None:
            columns.append(np.repeat(self.buckets, self.sizes))
            schema = SCHEMA.append(BUCKET)
        return pa.table(
            [pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)], schema=schema
        )

    def bucket_of(self, shard: int) -> int | None:
        """Number of the bucket of a planned shard; None where the manifest has none."""
        return None if self.buckets is None else self.buckets.item(shard)

    def check_buckets(self, count: int, source: str) -> None:
        """Refuse a plan whose buckets are not among so many of the manifest's; 0 calls for none.

        Raises StoreError that begins with `source`.
        """
        if (self.buckets is not None) != bool(count):
            has = "no bucket" if self.buckets is None else "buckets"
            raise StoreError(
                f"{source} has {has} but the manifest has {count}: give every shard of the plan "
                "one of the manifest's buckets, and none where it has none"
            )
        if self.buckets is None:
            return
        wrong = np.flatnonzero((self.buckets < 0) | (self.buckets >= count))
        if len(wrong):
            raise StoreError(
                f"{source}: shard {wrong[0]} is of bucket {self.buckets[wrong[0]]} but the "
                f"manifest has buckets 0 to {count - 1}: correct the plan"
            )

    @property
    def sample_ids(self) -> pa.StringArray:
        """[S] the planned samples, each once, by first appearance."""
        return self.index.texts

    @property
    def rollouts(self) -> int:
        """R: planned rollouts."""
        return len(self.samples)

    @property
    def sizes(self) -> Offsets:
        """[shards] int64 rollouts of each shard."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, shard: int) -> tuple[Key, ...]:
        if not 0 <= shard < len(self):
            raise IndexError(
                f"shard {shard} is not planned: the plan has shards 0 to {len(self) - 1}"
            )
        rows = slice(self.starts[shard], self.starts[shard + 1])
        sample_ids = self.sample_ids.take(pa.array(self.samples[rows])).to_pylist()
        return tuple(zip(sample_ids, self.variations[rows].tolist(), strict=True))

    def __iter__(self) -> Iterator[tuple[Key, ...]]:
        return (self[shard] for shard in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether both plan the same rollouts in the same shards and order."""
        if not isinstance(other, Plan):
            return NotImplemented
        columns = ("samples", "variations", "starts")
        same = all(np.array_equal(getattr(self, c), getattr(other, c)) for c in columns)
        if self.buckets is None or other.buckets is None:
            same = same and self.buckets is other.buckets
        else:
            same = same and np.array_equal(self.buckets, other.buckets)
        return same and bool(self.sample_ids.equals(other.sample_ids))

    __hash__ = None  # type: ignore[assignment]

    def locate(self, key: Key) -> tuple[int, int] | None:
        """(shard, row in the shard) of a key; None when it is not planned."""
        match key:
            case (str() as sample_id, int() | np.integer() as variation):
                sample = self.index.find(sample_id)
            case _:
                return None
        if sample is None or not 0 <= variation < MAX_VARIATION:
            return None
        pairs, order = self._pairs
        pair = _pair(sample, int(variation))
        # For one number `bisect` is quicker than numpy's search, and among a million as quick.
        at = bisect_left(pairs.data, pair)
        if at == len(pairs) or pairs.item(at) != pair:
            return None
        position = order.item(at)
        shard = bisect_right(self.starts.data, position) - 1
        return shard, position - self.starts.item(shard)

    @cached_property
    def _pairs(self) -> tuple[Offsets, Integers]:
        """[R] sample and variation of every rollout in one number, rising; and whose they are."""
        pairs = _pair(self.samples.astype(np.int64), self.variations)
        order = np.argsort(pairs, kind="stable")
        return pairs[order], order.astype(np.int32)

    def _checked(self) -> Self:
        if not self.rollouts:
            raise StoreError("the plan holds no rollout: give at least one sample and variation")
        empty = np.flatnonzero(self.sizes == 0)
        if len(empty):
            raise StoreError(f"shard {empty[0]} of the plan is empty: leave it out")
        check_sample_ids(self.sample_ids)
        pairs, order = self._pairs
        again = order[1:][pairs[1:] == pairs[:-1]]
        if len(again):
            at = again.min()
            sample_id, variation = self.sample_ids[self.samples[at]].as_py(), self.variations[at]
            raise StoreError(
                f"the plan holds the key (sample {sample_id!r}, variation {variation}) twice: "
                "a store with colliding keys is refused; make sample ids unique"
            )
        return self


def _pair(sample: Any, variation: Any) -> Any:
    return sample * MAX_VARIATION + variation


def _sample_column(sample_ids: Sequence[str]) -> pa.StringArray:
    """Column of sample ids; raises StoreError for what is no string or no Unicode."""
    for sample_id in sample_ids:
        if not isinstance(sample_id, str):
            check_sample_id(sample_id)
    try:
        return pa.array(sample_ids, pa.string())
    except UnicodeEncodeError:
        for sample_id in sample_ids:
            check_sample_id(sample_id)
        raise


def _bucket_column(buckets: Sequence[int], shards: int) -> Buckets:
    """[shards] int16; raises StoreError unless each shard has one."""
    if len(buckets) != shards:
        raise StoreError(f"buckets names {len(buckets)} shards of {shards}: give each shard one")
    wrong = [bucket for bucket in buckets if not 0 <= bucket < MAX_BUCKETS]
    if wrong:
        raise StoreError(
            f"bucket {wrong[0]!r} must be in [0, {MAX_BUCKETS}): number those of the manifest"
        )
    return np.array(buckets, np.int16)


def _check_variations(sample_ids: Sequence[str], variations: Sequence[int]) -> None:
    for sample_id, variation in zip(sample_ids, variations, strict=True):
        if type(variation) is not int or not 0 <= variation < MAX_VARIATION:
            raise _bad_variation(sample_id, variation)


def _check_range(sample_ids: pa.StringArray, variations: Offsets) -> None:
    bad = np.flatnonzero((variations < 0) | (variations >= MAX_VARIATION))
    if len(bad):
        raise _bad_variation(sample_ids[bad[0]].as_py(), int(variations[bad[0]]))


def _bad_variation(sample_id: str, variation: object) -> StoreError:
    return StoreError(
        f"variation {variation!r} of sample {sample_id!r} must be an integer in "
        f"[0, {MAX_VARIATION}): number the variations from 0"
    )


def check_sample_ids(column: pa.Array) -> None:
    """Refuse a column of sample ids for the first value that `check_sample_id` refuses.

    Raises StoreError.
    """
    if column.type != pa.string():
        for value in column.to_pylist():
            check_sample_id(value)
        return
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise StoreError(
            f"a sample id is no valid Unicode ({error}): rename it in the dataset"
        ) from error
    sizes = pc.binary_length(column)
    odd_sizes = pc.or_(pc.less(sizes, 1), pc.greater(sizes, MAX_SAMPLE_ID_BYTES))
    odd = pc.or_(odd_sizes, pc.match_substring_regex(column, RE2_CONTROL_CHARACTER))
    first = pc.index(pc.fill_null(odd, True), True).as_py()
    if first >= 0:
        check_sample_id(column[first].as_py())


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
