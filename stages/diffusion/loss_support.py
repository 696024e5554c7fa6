"""Which losses the rows of a store can teach, as far as settings tell."""

from __future__ import annotations

from stages.diffusion.record_config import Rows
from stages.diffusion.train_config import DiffusionLossConfig
from stages.errors import UserError
from stages.support import require_scale
from store.schema import Branches


def require_teachable(
    loss: DiffusionLossConfig, rows: Rows, branches: Branches, scale: float
) -> None:
    """Refuse a loss that a store of some rows has nothing for.

    `scale` is that of the store's guidance. Raises `UserError`.
    """
    along = rows.kind == "trajectory"
    if loss.teaches != "prediction" and not along:
        raise UserError(
            f"loss.teaches is {loss.teaches!r}, but the store holds noised images and no "
            "trajectories: use `prediction`, or record with rows.kind: trajectory"
        )
    if along and (loss.data_share or loss.mask is not None):
        name = "loss.mask" if loss.mask is not None else "loss.data_share"
        raise UserError(
            f"{name} is set, but the store holds trajectories, which begin in noise and have no "
            "image: leave it out, or record with rows.kind: forward"
        )
    if loss.teaches == "pairs" and rows.kind == "trajectory":
        kept = rows.keep
        if kept is not None and kept[0] != 0:
            raise UserError(
                "loss.teaches: pairs needs the start of every trajectory, but the store keeps the "
                f"steps {list(kept)}: record with rows.keep beginning at 0"
            )
    if loss.teaches == "prediction":
        require_scale(branches, scale, loss.guidance_scale is not None)
    elif loss.guidance_scale is not None:
        raise UserError(
            f"loss.guidance_scale was given with teaches: {loss.teaches}, but the trajectories of "
            f"the store are solved at scale {scale}: leave it out"
        )
