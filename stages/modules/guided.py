"""Decoding both branches of guidance in one batch, whose rows take turns.

With 2 branches row 2i is conditional and row 2i + 1 unconditional; with 1 all are conditional.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.family import Branch, Branches, LinearOutput
from stages.guidance import guide
from stages.sampling import RolloutPolicy

Outputs = Tensor | tuple[LinearOutput, ...]
"""All logits [n, ..., C, V], or the heads that would give them."""


@dataclass(frozen=True)
class Draw:
    """Everything that drawing the codes of one timestep needs besides the predictions."""

    policy: RolloutPolicy
    rows: Tensor
    timestep: int
    cfg_scale: float
    branches: int

    def guided(self, logits: Tensor) -> Tensor:
        """Mix the branches of `logits` [b × branches, c, V] to [b, c, V] float32."""
        if self.branches == 1:
            return logits.float()
        cond, uncond = logits[0::2], logits[1::2]
        return guide(cond, uncond, self.cfg_scale)

    def codes(self, logits: Tensor, streams: slice) -> Tensor:
        """Draw codes [b, c] from guided logits [b, c, V] of the streams given."""
        return self.policy.draw(self.rows, self.timestep, logits, streams)


def split_branches(
    outputs: Sequence[Tensor | LinearOutput],
    hidden: Mapping[str, Sequence[Tensor]],
    branches: int,
) -> Branches:
    """Part the branches of predictions whose rows take turns: views, no copies."""
    whole = Branch(tuple(outputs), {group: tuple(parts) for group, parts in hidden.items()})
    uncond = whole.at(slice(1, None, 2)) if branches == 2 else None
    return Branches(whole.at(slice(0, None, branches)), uncond)


def mixed(outputs: Outputs, scale: float, branches: int) -> Outputs:
    """Mix the branches of predictions whose rows take turns: logits, or what the heads read."""
    if branches == 1:
        return outputs
    if isinstance(outputs, Tensor):
        return guide(outputs[0::2], outputs[1::2], scale)
    return tuple(
        replace(head, states=guide(head.states[0::2], head.states[1::2], scale)) for head in outputs
    )


@dataclass(frozen=True)
class Departure:
    """Which rows of a batch end, and which of the running ones take their places.

    Moving only as many rows as have ended is cheaper than copying all caches.
    """

    holes: Tensor
    """[m] int64: rows below `count` that ended."""
    movers: Tensor
    """[m] int64: running rows from `count` on."""
    count: int
    """Rows that still run."""

    @classmethod
    def of(cls, running: Tensor) -> Departure:
        """Plan it for `running` [b] bool; waits for the device."""
        count = int(running.sum())
        places = torch.arange(len(running), device=running.device)
        return cls(places[:count][~running[:count]], places[count:][running[count:]], count)

    def kept(self, values: Tensor) -> Tensor:
        """Values [count, ...] of the running rows, from those of all rows [b, ...]; a copy."""
        values = values.clone()
        values[self.holes] = values[self.movers]
        return values[: self.count]

    def of_branches(self, branches: int) -> Departure:
        """Return the same plan for rows of which each is there once per branch."""
        branch = torch.arange(branches, device=self.holes.device)
        return Departure(
            (self.holes[:, None] * branches + branch).flatten(),
            (self.movers[:, None] * branches + branch).flatten(),
            self.count * branches,
        )
