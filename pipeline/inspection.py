"""Looking into a store, a shard or a model: what it is, and how large."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeGuard

import numpy as np

from pipeline.quantiles import histogram, outliers, quantiles
from pipeline.rollout_inspection import Document, audio_length
from pipeline.store_statistics import (
    Progress,
    read_shards,
    shards_to_read,
    store_statistics,
)
from stages.rejections import kind_of
from stages.saved_model import is_saved, saved_model
from store import PredictionStore
from store.encoding import Array
from store.errors import ShardError
from store.object_url import ObjectUrl
from store.schema import Manifest
from store.shard import RolloutTable, ShardRecord
from store.shard_folder import ShardFolder
from store.side_tables import table_files


@dataclass
class _Content:
    """What the committed shards hold, by their records and tables of rollouts."""

    shards: list[int] = field(default_factory=list)
    """Those that could be read."""
    unreadable: list[Document] = field(default_factory=list)
    timesteps: int = 0
    lengths: list[Array] = field(default_factory=list)
    """[R] int64 of every shard."""
    stop_reasons: Counter[str] = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Weights in training of the rollouts of every stop reason, added up."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Bytes on disk of every array; other files count as `tables`."""
    plain: Counter[str] = field(default_factory=Counter)
    """Bytes of the values of every array, not encoded."""
    rows: Counter[str] = field(default_factory=Counter)
    """Timesteps of the shards that have an array."""

    def read(self, folder: ShardFolder) -> None:
        """Add a shard, or what keeps its record and table from being read."""
        try:
            record = folder.record()
            self._add(folder, record, folder.read_rollouts(record))
        except ShardError as error:
            self.unreadable.append({"shard": folder.number, "reason": str(error)})

    def _add(self, folder: ShardFolder, record: ShardRecord, table: RolloutTable) -> None:
        self.shards.append(folder.number)
        self.timesteps += record.rows
        self.lengths.append(table.lengths)
        self.stop_reasons.update(table.stop_reasons)
        for reason, weight in zip(table.stop_reasons, table.weights.tolist(), strict=True):
            self.weights[reason] += weight
        self.sizes.update(array_bytes(record))
        for name, files in folder.files.items():
            self.plain[name] += record.rows * files.spec.row_bytes
            self.rows[name] += record.rows


def array_bytes(record: ShardRecord) -> dict[str, int]:
    """Return the bytes on disk of every array of a shard; its other files count as `tables`."""
    sizes: Counter[str] = Counter()
    for file, check in record.files.items():
        array, separator, _ = file.partition("/")
        sizes[array if separator else "tables"] += check.bytes
    return dict(sizes)


def describe_store(path: Path | ObjectUrl, progress: Progress = iter) -> Document:
    """Return what a store is and what is in it, as JSON values; reads no array.

    `progress` may wrap the list of shards (tqdm).
    """
    store = PredictionStore.open(path)
    return store_header(store) | store_content(store, progress)


def store_parts(
    store: PredictionStore, everything: bool, progress: Progress = iter
) -> Iterator[Document]:
    """Yield what is known of a store, in three documents, each as soon as it is known.

    `store_header` opens nothing, `store_content` reads the tables of all shards, and
    `store_statistics` the arrays of a few of them, or of all where `everything` is asked for.
    """
    yield store_header(store)
    content = store_content(store, progress)
    outliers_found = content.pop("outliers")
    yield content
    damaged = {found["shard"] for found in content["unreadable"]}
    whole = [shard for shard in store.committed if shard not in damaged]
    stored_bytes = sum(content["bytes"].values())
    shards = whole if everything else shards_to_read(whole, stored_bytes, store.is_remote)
    yield store_statistics(read_shards(store, shards, progress), len(whole), outliers_found)


def store_header(store: PredictionStore) -> Document:
    """Return what a store is, by its manifest, its plan and the list of its shards."""
    manifest, rejected = store.manifest, store.rejected
    return {
        "shards": len(store.committed),
        "planned_shards": store.planned_shards,
        "missing_shards": store.planned_shards - len(store.committed),
        "rollouts": len(store),
        "planned_rollouts": store.plan.rollouts,
        "rejected": len(rejected),
        "rejected_for": dict(Counter(kind_of(reason) for _, reason in rejected).most_common()),
        "streams": [stream.model_dump() for stream in manifest.streams],
        **_beside_target(store),
        "targets": manifest.target.model_dump(mode="json"),
        "profile": manifest.profile.model_dump(mode="json"),
        "lineage": [ancestor.model_dump(mode="json") for ancestor in manifest.lineage],
        "teacher": manifest.fingerprints.teacher,
        "architecture": manifest.architecture,
        "quantization": manifest.quantization and manifest.quantization.model_dump(mode="json"),
        "cfg_scale": manifest.guidance.scale,
        "family": manifest.family,
        **({} if manifest.timestep_s is None else {"timestep_s": manifest.timestep_s}),
        "source": manifest.source,
        "sampler": manifest.sampler.model_dump(mode="json"),
        "split": manifest.split,
        "seed": manifest.seed,
        "fingerprints": manifest.fingerprints.model_dump(),
        "fingerprint": store.fingerprint,
        "format_version": manifest.format_version,
    }


def store_content(store: PredictionStore, progress: Progress = iter) -> Document:
    """Return what the committed shards hold, by their records and tables; reads no array.

    A shard whose record or table is damaged is told of and left out.
    """
    content = _Content()
    for shard in progress(store.committed):
        content.read(store.folder(shard))
    lengths = np.concatenate([np.zeros(0, np.int64), *content.lengths])
    return {
        "timesteps": content.timesteps,
        **audio_length(content.timesteps, store.manifest),
        "bytes": dict(sorted(content.sizes.items())),
        "arrays": _arrays(content, store.manifest),
        "longest": int(lengths.max(initial=0)),
        "lengths": quantiles(lengths) | histogram(lengths),
        "outliers": {"length": outliers(partial(_key_at, store, content.shards), lengths)},
        "stop_reasons": dict(content.stop_reasons),
        "weights": dict(content.weights),
        "weight": math.fsum(content.weights.values()),
        "unreadable": content.unreadable,
    }


def _key_at(store: PredictionStore, shards: list[int], place: int) -> str:
    """SAMPLE/VARIATION of a rollout by its place among those of some shards."""
    ends = np.cumsum(store.plan.sizes[shards])
    at = int(np.searchsorted(ends, place, side="right"))
    shard = shards[at]
    sample_id, variation = store.plan[shard][place - int(ends[at])]
    return f"{sample_id}/{variation}"


def _arrays(content: _Content, manifest: Manifest) -> list[Document]:
    """Bytes of every array, of the other files and of all: in all, per timestep and per second."""
    total = sum(content.sizes.values())
    plain = sum(content.plain.values())
    lines: list[tuple[str, int, int | None, int]] = [
        (name, content.sizes[name], size, content.rows[name])
        for name, size in sorted(content.plain.items())
    ]
    lines.append(("tables", content.sizes["tables"], None, content.timesteps))
    lines.append(("all", total, plain, content.timesteps))
    return [
        {
            "array": name,
            "bytes": size,
            "plain_bytes": plain_size,
            "ratio": plain_size / size if plain_size else None,
            "bytes_per_timestep": size / rows,
            **({} if manifest.timestep_s is None else
               {"bytes_per_audio_s": size / (rows * manifest.timestep_s)}),
        }
        for name, size, plain_size, rows in lines
        if rows
    ]  # fmt: skip


def _beside_target(store: PredictionStore) -> Document:
    """What a store holds beside its target, as far as there is any."""
    manifest, buckets = store.manifest, Counter(map(store.plan.bucket_of, store.committed))
    tables = {
        name: {"rows": facts.rows, "bytes": sum(manifest.files[f].bytes for f in files)}
        for name, facts in manifest.tables.items()
        for files in [list(table_files(name, facts))]
    }
    found = {
        "columns": [column.model_dump() for column in manifest.columns],
        "drawn": list(manifest.drawn),
        "buckets": [
            bucket.model_dump(mode="json") | {"shards": buckets[number]}
            for number, bucket in enumerate(manifest.buckets)
        ],
        "tables": tables,
        "recording": manifest.recording,
    }
    return {name: value for name, value in found.items() if value}


def is_model(path: Path | ObjectUrl) -> TypeGuard[Path]:
    """Whether a folder is that of a model and not of a store."""
    if not isinstance(path, Path):
        return False
    return (path / "config.json").exists() and not (path / "manifest.json").exists()


def describe_model(folder: Path) -> Document:
    """Return what a model is, from its config.json alone, as JSON values."""
    model = saved_model(folder)
    counted = model.architecture
    return {
        "family": model.config.family,
        "finished": is_saved(folder),
        "architecture": {} if counted is None else counted.model_dump(mode="json"),
        "config": model.config.model_dump(mode="json"),
        "facts": model.facts,
    }


def describe_shard(path: Path | ObjectUrl, number: int) -> Document:
    """Return what a committed shard holds, with every file compared with its sum.

    Raises `StoreError` where it is not planned or not committed. A damaged shard is described as
    far as it can be read, with its `faults`.
    """
    store = PredictionStore.open(path)
    table = store.rollout_table(number)
    with store.whole_folder(number) as folder:
        record = folder.record()
        faults = list(_faults(folder, record))
        sizes = array_bytes(record)
    return {
        "shard": number,
        "rollouts": len(table),
        "timesteps": record.rows,
        **audio_length(record.rows, store.manifest),
        "bytes": dict(sorted(sizes.items())),
        "arrays": [
            {
                "array": name,
                "dtype": files.spec.dtype.name,
                "shape": [record.rows, *files.spec.trailing],
                "chunk_timesteps": files.chunk,
                "chunks": files.chunk_count(record.rows),
                "bytes": sizes[name],
                "plain_bytes": record.rows * files.spec.row_bytes,
                "ratio": record.rows * files.spec.row_bytes / sizes[name],
            }
            for name, files in folder.files.items()
        ],
        "faults": faults,
        "table": _table(store, number, table, readable=not faults),
    }


def _faults(folder: ShardFolder, record: ShardRecord) -> Iterator[Document]:
    for stranger in folder.strangers(record):
        yield {"file": stranger.file, "array": stranger.array, "reason": stranger.reason}
    for file in sorted(record.files):
        try:
            folder.check_file(file, record)
        except ShardError as error:
            yield {"file": file, "array": error.array, "reason": error.reason}


def _table(
    store: PredictionStore, number: int, table: RolloutTable, *, readable: bool
) -> list[Document]:
    """A line for every rollout of a shard; with its mean entropy or size where arrays are sound."""
    means = read_shards(store, [number]).means if readable else {}
    lines = []
    for row, (sample_id, variation) in enumerate(store.plan[number]):
        line = {
            "sample_id": sample_id,
            "variation": variation,
            "start": int(table.offsets[row]),
            "timesteps": int(table.lengths[row]),
            "stop_reason": table.stop_reasons[row],
            "weight": float(table.weights[row]),
            "seed": int(table.seeds[row]),
        }
        drawn = {name: int(values[row]) for name, values in table.drawn.items()}
        lines.append(line | drawn | {name: found[row][1] for name, found in means.items()})
    return lines
