"""A file mapped into memory, and how to tell that it has not changed since."""

from __future__ import annotations

import os
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple, Self

from store.errors import StoreError, explain_os_errors


class Identity(NamedTuple):
    """What changes when a file is replaced, cut, or written to."""

    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        """Identity of the file that `os.stat` found."""
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True)
class MappedFile:
    """A file of at least one byte, read through the page cache and never written.

    Who keeps a view of `content` keeps the file open: a file costs a descriptor until the last
    view is gone.
    """

    path: str
    identity: Identity
    content: mmap

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a plain file; raises StoreError that begins with `it` when there is none."""
        if path.is_symlink() or not path.is_file():
            raise StoreError("it is missing")
        with explain_os_errors(f"read {path}"), path.open("rb", buffering=0) as file:
            identity = Identity.of(os.fstat(file.fileno()))
            if not identity.bytes:
                raise StoreError("it is empty")
            return cls(str(path), identity, mmap(file.fileno(), 0, access=ACCESS_READ))

    def unchanged(self) -> bool:
        """Whether the same file still lies there, not written to since it was mapped."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        inode, size, modified_ns, changed_ns = self.identity
        return (
            found.st_mtime_ns == modified_ns
            and found.st_ctime_ns == changed_ns
            and found.st_size == size
            and found.st_ino == inode
        )
