"""Rows of a store at noised images: what the model is asked, and what is stored beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stages.diffusion.answers import Ask, Cell
from stages.diffusion.asked_rows import GuidedRows, HostAsked
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.draws import Draw
from stages.diffusion.noise import checksum, noised, row_noise
from stages.diffusion.parts import Asked, Passes, ask, stored_parts
from stages.diffusion.record_config import ForwardRows
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
        guided: GuidedRows,
        seed: int,
    ) -> None:
        """Draw the times of every variation."""
        self._draws, self._rows, self._guided, self._seed = draws, rows, guided, seed
        self.each = rows.slots
        """Rows of a rollout."""
        times = [schedule.draw(rows.timesteps, rows.slots, *_key(seed, draw)) for draw in draws]
        self._t = np.concatenate(times)
        self._alpha, self._sigma = schedule.at(self._t)

    def __len__(self) -> int:
        """Rows that are asked for."""
        return len(self._t)

    def read(self, span: range) -> HostRows:
        """Return some rows of the shard."""
        places = [divmod(row, self._rows.slots) for row in span]
        asked = [(self._draws[place], slot) for place, slot in places]
        draws = [draw for draw, _ in asked]
        at = slice(span.start, span.stop)
        t, alpha, sigma = self._t[at], self._alpha[at], self._sigma[at]
        columns = {"t": t, "alpha": alpha, "sigma": sigma}
        latents = [self._guided.latent(draw) for draw in draws]
        rows = zip(asked, latents, strict=True)
        noise = np.stack([noise_of(self._seed, *row, x0.shape) for row, x0 in rows])
        if self._rows.store_noise:
            columns["noise"] = noise.astype(np.float16)[:, None]
            noise = columns["noise"][:, 0].astype(np.float32)
        x = np.stack([noised(*row) for row in zip(latents, noise, alpha, sigma, strict=True)])
        columns |= checksums(x)
        return HostRows(
            asked=self._guided.asked(x, t, draws),
            cells=[[Cell(*draw.key, slot)] for draw, slot in asked],
            columns={f"{COLUMN}{name}": values[:, None] for name, values in columns.items()},
        )


def noise_of(seed: int, draw: Draw, slot: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the noise [*shape] float32 of a row."""
    return row_noise(*_key(seed, draw), slot, shape)


def _key(seed: int, draw: Draw) -> tuple[int, str, int, int]:
    return seed, draw.key[0], draw.image_variation, draw.text_variation


def checksums(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns `x_t_crc` [n] uint32 and `x_t_sum` [n] float64 of latents [n, *shape]."""
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
