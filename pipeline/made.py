"""What a stage made: its work in its own unit, and the bytes that it left."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from pipeline.config import Run
from pipeline.folders import RunFolders
from stages.training_log import read_log
from store import PredictionStore
from store.object_url import ObjectUrl
from store.remote import store_exists
from store.threads import in_threads


class Made(NamedTuple):
    """What a stage left, as far as it is known."""

    written_bytes: int | None = None
    """Bytes on disk or in object storage, checkpoints included."""
    made: int | None = None
    """Units of work."""
    unit: str | None = None
    """What the units are."""


def made(config: Run, stage: str) -> Made:
    """Return what a stage has made by now; nothing is known of what is not there."""
    folders, (name, _, part) = RunFolders(config), stage.partition(":")
    match name:
        case "prepare":
            return _dataset(folders.dataset)
        case "fit":
            return _training(folders.teacher)
        case "rollout":
            return _store(folders.store_of(part or None))
        case "train":
            return _training(folders.student(part))
        case _:
            return Made(_bytes_below(folders.report))


def _dataset(folder: Path) -> Made:
    table = folder / "samples.parquet"
    if not table.exists():
        return Made(_bytes_below(folder))
    return Made(_bytes_below(folder), pq.read_metadata(table).num_rows, "samples")


def _training(folder: Path) -> Made:
    steps = max((int(line["step"]) for line in read_log(folder / "log.jsonl")), default=None)
    return Made(_bytes_below(folder), steps, "optimizer steps")


def _store(path: Path | ObjectUrl) -> Made:
    """Add up the records of the committed shards; no array is read."""
    if not store_exists(path):
        return Made()
    store = PredictionStore.open(path)
    records = list(in_threads(lambda shard: store.folder(shard).record(), store.committed))
    size = sum(check.bytes for record in records for check in record.files.values())
    return Made(size, sum(record.rows for record in records), "timesteps")


def _bytes_below(folder: Path) -> int | None:
    """Bytes of all files below a folder; None where there is none."""
    if not folder.is_dir():
        return None
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
