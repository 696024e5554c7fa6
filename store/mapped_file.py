"""A file mapped into memory, and how to tell that it has not changed since.

Mapped through libc, since neither Python nor pyarrow does what a reader of thousands of shards
needs: Python's `mmap` keeps a descriptor for as long as anything views the file, and pyarrow maps
what lies at a path by then, and asks for all of it to be read ahead.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import pyarrow as pa

from store.errors import StoreError, explain_os_errors
from store.plain_file import open_plain

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
MAP_FAILED = ctypes.c_void_p(-1).value


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

    It stays mapped until the last view of `content` is gone, and needs no descriptor for that.
    Who cuts the file meanwhile lets views read zeros up to the end of its last page, and ends the
    process (SIGBUS) when they read beyond: look whether it is `unchanged`.
    """

    path: str
    identity: Identity
    content: memoryview
    """[bytes] uint8, read-only."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a plain file.

        Raises StoreError that begins with `it` when there is none, SystemFailure.
        """
        with open_plain(path, "it") as file, explain_os_errors(f"read {path}"):
            identity = Identity.of(os.fstat(file.fileno()))
            if not identity.bytes:
                raise StoreError("it is empty")
            return cls(str(path), identity, _mapped(file.fileno(), identity.bytes))

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


class _Owner:
    """What every view of a mapping keeps alive."""


def _mapped(descriptor: int, size: int) -> memoryview:
    """All bytes of an open file, unmapped when nothing views them any more; raises OSError."""
    address = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    owner = _Owner()
    # Not at exit: arrays of other threads may still be read while the interpreter ends.
    weakref.finalize(owner, LIBC.munmap, address, size).atexit = False
    # Of a buffer of Arrow's no array can be made writable; to write there would end the process.
    return memoryview(pa.foreign_buffer(address, size, owner)).cast("B")
