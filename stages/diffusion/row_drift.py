"""A denoiser is asked again of rows of a store, at the states that it saw, and both compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stages.diffusion.answers import Answer, Ask, Cell, Teacher
from stages.diffusion.asked_rows import ConditionRows, GuidedRows, HostAsked
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.draws import DRAWN, Draw
from stages.diffusion.facts import FAILED, OK, REPEATED, Recording
from stages.diffusion.forward_rows import forward_ask
from stages.diffusion.parts import guided_value, passes_of
from stages.diffusion.record import combined, value_of
from stages.diffusion.stored_row import StoredRow
from stages.drift import DriftTally, Part, StoreDrift, differing, measure_of, method_of
from stages.errors import UserError
from stages.quantization import Quantized
from store import PredictionStore
from store.plan import Key
from store.schema import Dense


@torch.inference_mode()
def row_drift(
    denoiser: Denoiser,
    store: PredictionStore,
    keys: Sequence[Key],
    *,
    batch_size: int,
    other: Denoiser | None = None,
    done: Callable[[int], object] = lambda _: None,
) -> StoreDrift:
    """Ask again for the rows of `keys` and compare what is predicted with what is stored.

    The latents are the stored ones: along trajectories every state as it is, so that no error adds
    up; conditions, guidance and precision are the manifest's. Rows without a stored prediction are
    left out. `other` is the second model of a contrast between two, of which only the one that is
    asked is on the device. `done` is told how many rollouts were compared. Raises `UserError` for a
    row whose latent is not the one that was recorded.
    """
    asker = _Asker(denoiser, other, store, batch_size)
    tally = DriftTally(measure_of(store.manifest))
    for key, batches in asker.answers(keys):
        for rows, answer in batches:
            _compare(key, rows, answer, tally)
        done(1)
    return tally.result()


@dataclass(frozen=True)
class _Rows:
    """Some rows of one rollout that have a prediction."""

    cells: Sequence[StoredRow]
    asked: HostAsked


class _Asker:
    """Asks for the rows of rollouts again, a few at a time."""

    def __init__(
        self,
        denoiser: Denoiser,
        other: Denoiser | None,
        store: PredictionStore,
        batch_size: int,
    ) -> None:
        manifest, self._store, self._batch_size = store.manifest, store, batch_size
        self._recording = Recording.of(manifest)
        assert isinstance(manifest.target, Dense)
        self._target = manifest.target
        contrast, scale = self._recording.contrast, manifest.guidance.scale
        passes = passes_of(contrast, self._target, scale)
        conditions = store.table("conditions") if "conditions" in manifest.tables else None
        self._guided = GuidedRows(
            ConditionRows(store.table("latents"), conditions),
            contrast,
            scale,
            unconditional=passes == "unconditional",
        )
        self._device = next(denoiser.module.parameters()).device
        self._models = [denoiser] if other is None else [denoiser, other]
        asks: list[Ask] = [forward_ask(denoiser, passes, self._target)]
        if other is not None:
            asks = [partial(value_of, model) for model in self._models]
        for model in self._models:
            model.module.eval()
        self._teachers = [
            Teacher(
                model,
                ask,
                precision=self._recording.precision,
                quantized=manifest.quantization is not None,
            )
            for model, ask in zip(self._models, asks, strict=True)
        ]

    def answers(self, keys: Sequence[Key]) -> Iterator[tuple[Key, Iterator[tuple[_Rows, Answer]]]]:
        """Yield rollouts with their rows and what is predicted of them."""
        if len(self._models) == 1:
            for key in keys:
                yield key, ((rows, self._asked(0, rows)) for rows in self._rows(key))
            return
        self._to_device(1)
        without = {key: [self._asked(1, rows) for rows in self._rows(key)] for key in keys}
        self._to_device(0)
        for key in keys:
            yield key, self._combined(key, without.pop(key))

    def _combined(self, key: Key, without: Sequence[Answer]) -> Iterator[tuple[_Rows, Answer]]:
        for rows, other in zip(self._rows(key), without, strict=True):
            scale = torch.from_numpy(rows.asked.scale)
            yield rows, combined(self._asked(0, rows), other, scale, self._target)

    def _asked(self, model: int, rows: _Rows) -> Answer:
        teacher = self._teachers[model]
        cells = [[Cell(*cell.key)] for cell in rows.cells]
        return teacher.finish(teacher.begin(rows.asked.to(self._device), cells))

    def _to_device(self, turn: int) -> None:
        with torch.inference_mode(False):
            self._models[1 - turn].module.to("cpu")
            self._models[turn].module.to(self._device)

    def _rows(self, key: Key) -> Iterator[_Rows]:
        """Read the rows of a rollout that have a prediction."""
        place = self._store.plan.locate(key)
        assert place is not None
        number, rollout = place
        shard, sample = self._store.shard(number), self._store.sample(key[0])
        count = int(shard.offsets[rollout + 1] - shard.offsets[rollout])
        cells = [StoredRow(self._store, shard, rollout, slot, 0, sample) for slot in range(count)]
        predicted = [cell for cell in cells if cell.column("status") in (OK, REPEATED)]
        for start in range(0, len(predicted), self._batch_size):
            part = predicted[start : start + self._batch_size]
            x, t = np.stack([self._seen(cell) for cell in part]), [cell.level[0] for cell in part]
            draws = [_draw(cell) for cell in part]
            yield _Rows(part, self._guided.asked(x, np.array(t), draws))

    def _seen(self, cell: StoredRow) -> np.ndarray:
        """Return the noised latent [*shape] float32 that the teacher saw."""
        if self._recording.rows.kind == "trajectory":
            return cell.state(cell.row).astype(np.float32)
        return cell.noised()[0]


def _draw(cell: StoredRow) -> Draw:
    """Return the variation that a row is of, from what the store says of it."""
    bucket = cell.store.plan.bucket_of(cell.shard.number)
    return Draw(
        key=cell.key[:2],
        **{name: cell.drawn(name) for name in DRAWN},
        target=cell.sample["target"],
        weight=cell.weight,
        bucket=0 if bucket is None else bucket,
    )


def _compare(key: Key, rows: _Rows, answer: Answer, tally: DriftTally) -> None:
    """Compare what is stored of some rows with what is predicted now."""
    stored = [cell.predicted() for cell in rows.cells]
    scale = torch.from_numpy(rows.asked.scale)
    then = _values({name: np.stack([row[name] for row in stored]) for name in stored[0]}, scale)
    now = _values({name: values[:, 0] for name, values in answer.arrays.items()}, scale)
    lost = answer.status[:, 0] == FAILED
    for part, value in then.items():
        error, power = _squares(now[part] - value), _squares(value)
        power = np.maximum(power, np.finfo(np.float64).tiny)
        share = np.where(lost, np.nan, error / power)
        for place, cell in enumerate(rows.cells):
            at = slice(place, place + 1)
            tally.add(key, f"slot {cell.slot}", share[at], part=part, weights=power[at])


def _values(arrays: Mapping[str, np.ndarray], scale: Tensor) -> dict[Part, Tensor]:
    """Return what stored parts [b, 1, *shape] make, [b, *shape] float32."""
    parts = {name: torch.from_numpy(values)[:, 0] for name, values in arrays.items()}
    found: dict[Part, Tensor] = {"guided": guided_value(parts, scale)}
    if "dense.cond" in parts:
        cond = parts["dense.cond"].float()
        found |= {"cond": cond, "uncond": cond - parts["dense.delta"].float()}
    return found


def _squares(values: Tensor) -> np.ndarray:
    """Sum of squares [b] float64 of values [b, *shape]."""
    return values.double().square().flatten(1).sum(1).numpy()


def predicted_keys(store: PredictionStore) -> list[Key]:
    """Return the keys of the rollouts of which something is predicted, in the plan's order."""
    plan, buckets = store.plan, store.manifest.buckets
    shards = [
        shard
        for shard in store.committed
        for bucket in [plan.bucket_of(shard)]
        if bucket is None or buckets[bucket].predicted
    ]
    return [key for shard in shards for key in plan[shard]]


def require_recorded(store: PredictionStore, other: Denoiser | None) -> None:
    """Refuse a store that is not of a diffusion model, or of another number of models."""
    recording = Recording.of(store.manifest)
    if (recording.contrast.kind == "model") != (other is not None):
        raise UserError(
            f"the store {store.path} has the contrast {recording.contrast.kind!r}, but the "
            "configuration names another one (rollout.contrast): audit with the one that wrote it"
        )


def row_differences(
    store: PredictionStore,
    denoiser: Denoiser,
    quantized: Quantized | None,
    other: Denoiser | None,
    *,
    precision: str,
    dataset_fingerprint: str,
) -> dict[str, tuple[str, str]]:
    """Return what of a store's predictions depends on something else than what was loaded."""
    manifest, recording = store.manifest, Recording.of(store.manifest)
    teacher = denoiser.fingerprint() if quantized is None else quantized.fingerprint
    record = None if quantized is None else quantized.record
    second = "" if other is None else other.fingerprint()
    return differing(
        {
            "teacher": (manifest.fingerprints.teacher, teacher),
            "other model": (recording.contrast_fingerprint, second),
            "quantization": (method_of(manifest.quantization), method_of(record)),
            "precision": (recording.precision, precision),
            "dataset": (manifest.fingerprints.dataset, dataset_fingerprint),
        }
    )
