"""The weights of the output heads, which a `hidden` target needs beside its states."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from store.encoding import Array
from store.errors import StoreError, SystemFailure
from store.plain_file import open_plain
from store.schema import Manifest
from store.sums import check_size, read_summed

HEADS_FILE = "heads/heads.safetensors"

Heads = Mapping[str, Array]


def head_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Shapes by name: `GROUP.weight` [C_g, V, D] and `GROUP.bias` [C_g, V] for every head."""
    groups = [stream.group for stream in manifest.streams]
    shapes: dict[str, tuple[int, ...]] = {}
    for head in manifest.heads:
        rows = (groups.count(head.group), manifest.vocabulary)
        shapes[f"{head.group}.weight"] = (*rows, head.width)
        shapes[f"{head.group}.bias"] = rows
    return shapes


def check_heads(heads: Heads, manifest: Manifest, source: str) -> None:
    """Refuse heads that are not those of the manifest: all of them, float32.

    Raises StoreError that begins with `source`.
    """
    expected = head_shapes(manifest)
    if set(heads) != set(expected):
        raise StoreError(
            f"{source} hold {sorted(heads)} but the manifest calls for {sorted(expected)}: give "
            "weight and bias of every head, and none where the target is not `hidden`"
        )
    for name, shape in expected.items():
        found = heads[name]
        if found.shape != shape or found.dtype != np.float32:
            raise StoreError(
                f"{source}: {name!r} is {found.dtype} {found.shape} but must be float32 {shape}: "
                "correct the head, or its width in the manifest"
            )
        if (np.isnan(found) | (found == np.inf)).any():
            raise StoreError(f"{source}: {name!r} holds NaN or plus infinity: correct the head")


def heads_bytes(heads: Heads) -> bytes:
    """The safetensors file of heads: the same heads give the same bytes."""
    content: bytes = save({name: np.ascontiguousarray(heads[name]) for name in sorted(heads)})
    return content


def find_heads(path: Path, manifest: Manifest) -> None:
    """Refuse a store whose file of heads is missing or of another size; raises StoreError."""
    listed = HEADS_FILE in manifest.files
    if listed != bool(manifest.heads):
        raise StoreError(
            f"the manifest beside {path.parent} names {len(manifest.heads)} heads and "
            f"{'lists' if listed else 'does not list'} {HEADS_FILE}: restore the manifest"
        )
    if not listed:
        return
    try:
        with open_plain(path, str(path)) as file:
            check_size(os.fstat(file.fileno()).st_size, manifest.files[HEADS_FILE], str(path))
    except SystemFailure:
        raise
    except StoreError as error:
        raise StoreError(f"{error}: restore it from a copy") from error


def read_heads(path: Path, manifest: Manifest) -> dict[str, Array]:
    """The heads of a store, verified, read-only; empty where it has none. Raises StoreError."""
    if not manifest.heads:
        return {}
    try:
        content = read_summed(path, manifest.files[HEADS_FILE], str(path))
    except SystemFailure:
        raise
    except StoreError as error:
        raise StoreError(f"{error}: restore it from a copy") from error
    try:
        heads: dict[str, Array] = load(content)
    except SafetensorError as error:
        raise StoreError(f"{path} is no safetensors file ({error}): restore it") from error
    check_heads(heads, manifest, str(path))
    for head in heads.values():
        head.setflags(write=False)
    return heads
