"""Where things lie in a store, and which of its shards are committed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from store.durable import sync_folder
from store.errors import StoreError, explain_os_errors
from store.object_url import ObjectUrl
from store.plain_file import lies_at

ENTRIES = (
    "manifest.json", "plan.parquet", "samples.parquet", "rejected.parquet", "heads", "tables",
    "shards", "tmp",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Paths of one store; sample ids never become file names."""

    root: Path

    @classmethod
    def at(cls, path: str | Path) -> Layout:
        """Layout of the store in a local folder, made absolute; raises StoreError for a URL."""
        if "://" in str(path):
            raise StoreError(f"store {path} is a URL but must be a local folder: give a path")
        if "\0" in str(path):
            raise StoreError(f"store {str(path)!r} holds a NUL character: correct the path")
        return cls(Path(path).absolute())

    @property
    def manifest(self) -> Path:
        """The sealed header."""
        return self.root / "manifest.json"

    @property
    def plan(self) -> Path:
        """(sample, variation) → shard."""
        return self.root / "plan.parquet"

    @property
    def samples(self) -> Path:
        """The conditioning inputs."""
        return self.root / "samples.parquet"

    @property
    def rejected(self) -> Path:
        """What the plan leaves out, where it leaves out anything."""
        return self.root / "rejected.parquet"

    @property
    def heads(self) -> Path:
        """Weights of the output heads, where the target is `hidden`."""
        return self.root / "heads" / "heads.safetensors"

    @property
    def tables(self) -> Path:
        """Folder of the side tables, where there are any."""
        return self.root / "tables"

    @property
    def shards(self) -> Path:
        """Folder of the committed shards."""
        return self.root / "shards"

    @property
    def tmp(self) -> Path:
        """Folder of unpublished work: garbage by definition."""
        return self.root / "tmp"

    @property
    def claims(self) -> Path:
        """Folder of what says who writes which shard (`store.claims`)."""
        return self.tmp / "claims"

    @property
    def place(self) -> Path | ObjectUrl:
        """What to open the store by."""
        return self.root

    def __str__(self) -> str:
        return str(self.place)

    def exists(self) -> bool:
        """Whether there is a store; raises SystemFailure."""
        return lies_at(self.manifest)

    def why_no_store(self) -> str:
        """Say why nothing can be opened here, and what to give instead."""
        if lies_at(self.root / "store" / "manifest.json"):
            return f"{self} is no store: it is the folder of a run; give {self.root / 'store'}"
        trouble = "it holds no manifest.json" if lies_at(self.root) else "there is no such folder"
        return (
            f"{self} is no store: {trouble}; give the folder of one, such as runs/NAME/store, or "
            "make it with `foretell rollout`"
        )

    def opened(self) -> Layout:
        """The layout through which a store that exists is read: this one."""
        return self

    def obtain(self, files: Iterable[str]) -> None:
        """Have some files beside the shards here, given by their paths below the store."""

    def shard(self, shard: int) -> Path:
        """Folder of a shard; it exists exactly when the shard is committed."""
        return self.shards / shard_name(shard)

    def is_committed(self, shard: int) -> bool:
        """Whether a shard is committed by now; raises SystemFailure."""
        return lies_at(self.shard(shard))

    def committed_s(self, shard: int) -> float:
        """When a committed shard was committed, in seconds since 1970; raises SystemFailure."""
        with explain_os_errors(f"look up {self.shard(shard)}"):
            return os.stat(self.shard(shard)).st_mtime

    def tables_of(self, shard: int) -> Path:
        """Folder that holds at least the record and the table of rollouts of a committed shard."""
        return self.shard(shard)

    @contextmanager
    def whole(self, shard: int) -> Iterator[Path]:
        """Folder of a committed shard with all that is stored of it, be it right or wrong."""
        yield self.shard(shard)

    def lease(self, shard: int, let_go: Callable[[], None]) -> tuple[Path, object]:
        """Folder of a committed shard, and what to keep for as long as it is needed.

        `let_go` is called where shards that are still kept take the room of this one.
        """
        return self.shard(shard), None

    def forget(self, shard: int) -> bool:
        """Drop a damaged copy of a shard; False where it is no copy."""
        return False

    def publish(self, staged: Path, shard: int) -> bool:
        """Make a synced folder a committed shard, durably; False if another writer was first.

        Raises OSError.
        """
        target = self.shard(shard)
        try:
            os.rename(staged, target)
        except OSError as error:
            # NFS may repeat a rename that already succeeded: then the staged folder is gone.
            won = not staged.exists() and target.exists()
            if not won and error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not won:
                return False
        sync_folder(self.shards)
        return True

    def committed(self) -> list[int]:
        """Numbers of the committed shards, rising; raises StoreError."""
        return sorted(
            number for name in self.shard_entries() if (number := parse_shard(name)) is not None
        )

    def stamps(self) -> dict[int, float]:
        """Committed shards, rising, each with what tells its commit from a later one of the shard.

        One listing, which asks nothing of each shard. Raises StoreError.
        """
        with explain_os_errors(f"list {self.shards}"), os.scandir(self.shards) as entries:
            found = {parse_shard(entry.name): entry.inode() for entry in entries}
        return {shard: found[shard] for shard in sorted(s for s in found if s is not None)}

    def shard_entries(self) -> list[str]:
        """Names of everything in shards/, sorted; raises StoreError."""
        with explain_os_errors(f"list {self.shards}"):
            return sorted(os.listdir(self.shards))


def shard_name(shard: int) -> str:
    """Folder name of a shard: five digits or more."""
    return f"{shard:05d}"


def parse_shard(name: str) -> int | None:
    """Number of the shard with this folder name; None for any other name."""
    plain = name.isascii() and name.isdigit() and len(name) <= 10
    return int(name) if plain and shard_name(int(name)) == name else None


def refuse_nesting(root: Path) -> None:
    """Refuse a store below an existing store; raises StoreError."""
    with explain_os_errors(f"look up {root}"):
        above = root.resolve().parents
        for folder in above:
            if (folder / "manifest.json").is_file() and (folder / "shards").is_dir():
                raise StoreError(
                    f"store path {root} lies inside the store {folder}: choose a path outside it"
                )


def refuse_strangers(root: Path) -> None:
    """Refuse to make a store among files that are not its own; raises StoreError."""
    with explain_os_errors(f"list {root}"):
        strangers = sorted(set(os.listdir(root)) - set(ENTRIES)) if root.exists() else []
    if strangers:
        raise StoreError(
            f"store path {root} holds {strangers[:3]}, which no store has: choose an empty folder"
        )
