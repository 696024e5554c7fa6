"""The conditioning inputs of a store, which hold no second copy of the ids that the plan has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from store.errors import StoreError
from store.plan import EMPTY, Plan, check_sample_ids
from store.schema import Manifest
from store.tables import column_blocks, open_table, read_table
from store.text_index import Numbers, TextIndex

ID = "sample_id"


@dataclass(frozen=True)
class SampleRows:
    """In which row of a table of samples each of them lies."""

    planned: TextIndex
    planned_rows: Numbers
    """[S] int32 by the number of a planned sample."""
    others: TextIndex
    """Samples that no rollout is planned of."""
    other_rows: Numbers

    @classmethod
    def of(cls, blocks: Iterable[pa.Array], plan: Plan, source: str) -> SampleRows:
        """The rows of samples whose ids come block by block.

        Raises StoreError that begins with `source` where an id is invalid or there twice, or a
        planned one is not there.
        """
        numbers, others, start = [], [], 0
        for block in blocks:
            check_sample_ids(block)
            ids = block.cast(pa.string())
            numbers.append(_numbers(plan, ids, start))
            others.append(ids.filter(pa.array(numbers[-1] < 0)))
            start += len(ids)
        number = np.concatenate([np.empty(0, np.int32), *numbers])
        rows = np.arange(len(number), dtype=np.int32)
        other_ids = pa.concat_arrays([EMPTY, *others])
        index, places = TextIndex.encode(other_ids)
        times = np.bincount(number[number >= 0], minlength=len(plan.index))
        _refuse_twice(plan.index.texts, times, source)
        _refuse_twice(index.texts, np.bincount(places, minlength=len(index)), source)
        if not times.all():
            lacking = plan.index.texts[int(times.argmin())].as_py()
            raise StoreError(f"{source} lack the planned sample {lacking!r}: plan from them")
        planned_rows = np.empty(len(plan.index), np.int32)
        planned_rows[number[number >= 0]] = rows[number >= 0]
        return cls(plan.index, planned_rows, index, rows[number < 0])

    def find(self, sample_id: str) -> int | None:
        """Row of a sample; None where there is none."""
        for index, rows in ((self.planned, self.planned_rows), (self.others, self.other_rows)):
            number = index.find(sample_id)
            if number is not None:
                return int(rows[number])
        return None


class Samples:
    """samples.parquet of a store: the ids are checked at once, conditions read when needed."""

    def __init__(self, path: Path, manifest: Manifest, plan: Plan) -> None:
        """Check the file and its ids; raises StoreError."""
        self._path, self._manifest = path, manifest
        file = open_table(path, manifest)
        check_conditions(file.schema_arrow.names, manifest, str(path))
        self.count: int = file.metadata.num_rows
        self._names = [name for name in file.schema_arrow.names if name != ID]
        self._rows = SampleRows.of(column_blocks(file, ID, str(path)), plan, str(path))

    def find(self, sample_id: str) -> int | None:
        """Row of a sample; None where there is none."""
        return self._rows.find(sample_id)

    def rows_of(self, numbers: Numbers) -> Numbers:
        """Rows [n] of planned samples by their numbers [n] in the plan."""
        return self._rows.planned_rows[numbers]

    @cached_property
    def table(self) -> pa.Table:
        """All of it, ids included, read anew: for who needs the table as it is."""
        return read_table(self._path, self._manifest)

    def take(
        self, sample_ids: Sequence[str], rows: Sequence[int] | Numbers
    ) -> list[dict[str, Any]]:
        """Ids and conditions of samples, of which the ids and rows are given."""
        if not self._names:
            return [{ID: sample_id} for sample_id in sample_ids]
        conditions = self._conditions.take(pa.array(rows, pa.int64())).to_pylist()
        pairs = zip(sample_ids, conditions, strict=True)
        return [{ID: sample_id, **row} for sample_id, row in pairs]

    @cached_property
    def _conditions(self) -> pa.Table:
        table = read_table(self._path, self._manifest, self._names)
        pa.default_memory_pool().release_unused()  # what decoding it took
        return table


def check_conditions(names: Sequence[str], manifest: Manifest, source: str) -> None:
    """Refuse samples without one of these columns; raises StoreError that begins with `source`."""
    lacking = [name for name in (ID, *manifest.conditions) if name not in names]
    if lacking:
        raise StoreError(
            f"{source} lack the columns {lacking} (they have {list(names)}): "
            "add what the manifest lists as conditions"
        )


def _numbers(plan: Plan, ids: pa.StringArray, start: int) -> Numbers:
    """[rows] the planned number of samples that begin in row `start`, -1 for the others."""
    if ids.equals(plan.sample_ids[start : start + len(ids)]):  # as a rule the order is the same
        return np.arange(start, start + len(ids), dtype=np.int32)
    return plan.index.find_all(ids)


def _refuse_twice(texts: pa.StringArray, times: np.ndarray, source: str) -> None:
    twice = np.flatnonzero(times > 1)
    if len(twice):
        sample_id = texts[int(twice[0])].as_py()
        raise StoreError(f"{source} name {sample_id!r} twice: make sample ids unique")
