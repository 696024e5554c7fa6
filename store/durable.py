"""Files that survive a power cut: written once, synced, then their folders, bottom up.

A rename is durable only when the file was synced before it and the parent folder after it;
either alone leaves an empty or a missing file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

Content = bytes | memoryview
"""Bytes that lie in memory, or are mapped into it."""


def write_file(path: Path, parts: Iterable[Content]) -> None:
    """Create a file that must not exist, write its parts in order and sync it; raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            remaining = memoryview(part)
            while remaining:
                remaining = remaining[os.write(descriptor, remaining) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file durable that someone else wrote; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make the entries of a folder durable; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_subfolders(root: Path) -> None:
    """Make the entries of every folder below `root` durable, deepest first; raises OSError."""
    for folder, _, _ in os.walk(root, topdown=False):
        if Path(folder) != root:
            sync_folder(Path(folder))
