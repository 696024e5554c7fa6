"""Which rollouts of a store match what a person looks for, page by page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.row_statistics import statistics_of
from store import PredictionStore, StoreError
from store.errors import ShardError
from store.plan import Integers, Key
from store.schema import Dense, Record
from store.shard import RolloutTable
from store.threads import in_threads

Document = dict[str, Any]
Rows = np.ndarray[Any, np.dtype[np.int64]]

PAGE_ROLLOUTS = 40
ENTROPY_BUDGET_S = 1.5
"""Time that one request may spend on computing entropies."""
EXCERPT_LETTERS = 140
MAIN_TEXTS = ("text", "caption", "prompt")


class Query(Record):
    """What rollouts a person looks for."""

    text: str = Field("", max_length=1000)
    """Part of a sample id, or of a condition that is text, in upper or lower case."""
    stop_reason: str | None = None
    """Why they ended."""
    shortest: int | None = Field(None, ge=0)
    """Least timesteps."""
    longest: int | None = Field(None, ge=0)
    """Most timesteps."""
    least_entropy: float | None = None
    """Least mean entropy over timesteps and streams, in nats."""
    most_entropy: float | None = None
    """Most of it."""
    order: Literal["plan", "shortest", "longest", "least_entropy", "most_entropy"] = "plan"
    """In which order they come."""
    start: int = Field(0, ge=0)
    """Rollouts of the result before the page."""

    @property
    def asks_for_entropy(self) -> bool:
        """Whether the result depends on entropies."""
        bounds = (self.least_entropy, self.most_entropy)
        return self.order.endswith("entropy") or any(bound is not None for bound in bounds)


class RolloutIndex:
    """Columns over all committed rollouts of a store, in the order of its plan: R rows.

    Reads the tables of shards when first asked, and predictions only for entropies, which stay
    known. Threads may share it.
    """

    def __init__(self, store: PredictionStore) -> None:
        self.store = store
        self.has_entropy = not isinstance(store.manifest.target, Dense)

    @cached_property
    def _tables(self) -> list[tuple[int, RolloutTable | ShardError]]:
        return list(zip(self.store.committed, self._read_tables(), strict=True))

    def _read_tables(self) -> Iterator[RolloutTable | ShardError]:
        def read(shard: int) -> RolloutTable | ShardError:
            try:
                return self.store.rollout_table(shard)
            except ShardError as error:
                return error

        return in_threads(read, self.store.committed)

    @cached_property
    def damaged(self) -> list[str]:
        """What keeps the rollouts of a shard out of the index, for each such shard."""
        return [str(found) for _, found in self._tables if isinstance(found, ShardError)]

    @cached_property
    def _sound(self) -> list[tuple[int, RolloutTable]]:
        return [pair for pair in self._tables if isinstance(pair[1], RolloutTable)]  # type: ignore[misc]

    @cached_property
    def _positions(self) -> Rows:
        """[R] place of every rollout in the plan."""
        starts = self.store.plan.starts
        parts = [np.arange(starts[shard], starts[shard + 1]) for shard, _ in self._sound]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @cached_property
    def lengths(self) -> Rows:
        """[R] timesteps."""
        parts = [table.lengths for _, table in self._sound]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @cached_property
    def stop_reasons(self) -> np.ndarray:
        """[R] texts."""
        reasons = [reason for _, table in self._sound for reason in table.stop_reasons]
        return np.array(reasons, dtype=object)

    @cached_property
    def samples(self) -> Integers:
        """[R] int32 number of the sample of every rollout."""
        return self.store.plan.samples[self._positions]

    @cached_property
    def entropies(self) -> np.ndarray:
        """[R] float64 mean entropy over timesteps and streams in nats; NaN where not yet known."""
        return np.full(len(self), np.nan)

    def __len__(self) -> int:
        return len(self._positions)

    def key(self, row: int) -> Key:
        """(sample_id, variation) of a row."""
        plan, position = self.store.plan, self._positions[row]
        sample_id = plan.sample_ids[int(plan.samples[position])].as_py()
        return sample_id, int(plan.variations[position])

    def variations(self, sample_id: str) -> list[int]:
        """Variations of a sample that are there, rising."""
        number = self.store.plan.index.find(sample_id)
        if number is None:
            return []
        found = self._positions[self.samples == number]
        return sorted(self.store.plan.variations[found].tolist())

    @cached_property
    def _texts(self) -> dict[str, pa.ChunkedArray]:
        """Text conditions by name, [S] in the order of the samples of the plan."""
        table = self.store.samples
        rows = pc.index_in(self.store.plan.sample_ids, value_set=table["sample_id"])
        return {
            field.name: table[field.name].take(rows)
            for field in table.schema
            if field.name != "sample_id" and _is_text(field.type)
        }

    @cached_property
    def main_text(self) -> str | None:
        """The text condition that says most of a sample: the one of `MAIN_TEXTS`, or the first."""
        names = [name for name in MAIN_TEXTS if name in self._texts] or list(self._texts)
        return names[0] if names else None

    def excerpt(self, row: int) -> str:
        """The beginning of the main text of a row's sample; empty without one."""
        if self.main_text is None:
            return ""
        value = self._texts[self.main_text][int(self.samples[row])].as_py()
        return (value or "")[:EXCERPT_LETTERS]

    def find(self, query: Query) -> Document:
        """Return a page of the rollouts that match, and over how many their entropy is known."""
        rows = self._matching(query)
        known = len(rows)
        if query.asks_for_entropy and self.has_entropy:
            matched = len(rows)
            self.learn(rows)
            rows, known = self._by_entropy(rows, query)
        else:
            matched = len(rows)
        page = _ordered(rows, self, query)[query.start : query.start + PAGE_ROLLOUTS]
        return {
            "rollouts": len(self),
            "matched": len(rows),
            "start": query.start,
            "page_rollouts": PAGE_ROLLOUTS,
            "entropy_known": known,
            "entropy_of": matched,
            "rows": [self._row(int(row)) for row in page],
        }

    def _matching(self, query: Query) -> Rows:
        """Rows that match all but what is asked of their entropy, rising."""
        fits = np.ones(len(self), bool)
        if query.text:
            fits &= self._mentions(query.text)[self.samples]
        if query.stop_reason is not None:
            fits &= self.stop_reasons == query.stop_reason
        if query.shortest is not None:
            fits &= self.lengths >= query.shortest
        if query.longest is not None:
            fits &= self.lengths <= query.longest
        return np.flatnonzero(fits)

    def _mentions(self, text: str) -> np.ndarray:
        """[S] whether the id or a text condition of a sample holds some text."""
        columns = [self.store.plan.sample_ids, *self._texts.values()]
        found = [pc.match_substring(c, text, ignore_case=True).fill_null(False) for c in columns]
        return np.asarray(np.logical_or.reduce([np.asarray(column) for column in found]))

    def _by_entropy(self, rows: Rows, query: Query) -> tuple[Rows, int]:
        """The rows whose entropy is known and in the bounds, and of how many it is known."""
        rows = rows[~np.isnan(self.entropies[rows])]
        known, values = len(rows), self.entropies[rows]
        least = -np.inf if query.least_entropy is None else query.least_entropy
        most = np.inf if query.most_entropy is None else query.most_entropy
        return rows[(values >= least) & (values <= most)], known

    def learn(self, rows: Iterable[int], budget_s: float = ENTROPY_BUDGET_S) -> Document:
        """Compute entropies of rows, in their order, until the time is used up.

        Returns those of the rows that are known, by row. Raises `StoreError`.
        """
        rows = list(rows)
        if not self.has_entropy:
            return {}
        end = time.monotonic() + budget_s
        for row in rows:
            if np.isnan(self.entropies[row]):
                if time.monotonic() > end:
                    break
                self.entropies[row] = self._entropy(row)
        return {str(row): float(v) for row in rows if not np.isnan(v := self.entropies[row])}

    def _entropy(self, row: int) -> float:
        entropy = statistics_of(self.store, self.store[self.key(row)].arrays).entropy
        assert entropy is not None
        return float(entropy.mean())

    def checked(self, rows: Sequence[int]) -> list[int]:
        """Rows of the index; raises `StoreError` for one that it does not have."""
        for row in rows:
            if not 0 <= row < len(self):
                raise StoreError(f"rollout {row} is not in [0, {len(self)}): search again")
        return list(rows)

    def _row(self, row: int) -> Document:
        sample_id, variation = self.key(row)
        timestep_s, entropy = self.store.manifest.timestep_s, self.entropies[row]
        timesteps = int(self.lengths[row])
        return {
            "row": row,
            "sample_id": sample_id,
            "variation": variation,
            "excerpt": self.excerpt(row),
            "timesteps": timesteps,
            "seconds": None if timestep_s is None else timesteps * timestep_s,
            "stop_reason": self.stop_reasons[row],
            "entropy": None if np.isnan(entropy) else float(entropy),
        }


def _ordered(rows: Rows, index: RolloutIndex, query: Query) -> Rows:
    match query.order:
        case "plan":
            return rows
        case "shortest" | "longest":
            values = index.lengths[rows]
        case "least_entropy" | "most_entropy":
            values = index.entropies[rows]
    falling = query.order in ("longest", "most_entropy")
    return rows[np.argsort(-values if falling else values, kind="stable")]


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
