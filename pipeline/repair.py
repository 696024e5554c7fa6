"""What `foretell verify --repair` says."""

from __future__ import annotations

from collections.abc import Sequence

from store.repair import Repaired, unrepairable
from store.verify import Verification


def repair_text(found: Verification, damaged: Sequence[int], repaired: Sequence[Repaired]) -> str:
    """Return what became of the damaged shards, and what no repair can help, a line for each."""
    lines = [f"shard {entry.shard}: taken out, it lies in {entry.folder}" for entry in repaired]
    taken = {entry.shard for entry in repaired}
    lines += [f"shard {shard}: left as it is" for shard in damaged if shard not in taken]
    lines += [
        f"{'store' if d.shard is None else f'shard {d.shard}'}: {d.file}: cannot be repaired from "
        f"the store: {'it could not be read' if d.unreadable else 'no rollout makes it again'}"
        for d in unrepairable(found)
    ]
    if repaired:
        lines.append(
            f"{len(repaired)} {'shard is' if len(repaired) == 1 else 'shards are'} planned again: "
            "`foretell rollout` makes what was taken out, with the same bytes; `foretell gc` "
            "deletes what was damaged"
        )
    return "\n".join(lines or ["there is nothing to repair"])
