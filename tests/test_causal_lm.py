"""The family causal_lm: decoding equals scoring, slots keep their ids, folders are stock ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from stages.causal_lm_config import CausalLMConfig
from stages.family import load_family
from stages.sampling import RolloutPolicy
from store.schema import Sampler

SLOTS = ((0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (2, 2), (2, 3))
ENTRIES, WIDTH = 6, 8
"""Entries of a codebook, and ids of a slot: two of each slot are never spoken."""
BASE, END = 300, 290
SPECIAL = {
    "start": {"id": 280, "token": "<|start|>"}, "stop": {"id": 281, "token": "<|stop|>"},
    "speech": {"id": 282},
}  # fmt: skip
VOCABULARY = BASE + 7 * WIDTH + 5
"""Padded: five ids more than the layout has."""
LIMIT = 7


@pytest.fixture(scope="module")
def tiny(require):
    require("transformers", "pip install 'foretell[orpheus]'")
    from stages.families import causal_lm_tiny

    return causal_lm_tiny


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A base model whose predictions are far from uniform."""
    path = tmp_path_factory.mktemp("base")
    save(tiny, path)
    return path


def save(tiny, path, seed: int = 0, **changes: Any):
    config = tiny.tiny_config(
        width=32, layers=2, heads=4, key_value_heads=2, feed_forward=48, positions=256,
        vocabulary=VOCABULARY, **changes,
    )  # fmt: skip
    special = {"<|start|>": 280, "<|stop|>": 281, "<|speech|>": 282}
    model = tiny.save_tiny(path, config, seed=seed, tokenizer=tiny.tiny_tokenizer(special))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return model


def settings(path, **changes: Any) -> dict[str, Any]:
    known = {
        "family": "causal_lm",
        "path": path,
        "layout": {
            "slots": SLOTS, "codes_per_slot": WIDTH, "audio_base_id": BASE, "end_id": END,
        },
        "special": SPECIAL,
        "prompt": "<start>{speaker}: {text}<stop><speech>",
    }  # fmt: skip
    return known | changes


FACTS = {
    "alphabet": " abc",
    "speakers": ["low", "high"],
    "codebooks": 7,
    "codes_per_codebook": ENTRIES,
    "frame_rate_hz": 12.0,
    "audio_codec": "ab",
}


def samples_of(count: int) -> list[dict]:
    """Samples whose texts and recordings all differ in length."""
    random = np.random.default_rng(0)
    return [
        {
            "sample_id": f"s{i}",
            "text": "abc"[: 1 + i % 3] * (1 + i),
            "speaker": ["low", "high"][i % 2],
            "codes": random.integers(0, ENTRIES, size=7 * (2 + i)).astype(np.uint16),
        }
        for i in range(count)
    ]


def family_of(path, **changes: Any):
    config = CausalLMConfig.model_validate(settings(path, **changes))
    family = load_family("causal_lm").build(config, FACTS, seed=0)
    family.module.eval()
    return family


def policy_of(family, samples, **changes: Any) -> RolloutPolicy:
    return RolloutPolicy(
        Sampler.model_validate({"max_timesteps": LIMIT, "min_timesteps": 1} | changes),
        [(sample["sample_id"], 0) for sample in samples],
        seed=3,
        streams=family.streams,
        forbidden=family.forbidden,
        end_id=family.end_id,
        reference_timesteps=[family.timesteps(sample) for sample in samples],
    )


@dataclass
class Rolled:
    """The steps of a rollout, put together per row."""

    codes: torch.Tensor
    logits: torch.Tensor
    lengths: torch.Tensor
    batch_sizes: list[int] = dataclasses.field(default_factory=list)


def roll(family, samples, scale: float, **changes: Any) -> Rolled:
    rows, size = len(samples), family.streams[0].vocabulary
    rolled = Rolled(
        torch.zeros(rows, LIMIT, 7, dtype=torch.int64),
        torch.full((rows, LIMIT, 7, size), float("nan")),
        torch.zeros(rows, dtype=torch.int64),
    )
    for step in family.rollout(samples, policy_of(family, samples, **changes), scale):
        assert step.logits.dtype == torch.float32
        rolled.codes[step.rows, step.timestep] = step.codes
        rolled.logits[step.rows, step.timestep] = step.logits
        rolled.lengths[step.rows] = step.timestep + 1
        rolled.batch_sizes.append(len(step.rows))
    return rolled


@pytest.mark.parametrize("vocabulary", ["slots", "full"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_rollout_logits_equal_teacher_forced_ones(folder, scale, vocabulary):
    family, samples = family_of(folder, vocabulary=vocabulary), samples_of(6)
    rolled = roll(family, samples, scale)
    assert len(set(rolled.lengths.tolist())) > 1, "rows must end at different times"
    assert rolled.batch_sizes[-1] < len(samples), "finished rows must leave the batch"
    codes = rolled.codes.clone()
    for row, length in enumerate(rolled.lengths):
        codes[row, length:] = 10**6  # poison: beyond the end nothing may be read
    with torch.no_grad():
        scores = family.score(samples, codes, rolled.lengths, cfg_scale=scale)
    for row, length in enumerate(rolled.lengths):
        torch.testing.assert_close(
            scores.logits[row, :length].float(), rolled.logits[row, :length], atol=1e-4, rtol=1e-4
        )
