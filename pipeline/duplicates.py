"""Rollouts and samples of a store that are there more than once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from store import PredictionStore, Rollout
from store.encoding import COLUMN, Array

Document = dict[str, Any]

MOST_GROUPS = 5
MOST_NAMES = 4
"""Groups, and names of each, that are told."""


def content_hash(rollout: Rollout) -> bytes:
    """Hash what makes a rollout that rollout: its codes; without any its columns, or all of it."""
    arrays = rollout.arrays
    names = [name for name in arrays if name == "codes" or name.startswith(COLUMN)] or list(arrays)
    digest = xxhash.xxh3_128()
    for name in sorted(names):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.digest()


def equal_groups(named: Iterable[tuple[str, Hashable]]) -> Document:
    """Return how many names have an equal value with another one, and the first of them.

    `groups` of equal ones, `members` of all these groups, and `examples`: names by group.
    """
    groups: dict[Hashable, list[str]] = {}
    for name, value in named:
        groups.setdefault(value, []).append(name)
    equal = [names for names in groups.values() if len(names) > 1]
    return {
        "groups": len(equal),
        "members": sum(map(len, equal)),
        "examples": [names[:MOST_NAMES] for names in equal[:MOST_GROUPS]],
    }


def equal_conditions(store: PredictionStore) -> Document:
    """Return which samples have equal conditions under different ids; see `equal_groups`."""
    table = store.samples
    columns = [_numbered(table[name]) for name in store.manifest.conditions]
    if not columns:
        return equal_groups([])
    rows = map(bytes, np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8))
    return equal_groups(zip(table["sample_id"].to_pylist(), rows, strict=True))


def _numbered(column: pa.ChunkedArray) -> Array:
    """[rows] int64: equal numbers for equal values of a column of texts, numbers or lists."""
    values = column.combine_chunks()
    if pa.types.is_nested(values.type):
        hashes = [xxhash.xxh3_64_intdigest(str(value.as_py()).encode()) for value in values]
        return np.array(hashes, np.uint64).view(np.int64)
    numbers = values.dictionary_encode().indices.fill_null(-1)
    return np.asarray(numbers.to_numpy(zero_copy_only=False), np.int64)
