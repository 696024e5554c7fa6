"""Parquet as the store writes it: the same table gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import StoreError, SystemFailure
from store.schema import Manifest
from store.sums import read_summed

ROW_GROUP_ROWS = 65536


def table_bytes(table: pa.Table) -> bytes:
    """Parquet file of a table, without the metadata that pandas and others attach to a schema."""
    sink = BytesIO()
    pq.write_table(
        table.replace_schema_metadata(None).combine_chunks(),
        sink,
        version="2.6",
        compression="zstd",
        compression_level=3,
        row_group_size=ROW_GROUP_ROWS,
        data_page_version="1.0",
        write_page_checksum=True,
    )
    return sink.getvalue()


def parse_table(content: bytes, source: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Table of a Parquet file, or some columns of it; raises StoreError naming `source`."""
    try:
        # Not read_table: it waits for a pool of threads, even where it is told to use none.
        return pq.ParquetFile(pa.BufferReader(content)).read(columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{source} is no Parquet file ({error}): restore it from a copy"
        ) from error


def read_table(path: Path, manifest: Manifest) -> pa.Table:
    """Table of a Parquet file beside the manifest, which gives its sum; raises StoreError."""
    if path.name not in manifest.files:
        raise StoreError(f"the manifest beside {path} does not list it: restore the manifest")
    try:
        content = read_summed(path, manifest.files[path.name], str(path))
    except SystemFailure:
        raise
    except StoreError as error:
        raise StoreError(f"{error}: restore it from a copy") from error
    return parse_table(content, str(path))
