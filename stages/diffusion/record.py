"""Stage one of diffusion: a denoiser is asked on noised images, and its answers are stored.

Only the denoiser is in memory. Each shard of the plan is asked for and committed by itself; noise
and times depend on (seed, sample_id, variations, slot) alone and batches on the plan alone, so an
interrupted run that any number of workers resume ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import NamedTuple, Protocol, TypeVar

import google_crc32c
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
from stages.diffusion.asked_rows import ConditionRows, GuidedRows
from stages.diffusion.config import RecordConfig, TrajectoryRows
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.draws import Draw, Sample, draws_by_key
from stages.diffusion.facts import FAILED, NOT_ASKED, Recording
from stages.diffusion.forward_rows import ForwardShard, HostRows, checksums, forward_ask
from stages.diffusion.parts import Asked, ask, passes_of, stored_parts
from stages.diffusion.schedule import Schedule
from stages.diffusion.trajectories import (
    STATES,
    TrajectoryShard,
    ended,
    trajectory_ask,
)
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.loader import read_in_a_thread
from stages.rollout import NOT_FINITE_SHARE, NotFinite
from stages.sampling import keyed_seed
from store import PredictionStore
from store.encoding import COLUMN, Array
from store.schema import Dense, Manifest

Item = TypeVar("Item")
Shard = ForwardShard | TrajectoryShard

VALUE = "value"
"""Array of one model's predictions, where two models take turns."""


@torch.inference_mode()
def record(
    denoiser: Denoiser,
    store: PredictionStore,
    dataset: Samples,
    shards: Sequence[int],
    config: RecordConfig,
    *,
    stop: StopRequest,
    other: Denoiser | None = None,
) -> bool:
    """Write the given shards of a store; return False when `stop` was requested first.

    `dataset` is the one that the store was planned of. What is asked and kept follows from the
    manifest; of `config` counts only how many rows make a forward pass, which may move the last
    bits. `other` is the second model of a contrast between two, of which only the one that is asked
    is on the device. A shard is encoded and committed in a thread of its own while the next one is
    asked for; one that was asked for whole is committed. A shard that another worker commits first
    is left to it. Rows whose prediction is not finite are asked for again in float32, and else
    stored as failed. Raises NotFinite where a shard has too many of them, and what the store
    raises.
    """
    recorder = _Recorder(denoiser, other, store, dataset, config.batch_size, stop)
    rollouts = sum(len(store.plan[shard]) for shard in shards)
    with (
        tqdm(total=rollouts, unit="rollout", desc="record", disable=None) as bar,
        BackgroundWriter(store) as writer,
    ):
        for piece in recorder.pieces(shards):
            if piece.collect is not None:
                writer.append(piece.shard, piece.collect)
            if piece.last:
                bar.update(len(store.plan[piece.shard]))
                if piece.collect is not None:
                    writer.commit(piece.shard)
    return not recorder.stopped


class Samples(Protocol):
    """A dataset of images, of which only its samples are read here."""

    def samples(self, split: str) -> Sequence[Sample]:
        """Return the rows of a split."""
        ...


class _Piece(NamedTuple):
    """Some rows of a shard, answered, for the thread of the writer."""

    shard: int
    collect: Callable[[], list[Drawn]] | None
    """What makes rollouts of them; None where another worker has committed the shard."""
    last: bool
    """Whether the shard has no others."""


@dataclass
class _Rollouts:
    """Rows of a shard, in order, cut into its rollouts; in the thread of the writer."""

    manifest: Manifest
    draws: Sequence[Draw]
    rows: int
    """Rows of each rollout."""
    rest: dict[str, Array] = field(default_factory=dict)
    """Rows of a rollout of which others are still to come."""
    done: int = 0

    def add(self, arrays: Mapping[str, Array]) -> list[Drawn]:
        """Take rows of all arrays of the store, and return the rollouts that they complete."""
        if self.rest:
            arrays = {n: np.concatenate([self.rest[n], values]) for n, values in arrays.items()}
        whole = len(arrays[f"{COLUMN}status"]) // self.rows
        starts = range(0, whole * self.rows, self.rows)
        rollouts = [
            self._drawn(
                draw, {n: values[start : start + self.rows] for n, values in arrays.items()}
            )
            for draw, start in zip(self.draws[self.done :], starts, strict=False)
        ]
        self.rest = {n: values[whole * self.rows :] for n, values in arrays.items()}
        self.done += whole
        return rollouts

    def _drawn(self, draw: Draw, arrays: dict[str, Array]) -> Drawn:
        seed = keyed_seed(self.manifest.seed, *draw.key)
        # The weight of the sample is that of all its rollouts, and stands in samples.parquet.
        return Drawn(draw.key, arrays, "end", 1.0, seed, draw.drawn)


class _Recorder:
    """Asks for the rows of shards, batch by batch."""

    def __init__(
        self,
        denoiser: Denoiser,
        other: Denoiser | None,
        store: PredictionStore,
        dataset: Samples,
        batch_size: int,
        stop: StopRequest,
    ) -> None:
        self._store, self._manifest = store, store.manifest
        self._recording = recording = Recording.of(store.manifest.recording)
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
                f"the store {store.path} has the contrast {recording.contrast.kind!r}, but "
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
            made = partial(_value, model)
        elif isinstance(rows, TrajectoryRows):
            made = trajectory_ask(model, self._passes, target, rows, self._schedule)
        else:
            made = forward_ask(model, self._passes, target)
        quantization = self._manifest.quantization
        return Teacher(
            model,
            made,
            precision=self._recording.precision,
            quantized=quantization is not None and quantization.method != "none",
        )

    def pieces(self, shards: Sequence[int]) -> Iterator[_Piece]:
        """Yield the answered rows of shards in order, each after the next ones were asked for."""
        if len(self._models) == 2:
            return self._two_models(shards)
        return (finish() for finish in one_behind(self._one_model(shards)))

    def _one_model(self, shards: Sequence[int]) -> Iterator[Callable[[], _Piece]]:
        for work in self._open(shards):
            if isinstance(work, _Piece):
                yield partial(_Piece, *work)
                continue
            for rows in self._read(work):
                if not work.predicted:
                    yield partial(work.not_asked, rows)
                    continue
                flight = self._teachers[0].begin(rows.asked.to(self._device), rows.cells)
                yield partial(self._answered, work, rows, flight)

    def _answered(self, work: _Work, rows: HostRows, flight: InFlight) -> _Piece:
        return work.answered(rows, self._teachers[0].finish(flight))

    def _two_models(self, shards: Sequence[int]) -> Iterator[_Piece]:
        """Ask one model for a whole shard and then the other; the next shard begins with that.

        What the first one answers waits in float32 on the host.
        """
        turn = 0
        for work in self._open(shards):
            if isinstance(work, _Piece):
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

    def _answers(self, work: _Work, turn: int) -> Iterator[tuple[HostRows, Answer]]:
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

    def _open(self, shards: Sequence[int]) -> Iterator[_Work | _Piece]:
        """Begin shards in order, until a stop is requested; one that is committed is no work."""
        for shard in shards:
            if self.stopped:
                return
            if self._store.is_committed(shard):
                # By another worker, since the store was opened.
                yield _Piece(shard, None, True)
            else:
                yield self._work(shard)

    def _read(self, work: _Work) -> Iterator[HostRows]:
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

    def _work(self, number: int) -> _Work:
        draws = [self._draws[key] for key in self._store.plan[number]]
        bucket = self._store.plan.bucket_of(number)
        assert bucket is not None
        rows, seed = self._recording.rows, self._manifest.seed
        shard: Shard
        if isinstance(rows, TrajectoryRows):
            shard = TrajectoryShard(draws, rows, self._schedule, self._guided, seed)
        else:
            shard = ForwardShard(draws, rows, self._schedule, self._guided, seed)
        return _Work(
            number=number,
            shard=shard,
            predicted=self._manifest.buckets[bucket].predicted,
            rollouts=_Rollouts(self._manifest, draws, shard.each),
            left=len(draws) * shard.each,
        )


@dataclass
class _Work:
    """A shard that is being asked for."""

    number: int
    shard: Shard
    predicted: bool
    rollouts: _Rollouts
    left: int
    """Rows of the store that are still to come."""
    failed: int = 0

    def answered(self, rows: HostRows, answer: Answer) -> _Piece:
        """Return rows with what was predicted of them; raises NotFinite where too many failed."""
        self.failed += int((answer.status == FAILED).sum())
        refuse_failed(self.failed, len(self.rollouts.draws) * self.rollouts.rows)
        status = answer.status
        if isinstance(self.shard, TrajectoryShard):
            status = ended(answer)
        return self._piece(rows.columns | answer.arrays, status)

    def not_asked(self, rows: HostRows) -> _Piece:
        """Return rows of samples that are their own target."""
        count = next(iter(rows.columns.values())).shape[:2]
        return self._piece(rows.columns, np.full(count, NOT_ASKED, np.uint8))

    def _piece(self, arrays: Mapping[str, Array], status: Array) -> _Piece:
        self.left -= status.size
        collect = partial(_collect, self.rollouts, arrays, status)
        return _Piece(self.number, collect, not self.left)


def _collect(rollouts: _Rollouts, arrays: Mapping[str, Array], status: Array) -> list[Drawn]:
    """Add what follows from the arrays [b, r, ...] of a batch, and cut it into rollouts."""
    flat = {name: values.reshape(-1, *values.shape[2:]) for name, values in arrays.items()}
    flat[f"{COLUMN}status"] = status.reshape(-1)
    flat[f"{COLUMN}target_crc"] = target_sums(flat)
    if STATES in flat:
        states = flat[STATES][:, 0].astype(np.float32)
        flat |= {f"{COLUMN}{name}": values for name, values in checksums(states).items()}
    return rollouts.add(flat)


def target_sums(arrays: Mapping[str, Array]) -> Array:
    """Return the crc32c [n] uint32 of the stored bytes of every row's `dense.*`, in their order."""
    names = sorted(name for name in arrays if name.startswith("dense."))
    sums = np.zeros(len(arrays[f"{COLUMN}status"]), np.uint32)
    for row in range(len(sums)):
        crc = 0
        for name in names:
            crc = google_crc32c.extend(crc, arrays[name][row].tobytes())
        sums[row] = crc
    return sums


def refuse_failed(failed: int, planned: int) -> None:
    """Raise NotFinite when too many of a shard's `planned` rows have failed."""
    if failed == planned or failed > max(1, NOT_FINITE_SHARE * planned):
        raise NotFinite(
            f"{failed} of the {planned} rows of a shard have a prediction that is NaN or infinite, "
            f"and at most {NOT_FINITE_SHARE:.0%} may; nothing of this shard was stored. Check the "
            "model's weights, set rollout.precision: bf16 or fp32, or, where numbers are beyond "
            "65504, rollout.target.dtype: float32"
        )


def _value(model: Denoiser, asked: Asked) -> dict[str, Tensor]:
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
