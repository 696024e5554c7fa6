"""The model, the images and the stores that the benchmarks of diffusion rows share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.architecture import Architecture
from stages.diffusion.conversion import Conversion
from stages.diffusion.facts import ConditionFacts, ImageFacts, Recording
from stages.diffusion.model_config import DenoiserConfig, ScheduleConfig
from stages.diffusion.record import record
from stages.diffusion.record_config import RecordConfig
from stages.diffusion.record_plan import create_record_store, lay_out_records
from stages.diffusion.row_targets import RowTargets, TaughtRows
from stages.diffusion.rows import Reading, StoreRows
from stages.diffusion.schedule import facts_of
from stages.diffusion.train_config import DistilConfig
from stages.distributed import Place
from stages.family import load_denoiser
from stages.interruption import StopRequest
from store import PredictionStore
from store.schema import TableFacts
from store.side_tables import SideTableWriter

SCALE = 7.5
CHANNELS, TOKENS, FEATURES = 4, 77, 768
DELTA = 0.2
"""Size of what the condition changes, of predictions of size 1."""
SLOTS = 8
ROLLOUTS_PER_SHARD = 32
"""With 8 slots each they fill one chunk of a store, as shards of a real size fill several."""
SCHEDULE = ScheduleConfig(beta_schedule="scaled_linear", prediction="epsilon")
PLACE = Place(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Images:
    """Latents and encoded captions of samples, as a dataset has them; all are drawn."""

    path: Path
    header: Any
    facts: ImageFacts
    rows: Sequence[Mapping[str, Any]]

    def samples(self, split: str) -> Sequence[Mapping[str, Any]]:
        """The samples of the only split."""
        return self.rows


def images(path: Path, count: int, side: int) -> Images:
    """A dataset of as many samples, each with a caption of its own."""
    random = np.random.default_rng(0)
    facts = ImageFacts(
        encoder="drawn", latent_channels=CHANNELS, downsample=8, scaling=0.18215,
        buckets=((CHANNELS, side, side),),
        conditions={"prompt_embeds": ConditionFacts(dtype="float16", shape=(TOKENS, FEATURES))},
        unconditional="zeros",
    )  # fmt: skip
    latents, captions = (
        SideTableWriter(path / "tables" / name, 256) for name in ("latents", "conditions")
    )
    captions.append({"prompt_embeds": np.zeros((TOKENS, FEATURES), np.float16)})
    rows = []
    for number in range(count):
        latent = random.standard_normal(facts.buckets[0]).astype(np.float16)
        caption = random.standard_normal((TOKENS, FEATURES)).astype(np.float16)
        rows.append({
            "sample_id": f"{number:05d}", "text": f"caption {number}", "label": -1,
            "target": "teacher", "weight": 1.0, "bucket": 0,
            "latents": [latents.append({"latent": latent})],
            "conditions": [captions.append({"prompt_embeds": caption})],
        })  # fmt: skip
    tables: dict[str, TableFacts] = {"latents": latents.finish(), "conditions": captions.finish()}
    return Images(path, SimpleNamespace(fingerprint="drawn", tables=tables), facts, rows)


class UnitNoise:
    """A denoiser whose predictions look like those of a trained one, bit for bit, at no cost.

    What it predicts is the noised latent, which is unit noise; without a caption it differs by
    another such latent times `DELTA`.
    """

    name, condition_dropout, takes_scale = "diffusion", 0.1, False
    embedded_guidance = None

    def __init__(self, facts: ImageFacts) -> None:
        self.facts, self.schedule = facts, facts_of(SCHEDULE)
        self.config = DenoiserConfig(network="UNet2DConditionModel", schedule=SCHEDULE)
        self.module: nn.Module = nn.Linear(1, 1)

    def fingerprint(self) -> str:
        """A name: there are no weights."""
        return "unit noise"

    def architecture(self) -> Architecture:
        """Nothing that costs."""
        return Architecture(
            parameters=0, parts={}, active_parameters=0, flops_per_timestep=0,
            dense_flops_per_timestep=0,
        )  # fmt: skip

    def predict(
        self, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> Tensor:
        """Predict [b, c, h, w]; a caption of zeros is none."""
        without = (conditions["prompt_embeds"] == 0).flatten(1).all(1).reshape(-1, 1, 1, 1)
        return x - DELTA * without * x.flip(-1)


def unet(facts: ImageFacts, widths: Sequence[int], seed: int) -> Any:
    """A U-Net of SDXL's form, attention on all sizes but the largest, with random weights."""
    config = DenoiserConfig(
        network="UNet2DConditionModel",
        settings={
            "block_out_channels": list(widths),
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * (len(widths) - 1)],
            "up_block_types": [*["CrossAttnUpBlock2D"] * (len(widths) - 1), "UpBlock2D"],
        },
        schedule=SCHEDULE,
    )
    denoiser = load_denoiser().build(config, facts, seed=seed)
    denoiser.condition_dropout = 0.1  # its branches are as good as untrained ones can be
    return denoiser


def planned(path: Path, denoiser: Any, dataset: Images, batch_size: int) -> PredictionStore:
    """An empty store of both parts."""
    return create_record_store(
        path, dataset, lay_out_records(settings(batch_size), denoiser, dataset, seed=0)
    )


def settings(batch_size: int) -> RecordConfig:
    """How rows are recorded."""
    return RecordConfig.model_validate(
        {
            "rows": {"kind": "forward", "slots": SLOTS},
            "guidance": {"scale": SCALE},
            "rollouts_per_shard": ROLLOUTS_PER_SHARD,
            "batch_size": batch_size,
        }
    )


def fill(denoiser: Any, dataset: Images, store: PredictionStore, batch_size: int) -> None:
    """Do the whole of stage one into a planned store."""
    missing, config = store.missing(), settings(batch_size)
    assert record(denoiser, store, dataset, missing, config, stop=StopRequest())


def learning(denoiser: Any, batch_size: int) -> DistilConfig:
    """How a student learns of both parts."""
    return DistilConfig.model_validate(
        {
            "model": denoiser.config,
            "loss": {"guidance_scale": SCALE},
            "optimizer": {"steps": 1000, "batch_size": batch_size},
        }
    )


def taught(
    denoiser: Any, store: PredictionStore, config: DistilConfig, batches: int
) -> Iterator[TaughtRows]:
    """Targets as stage two makes them, batch by batch."""
    recording = Recording.of(store.manifest)
    conversion = Conversion(recording.schedule, denoiser.schedule)
    reading = Reading.of(recording, conversion, config, 0)
    rows = StoreRows(store, config, reading, 0, PLACE)
    targets = RowTargets(
        store.manifest, recording, conversion, config.loss, takes_scale=False, seed=0,
        device=PLACE.device,
    )  # fmt: skip
    for number in range(batches):
        for batch in rows.batches(number * config.optimizer.batch_size):
            yield targets.of(batch, _no_base)
    rows.close()


def _no_base(_: object) -> Tensor:
    raise AssertionError("nothing is transferred here")
