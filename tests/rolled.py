"""Rollouts of a family put together per row, for tests that compare decoding with scoring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from stages.sampling import RolloutPolicy
from store.schema import Sampler


@dataclass
class Rolled:
    """The steps of a rollout, put together per row."""

    codes: torch.Tensor
    logits: torch.Tensor
    lengths: torch.Tensor
    batch_sizes: list[int] = field(default_factory=list)

    def poisoned(self) -> torch.Tensor:
        """The codes, with no code beyond a row's end: nothing may be read there."""
        codes = self.codes.clone()
        for row, length in enumerate(self.lengths):
            codes[row, length:] = 10**6
        return codes

    def require_departures(self) -> None:
        """Make sure that the test means something: rows end apart, and leave the batch."""
        assert len(set(self.lengths.tolist())) > 1, "rows must end at different times"
        assert self.batch_sizes == sorted(self.batch_sizes, reverse=True)
        assert self.batch_sizes[-1] < len(self.lengths), "finished rows must leave the batch"


def policy_of(family: Any, samples: list[dict], **sampler: Any) -> RolloutPolicy:
    """Draws keyed by the samples, of whose settings `max_timesteps` must be given."""
    return RolloutPolicy(
        Sampler.model_validate(sampler),
        [(sample["sample_id"], 0) for sample in samples],
        seed=3,
        streams=family.streams,
        forbidden=family.forbidden,
        end_id=family.end_id,
        reference_timesteps=[family.timesteps(sample) for sample in samples],
    )


def roll(family: Any, samples: list[dict], scale: float, **sampler: Any) -> Rolled:
    """Generate under guidance; what was never predicted stays NaN."""
    shape = len(samples), sampler["max_timesteps"], len(family.streams)
    rolled = Rolled(
        torch.zeros(shape, dtype=torch.int64),
        torch.full((*shape, family.streams[0].vocabulary), float("nan")),
        torch.zeros(len(samples), dtype=torch.int64),
    )
    for step in family.rollout(samples, policy_of(family, samples, **sampler), scale):
        assert step.logits.dtype == torch.float32
        rolled.codes[step.rows, step.timestep] = step.codes
        rolled.logits[step.rows, step.timestep] = step.logits
        rolled.lengths[step.rows] = step.timestep + 1
        rolled.batch_sizes.append(len(step.rows))
    return rolled
