"""What is stored of some rows of codes, as distributions in numpy: whole, with a tail, or drawn.

`stages.targets` is the same for training, in torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from stages.guidance import guide
from store import PredictionStore
from store.encoding import Array
from store.schema import Dense, Full, Hidden, Manifest, Sampled, TopK

Arrays = Mapping[str, Array]
"""Arrays [n, …] of n rows by name, as a shard, a rollout or a part of one holds them."""

BLOCK_NUMBERS = 2**21
"""Probabilities that are in memory at a time, 8 MiB."""
LEAST_KEPT_MASS = 2.0**-24
"""What a tail that is everything leaves to the kept ids: half a step of float32 below 1."""


@dataclass(frozen=True)
class Whole:
    """Every probability of some rows."""

    logprobs: Array
    """[n, C, V] float32, -inf at ids that the manifest forbids or a stream does not have."""


@dataclass(frozen=True)
class Kept:
    """The likeliest ids of some rows, and the mass of all the others."""

    ids: Array
    """[n, C, K] rising."""
    logprobs: Array
    """[n, C, K] float32, in the order of the ids."""
    tail_logmass: Array
    """[n, C] float32, at most 0; -inf where nothing was left out."""


@dataclass(frozen=True)
class Draws:
    """Ids that were drawn from the distributions of some rows."""

    ids: Array
    """[n, C, N] rising, with repeats."""


Distributions = Whole | Kept | Draws


def temperature_of(manifest: Manifest) -> float:
    """Temperature at which distributions are shown: 1, or the first one whose tail is stored."""
    target = manifest.target
    if not isinstance(target, TopK) or 1.0 in target.temperatures:
        return 1.0
    return target.temperatures[0]


def distributions_of(
    store: PredictionStore, arrays: Arrays, temperature: float | None = None
) -> Distributions:
    """Return the guided distributions of rows at a temperature, without sampling filters.

    Where both branches are stored they are mixed at the guidance scale of the drawn codes.
    `temperature` is `temperature_of` the manifest if left out; draws were made at 1. Raises
    ValueError where the target is continuous or has no tail at that temperature.
    """
    manifest = store.manifest
    heat = temperature_of(manifest) if temperature is None else temperature
    match manifest.target:
        case Dense():
            raise ValueError("continuous predictions are no distributions over ids")
        case Sampled():
            return Draws(arrays["sampled.ids"])
        case TopK() as target:
            return _kept(arrays, target.temperatures.index(heat), heat)
        case Full() | Hidden():
            return Whole(log_softmax(guided_logits(manifest, branches_of(store, arrays)) / heat))


def branches_of(store: PredictionStore, arrays: Arrays) -> dict[str, Array]:
    """Return logits [n, C, V] float32 of the targets `full` and `hidden` by branch.

    The branch is `logits` where one was stored, else `cond` and `uncond`; -inf at ids that the
    manifest forbids or a stream does not have.
    """
    manifest, branches = store.manifest, {}
    for branch in ("logits", "cond", "uncond"):
        if isinstance(manifest.target, Full):
            stored = arrays.get(f"full.{branch}")
            found = None if stored is None else stored.astype(np.float32)
        else:
            found = _through_heads(store, arrays, "" if branch == "logits" else f"{branch}.")
        if found is not None:
            branches[branch] = np.where(allowed_ids(manifest), found, -np.inf)
    return branches


def guided_logits(manifest: Manifest, branches: Arrays) -> Array:
    """Return logits [n, C, V] float32 of what `branches_of` found, at the stored guidance scale."""
    if "logits" in branches:
        return branches["logits"]
    allowed = allowed_ids(manifest)
    cond, uncond = (np.where(allowed, branches[name], 0) for name in ("cond", "uncond"))
    return np.where(allowed, guide(cond, uncond, manifest.guidance.scale), np.float32(-np.inf))


def allowed_ids(manifest: Manifest) -> Array:
    """Return [C, V] bool: the ids of each stream that the manifest does not forbid."""
    ids = np.arange(manifest.vocabulary)
    within = ids < np.array(manifest.vocabularies)[:, None]
    return cast(Array, within & ~np.isin(ids, manifest.forbidden))


def log_softmax(logits: Array) -> Array:
    """Return natural logs of probabilities [..., V], in the type of the logits."""
    shifted = logits - logits.max(-1, keepdims=True)
    return cast(Array, shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def row_blocks(manifest: Manifest, rows: int) -> Iterator[slice]:
    """Cut rows into blocks whose probabilities fit into `BLOCK_NUMBERS`."""
    target = manifest.target
    width = {
        "top_k": getattr(target, "k", 1),
        "sampled": getattr(target, "draws", 1),
    }.get(target.kind, manifest.vocabulary)
    step = max(1, BLOCK_NUMBERS // (len(manifest.streams) * max(width, 1)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _kept(arrays: Arrays, place: int, temperature: float) -> Kept:
    tail = np.minimum(arrays["top_k.tail_logmass"][..., place], np.float32(0))
    kept = np.maximum(-np.expm1(tail), np.float32(LEAST_KEPT_MASS))
    shares = log_softmax(arrays["top_k.logits"].astype(np.float32) / np.float32(temperature))
    return Kept(arrays["top_k.ids"], shares + np.log(kept)[..., None], tail)


def _through_heads(store: PredictionStore, arrays: Arrays, branch: str) -> Array | None:
    """Logits [n, C, V] of one branch of hidden states; None where it is not stored."""
    manifest = store.manifest
    if f"hidden.{branch}{manifest.heads[0].group}" not in arrays:
        return None
    groups = [stream.group for stream in manifest.streams]
    rows = len(next(iter(arrays.values())))
    logits = np.empty((rows, len(groups), manifest.vocabulary), np.float32)
    for head in manifest.heads:
        states = arrays[f"hidden.{branch}{head.group}"].astype(np.float32)  # [n, H, D]
        weight, bias = store.heads[f"{head.group}.weight"], store.heads[f"{head.group}.bias"]
        for place, stream in enumerate(np.flatnonzero(np.array(groups) == head.group)):
            state = states[:, place if head.vectors > 1 else 0]
            logits[:, stream] = state @ weight[place].T + bias[place]
    return logits
