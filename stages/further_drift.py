"""What a store holds beside its predictions, compared with what a teacher says now.

None of it shows in a KL: which ids were kept, moments of all logits, the constant of a row, draws
from the tail, and what the probabilities do not have of a state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stages.drift import Further
from stages.drift_limits import rounding_of
from stages.family import Branches
from stages.philox import uniforms
from stages.reduction import (
    draw_weights,
    draws_of,
    ingredients,
    moments,
    reduce_hidden,
    without,
)
from stages.sampling import keyed_seed, misplaced
from stages.targets import DenseTarget, Forbidden, SparseTarget
from store.plan import Key
from store.schema import Hidden, Manifest

GUIDED = Hidden()
"""States of which the branches are mixed."""


class Place(NamedTuple):
    """Some timesteps of one rollout of a store."""

    manifest: Manifest
    key: Key
    timesteps: Tensor
    """[n] int64."""

    def numbers(self) -> Tensor:
        """Return the random numbers [n, C, draws] that the store's draws were made with."""
        seed = keyed_seed(self.manifest.seed, "target draws", *self.key)
        seeds = torch.full_like(self.timesteps, seed)
        streams, draws = len(self.manifest.streams), draws_of(self.manifest.target)
        return uniforms(seeds, self.timesteps, streams, draws)


def logits_drift(
    measure: Further,
    place: Place,
    codes: Tensor,
    allowed: Tensor,
    stored: DenseTarget | SparseTarget,
) -> Tensor:
    """Return the drift [n, C] of something that follows from logits.

    `allowed` [n, C, V] are what the teacher predicts now, minus infinity at forbidden ids, and
    `codes` [n, C] those that are stored.
    """
    if measure == "kept_ids":
        assert isinstance(stored, SparseTarget)
        return _passed_over(allowed, stored.ids, codes, place.manifest.end_id)
    if measure == "tail_draws":
        assert isinstance(stored, SparseTarget)
        assert stored.tail_ids is not None
        weights = draw_weights(without(allowed, stored.ids))
        return misplaced(weights, stored.tail_ids, place.numbers()).mean(-1)
    manifest, now = place.manifest, allowed.amax(-1)
    if measure == "level":
        then = stored.logits.amax(-1)
    else:
        assert isinstance(stored, SparseTarget)
        assert stored.moments is not None
        which = 0 if measure == "logit_mean" else 1
        relative = allowed - now.unsqueeze(-1)
        now = moments(relative, Forbidden.of(manifest, allowed.device))[..., which]
        then = stored.moments[..., which]
    return ((now - then).abs() - rounding_of(manifest, measure) * then.abs()).clamp_min(0)


def _passed_over(allowed: Tensor, ids: Tensor, codes: Tensor, end_id: int | None) -> Tensor:
    """By how much the largest logit outside `ids` [n, C, K] is above the least inside, [n, C].

    The drawn code and the end id are kept whatever their logits are.
    """
    forced = ids == codes.unsqueeze(-1)
    if end_id is not None:
        forced = forced | (ids == end_id)
    least = allowed.gather(-1, ids).masked_fill(forced, float("inf")).amin(-1)
    return (without(allowed, ids).amax(-1) - least).clamp_min(0)


def states_again(branches: Branches, scale: float) -> dict[str, Tensor]:
    """Return the states [n, H, D] float32 of every group, guided at a scale."""
    return reduce_hidden(ingredients(GUIDED, None, branches), GUIDED, scale)


def states_drift(now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared error over mean square, and that square as a weight, of states [n, H, D]."""
    power = then.double().square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
    return (now.double() - then.double()).square().sum(-1) / power, power
