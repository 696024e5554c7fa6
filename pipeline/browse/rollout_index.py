"""Which rollouts of a store match what a person looks for, page by page."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field

from pipeline.browse.sample_texts import SampleTexts
from pipeline.row_statistics import statistics_of
from store import PredictionStore
from store.errors import RolloutNotFound, ShardError
from store.plan import Integers, Key
from store.schema import Dense, Record
from store.shard import RolloutTable
from store.threads import in_threads

Document = dict[str, Any]
Rows = np.ndarray[Any, np.dtype[np.int64]]
Numbers = np.ndarray[Any, np.dtype[np.float64]]

PAGE_ROLLOUTS = 40
ENTROPY_BUDGET_S = 1.5
"""Time that one request may spend on computing entropies."""


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
    """Columns over the rollouts of a store that are committed when it is made: R rows.

    They come in the order of the plan. Outside, a rollout goes by its place in the plan, which is
    the same in every later index. Reads the tables of shards, and predictions only for entropies,
    which stay known. Threads may share it.
    """

    def __init__(self, store: PredictionStore, before: RolloutIndex | None = None) -> None:
        """Read the tables of shards, but for those that an index from before has; `StoreError`."""
        self.store = store
        self.has_entropy = not isinstance(store.manifest.target, Dense)
        self._stamps = _stamps(store)
        known = {} if before is None else before._also_in(self._stamps)
        tables = _read_tables(store, known)
        self._sound = {s: each for s, each in tables.items() if isinstance(each, RolloutTable)}
        self._broken = {s: str(each) for s, each in tables.items() if isinstance(each, ShardError)}
        self._unreadable: dict[int, str] = {}
        self.texts: SampleTexts = SampleTexts(store) if before is None else before.texts
        self.entropies = self._entropies(before, known)
        """By place: float64 mean over timesteps and streams in nats; NaN where not yet known."""

    def renewed(self) -> RolloutIndex:
        """The index of what the store holds by now; itself where that is the same.

        Reads tables of shards that are new, and again those that were damaged. One thread at a time
        may call it. Raises `StoreError`.
        """
        self.store.refresh()
        if _stamps(self.store) == self._stamps and not self._broken:
            return self
        later = RolloutIndex(self.store, self)
        is_same = (later._stamps, later._broken) == (self._stamps, self._broken)
        return self if is_same else later

    def stamp_of(self, sample_id: str, variation: int) -> float | None:
        """What tells the commit of a rollout's shard from a later one; None where there is none."""
        place = self.store.plan.locate((sample_id, variation))
        return None if place is None else self._stamps.get(place[0])

    def _also_in(self, stamps: Mapping[int, float]) -> dict[int, RolloutTable]:
        """Tables of those shards that were not committed anew."""
        return {
            shard: table
            for shard, table in self._sound.items()
            if stamps.get(shard) == self._stamps[shard]
        }

    def _entropies(self, before: RolloutIndex | None, known: Mapping[int, RolloutTable]) -> Numbers:
        if before is None:
            return np.full(self.store.plan.rollouts, np.nan)
        replaced = before._sound.keys() - known.keys()
        found = before.entropies.copy() if replaced else before.entropies
        for shard in replaced:
            found[slice(*self.store.plan.starts[shard : shard + 2])] = np.nan
        return found

    @property
    def shards(self) -> int:
        """Committed shards, damaged ones among them."""
        return len(self._stamps)

    @property
    def damaged(self) -> list[str]:
        """What keeps the rollouts of a shard out of the index, or their entropies, per shard."""
        found = self._unreadable | self._broken
        return [found[shard] for shard in sorted(found)]

    @cached_property
    def _positions(self) -> Rows:
        """[R] place of every rollout in the plan."""
        starts = self.store.plan.starts
        parts = [np.arange(starts[shard], starts[shard + 1]) for shard in self._sound]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @cached_property
    def lengths(self) -> Rows:
        """[R] timesteps."""
        parts = [table.lengths for table in self._sound.values()]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @cached_property
    def stop_reasons(self) -> np.ndarray:
        """[R] texts."""
        reasons = [reason for table in self._sound.values() for reason in table.stop_reasons]
        return np.array(reasons, dtype=object)

    @cached_property
    def stop_reason_counts(self) -> dict[str, int]:
        """Rollouts by the reason of their end, the reasons in alphabetical order."""
        return dict(sorted(Counter(map(str, self.stop_reasons)).items()))

    @cached_property
    def samples(self) -> Integers:
        """[R] int32 number of the sample of every rollout."""
        return self.store.plan.samples[self._positions]

    @cached_property
    def sample_count(self) -> int:
        """Samples of which there is a rollout."""
        return len(np.unique(self.samples))

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

    def find(self, query: Query) -> Document:
        """Return a page of the rollouts that match, and over how many their entropy is known."""
        rows = self._matching(query)
        known = matched = len(rows)
        if query.asks_for_entropy and self.has_entropy:
            self._learn(rows, ENTROPY_BUDGET_S)
            rows = rows[~np.isin(self._shards[rows], list(self._unreadable))]
            matched = len(rows)
            rows, known = self._by_entropy(rows, query)
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
            fits &= self.texts.mention(query.text)[self.samples]
        if query.stop_reason is not None:
            fits &= self.stop_reasons == query.stop_reason
        if query.shortest is not None:
            fits &= self.lengths >= query.shortest
        if query.longest is not None:
            fits &= self.lengths <= query.longest
        return np.flatnonzero(fits)

    def _by_entropy(self, rows: Rows, query: Query) -> tuple[Rows, int]:
        """The rows whose entropy is known and in the bounds, and of how many it is known."""
        rows = rows[~np.isnan(self.entropies_of(rows))]
        known, values = len(rows), self.entropies_of(rows)
        least = -np.inf if query.least_entropy is None else query.least_entropy
        most = np.inf if query.most_entropy is None else query.most_entropy
        return rows[(values >= least) & (values <= most)], known

    def entropies_of(self, rows: Rows) -> Numbers:
        """Entropies of rows, NaN where not yet known."""
        return self.entropies[self._positions[rows]]

    def learn(self, places: Sequence[int], budget_s: float = ENTROPY_BUDGET_S) -> Document:
        """Compute entropies of rollouts, by their places, in order, until the time is used up.

        Returns those that are known, by place. Raises `StoreError` for a place where nothing is
        committed.
        """
        if self.has_entropy:
            self._learn(self._rows_at(places), budget_s)
        return {str(at): float(v) for at in places if not np.isnan(v := self.entropies[at])}

    def _rows_at(self, places: Sequence[int]) -> Rows:
        rows = np.searchsorted(self._positions, places)
        for place, row in zip(places, rows.tolist(), strict=True):
            if row >= len(self) or self._positions[row] != place:
                raise RolloutNotFound(f"no rollout is committed at place {place}: search again")
        return rows

    def _learn(self, rows: Rows, budget_s: float) -> None:
        """Compute entropies of rows until the time is used up, but none of damaged shards."""
        end = time.monotonic() + budget_s
        for row in rows[np.isnan(self.entropies_of(rows))].tolist():
            shard = int(self._shards[row])
            if shard in self._unreadable:
                continue
            if time.monotonic() > end:
                return
            try:
                self.entropies[self._positions[row]] = self._entropy(row)
            except (ShardError, RolloutNotFound) as error:  # damaged, or taken out by now
                self._unreadable[shard] = str(error)

    @cached_property
    def _shards(self) -> Rows:
        """[R] shard of every rollout."""
        return np.searchsorted(self.store.plan.starts, self._positions, "right") - 1

    def _entropy(self, row: int) -> float:
        entropy = statistics_of(self.store, self.store[self.key(row)].arrays).entropy
        assert entropy is not None
        return float(entropy.mean())

    def _row(self, row: int) -> Document:
        sample_id, variation = self.key(row)
        place, timesteps = int(self._positions[row]), int(self.lengths[row])
        timestep_s, entropy = self.store.manifest.timestep_s, self.entropies[place]
        return {
            "place": place,
            "sample_id": sample_id,
            "variation": variation,
            "excerpt": self.texts.excerpt(int(self.samples[row])),
            "timesteps": timesteps,
            "seconds": None if timestep_s is None else timesteps * timestep_s,
            "stop_reason": self.stop_reasons[row],
            "entropy": None if np.isnan(entropy) else float(entropy),
        }


def _ordered(rows: Rows, index: RolloutIndex, query: Query) -> Rows:
    if query.order == "plan":
        return rows
    by_length = query.order in ("shortest", "longest")
    values = index.lengths[rows] if by_length else index.entropies_of(rows)
    falling = query.order in ("longest", "most_entropy")
    return rows[np.argsort(-values if falling else values, kind="stable")]


def _stamps(store: PredictionStore) -> dict[int, float]:
    return {shard: store.stamps[shard] for shard in store.committed}


def _read_tables(
    store: PredictionStore, known: Mapping[int, RolloutTable]
) -> dict[int, RolloutTable | ShardError]:
    """Tables of all committed shards by their numbers, rising, or why there is none."""

    def read(shard: int) -> RolloutTable | ShardError:
        try:
            return store.rollout_table(shard)
        except ShardError as error:
            return error

    missing = [shard for shard in store.committed if shard not in known]
    read_now = dict(zip(missing, in_threads(read, missing), strict=True))
    return {s: known[s] if s in known else read_now[s] for s in store.committed}
