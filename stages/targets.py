"""From guided logits to what the store keeps, and back to what a loss reads.

What is stored is the guided distribution before any sampling filter: forbidden ids masked,
normalised per stream, then reduced. Both ways run on whatever device the logits are on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.errors import UserError
from stages.sampling import mask_forbidden
from store.schema import Full, Target, TopK

Arrays = dict[str, Tensor]


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


def reduce(
    logits: Tensor, codes: Tensor, target: Target, forbidden: Sequence[int], end_id: int | None
) -> Arrays:
    """Reduce guided logits to the arrays of a target.

    `logits` is [..., V] of any floating dtype, `codes` [...] int64 the drawn ids, which are always
    kept, as is the end id. Returns the arrays of `store.encoding` without their target prefix, on
    the device of `logits`. Raises FloatingPointError when an allowed logit is not finite.
    """
    masked = mask_forbidden(logits.float(), forbidden)
    _require_finite(masked, forbidden)
    relative = masked - masked.amax(-1, keepdim=True)
    match target:
        case Full():
            return {"logits": relative}
        case TopK():
            return _reduce_top_k(relative, codes, target, forbidden, end_id)


def _require_finite(masked: Tensor, forbidden: Sequence[int]) -> None:
    finite = masked.isfinite().sum(-1)
    if not bool((finite == masked.shape[-1] - len(set(forbidden))).all()):
        raise FloatingPointError("the teacher's guided logits hold NaN or infinity")


def _reduce_top_k(
    relative: Tensor, codes: Tensor, target: TopK, forbidden: Sequence[int], end_id: int | None
) -> Arrays:
    # Adding a bonus to the ids that must be kept makes one top-k select them with the rest.
    bonus = relative.new_zeros(relative.shape).scatter(-1, codes.unsqueeze(-1), float("inf"))
    if end_id is not None:
        bonus[..., end_id] = float("inf")
    selected = (relative + bonus).topk(target.k, dim=-1).indices
    ids = selected.sort(dim=-1).values
    values = relative.gather(-1, ids)

    outside = relative.scatter(-1, ids, float("-inf"))
    tails = [
        (outside / t).logsumexp(-1) - (relative / t).logsumexp(-1) for t in target.temperatures
    ]
    arrays = {"ids": ids, "logits": values, "tail_logmass": torch.stack(tails, -1)}
    if target.moments:
        arrays["moments"] = moments(relative, forbidden)
    return arrays


def moments(relative: Tensor, forbidden: Sequence[int]) -> Tensor:
    """Return mean and population standard deviation [..., 2] over the allowed ids of [..., V]."""
    allowed = torch.ones(relative.shape[-1], dtype=torch.bool, device=relative.device)
    allowed[list(forbidden)] = False
    values = relative[..., allowed]
    return torch.stack([values.mean(-1), values.std(-1, correction=0)], -1)


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
