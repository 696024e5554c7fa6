"""What a denoiser predicts, in any of the four types, at a given x_t = alpha·x0 + sigma·noise.

Every type, and x_t, is a sum of x0 and noise with two factors. Two of them that are not parallel
give all others: a third is p·x_t + q·value, where q is a ratio of determinants. So conversion is
affine in the value, and guidance, whose weights sum to 1, may come before or after it. Arithmetic
on values is float32, on alpha and sigma float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.diffusion.model_config import PredictionType

LEAST = 2.0**-40
"""A smaller determinant says nothing: float32 would be amplified to noise, and then to infinity."""

Pair = tuple[Tensor, Tensor]
"""Factors [b] float64 of x0 and of the noise."""


def convert(
    value: Tensor,
    x_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    source: PredictionType,
    wanted: PredictionType,
) -> Tensor:
    """Return a prediction `value` [b, *shape] of type `source` as one of type `wanted`, float32.

    `x_t` [b, *shape] is what it was predicted at; `alpha` and `sigma` [b] need not be those of a
    schedule. A row is zero where the value says nothing of what is wanted (epsilon where alpha is
    0, sample where sigma is 0): its `factor` is infinite, and callers leave it out.
    """
    if source == wanted:
        return value.float()
    alpha, sigma = alpha.double(), sigma.double()
    return combine(x_t, value, alpha, sigma, source, _pair(wanted, alpha, sigma))


def of_pair(
    x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, wanted: PredictionType
) -> Tensor:
    """Return what a perfect model of type `wanted` predicts [b, *shape] float32.

    `x0` and `noise` are [b, *shape], `alpha` and `sigma` [b].
    """
    of_x0, of_noise = _pair(wanted, alpha.double(), sigma.double())
    return over(of_x0.float(), x0) * x0.float() + over(of_noise.float(), noise) * noise.float()


def factor(alpha: Tensor, sigma: Tensor, source: PredictionType, wanted: PredictionType) -> Tensor:
    """Return by how much conversion amplifies an error of the value, |d wanted / d source|.

    `alpha` and `sigma` are [b]; so is the result, float64, infinite where nothing can be said.
    """
    alpha, sigma = alpha.double(), sigma.double()
    if source == wanted:
        return torch.ones_like(alpha)
    above = _determinant(alpha, sigma, _pair(wanted, alpha, sigma))
    below = _determinant(alpha, sigma, _pair(source, alpha, sigma))
    return torch.where(below.abs() < LEAST, torch.inf, (above / below).abs())


def combine(
    x_t: Tensor,
    value: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    source: PredictionType,
    wanted: Pair,
) -> Tensor:
    """Return a·x0 + b·noise [b, *shape] float32 for the factors `wanted` = (a, b), each [b].

    The value, of type `source`, is known at x_t; rows where it says nothing are zero.
    """
    alpha, sigma = alpha.double(), sigma.double()
    known = _pair(source, alpha, sigma)
    below = _determinant(alpha, sigma, known)
    of_value = _determinant(alpha, sigma, wanted) / below
    of_x_t = (wanted[0] * known[1] - wanted[1] * known[0]) / below
    lost = below.abs() < LEAST
    of_value, of_x_t = of_value.masked_fill(lost, 0.0), of_x_t.masked_fill(lost, 0.0)
    return over(of_x_t.float(), x_t) * x_t.float() + over(of_value.float(), value) * value.float()


def over(values: Tensor, latents: Tensor) -> Tensor:
    """Return values [b] as [b, 1, …], to broadcast over latents [b, *shape]."""
    return values.reshape(-1, *[1] * (latents.dim() - 1))


def _pair(name: PredictionType, alpha: Tensor, sigma: Tensor) -> Pair:
    one = torch.ones_like(alpha)
    match name:
        case "epsilon":
            return 0 * one, one
        case "sample":
            return one, 0 * one
        case "v_prediction":  # Salimans & Ho (2202.00512)
            return -sigma, alpha
        case "flow":  # Liu et al. (2209.03003), towards noise
            return -one, one


def _determinant(alpha: Tensor, sigma: Tensor, pair: Pair) -> Tensor:
    """Determinant of x_t and a pair of factors: 0 where both say the same of x0 and noise."""
    return alpha * pair[1] - sigma * pair[0]
