"""What the benchmarks of MagpieTTS share: models of three shapes, samples and stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.config import DatasetFacts, RolloutConfig
from stages.families.magpie import Magpie
from stages.families.magpie_tiny import build_codec, build_model
from stages.families.nemo_archive import archive_fingerprint
from stages.interruption import StopRequest
from stages.model_config import MagpieTeacher
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out

CFG_SCALE = 2.5
CONTEXT_FRAMES = 107
"""Five seconds, as the published models have."""
TEXT = "the quick brown fox jumps over the lazy dog, and then it rests a while"
TOP_K = {"kind": "top_k", "k": 64, "moments": True}
SMALL_CODEC = {"codebooks": 4, "levels": (4, 4, 4)}
NANO_CODEC = {"codebooks": 8, "levels": (8, 7, 6, 6)}


@dataclass(frozen=True)
class Shape:
    """A model to measure: what is made, and how many sequences go together."""

    codec: Mapping[str, Any]
    model: Mapping[str, Any]
    batch: int
    long_batch: int
    """Of rollouts of more than 300 frames: NeMo keeps the logits of the whole history of every
    step, which are 37 GB for four of 430 frames and 8 codebooks."""


SHAPES = {
    "tiny": Shape(SMALL_CODEC, {"positions": 1024}, 4, 4),
    "mid": Shape(
        NANO_CODEC,
        {"width": 128, "layers": 4, "encoder_layers": 2, "feed_forward": 512, "positions": 1024},
        4,
        1,
    ),
    "published": Shape(
        NANO_CODEC,
        {
            "width": 768, "layers": 12, "encoder_layers": 6, "heads": 12, "feed_forward": 3072,
            "cross_width": 128, "local_width": 256, "positions": 2048,
        },
        2,
        1,
    ),
}  # fmt: skip


class Bench:
    """One shape: its files, NeMo's models and ours."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.shape, self.folder = name, SHAPES[name], folder / name
        self.codec, self.teacher = self.folder / "codec.nemo", self.folder / "teacher.nemo"
        if not self.teacher.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            build_codec(self.codec, **self.shape.codec)
            build_model(self.teacher, self.codec, **self.shape.model)

    @property
    def codebooks(self) -> int:
        """Codebooks of the audio codec."""
        return int(self.shape.codec["codebooks"])

    @cached_property
    def facts(self) -> DatasetFacts:
        """What a prepared dataset would say."""
        return DatasetFacts(
            alphabet="",
            speakers=("a",),
            codebooks=self.codebooks,
            codes_per_codebook=int(np.prod(self.shape.codec["levels"])),
            frame_rate_hz=22050 / 1024,
            audio_codec=archive_fingerprint(self.codec),
            context_frames=CONTEXT_FRAMES,
        )

    def samples(self, count: int) -> list[dict[str, Any]]:
        """As many samples as there are rollouts."""
        random = np.random.default_rng(0)
        size = self.facts.codes_per_codebook
        return [
            {
                "sample_id": f"{number:03d}",
                "text": TEXT[: 40 + number % 20],
                "speaker": "a",
                "codes": np.zeros(8 * self.codebooks, np.uint16),
                "context_codes": random.integers(0, size, CONTEXT_FRAMES * self.codebooks),
            }
            for number in range(count)
        ]

    def rollouts(self, frames: int) -> int:
        """How many rollouts of so many frames are generated together."""
        return self.shape.long_batch if frames > 300 else self.shape.batch

    @cached_property
    def family(self) -> Magpie:
        """The teacher of stage one."""
        settings = MagpieTeacher(family="magpie", path=self.teacher)
        return Magpie.pretrained(settings, self.facts, device="cpu", dtype=torch.float32)

    def store(self, name: str, frames: int, target: Mapping[str, Any] = TOP_K, **more: Any) -> Path:
        """Do stage one into a fresh store, all rollouts of `frames` frames."""
        path, count = self.folder / name, self.rollouts(frames)
        config = RolloutConfig.model_validate(
            {
                "guidance": {"scale": CFG_SCALE},
                "sampler": {
                    "temperature": 0.7,
                    "top_k": min(80, self.facts.codes_per_codebook),
                    "min_timesteps": frames,
                    "max_timesteps": frames,
                    "max_timesteps_weight": 1.0,
                },
                "target": dict(target),
                "batch_size": count,
                "rollouts_per_shard": count,
                **more,
            }
        )
        samples = self.samples(count)
        store = create_store(
            path,
            self.family,
            lay_out(config, self.family, samples, facts=self.facts, dataset_fingerprint="", seed=0),
        )
        by_id = {sample["sample_id"]: sample for sample in samples}
        done = rollout(
            self.family, store, by_id, store.missing(), batch_size=count,
            stop=StopRequest(),
        )  # fmt: skip
        assert done
        return path
