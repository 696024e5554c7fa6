"""What a denoiser is asked of, made on the host: noised latents, times, and encoded conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stages.diffusion.draws import UNCONDITIONAL_ROW, Draw
from stages.diffusion.facts import SIZES
from stages.diffusion.parts import Asked, scale_of
from stages.diffusion.record_config import Contrast

CACHED_ROWS = 64
"""Rows of a side table that are kept: those of one sample follow on each other."""

Tensors = Mapping[str, np.ndarray]


class Rows(Protocol):
    """A side table, of a store or of a dataset: row → its tensors by name."""

    def __getitem__(self, row: int, /) -> Tensors: ...


@dataclass(frozen=True)
class HostAsked:
    """Rows that a denoiser is asked of, before they are moved to its device."""

    x: np.ndarray
    """[b, *shape] float32."""
    t: np.ndarray
    """[b] float64."""
    conditions: Tensors
    """[u, ...] distinct conditions; the last one stands for none where it is asked for."""
    condition: np.ndarray
    """[b] int64: which of them each row has."""
    sizes: Tensors
    """[b, ...]."""
    unconditional: bool
    scale: np.ndarray
    """[b] float32."""

    def to(self, device: torch.device) -> Asked:
        """Move the rows to a device, which is not waited for."""
        distinct = {name: moved(values, device) for name, values in self.conditions.items()}
        sizes = {name: moved(values, device) for name, values in self.sizes.items()}
        place = moved(self.condition, device)
        none = None
        if self.unconditional:
            none = {name: _repeated(each[-1], len(self.x)) for name, each in distinct.items()}
            none |= sizes
        return Asked(
            x=moved(self.x, device),
            t=moved(self.t, device),
            conditions={name: each[place] for name, each in distinct.items()} | sizes,
            unconditional=none,
            scale=moved(self.scale, device),
        )


def moved(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; from page-locked memory, so that the copy is not waited for."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _repeated(values: Tensor, count: int) -> Tensor:
    return values.expand(count, *values.shape)


class ConditionRows:
    """Encoded conditions of drawn variations, from the side tables of a dataset or a store."""

    def __init__(self, latents: Rows, conditions: Rows | None) -> None:
        """Take the tables; there are no conditions of an unconditional dataset."""
        self.latent = lru_cache(CACHED_ROWS)(latents.__getitem__)
        self._conditions = None
        if conditions is not None:
            self._conditions = lru_cache(CACHED_ROWS)(conditions.__getitem__)

    def asked(
        self,
        x: np.ndarray,
        t: np.ndarray,
        draws: Sequence[Draw],
        scale: np.ndarray,
        *,
        unconditional: bool,
    ) -> HostAsked:
        """Return rows `x` [b, *shape] at `t` [b] with the conditions of `draws`, one of each row.

        With `unconditional` the condition that stands for none comes along.
        """
        numbers = list(dict.fromkeys(draw.condition for draw in draws))
        place = {number: index for index, number in enumerate(numbers)}
        wanted = numbers + [UNCONDITIONAL_ROW] * unconditional
        table = self._conditions
        rows = [] if table is None else [table(number) for number in wanted]
        sizes = [{n: v for n, v in self.latent(d.latent).items() if n == SIZES} for d in draws]
        return HostAsked(
            x=x,
            t=t,
            conditions=_stacked(rows),
            condition=np.array([place[draw.condition] for draw in draws]),
            sizes=_stacked(sizes),
            unconditional=unconditional,
            scale=scale,
        )


@dataclass(frozen=True)
class GuidedRows:
    """Rows with their conditions and the guidance scales of their targets."""

    conditions: ConditionRows
    contrast: Contrast
    scale: float
    """Of a teacher's target."""
    unconditional: bool
    """Whether the condition that stands for none comes along."""

    def latent(self, draw: Draw) -> np.ndarray:
        """Return the clean latent [*shape] float16 of a variation."""
        return self.conditions.latent(draw.latent)["latent"]

    def asked(self, x: np.ndarray, t: np.ndarray, draws: Sequence[Draw]) -> HostAsked:
        """Return rows `x` [b, *shape] at `t` [b], one of each of `draws`."""
        scales = [scale_of(draw.target, self.contrast, self.scale) for draw in draws]
        scale = np.array(scales, np.float32)
        return self.conditions.asked(x, t, draws, scale, unconditional=self.unconditional)


def _stacked(rows: Sequence[Tensors]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in (rows[0] if rows else ())}
