"""rejected.parquet of a store: samples that its plan leaves out, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from store.errors import StoreError
from store.schema import Manifest
from store.tables import read_table

Rejected = Sequence[tuple[str, str]]
"""Pairs of a sample_id and the reason."""

COLUMNS = pa.schema([("sample_id", pa.string()), ("reason", pa.string())])


def rejected_table(rejected: Rejected) -> pa.Table:
    """Table of the samples that are left out, in their order."""
    rows = [dict(zip(COLUMNS.names, pair, strict=True)) for pair in rejected]
    return pa.Table.from_pylist(rows, COLUMNS)


def read_rejected(path: Path, manifest: Manifest) -> Rejected:
    """Read what a store leaves out; nothing where there is no such file. Raises StoreError."""
    if path.name not in manifest.files:
        return ()
    table = read_table(path, manifest)
    if not table.schema.equals(COLUMNS):
        raise StoreError(
            f"{path} has the columns {table.schema.names}, not {COLUMNS.names} of text: restore it "
            "from a copy"
        )
    columns = (table[name].to_pylist() for name in COLUMNS.names)
    return tuple(zip(*columns, strict=True))
