"""Sizes and hashes of files.

XXH3-128: what these sums stand against is accident, not attack, and a file must be hashed about as
fast as memory is read (SHA-256 is ten times slower than that). A CRC-32C would be blind in part: a
Zarr file ends in an index and its CRC-32C, and the CRC-32C of all is the same for every such index.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from store.durable import Content, write_file
from store.errors import StoreError, explain_os_errors
from store.plain_file import open_plain
from store.schema import FileSum


def file_sum(content: Content) -> FileSum:
    """Size and hash of a file's content."""
    return FileSum(bytes=len(content), xxh3=xxhash.xxh3_128_hexdigest(content))


def write_summed(path: Path, parts: Iterable[Content]) -> FileSum:
    """Create a file from parts in order, sync it, and return its size and hash; raises OSError."""
    digest, size = xxhash.xxh3_128(), 0

    def counted() -> Iterator[Content]:
        nonlocal size
        for part in parts:
            digest.update(part)
            size += len(part)
            yield part

    write_file(path, counted())
    return FileSum(bytes=size, xxh3=digest.hexdigest())


def check_size(found: int, expected: FileSum, subject: str) -> None:
    """Refuse a file of another size; raises StoreError that begins with `subject`."""
    if found != expected.bytes:
        raise StoreError(f"{subject} has {found} bytes but must have {expected.bytes}")


def check_sum(content: Content, expected: FileSum, subject: str) -> None:
    """Refuse content of the right size with another hash; raises StoreError."""
    if xxhash.xxh3_128_hexdigest(content) != expected.xxh3:
        raise StoreError(f"{subject} was altered (its XXH3 differs)")


def read_summed(path: Path, expected: FileSum, subject: str) -> bytes:
    """Content of a file that must have this size and hash.

    Raises StoreError that begins with `subject`. The size is compared before anything is read, so
    a record that lies costs no memory.
    """
    with open_plain(path, subject) as file, explain_os_errors(f"read {path}"):
        check_size(os.fstat(file.fileno()).st_size, expected, subject)
        content = file.read()
    check_sum(content, expected, subject)
    return content
