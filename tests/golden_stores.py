"""Small stores of every target in both profiles, committed under tests/golden.

`python -m tests.golden_stores` makes them anew, which is right only when the format itself changes:
they are what releases to come must still read. `golden/PROFILE/NAME` is a store of one shard, and
`golden/NAME.npz` holds what every array of it must decode to, as `PROFILE/ARRAY`, and the facts of
its rollouts.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from store import Plan, PredictionStore
from store.schema import (
    Compact,
    Dense,
    Fast,
    Full,
    Head,
    Hidden,
    Manifest,
    Profile,
    Sampled,
    Stream,
    Target,
    TopK,
)
from store.synthetic import synthetic_arrays, synthetic_heads, synthetic_manifest

GOLDEN = Path(__file__).parent / "golden"
PROFILES: dict[str, Profile] = {"fast": Fast(), "compact": Compact()}
TARGETS: dict[str, Target] = {
    "top_k": TopK(k=3, temperatures=(1.0, 2.0), moments=True, tail_samples=2),
    "full": Full(),
    "full_both": Full(branches="both", dtype="float32"),
    "sampled": Sampled(draws=4),
    "hidden_both": Hidden(branches="both"),
    "dense": Dense(),
}
TIMESTEPS = {"top_k": (200, 100)}
"""Timesteps of the rollouts of one shard; top_k has more than a chunk of 256 holds."""

STREAMS = (
    Stream(name="one", group="a", vocabulary=9),
    Stream(name="two", group="a", vocabulary=8),
    Stream(name="three", group="b.c", vocabulary=9),
)
HEADS = (Head(group="a", vectors=2, width=4), Head(group="b.c", vectors=1, width=3))


def golden_manifest(target: Target, profile: Profile) -> Manifest:
    """A manifest of one stream, or for `hidden` of two groups, whose vocabularies differ."""
    manifest = synthetic_manifest(target, streams=1, vocabulary=9, profile=profile)
    if not isinstance(target, Hidden):
        return manifest
    return Manifest(**(manifest.model_dump() | {"streams": STREAMS, "heads": HEADS}))


def make(name: str, profile: str) -> dict[str, np.ndarray]:
    """Write a golden store, and return what it holds."""
    folder = GOLDEN / profile / name
    shutil.rmtree(folder, ignore_errors=True)
    manifest = golden_manifest(TARGETS[name], PROFILES[profile])
    samples = pa.table({"sample_id": ["a", "日本"], "text": ["b", "c"]})
    plan = Plan.lay_out(["a", "日本"], 1, 2)
    store = PredictionStore.create(folder, manifest, plan, samples, synthetic_heads(manifest))
    with store.writer(0) as writer:
        for key, timesteps in zip(plan[0], TIMESTEPS.get(name, (3, 2)), strict=True):
            arrays = {
                array: np.minimum(values, 6) if array == "codes" and "hidden" in name else values
                for array, values in synthetic_arrays(manifest, key, timesteps).items()
            }
            facts = {
                "stop_reason": f"end of {key[0]}",
                "weight": 1 / timesteps,
                "seed": 2**64 - timesteps,
            }
            writer.append(*key, arrays, **facts)
        writer.commit()
    shard = PredictionStore.open(folder).shard(0)
    facts = {
        "offsets": shard.offsets,
        "stop_reasons": np.array(shard.rollouts.stop_reasons),
        "weights": shard.rollouts.weights,
        "seeds": shard.rollouts.seeds,
    }
    return facts | {f"{profile}/{array}": values for array, values in shard.arrays.items()}


if __name__ == "__main__":
    for name in TARGETS:
        np.savez_compressed(GOLDEN / f"{name}.npz", **(make(name, "fast") | make(name, "compact")))
