"""What a store says of one timestep: the likeliest ids of every stream, whatever its target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.stored_rows import (
    Draws,
    Kept,
    Whole,
    allowed_ids,
    branches_of,
    distributions_of,
    guided_logits,
    log_softmax,
)
from store import PredictionStore, Timestep
from store.encoding import Array
from store.schema import Dense, Full, Hidden, Sampled, TopK

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
        case Full() | Hidden():
            found = _whole(store, timestep, stream)
        case TopK() | Sampled():
            found = _part(store, timestep, stream)
    if "full.levels" in timestep.arrays:
        found["level"] = float(timestep.arrays["full.levels"][stream])
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


def _part(store: PredictionStore, timestep: Timestep, stream: int) -> Document:
    """Candidates of a target that keeps some ids of a row."""
    match distributions_of(store, _one_row(timestep)):
        case Kept(ids, logprobs, tail):
            ranked = _ranked(ids[0, stream], np.exp(logprobs[0, stream].astype(np.float64)))
            return {"tail_mass": float(np.exp(tail[0, stream])), "candidates": ranked}
        case Draws(ids):
            unique, counts = np.unique(ids[0, stream], return_counts=True)
            ranked = _ranked(unique, counts / ids.shape[-1])
            return {"tail_mass": None, "candidates": ranked}
        case Whole():
            raise AssertionError("a whole distribution is shown with its branches")


def _whole(store: PredictionStore, timestep: Timestep, stream: int) -> Document:
    """Candidates of a target that knows all ids: with those of both branches where it has them."""
    branches = branches_of(store, _one_row(timestep))
    guided = guided_logits(store.manifest, branches)
    ids = np.flatnonzero(allowed_ids(store.manifest)[stream])

    def probabilities(logits: Array) -> Array:
        return np.asarray(np.exp(log_softmax(logits[0, stream].astype(np.float64)))[ids])

    apart = branches if "cond" in branches else {}
    shown = {name: probabilities(logits) for name, logits in apart.items()}
    return {"tail_mass": 0.0, "candidates": _ranked(ids, probabilities(guided), shown)}


def _one_row(timestep: Timestep) -> dict[str, Array]:
    """Arrays [1, …] of a timestep."""
    return {name: array[None] for name, array in timestep.arrays.items()}


def _ranked(
    ids: Array, probabilities: Array, branches: Mapping[str, Array] | None = None
) -> list[Document]:
    return [
        {"id": int(ids[place]), "probability": float(probabilities[place])}
        | {name: float(values[place]) for name, values in (branches or {}).items()}
        for place in np.argsort(-probabilities, kind="stable")
        if probabilities[place] > 0
    ]
