"""What a student and a store must agree on before the one can learn from the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

from stages.diffusion.denoiser import Denoiser
from stages.diffusion.draws import DRAWN
from stages.diffusion.facts import (
    COLUMNS,
    MATCHED,
    NOISE_COLUMN,
    STATE_COLUMN,
    ImageFacts,
    Recording,
)
from stages.diffusion.loss_support import require_teachable
from stages.diffusion.row_targets import transfers
from stages.diffusion.stored_row import SOURCES
from stages.diffusion.train_config import DiffusionLossConfig
from stages.errors import UserError
from store import PredictionStore

TAUGHT_BY = ("target", "weight")
"""Columns of samples.parquet that say what a student learns of a sample."""


def require_match(denoiser: Denoiser, store: PredictionStore) -> None:
    """Refuse a student that was built for other latents or conditions than the store holds."""
    stored = ImageFacts.of(store.manifest)
    for name, what in MATCHED.items():
        own, theirs = getattr(denoiser.facts, name), getattr(stored, name)
        if own != theirs:
            raise UserError(
                f"the student's {what} ({own}) differ from the store's ({theirs}, in "
                f"manifest.json, conditioning.{name}): the two would mean other images by the same "
                "numbers; begin with a student of the store's dataset, or record the student's"
            )


def require_loss(
    denoiser: Denoiser, store: PredictionStore, recording: Recording, loss: DiffusionLossConfig
) -> None:
    """Refuse a loss that the store has nothing for, or the student no input."""
    manifest = store.manifest
    try:
        require_teachable(loss, recording.rows, manifest.branches, manifest.guidance.scale)
    except UserError as error:
        raise UserError(f"{store.path} cannot teach this: {error}") from None
    _require_one_scale(denoiser, store, recording, loss)
    if transfers(manifest, recording, loss) and denoiser.config.adapter is None:
        raise UserError(
            f"{store.path} holds the difference to another model (contrast: "
            f"{recording.contrast.kind}), which is taught on top of what the student predicts "
            "without its adapter, but it has none: set model.adapter"
        )


def _require_one_scale(
    denoiser: Denoiser, store: PredictionStore, recording: Recording, loss: DiffusionLossConfig
) -> None:
    """Refuse a scale per row for a student that is not told which."""
    scale, told = loss.guidance_scale, recording.embedded_guidance
    if not isinstance(scale, tuple) or scale[0] == scale[1]:
        return
    drawn = f"loss.guidance_scale={list(scale)} draws a scale per row, but the student is"
    if told is not None:
        raise UserError(
            f"{drawn} told the guidance {told:g} that the teacher of {store.path} was told, and "
            "would learn their mean: give one number"
        )
    if not denoiser.takes_scale:
        raise UserError(
            f"{drawn} not told which and would learn their mean: set model.scale_input: true, or "
            "give one number"
        )


def require_rows(store: PredictionStore, recording: Recording) -> None:
    """Refuse a store without what every row of a recording has beside its prediction."""
    manifest = store.manifest
    wanted = [*COLUMNS, STATE_COLUMN] if recording.rows.kind == "trajectory" else [*COLUMNS]
    if recording.rows.kind == "forward" and recording.rows.store_noise:
        wanted.append(NOISE_COLUMN)
    tables = {"latents", "conditions"} if ImageFacts.of(manifest).conditions else {"latents"}
    lacking = {
        "columns": [column.name for column in wanted if column not in manifest.columns],
        "drawn": [name for name in DRAWN if name not in manifest.drawn],
        "tables": sorted(tables - manifest.tables.keys()),
        "conditions": [name for name in TAUGHT_BY if name not in manifest.conditions],
    }
    for field, names in lacking.items():
        if names:
            raise UserError(
                f"{store.path} is no whole recording of a diffusion model: {field} of its "
                f"manifest.json lack {', '.join(names)}, or have them of another type; restore it "
                "from a copy, or record again"
            )


def require_targets(store: PredictionStore, recording: Recording) -> None:
    """Refuse a sample whose target is not in the store, and a store whose samples weigh nothing."""
    along, weighs = recording.rows.kind == "trajectory", False
    for sample, predicted in _samples(store):
        sample_id, source, weight = (sample[name] for name in ("sample_id", *TAUGHT_BY))
        if source not in SOURCES or not isinstance(weight, float) or not 0 <= weight < inf:
            raise UserError(
                f"sample {sample_id!r} of {store.path} (samples.parquet) has the target "
                f"{source!r:.200} and the weight {weight!r:.200}, but needs one of "
                f"{', '.join(SOURCES)} and a finite number >= 0: restore it from a copy, or record "
                "again"
            )
        weighs |= weight > 0
        if source != "data" and not predicted:
            raise UserError(
                f"sample {sample_id!r} is to learn from {source!r}, but {store.path} holds no "
                "prediction of it (its bucket is not predicted): the store is not of this dataset; "
                "record again"
            )
        if source == "data" and along:
            raise UserError(
                f"sample {sample_id!r} is its own target, but {store.path} holds trajectories, "
                "which begin in noise and have no image: record it with rows.kind: forward, or "
                "give it the target `teacher`"
            )
    if not weighs:
        raise UserError(
            f"{store.path} has nothing to learn from, for all of its samples weigh 0: give some of "
            "them a weight in the dataset's metadata, and record again"
        )


def _samples(store: PredictionStore) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Yield the sample of every rollout, and whether it was to be predicted."""
    buckets = store.manifest.buckets
    for shard in store.committed:
        bucket = store.plan.bucket_of(shard)
        predicted = bucket is None or buckets[bucket].predicted
        rows = range(len(store.plan[shard]))
        for sample in store.samples_at([shard] * len(rows), rows):
            yield sample, predicted
