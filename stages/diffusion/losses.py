"""The loss of continuous predictions: one value per row, masked in one path, weighted by noise.

A row's weight multiplies its value once, in whoever trains. A Kullback-Leibler divergence is not
offered: between Gaussians of one variance it is the squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from stages.diffusion.model_config import PredictionType
from stages.diffusion.train_config import DiffusionLossConfig, ErrorName, WeightingName

ENDS = (1e-12, 1e12)
"""Signal-to-noise ratios are held in this range, where every weight has come to its limit."""
UNBOUNDED_ENDS = (1e-3, 1e3)
"""The same for weights that have no limit at an end; 1000 is what kohya's trainer takes."""
NEAR = 4.0


def error_of(name: ErrorName, delta: float) -> Callable[[Tensor], Tensor]:
    """Return the function from differences to errors, element by element.

    `huber` and `log_cosh` are the squared error for differences well below `delta` and grow like
    2·delta·|difference| above, so that a change of error keeps the learning rate.
    """
    match name:
        case "mse":
            return torch.square
        case "l1":
            return torch.abs
        case "huber":
            return lambda difference: 2 * _huber(difference, delta)
        case "log_cosh":
            return lambda difference: 2 * delta**2 * _log_cosh(difference / delta)


def _huber(difference: Tensor, delta: float) -> Tensor:
    nothing = torch.zeros_like(difference)
    return functional.huber_loss(difference, nothing, reduction="none", delta=delta)


def _log_cosh(values: Tensor) -> Tensor:
    """Logarithm of cosh, exact near 0 (cosh x = 1 + 2 sinh² x/2) and finite far from it."""
    size = values.abs()
    near = torch.log1p(2 * torch.sinh(size.clamp(max=NEAR) / 2).square())
    far = size - math.log(2) + torch.log1p(torch.exp(-2 * size))
    return torch.where(size < NEAR, near, far)


def row_losses(
    prediction: Tensor, target: Tensor, config: DiffusionLossConfig, mask: Tensor | None = None
) -> Tensor:
    """Return the error of each row [b] float32, not yet weighted.

    `prediction` and `target` are [b, c, h, w] of any floating dtype. `mask` [b, 1, h, w] in [0, 1]
    is of what counts; None is ones, and so is any mask where `config` has none. An element counts
    by its mask but at least by `unmasked_weight`. The mean is over all elements, or with
    `normalize_area` over the weights; a row of which nothing counts has no loss.
    """
    errors = error_of(config.error, config.delta)(prediction.float() - target.float())
    settings = config.mask
    if settings is None or mask is None:
        weights = torch.ones_like(errors[:, :1])
    else:
        weights = mask.to(errors).clamp(settings.unmasked_weight, 1.0)
    if weights.shape != errors[:, :1].shape:
        raise ValueError(f"mask {tuple(weights.shape)} for predictions {tuple(errors.shape)}")
    losses = (errors * weights).flatten(1).mean(1)
    if settings is not None and settings.normalize_area:
        area = weights.flatten(1).mean(1)
        losses = losses / area.clamp_min(torch.finfo(area.dtype).tiny)
    return losses


def weighting(
    alpha: Tensor, sigma: Tensor, prediction: PredictionType, name: WeightingName, number: float
) -> Tensor:
    """Return the weight [b] float32 of rows of noise levels `alpha` and `sigma` [b].

    A weighting is a function of the signal-to-noise ratio, defined for one type of prediction; for
    another it is divided by how much larger the same error is there, so that the loss stays the
    same. Weights are finite at both ends. Sources: `min_snr` Hang et al. (2303.09556);
    `soft_min_snr` Crowson et al. (2401.11605); `debiased` Yu et al. (2310.08442); `p2` Choi et al.
    (2204.00227), with their k = 1. `number` is the bound on the ratio of the first two, and the
    exponent of `p2`.
    """
    bounded = name in ("min_snr", "soft_min_snr")
    snr = (alpha.double() / sigma.double()).square().clamp(*(ENDS if bounded else UNBOUNDED_ENDS))
    match name:
        case "constant":
            return torch.ones_like(snr, dtype=torch.float32)
        case "min_snr":
            of_x0 = snr.clamp(max=number)
        case "soft_min_snr":
            of_x0 = snr * number / (snr + number)
        case "debiased":  # 1/√SNR for epsilon
            of_x0 = snr.sqrt()
        case "p2":  # 1/(1 + SNR)^number for epsilon
            of_x0 = snr / (1 + snr) ** number
    return (of_x0 / _squared_error_per_x0(snr, prediction)).float()


def _squared_error_per_x0(snr: Tensor, prediction: PredictionType) -> Tensor:
    """Squared error of a prediction per squared error of the x0 that it implies."""
    match prediction:
        case "epsilon":
            return snr
        case "sample":
            return torch.ones_like(snr)
        case "v_prediction":
            return snr + 1
        case "flow":  # 1/sigma², where alpha + sigma = 1
            return (1 + snr.sqrt()).square()
