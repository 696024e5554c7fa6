"""Where things lie in a store, and which of its shards are committed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from store.errors import StoreError, explain_os_errors

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

    def shard(self, shard: int) -> Path:
        """Folder of a shard; it exists exactly when the shard is committed."""
        return self.shards / shard_name(shard)

    def committed(self) -> list[int]:
        """Numbers of the committed shards, rising; raises StoreError."""
        return sorted(
            number for name in self.shard_entries() if (number := parse_shard(name)) is not None
        )

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
