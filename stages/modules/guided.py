"""Decoding both branches of guidance in one batch, whose rows take turns.

With 2 branches row 2i is conditional and row 2i + 1 unconditional; with 1 all are conditional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from stages.family import Branch, Branches, LinearOutput, Scores, Step
from stages.guidance import guide
from stages.modules.attention import Departure
from stages.sampling import RolloutPolicy


class DecodingState(Protocol):
    """What decoding remembers of every row."""

    def drop(self, departure: Departure) -> None:
        """Keep the rows that still run."""


State = TypeVar("State", bound=DecodingState)


class Drawn(NamedTuple):
    """What was drawn at one timestep."""

    codes: Tensor
    """[b, C] int64."""
    logits: Tensor
    """[b, C, V] float32, guided."""
    branches: Branches
    """What they were mixed from."""


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


def decode(
    begin: Tensor,
    state: State,
    policy: RolloutPolicy,
    cfg_scale: float,
    branches: int,
    *,
    timesteps: int,
    step: Callable[[Tensor, State], Tensor],
    draw: Callable[[Tensor, Draw], Drawn],
    end: Callable[[Tensor, int, Tensor, Tensor], Tensor],
) -> Iterator[Step]:
    """Generate one timestep after the other; rows that end leave the batch and the caches.

    `begin` [b, S] stands before the first timestep. `step` decodes the output [b × branches, E] of
    a timestep from the codes before it, [b × branches, S]; `draw` draws its codes [b, C], of which
    the first S go on; `end` is given rows, timestep, codes and guided logits and says which rows
    end there, [b] bool. The order of `Step.rows` changes as rows end.
    """
    rows = torch.arange(len(begin), device=begin.device)
    previous = begin
    for timestep in range(timesteps):
        hidden = step(previous.repeat_interleave(branches, 0), state)
        drawn = draw(hidden, Draw(policy, rows, timestep, cfg_scale, branches))
        running = ~end(rows, timestep, drawn.codes, drawn.logits)
        yield Step(rows, timestep, drawn.codes, drawn.logits, drawn.branches)
        previous = drawn.codes[:, : begin.shape[1]]
        if not running.all():
            departure = Departure.of(running)
            state.drop(departure.of_branches(branches))
            rows, previous = departure.kept(rows), departure.kept(previous)
        if len(rows) == 0:
            return


def split_branches(
    outputs: Sequence[Tensor | LinearOutput],
    hidden: Mapping[str, Sequence[Tensor]],
    branches: int,
) -> Branches:
    """Part the branches of predictions whose rows take turns: views, no copies.

    `outputs` and `hidden` are parts [n, ..., c, V] and [n, ..., h, D], as `Branch` has them.
    """
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


def scores(
    heads: tuple[LinearOutput, ...],
    hidden: Mapping[str, Tensor],
    *,
    cfg_scale: float,
    branches: int,
    linear: bool,
) -> Scores:
    """Return the scores of one parallel pass, whose rows take turns where there are two branches.

    `heads` are those of all groups in the order of the streams, on the states `hidden`
    [n, T, h, D]; with `linear` they are left to who reads the scores.
    """
    outputs: Outputs = heads if linear else Scores(heads).logits
    parts = [outputs] if isinstance(outputs, Tensor) else outputs
    split = split_branches(parts, {group: [states] for group, states in hidden.items()}, branches)
    return Scores(mixed(outputs, cfg_scale, branches), branches=split)
