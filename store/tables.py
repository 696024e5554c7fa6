"""Parquet as the store writes it: the same table gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import StoreError, SystemFailure
from store.schema import Manifest
from store.sums import read_summed

ROW_GROUP_ROWS = 65536
PLAIN_BYTES = 2**28
MOST_TIMES = 4096
"""A table of more than `PLAIN_BYTES` has at most so many times the bytes of its file: a column that
repeats itself takes a thousandth, and what takes less was made to fill the memory."""


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
    file = _opened(content, source)
    with _parsing(source):
        # Not read_table: it waits for a pool of threads, even where it is told to use none.
        return file.read(columns, use_threads=False)


def open_table(path: Path, manifest: Manifest) -> pq.ParquetFile:
    """A Parquet file beside the manifest, whose sum is right; raises StoreError."""
    return _opened(_read_listed(path, manifest), str(path))


def column_blocks(file: pq.ParquetFile, column: str, source: str) -> Iterator[pa.Array]:
    """A column, one group of rows after the other; raises StoreError naming `source`."""
    with _parsing(source):
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, [column], use_threads=False)[column].chunks


def read_table(path: Path, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
    """Table of a Parquet file beside the manifest, or some columns of it; raises StoreError."""
    file = open_table(path, manifest)
    with _parsing(str(path)):
        return file.read(columns, use_threads=False)


def _opened(content: bytes, source: str) -> pq.ParquetFile:
    """Open a file, of which nothing is decoded; raises StoreError for one that is far too large."""
    with _parsing(source):
        file = pq.ParquetFile(pa.BufferReader(content))
    plain = _plain_bytes(file.metadata)
    if plain > max(PLAIN_BYTES, MOST_TIMES * len(content)):
        raise StoreError(
            f"{source} has {len(content):,} bytes and would take {plain:,} in memory, which no "
            "table of a store does: restore it from a copy"
        )
    return file


def _plain_bytes(metadata: pq.FileMetaData) -> int:
    """Bytes of all values without compression, where a text counts once, as a rule."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = [group.column(n) for group in groups for n in range(group.num_columns)]
    return sum(8 * column.num_values + column.total_uncompressed_size for column in columns)


def _read_listed(path: Path, manifest: Manifest) -> bytes:
    if path.name not in manifest.files:
        raise StoreError(f"the manifest beside {path} does not list it: restore the manifest")
    try:
        return read_summed(path, manifest.files[path.name], str(path))
    except SystemFailure:
        raise
    except StoreError as error:
        raise StoreError(f"{error}: restore it from a copy") from error


@contextmanager
def _parsing(source: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{source} is no Parquet file ({error}): restore it from a copy"
        ) from error
