"""The deterministic solver that turns noise into an image, one prediction per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.diffusion.model_config import PredictionType
from stages.diffusion.predictions import combine, factor
from stages.diffusion.schedule import Schedule
from stages.errors import UserError

Predict = Callable[[Tensor, Tensor], Tensor]
"""Latents [b, *shape] float32 and their times [b] float64 → prediction [b, *shape], in the type of
the schedule."""


@dataclass(frozen=True)
class State:
    """Where a trajectory stands before a step, or at its end."""

    step: int
    """0 for the start noise, the number of steps for the end."""
    t: float
    alpha: float
    sigma: float
    x: Tensor
    """Latents [b, *shape] float32."""
    prediction: Tensor | None
    """What was predicted of them [b, *shape]; None at the end."""


def trajectory(
    predict: Predict,
    x: Tensor,
    times: np.ndarray,
    schedule: Schedule,
    rounded: torch.dtype = torch.float32,
) -> Iterator[State]:
    """Solve from pure noise `x` [b, *shape] along falling `times` [steps + 1], state by state.

    Every state, the start and the end included, is rounded to the type `rounded`: with the one that
    states are stored in, the model is asked exactly at what is stored. Raises `UserError` where the
    schedule begins without signal and the model predicts noise, of which nothing follows there.
    """
    kind = schedule.facts.prediction
    alphas, sigmas = schedule.at(times)
    known = factor(torch.from_numpy(alphas[:-1]), torch.from_numpy(sigmas[:-1]), kind, "sample")
    if not known.isfinite().all():
        raise UserError(
            f"a model that predicts {kind!r} cannot start where the schedule has no signal "
            f"(alpha {alphas[0]:g} at time {times[0]:g}): rescale_betas_zero_snr needs v_prediction"
        )
    x = x.to(rounded).float()
    last = len(times) - 1
    for number in range(last):
        t, alpha, sigma = times[number], alphas[number], sigmas[number]
        at = torch.full((len(x),), float(t), dtype=torch.float64, device=x.device)
        prediction = predict(x, at)
        yield State(number, float(t), float(alpha), float(sigma), x, prediction)
        following = float(alphas[number + 1]), float(sigmas[number + 1])
        x = step(x, prediction, kind, float(alpha), float(sigma), *following)
        x = x.to(rounded).float()
    yield State(last, float(times[last]), float(alphas[last]), float(sigmas[last]), x, None)


def step(
    x: Tensor,
    prediction: Tensor,
    kind: PredictionType,
    alpha: float | Tensor,
    sigma: float | Tensor,
    alpha2: float | Tensor,
    sigma2: float | Tensor,
) -> Tensor:
    """Return alpha2·x0 + sigma2·noise [b, *shape] float32, of what is predicted at `x` [b, *shape].

    `alpha` and `sigma` are those of `x`, numbers or [b]. This is DDIM without added noise (Song et
    al. 2010.02502, equation 12), and for flow models an Euler step.
    """
    here = _rows(alpha, x), _rows(sigma, x)
    return combine(x, prediction, *here, kind, (_rows(alpha2, x), _rows(sigma2, x)))


def _rows(number: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(x.device, torch.float64).expand(len(x))
    # Filled on the device: a number that is copied there would wait for all that is under way.
    return torch.full((len(x),), number, dtype=torch.float64, device=x.device)
