"""Opening what must be a plain file, whatever lies at its path."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path

from store.errors import StoreError, explain_os_errors

NO_FILE = {
    errno.ENOENT: "is missing",
    errno.ENOTDIR: "is missing",
    errno.ELOOP: "is a symbolic link, not a file",
    errno.ENXIO: "is no plain file",  # a socket
}
"""What lies at the path, by the error of opening it; other errors say nothing about that."""


def open_plain(path: Path, subject: str) -> FileIO:
    """Open a file to read it, unbuffered.

    A link is refused, for it may lead out of the store; a pipe is refused rather than waited for.
    Raises StoreError that begins with `subject` where there is no plain file, and SystemFailure
    where the system does not let us look.
    """
    with explain_os_errors(f"read {path}"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            raise StoreError(f"{subject} {NO_FILE[error.errno]}") from None
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return FileIO(descriptor)
        os.close(descriptor)
        raise StoreError(f"{subject} is no plain file")


def lies_at(path: Path) -> bool:
    """Whether anything lies at a path, be it a dangling link; raises SystemFailure."""
    with explain_os_errors(f"look up {path}"):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True
