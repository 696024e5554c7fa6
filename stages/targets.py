"""What a loss reads: the forms that stored targets take in memory.

They are on whatever device the loss runs; `stages.reduction` is the way into the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.errors import UserError
from store.schema import Full, Target, TopK


@dataclass(frozen=True)
class DenseTarget:
    """The teacher's whole distribution."""

    logits: Tensor
    """[..., V] float32, relative to the row maximum; -inf at forbidden ids."""


@dataclass(frozen=True)
class SparseTarget:
    """The teacher's likeliest ids, and the mass that lies outside them."""

    ids: Tensor
    """[..., K] int64, rising."""
    logits: Tensor
    """[..., K] float32, relative to the row maximum."""
    tail_logmass: Tensor
    """[..., len(temperatures)] float32: log of the probability outside `ids`."""
    temperatures: tuple[float, ...]
    """The temperatures of `tail_logmass`."""
    moments: Tensor | None
    """[..., 2] float32: mean and standard deviation of all allowed logits, or None."""

    def logprobs(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the K ids [..., K] and of the tail [...] at a temperature.

        Raises `UserError` for a temperature whose tail was not stored: it cannot be recovered
        from the kept ids (the tail has as many shapes as there are temperatures).
        """
        if temperature not in self.temperatures:
            raise UserError(
                f"distillation temperature {temperature} is not among those the store keeps the "
                f"tail for, {list(self.temperatures)} (manifest.json, target.temperatures): train "
                "at one of these, or roll out again with this temperature listed"
            )
        # Rounding of two logsumexp may lift the mass of a tail that is nearly everything over 1.
        tail = self.tail_logmass[..., self.temperatures.index(temperature)].clamp_max(0.0)
        kept = (self.logits / temperature).log_softmax(-1) + _log1mexp(tail).unsqueeze(-1)
        return kept, tail


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0 without cancellation (Mächler, 2012)."""
    return torch.where(x > -0.6931, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def restore(
    arrays: Mapping[str, np.ndarray | Tensor], target: Target, device: torch.device | str
) -> DenseTarget | SparseTarget:
    """Turn stored arrays (without target prefix) into the form a loss reads, on `device`."""

    def tensor(name: str) -> Tensor:
        return torch.as_tensor(arrays[name]).to(device, non_blocking=True)

    match target:
        case Full():
            return DenseTarget(tensor("logits").float())
        case TopK():
            return SparseTarget(
                ids=tensor("ids").long(),
                logits=tensor("logits").float(),
                tail_logmass=tensor("tail_logmass"),
                temperatures=target.temperatures,
                moments=tensor("moments") if target.moments else None,
            )
