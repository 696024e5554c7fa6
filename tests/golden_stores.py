"""Small stores of every target and every layout of bytes in both profiles, under tests/golden.

`python -m tests.golden_stores NAME …` makes some of them anew, which is right only for a new one,
or when the format itself changes: they are what releases to come must still read.
`golden/PROFILE/NAME` is a store of one shard, and `golden/NAME.npz` holds what every array of it
must decode to, as `PROFILE/ARRAY`, and the facts of its rollouts.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from store import Plan, PredictionStore
from store.plan import Key
from store.schema import (
    Ancestor,
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
PROFILES = ("fast", "compact")

STREAMS = (
    Stream(name="one", group="a", vocabulary=9),
    Stream(name="two", group="a", vocabulary=8),
    Stream(name="three", group="b.c", vocabulary=9),
)
HEADS = (Head(group="a", vectors=2, width=4), Head(group="b.c", vectors=1, width=3))

Arrays = dict[str, Any]


def groups_of_states(manifest: Manifest, key: Key, timesteps: int) -> Arrays:
    """States for streams whose vocabularies differ: no code is beyond the smallest."""
    arrays = synthetic_arrays(manifest, key, timesteps)
    return arrays | {"codes": np.minimum(arrays["codes"], 6)}


def spread_ids(manifest: Manifest, key: Key, timesteps: int) -> Arrays:
    """A few dozen ids of a large vocabulary, again and again; a tail of no mass and one of all."""
    few = synthetic_manifest(manifest.target, streams=1, vocabulary=40)
    places = np.arange(40, dtype=np.uint32) ** 2 * 48  # the largest need 17 bits
    places[few.end_id] = manifest.end_id
    arrays = synthetic_arrays(few, key, timesteps)
    spread = {n: places[ids] if ids.dtype.kind == "u" else ids for n, ids in arrays.items()}
    spread["top_k.tail_logmass"][:2, 0, 0] = -np.inf, 0
    return spread


def one_peak(manifest: Manifest, key: Key, timesteps: int) -> Arrays:
    """Logits that are nearly flat, but for one timestep that is nearly certain."""
    arrays = synthetic_arrays(manifest, key, timesteps)
    logits = arrays["full.logits"]
    logits *= np.float16(0.05)
    logits[1] = np.where(logits[1] < 0, logits[1] - 20, 0)
    return arrays


@dataclass(frozen=True)
class Golden:
    """What a golden store holds."""

    target: Target
    vocabulary: int = 9
    compact: Compact = field(default_factory=Compact)
    timesteps: tuple[int, int] = (3, 2)
    """Of the two rollouts; of 200 and 100 the second lies in two chunks."""
    arrays: Callable[[Manifest, Key, int], Arrays] = synthetic_arrays
    lineage: tuple[Ancestor, ...] = ()

    def manifest(self, profile: str) -> Manifest:
        """A manifest of one stream, or for states apart of two groups."""
        chosen: Profile = Fast() if profile == "fast" else self.compact
        manifest = synthetic_manifest(self.target, 1, self.vocabulary, chosen)
        changes: dict[str, Any] = {"lineage": self.lineage}
        if self.arrays is groups_of_states:
            changes |= {"streams": STREAMS, "heads": HEADS}
        return Manifest(**(manifest.model_dump() | changes))


LONG = (200, 100)
ANCESTOR = Ancestor(fingerprint="0123456789abcdef" * 4, profile=Compact(loss_nats=0.01))
GOLDENS = {
    "top_k": Golden(
        TopK(k=3, temperatures=(1.0, 2.0), moments=True, tail_samples=2), timesteps=LONG
    ),
    "full": Golden(Full()),
    "full_both": Golden(Full(branches="both", dtype="float32")),
    "sampled": Golden(Sampled(draws=4)),
    "hidden_both": Golden(Hidden(branches="both"), arrays=groups_of_states),
    "dense": Golden(Dense()),
    "top_k_wide": Golden(
        TopK(k=8, moments=True, tail_samples=5, dtype="float32"),
        vocabulary=70_000,
        compact=Compact(loss_nats=1e-6),
        timesteps=LONG,
        arrays=spread_ids,
    ),
    "top_k_sparse": Golden(TopK(k=4, tail_samples=3), vocabulary=70_000, timesteps=(40, 20)),
    "full_peak": Golden(
        Full(), vocabulary=16, compact=Compact(loss_nats=3e-5), timesteps=LONG, arrays=one_peak
    ),
    "top_k_exact": Golden(TopK(k=3), compact=Compact(loss_nats=1e-12)),
    "hidden": Golden(Hidden(dtype="float32"), timesteps=LONG, lineage=(ANCESTOR,)),
    "dense_guided": Golden(Dense(branches="guided", dtype="float32"), timesteps=LONG),
}


def make(name: str, profile: str) -> Arrays:
    """Write a golden store, and return what it holds."""
    folder, golden = GOLDEN / profile / name, GOLDENS[name]
    shutil.rmtree(folder, ignore_errors=True)
    manifest = golden.manifest(profile)
    samples = pa.table({"sample_id": ["a", "日本"], "text": ["b", "c"]})
    plan = Plan.lay_out(["a", "日本"], 1, 2)
    store = PredictionStore.create(folder, manifest, plan, samples, synthetic_heads(manifest))
    with store.writer(0) as writer:
        for key, timesteps in zip(plan[0], golden.timesteps, strict=True):
            facts = {
                "stop_reason": f"end of {key[0]}",
                "weight": 1 / timesteps,
                "seed": 2**64 - timesteps,
            }
            writer.append(*key, golden.arrays(manifest, key, timesteps), **facts)
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
    for name in sys.argv[1:]:
        np.savez_compressed(GOLDEN / f"{name}.npz", **(make(name, "fast") | make(name, "compact")))
