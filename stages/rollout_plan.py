"""Laying out a store before stage one writes it: the plan, the manifest, the conditions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pydantic import JsonValue, ValidationError

from stages.architecture import Architecture
from stages.causal_lm_config import CausalLMSettings
from stages.config import DatasetFacts, RolloutConfig
from stages.errors import UserError
from stages.family import Family, Sample
from stages.quantization import Quantized
from stages.refusals import misfit, part
from stages.replay import Replay
from stages.sampling import keyed_generator
from stages.stored_frames import LAYOUT
from store import PredictionStore
from store.object_url import ObjectUrl
from store.plan import Plan
from store.rejected import Rejected
from store.schema import Fingerprints, Hidden, Manifest, Quantization, Target, TopK

logger = logging.getLogger(__name__)

Key = tuple[str, int]


class LaidOut(NamedTuple):
    """A store before it is made, but for its heads."""

    manifest: Manifest
    plan: Plan
    samples: pa.Table
    rejected: Rejected


def create_store(path: Path | ObjectUrl, family: Family, laid: LaidOut) -> PredictionStore:
    """Create the store that was laid out for a teacher, or open the one that is there.

    Raises `StoreError` when `path` holds a store of other settings, another teacher or another
    dataset, naming what differs.
    """
    heads = family.head_weights() if isinstance(laid.manifest.target, Hidden) else None
    return PredictionStore.create(
        path, laid.manifest, laid.plan, laid.samples, heads=heads, rejected=laid.rejected
    )


def lay_out(
    config: RolloutConfig,
    family: Family,
    samples: Sequence[Sample],
    *,
    facts: DatasetFacts,
    dataset_fingerprint: str,
    seed: int,
    student_fingerprint: str = "",
    replay: Replay | None = None,
    refused: Rejected = (),
    quantized: Quantized | None = None,
    quantization: Quantization | None = None,
) -> LaidOut:
    """Lay out the store that a rollout configuration describes; nothing is written.

    `samples` are the rows of the split to roll out; those that the family refuses are left out of
    the plan and named in the store with their reasons, and so are those that `refused` names. With
    `replay` the keys, seed and sampler are those of its store, whatever `config` says. Raises
    `UserError` for a teacher of another audio codec or without linear heads for a `hidden` target,
    settings with which no sample can be drawn, too small a `k`, an empty split, and one of which
    no sample is left.
    `student_fingerprint` names the student that drew the codes, where the source is one;
    `quantized` is what the teacher was before it was quantized, and `quantization` the record of
    its precision.
    """
    if replay is not None:
        config, seed = replay.settings(config), replay.manifest.seed
        student_fingerprint = replay.manifest.fingerprints.student
    _warn_of_untrained_branch(config, family)
    if family.facts.audio_codec != facts.audio_codec:
        raise UserError(
            f"the teacher speaks the codes of audio codec {family.facts.audio_codec!r}, but those "
            f"of the dataset are of audio codec {facts.audio_codec!r}: prepare the dataset with "
            "the teacher's audio codec (audio_codec: {kind: load}), or fit a teacher on it"
        )
    _check_kept(config.target, family.end_id)
    _check_heads(config.target, family)
    keys = planned_keys(config, samples) if replay is None else list(replay)
    chosen = _of_keys(keys, samples)
    if not chosen:
        raise UserError(
            f"the split {config.split!r} of the dataset is empty, so there is nothing to roll "
            "out: choose another rollout.split, or prepare a dataset that has it"
        )
    chosen, rejected = part(family, chosen, config, replay=replay, refused=refused)
    left_out = {sample_id for sample_id, _ in rejected}
    keys = [key for key in keys if key[0] not in left_out]
    fingerprints = Fingerprints(
        teacher=family.fingerprint() if quantized is None else quantized.fingerprint,
        tokenizer=family.tokenizer_fingerprint(),
        audio_codec=facts.audio_codec,
        dataset=dataset_fingerprint,
        student=student_fingerprint,
        codes="" if replay is None else replay.fingerprint,
    )
    try:
        architecture = family.architecture() if quantized is None else quantized.architecture
        manifest = _manifest(config, family, facts, fingerprints, seed, architecture, quantization)
    except ValidationError as error:
        raise misfit(error) from None
    return LaidOut(
        manifest,
        Plan.of(_shards(keys, family, chosen, seed, config.rollouts_per_shard)),
        conditions_table(family, chosen),
        rejected,
    )


def _warn_of_untrained_branch(config: RolloutConfig, family: Family) -> None:
    both = getattr(config.target, "branches", "guided") == "both"
    if family.condition_dropout > 0 or (config.guidance.scale == 1 and not both):
        return
    asked = "target.branches: both" if both else f"guidance of scale {config.guidance.scale}"
    logger.warning(
        "%s is asked of a teacher that was trained without condition dropout: its unconditional "
        "branch has never been trained, so mixing with it means little. Fit the teacher with "
        "fit.condition_dropout: 0.1, or set %s",
        asked,
        "rollout.target.branches: guided" if both else "rollout.guidance.scale: 1",
    )


def _check_heads(target: Target, family: Family) -> None:
    without = {stream.group for stream in family.streams} - {head.group for head in family.heads}
    if isinstance(target, Hidden) and without:
        raise UserError(
            f"rollout.target.kind is 'hidden', but family {family.name!r} has no linear head for "
            f"the streams of {sorted(without)}, so its states say nothing without the rest of the "
            "model: use 'top_k', or 'full'"
        )


def _check_kept(target: Target, end_id: int | None) -> None:
    least = 2 if end_id is None else 3
    if isinstance(target, TopK) and target.k < least:
        raise UserError(
            f"rollout.target.k is {target.k}, but at least {least} ids are always kept (the "
            f"likeliest, the drawn code{'' if end_id is None else ' and the end id'}): raise it"
        )


def _manifest(
    config: RolloutConfig,
    family: Family,
    facts: DatasetFacts,
    fingerprints: Fingerprints,
    seed: int,
    architecture: Architecture,
    quantization: Quantization | None,
) -> Manifest:
    return Manifest(
        family=family.name,
        streams=family.streams,
        forbidden=family.forbidden,
        end_id=family.end_id,
        target=config.target,
        heads=family.heads if isinstance(config.target, Hidden) else (),
        profile=config.profile,
        guidance=config.guidance,
        sampler=config.sampler,
        source=config.source,
        seed=seed,
        split=config.split,
        timestep_s=family.timestep_s,
        conditions=family.conditions,
        fingerprints=fingerprints,
        conditioning=facts.model_dump(mode="json"),
        architecture=architecture.model_dump(mode="json"),
        quantization=quantization,
        recording=_recording(family),
    )


def _recording(family: Family) -> dict[str, JsonValue]:
    """Which ids of a whole vocabulary are audio: without a model nobody could tell from codes."""
    config = family.config
    if isinstance(config, CausalLMSettings) and config.vocabulary == "full":
        return {LAYOUT: config.layout.model_dump(mode="json")}
    return {}


def plan(
    config: RolloutConfig, family: Family, samples: Sequence[Sample], seed: int
) -> list[list[Key]]:
    """Return the keys of every shard: drawn at random, then by rising length within a shard.

    The plan depends on the dataset, the seed and `rollouts_per_shard` only, so any number of
    workers may work it off. Batches are cut from neighbours, whose lengths are alike.
    """
    keys = planned_keys(config, samples)
    return _shards(keys, family, _of_keys(keys, samples), seed, config.rollouts_per_shard)


def planned_keys(config: RolloutConfig, samples: Sequence[Sample]) -> list[Key]:
    """Return the keys that a configuration asks for, in no order that matters."""
    chosen = [sample["sample_id"] for sample in samples[: config.samples]]
    variations = range(config.first_variation, config.first_variation + config.variations)
    return [(sample_id, variation) for sample_id in chosen for variation in variations]


def _of_keys(keys: Sequence[Key], samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples that any of `keys` names, in the dataset's order."""
    named = {sample_id for sample_id, _ in keys}
    return [sample for sample in samples if sample["sample_id"] in named]


def _shards(
    keys: Sequence[Key], family: Family, samples: Sequence[Sample], seed: int, size: int
) -> list[list[Key]]:
    timesteps = {sample["sample_id"]: family.timesteps(sample) for sample in samples}
    place = {sample_id: number for number, sample_id in enumerate(timesteps)}
    ordered = sorted(keys, key=lambda key: (key[1], place[key[0]]))
    shuffled = [ordered[i] for i in keyed_generator(seed, "plan").permutation(len(ordered))]
    shards = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    return [sorted(shard, key=lambda key: (timesteps[key[0]], key)) for shard in shards]


def conditions_table(family: Family, samples: Sequence[Sample]) -> pa.Table:
    """Return what a student needs of every sample: its id and the family's conditions."""
    columns = ("sample_id", *family.conditions)
    return pa.Table.from_pylist([{name: sample[name] for name in columns} for sample in samples])
