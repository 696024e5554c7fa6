"""How sure a teacher was at every row of a shard or a rollout, and how much of that is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipeline.stored_rows import (
    Arrays,
    Distributions,
    Draws,
    Kept,
    Whole,
    distributions_of,
    row_blocks,
    temperature_of,
)
from store import PredictionStore
from store.encoding import Array
from store.schema import Dense

Exactness = Literal["exact", "lower bound", "estimate"]


@dataclass(frozen=True)
class RowStatistics:
    """Numbers of N rows and C streams; those that a target cannot give are None or absent."""

    entropy: Array | None = None
    """[N, C] float32 in nats, of the guided distribution without sampling filters."""
    entropy_is: Exactness | None = None
    """What it is: `exact` for `full` and `hidden`; a `lower bound` for `top_k`, whose tail counts
    as one category beside the K kept ids; an `estimate` for `sampled`, of the draws, too low."""
    code_probability: Array | None = None
    """[N, C] float32: of the drawn code; for `sampled` its share of the draws, which may be 0."""
    kept_mass: Array | None = None
    """[N, C] float32: probability of the kept ids; `top_k` only."""
    tail_mass: Array | None = None
    """[N, C] float32: probability of all others; `top_k` only."""
    temperature: float = 1.0
    """Temperature of all of these: 1 wherever the store knows that."""
    rms: Mapping[str, Array] = field(default_factory=dict)
    """[N, C] float32: root mean square of every latent of a continuous target, by array."""
    norm: Mapping[str, Array] = field(default_factory=dict)
    """[N, C] float32: its Euclidean norm, which grows with the number of values."""


def statistics_of(store: PredictionStore, arrays: Arrays) -> RowStatistics:
    """Return what can be said of the rows of some arrays [N, …] of a store, by blocks of rows."""
    if isinstance(store.manifest.target, Dense):
        return _of_latents(store, arrays)
    rows = len(arrays["codes"])
    blocks = list(_blocks(store, arrays, rows))

    def joined(name: str) -> Array | None:
        parts = [part for block in blocks if (part := block[name]) is not None]
        return np.concatenate(parts) if parts else None

    return RowStatistics(
        entropy=joined("entropy"),
        entropy_is=_exactness(store),
        code_probability=joined("code_probability"),
        kept_mass=joined("kept_mass"),
        tail_mass=joined("tail_mass"),
        temperature=temperature_of(store.manifest),
    )


def _blocks(store: PredictionStore, arrays: Arrays, rows: int) -> Iterator[dict[str, Array | None]]:
    for block in row_blocks(store.manifest, rows):
        part = {name: array[block] for name, array in arrays.items()}
        yield _of_block(distributions_of(store, part), part["codes"])


def _of_block(found: Distributions, codes: Array) -> dict[str, Array | None]:
    """Arrays [n, C] by the names of `RowStatistics`."""
    kept_mass = tail_mass = None
    match found:
        case Whole(logprobs):
            entropy = _entropy(logprobs)
            of_code = np.take_along_axis(logprobs, codes[..., None].astype(np.int64), -1)[..., 0]
            probability = np.exp(of_code)
        case Kept(ids, logprobs, tail):
            entropy = _entropy(logprobs) + _entropy(tail[..., None])
            probability = np.exp(np.where(ids == codes[..., None], logprobs, -np.inf).max(-1))
            kept_mass = np.minimum(np.exp(logprobs).sum(-1), np.float32(1))  # rounding adds up
            tail_mass = np.exp(tail)
        case Draws(ids):
            entropy = _entropy_of_draws(ids)
            probability = (ids == codes[..., None]).mean(-1, dtype=np.float32)
    return {
        "entropy": entropy,
        "code_probability": probability,
        "kept_mass": kept_mass,
        "tail_mass": tail_mass,
    }


def _entropy(logprobs: Array) -> Array:
    """[n, C] −Σ p log p over the last axis; where p is 0 it adds nothing."""
    finite = np.maximum(logprobs, np.finfo(np.float32).min)
    return np.asarray(np.maximum(-(np.exp(finite) * finite).sum(-1), np.float32(0)))


def _entropy_of_draws(ids: Array) -> Array:
    """[n, C] entropy of how often each of the rising ids [n, C, N] was drawn."""
    begins = np.ones(ids.shape, bool)
    begins[..., 1:] = ids[..., 1:] != ids[..., :-1]
    run = np.cumsum(begins).reshape(ids.shape) - 1  # a number for every id of every row
    share = np.bincount(run.ravel())[run] / ids.shape[-1]
    return np.asarray(-np.log(share).mean(-1), np.float32)


def _exactness(store: PredictionStore) -> Exactness:
    names: dict[str, Exactness] = {"top_k": "lower bound", "sampled": "estimate"}
    return names.get(store.manifest.target.kind, "exact")


def _of_latents(store: PredictionStore, arrays: Arrays) -> RowStatistics:
    rms, norm = {}, {}
    streams = len(store.manifest.streams)
    for name, values in arrays.items():
        if values.ndim > 1:
            flat = values.reshape(len(values), streams, -1)
            norm[name] = _norm(flat)
            rms[name] = norm[name] / np.float32(np.sqrt(flat.shape[-1]))
    return RowStatistics(rms=rms, norm=norm)


def _norm(flat: Array) -> Array:
    """[N, C] float32 of values [N, C, n], a row at a time, so that float16 takes no room twice."""
    exact = (np.square(row.astype(np.float32)).sum(-1) for row in flat)
    return np.asarray(np.sqrt(np.stack(list(exact))))
