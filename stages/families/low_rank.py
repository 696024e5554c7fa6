"""Low-rank changes of linear layers, as the factors that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.errors import UserError


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one linear layer: scale · up @ down."""

    down: Tensor
    """[rank, in]: A."""
    up: Tensor
    """[out, rank]: B."""
    scale: float
    """Alpha over the rank, or over its root in rank-stabilised LoRA."""


def truncate(factors: Factors, rank: int, scale: float) -> Factors:
    """Return the best factors of lower rank (Eckart and Young), to be scaled by `scale`.

    The singular values are split evenly between both sides. They come from a core of rank × rank
    between orthogonal bases; the product [out, in] is never formed. At the same rank the product
    stays, and the factors but for the scale. Raises UserError for a higher one.
    """
    own = factors.down.shape[0]
    if rank > own:
        raise UserError(
            f"the adapter has rank {own}, and {rank} is wanted of it: lower lora.rank, or start "
            "from fresh adapters"
        )
    if rank == own:
        return Factors(factors.down, factors.up * (factors.scale / scale), scale)
    up_basis, up_core = torch.linalg.qr(factors.up.double().cpu())
    down_basis, down_core = torch.linalg.qr(factors.down.double().cpu().T)
    left, singular, right = torch.linalg.svd(up_core @ down_core.T, full_matrices=False)
    root = (singular[:rank] * (factors.scale / scale)).sqrt()
    # A layer that is narrower than the rank has no more directions: the rest adds nothing.
    rest = (0, rank - len(root))
    up = nn.functional.pad(up_basis @ left[:, :rank] * root, rest)
    down = nn.functional.pad(down_basis @ right[:rank].T * root, rest).T
    return Factors(down.to(factors.down.dtype), up.to(factors.up.dtype), scale)
