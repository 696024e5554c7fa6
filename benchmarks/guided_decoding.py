"""Which way of guided decoding stage one should use: timesteps per second of three ways.

`recompute` runs the whole history for every new timestep, both branches in one batch, as a model
without a cache must. `incremental` is `family.rollout` at a guidance scale, `one_pass` the same at
scale 1, which is what a distilled student costs. All decode the same number of timesteps from the
same random weights, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from measure import report

from stages.config import DatasetFacts
from stages.families.codec_lm import CodecLM
from stages.family import Sample
from stages.model_config import CodecLMConfig
from stages.sampling import RolloutPolicy
from store.schema import Sampler

CFG_SCALE = 2.0


def build(layers: int) -> CodecLM:
    """A model of the demo's shape with random weights that never ends by itself."""
    config = CodecLMConfig(
        d_model=192, heads=4, text_layers=2, decoder_layers=layers, feed_forward=768
    )
    facts = DatasetFacts(
        alphabet=" abcdefghijklmnopqrstuvwxyz",
        speakers=("a", "b"),
        codebooks=8,
        codes_per_codebook=256,
        frame_rate_hz=43.0,
        audio_codec="none",
    )
    return CodecLM.build(config, facts.model_dump(), seed=0)


def policy(family: CodecLM, samples: Sequence[Sample], timesteps: int) -> RolloutPolicy:
    """A policy under which every rollout has exactly `timesteps` timesteps."""
    return RolloutPolicy(
        Sampler(temperature=0.7, min_timesteps=timesteps, max_timesteps=timesteps),
        [(sample["sample_id"], 0) for sample in samples],
        seed=0,
        streams=family.streams,
        forbidden=family.forbidden,
        end_id=family.end_id,
        reference_timesteps=[timesteps] * len(samples),
    )


@torch.inference_mode()
def incremental(family: CodecLM, samples: Sequence[Sample], timesteps: int, scale: float) -> None:
    """Decode with caches."""
    draw = policy(family, samples, timesteps)
    for _ in family.rollout(samples, draw, scale):
        pass


@torch.inference_mode()
def recompute(family: CodecLM, samples: Sequence[Sample], timesteps: int) -> None:
    """Decode by scoring the whole history again for every timestep."""
    draw = policy(family, samples, timesteps)
    rows = torch.arange(len(samples))
    codes = torch.zeros(len(samples), 1, len(family.streams), dtype=torch.int64)
    family.module.eval()
    for timestep in range(timesteps):
        lengths = torch.full((len(samples),), timestep + 1)
        logits = family.score(samples, codes, lengths, cfg_scale=CFG_SCALE).logits[:, -1]
        codes[:, -1] = draw.draw(rows, timestep, logits)
        codes = torch.cat([codes, codes[:, -1:]], 1)


def rate(work: Callable[[], None], timesteps: int, repeats: int) -> float:
    """Timesteps per second: the best of `repeats` runs."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return timesteps / best


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    torch.set_num_threads(1)

    full, half = build(6), build(3)
    texts = ["please open the red door today" for _ in range(options.batch_size)]
    samples = [{"sample_id": str(i), "text": t, "speaker": "a"} for i, t in enumerate(texts)]
    count = options.timesteps
    ways: dict[str, Callable[[], None]] = {
        "recompute": lambda: recompute(full, samples, count),
        "incremental": lambda: incremental(full, samples, count, CFG_SCALE),
        "one_pass": lambda: incremental(full, samples, count, 1.0),
        "one_pass_half_depth": lambda: incremental(half, samples, count, 1.0),
    }
    rates = {
        name: rate(work, count * options.batch_size, options.repeats) for name, work in ways.items()
    }
    if not options.json:
        for name, value in rates.items():
            print(f"{name:<22}{value:>12,.0f} timesteps/s")
    ratios = {
        "incremental_over_recompute": rates["incremental"] / rates["recompute"],
        "one_pass_over_guided": rates["one_pass"] / rates["incremental"],
        "half_depth_over_guided": rates["one_pass_half_depth"] / rates["incremental"],
    }
    report(__file__, ratios, packages=["torch"])


if __name__ == "__main__":
    main()
