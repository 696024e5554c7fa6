"""Nested JSON values by dotted names, such as `sampler.top_k`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def dotted(value: Any) -> dict[str, Any]:
    """Return the values of nested objects by dotted names; lists of objects by their places.

    Lists of plain values, and empty lists and objects, are values themselves.
    """
    return dict(_leaves("", value))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        yield name, value
        return
    for key, part in value.items():
        yield from _leaves(f"{name}.{key}" if name else str(key), part)
