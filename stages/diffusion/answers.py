"""What a denoiser answers: copied to the host while it goes on, and repeated where it failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.capture import HostArrays
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.facts import FAILED, OK, REPEATED
from stages.diffusion.full_precision import full_precision
from stages.diffusion.parts import Asked

logger = logging.getLogger(__name__)

LISTED = 5
"""Rows that a message names, at most."""
FINITE = "finite"
"""Array of flags that travels with those of the store."""

Ask = Callable[[Asked], Mapping[str, Tensor]]
"""Rows [b, ...] → arrays [b, r, ...] of a store by name, on the device, r rows of each."""


@dataclass(frozen=True)
class Cell:
    """A row by its key, for messages."""

    sample_id: str
    variation: int
    slot: int

    def __str__(self) -> str:
        return f"{self.sample_id!r} variation {self.variation} slot {self.slot}"


class Answer(NamedTuple):
    """What was predicted of rows, on the host."""

    arrays: dict[str, np.ndarray]
    """[b, r, ...]; zeros where the status is FAILED."""
    status: np.ndarray
    """[b, r] uint8: OK, REPEATED or FAILED."""


class InFlight(NamedTuple):
    """An answer on its way to the host."""

    asked: Asked
    cells: Sequence[Sequence[Cell]]
    """[b][r]."""
    arrays: HostArrays


class Teacher:
    """One model that is asked; what it answers is waited for after it was asked again."""

    def __init__(self, denoiser: Denoiser, ask: Ask, *, precision: str, quantized: bool) -> None:
        """`precision` is what it computes in, which a quantized one cannot leave."""
        self._denoiser, self._ask = denoiser, ask
        self._precision, self._quantized = precision, quantized
        self._has_room = True
        """Whether nothing is known against holding the model in float32."""

    def begin(self, asked: Asked, cells: Sequence[Sequence[Cell]]) -> InFlight:
        """Ask for rows and start to copy the answer; the device is not waited for."""
        return InFlight(asked, cells, HostArrays.of(_with_flags(self._ask(asked))))

    def finish(self, flight: InFlight) -> Answer:
        """Wait for an answer; rows that are not finite are asked for again in float32.

        Numbers beyond what the store's type holds are not finite either. What stays so, or what the
        device has no room to repeat, is zeros.
        """
        arrays = flight.arrays.arrays()
        finite = arrays.pop(FINITE).astype(bool)
        status = np.where(finite, OK, FAILED).astype(np.uint8)
        lost = np.flatnonzero(~finite.all(1))
        if not lost.size:
            return Answer(arrays, status)
        again = self._repeated(flight.asked, lost)
        if again is not None:
            finite[lost] = again.pop(FINITE).astype(bool)
            for name, values in again.items():
                arrays[name][lost] = values
            status[lost] = np.where(finite[lost], REPEATED, FAILED)
        for values in arrays.values():
            values[~finite] = 0
        self._tell(flight.cells, lost, status)
        return Answer(arrays, status)

    def _repeated(self, asked: Asked, lost: np.ndarray) -> dict[str, np.ndarray] | None:
        """What is answered in float32, where that is something else and there is room for it."""
        if self._precision == "fp32" or self._quantized or not self._has_room:
            return None
        index = torch.from_numpy(lost).to(asked.x.device)
        try:
            with full_precision(self._denoiser):
                return HostArrays.of(_with_flags(self._ask(asked.rows(index)))).arrays()
        except torch.OutOfMemoryError:
            self._has_room = False  # nor will there be for the next row
            return None

    def _tell(self, cells: Sequence[Sequence[Cell]], lost: np.ndarray, status: np.ndarray) -> None:
        failed = [c for row in lost for c, s in zip(cells[row], status[row], strict=True)
                  if s == FAILED]  # fmt: skip
        repeated = [cells[row][0] for row in lost if (status[row] == REPEATED).all()]
        if repeated:
            logger.warning(
                "not finite in %s, and so predicted in fp32: %s", self._precision, listed(repeated)
            )
        if not failed:
            return
        tried = f"in {self._precision}"
        if self._quantized:
            tried += ", and quantized weights cannot be held in fp32 to try again"
        elif not self._has_room:
            tried += ", and the device has no room for the model in fp32 to try again"
        elif self._precision != "fp32":
            tried += " nor in fp32"
        logger.warning(
            "the prediction is not finite %s: %s; stored as failed, which training leaves out",
            tried,
            listed(failed),
        )


def _with_flags(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flags = [values.isfinite().flatten(2).all(-1) for values in arrays.values()]
    return dict(arrays) | {FINITE: torch.stack(flags).all(0).to(torch.uint8)}


def listed(cells: Sequence[Cell]) -> str:
    """Name rows by their keys, the first few of many."""
    shown = ", ".join(map(str, cells[:LISTED]))
    return shown if len(cells) <= LISTED else f"{shown} and {len(cells) - LISTED} more"
