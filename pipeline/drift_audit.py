"""What `foretell inspect audit` does and says: whether a store is what its teacher predicts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import torch
from tqdm import tqdm

from pipeline.assembly import Assembly
from pipeline.config import Run
from pipeline.image_assembly import ImageAssembly
from pipeline.run_config import RunConfig, require_round
from stages.drift import GIVEN, AuditChoice, AuditedStore, PartDrift, StoreDrift
from stages.errors import UserError
from stages.interruption import StopRequest

UNITS = {
    "kl": "KL(stored ‖ recomputed), nats",
    "redrawn": "share of draws that become others",
    "squared_error": "squared error over mean square",
    "kept_ids": "kept ids: likeliest other id above the least likely kept one, nats",
    "logit_mean": "mean of the logits: difference beyond rounding, nats",
    "logit_std": "standard deviation of the logits: difference beyond rounding, nats",
    "level": "largest logit: difference beyond rounding, nats",
    "tail_draws": "draws from the tail: distance from their random numbers, share of its mass",
    "states": "hidden states: squared error over mean square",
}
"""Measure → what its numbers are."""


def audit_of(config: Run, round_name: str | None, choice: AuditChoice) -> AuditedStore:
    """Ask the teacher of a run, or of a round of it, again; raises `UserError` where it has none.

    Only the teacher is loaded, as stage one loads it, and nothing is written.
    """
    require_round(config.name, config.rounds, round_name)
    if choice.limit is not None and not 0 <= choice.limit < math.inf:
        raise UserError(f"--limit {choice.limit:g} must be a number of at least 0")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as its processes have
    if isinstance(config, RunConfig):
        return Assembly(config, StopRequest()).audit(round_name, choice, _bar)
    return ImageAssembly(config, StopRequest()).audit(choice, _bar)


def _bar(rollouts: int) -> tqdm[Any]:
    return tqdm(total=rollouts, unit="rollout", desc="audit", disable=None)


def audit_document(found: AuditedStore) -> dict[str, Any]:
    """Return what was found as JSON values."""
    further = [
        each.model_dump(mode="json") | _judgement(each.drift, each.limit) for each in found.further
    ]
    judged = _judgement(found.drift, found.limit) | {"ok": found.ok}
    return found.model_dump(mode="json") | judged | {"further": further}


def _judgement(drift: StoreDrift, limit: float) -> dict[str, Any]:
    return {
        "ok": drift.within(limit),
        "largest_mean": drift.largest_mean,
        "not_finite": drift.not_finite,
        "above": list(drift.above(limit)),
    }


def audit_text(found: AuditedStore) -> str:
    """Return what was found as a table for each measure, and the verdict last."""
    lines = [
        found.store,
        f"{found.rollouts:,} of {found.committed:,} rollouts asked for again, "
        f"{found.timesteps:,} timesteps (seed {found.seed})",
    ]
    for name, (stored, now) in found.differences.items():
        lines += [f"ANOTHER {name.upper()}", f"  of the store  {stored}", f"  asked now     {now}"]
    lines += _measured(found.drift, found.limit, found.limit_from)
    for each in found.further:
        lines += _measured(each.drift, each.limit, each.limit_from)
    return "\n".join([*lines, _verdict(found)])


def _measured(drift: StoreDrift, limit: float, origin: str) -> list[str]:
    """Return the table of a measure, and what it comes to beside its limit."""
    worst, above = drift.worst[0], drift.above(limit)
    lines = ["", UNITS[drift.measure], *_table(drift), ""]
    if drift.not_finite:
        lines.append(f"{drift.not_finite:,} predictions are NaN or infinite now")
    sign = "<=" if drift.largest_mean <= limit else ">"
    lines += [
        f"worst rollout  {worst.mean:.1e}  {worst.sample_id!r} variation {worst.variation}",
        f"largest mean   {drift.largest_mean:.1e} {sign} {limit:.1e}, the limit"
        + (f" ({GIVEN})" if origin == GIVEN else ":"),
    ]
    if origin != GIVEN:
        lines.append(fill(origin, initial_indent="  ", subsequent_indent="  "))
    if above:
        told = "ABOVE IT       " + ", ".join(above)
        lines.append(fill(told, subsequent_indent=" " * 15, break_long_words=False))
    return lines


def _verdict(found: AuditedStore) -> str:
    teacher = "this teacher" if found.teacher_matches else "this other teacher"
    holds = f"it holds what {teacher} predicts"
    return holds if found.ok else f"it does not hold what {teacher} predicts".upper()


def _table(drift: StoreDrift) -> list[str]:
    rows = [_header(drift), *(_row(part) for part in drift.parts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _header(drift: StoreDrift) -> Sequence[str]:
    name = {"squared_error": "level", "states": "head"}.get(drift.measure, "stream")
    likeliest = ("same likeliest",) if drift.measure == "kl" else ()
    return name, "predictions", "mean", "p99", "largest", *likeliest


def _row(part: PartDrift) -> Sequence[str]:
    name = part.name
    if part.part != "guided":
        name += f" {part.part}"
    if part.temperature != 1:
        name += f" at T={part.temperature:g}"
    agreement = () if part.agreement is None else (f"{part.agreement:.2%}",)
    numbers = (f"{value:.1e}" for value in (part.mean, part.p99, part.largest))
    return name, f"{part.predictions:,}", *numbers, *agreement
