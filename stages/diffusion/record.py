"""Stage one of diffusion: a denoiser is asked on noised images, and its answers are stored.

Only the denoiser is in memory. Each shard of the plan is asked for and committed by itself; noise
and times depend on (seed, sample_id, variations, slot) alone and batches on the plan alone, so an
interrupted run that any number of workers resume ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stages.background_writer import BackgroundWriter, Drawn
from stages.diffusion.answers import (
    Answer,
    Ask,
    InFlight,
    Teacher,
)
from stages.diffusion.asked_rows import ConditionRows, GuidedRows, Rows
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.draws import Sample, draws_by_key
from stages.diffusion.facts import FAILED, Recording
from stages.diffusion.forward_rows import ForwardShard, HostRows, forward_ask
from stages.diffusion.parts import Asked, ask, passes_of, stored_parts
from stages.diffusion.record_config import ForwardRows, RecordConfig, TrajectoryRows
from stages.diffusion.record_plan import LaidOut
from stages.diffusion.schedule import Schedule
from stages.diffusion.shard_work import Piece, Shard, ShardWork
from stages.diffusion.trajectories import (
    TrajectoryShard,
    kept_steps,
    trajectory_ask,
)
from stages.errors import UserError
from stages.estimate import Timed, time_batches, trial_plan
from stages.interruption import StopRequest
from stages.loader import read_in_a_thread
from stages.rollout import planned_rollouts
from store import Plan, PredictionStore
from store.schema import Dense, Manifest

Item = TypeVar("Item")
VALUE = "value"
"""Array of one model's predictions, where two models take turns."""


@torch.inference_mode()
def record(
    denoiser: Denoiser,
    store: PredictionStore,
    dataset: Samples,
    shards: Iterable[int],
    config: RecordConfig,
    *,
    stop: StopRequest,
    other: Denoiser | None = None,
) -> bool:
    """Write the given shards of a store; return False when `stop` was requested first.

    `dataset` is the one that the store was planned of. Each of `shards` is asked for when it is
    begun, which is while the last batch of the one before is under way. What is asked and kept
    follows from the manifest; of `config` counts only how many rows make a forward pass, which may
    move the last bits. `other` is the second model of a contrast between two, of which only the one
    that is asked is on the device. A shard is encoded and committed in a thread of its own while
    the next one is asked for; one that was asked for whole is committed. A shard that another
    worker commits first is left to it. Rows whose prediction is not finite are asked for again in
    float32, and else stored as failed. Raises NotFinite where a shard has too many of them,
    FloorReached where less than `config.free_floor` bytes are free when a shard is begun, and what
    the store raises.
    """
    recorder = _Recorder(denoiser, other, store, dataset, config.batch_size, stop)
    with (
        tqdm(
            total=planned_rollouts(store, shards), unit="rollout", desc="record", disable=None
        ) as bar,
        BackgroundWriter(store, config.free_floor) as writer,
    ):
        for piece in recorder.pieces(shards):
            if piece.collect is not None:
                writer.append(piece.shard, piece.collect)
            if piece.last:
                bar.update(len(store.plan[piece.shard]))
                if piece.collect is not None:
                    writer.commit(piece.shard)
    return not recorder.stopped


@torch.inference_mode()
def time_rows(
    denoiser: Denoiser,
    laid: LaidOut,
    missing: Sequence[int],
    dataset: Tables,
    config: RecordConfig,
    *,
    other: Denoiser | None = None,
) -> Timed | None:
    """Ask for a few batches of missing shards and time them; nothing is written.

    `laid` is the store as `config` lays it out, made or not. Returns None where the teacher has
    nothing left to predict.
    """
    each = rollout_rows(config.rows)
    together = 1 if isinstance(config.rows, TrajectoryRows) else each  # rows asked for as one
    size = max(config.batch_size // together, 1)
    trial = trial_plan(laid.manifest, laid.plan, missing, size)
    if trial is None:
        return None
    recorder = _Recorder(
        denoiser, other, _Trial(laid.manifest, trial, dataset), dataset, config.batch_size,
        StopRequest(),
    )  # fmt: skip

    def predict(shards: Iterable[int]) -> Iterator[Drawn]:
        for piece in recorder.pieces(shards):
            assert piece.collect is not None
            yield from piece.collect()

    return time_batches(laid.manifest, trial, lambda _key: each, predict)


def rollout_rows(rows: ForwardRows | TrajectoryRows) -> int:
    """Count the rows of every rollout of a store."""
    return len(kept_steps(rows)) if isinstance(rows, TrajectoryRows) else rows.slots


class Samples(Protocol):
    """A dataset of images, of which only its samples are read here."""

    def samples(self, split: str) -> Sequence[Sample]:
        """Return the rows of a split."""
        ...


class Tables(Samples, Protocol):
    """A dataset of images with its side tables."""

    def table(self, name: str) -> Rows:
        """Open a table by its name."""
        ...


class Planned(Protocol):
    """What is to be asked for: a store, or batches of one that need not be there."""

    @property
    def manifest(self) -> Manifest:
        """What is asked and kept."""
        ...

    @property
    def plan(self) -> Plan:
        """The keys of every shard."""
        ...

    def table(self, name: str) -> Rows:
        """Open a side table by its name."""
        ...

    def is_committed(self, shard: int) -> bool:
        """Whether a shard is there already."""
        ...


@dataclass(frozen=True)
class _Trial:
    """Batches that are asked for to be timed, each as a shard."""

    manifest: Manifest
    plan: Plan
    dataset: Tables

    def table(self, name: str) -> Rows:
        return self.dataset.table(name)

    def is_committed(self, _shard: int) -> bool:
        return False


class _Recorder:
    """Asks for the rows of shards, batch by batch."""

    def __init__(
        self,
        denoiser: Denoiser,
        other: Denoiser | None,
        store: Planned,
        dataset: Samples,
        batch_size: int,
        stop: StopRequest,
    ) -> None:
        self._store, self._manifest = store, store.manifest
        self._recording = recording = Recording.of(store.manifest)
        assert isinstance(store.manifest.target, Dense)
        self._target = store.manifest.target
        self._schedule = Schedule(recording.schedule)
        self._draws = draws_by_key(dataset.samples(store.manifest.split))
        tables = store.manifest.tables
        conditions = store.table("conditions") if "conditions" in tables else None
        scale = store.manifest.guidance.scale
        self._passes = passes_of(recording.contrast, self._target, scale)
        self._guided = GuidedRows(
            ConditionRows(store.table("latents"), conditions),
            recording.contrast,
            scale,
            unconditional=self._passes == "unconditional",
        )
        self._batch_size, self._stop = batch_size, stop
        self._device = next(denoiser.module.parameters()).device
        self._models = [denoiser] if other is None else [denoiser, other]
        if (recording.contrast.kind == "model") != (other is not None):
            raise UserError(
                f"the store has the contrast {recording.contrast.kind!r}, but "
                f"{len(self._models)} models were given: give the second one exactly for 'model'"
            )
        for model in self._models:
            model.module.eval()
        self._teachers = [self._teacher(model) for model in self._models]
        self.stopped = False
        """Whether a stop was requested before all was asked for."""

    def _teacher(self, model: Denoiser) -> Teacher:
        rows, target = self._recording.rows, self._target
        made: Ask
        if len(self._models) == 2:
            made = partial(value_of, model)
        elif isinstance(rows, TrajectoryRows):
            made = trajectory_ask(model, self._passes, target, rows, self._schedule)
        else:
            made = forward_ask(model, self._passes, target)
        return Teacher(
            model,
            made,
            precision=self._recording.precision,
            quantized=self._manifest.quantization is not None,
        )

    def pieces(self, shards: Iterable[int]) -> Iterator[Piece]:
        """Yield the answered rows of shards in order, each after the next ones were asked for."""
        if len(self._models) == 2:
            return self._two_models(shards)
        return (finish() for finish in one_behind(self._one_model(shards)))

    def _one_model(self, shards: Iterable[int]) -> Iterator[Callable[[], Piece]]:
        for work in self._open(shards):
            if isinstance(work, Piece):
                yield partial(Piece, *work)
                continue
            for rows in self._read(work):
                if not work.predicted:
                    yield partial(work.not_asked, rows)
                    continue
                flight = self._teachers[0].begin(rows.asked.to(self._device), rows.cells)
                yield partial(self._answered, work, rows, flight)

    def _answered(self, work: ShardWork, rows: HostRows, flight: InFlight) -> Piece:
        return work.answered(rows, self._teachers[0].finish(flight))

    def _two_models(self, shards: Iterable[int]) -> Iterator[Piece]:
        """Ask one model for a whole shard and then the other; the next shard begins with that.

        What the first one answers waits in float32 on the host.
        """
        turn = 0
        for work in self._open(shards):
            if isinstance(work, Piece):
                yield work
                continue
            if not work.predicted:
                yield from (work.not_asked(rows) for rows in self._read(work))
                continue
            self._to_device(turn)
            first = [answer for _, answer in self._answers(work, turn)]
            turn = 1 - turn
            self._to_device(turn)
            for (rows, answer), before in zip(self._answers(work, turn), first, strict=False):
                cond, without = (answer, before) if turn == 0 else (before, answer)
                scale = torch.from_numpy(rows.asked.scale)
                yield work.answered(rows, combined(cond, without, scale, self._target))
        self._to_device(0)

    def _answers(self, work: ShardWork, turn: int) -> Iterator[tuple[HostRows, Answer]]:
        teacher = self._teachers[turn]

        def asked() -> Iterator[tuple[HostRows, InFlight]]:
            for rows in self._read(work):
                yield rows, teacher.begin(rows.asked.to(self._device), rows.cells)

        for rows, flight in one_behind(asked()):
            yield rows, teacher.finish(flight)

    def _to_device(self, turn: int) -> None:
        with torch.inference_mode(False):
            self._models[1 - turn].module.to("cpu")
            self._models[turn].module.to(self._device)

    def _open(self, shards: Iterable[int]) -> Iterator[ShardWork | Piece]:
        """Begin shards in order, until a stop is requested; one that is committed is no work."""
        for shard in shards:
            if self.stopped:
                return
            if self._store.is_committed(shard):
                # By another worker, since the store was opened.
                yield Piece(shard, None, True)
            else:
                yield self._work(shard)

    def _read(self, work: ShardWork) -> Iterator[HostRows]:
        """Read the batches of a shard ahead, in a thread, until a stop is requested."""

        def read(position: int) -> HostRows | None:
            return work.shard.read(spans[position]) if position < len(spans) else None

        size = self._batch_size
        spans = [
            range(start, min(start + size, len(work.shard)))
            for start in range(0, len(work.shard), size)
        ]
        with closing(read_in_a_thread(read, count(), 1)) as batches:
            for _, rows in zip(spans, batches, strict=False):
                if self._stop.requested:
                    self.stopped = True
                    return
                assert rows is not None
                yield rows

    def _work(self, number: int) -> ShardWork:
        draws = [self._draws[key] for key in self._store.plan[number]]
        bucket = self._store.plan.bucket_of(number)
        assert bucket is not None
        rows, seed = self._recording.rows, self._manifest.seed
        shard: Shard
        if isinstance(rows, TrajectoryRows):
            shard = TrajectoryShard(draws, rows, self._schedule, self._guided, seed)
        else:
            shard = ForwardShard(draws, rows, self._schedule, self._guided, seed)
        predicted = self._manifest.buckets[bucket].predicted
        return ShardWork(number, shard, draws, predicted=predicted, seed=seed)


def value_of(model: Denoiser, asked: Asked) -> dict[str, Tensor]:
    """Return what one of two models predicts of rows, [b, 1, 1, *shape] float32."""
    cond, _ = ask(model, asked, "one")
    return {VALUE: cond[:, None, None]}


def combined(cond: Answer, other: Answer, scale: Tensor, target: Dense) -> Answer:
    """Return the stored parts of what two models answered; what failed in either is zeros."""
    value, without = (torch.from_numpy(x.arrays[VALUE][:, 0, 0]) for x in (cond, other))
    parts = stored_parts(value, without, scale, target)
    status = np.maximum(cond.status, other.status)
    for part in parts.values():
        # Finite in float32, and beyond what the store's type holds.
        status[~part.isfinite().flatten(1).all(1).numpy()] = FAILED
    arrays = {name: part[:, None, None].numpy() for name, part in parts.items()}
    for values in arrays.values():
        values[status == FAILED] = 0
    return Answer(arrays, status)


def one_behind(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items, each after the one behind it has been made."""
    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting
