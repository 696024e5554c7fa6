"""Errors of the store: each names the value, the limit, where it came from and what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADVICE = {
    errno.ENOSPC: "the disk is full: free space there, then run the same command again",
    errno.EDQUOT: "your disk quota is used up: free space there, then run the same command again",
    errno.EIO: "the disk reported an error: check it (dmesg), then run the same command again",
    errno.EROFS: "the file system is read-only: choose another folder or remount it",
    errno.EACCES: "permission is missing: change the owner or mode, or choose another folder",
    errno.EPERM: "the file system does not permit this: choose a folder on a local disk",
    errno.EXDEV: "tmp/ and shards/ must lie on one file system: replace the link by a folder",
    errno.EMFILE: "this process has too many files open: close some, or raise `ulimit -n`",
    errno.ENFILE: "this machine has too many files open: close some, or raise fs.file-max",
    errno.ENOMEM: "memory or mappings ran out: keep fewer rollouts, or raise vm.max_map_count",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter one",
}


class StoreError(Exception):
    """Anything the store refuses or cannot do."""

    __str__ = Exception.__str__


class SystemFailure(StoreError):
    """The system refused to look, read or write: nothing is said about what lies on the disk."""


class RolloutNotFound(StoreError, KeyError):
    """A key that a store does not hold, because it was never planned or is not yet committed."""


class ShardError(StoreError):
    """What keeps one file of a committed shard from being read, and the rollouts it keeps back."""

    def __init__(self, folder: Path, file: str, rollouts: str, reason: str) -> None:
        self.folder = folder
        self.shard = int(folder.name)
        self.file = file.encode(errors="backslashreplace").decode()
        self.array = array_of(self.file)
        self.rollouts = rollouts
        self.reason = reason
        array = f" (array {self.array!r})" if self.array else ""
        place = f"shard {folder.name}, file {self.file!r}{array}, {rollouts}"
        super().__init__(f"{place}: {reason}{self.advice()}")

    def advice(self) -> str:
        """What to do, behind the reason."""
        return ""

    def __reduce__(self) -> tuple[type[ShardError], tuple[Path, str, str, str]]:
        return type(self), (self.folder, self.file, self.rollouts, self.reason)


class DamagedShard(ShardError):
    """A committed shard whose files are missing, short, altered, foreign or contradictory."""

    def advice(self) -> str:
        """Restore it, or make it again."""
        return (
            f". Restore {self.folder} from a copy, or take it out of the store (`foretell verify "
            "STORE --repair`) and run the rollout again: only missing shards are made"
        )


class UnreadableShard(ShardError):
    """A committed shard that the system does not let us read; it may well be sound."""


def array_of(file: str) -> str | None:
    """Name of the array that a file of a shard belongs to, from its path; None for the others."""
    return file.split("/", 1)[0] if "/" in file else None


@contextmanager
def explain_os_errors(action: str) -> Iterator[None]:
    """Turn an OSError inside the block into a SystemFailure that says what to do."""
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "correct the cause, then run the same command again")
        raise SystemFailure(f"cannot {action}: {error}; {advice}") from error
