"""Stage one: a teacher generates under guidance, and what it predicts is stored.

Only the teacher is in memory. Each shard of the plan is generated, reduced on the device and
committed by itself; a rollout's draws depend on (seed, sample_id, variation) alone and its batch
on the plan alone, so an interrupted run that any number of workers resume ends with the same
bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from stages.background_writer import BackgroundWriter, Drawn
from stages.capture import Capture
from stages.family import Branches, Family, Sample, Scores, Step, has_linear_heads
from stages.interruption import StopRequest
from stages.reduction import guided_logits, of_branches
from stages.sampling import NOT_FINITE, STOP_REASONS, RolloutPolicy, keyed_seed
from store import PredictionStore
from store.schema import Manifest

logger = logging.getLogger(__name__)

Key = tuple[str, int]
Collect = Callable[[], list[Drawn]]

SCORED_TIMESTEPS = 4096
"""Timesteps whose scores are copied out of a padded batch at once, at most."""
SCORED_VALUES = 2**23
"""Logits of those timesteps, at most: of each branch 32 MiB in float32."""
NOT_FINITE_SHARE = 0.1
"""Rollouts of a shard that may end because the teacher predicts NaN or infinity; one always may,
unless the shard has no other. With more of them it is the teacher that is broken."""
LISTED = 5
"""Rollouts that a message names, at most."""
ADVICE = "Check the model's weights, or set rollout.precision: fp32"


class NotFinite(FloatingPointError):
    """A model predicted NaN or infinity; says for which rollouts."""


@dataclass(frozen=True)
class GivenCodes:
    """Codes that the teacher did not draw, for it to score."""

    codes: Tensor
    """[T, C] int64; 0 for continuous streams."""
    stop_reason: str
    weight: float


@torch.inference_mode()
def rollout(
    family: Family,
    store: PredictionStore,
    samples: Mapping[str, Sample],
    shards: Iterable[int],
    *,
    batch_size: int,
    stop: StopRequest,
    draws: Mapping[Key, GivenCodes] | None = None,
    free_floor: int = 0,
) -> bool:
    """Write the given shards of a store; return False when `stop` was requested first.

    `samples` are the dataset's rows by sample_id. What is drawn, how, and what is kept follows
    from the store's manifest. Each of `shards` is asked for when it is begun. With source `student`
    or `replay`, `draws` holds the codes to be scored, by key. A shard is encoded and committed in a
    thread of its own while the next one is generated; the thread has ended when this returns, and a
    shard that was generated whole is committed. A shard that another worker commits first is left
    to it. A rollout of the teacher's whose logits become NaN or infinite ends before them, with a
    weight of 0. Raises NotFinite where that happens at once or too often, or to codes that are
    given, FloorReached where less than `free_floor` bytes are free when a shard is begun, and what
    the store raises.
    """
    manifest = store.manifest
    family.module.eval()
    with (
        tqdm(
            total=planned_rollouts(store, shards), unit="rollout", desc="rollout", disable=None
        ) as bar,
        BackgroundWriter(store, free_floor) as writer,
    ):
        for shard in shards:
            if store.is_committed(shard):
                # By another worker, since the store was opened.
                bar.update(len(store.plan[shard]))
                continue
            reasons: list[str] = []
            for keys in split(store.plan[shard], batch_size):
                if stop.requested:
                    return False
                collect = begin(family, manifest, keys, samples, draws, writer)
                if manifest.source == "teacher":
                    collect = partial(_counted, collect, reasons, len(store.plan[shard]))
                writer.append(shard, collect)
                bar.update(len(keys))
            writer.commit(shard)
    return True


def planned_rollouts(store: PredictionStore, shards: Iterable[int]) -> int | None:
    """Count the rollouts of shards; None where it is yet to be seen which these are."""
    if not isinstance(shards, Sequence):
        return None
    return sum(len(store.plan[shard]) for shard in shards)


def _counted(collect: Collect, reasons: list[str], planned: int) -> list[Drawn]:
    """Collect rollouts of a shard; raises NotFinite when too many of it are not finite."""
    drawn = collect()
    reasons += [each.stop_reason for each in drawn]
    refuse_not_finite(reasons, planned)
    return drawn


def refuse_not_finite(reasons: Sequence[str], planned: int) -> None:
    """Raise NotFinite when too many of a shard's `planned` rollouts have ended for that reason."""
    count = list(reasons).count(STOP_REASONS[NOT_FINITE])
    if too_many(count, planned):
        raise NotFinite(
            f"{count} of the {planned} rollouts of a shard came to logits that hold NaN or "
            f"infinity, and at most {NOT_FINITE_SHARE:.0%} may; nothing of this shard was stored. "
            f"{ADVICE}"
        )


def too_many(not_finite: int, planned: int) -> bool:
    """Whether more of what a shard plans is not finite than `NOT_FINITE_SHARE`, or all of it."""
    return not_finite == planned or not_finite > max(1, NOT_FINITE_SHARE * planned)


def split(keys: Sequence[Key], size: int) -> Iterator[Sequence[Key]]:
    """Cut a shard's keys into batches of `size`, in the plan's order."""
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def predict(
    family: Family,
    manifest: Manifest,
    keys: Sequence[Key],
    samples: Mapping[str, Sample],
    draws: Mapping[Key, GivenCodes] | None = None,
) -> list[Drawn]:
    """Return the rollouts of one batch of keys, with their targets, as the manifest says."""
    return begin(family, manifest, keys, samples, draws)()


def begin(
    family: Family,
    manifest: Manifest,
    keys: Sequence[Key],
    samples: Mapping[str, Sample],
    draws: Mapping[Key, GivenCodes] | None = None,
    writer: BackgroundWriter | None = None,
) -> Collect:
    """Let the teacher predict one batch of keys; return what waits for its targets.

    What is returned may be called once, in the thread of the `writer`. Both raise NotFinite when
    the teacher predicts NaN or infinity of what cannot be left out.
    """
    batch = [samples[sample_id] for sample_id, _ in keys]
    device = next(family.module.parameters()).device
    capture = Capture(manifest, keys, device, writer)
    with _naming(keys):
        match manifest.source:
            case "teacher":
                collect = _generate(family, manifest, keys, batch, capture)
            case "dataset":
                codes = [GivenCodes(family.reference_codes(row), "end", 1.0) for row in batch]
                collect = _score(family, manifest, keys, batch, codes, capture)
            case "student" | "replay":
                codes = [(draws or {})[key] for key in keys]
                collect = _score(family, manifest, keys, batch, codes, capture)
    return partial(_collect, keys, collect)


def _collect(keys: Sequence[Key], collect: Collect) -> list[Drawn]:
    with _naming(keys):
        return collect()


@contextmanager
def _naming(keys: Sequence[Key]) -> Iterator[None]:
    try:
        yield
    except NotFinite:
        raise  # it names its rollouts, of an earlier batch where the writer's thread tells of it
    except FloatingPointError as error:
        raise NotFinite(
            f"{error} while scoring {keys[0][0]!r} variation {keys[0][1]} and the "
            f"{len(keys) - 1} rollouts batched with it; nothing of this shard was stored. {ADVICE}"
        ) from error


def finite_steps(
    steps: Iterable[Step], policy: RolloutPolicy, keys: Sequence[Key]
) -> Iterator[Step]:
    """Yield a batch's steps without the timestep at which a row is not finite.

    Raises NotFinite, naming the rollouts, when it is their first: none is without a timestep.
    """
    for step in steps:
        if policy.all_finite:
            yield step
            continue
        finite = policy.stop[step.rows] != NOT_FINITE
        lost = [keys[row] for row in step.rows[~finite].tolist()]
        if lost and step.timestep == 0:
            raise NotFinite(
                "the guided logits of the first timestep hold NaN or infinity while generating "
                f"{_listed(lost)}, of which nothing is left. {ADVICE}"
            )
        if lost:
            logger.warning(
                "the guided logits of timestep %d hold NaN or infinity: %s ends before it, with a "
                "weight of 0", step.timestep, _listed(lost),
            )  # fmt: skip
        if len(lost) < len(finite):
            yield step.of_rows(finite)


def _listed(keys: Sequence[Key]) -> str:
    shown = ", ".join(f"{name!r} variation {variation}" for name, variation in keys[:LISTED])
    return shown if len(keys) <= LISTED else f"{shown} and {len(keys) - LISTED} more"


def _generate(
    family: Family,
    manifest: Manifest,
    keys: Sequence[Key],
    batch: Sequence[Sample],
    capture: Capture,
) -> Collect:
    references = [family.timesteps(sample) for sample in batch]
    policy = policy_for(family, manifest, keys, references)
    both = manifest.branches == "both"
    steps = family.rollout(batch, policy, manifest.guidance.scale, both_branches=both)
    for step in finite_steps(steps, policy, keys):
        capture.add(step.rows, step.timestep, step.codes, step.logits, step.branches)
    # Decoding has just waited for the device, so that this copy waits for nothing.
    policy.stop = policy.stop.cpu()
    arrays = capture.finish()

    def collect() -> list[Drawn]:
        return [
            Drawn(
                key,
                rollout,
                policy.stop_reason(row),
                policy.weight(row, _timesteps(rollout), references[row]),
                keyed_seed(manifest.seed, *key),
            )
            for row, (key, rollout) in enumerate(zip(keys, arrays(), strict=True))
        ]

    return collect


def _timesteps(rollout: Mapping[str, np.ndarray]) -> int:
    """T of its arrays [T, ...], among which continuous streams have no codes."""
    return len(next(iter(rollout.values())))


def policy_for(
    family: Family, manifest: Manifest, keys: Sequence[Key], references: Sequence[int]
) -> RolloutPolicy:
    """Return the sampling policy of a store for one batch of rollouts."""
    return RolloutPolicy(
        manifest.sampler,
        keys,
        seed=manifest.seed,
        streams=family.streams,
        forbidden=family.forbidden,
        end_id=family.end_id,
        reference_timesteps=references,
        device=next(family.module.parameters()).device,
    )


def _score(
    family: Family,
    manifest: Manifest,
    keys: Sequence[Key],
    batch: Sequence[Sample],
    draws: Sequence[GivenCodes],
    capture: Capture,
) -> Collect:
    device = next(family.module.parameters()).device
    lengths = torch.tensor([len(draw.codes) for draw in draws], device=device)
    padded = pad_sequence([draw.codes for draw in draws], batch_first=True).to(device)
    both = manifest.branches == "both"
    scale = manifest.guidance.scale
    scores = family.score(
        batch, padded, lengths, cfg_scale=scale, both_branches=both, linear=has_linear_heads(family)
    )
    valid = torch.arange(padded.shape[1], device=device) < lengths.unsqueeze(1)
    for place in torch.split(valid.nonzero(), _scored_together(manifest)):
        rows, timesteps = place.unbind(-1)
        branches = scores.branches and scores.branches.at(rows, timesteps)
        logits = None
        if not of_branches(manifest.target):
            logits = _guided(scores, branches, (rows, timesteps), scale)
        capture.add(rows, timesteps, padded[rows, timesteps], logits, branches)
    arrays = capture.finish()

    def collect() -> list[Drawn]:
        return [
            Drawn(key, rollout, draw.stop_reason, draw.weight, keyed_seed(manifest.seed, *key))
            for key, draw, rollout in zip(keys, draws, arrays(), strict=True)
        ]

    return collect


def _scored_together(manifest: Manifest) -> int:
    """Timesteps whose scores are computed, or copied out of a padded batch, at once."""
    values = len(manifest.streams) * max(manifest.vocabulary, 1)
    return min(SCORED_TIMESTEPS, max(SCORED_VALUES // values, 1))


def _guided(
    scores: Scores, branches: Branches | None, place: tuple[Tensor, ...], scale: float
) -> Tensor:
    """Guided predictions [n, C, ...] at n places of a batch, whose `branches` are given.

    Heads that were left to us multiply both branches and not the mixed states, so that what is
    stored is rounded as in a rollout.
    """
    if isinstance(scores.outputs, Tensor) or branches is None:
        return scores.logits[place]
    return guided_logits(branches, scale)
