"""Stores of a teacher that is a formula, written by hand, and a denoiser that is a formula too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.diffusion import schedule
from stages.diffusion.facts import ConditionFacts, ImageFacts, Recording, ScheduleFacts
from stages.diffusion.model_config import DenoiserConfig, LoraConfig, ScheduleConfig
from stages.diffusion.noise import checksum, row_noise
from stages.diffusion.record_config import (
    AdapterContrast,
    ForwardRows,
    TrajectoryRows,
    UnconditionalContrast,
)
from stages.diffusion.schedule import Schedule
from stages.diffusion.train_config import DistilConfig
from stages.errors import UserError
from store import PredictionStore
from store.plan import Plan
from store.schema import (
    Bucket,
    Column,
    Dense,
    Fingerprints,
    Guidance,
    Latent,
    Manifest,
    Sampler,
    TableFacts,
)
from store.side_tables import SideTable, SideTableWriter

SEED = 7
"""Of stage one."""
SHAPES = ((2, 4, 4), (2, 2, 6))
IMAGES, TEXTS, SLOTS = 2, 2, 3
SCALE = 3.0
"""Of trajectories, and of targets that are guided already."""
SAMPLES = [
    {"sample_id": "a", "target": "teacher", "weight": 1.0, "bucket": 0},
    {"sample_id": "b", "target": "teacher", "weight": 0.5, "bucket": 1},
    {"sample_id": "c", "target": "prior", "weight": 1.0, "bucket": 0},
    {"sample_id": "d", "target": "data", "weight": 1.0, "bucket": 0},
    {"sample_id": "e", "target": "data", "weight": 2.0, "bucket": 1},
    {"sample_id": "f", "target": "teacher", "weight": 1.0, "bucket": 0},
]
TEACHERS = [sample | {"target": "teacher"} for sample in SAMPLES]
FORWARD, UNCONDITIONAL = ForwardRows(slots=SLOTS), UnconditionalContrast()


def schedule_of(
    prediction: str = "epsilon", kind: str = "ddpm", betas: str = "squaredcos_cap_v2"
) -> ScheduleFacts:
    config = {"kind": kind, "prediction": prediction, "train_timesteps": 40}
    return schedule.facts_of(ScheduleConfig.model_validate(config | {"beta_schedule": betas}))


def facts_of(**changes: Any) -> ImageFacts:
    plain = ImageFacts(
        encoder="pixels",
        latent_channels=2,
        downsample=1,
        scaling=1.0,
        buckets=SHAPES,
        conditions={"embeds": ConditionFacts(dtype="float16", shape=(3,))},
        unconditional="label",
    )
    return plain.model_copy(update=changes)


def teacher(x: np.ndarray, t: float, embeds: np.ndarray) -> np.ndarray:
    """What the teacher predicts, in float64."""
    return 0.7 * x.astype(np.float64) + 0.01 * t + 0.3 * embeds.astype(np.float64).sum()


def latent_row(sample: Mapping[str, Any], image: int) -> int:
    return [s["sample_id"] for s in SAMPLES].index(sample["sample_id"]) * IMAGES + image


def condition_row(sample: Mapping[str, Any], text: int) -> int:
    return 1 + [s["sample_id"] for s in SAMPLES].index(sample["sample_id"]) * TEXTS + text


def write_tables(folder: Path) -> dict[str, TableFacts]:
    """The side tables of `SAMPLES`; images of `a` have a mask."""
    random = np.random.default_rng(3)
    latents, conditions = (SideTableWriter(folder / n, 5) for n in ("latents", "conditions"))
    conditions.append({"embeds": np.zeros(3, np.float16)})
    for sample in SAMPLES:
        shape = SHAPES[sample["bucket"]]
        for _ in range(IMAGES):
            row = {"latent": random.normal(size=shape).astype(np.float16)}
            row["time_ids"] = random.normal(size=6).astype(np.float32)
            if sample["sample_id"] == "a":
                row["mask"] = (random.random((1, *shape[1:])) < 0.5).astype(np.float16)
            latents.append(row)
        for _ in range(TEXTS):
            conditions.append({"embeds": random.normal(size=3).astype(np.float16)})
    return {"latents": latents.finish(), "conditions": conditions.finish()}


@dataclass(frozen=True)
class Written:
    """What distinguishes a store."""

    schedule: ScheduleFacts = field(default_factory=schedule_of)
    rows: ForwardRows | TrajectoryRows = FORWARD
    contrast: UnconditionalContrast | AdapterContrast = UNCONDITIONAL
    branches: str = "both"
    samples: Sequence[Mapping[str, Any]] = tuple(SAMPLES)
    embedded_guidance: float | None = None
    failed: frozenset[tuple[str, int, int]] = frozenset()
    """Keys of rows whose prediction was not finite."""
    repeated: frozenset[tuple[str, int, int]] = frozenset()
    """Keys of rows that were predicted in float32, as their prediction was not finite before."""
    asked: tuple[str, ...] = ()
    """Samples that are their own target, but were asked for."""
    unasked: tuple[str, ...] = ()
    """Samples that are not, but were not asked for."""


def write_store(path: Path, written: Written | None = None, shards: int | None = None) -> Any:
    """Write a store whose rows follow from the formula; `shards` writes only the first ones."""
    written = written or Written()
    tables = write_tables(path.parent / f"{path.name}-tables")
    folders = {name: path.parent / f"{path.name}-tables" / name for name in tables}
    trajectory = isinstance(written.rows, TrajectoryRows)
    columns = [
        Column(name=name, dtype=dtype)
        for name, dtype in (
            ("t", "float64"), ("alpha", "float64"), ("sigma", "float64"), ("x_t_crc", "uint32"),
            ("x_t_sum", "float64"), ("target_crc", "uint32"), ("status", "uint8"),
        )
    ]  # fmt: skip
    if trajectory:
        columns.append(Column(name="x_t", dtype="float16", latent=True))
    elif written.rows.store_noise:
        columns.append(Column(name="noise", dtype="float16", latent=True))
    manifest = Manifest(
        family="diffusion",
        streams=(Latent(name="prediction", group="denoiser", shape=SHAPES[0]),),
        target=Dense(branches=written.branches),
        guidance=Guidance(scale=SCALE),
        sampler=Sampler(),
        source="teacher",
        seed=SEED,
        split="train",
        timestep_s=None,
        conditions=("target", "weight"),
        fingerprints=Fingerprints(teacher="t", tokenizer="", audio_codec="", dataset="d"),
        conditioning=facts_of().model_dump(mode="json"),
        columns=tuple(columns),
        drawn=("image_variation", "text_variation", "latent", "condition"),
        buckets=tuple(Bucket(shape=shape, predicted=p) for p in (True, False) for shape in SHAPES),
        tables=tables,
        recording=Recording(
            schedule=written.schedule,
            rows=written.rows,
            contrast=written.contrast,
            embedded_guidance=written.embedded_guidance,
            precision="fp32",
            versions={},
        ).model_dump(mode="json"),
    )
    by_bucket: dict[int, list[tuple[str, int]]] = {}
    for sample in written.samples:
        data = sample["sample_id"] in written.unasked
        data |= sample["target"] == "data" and sample["sample_id"] not in written.asked
        keys = [(sample["sample_id"], variation) for variation in range(IMAGES * TEXTS)]
        by_bucket.setdefault(sample["bucket"] + 2 * data, []).extend(keys)
    plan = [
        (bucket, keys[start : start + 3])
        for bucket, keys in sorted(by_bucket.items())
        for start in range(0, len(keys), 3)
    ]
    names = ("sample_id", "target", "weight")
    table = pa.table({name: [sample[name] for sample in written.samples] for name in names})
    store = PredictionStore.create(
        path,
        manifest,
        Plan.of([keys for _, keys in plan], buckets=[bucket for bucket, _ in plan]),
        table,
        tables=folders,
    )
    by_id = {sample["sample_id"]: sample for sample in written.samples}
    for shard, (bucket, keys) in enumerate(plan[:shards]):
        with store.writer(shard) as writer:
            for key in keys:
                sample, (image, text) = by_id[key[0]], divmod(key[1], TEXTS)
                drawn = {
                    "image_variation": image, "text_variation": text,
                    "latent": latent_row(sample, image), "condition": condition_row(sample, text),
                }  # fmt: skip
                arrays = rollout_arrays(written, store, key, drawn, predicted=bucket < 2)
                weight = rollout_weight(key[1])
                writer.append(*key, arrays, stop_reason="end", weight=weight, seed=0, drawn=drawn)
            writer.commit()
    return PredictionStore.open(path)


def rollout_weight(variation: int) -> float:
    return 0.25 if variation == 2 else 1.0


def rollout_arrays(
    written: Written, store: Any, key: tuple[str, int], drawn: dict[str, int], predicted: bool
) -> dict[str, np.ndarray]:
    image = store.table("latents")[drawn["latent"]]
    embeds = store.table("conditions")[drawn["condition"]]["embeds"]
    levels = Schedule(written.schedule)
    shape, variations = image["latent"].shape, (drawn["image_variation"], drawn["text_variation"])
    trajectory = isinstance(written.rows, TrajectoryRows)
    rows: dict[str, list[Any]] = {}
    if trajectory:
        kept = [*(written.rows.keep or range(written.rows.steps)), written.rows.steps]
        times = levels.solver_times(written.rows.steps)[kept]
    else:
        times = levels.draw(written.rows.timesteps, written.rows.slots, SEED, *key)
    for slot, t in enumerate(times):
        alpha, sigma = (float(each) for each in levels.at(np.array(t)))
        noise = row_noise(SEED, key[0], *variations, 0 if trajectory else slot, shape)
        if trajectory:  # any states will do, if each leads on to the next by the same rule
            state = (noise * 0.9**slot + 0.1 * slot).astype(np.float16)
            rows.setdefault("row.x_t", []).append(state[None])
            x_t = state.astype(np.float32)
        else:
            if written.rows.store_noise:
                stored = noise.astype(np.float16)
                rows.setdefault("row.noise", []).append(stored[None])
                noise = stored.astype(np.float32)
            x_t = np.float32(alpha) * image["latent"].astype(np.float32)
            x_t = x_t + np.float32(sigma) * noise
        end = trajectory and slot == len(times) - 1
        failed = (*key, slot) in written.failed
        cond, uncond = teacher(x_t, t, embeds), teacher(x_t, t, 0 * embeds) - 0.2 * x_t
        if failed or end:
            cond, uncond = 0 * cond, 0 * uncond
        parts = {"cond": cond, "delta": cond - uncond}
        if written.branches == "guided":
            parts = {"guided": uncond + SCALE * (cond - uncond)}
        crc = 0
        for name, values in parts.items() if predicted else ():
            part = values.astype(np.float16)[None]
            rows.setdefault(f"dense.{name}", []).append(part)
            crc = google_crc32c.extend(crc, part.tobytes())
        sums = checksum(x_t)
        status = 4 if not predicted else 2 if failed else 3 if end else 0
        status = 1 if (*key, slot) in written.repeated else status
        columns = {
            "t": np.float64(t), "alpha": np.float64(alpha), "sigma": np.float64(sigma),
            "x_t_crc": np.uint32(sums.crc), "x_t_sum": np.float64(sums.sum),
            "target_crc": np.uint32(crc), "status": np.uint8(status),
        }  # fmt: skip
        for name, value in columns.items():
            rows.setdefault(f"row.{name}", []).append(value)
    return {name: np.stack(values) for name, values in rows.items()}


class FakeNetwork(nn.Module):
    """A prediction that is linear in what it is told."""

    def __init__(self, seed: int, adapter: bool, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.of_x, self.of_t, self.of_embeds, self.of_scale, self.of_sizes = (
            nn.Parameter(0.3 * torch.randn(size, generator=generator)) for size in (1, 1, 3, 1, 6)
        )
        self.dropout = nn.Dropout(dropout)
        self.on = adapter
        if adapter:
            self.requires_grad_(False)
            self.adapter = nn.Parameter(0.3 * torch.randn(2, generator=generator))

    def forward(
        self, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor], scale: Tensor | None
    ) -> Tensor:
        told = self.of_t * t.float() + conditions["embeds"].float() @ self.of_embeds
        if "time_ids" in conditions:
            told = told + conditions["time_ids"] @ self.of_sizes
        if scale is not None:
            told = told + self.of_scale * scale
        if scale is None and not hasattr(self, "adapter"):
            told = told + 0 * self.of_scale  # in the graph, as data parallelism wants
        if "time_ids" not in conditions:
            told = told + 0 * self.of_sizes.sum()
        value = self.of_x * x + told[:, None, None, None]
        if self.on:
            value = value + self.adapter[0] * x + self.adapter[1]
        return self.dropout(value)


class FakeDenoiser:
    """The family of `FakeNetwork`."""

    name = "diffusion"
    full_precision = ()
    blocks = ()

    def __init__(
        self,
        schedule: ScheduleFacts | None = None,
        *,
        adapter: bool = False,
        takes_scale: bool = False,
        seed: int = 1,
        dropout: float = 0.0,
        facts: ImageFacts | None = None,
    ) -> None:
        self.module = FakeNetwork(seed, adapter, dropout)
        self.network: nn.Module = self.module
        lora = LoraConfig() if adapter else None
        self.config = DenoiserConfig(network="UNet2DModel", adapter=lora)
        self.facts = facts or facts_of()
        self.schedule = schedule or schedule_of()
        self.takes_scale = takes_scale
        self.condition_dropout: float | None = None

    def predict(self, x: Tensor, t: Tensor, conditions: Any, scale: Tensor | None = None) -> Tensor:
        assert x.dtype == torch.float32
        assert t.dtype == torch.float64
        return self.network(x, t, conditions, scale)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        if not hasattr(self.module, "adapter"):
            raise UserError("there is no adapter")
        self.module.on = False
        try:
            yield
        finally:
            self.module.on = True

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.module.state_dict()), path / "model.safetensors")

    @staticmethod
    def saved(path: Path) -> dict[str, Tensor]:
        return load_file(path / "model.safetensors")


def config_of(
    loss: Mapping[str, Any] | None = None,
    *,
    workers: int = 0,
    start: str = "fork",
    optimizer: Mapping[str, Any] | None = None,
    **changes: Any,
) -> DistilConfig:
    plain = {"steps": 6, "batch_size": 8, "learning_rate": 0.02, "warmup_steps": 1, "log_every": 1}
    document = {
        "model": {"network": "UNet2DModel"},
        "loss": {"guidance_scale": 2.5} if loss is None else loss,
        "optimizer": plain | dict(optimizer or {}),
        "loader": {"workers": workers, "start_method": start, "prefetch": 2},
        "buffer_shards": 3,
    }
    return DistilConfig.model_validate(document | changes)


@dataclass
class FakeImages:
    """A dataset of `SAMPLES`, as `fit_denoiser` sees it."""

    folder: Path
    tables: Mapping[str, TableFacts]
    facts: ImageFacts = field(default_factory=facts_of)
    dev: int = 2

    @classmethod
    def write(cls, folder: Path) -> FakeImages:
        return cls(folder, write_tables(folder))

    def samples(self, split: str) -> list[dict[str, Any]]:
        part = SAMPLES[: -self.dev] if split == "train" else SAMPLES[-self.dev :]
        return [
            sample
            | {
                "latents": [latent_row(sample, image) for image in range(IMAGES)],
                "conditions": [condition_row(sample, text) for text in range(TEXTS)],
            }
            for sample in part
        ]

    def table(self, name: str) -> SideTable:
        return SideTable(self.folder / name, self.tables[name])
