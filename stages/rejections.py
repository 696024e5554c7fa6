"""What a dataset left out and why, also as a table that a person can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

EXAMPLES = 3
"""Sample ids that are named per kind of reason."""

WIDTH = 40
"""Characters of a sample id that are shown."""


class Rejection(Exception):
    """Why a row of a source is left out: a kind, a colon, and what was found."""


def rejection_table(rejected: Sequence[Mapping[str, str]]) -> str:
    """Count rows of `sample_id` and `reason` by kind, the most frequent first, with examples."""
    ids: dict[str, list[str]] = {}
    for row in rejected:
        ids.setdefault(kind_of(row["reason"]), []).append(row["sample_id"])
    kinds = sorted(ids, key=lambda kind: (-len(ids[kind]), kind))
    width = max(map(len, kinds), default=0)
    return "\n".join(f"{kind:<{width}}  {len(ids[kind]):>7}  {_named(ids[kind])}" for kind in kinds)


def kind_of(reason: str) -> str:
    """The kind of a reason, which stands before its colon."""
    return reason.split(":", maxsplit=1)[0]


def _named(ids: Sequence[str]) -> str:
    shown = [name if len(name) <= WIDTH else f"{name[: WIDTH - 1]}…" for name in ids[:EXAMPLES]]
    return ", ".join(repr(name) for name in shown) + ", …" * (len(ids) > EXAMPLES)
