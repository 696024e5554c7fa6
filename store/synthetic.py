"""Stores of random but valid predictions, for tests and benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from store.encoding import Array, ids_dtype
from store.plan import Key, Plan
from store.reader import PredictionStore
from store.schema import Fingerprints, Guidance, Manifest, Sampler, Stream, Target, TopK


def synthetic_manifest(target: Target, streams: int = 2, vocabulary: int = 34) -> Manifest:
    """Manifest of C streams of V ids: the last id ends a rollout, the one before it is forbidden.

    Raises ValueError as `Manifest` does.
    """
    return Manifest(
        family="synthetic",
        streams=tuple(
            Stream(name=f"backbone.{stream}", group="backbone", vocabulary=vocabulary)
            for stream in range(streams)
        ),
        forbidden=(vocabulary - 2,),
        end_id=vocabulary - 1,
        target=target,
        guidance=Guidance(scale=2.5),
        sampler=Sampler(temperature=0.7, top_k=80),
        source="teacher",
        seed=1234,
        split="train",
        timestep_s=0.08,
        conditions=("text",),
        fingerprints=Fingerprints(teacher="t", tokenizer="k", audio_codec="a", dataset="d"),
    )


def synthetic_arrays(manifest: Manifest, key: Key, timesteps: int) -> dict[str, Array]:
    """Arrays [T, …] of one rollout, depending on the key alone."""
    sample_id, variation = key
    random = np.random.default_rng([manifest.seed, variation, *sample_id.encode()])
    shape = (timesteps, len(manifest.streams), manifest.vocabulary)
    logits = random.normal(scale=3, size=shape).astype(np.float32)
    logits[..., list(manifest.forbidden)] = -np.inf
    logits -= logits.max(-1, keepdims=True)
    ranked = np.argsort(-logits, axis=-1, kind="stable")  # [T, C, V]
    ids = ids_dtype(manifest.vocabulary)
    codes = ranked[..., 0].astype(ids)
    if not isinstance(manifest.target, TopK):
        return {"codes": codes, "full.logits": logits.astype(manifest.target.dtype)}
    k, temperatures = manifest.target.k, manifest.target.temperatures
    kept = np.take_along_axis(logits, ranked[..., :k], -1)
    arrays = {
        "codes": codes,
        "top_k.ids": ranked[..., :k].astype(ids),
        "top_k.logits": kept.astype(manifest.target.dtype),
        "top_k.tail_logmass": np.stack(
            [_tail_logmass(logits, ranked[..., k:], t) for t in temperatures], -1
        ),
    }
    if manifest.target.moments:
        allowed = np.delete(logits, manifest.forbidden, axis=-1)
        arrays["top_k.moments"] = np.stack([allowed.mean(-1), allowed.std(-1)], -1)
    return arrays


def synthetic_store(
    path: str | Path, manifest: Manifest, samples: int, variations: int, rollouts_per_shard: int
) -> PredictionStore:
    """A store without shards over samples named `sample-0`, `sample-1` and so on."""
    sample_ids = [f"sample-{number}" for number in range(samples)]
    table = pa.table({"sample_id": sample_ids, "text": [name[::-1] for name in sample_ids]})
    plan = Plan.lay_out(sample_ids, variations, rollouts_per_shard)
    return PredictionStore.create(path, manifest, plan, table)


def write_synthetic_shard(store: PredictionStore, shard: int, mean_timesteps: int) -> bool:
    """Commit one shard of rollouts of about `mean_timesteps`; False when it is there already."""
    with store.writer(shard) as writer:
        for key in store.plan[shard]:
            seed = key[1] + sum(key[0].encode())
            timesteps = mean_timesteps // 2 + seed * 7 % mean_timesteps + 1
            arrays = synthetic_arrays(store.manifest, key, timesteps)
            writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=seed)
        return writer.commit()


def _tail_logmass(logits: Array, dropped: Array, temperature: float) -> Array:
    """[T, C] float32 log of the probability mass of the ids `dropped` [T, C, V − K]."""
    scaled = np.exp(logits.astype(np.float64) / temperature)
    mass = np.take_along_axis(scaled, dropped, -1).sum(-1) / scaled.sum(-1)
    with np.errstate(divide="ignore"):
        logmass: Array = np.log(mass).astype(np.float32)
    return logmass
