"""Rows of a store at noised images: what the model is asked, and what is stored beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stages.diffusion.answers import Ask, Cell
from stages.diffusion.asked_rows import ConditionRows, HostAsked, noised
from stages.diffusion.config import ForwardRows
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.draws import Draw
from stages.diffusion.noise import checksum, row_noise
from stages.diffusion.parts import Asked, Passes, ask, stored_parts
from stages.diffusion.schedule import Schedule
from store.encoding import COLUMN
from store.schema import Dense


@dataclass(frozen=True)
class HostRows:
    """Rows of a batch before anything is predicted of them."""

    asked: HostAsked
    cells: Sequence[Sequence[Cell]]
    """[b][r]: r rows of the store belong to each that is asked."""
    columns: dict[str, np.ndarray]
    """Columns of the store [b, r, ...], by the names of their arrays."""


class ForwardShard:
    """The rows of a shard, in the order of its keys and slots, noised when they are asked for."""

    def __init__(
        self,
        draws: Sequence[Draw],
        rows: ForwardRows,
        schedule: Schedule,
        conditions: ConditionRows,
        *,
        seed: int,
        scales: np.ndarray,
        unconditional: bool,
    ) -> None:
        """Draw the times of every variation; `scales` [R] float32 are their guidance scales."""
        self._draws, self._rows, self._conditions = draws, rows, conditions
        self._seed, self._scales, self._unconditional = seed, scales, unconditional
        self._t = np.concatenate([
            schedule.draw(
                rows.timesteps, rows.slots, seed, *draw.key[:1], draw.image_variation,
                draw.text_variation,
            )
            for draw in draws
        ])  # fmt: skip
        self._alpha, self._sigma = schedule.at(self._t)

    def __len__(self) -> int:
        """Rows that are asked for."""
        return len(self._t)

    def read(self, span: range) -> HostRows:
        """Return some rows of the shard."""
        places = [divmod(row, self._rows.slots) for row in span]
        draws = [self._draws[place] for place, _ in places]
        latents = [self._conditions.latent(draw.latent)["latent"] for draw in draws]
        at = slice(span.start, span.stop)
        t, alpha, sigma = self._t[at], self._alpha[at], self._sigma[at]
        columns = {"t": t, "alpha": alpha, "sigma": sigma}
        noise = np.stack([
            row_noise(
                self._seed, draw.key[0], draw.image_variation, draw.text_variation, slot, x0.shape
            )
            for draw, (_, slot), x0 in zip(draws, places, latents, strict=True)
        ])  # fmt: skip
        if self._rows.store_noise:
            columns["noise"] = noise.astype(np.float16)[:, None]
            noise = columns["noise"][:, 0].astype(np.float32)
        x = np.stack([noised(*row) for row in zip(latents, noise, alpha, sigma, strict=True)])
        columns |= checksums(x)
        scale = np.array([self._scales[place] for place, _ in places], np.float32)
        return HostRows(
            asked=self._conditions.asked(x, t, draws, scale, unconditional=self._unconditional),
            cells=[[Cell(*draw.key, slot)] for draw, (_, slot) in zip(draws, places, strict=True)],
            columns={f"{COLUMN}{name}": values[:, None] for name, values in columns.items()},
        )


def checksums(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns `x_t_crc` [n] uint32 and `x_t_sum` [n] float64 of float32 x [n, *shape]."""
    sums = [checksum(values) for values in x]
    return {
        "x_t_crc": np.array([each.crc for each in sums], np.uint32),
        "x_t_sum": np.array([each.sum for each in sums], np.float64),
    }


def forward_ask(denoiser: Denoiser, passes: Passes, target: Dense) -> Ask:
    """Return what asks for the stored parts [b, 1, 1, *shape] of rows."""

    def parts(asked: Asked) -> dict[str, Tensor]:
        cond, other = ask(denoiser, asked, passes)
        arrays = stored_parts(cond, other, asked.scale, target)
        return {name: values[:, None, None] for name, values in arrays.items()}

    return parts
