"""What the benchmarks of language models share: models of two shapes, samples and stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.causal_lm_config import CausalLMConfig
from stages.config import DatasetFacts, RolloutConfig
from stages.families.causal_lm import CausalLM
from stages.families.causal_lm_tiny import save_tiny, tiny_config, tiny_tokenizer
from stages.family import Sample
from stages.interruption import StopRequest
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out

CFG_SCALE = 1.5
SLOTS = ((0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (2, 2), (2, 3))
FRAME_RATE_HZ = 12.0
TEXT = "please open the red door today, and tell the others"
PROMPT = (
    "<start_of_human><begin_of_text>{speaker}: {text}<end_of_text><end_of_human>"
    "<start_of_ai><start_of_speech>"
)
PADDED = 2
"""Ids at the end that stand for nothing, as Orpheus has them."""
OWN_LOGITS, OTHER_LOGITS = 3.0, 20.0
"""Spread of the logits of the ids that a slot has, and how far all others lie below them."""
GROUPED_QUERIES = 3


@dataclass(frozen=True)
class Shape:
    """A Llama to measure, proportioned as Llama 3.2 3B, and what it speaks in."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    text_ids: int
    codes_per_slot: int

    @property
    def special(self) -> dict[str, dict[str, Any]]:
        """Orpheus' special tokens; 128,256 text ids give them Orpheus' own ids."""
        ids = {
            "begin_of_text": self.text_ids - 256, "end_of_text": self.text_ids - 247,
            "start_of_speech": self.text_ids + 1, "start_of_human": self.text_ids + 3,
            "end_of_human": self.text_ids + 4, "start_of_ai": self.text_ids + 5,
        }  # fmt: skip
        return {name: {"id": number, "token": f"<|{name}|>"} for name, number in ids.items()}

    @property
    def layout(self) -> dict[str, Any]:
        """Orpheus' layout of slots."""
        return {
            "slots": SLOTS, "codes_per_slot": self.codes_per_slot,
            "audio_base_id": self.text_ids + 10, "end_id": self.text_ids + 2,
        }  # fmt: skip

    @property
    def vocabulary(self) -> int:
        """All ids of the model."""
        return self.text_ids + 10 + len(SLOTS) * self.codes_per_slot + PADDED

    @property
    def head_share(self) -> float:
        """Share of the head over all ids in the products that a token takes."""
        attention = 2 * self.width**2 * (1 + 1 / GROUPED_QUERIES)
        body = self.layers * (attention + 3 * self.width * self.feed_forward)
        head = self.width * self.vocabulary
        return head / (body + head)


SHAPES = {
    "tiny": Shape(192, 4, 6, 512, text_ids=128_256, codes_per_slot=4096),
    "mid": Shape(384, 14, 6, 1024, text_ids=8_016, codes_per_slot=256),
}
"""`tiny` is that of configs/orpheus_tiny.yaml, with all ids of Orpheus, which are nine tenths of
it; `mid` has an eighth of the width, half the layers and a sixteenth of the ids, so that the head
is 15 % as in Orpheus-3B."""


class Bench:
    """One shape: its model's folder, samples, families and stores."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.shape, self.folder = name, SHAPES[name], folder / name
        if not (self.folder / "base").exists():
            self._save_model()

    def _save_model(self) -> None:
        shape = self.shape
        config = tiny_config(
            width=shape.width, layers=shape.layers, heads=shape.heads,
            key_value_heads=shape.heads // GROUPED_QUERIES, feed_forward=shape.feed_forward,
            vocabulary=shape.vocabulary, tied=False,
        )  # fmt: skip
        special = {token["token"]: token["id"] for token in shape.special.values()}
        base = self.folder / "base"
        model = save_tiny(base, config, tokenizer=tiny_tokenizer(special))
        let_speak_in_slots(model, shape)
        model.save_pretrained(base)

    @cached_property
    def facts(self) -> DatasetFacts:
        """What a prepared dataset would say."""
        return DatasetFacts(
            alphabet="", speakers=("a",), codebooks=len(SLOTS),
            codes_per_codebook=self.shape.codes_per_slot, frame_rate_hz=FRAME_RATE_HZ,
            audio_codec="none",
        )  # fmt: skip

    def family(self, **changes: Any) -> CausalLM:
        """A model of this shape; teacher and student have the same weights."""
        settings = {
            "family": "causal_lm", "path": self.folder / "base", "layout": self.shape.layout,
            "special": self.shape.special, "prompt": PROMPT,
        }  # fmt: skip
        config = CausalLMConfig.model_validate(settings | changes)
        return CausalLM.build(config, self.facts.model_dump(), seed=0)

    def samples(self, count: int, frames: int, least: float = 0.6) -> list[dict[str, Any]]:
        """Samples of texts that differ in length, with codes of a share of `frames` frames each.

        The shares rise evenly from the `least` to 1.
        """
        random = np.random.default_rng(0)
        lengths = np.linspace(least * frames, frames, count).round().astype(int)
        return [
            {
                "sample_id": f"{number:04d}",
                "text": TEXT[: len(TEXT) - 3 * (number % 8)],
                "speaker": "a",
                "codes": random.integers(0, self.shape.codes_per_slot, len(SLOTS) * int(length)),
            }
            for number, length in enumerate(lengths)
        ]

    def store(
        self, name: str, samples: Sequence[Sample], target: Mapping[str, Any], profile: str,
        **changes: Any,
    ) -> Path:  # fmt: skip
        """Let the guided teacher score recordings into a fresh store."""
        path = self.folder / name
        family = self.family(**changes)
        # Its branches are as good as untrained ones can be.
        family.condition_dropout = 0.1
        config = RolloutConfig.model_validate(
            {
                "source": "dataset", "guidance": {"scale": CFG_SCALE},
                "sampler": {"max_timesteps": 2048}, "target": dict(target),
                "profile": {"kind": profile}, "batch_size": 1, "rollouts_per_shard": len(samples),
            }
        )  # fmt: skip
        store = create_store(
            path,
            family,
            lay_out(config, family, samples, facts=self.facts, dataset_fingerprint="", seed=0),
        )
        by_id = {sample["sample_id"]: sample for sample in samples}
        done = rollout(
            family, store, by_id, store.missing(), batch_size=1, stop=StopRequest()
        )  # fmt: skip
        assert done
        return path


@torch.no_grad()
def let_speak_in_slots(model: Any, shape: Shape, seed: int = 0) -> None:
    """Draw embeddings and head so that the likeliest ids are those of the next slot.

    Each slot has a direction: the embeddings of its ids have a part along it, and the head's rows
    of the next slot read it. Within the slot logits depend on all that was said, as random ones do.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    width = shape.width
    drawn = torch.randn(width, len(SLOTS), generator=generator)
    directions = torch.linalg.qr(drawn).Q.T * width**0.5
    embedding.normal_(generator=generator)
    head.normal_(generator=generator).mul_(OWN_LOGITS / width**0.5)
    slots, first = torch.arange(len(SLOTS)), shape.layout["audio_base_id"]
    ids = first + torch.arange(len(SLOTS) * shape.codes_per_slot).view(len(SLOTS), -1)
    embedding[ids] += directions[:, None]
    embedding[shape.special["start_of_speech"]["id"]] += directions[-1]
    head[ids] += OTHER_LOGITS / width * directions[slots - 1][:, None]
