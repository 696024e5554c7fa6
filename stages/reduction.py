"""From what a teacher predicts to what the store keeps, on whatever device the logits are on.

What is stored is the guided distribution before any sampling filter: forbidden ids masked,
normalised per stream, then reduced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.sampling import mask_forbidden
from store.schema import Full, Target, TopK

Arrays = dict[str, Tensor]


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
