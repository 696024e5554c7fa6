"""Rows along guided trajectories: every state is where the rounded predictions before it lead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stages.diffusion.answers import Answer, Ask, Cell
from stages.diffusion.asked_rows import GuidedRows
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.draws import Draw
from stages.diffusion.facts import END, FAILED
from stages.diffusion.forward_rows import HostRows, noise_of
from stages.diffusion.parts import Asked, Passes, ask, guided_value, stored_parts
from stages.diffusion.record_config import TrajectoryRows
from stages.diffusion.schedule import Schedule
from stages.diffusion.solver import trajectory
from store.encoding import COLUMN
from store.schema import Dense

START_SLOT = 0
"""Slot whose noise a trajectory starts from."""
STATES = f"{COLUMN}x_t"
"""Array of the states, float16."""


def kept_steps(rows: TrajectoryRows) -> list[int]:
    """Return the steps whose states are stored, and last the end."""
    kept = range(rows.steps) if rows.keep is None else rows.keep
    return [*kept, rows.steps]


class TrajectoryShard:
    """The trajectories of a shard, in the order of its keys: each is asked for as one."""

    def __init__(
        self,
        draws: Sequence[Draw],
        rows: TrajectoryRows,
        schedule: Schedule,
        guided: GuidedRows,
        seed: int,
    ) -> None:
        """Take the variations; the states are those of one solver."""
        self._draws, self._guided, self._seed = draws, guided, seed
        kept = kept_steps(rows)
        self.each = len(kept)
        """Rows of a rollout."""
        self._t = schedule.solver_times(rows.steps)[kept]
        self._alpha, self._sigma = schedule.at(self._t)

    def __len__(self) -> int:
        """Trajectories."""
        return len(self._draws)

    def read(self, span: range) -> HostRows:
        """Return some trajectories of the shard: their start noise, and columns of every state."""
        draws = [self._draws[place] for place in span]
        shape = self._guided.latent(draws[0]).shape
        noise = np.stack([noise_of(self._seed, draw, START_SLOT, shape) for draw in draws])
        columns = {"t": self._t, "alpha": self._alpha, "sigma": self._sigma}
        return HostRows(
            asked=self._guided.asked(noise, np.full(len(draws), self._t[0]), draws),
            cells=[[Cell(*draw.key, slot) for slot in range(self.each)] for draw in draws],
            columns={
                f"{COLUMN}{name}": np.tile(values, (len(draws), 1))
                for name, values in columns.items()
            },
        )


def trajectory_ask(
    denoiser: Denoiser, passes: Passes, target: Dense, rows: TrajectoryRows, schedule: Schedule
) -> Ask:
    """Return what asks for the states and stored parts [b, r, 1, *shape] along trajectories.

    A state is rounded to float16 before the model sees it, and the next one is computed from the
    stored parts as they are rounded, so that a store can be replayed without the model. Of the end
    the parts are zeros.
    """
    times, kept = schedule.solver_times(rows.steps), set(kept_steps(rows))

    def states(asked: Asked) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            at = Asked(x, t, asked.conditions, asked.unconditional, asked.scale)
            parts.update(stored_parts(*ask(denoiser, at, passes), asked.scale, target))
            return guided_value(parts, asked.scale)

        found: dict[str, list[Tensor]] = {}
        for state in trajectory(predict, asked.x, times, schedule, torch.float16):
            if state.prediction is None:
                parts = {name: torch.zeros_like(values) for name, values in parts.items()}
            if state.step in kept:
                for name, values in {STATES: state.x.half(), **parts}.items():
                    found.setdefault(name, []).append(values)
        return {name: torch.stack(values, 1).unsqueeze(2) for name, values in found.items()}

    return states


def ended(answer: Answer) -> np.ndarray:
    """Return the status [b, r] of the rows of trajectories, whose last ones predict nothing."""
    status = answer.status.copy()
    status[:, -1] = np.where(status[:, -1] == FAILED, FAILED, END)
    return status
