"""Sizes and hashes of files.

SHA-256 rather than a CRC: the chunks of a Zarr file end in their own CRC-32C, and the CRC-32C of
anything that ends so is a constant, so that two files exchanged for one another would not show.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from store.errors import StoreError, explain_os_errors
from store.schema import FileSum


def file_sum(content: bytes) -> FileSum:
    """Size and hash of a file's content."""
    return FileSum(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def read_summed(path: Path, expected: FileSum, subject: str) -> bytes:
    """Content of a file that must have this size and hash.

    Raises StoreError that begins with `subject`. The size is compared before anything is read, so
    a record that lies costs no memory. A link is refused: it may lead out of the store.
    """
    if path.is_symlink() or not path.is_file():
        raise StoreError(f"{subject} is missing")
    with explain_os_errors(f"read {path}"):
        size = path.stat().st_size
        if size != expected.bytes:
            raise StoreError(f"{subject} has {size} bytes but must have {expected.bytes}")
        content = path.read_bytes()
    if file_sum(content) != expected:
        raise StoreError(f"{subject} was altered (its SHA-256 differs)")
    return content
