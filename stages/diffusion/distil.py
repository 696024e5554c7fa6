"""Stage two of diffusion: a student learns from stored predictions; no teacher is ever loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from stages.diffusion.conversion import Conversion
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.facts import Recording
from stages.diffusion.losses import row_losses, weighting
from stages.diffusion.matching import (
    require_loss,
    require_match,
    require_rows,
    require_targets,
)
from stages.diffusion.row_targets import Question, RowTargets, TaughtRows, transfers
from stages.diffusion.rows import Reading, RowBatch, StoreRows
from stages.diffusion.train_config import DiffusionLossConfig, DistilConfig
from stages.distributed import Place
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.optimization import Objective, attach, optimize
from stages.train import require_complete
from store import PredictionStore


class Previews(Protocol):
    """What draws images of a student while it learns."""

    def draw(self, denoiser: Denoiser, step: int) -> None:
        """Draw images after so many optimizer steps, where some are due."""


def distil(
    denoiser: Denoiser,
    store: PredictionStore,
    config: DistilConfig,
    folder: Path,
    *,
    seed: int,
    identity: str,
    place: Place,
    stop: StopRequest,
    previews: Previews | None = None,
) -> bool:
    """Train a student on every row of a store and save it into `folder`.

    Targets come from the store alone, or from the student without its adapter where the store holds
    differences to another model. A student of another schedule or prediction type learns in its
    own; one that does not match the store is refused with `UserError`. Resumes from the newest
    checkpoint. Returns False when `stop` was requested first.
    """
    recording = Recording.of(store.manifest)
    conversion = Conversion(recording.schedule, denoiser.schedule)
    require_match(denoiser, store)
    require_loss(denoiser, store, recording, config.loss)
    require_complete(store)
    require_rows(store, recording)
    require_targets(store, recording)
    if config.loss.teaches == "prediction":
        conversion.require(config.loss.largest_factor)
    if config.optimizer.parallel == "fsdp":
        _require_shareable(store, recording, config)
    network = attach(denoiser, config.optimizer, place)

    def prepare(step: int) -> nn.Module:
        # Before the random state of the step is set, which drawing therefore cannot touch.
        if previews is not None and place.leads:
            draw_alone(previews, denoiser, step)
        return network

    with closing(RowLearner(denoiser, store, recording, config, seed, place)) as learner:
        finished = optimize(
            denoiser.module,
            network,
            learner,
            config.optimizer,
            folder,
            seed=seed,
            identity=identity,
            place=place,
            stop=stop,
            prepare=prepare,
            store=store.fingerprint,
        )
    if finished and place.leads:
        denoiser.save(folder)
        if previews is not None:
            draw_alone(previews, denoiser, config.optimizer.steps)
    return finished


def _require_shareable(store: PredictionStore, recording: Recording, config: DistilConfig) -> None:
    """Refuse what one process does without the others, which hold a share of its weights."""
    alone = {
        "previews, which one process draws": config.previews is not None,
        "a loss that asks the student without its adapter for some batches": transfers(
            store.manifest, recording, config.loss
        ),
    }
    for what, asked in alone.items():
        if asked:
            raise UserError(
                f"optimizer.parallel is fsdp, where no process can do a pass alone, with {what}: "
                "set optimizer.parallel: ddp, or leave that out"
            )


def draw_alone(previews: Previews, denoiser: Denoiser, step: int) -> None:
    """Draw with the bare network, which waits for no other process, and leave it as it was."""
    network, training = denoiser.network, denoiser.module.training
    denoiser.network = denoiser.module
    denoiser.module.eval()
    try:
        with torch.no_grad():
            previews.draw(denoiser, step)
    finally:
        denoiser.module.train(training)
        denoiser.network = network


class RowLearner:
    """The loss over stored targets: one value per row, weighed once."""

    def __init__(
        self,
        denoiser: Denoiser,
        store: PredictionStore,
        recording: Recording,
        config: DistilConfig,
        seed: int,
        place: Place,
    ) -> None:
        self._denoiser, self._loss = denoiser, config.loss
        conversion = Conversion(recording.schedule, denoiser.schedule)
        reading = Reading.of(recording, conversion, config, seed)
        self._rows = StoreRows(store, config, reading, seed, place)
        self._targets = RowTargets(
            store.manifest,
            recording,
            conversion,
            config.loss,
            takes_scale=denoiser.takes_scale,
            seed=seed,
            device=place.device,
        )

    def batches(self, position: int) -> Sequence[RowBatch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""
        return self._rows.batches(position)

    def close(self) -> None:
        """End what reads batches ahead."""
        self._rows.close()

    def objective(self, step: int, batch: RowBatch) -> Objective:
        """Return the weighted loss of a micro-batch; the log shows the error and shares of rows."""
        rows = self._targets.of(batch, self._base)
        prediction = _asked(self._denoiser, rows.question)
        losses = row_losses(prediction, rows.target, self._loss, rows.mask)
        total = (row_weights(rows, self._denoiser, self._loss) * losses).sum()
        error = torch.where(rows.weights > 0, losses, 0.0).sum()
        shares = {f"{name}_share": torch.tensor(n) for name, n in batch.counts.items()}
        return Objective(total, {str(self._loss.error): error, **shares})

    def _base(self, question: Question) -> Tensor:
        with torch.no_grad(), self._denoiser.adapter_off():
            return _asked(self._denoiser, question)

    def validate(self) -> Mapping[str, float]:
        """Report nothing: what a student is worth is measured by `evaluate`, on held-out noise."""
        return {}


def row_weights(rows: TaughtRows, denoiser: Denoiser, loss: DiffusionLossConfig) -> Tensor:
    """Return the weight [b] float32 of each row: its sample's times that of its noise level."""
    kind = denoiser.schedule.prediction
    return rows.weights * weighting(
        rows.alpha, rows.sigma, kind, loss.weighting, loss.weighting_number
    )


def _asked(denoiser: Denoiser, question: Question) -> Tensor:
    return denoiser.predict(question.x, question.t, question.conditions, question.scale)
