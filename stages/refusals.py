"""Which samples stage one leaves out: those that a model would fail on, each with its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from pydantic import ValidationError
from tqdm import tqdm

from stages.config import RolloutConfig
from stages.errors import Refused, UserError
from stages.family import Family, Sample
from stages.rejections import rejection_table
from stages.replay import Replay
from stages.sample_checks import require_taught
from stages.sampling import most_timesteps
from store.rejected import Rejected

logger = logging.getLogger(__name__)


def misfit(error: ValidationError) -> UserError:
    """Return what is wrong with a manifest that settings and teacher would make."""
    faults = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
    return UserError(f"the section rollout does not fit the teacher: {faults}")


def part(
    family: Family,
    samples: Sequence[Sample],
    config: RolloutConfig,
    *,
    replay: Replay | None = None,
    refused: Rejected = (),
) -> tuple[list[Sample], Rejected]:
    """Part the samples that a family takes from those that it refuses, in the given order.

    What is refused follows from the family, the samples and the settings of drawing alone, so that
    all workers come to the same. `refused` names samples that someone else has refused, and why.
    Raises `UserError` for settings that are at fault whatever the sample, and when nothing is left.
    """
    longest = _longest(family, config, replay)
    reasons = dict(refused)
    for sample in tqdm(samples, unit="sample", desc="check", disable=None):
        sample_id = sample["sample_id"]
        if sample_id in reasons:
            continue
        try:
            family.check_sample(sample, longest(sample))
            if config.source == "dataset":
                require_taught(family, sample, family.reference_codes(sample))
        except Refused as error:
            reasons[sample_id] = error.reason
    accepted = [sample for sample in samples if sample["sample_id"] not in reasons]
    ids = (sample["sample_id"] for sample in samples)
    rejected = [(sample_id, reasons[sample_id]) for sample_id in ids if sample_id in reasons]
    _tell(len(samples), rejected)
    return accepted, rejected


def takes_recording(family: Family, sample: Sample) -> bool:
    """Whether a family can score the sample's own recording."""
    try:
        family.check_sample(sample, family.timesteps(sample))
        require_taught(family, sample, family.reference_codes(sample))
    except Refused:
        return False
    return True


def _longest(
    family: Family, config: RolloutConfig, replay: Replay | None
) -> Callable[[Sample], int]:
    """How many timesteps a rollout of a sample may have; given codes are as long as they are."""
    if replay is not None:
        lengths = replay.longest()
        return lambda sample: lengths[sample["sample_id"]]
    if config.source == "dataset":
        return family.timesteps
    family.check(config.sampler)
    return lambda sample: most_timesteps(config.sampler, family.timesteps(sample))


def _tell(given: int, rejected: Rejected) -> None:
    """Log what is left out, as a table; raises `UserError` when that is everything."""
    if not rejected:
        return
    if len(rejected) == given:
        sample_id, reason = rejected[0]
        raise UserError(
            f"none of the {given} samples can be rolled out; the first, {sample_id!r}: {reason}"
        )
    rows = [{"sample_id": sample_id, "reason": reason} for sample_id, reason in rejected]
    logger.warning(
        "%d of %d samples are left out, each with its reason in rejected.parquet:\n%s",
        len(rejected), given, rejection_table(rows),
    )  # fmt: skip
