"""Stage one: a teacher generates under guidance, and what it predicts is stored.

Only the teacher is in memory. Each shard of the plan is generated, reduced on the device and
committed by itself; a rollout's draws depend on (seed, sample_id, variation) alone and its batch
on the plan alone, so an interrupted run that any number of workers resume ends with the same
bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from stages.capture import Capture
from stages.family import Family, Sample
from stages.interruption import StopRequest
from stages.sampling import RolloutPolicy, keyed_seed
from store import PredictionStore
from store.schema import Manifest

logger = logging.getLogger(__name__)

Key = tuple[str, int]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Drawn:
    """One finished rollout, ready to be stored."""

    key: Key
    arrays: Arrays
    """`codes` [T, C] and the target's arrays [T, C, ...]."""
    stop_reason: str
    weight: float


@dataclass(frozen=True)
class GivenCodes:
    """Codes that the teacher did not draw, for it to score."""

    codes: Tensor
    """[T, C] int64."""
    stop_reason: str
    weight: float


@torch.inference_mode()
def rollout(
    family: Family,
    store: PredictionStore,
    samples: Mapping[str, Sample],
    shards: Sequence[int],
    *,
    batch_size: int,
    stop: StopRequest,
    draws: Mapping[Key, GivenCodes] | None = None,
) -> bool:
    """Write the given shards of a store; return False when `stop` was requested first.

    `samples` are the dataset's rows by sample_id. What is drawn, how, and what is kept follows
    from the store's manifest. With source `student`, `draws` holds what that student drew, by
    key. A shard that another worker commits first is left to it. Raises
    FloatingPointError, naming the batch, when the teacher predicts NaN.
    """
    manifest = store.manifest
    family.module.eval()
    rollouts = sum(len(store.plan[shard]) for shard in shards)
    with tqdm(total=rollouts, unit="rollout", desc="rollout", disable=None) as bar:
        for shard in shards:
            if store.is_committed(shard):
                # By another worker, since the store was opened.
                bar.update(len(store.plan[shard]))
                continue
            with store.writer(shard) as writer:
                for keys in split(store.plan[shard], batch_size):
                    if stop.requested:
                        return False
                    for drawn in predict(family, manifest, keys, samples, draws):
                        writer.append(
                            *drawn.key,
                            drawn.arrays,
                            stop_reason=drawn.stop_reason,
                            weight=drawn.weight,
                            seed=keyed_seed(manifest.seed, *drawn.key),
                        )
                    bar.update(len(keys))
                if not writer.commit():
                    logger.info("shard %d was committed by another worker first", shard)
    return True


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
    batch = [samples[sample_id] for sample_id, _ in keys]
    try:
        match manifest.source:
            case "teacher":
                return _generate(family, manifest, keys, batch)
            case "dataset":
                codes = [GivenCodes(family.reference_codes(row), "end", 1.0) for row in batch]
                return _score(family, manifest, keys, batch, codes)
            case "student":
                return _score(family, manifest, keys, batch, [(draws or {})[key] for key in keys])
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error} while scoring {keys[0][0]!r} variation {keys[0][1]} and the "
            f"{len(keys) - 1} rollouts batched with it; nothing of this shard was stored. Check "
            "the teacher's weights, or set rollout.precision: fp32"
        ) from error


def _generate(
    family: Family, manifest: Manifest, keys: Sequence[Key], batch: Sequence[Sample]
) -> list[Drawn]:
    references = [family.timesteps(sample) for sample in batch]
    policy = policy_for(family, manifest, keys, references)
    capture = Capture(manifest)
    for step in family.rollout(batch, policy, manifest.guidance.scale):
        capture.add(step.rows, step.codes, step.logits)
    return [
        Drawn(
            key,
            arrays,
            policy.stop_reason(row),
            policy.weight(row, len(arrays["codes"]), references[row]),
        )
        for row, (key, arrays) in enumerate(zip(keys, capture.rollouts(), strict=True))
    ]


def policy_for(
    family: Family, manifest: Manifest, keys: Sequence[Key], references: Sequence[int]
) -> RolloutPolicy:
    """Return the sampling policy of a store for one batch of rollouts."""
    return RolloutPolicy(
        manifest.sampler,
        keys,
        seed=manifest.seed,
        streams=len(family.streams),
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
) -> list[Drawn]:
    device = next(family.module.parameters()).device
    lengths = torch.tensor([len(draw.codes) for draw in draws], device=device)
    padded = pad_sequence([draw.codes for draw in draws], batch_first=True).to(device)
    logits = family.score(batch, padded, lengths, cfg_scale=manifest.guidance.scale).logits
    capture = Capture(manifest)
    rows, timesteps = torch.nonzero(
        torch.arange(padded.shape[1], device=device) < lengths.unsqueeze(1), as_tuple=True
    )
    capture.add(rows, padded[rows, timesteps], logits[rows, timesteps])
    return [
        Drawn(key, arrays, draw.stop_reason, draw.weight)
        for key, draw, arrays in zip(keys, draws, capture.rollouts(), strict=True)
    ]
