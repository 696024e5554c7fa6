"""Laying out the store of a diffusion model before stage one writes it: plan, manifest, tables."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
from pydantic import ValidationError

from stages.diffusion.denoiser import Denoiser
from stages.diffusion.draws import DRAWN, Draw, Sample, draws_of
from stages.diffusion.facts import (
    COLUMNS,
    MATCHED,
    NOISE_COLUMN,
    STATE_COLUMN,
    ImageFacts,
    Recording,
)
from stages.diffusion.record_config import (
    AdapterContrast,
    Contrast,
    ForwardRows,
    ModelContrast,
    RecordConfig,
    TrajectoryRows,
)
from stages.diffusion.schedule import Schedule
from stages.errors import UserError
from stages.quantization import Quantized
from stages.refusals import misfit
from stages.sampling import keyed_generator
from store import PredictionStore
from store.object_url import ObjectUrl
from store.plan import Key, Plan
from store.schema import (
    Bucket,
    Column,
    Fingerprints,
    Latent,
    Manifest,
    Sampler,
    TableFacts,
)

logger = logging.getLogger(__name__)

CONDITIONS = ("text", "label", "target", "weight")
"""Columns of samples.parquet of a store, beside the id."""
SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
    ]
)
PACKAGES = ("torch", "diffusers")
"""What a teacher's arithmetic depends on."""
ELSEWHERE = Path()
"""Path of another model in a store, which is named by its fingerprint."""


class LaidOut(NamedTuple):
    """A store before it is made, but for its tables, which are the dataset's."""

    manifest: Manifest
    plan: Plan
    samples: pa.Table


class Header(Protocol):
    """What dataset.json says."""

    @property
    def fingerprint(self) -> str:
        """Hash of the dataset."""
        ...

    @property
    def tables(self) -> Mapping[str, TableFacts]:
        """Its side tables by name."""
        ...


class Images(Protocol):
    """A dataset of images, as far as a store is planned of it."""

    @property
    def path(self) -> Path:
        """Its folder."""
        ...

    @property
    def header(self) -> Header:
        """What dataset.json says."""
        ...

    @property
    def facts(self) -> ImageFacts:
        """What a model must know of it."""
        ...

    def samples(self, split: str) -> Sequence[Sample]:
        """Return the rows of a split."""
        ...


def create_record_store(path: Path | ObjectUrl, dataset: Images, laid: LaidOut) -> PredictionStore:
    """Create the store that was laid out for a dataset, or open the one that is there.

    Raises `StoreError` when `path` holds a store of other settings, another teacher or another
    dataset, naming what differs.
    """
    tables = {name: dataset.path / "tables" / name for name in dataset.header.tables}
    return PredictionStore.create(path, *laid, tables=tables)


def lay_out_records(
    config: RecordConfig,
    denoiser: Denoiser,
    dataset: Images,
    *,
    seed: int,
    other: Denoiser | None = None,
    quantized: Quantized | None = None,
) -> LaidOut:
    """Lay out the store that a configuration describes; nothing is written.

    The samples of `config.split` are planned with all variations that the dataset drew of them.
    `other` is the second model of a contrast between two; `quantized` what the teacher was before
    it was quantized, and the record of that. Raises `UserError` for an empty split, a dataset that
    does not fit the model, and settings that ask it for what it cannot give.
    """
    _check_facts(denoiser, dataset.facts, "the teacher")
    _check_second_pass(config, denoiser, dataset.facts)
    _check_contrast(config, denoiser, dataset.facts, other)
    samples = dataset.samples(config.split)[: config.samples]
    if not samples:
        raise UserError(
            f"the split {config.split!r} of the dataset {dataset.path} is empty, so there is "
            "nothing to record: choose another rollout.split, or prepare a dataset that has it"
        )
    draws = [draw for sample in samples for draw in draws_of(sample)]
    if isinstance(config.rows, TrajectoryRows):
        _check_trajectories(config.rows, denoiser, draws)
    _warn_of_untrained_branch(config, denoiser)
    buckets = _buckets(dataset.facts, draws)
    teacher = denoiser.fingerprint() if quantized is None else quantized.fingerprint
    architecture = denoiser.architecture() if quantized is None else quantized.architecture
    try:
        manifest = Manifest(
            family=denoiser.name,
            streams=(Latent(name="prediction", group="denoiser", shape=buckets[0].shape),),
            target=config.target,
            profile=config.profile,
            guidance=config.guidance,
            sampler=Sampler(),
            source="teacher",
            seed=seed,
            split=config.split,
            timestep_s=None,
            conditions=CONDITIONS,
            fingerprints=Fingerprints(
                teacher=teacher, tokenizer="", audio_codec="", dataset=dataset.header.fingerprint
            ),
            conditioning=dataset.facts.model_dump(mode="json"),
            architecture=architecture.model_dump(mode="json"),
            quantization=None if quantized is None else quantized.record,
            columns=_columns(config.rows),
            drawn=DRAWN,
            buckets=buckets,
            tables=dict(dataset.header.tables),
            recording=_recording(config, denoiser, other),
        )
    except ValidationError as error:
        raise misfit(error) from None
    plan = _plan(draws, len(dataset.facts.buckets), config.rollouts_per_shard, seed)
    return LaidOut(manifest, plan, _samples_table(samples))


def _check_facts(model: Denoiser, facts: ImageFacts, name: str) -> None:
    """Refuse a model of other latents or conditions, naming each difference."""
    differing = [
        f"{field}: {ours!r} of {name}, {theirs!r} of the dataset"
        for field in MATCHED
        for ours, theirs in [(getattr(model.facts, field), getattr(facts, field))]
        if ours != theirs
    ]
    if differing:
        raise UserError(
            f"{name} was made for other images than the dataset has ({'; '.join(differing)}): "
            "prepare the dataset with the autoencoder and the text encoders of the teacher's "
            "pipeline (prepare.encoder), or choose the teacher that belongs to the dataset"
        )


def _check_second_pass(config: RecordConfig, denoiser: Denoiser, facts: ImageFacts) -> None:
    """Refuse guidance by a second pass where there is nothing to leave out."""
    scale, both = config.guidance.scale, config.target.branches == "both"
    if config.contrast.kind != "unconditional" or not (both or scale != 1):
        return
    asked = "rollout.target.branches is 'both'" if both else f"rollout.guidance.scale is {scale}"
    remedy = "set rollout.target.branches: guided and rollout.guidance: {scale: 1}"
    if facts.unconditional == "none":
        raise UserError(
            f"{asked}, but the dataset has no row that stands for no condition, so there is no "
            f"second pass to compare with: {remedy}, or prepare a dataset with labels or captions"
        )
    if denoiser.takes_scale:
        raise UserError(
            f"{asked}, but the teacher is told its guidance as a number and has no second pass "
            f"without the condition: {remedy}, and teacher.pretrained.embedded_guidance to the "
            "number"
        )


def _check_contrast(
    config: RecordConfig, denoiser: Denoiser, facts: ImageFacts, other: Denoiser | None
) -> None:
    kind = config.contrast.kind
    if isinstance(config.rows, TrajectoryRows) and kind != "unconditional":
        raise UserError(
            f"rollout.rows.kind is 'trajectory' and rollout.contrast.kind is {kind!r}, but "
            "trajectories are solved under classifier-free guidance: set rollout.contrast.kind: "
            "unconditional, or rollout.rows.kind: forward"
        )
    if isinstance(config.contrast, AdapterContrast):
        try:
            with denoiser.adapter_off():
                pass
        except UserError as error:
            raise UserError(
                "rollout.contrast.kind is 'adapter', but the teacher has no adapter to switch off "
                f"({error}): name one (teacher.pretrained.adapter), or set rollout.contrast.kind: "
                "unconditional"
            ) from error
    if (other is not None) != isinstance(config.contrast, ModelContrast):
        raise ValueError(f"contrast {kind!r} with other={other!r}: give it exactly for 'model'")
    if other is None:
        return
    if config.quantization is not None:
        raise UserError(
            f"rollout.quantization is {config.quantization!r} and rollout.contrast.kind 'model', "
            "but only the teacher is quantized, so the stored differences would hold what that "
            "cost it: leave rollout.quantization out (the two models take turns on the device), "
            "or give the teacher its change as an adapter, with rollout.contrast.kind: adapter"
        )
    _check_facts(other, facts, "the other model of rollout.contrast")
    ours, theirs = Schedule(denoiser.schedule), Schedule(other.schedule)
    if (ours.digest(), ours.facts.prediction) != (theirs.digest(), theirs.facts.prediction):
        raise UserError(
            f"the teacher predicts {ours.facts.prediction!r} on the noise schedule "
            f"{ours.digest()[:12]}, but the other model of rollout.contrast "
            f"{theirs.facts.prediction!r} on {theirs.digest()[:12]}: the difference of their "
            "predictions says nothing; choose two models of one schedule and prediction type"
        )


def _check_trajectories(rows: TrajectoryRows, denoiser: Denoiser, draws: Sequence[Draw]) -> None:
    count = Counter(draw.target for draw in draws)["data"]
    if count:
        first = next(draw.key[0] for draw in draws if draw.target == "data")
        raise UserError(
            f"rollout.rows.kind is 'trajectory', but {count} variations, first of sample "
            f"{first!r}, have the target 'data', and a trajectory has no image of the data: set "
            "rollout.rows.kind: forward, or give these samples another target in the dataset's "
            "metadata"
        )
    Schedule(denoiser.schedule).solver_times(rows.steps)  # refuses more steps than there are


def _warn_of_untrained_branch(config: RecordConfig, denoiser: Denoiser) -> None:
    scale, both = config.guidance.scale, config.target.branches == "both"
    asked = config.contrast.kind == "unconditional" and (both or scale != 1)
    if asked and denoiser.condition_dropout == 0:
        logger.warning(
            "guidance is asked of a teacher that was trained without condition dropout: what it "
            "predicts without the condition has never been trained, so mixing with it means "
            "little. Fit the teacher with fit.condition_dropout: 0.1, or set "
            "rollout.target.branches: guided and rollout.guidance: {scale: 1}"
        )


def _columns(rows: ForwardRows | TrajectoryRows) -> tuple[Column, ...]:
    if isinstance(rows, TrajectoryRows):
        return (*COLUMNS, STATE_COLUMN)
    return (*COLUMNS, NOISE_COLUMN) if rows.store_noise else COLUMNS


def _buckets(facts: ImageFacts, draws: Sequence[Draw]) -> tuple[Bucket, ...]:
    """Return the shapes of the dataset, and once more those of which nothing is predicted."""
    buckets = [Bucket(shape=shape) for shape in facts.buckets]
    if any(draw.target == "data" for draw in draws):
        buckets += [Bucket(shape=shape, predicted=False) for shape in facts.buckets]
    return tuple(buckets)


def _recording(
    config: RecordConfig,
    denoiser: Denoiser,
    other: Denoiser | None,
) -> dict[str, object]:
    recording = Recording(
        schedule=denoiser.schedule,
        rows=config.rows,
        contrast=_without_paths(config.contrast),
        contrast_fingerprint="" if other is None else other.fingerprint(),
        embedded_guidance=denoiser.embedded_guidance,
        precision=config.precision,
        versions=_versions(),
    )
    return recording.model_dump(mode="json")


def _without_paths(contrast: Contrast) -> Contrast:
    if not isinstance(contrast, ModelContrast):
        return contrast
    bare = {"path": ELSEWHERE, "config": None, "adapter": None}
    return contrast.model_copy(update={"other": contrast.other.model_copy(update=bare)})


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _plan(draws: Sequence[Draw], shapes: int, size: int, seed: int) -> Plan:
    """Return the plan: shuffled once, so that reading in order is reading at random.

    It depends on the dataset, the seed and `rollouts_per_shard` only. Every shard is of one bucket,
    and buckets take turns at random.
    """
    shuffled = [draws[i] for i in keyed_generator(seed, "plan").permutation(len(draws))]
    by_bucket: dict[int, list[Key]] = {}
    for draw in shuffled:
        bucket = draw.bucket + shapes * (draw.target == "data")
        by_bucket.setdefault(bucket, []).append(draw.key)
    shards = [
        (bucket, keys[start : start + size])
        for bucket, keys in sorted(by_bucket.items())
        for start in range(0, len(keys), size)
    ]
    order = keyed_generator(seed, "order of shards").permutation(len(shards))
    shards = [shards[place] for place in order]
    return Plan.of([keys for _, keys in shards], buckets=[bucket for bucket, _ in shards])


def _samples_table(samples: Sequence[Sample]) -> pa.Table:
    rows = [{name: sample[name] for name in SAMPLES_SCHEMA.names} for sample in samples]
    return pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA)
