"""Downloaded shards on a local disk, shared by processes, within a limit of bytes.

    CACHE/shards/ATTEMPT-BYTES/00042/   a shard, exactly as a local store holds it
    CACHE/tmp/NUMBER-BYTES/             a download that goes on, or was killed
    CACHE/locks/                        locked while one of 64 kinds of shard is downloaded

The names say how large things are, so that taking stock reads two folders. Who uses a shard holds
a shared lock on its folder, and only a folder that can be locked alone is deleted, the one unused
for longest first. The system frees locks when a process ends, however that happens.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from store.errors import explain_os_errors

KINDS = 64


class Lease:
    """A shard that lies in the cache for as long as this object does."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        """Folder of the shard."""
        self._end = weakref.finalize(self, os.close, descriptor)

    def end(self) -> None:
        """Let the shard go; what is mapped of it stays mapped."""
        self._end()


class _Entry(NamedTuple):
    used_ns: int
    path: Path
    bytes: int


@dataclass(frozen=True)
class ShardCache:
    """A folder of shards that takes at most `limit` bytes, besides what is small."""

    root: Path
    limit: int

    def lease(self, attempt: str, size: int, name: str) -> Lease | None:
        """A shard that is there, now the most recently used; None when it is not."""
        entry = self._entry(attempt, size)
        with explain_os_errors(f"look into the cache {self.root}"):
            try:
                descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            lease = Lease(entry / name, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not _is_at(entry, descriptor):  # it was deleted while we waited
                lease.end()
                return None
            os.utime(descriptor)
            return lease

    def fetch(
        self, attempt: str, size: int, name: str, download: Callable[[Path], None]
    ) -> Lease | None:
        """Have a shard downloaded into a folder that is given, unless it is there by now.

        Of several processes one does it, and the others wait. None when there is no room, because
        shards that are in use fill the cache. What `download` raises is passed on.
        """
        with self._locked(f"locks/{int(attempt[:8], 16) % KINDS:02d}"):
            # Once downloaded it may be deleted again before it is leased.
            while (lease := self.lease(attempt, size, name)) is None:
                with self._reserved(size) as folder:
                    if folder is None:
                        return None
                    download(folder / name)
                    with explain_os_errors(f"keep a shard in the cache {self.root}"):
                        self._entry(attempt, size).parent.mkdir(parents=True, exist_ok=True)
                        os.rename(folder, self._entry(attempt, size))
        return lease

    def forget(self, attempt: str, size: int) -> None:
        """Delete a shard that turned out to be damaged; who has it mapped keeps that."""
        entry = self._entry(attempt, size)
        with self._locked("lock"):
            self._delete(entry)

    @contextmanager
    def _reserved(self, size: int) -> Iterator[Path | None]:
        """A locked folder for a download of `size` bytes, gone afterwards; None without room."""
        with self._locked("lock"):
            fits = self._make_room(size)
            folder = self.root / "tmp" / f"{uuid.uuid4().hex}-{size}"
            if fits:
                folder.mkdir(parents=True)
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not fits:
            yield None
            return
        try:
            yield folder
        finally:
            os.close(descriptor)
            shutil.rmtree(folder, ignore_errors=True)

    def _make_room(self, size: int) -> bool:
        """Delete what was unused for longest until `size` more bytes fit; False if they cannot."""
        entries = self._entries()
        used = sum(entry.bytes for entry in entries)
        for entry in sorted(entries):
            if used + size <= self.limit:
                break
            if self._delete_unused(entry.path):
                used -= entry.bytes
        return used + size <= self.limit

    def _entries(self) -> list[_Entry]:
        """Shards that are there or on their way; downloads of killed processes are deleted."""
        found = []
        for folder in ("shards", "tmp"):
            with suppress(FileNotFoundError):
                for path in (self.root / folder).iterdir():
                    size = path.name.rpartition("-")[2]
                    if not size.isdigit() or (folder == "tmp" and self._delete_unused(path)):
                        continue
                    with suppress(FileNotFoundError):  # a download that has just ended
                        found.append(_Entry(path.stat().st_mtime_ns, path, int(size)))
        return found

    def _delete_unused(self, path: Path) -> bool:
        """Delete a folder that nobody has locked; whether it is gone."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._delete(path)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _delete(self, path: Path) -> None:
        """Move a folder out of sight at once, then delete it: half a shard is never seen."""
        gone = self.root / "tmp" / f"{uuid.uuid4().hex}-0"
        gone.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        path = self.root / name
        with explain_os_errors(f"use the cache {self.root}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                os.close(descriptor)
                raise
        try:
            yield
        finally:
            os.close(descriptor)

    def _entry(self, attempt: str, size: int) -> Path:
        return self.root / "shards" / f"{attempt}-{size}"


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
