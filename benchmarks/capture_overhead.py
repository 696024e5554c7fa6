"""What storing costs stage one: whole rollouts into a store over bare guided generation.

`generation` exhausts `family.rollout` and keeps nothing. Every other way is `stages.rollout` of
the same batches into a fresh store, until the last shard is durable. The model has the shape of
the demo's teacher with random weights, and all rollouts have the same length, so every way decodes
exactly the same. The model computes in one thread; the thread that writes has another core where
the machine has one, so beside the wall clock the CPU time of the model's own thread is compared.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from guided_decoding import build
from measure import OwnTime, interleaved, report

from stages.config import RolloutConfig
from stages.families.codec_lm import CodecLM
from stages.interruption import StopRequest
from stages.rollout import policy_for, rollout, split
from stages.rollout_plan import create_store, lay_out
from store import PredictionStore

CFG_SCALE = 2.0
TOP_K = {"kind": "top_k", "k": 64}
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "": (TOP_K, "fast"),
    "_compact": (TOP_K, "compact"),
    "_tail_samples": (TOP_K | {"tail_samples": 8}, "fast"),
    "_sampled": ({"kind": "sampled"}, "fast"),
    "_hidden": ({"kind": "hidden"}, "fast"),
    "_hidden_compact": ({"kind": "hidden"}, "compact"),
    "_full": ({"kind": "full"}, "fast"),
}
"""What is stored, and how, by the end of the name of the ratio."""


def samples_of(rollouts: int) -> list[dict[str, Any]]:
    """As many samples as there are rollouts."""
    text = "please open the red door today"
    plain = {"text": text, "speaker": "a", "codes": [0] * 8}
    return [{"sample_id": f"{number:04d}"} | plain for number in range(rollouts)]


def fresh_store(
    path: Path, family: CodecLM, target: dict[str, Any], profile: str, options: argparse.Namespace
) -> PredictionStore:
    """An empty store of rollouts of exactly `timesteps` timesteps each."""
    shard = options.batch_size * options.batches_per_shard
    config = RolloutConfig.model_validate(
        {
            "guidance": {"scale": CFG_SCALE},
            "sampler": {
                "temperature": 0.7,
                "min_timesteps": options.timesteps,
                "max_timesteps": options.timesteps,
            },
            "target": target,
            "profile": {"kind": profile},
            "rollouts_per_shard": shard,
            "batch_size": options.batch_size,
        }
    )
    samples = samples_of(shard * options.shards)
    return create_store(
        path,
        family,
        lay_out(config, family, samples, facts=family.facts, dataset_fingerprint="none", seed=0),
    )


@torch.inference_mode()
def generate(family: CodecLM, store: PredictionStore, batch_size: int) -> None:
    """Draw all that a store plans, and keep nothing."""
    by_id = {row["sample_id"]: row for row in store.samples.to_pylist()}
    for shard in range(store.planned_shards):
        for keys in split(store.plan[shard], batch_size):
            policy = policy_for(family, store.manifest, keys, [1] * len(keys))
            samples = [by_id[sample_id] for sample_id, _ in keys]
            for _ in family.rollout(samples, policy, CFG_SCALE):
                pass


def write(family: CodecLM, stores: Iterator[PredictionStore], batch_size: int) -> None:
    """Do the whole of stage one into the next store."""
    store = next(stores)
    samples = {row["sample_id"]: row for row in samples_of(store.samples.num_rows)}
    stop = StopRequest()
    assert rollout(family, store, samples, store.missing(), batch_size=batch_size, stop=stop)


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=128)
    parser.add_argument("--batches-per-shard", type=int, default=1)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4, help="of the decoder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    torch.set_num_threads(1)

    family = build(options.layers)
    family.condition_dropout = 0.1  # its branches are as good as untrained ones can be
    with tempfile.TemporaryDirectory() as folder:
        count = options.repeats + 1

        def stores(name: str) -> Iterator[PredictionStore]:
            target, profile = WAYS[name]
            paths = [Path(folder) / f"store{name}{number}" for number in range(count)]
            made = [fresh_store(path, family, target, profile, options) for path in paths]
            return iter(made)

        planned = fresh_store(Path(folder) / "planned", family, TOP_K, "fast", options)
        ways = {"generation": OwnTime(partial(generate, family, planned, options.batch_size))}
        for name in WAYS:
            work = partial(write, family, stores(name), options.batch_size)
            ways[f"rollout{name}"] = OwnTime(work)
        turns = interleaved(ways, "generation", options.repeats)
    own = {name: way.median_s / ways["generation"].median_s for name, way in ways.items()}
    if not options.json:
        print(f"{'':<24}{'wall clock':>32}{'own thread':>14}")
        for name, turn in turns.items():
            print(
                f"{name:<24}{turn.median_s:>10.3f} s{turn.slowdown:>8.3f} × generation"
                f"{own[name]:>12.3f} ×"
            )
    ratios = {f"rollout_over_generation{name}": turns[f"rollout{name}"].slowdown for name in WAYS}
    ratios |= {f"own_thread_over_generation{name}": own[f"rollout{name}"] for name in WAYS}
    report(__file__, ratios, packages=["torch"])


if __name__ == "__main__":
    main()
