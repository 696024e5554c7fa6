"""What the local page shows of a store: facts, one rollout over time, one timestep."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image

from pipeline.browse.rollout_index import RolloutIndex
from pipeline.candidates import describe_stream
from pipeline.row_statistics import statistics_of
from stages.errors import UserError
from store import PredictionStore, Rollout
from store.encoding import COLUMN, Array

Document = dict[str, Any]

MOST_CANDIDATES = 24
"""Candidates of a stream that are shown, and the drawn code with them."""
MOST_CHANNELS = 16
LARGEST_SIDE = 192
"""Values of a side of a channel up to which all of them are in its picture."""
LONGEST_CONDITION = 4000


def overview(index: RolloutIndex) -> Document:
    """Return what a store is, and what there is to filter by."""
    store, manifest = index.store, index.store.manifest
    timesteps = int(index.lengths.sum())
    scale = manifest.timestep_s
    return {
        "path": str(store.path),
        "family": manifest.family,
        "source": manifest.source,
        "split": manifest.split,
        "teacher": manifest.fingerprints.teacher,
        "target": manifest.target.model_dump(mode="json"),
        "profile": manifest.profile.kind,
        "cfg_scale": manifest.guidance.scale,
        "timestep_s": scale,
        "streams": [stream.model_dump(mode="json") for stream in manifest.streams],
        "shards": index.shards,
        "planned_shards": store.planned_shards,
        "rollouts": len(index),
        "samples": index.sample_count,
        "timesteps": timesteps,
        "audio_s": None if scale is None else timesteps * scale,
        "longest": int(index.lengths.max(initial=0)),
        "stop_reasons": index.stop_reason_counts,
        "has_entropy": index.has_entropy,
        "main_text": index.texts.main,
        "damaged": index.damaged,
    }


def describe_rollout(index: RolloutIndex, sample_id: str, variation: int) -> Document:
    """Return a rollout and its quantities over time; raises `StoreError`."""
    store = index.store
    rollout = store[sample_id, variation]
    scale = store.manifest.timestep_s
    return {
        "sample_id": sample_id,
        "variation": variation,
        "variations": index.variations(sample_id),
        "conditions": {
            name: str(value)[:LONGEST_CONDITION]
            for name, value in store.sample(sample_id).items()
            if name != "sample_id" and isinstance(value, str | int | float)
        },
        "timesteps": len(rollout),
        "seconds": None if scale is None else len(rollout) * scale,
        "stop_reason": rollout.stop_reason,
        "weight": rollout.weight,
        "seed": str(rollout.seed),  # JavaScript rounds integers of 64 bits
        "drawn": dict(rollout.drawn),
        "quantities": _quantities(store, rollout),
        "columns": _columns(rollout),
    }


def _quantities(store: PredictionStore, rollout: Rollout) -> list[Document]:
    """What there is to see of every timestep and stream: title, unit, note and values [C][T]."""
    found = statistics_of(store, rollout.arrays)
    note = {"lower bound": "a lower bound", "estimate": "an estimate, too low"}
    known = [
        _quantity("entropy", found.entropy, "nats", note.get(found.entropy_is or "", "")),
        _quantity("probability of the drawn code", found.code_probability),
        _quantity("tail mass", found.tail_mass),
        *(_quantity(f"root mean square of {name}", values) for name, values in found.rms.items()),
        *(_quantity(f"norm of {name}", values) for name, values in found.norm.items()),
    ]
    if any(known):
        return [quantity for quantity in known if quantity]
    # The teacher was not asked for this rollout; its timesteps can be chosen all the same.
    unknown = np.full((len(rollout), len(store.manifest.streams)), np.nan)
    return [_quantity("nothing was predicted", unknown)]


def _quantity(title: str, values: Array | None, unit: str = "", note: str = "") -> Document:
    """Nothing where there are no values [T, C]."""
    if values is None:
        return {}
    return {"title": title, "unit": unit, "note": note, "values": _finite(values)}


def _finite(values: Array) -> list[list[float | None]]:
    """[C][T] of values [T, C], with few digits; what is no finite number becomes None."""
    rows = values.astype(np.float64).T.tolist()
    return [[float(f"{v:.5g}") if math.isfinite(v) else None for v in row] for row in rows]


def _columns(rollout: Rollout) -> dict[str, list[float]]:
    """Columns of one float per timestep, by name; checksums and places tell people nothing."""
    return {
        name.removeprefix(COLUMN): np.round(values.astype(np.float64), 6).tolist()
        for name, values in rollout.arrays.items()
        if name.startswith(COLUMN) and values.ndim == 1 and values.dtype.kind == "f"
    }


def describe_timestep(
    store: PredictionStore, sample_id: str, variation: int, timestep: int
) -> Document:
    """Return what is stored of one timestep, as `describe_stream` says it.

    Of the candidates of a stream it has the most probable ones and the drawn code; `left_out` says
    how many others there are, and how probable they are together. Raises `StoreError`.
    """
    found = store[sample_id, variation, timestep]
    scale = store.manifest.timestep_s
    return {
        "sample_id": sample_id,
        "variation": variation,
        "timestep": timestep,
        "seconds": None if scale is None else timestep * scale,
        "streams": [
            {"stream": stream.name} | _shortened(describe_stream(store, found, number))
            for number, stream in enumerate(store.manifest.streams)
        ],
        "pictures": [name for name, values in found.arrays.items() if values.ndim == 4],
    }


def _shortened(stream: Document) -> Document:
    candidates = stream.get("candidates")
    if candidates is None:
        return {"summaries": stream}
    first, rest = candidates[:MOST_CANDIDATES], candidates[MOST_CANDIDATES:]
    drawn = [c for c in rest if c["id"] == stream["code"]]
    others = [c["probability"] for c in rest if c["id"] != stream["code"]]
    return stream | {
        "candidates": first + drawn,
        "left_out": {"count": len(others), "probability": math.fsum(others)},
    }


def channels_png(
    store: PredictionStore, sample_id: str, variation: int, timestep: int, stream: int, array: str
) -> bytes:
    """PNG of the channels of a stored prediction side by side, dark where least; raises.

    `UserError` for an array or stream without channels, `StoreError` for no such timestep.
    """
    arrays = store[sample_id, variation, timestep].arrays
    values = arrays.get(array)
    if values is None or values.ndim != 4 or not 0 <= stream < len(values):
        raise UserError(f"there is no picture of array {array!r}, stream {stream}")
    channels = values[stream, :MOST_CHANNELS].astype(np.float32)
    step = -(-max(channels.shape[1:]) // LARGEST_SIDE)
    channels = channels[:, ::step, ::step]
    least, most = channels.min(), channels.max()
    grey = np.round((channels - least) / max(most - least, 1e-12) * 255).astype(np.uint8)
    packed = io.BytesIO()
    Image.fromarray(np.concatenate(list(grey), -1), "L").save(packed, "PNG")
    return packed.getvalue()
