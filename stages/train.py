"""Stage two: a student learns from a store; no teacher is ever loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.config import TrainConfig
from stages.data import StoreBatches
from stages.distributed import Place
from stages.errors import UserError
from stages.family import Family, has_linear_heads
from stages.host_batches import HostBatch, of_groups
from stages.interruption import StopRequest
from stages.loss_config import LossConfig
from stages.losses import distillation_loss, stream_weights
from stages.optimization import Objective, attach, optimize
from stages.sharded import is_sharded
from stages.support import require_supported
from stages.targets import Forbidden
from store import PredictionStore
from store.schema import Latent, Manifest, Stream

LOCAL = "local"
"""The group of streams of a local transformer."""


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
    require_supported(
        config.loss,
        of_groups(store.manifest, _groups(family)),
        whole=family.predicted is None,
    )
    stream_weights(loss.codebook_weights, family)
    require_complete(store)
    require_weight(store)
    networks = Networks(family, config, place)
    with closing(TargetLearner(family, store, config, seed, place)) as learner:
        finished = optimize(
            family.module,
            family.module,
            learner,
            config.optimizer,
            folder,
            seed=seed,
            identity=identity,
            place=place,
            stop=stop,
            prepare=networks.at,
            store=store.fingerprint,
        )
    if finished and place.leads:
        family.save(folder)
    return finished


def require_match(family: Family, manifest: Manifest) -> None:
    """Refuse a student that the store's predictions cannot teach.

    Groups of streams that only the store has, such as a local transformer's, are not read.
    """
    common = of_groups(manifest, _groups(family))
    if common.streams and _streams(common.streams) == _streams(family.streams):
        manifest = common
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
                "transformer and alphabet (a language model: its tokenizer, prompts, layout and "
                "vocabulary), or roll out with a teacher that has the student's"
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


def require_same_dataset(store: PredictionStore, ours: str) -> None:
    """Refuse a store of another dataset than the run's, of which the fingerprint is given."""
    stored = store.manifest.fingerprints.dataset
    if ours != stored:
        raise UserError(
            f"the store {store.path} was made from the dataset {stored}, but the dataset of this "
            f"run is {ours}: roll out this dataset, or name the store's"
        )


def require_weight(store: PredictionStore) -> None:
    """Refuse a store all of whose rollouts weigh nothing."""
    tables = (store.rollout_table(shard) for shard in store.committed)
    if any(table.weights.any() for table in tables):
        return
    first = store.committed[0]
    sample_id, variation = store.plan[first][0]
    raise UserError(
        f"{store.path} has nothing to learn from, for all of its rollouts weigh 0: the first, "
        f"{sample_id!r} variation {variation}, ended by "
        f"{store.rollout_table(first).stop_reasons[0]!r}; roll out again with weights above 0 in "
        "rollout.sampler, or with a teacher that comes to an end"
    )


def ramp(step: int, start: int, steps: int) -> float:
    """Return how far a weight has grown at a step: 0 at `start`, 1 from `start + steps` on."""
    if step < start:
        return 0.0
    return min((step - start) / steps, 1.0) if steps else 1.0


class Networks:
    """What a student's `score` calls: built anew when its local transformer begins to learn.

    Until then no gradient reaches the local transformer, and the optimizer leaves it as it is.
    Data parallel training would wait for these gradients, unless it was built without them; where
    weights are shared out it waits for no gradient, and is built once.
    """

    def __init__(self, family: Family, config: TrainConfig, place: Place) -> None:
        self._family, self._config, self._place = family, config, place
        self._learned: bool | None = None
        if config.optimizer.parallel == "fsdp":
            attach(family, config.optimizer, place)

    def at(self, step: int) -> nn.Module:
        """Return the network of an optimizer step; steps must rise."""
        learned = learns_local(self._family, self._config.loss.terms_config, step)
        if learned != self._learned and not is_sharded(self._family.module):
            if LOCAL in _groups(self._family):
                for parameter in self._family.local_parameters():
                    parameter.requires_grad_(learned)
            attach(self._family, self._config.optimizer, self._place)
            self._learned = learned
        return self._family.network


def learns_local(family: Family, loss: LossConfig, step: int) -> bool:
    """Whether all streams of a student are taught, or not yet those of its local transformer."""
    return LOCAL not in _groups(family) or step >= loss.local_start_step


def _groups(family: Family) -> dict[str, int]:
    """Streams of each group, in order."""
    streams: Sequence[Stream | Latent] = family.streams
    return {name: len(list(s)) for name, s in groupby(stream.group for stream in streams)}


class _Taught:
    """What a loss knows of the streams of some groups of a student."""

    def __init__(self, family: Family, manifest: Manifest, groups: Collection[str], place: Place):
        sizes = _groups(family)
        self.groups = [name for name in sizes if name in groups]
        self.sizes = tuple(sizes[name] for name in self.groups)
        self.forbidden = Forbidden.of(of_groups(manifest, self.groups), place.device)
        streams: Sequence[Stream | Latent] = family.streams
        kept = [i for i, stream in enumerate(streams) if stream.group in groups]
        self.places = torch.tensor(kept, device=place.device)


class TargetLearner:
    """The distillation loss over stored targets, of which the student's streams are read."""

    def __init__(
        self, family: Family, store: PredictionStore, config: TrainConfig, seed: int, place: Place
    ) -> None:
        self._family, self._loss = family, config.loss.terms_config
        self._log_names = config.loss.log_names
        self._device, groups = place.device, _groups(family)
        self._all = _Taught(family, store.manifest, groups, place)
        early = groups.keys() - {LOCAL}
        self._early = _Taught(family, store.manifest, early, place)
        self._batches = StoreBatches(store, config, seed, place, groups, family.predicted)

    def batches(self, position: int) -> Sequence[HostBatch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""
        return self._batches.batches(position)

    def close(self) -> None:
        """End what reads batches ahead."""
        self._batches.close()

    def objective(self, step: int, host_batch: HostBatch) -> Objective:
        """Return the weighted loss terms of a micro-batch and the model's own losses."""
        loss, whole = self._loss, learns_local(self._family, self._loss, step)
        taught = self._all if whole else self._early
        batch = self._batches.restored(host_batch, taught.groups)
        scores = self._family.score(
            batch.samples, batch.codes, batch.lengths, linear=has_linear_heads(self._family),
            local=whole,
        )  # fmt: skip
        weights = batch.element_weights * self._stream_weights(step)[taught.places]
        total, terms = distillation_loss(
            scores.outputs, batch.target, batch.codes, weights, taught.forbidden, loss,
            groups=taught.sizes,
        )  # fmt: skip
        terms = {self._log_names.get(name, name): term for name, term in terms.items()}
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
