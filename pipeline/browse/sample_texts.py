"""What the samples of a store say: their ids, and the conditions that are text."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from store import PredictionStore

EXCERPT_LETTERS = 140
MAIN_TEXTS = ("text", "caption", "prompt")


class SampleTexts:
    """The texts of all planned samples of a store, which never change; read when first asked."""

    def __init__(self, store: PredictionStore) -> None:
        self._store = store

    @cached_property
    def _columns(self) -> dict[str, pa.ChunkedArray]:
        """Text conditions by name, [S] in the order of the samples of the plan."""
        table = self._store.samples
        rows = pc.index_in(self._store.plan.sample_ids, value_set=table["sample_id"])
        return {
            field.name: table[field.name].take(rows)
            for field in table.schema
            if field.name != "sample_id" and _is_text(field.type)
        }

    @cached_property
    def main(self) -> str | None:
        """The condition that says most of a sample: the one of `MAIN_TEXTS`, or the first."""
        names = [name for name in MAIN_TEXTS if name in self._columns] or list(self._columns)
        return names[0] if names else None

    def excerpt(self, sample: int) -> str:
        """The beginning of the main text of a sample, by its number; empty without one."""
        if self.main is None:
            return ""
        value = self._columns[self.main][sample].as_py()
        return (value or "")[:EXCERPT_LETTERS]

    def mention(self, text: str) -> np.ndarray:
        """[S] whether the id or a condition holds some text, in upper or lower case."""
        columns = [self._store.plan.sample_ids, *self._columns.values()]
        found = [pc.match_substring(c, text, ignore_case=True).fill_null(False) for c in columns]
        return np.asarray(np.logical_or.reduce([np.asarray(column) for column in found]))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
