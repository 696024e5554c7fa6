"""Stores of random but valid predictions, for tests and benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from store.encoding import Array, ArraySpec, array_specs, ids_dtype
from store.heads import head_shapes
from store.plan import Key, Plan
from store.reader import PredictionStore
from store.schema import (
    Dense,
    Fast,
    Fingerprints,
    Full,
    Guidance,
    Head,
    Hidden,
    Latent,
    Manifest,
    Profile,
    Sampled,
    Sampler,
    Stream,
    Target,
    TopK,
)

WIDTH = 16


def synthetic_manifest(
    target: Target, streams: int = 2, vocabulary: int = 34, profile: Profile | None = None
) -> Manifest:
    """Manifest of C streams of V ids: the last id ends a rollout, the one before it is forbidden.

    For the target `dense` the streams are continuous, of shape [4, 3]. Raises ValueError as
    `Manifest` does.
    """
    dense = isinstance(target, Dense)
    names = [f"backbone.{stream}" for stream in range(streams)]
    categorical = [Stream(name=n, group="backbone", vocabulary=vocabulary) for n in names]
    continuous = [Latent(name=n, group="backbone", shape=(4, 3)) for n in names]
    head = Head(group="backbone", vectors=1, width=WIDTH)
    return Manifest(
        family="synthetic",
        streams=tuple(continuous if dense else categorical),
        forbidden=() if dense else (vocabulary - 2,),
        end_id=None if dense else vocabulary - 1,
        target=target,
        heads=(head,) if isinstance(target, Hidden) else (),
        profile=profile or Fast(),
        guidance=Guidance(scale=2.5),
        sampler=Sampler(temperature=0.7, top_k=80),
        source="teacher",
        seed=1234,
        split="train",
        timestep_s=0.08,
        conditions=("text",),
        fingerprints=Fingerprints(teacher="t", tokenizer="k", audio_codec="a", dataset="d"),
    )


def synthetic_heads(manifest: Manifest) -> dict[str, Array]:
    """`GROUP.weight` [C_g, V, D] and `GROUP.bias` [C_g, V] float32 for the heads of a manifest."""
    random = np.random.default_rng(manifest.seed)
    shapes = head_shapes(manifest).items()
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes}


def synthetic_arrays(
    manifest: Manifest, key: Key, timesteps: int, bucket: int | None = None
) -> dict[str, Array]:
    """Arrays [T, …] of one rollout of a bucket, depending on the key alone."""
    sample_id, variation = key
    random = np.random.default_rng([manifest.seed, variation, *sample_id.encode()])
    target = manifest.target
    if isinstance(target, Dense | Hidden):
        continuous = {
            name: _numbers(random, spec, timesteps)
            for name, spec in array_specs(manifest, bucket).items()
            if name != "codes"
        }
        if isinstance(target, Dense):
            return continuous
        return {"codes": _ranked_ids(manifest, random, timesteps)[1][..., 0]} | continuous
    logits, ranked = _ranked_ids(manifest, random, timesteps)
    codes = ranked[..., 0]
    match target:
        case Full():
            parts = ["logits"] if target.branches == "guided" else ["cond", "uncond"]
            full = {f"full.{part}": logits.astype(target.dtype) for part in parts}
            if target.levels:
                full["full.levels"] = random.normal(scale=5, size=codes.shape).astype(np.float32)
            return {"codes": codes} | full
        case Sampled():
            return {"codes": codes, "sampled.ids": _drawn(logits, random, target.draws)}
        case TopK():
            return {"codes": codes} | _top_k(manifest, target, logits, ranked, random)


def _numbers(random: np.random.Generator, spec: ArraySpec, timesteps: int) -> Array:
    """[T, *trailing] normally distributed, or integers of the whole range of the type."""
    shape, dtype = (timesteps, *spec.trailing), spec.dtype
    if dtype.kind == "f":
        return random.standard_normal(shape, np.float32).astype(dtype)
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def _ranked_ids(
    manifest: Manifest, random: np.random.Generator, timesteps: int
) -> tuple[Array, Array]:
    """Logits [T, C, V] relative to the row maximum, and the ids by falling logit."""
    shape = (timesteps, len(manifest.streams), manifest.vocabulary)
    logits = random.normal(scale=3, size=shape).astype(np.float32)
    logits[..., list(manifest.forbidden)] = -np.inf
    logits -= logits.max(-1, keepdims=True)
    ranked = np.argsort(-logits, axis=-1, kind="stable")
    return logits, ranked.astype(ids_dtype(manifest.vocabulary))


def _top_k(
    manifest: Manifest, target: TopK, logits: Array, ranked: Array, random: np.random.Generator
) -> dict[str, Array]:
    ids, dropped = np.sort(ranked[..., : target.k], -1), ranked[..., target.k :]
    arrays = {
        "top_k.ids": ids,
        "top_k.logits": np.take_along_axis(logits, ids.astype(np.int64), -1).astype(target.dtype),
        "top_k.tail_logmass": np.stack(
            [_tail_logmass(logits, dropped, t) for t in target.temperatures], -1
        ),
    }
    if target.tail_samples:
        tail = logits.copy()
        np.put_along_axis(tail, ids.astype(np.int64), -np.inf, -1)
        arrays["top_k.tail_ids"] = _drawn(tail, random, target.tail_samples)
    if target.moments:
        allowed = np.delete(logits, manifest.forbidden, axis=-1)
        arrays["top_k.moments"] = np.stack([allowed.mean(-1), allowed.std(-1)], -1)
    return arrays


def _drawn(logits: Array, random: np.random.Generator, draws: int) -> Array:
    """[T, C, draws] ids drawn with replacement from softmax(logits), rising."""
    cumulative = np.exp(logits.astype(np.float64)).cumsum(-1)
    uniforms = random.random((*logits.shape[:-1], draws, 1)) * cumulative[..., None, -1:]
    ids: Array = (cumulative[..., None, :] <= uniforms).sum(-1)
    return np.sort(ids, -1).astype(ids_dtype(logits.shape[-1]))


def synthetic_store(
    path: str | Path, manifest: Manifest, samples: int, variations: int, rollouts_per_shard: int
) -> PredictionStore:
    """A store without shards over samples named `sample-0`, `sample-1` and so on."""
    sample_ids = [f"sample-{number}" for number in range(samples)]
    table = pa.table({"sample_id": sample_ids, "text": [name[::-1] for name in sample_ids]})
    plan = Plan.lay_out(sample_ids, variations, rollouts_per_shard)
    return PredictionStore.create(path, manifest, plan, table, synthetic_heads(manifest))


def write_synthetic_shard(store: PredictionStore, shard: int, mean_timesteps: int) -> bool:
    """Commit one shard of rollouts of about `mean_timesteps`; False when it is there already."""
    bucket = store.plan.bucket_of(shard)
    with store.writer(shard) as writer:
        for key in store.plan[shard]:
            seed = key[1] + sum(key[0].encode())
            timesteps = mean_timesteps // 2 + seed * 7 % mean_timesteps + 1
            arrays = synthetic_arrays(store.manifest, key, timesteps, bucket)
            drawn = {name: seed + at for at, name in enumerate(store.manifest.drawn)}
            writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=seed, drawn=drawn)
        return writer.commit()


def _tail_logmass(logits: Array, dropped: Array, temperature: float) -> Array:
    """[T, C] float32 log of the probability mass of the ids `dropped` [T, C, V − K]."""
    scaled = np.exp(logits.astype(np.float64) / temperature)
    mass = np.take_along_axis(scaled, dropped.astype(np.int64), -1).sum(-1) / scaled.sum(-1)
    with np.errstate(divide="ignore"):
        logmass: Array = np.log(mass).astype(np.float32)
    return logmass
