"""What `foretell gc` says."""

from __future__ import annotations

from collections.abc import Sequence

from store.garbage import Kept, Leftover

UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


def garbage_text(found: Sequence[Leftover]) -> str:
    """Return what lies in tmp/, a line for each entry."""
    if not found:
        return "tmp/ is empty: nothing to delete"
    lines = [
        f"{_named(entry.name)}: {entry.files} files, {entry.bytes:,} bytes, last written "
        f"{_age(entry.age_s)} ago"
        for entry in found
    ]
    return "\n".join([*lines, f"{sum(entry.bytes for entry in found):,} bytes in all"])


def deletion_text(found: Sequence[Leftover], kept: Sequence[Kept], deleted: bool) -> str:
    """Return what became of what was found."""
    if not found:
        return "no shard was touched"
    if not deleted:
        return "nothing was deleted"
    lines = [f"{_named(entry.name)} is still there: {entry.reason}" for entry in kept]
    return "\n".join([*lines, f"{len(found) - len(kept)} of {len(found)} deleted"])


def _named(name: str) -> str:
    """Names of tmp/ hold no slash; others are of object storage, and say where they lie."""
    return repr(name) if "/" in name or ":" in name else f"tmp/{name!r}"


def _age(seconds: float) -> str:
    unit, size = next((u for u in UNITS if seconds >= 2 * u[1]), UNITS[-1])
    return f"{seconds / size:.0f} {unit}"
