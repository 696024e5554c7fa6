"""Stage two: a student learns from a store; no teacher is ever loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path

from torch import Tensor

from stages.config import TrainConfig
from stages.data import HostBatch, StoreBatches
from stages.distributed import Place
from stages.errors import UserError
from stages.family import Family, has_linear_heads
from stages.interruption import StopRequest
from stages.losses import distillation_loss, stream_weights
from stages.optimization import Objective, attach, optimize
from stages.support import require_supported
from stages.targets import Forbidden
from store import PredictionStore
from store.schema import Latent, Manifest, Stream


def train(
    family: Family,
    store: PredictionStore,
    config: TrainConfig,
    folder: Path,
    *,
    seed: int,
    identity: str,
    place: Place,
    stop: StopRequest,
) -> bool:
    """Train a student on every rollout of a store and save it into `folder`.

    Vocabulary, forbidden ids, guidance and temperatures come from the store's manifest; a student
    that does not match it is refused with `UserError`. Resumes from the newest checkpoint.
    Returns False when `stop` was requested first.
    """
    loss = config.loss.terms_config
    require_match(family, store.manifest)
    require_supported(loss, store.manifest)
    stream_weights(loss.codebook_weights, family)
    require_complete(store)
    with closing(TargetLearner(family, store, config, seed, place)) as learner:
        network = attach(family, config.optimizer, place)
        finished = optimize(
            family.module,
            network,
            learner,
            config.optimizer,
            folder,
            seed=seed,
            identity=identity,
            place=place,
            stop=stop,
        )
    if finished and place.leads:
        family.save(folder)
    return finished


def require_match(family: Family, manifest: Manifest) -> None:
    """Refuse a student that the store's predictions cannot teach."""
    differences = {
        "streams": (_streams(family.streams), _streams(manifest.streams)),
        "forbidden ids": (family.forbidden, manifest.forbidden),
        "end id": (family.end_id, manifest.end_id),
        "tokenizer": (family.tokenizer_fingerprint(), manifest.fingerprints.tokenizer),
        "audio codec": (family.facts.audio_codec, manifest.fingerprints.audio_codec),
    }
    for what, (student, stored) in differences.items():
        if student != stored:
            raise UserError(
                f"the student's {what} ({student}) differ from the store's ({stored}, in "
                "manifest.json): give the student the teacher's codebooks, frame stacking, local "
                "transformer and alphabet, or roll out with a teacher that has the student's"
            )


def _streams(streams: Sequence[Stream | Latent]) -> str:
    """Name and size of every stream: its number of ids, or the shape of its predictions."""
    sizes = [str(s.vocabulary) if isinstance(s, Stream) else f"{s.shape}" for s in streams]
    return ", ".join(f"{s.name}:{size}" for s, size in zip(streams, sizes, strict=True))


def require_complete(store: PredictionStore) -> None:
    """Refuse a store whose plan is not fully committed."""
    missing = store.missing()
    if missing:
        raise UserError(
            f"{store.path} lacks {len(missing)} of {store.planned_shards} shards (first: "
            f"{missing[0]:05d}), so stage one is not finished: run `foretell rollout` with the "
            "same configuration, then train again"
        )


def ramp(step: int, start: int, steps: int) -> float:
    """Return how far a weight has grown at a step: 0 at `start`, 1 from `start + steps` on."""
    if step < start:
        return 0.0
    return min((step - start) / steps, 1.0) if steps else 1.0


class TargetLearner:
    """The distillation loss over stored targets."""

    def __init__(
        self, family: Family, store: PredictionStore, config: TrainConfig, seed: int, place: Place
    ) -> None:
        self._family, self._loss = family, config.loss.terms_config
        self._forbidden = Forbidden.of(store.manifest, place.device)
        self._device = place.device
        groups = groupby(stream.group for stream in family.streams)
        self._groups = tuple(len(list(streams)) for _, streams in groups)
        self._batches = StoreBatches(store, config, seed, place)

    def batches(self, position: int) -> Sequence[HostBatch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""
        return self._batches.batches(position)

    def close(self) -> None:
        """End what reads batches ahead."""
        self._batches.close()

    def objective(self, step: int, host_batch: HostBatch) -> Objective:
        """Return the weighted loss terms of a micro-batch and the model's own losses."""
        batch = self._batches.restored(host_batch)
        scores = self._family.score(
            batch.samples, batch.codes, batch.lengths, linear=has_linear_heads(self._family)
        )
        weights = batch.element_weights * self._stream_weights(step)
        loss = self._loss
        total, terms = distillation_loss(
            scores.outputs, batch.target, batch.codes, weights, self._forbidden, loss,
            groups=self._groups,
        )  # fmt: skip
        for name, auxiliary in scores.losses.items():
            terms[name] = auxiliary * batch.weight
            total = total + loss.auxiliary * terms[name]
        terms |= {name: metric * batch.weight for name, metric in scores.metrics.items()}
        return Objective(total, terms)

    def _stream_weights(self, step: int) -> Tensor:
        """[C]: the local transformer's streams start late and ramp up to their share."""
        loss = self._loss
        share = loss.local_share * ramp(step, loss.local_start_step, loss.local_ramp_steps)
        return stream_weights(loss.codebook_weights, self._family, share).to(self._device)

    def validate(self) -> Mapping[str, float]:
        """Report nothing: what a student is worth is measured by `evaluate`, on held-out data."""
        return {}
