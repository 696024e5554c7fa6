"""Looking into a store or a model: what it is, how large, and what was predicted at one place."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from pipeline.candidates import describe_stream, summary
from stages.errors import UserError
from stages.rejections import kind_of
from stages.saved_model import is_saved, saved_model
from store import PredictionStore, Rollout, Timestep
from store.encoding import COLUMN
from store.object_url import ObjectUrl
from store.schema import Manifest
from store.shard_folder import ShardFolder
from store.side_tables import table_files

Document = dict[str, Any]

ROLLOUT_KEY = re.compile(r"(?P<sample_id>.+)/(?P<variation>[0-9]{1,10})")
TIMESTEP_KEY = re.compile(ROLLOUT_KEY.pattern + r"/(?P<timestep>[0-9]{1,10})")


@dataclass
class _Content:
    """What the committed shards hold."""

    timesteps: int = 0
    longest: int = 0
    stop_reasons: Counter[str] = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Weights in training of the rollouts of every stop reason, added up."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Bytes on disk of every array; other files count as `tables`."""

    def add(self, folder: ShardFolder) -> None:
        record = folder.record()
        table = folder.read_rollouts(record)
        self.timesteps += record.rows
        self.longest = max(self.longest, int(table.lengths.max()))
        self.stop_reasons.update(table.stop_reasons)
        for reason, weight in zip(table.stop_reasons, table.weights.tolist(), strict=True):
            self.weights[reason] += weight
        for file, check in record.files.items():
            array, separator, _ = file.partition("/")
            self.sizes[array if separator else "tables"] += check.bytes


def describe_store(
    path: Path | ObjectUrl, progress: Callable[[Sequence[int]], Iterable[int]] = iter
) -> Document:
    """Return what a store is and what is in it, as JSON values; reads no array.

    `progress` may wrap the list of shards (tqdm).
    """
    store = PredictionStore.open(path)
    manifest, content, rejected = store.manifest, _Content(), store.rejected
    for shard in progress(store.committed):
        content.add(store.folder(shard))
    return {
        "shards": len(store.committed),
        "planned_shards": store.planned_shards,
        "rollouts": len(store),
        "rejected": len(rejected),
        "rejected_for": dict(Counter(kind_of(reason) for _, reason in rejected).most_common()),
        "timesteps": content.timesteps,
        **_audio(content.timesteps, manifest),
        "bytes": dict(sorted(content.sizes.items())),
        "longest": content.longest,
        "stop_reasons": dict(content.stop_reasons),
        "weights": dict(content.weights),
        "weight": math.fsum(content.weights.values()),
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
        "source": manifest.source,
        "sampler": manifest.sampler.model_dump(mode="json"),
        "split": manifest.split,
        "seed": manifest.seed,
        "fingerprints": manifest.fingerprints.model_dump(),
        "format_version": manifest.format_version,
    }


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


def describe_key(path: Path | ObjectUrl, key: str) -> Document:
    """Return what is stored of SAMPLE/VARIATION, or of SAMPLE/VARIATION/TIMESTEP.

    Sample ids may hold slashes: the last one or two parts are numbers. Raises `UserError` for a
    key of another form and `StoreError` for one that the store does not hold.
    """
    store = PredictionStore.open(path)
    for pattern in (TIMESTEP_KEY, ROLLOUT_KEY):
        match = pattern.fullmatch(key)
        if match is None:
            continue
        sample_id, variation = match["sample_id"], int(match["variation"])
        if pattern is ROLLOUT_KEY:
            return _rollout(store, store[sample_id, variation])
        # A sample id may itself end in "/3", so a key can be read in two ways.
        if (sample_id, variation) in store:
            return _timestep(store, store[sample_id, variation, int(match["timestep"])])
    raise UserError(
        f"key {key!r} is not SAMPLE/VARIATION or SAMPLE/VARIATION/TIMESTEP of a rollout in "
        f"{path}: `foretell inspect {path}` says what is there"
    )


def _audio(timesteps: int, manifest: Manifest) -> Document:
    """Seconds of audio of some timesteps, where they are audio."""
    seconds = manifest.timestep_s
    return {} if seconds is None else {"audio_s": timesteps * seconds}


def _rollout(store: PredictionStore, rollout: Rollout) -> Document:
    return {
        "sample_id": rollout.sample_id,
        "variation": rollout.variation,
        "conditions": {
            name: value
            for name, value in store.sample(rollout.sample_id).items()
            if isinstance(value, str | int | float)
        },
        "timesteps": len(rollout),
        **_audio(len(rollout), store.manifest),
        "stop_reason": rollout.stop_reason,
        "weight": rollout.weight,
        "seed": rollout.seed,
        "codes": rollout.codes.tolist() if "codes" in rollout.arrays else None,
        **({"drawn": dict(rollout.drawn)} if rollout.drawn else {}),
        **({} if "codes" in rollout.arrays else {"rows": _rows(rollout)}),
    }


def _rows(rollout: Rollout) -> list[Document]:
    """Every timestep of a rollout without codes: its columns, and how large its predictions are."""
    return [
        _columns(timestep)
        | {
            name: {part: found[part] for part in ("mean", "std")}
            for name, values in timestep.arrays.items()
            if not name.startswith(COLUMN)
            for found in [summary(values)]
        }
        for timestep in map(rollout.__getitem__, range(len(rollout)))
    ]


def _columns(timestep: Timestep) -> Document:
    """The columns of a timestep that are numbers."""
    return {
        name.removeprefix(COLUMN): value.item()
        for name, value in timestep.arrays.items()
        if name.startswith(COLUMN) and not value.ndim
    }


def _timestep(store: PredictionStore, timestep: Timestep) -> Document:
    document = {
        "sample_id": timestep.sample_id,
        "variation": timestep.variation,
        "timestep": timestep.timestep,
        "streams": [
            {"stream": stream.name, **describe_stream(store, timestep, index)}
            for index, stream in enumerate(store.manifest.streams)
        ],
    }
    beside = {"columns": _columns(timestep), "drawn": dict(timestep.drawn)}
    return document | {name: values for name, values in beside.items() if values}
