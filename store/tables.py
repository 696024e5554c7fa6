"""Parquet as the store writes it: the same table gives the same bytes."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import StoreError, explain_os_errors
from store.schema import FileSum

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


def parse_table(content: bytes, source: str) -> pa.Table:
    """Table of a Parquet file; raises StoreError naming `source`."""
    try:
        return pq.read_table(pa.BufferReader(content), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{source} is no Parquet file ({error}): restore it from a copy"
        ) from error


def file_sum(content: bytes) -> FileSum:
    """Size and hash of a file's content."""
    return FileSum(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def read_summed(path: Path, expected: FileSum | None) -> bytes:
    """Content of a file whose size and hash the manifest gives; raises StoreError.

    The size is compared before anything is read, so a wrong manifest costs no memory.
    """
    if expected is None:
        raise StoreError(f"the manifest beside {path} does not list it: restore the manifest")
    with explain_os_errors(f"read {path}"):
        size = path.stat().st_size
        if size != expected.bytes:
            raise StoreError(
                f"{path} has {size} bytes, the manifest says {expected.bytes}: "
                "restore it from a copy"
            )
        content = path.read_bytes()
    if file_sum(content) != expected:
        raise StoreError(f"{path} was altered (SHA-256 differs): restore it from a copy")
    return content
