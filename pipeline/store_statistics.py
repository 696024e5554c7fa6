"""What the arrays of a store say: how sure the teacher was, what is there twice, what lies far out.

Reading arrays takes time, so by default a few shards are read that lie evenly over the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from pipeline.duplicates import content_hash, equal_conditions, equal_groups
from pipeline.quantiles import outliers, quantiles
from pipeline.row_statistics import RowStatistics, statistics_of
from store import PredictionStore
from store.encoding import COLUMN, Array
from store.errors import ShardError
from store.shard import Shard

Document = dict[str, Any]
Item = TypeVar("Item")
Progress = Callable[[Sequence[int]], Iterable[int]]

MOST_SHARDS = 16
"""Shards that are read unless all are asked for."""
MOST_BYTES = 2**29
MOST_REMOTE_BYTES = 2**26
"""Bytes that are read then, of a folder and of object storage; one shard is always read."""
MOST_NUMBERS = 2**22
"""Values that each quantile is taken of, at most; rows are then taken evenly."""
LEVELS = 8
"""Ranges of the noise level t that a diffusion store is summed up by."""
MEASURES = ("entropy", "code_probability", "kept_mass", "tail_mass")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Choose `count` items that lie evenly over a list, its first and last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in np.unique(places)]


def shards_to_read(shards: Sequence[int], stored_bytes: int, is_remote: bool) -> list[int]:
    """Choose some of a store's shards, whose arrays are read, given the bytes of all of them."""
    budget = MOST_REMOTE_BYTES if is_remote else MOST_BYTES
    fitting = budget * len(shards) // max(stored_bytes, 1)
    return spread(shards, max(1, min(MOST_SHARDS, fitting)))


@dataclass
class Sampled:
    """What was read of some shards of a store."""

    store: PredictionStore
    rows_per_shard: int
    """Rows of each shard that quantiles are taken of."""
    keys: list[str] = field(default_factory=list)
    """SAMPLE/VARIATION of every rollout that was read."""
    shards: int = 0
    rows: int = 0
    columns: dict[str, list[Array]] = field(default_factory=dict)
    """Arrays [n, C] of some rows by measure; of continuous targets by `rms ARRAY`."""
    levels: dict[str, list[Array]] = field(default_factory=dict)
    """[n] column t of the rows of each measure of a continuous target, where there is one."""
    means: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    """Of each rollout over its rows and streams, with its key, by measure."""
    hashes: list[bytes] = field(default_factory=list)
    unreadable: list[Document] = field(default_factory=list)
    found: RowStatistics = field(default_factory=RowStatistics)
    """Of the last shard: what kind of numbers these are."""

    def read(self, number: int) -> None:
        """Add a shard, or what keeps it from being read."""
        try:
            shard = self.store.shard(number)
            self._add(shard, statistics_of(self.store, shard.arrays))
        except ShardError as error:
            self.unreadable.append({"shard": number, "reason": str(error)})

    def _add(self, shard: Shard, found: RowStatistics) -> None:
        self.found = found
        rows = int(shard.offsets[-1])
        self.shards += 1
        self.rows += rows
        step = max(1, -(-rows // self.rows_per_shard))
        for name, values in named_measures(found).items():
            self.columns.setdefault(name, []).append(values[::step])
            if f"{COLUMN}t" in shard.arrays:
                self.levels.setdefault(name, []).append(shard.arrays[f"{COLUMN}t"][::step])
        keys = [f"{sample_id}/{variation}" for sample_id, variation in shard.keys]
        self.keys += keys
        self.hashes += map(content_hash, shard)
        for name, values in of_rollouts(found).items():
            by_row = values.mean(-1, dtype=np.float64)
            means = np.add.reduceat(by_row, shard.offsets[:-1]) / shard.rollouts.lengths
            self.means.setdefault(name, []).extend(zip(keys, means.tolist(), strict=True))

    def joined(self, name: str) -> Array:
        """[n, C] of a measure over all shards that were read."""
        return np.concatenate(self.columns[name])


def named_measures(found: RowStatistics) -> dict[str, Array]:
    """Return the arrays [N, C] of some statistics that are there, by measure."""
    given = {name: getattr(found, name) for name in MEASURES}
    sizes = {f"rms {array}": values for array, values in found.rms.items()}
    return {name: values for name, values in given.items() if values is not None} | sizes


def of_rollouts(found: RowStatistics) -> dict[str, Array]:
    """Return the arrays [N, C] whose mean over a rollout tells it from the others, by measure."""
    sizes = {f"rms {array}": values for array, values in found.rms.items()}
    return sizes if found.entropy is None else {"entropy": found.entropy}


def read_shards(
    store: PredictionStore, shards: Sequence[int], progress: Progress = iter
) -> Sampled:
    """Read the arrays of some shards; one that is damaged is told of and left out."""
    rows = MOST_NUMBERS // max(len(store.manifest.streams) * len(shards), 1)
    sampled = Sampled(store, max(1, rows))
    for shard in progress(shards):
        sampled.read(shard)
    return sampled


def store_statistics(sampled: Sampled, of_shards: int, lengths: Document) -> Document:
    """Return what the arrays say as JSON values: `statistics`, `duplicates` and `outliers`.

    `of_shards` is how many shards there were to choose from, `lengths` the outliers among the
    lengths of all rollouts, which need no array.
    """
    far_out = {
        name: outliers([key for key, _ in means].__getitem__, np.array([mean for _, mean in means]))
        for name, means in sampled.means.items()
    }
    return {
        "statistics": statistics_document(sampled, of_shards),
        "duplicates": {
            "rollouts": equal_groups(zip(sampled.keys, sampled.hashes, strict=True)),
            "samples": equal_conditions(sampled.store),
        },
        "outliers": lengths | far_out,
    }


def statistics_document(sampled: Sampled, of_shards: int) -> Document:
    """Return quantiles of every measure by stream, and of continuous targets by noise level."""
    streams: list[Document] = [{"stream": s.name} for s in sampled.store.manifest.streams]
    for name in sampled.columns:
        values = sampled.joined(name)
        for stream, document in enumerate(streams):
            document[name] = quantiles(values[:, stream])
    return {
        "shards": sampled.shards,
        "of_shards": of_shards,
        "rollouts": len(sampled.keys),
        "timesteps": sampled.rows,
        "entropy_is": sampled.found.entropy_is,
        "temperature": sampled.found.temperature,
        "streams": streams,
        **({"levels": _by_level(sampled)} if sampled.levels else {}),
        "unreadable": sampled.unreadable,
    }


def _by_level(sampled: Sampled) -> list[Document]:
    """How large continuous values are in equal ranges of the noise level t, over all streams."""
    every = np.concatenate([t for parts in sampled.levels.values() for t in parts])
    edges = np.linspace(every.min(), every.max(), LEVELS + 1)
    ranges: list[Document] = [
        {"from": float(low), "to": float(high)} for low, high in pairwise(edges)
    ]
    for name, parts in sampled.levels.items():
        level, values = np.concatenate(parts), sampled.joined(name)
        places = np.clip(np.searchsorted(edges, level, side="right") - 1, 0, LEVELS - 1)
        for place, document in enumerate(ranges):
            inside = values[places == place]
            document["rows"] = max(document.get("rows", 0), len(inside))
            document[name] = quantiles(inside)
    return [document for document in ranges if document["rows"]]
