"""Guided attention: a loss that keeps cross-attention near the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT_WIDTH = 0.1
"""Width g of the diagonal in `diagonal_loss`, as a share of the sequences (1710.08969)."""


def diagonal_loss(
    weights: Tensor, text_lengths: Tensor, lengths: Tensor, counted: Tensor
) -> Tensor:
    """How far attention [B, H, T, L] lies from the diagonal of its (timestep, character) plane.

    The mean over valid timesteps of sum_n A[t, n] (1 − exp(−(n/N − t/T)² / 2g²)): 0 on the
    diagonal, below 1 anywhere. Rows with `counted` [B] False weigh nothing. Source: guided
    attention, Tachibana et al. (1710.08969), section 4, summed instead of averaged over the text
    so that its size does not depend on the length of the text.
    """
    timestep = torch.arange(weights.shape[2], device=weights.device)
    character = torch.arange(weights.shape[3], device=weights.device)
    along_speech = timestep[:, None] / lengths[:, None, None]
    along_text = character / text_lengths[:, None, None]
    penalty = 1.0 - torch.exp(-((along_text - along_speech) ** 2) / (2 * ALIGNMENT_WIDTH**2))
    distance = (weights.mean(1) * penalty).sum(-1)
    valid = ((timestep < lengths[:, None]) & counted[:, None]).float()
    return (distance * valid).sum() / valid.sum().clamp(min=1.0)
