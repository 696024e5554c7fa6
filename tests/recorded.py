"""Images, denoisers and stores of stage one of diffusion, small enough to check by hand.

As a script, `python -m tests.recorded FOLDER` records into a store below FOLDER in a process of
its own, so slowly that it can be killed in the middle.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.architecture import Architecture
from stages.diffusion.facts import ConditionFacts, ImageFacts, ScheduleFacts
from stages.diffusion.model_config import ScheduleConfig
from stages.diffusion.record import record
from stages.diffusion.record_config import RecordConfig
from stages.diffusion.record_plan import create_record_store, lay_out_records
from stages.diffusion.schedule import facts_of
from stages.errors import UserError
from stages.interruption import StopRequest
from store import PredictionStore
from store.schema import TableFacts
from store.side_tables import SideTable, SideTableWriter

SHAPES = ((2, 4, 3), (2, 3, 4))
CLASSES = ("zero", "one", "two")
NO_CLASS = len(CLASSES)
TARGETS = ("teacher", "teacher", "prior", "teacher", "data", "teacher", "teacher")
PLAIN: dict[str, Any] = {
    "rows": {"kind": "forward", "slots": 3},
    "guidance": {"scale": 3.0},
    "rollouts_per_shard": 4,
    "batch_size": 5,
    "free_floor": 0,
}


def facts_of_images(**changes: Any) -> ImageFacts:
    facts = ImageFacts(
        encoder="pixels",
        latent_channels=2,
        downsample=1,
        scaling=1.0,
        buckets=SHAPES,
        conditions={"class_labels": ConditionFacts(dtype="int64", shape=())},
        unconditional="label",
        classes=CLASSES,
    )
    return facts.model_copy(update=changes)


@dataclass(frozen=True)
class Header:
    fingerprint: str
    tables: dict[str, TableFacts]


@dataclass(frozen=True)
class Images:
    """What a dataset of images has, with samples in memory and tables on disk."""

    path: Path
    header: Header
    facts: ImageFacts
    rows: list[dict[str, Any]]

    def samples(self, split: str) -> Sequence[Mapping[str, Any]]:
        return [row for row in self.rows if row["split"] == split]

    def table(self, name: str) -> SideTable:
        return SideTable(self.path / "tables" / name, self.header.tables[name])


def images(
    path: Path,
    targets: Sequence[str] = TARGETS,
    *,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    facts: ImageFacts | None = None,
) -> Images:
    """A dataset of labelled latents of two shapes, each in 2 × 2 variations."""
    random = np.random.default_rng(0)
    facts = facts or facts_of_images()
    tables = {
        name: SideTableWriter(path / "tables" / name, 4) for name in ("latents", "conditions")
    }
    for label in (NO_CLASS, *range(NO_CLASS)):
        tables["conditions"].append({"class_labels": np.array(label)})
    rows = []
    for number, target in enumerate(targets):
        bucket = number % len(shapes)
        latents = [
            tables["latents"].append(
                {"latent": random.standard_normal(shapes[bucket]).astype(np.float16)}
            )
            for _ in range(2)
        ]
        labels = [1 + number % NO_CLASS, 1 + (number + 1) % NO_CLASS]
        rows.append({
            "sample_id": f"image/{number}", "split": "train", "text": None, "label": labels[0],
            "target": target, "weight": 0.5 + number, "bucket": bucket, "latents": latents,
            "conditions": labels,
        })  # fmt: skip
    header = Header("dataset", {name: table.finish() for name, table in tables.items()})
    return Images(path, header, facts, rows)


class Formula(nn.Module):
    """gain·x + bias[label]·cos(t/100) + the adapter."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = np.random.default_rng(seed)
        self.gain = nn.Parameter(torch.tensor(0.5 + 0.1 * seed))
        bias = random.standard_normal(NO_CLASS + 1).astype(np.float32)
        self.bias = nn.Parameter(torch.from_numpy(bias))
        self.adapter = nn.Parameter(torch.tensor(0.25))
        self.register_buffer("steady", torch.ones(()))


@dataclass
class FakeDenoiser:
    """A denoiser whose every number can be worked out again."""

    facts: ImageFacts
    seed: int = 0
    dtype: torch.dtype = torch.float32
    prediction: str = "v_prediction"
    adapted: bool = False
    takes_scale: bool = False
    embedded_guidance: float | None = None
    delay_s: float = 0.0
    broken: Callable[[Tensor, torch.dtype], Tensor] | None = None
    """Which times [b] the model is not finite at, in a type."""
    batches: list[int] = field(default_factory=list)
    name: str = "diffusion"
    condition_dropout: float | None = 0.1

    def __post_init__(self) -> None:
        self.module = Formula(self.seed).to(self.dtype)
        kind = "flow" if self.prediction == "flow" else "ddpm"
        config = ScheduleConfig(kind=kind, prediction=self.prediction)
        self.schedule: ScheduleFacts = facts_of(config)

    def fingerprint(self) -> str:
        return f"denoiser {self.seed}"

    def architecture(self) -> Architecture:
        return Architecture(
            parameters=6, parts={"all": 6}, active_parameters=6, flops_per_timestep=1,
            dense_flops_per_timestep=1,
        )  # fmt: skip

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        if not self.adapted:
            raise UserError("there is none")
        self.adapted = False
        try:
            yield
        finally:
            self.adapted = True

    def predict(
        self, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> Tensor:
        assert t.dtype == torch.float64
        assert not self.module.training
        self.batches.append(len(x))
        time.sleep(self.delay_s)
        module = self.module
        labels, dtype = conditions["class_labels"], self.dtype
        shift = module.bias[labels] * torch.cos(t / 100).to(dtype) + self.adapted * module.adapter
        assert module.gain.dtype == module.steady.dtype == dtype
        y = module.gain * x.to(dtype) * module.steady + shift[:, None, None, None]
        if self.broken is not None:
            y = torch.where(self.broken(t, dtype)[:, None, None, None], torch.nan, y)
        return y


def by_hand(
    denoiser: FakeDenoiser, x: np.ndarray, t: float, label: int, adapted: bool = False
) -> np.ndarray:
    """What a float32 denoiser predicts [*shape] of one row, in float64."""
    gain, bias = denoiser.module.gain.item(), denoiser.module.bias[label].item()
    return gain * x.astype(np.float64) + bias * np.cos(t / 100) + 0.25 * adapted


def config_of(**changes: Any) -> RecordConfig:
    return RecordConfig.model_validate(PLAIN | changes)


def planned(
    path: Path, dataset: Images, denoiser: FakeDenoiser, *, other: Any = None, **changes: Any
) -> tuple[PredictionStore, RecordConfig]:
    config = config_of(**changes)
    store = create_record_store(
        path, dataset, lay_out_records(config, denoiser, dataset, seed=7, other=other)
    )
    return store, config


def written(
    path: Path, dataset: Images, denoiser: FakeDenoiser, *, other: Any = None, **changes: Any
) -> PredictionStore:
    """A complete store."""
    store, config = planned(path, dataset, denoiser, other=other, **changes)
    missing, stop = store.missing(), StopRequest()
    assert record(denoiser, store, dataset, missing, config, stop=stop, other=other)
    return PredictionStore.open(path)


def bytes_of(store: PredictionStore) -> dict[str, bytes]:
    """Every file of every shard."""
    root = Path(store.path) / "shards"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def main(folder: Path) -> None:
    dataset = images(folder / "dataset")
    written(folder / "store", dataset, FakeDenoiser(dataset.facts, delay_s=0.05))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
