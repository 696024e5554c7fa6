"""Looking into one rollout of a store: what was predicted along it, and at one timestep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.candidates import describe_stream, summary
from pipeline.row_statistics import statistics_of
from pipeline.store_statistics import named_measures
from stages.errors import UserError
from store import PredictionStore, Rollout, Timestep
from store.encoding import COLUMN
from store.object_url import ObjectUrl
from store.schema import Manifest

Document = dict[str, Any]

ROLLOUT_KEY = re.compile(r"(?P<sample_id>.+)/(?P<variation>[0-9]{1,10})")
TIMESTEP_KEY = re.compile(ROLLOUT_KEY.pattern + r"/(?P<timestep>[0-9]{1,10})")


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
        if store.plan.locate((sample_id, variation)) is not None:
            return _timestep(store, store[sample_id, variation, int(match["timestep"])])
    raise UserError(
        f"key {key!r} is not SAMPLE/VARIATION or SAMPLE/VARIATION/TIMESTEP of a rollout in "
        f"{path}: `foretell inspect {path} --shard 0` lists those of a shard"
    )


def describe_rollout(path: Path | ObjectUrl, key: str) -> Document:
    """Return what is stored of SAMPLE/VARIATION; raises as `describe_key`, or for a timestep."""
    document = describe_key(path, key)
    if "timestep" in document:
        raise UserError(f"key {key!r} is of one timestep, but a rollout is asked for: leave it out")
    return document


def audio_length(timesteps: int, manifest: Manifest) -> Document:
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
        **audio_length(len(rollout), store.manifest),
        "stop_reason": rollout.stop_reason,
        "weight": rollout.weight,
        "seed": rollout.seed,
        "codes": rollout.codes.tolist() if "codes" in rollout.arrays else None,
        **({"drawn": dict(rollout.drawn)} if rollout.drawn else {}),
        **(_certainty(store, rollout) if "codes" in rollout.arrays else {"rows": _rows(rollout)}),
    }


def _certainty(store: PredictionStore, rollout: Rollout) -> Document:
    """How sure the teacher was at every timestep of a rollout of codes: a list [C] of each."""
    found = statistics_of(store, rollout.arrays)
    measures = {"codes": rollout.codes} | named_measures(found)
    return {
        "entropy_is": found.entropy_is,
        "temperature": found.temperature,
        "certainty": [
            {"timestep": timestep}
            | {name: values[timestep].tolist() for name, values in measures.items()}
            for timestep in range(len(rollout))
        ],
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
