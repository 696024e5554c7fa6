"""Rows that one denoiser was asked of, as rows of another, whose schedule or type is its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.diffusion.facts import ScheduleFacts
from stages.diffusion.model_config import PredictionType
from stages.diffusion.predictions import convert, factor, over
from stages.diffusion.schedule import Schedule
from stages.errors import UserError

TOLERANCE = 1e-3
"""By how much alpha and sigma of a row may miss those of the schedule that it is placed in."""
LEVELS = 64
"""Noise levels at which a conversion is tried before anything is read."""
LEAST_SHARE = 0.5
"""Of these, the share that must be of use."""


@dataclass(frozen=True)
class Placed:
    """Rows in the schedule of a student: scale·x_t = alpha·x0 + sigma·noise at its time t."""

    scale: np.ndarray
    """[b] float64."""
    alpha: np.ndarray
    """[b] float64."""
    sigma: np.ndarray
    """[b] float64."""
    t: np.ndarray
    """[b] float64."""
    fits: np.ndarray
    """[b] bool: whether the schedule has this noise level at all."""


class Conversion:
    """From the schedule and prediction type that a store was recorded with to a student's."""

    def __init__(self, recorded: ScheduleFacts, own: ScheduleFacts) -> None:
        self.recorded, self.own = Schedule(recorded), Schedule(own)
        self.source, self.wanted = recorded.prediction, own.prediction
        self._same = self.recorded.digest() == self.own.digest()

    def placed(self, t: np.ndarray, alpha: np.ndarray, sigma: np.ndarray) -> Placed:
        """Place rows of the recorded schedule, [b] float64 each; of the same one they stay."""
        if self._same:
            return Placed(np.ones_like(t), alpha, sigma, t, np.ones(t.shape, bool))
        scale, alpha, sigma, t = self.own.place(alpha, sigma)
        held = self.own.at(t)
        misses = np.maximum(np.abs(held[0] - alpha), np.abs(held[1] - sigma))
        return Placed(scale, alpha, sigma, t, (misses <= TOLERANCE) & (t >= 0))

    def factor(
        self, alpha: np.ndarray, sigma: np.ndarray, source: PredictionType | None = None
    ) -> np.ndarray:
        """Return by how much an error of what is stored grows, [b] float64; may be infinite.

        `source` is the type of what is stored, where that is not the prediction.
        """
        given = torch.from_numpy(alpha), torch.from_numpy(sigma)
        grown: np.ndarray = factor(*given, source or self.source, self.wanted).numpy()
        return grown

    def converted(
        self,
        value: Tensor,
        x_t: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        scale: Tensor,
        source: PredictionType | None = None,
    ) -> Tensor:
        """Return what the student should predict [b, *shape] float32 where `value` was predicted.

        `x_t` [b, *shape], `alpha` and `sigma` [b] are as recorded and `scale` [b] as placed.
        """
        found = convert(value, x_t, alpha, sigma, source or self.source, self.wanted)
        if self.wanted != "v_prediction":  # of the four the one that is not of x0 and noise alone
            return found
        return found * over(scale.float(), found)

    def difference(self, delta: Tensor, alpha: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
        """Return by how much the student's prediction differs where the teacher's does by `delta`.

        Conversion is affine, and its constant part is that of x_t.
        """
        return self.converted(delta, torch.zeros_like(delta), alpha, sigma, scale)

    def require(self, largest_factor: float) -> None:
        """Refuse a pair of schedules of whose noise levels fewer than half are of use."""
        facts = self.recorded.facts
        share = (np.arange(LEVELS) + 0.5) / LEVELS
        t = share * facts.train_timesteps
        alpha, sigma = self.recorded.at(np.floor(t) if facts.kind == "ddpm" else t)
        fits = self.placed(t, alpha, sigma).fits
        grown = self.factor(alpha, sigma) <= largest_factor
        if (fits & grown).mean() >= LEAST_SHARE:
            return
        own = self.own.facts
        raise UserError(
            f"the student's schedule ({own.kind}, predicting {own.prediction!r}) cannot learn from "
            f"the store's ({facts.kind}, predicting {facts.prediction!r}): it has {fits.mean():.0%}"
            f" of the recorded noise levels, and at {grown.mean():.0%} of them conversion amplifies"
            f" a prediction by no more than loss.largest_factor={largest_factor:g}; leave out "
            "model.schedule and model.prediction to take the store's, raise loss.largest_factor, "
            "or record with a teacher of the student's schedule"
        )
