"""What a store says of one timestep: the likeliest ids of every stream, whatever its target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.guidance import guide
from store import PredictionStore, Timestep
from store.encoding import Array
from store.schema import Dense, Full, Hidden, Manifest, Sampled, TopK

Document = dict[str, Any]


def describe_stream(store: PredictionStore, timestep: Timestep, stream: int) -> Document:
    """Return the drawn code and the candidates of one stream, most probable first.

    With both branches stored the probabilities are those at the guidance scale of the drawn codes,
    and each candidate has those of the branches beside it. A continuous stream has the mean,
    standard deviation, root mean square and range of its values instead, and of its latent columns.
    """
    manifest = store.manifest
    match manifest.target:
        case Dense():
            arrays = timestep.arrays.items()
            return {name: summary(values[stream]) for name, values in arrays if values.ndim}
        case TopK():
            found = _kept(timestep.arrays, stream)
        case Sampled():
            found = _drawn(timestep.arrays["sampled.ids"][stream])
        case Full():
            parts = {
                name.removeprefix("full."): array[stream]
                for name, array in timestep.arrays.items()
                if name not in ("codes", "full.levels")
            }
            found = _whole(manifest, parts, stream)
            if "full.levels" in timestep.arrays:
                found["level"] = float(timestep.arrays["full.levels"][stream])
        case Hidden():
            found = _whole(manifest, _logits(store, timestep, stream), stream)
    return {"code": int(timestep.arrays["codes"][stream]), **found}


def summary(values: Array) -> Document:
    """Return the mean, standard deviation, root mean square and range of some values."""
    exact = values.astype(np.float64)
    return {
        "mean": float(exact.mean()),
        "std": float(exact.std()),
        "rms": float(np.sqrt(np.square(exact).mean())),
        "least": float(exact.min()),
        "most": float(exact.max()),
    }


def _kept(arrays: Mapping[str, Array], stream: int) -> Document:
    tail = float(np.exp(arrays["top_k.tail_logmass"][stream, 0]))
    probabilities = _softmax(arrays["top_k.logits"][stream]) * (1 - tail)
    return {"tail_mass": tail, "candidates": _ranked(arrays["top_k.ids"][stream], probabilities)}


def _drawn(ids: Array) -> Document:
    unique, counts = np.unique(ids, return_counts=True)
    return {"tail_mass": None, "candidates": _ranked(unique, counts / len(ids))}


def _whole(manifest: Manifest, parts: Mapping[str, Array], stream: int) -> Document:
    """Candidates from all logits of a stream: the guided ones, or those of both branches."""
    ids = np.arange(manifest.vocabularies[stream])
    allowed = ~np.isin(ids, manifest.forbidden)
    ids = ids[allowed]
    known = {name: logits[: len(allowed)][allowed] for name, logits in parts.items()}
    if "cond" not in known:
        return {"tail_mass": 0.0, "candidates": _ranked(ids, _softmax(known["logits"]))}
    guided = guide(known["cond"], known["uncond"], manifest.guidance.scale)
    branches = {name: _softmax(logits) for name, logits in known.items()}
    return {"tail_mass": 0.0, "candidates": _ranked(ids, _softmax(guided), branches)}


def _logits(store: PredictionStore, timestep: Timestep, stream: int) -> dict[str, Array]:
    """Logits [V] of one stream, from its state and its head, by branch."""
    group = store.manifest.streams[stream].group
    place = [s.group for s in store.manifest.streams[:stream]].count(group)
    weight, bias = store.heads[f"{group}.weight"][place], store.heads[f"{group}.bias"][place]
    logits = {}
    for branch, name in (("logits", ""), ("cond", "cond."), ("uncond", "uncond.")):
        states = timestep.arrays.get(f"hidden.{name}{group}")
        if states is not None:
            state = states[place if len(states) > 1 else 0]
            logits[branch] = weight @ state.astype(np.float32) + bias
    return logits


def _ranked(
    ids: Array, probabilities: Array, branches: Mapping[str, Array] | None = None
) -> list[Document]:
    return [
        {"id": int(ids[place]), "probability": float(probabilities[place])}
        | {name: float(values[place]) for name, values in (branches or {}).items()}
        for place in np.argsort(-probabilities, kind="stable")
        if probabilities[place] > 0
    ]


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(exponentials / exponentials.sum())
