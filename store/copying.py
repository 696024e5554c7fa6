"""Copying a store between folders and object storage, file by file, as it is."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from store.create import place
from store.durable import sync_folder, sync_subfolders
from store.errors import StoreError, explain_os_errors
from store.layout import Layout, refuse_nesting, refuse_strangers, shard_name
from store.mapped_file import MappedFile
from store.object_url import ObjectUrl
from store.reader import PredictionStore
from store.remote import RemoteLayout, layout_of
from store.schema import FileSum, Record
from store.shard_folder import RECORD_FILE, ShardFolder, leaves_below
from store.side_tables import table_files
from store.sums import file_sum, write_summed


class Copied(Record):
    """What `copy_store` did."""

    shards: int
    """Shards that this call copied."""
    bytes: int
    """Bytes of their files."""
    there: int
    """Shards that the destination held before, in the same bytes."""
    differing: tuple[int, ...]
    """Shards that it held in other bytes; they were left alone."""
    missing: int
    """Planned shards that the source does not hold."""


def copy_store(
    source: str | Path | ObjectUrl,
    destination: str | Path | ObjectUrl,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Copied:
    """Copy the committed shards of a store, and all that is beside them, byte for byte.

    Every file is compared with its sum where it is read, and once more where it was written, before
    its shard is committed. A copy that was interrupted goes on where it ended; nothing is
    overwritten. `progress` may wrap the list of shards (tqdm). Raises StoreError when the
    destination holds another store or anything else, and for a damaged source.
    """
    target = layout_of(destination)
    _refuse_overlap(layout_of(source), target)
    # What is compared shard by shard need not stay in memory.
    store = PredictionStore.open(source, cached_shards=1)
    ours = layout_of(source).opened()
    _copy_header(store, ours, target)
    target = target.opened()
    there = set(target.committed())
    copied = size = equal = 0
    differing = []
    for shard in progress(store.committed):
        if shard in there:
            if _record_of(ours, shard) == _record_of(target, shard):
                equal += 1
            else:
                differing.append(shard)
        else:
            written = _copy_shard(store, shard, target)
            copied, size = copied + 1, size + written
    return Copied(
        shards=copied,
        bytes=size,
        there=equal,
        differing=tuple(differing),
        missing=len(store.missing()),
    )


def _refuse_overlap(ours: Layout, theirs: Layout) -> None:
    one, other = str(ours), str(theirs)
    if not isinstance(ours, RemoteLayout) and not isinstance(theirs, RemoteLayout):
        one, other = str(ours.root.resolve()), str(theirs.root.resolve())
    if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
        raise StoreError(f"{theirs} and {ours} lie within each other: choose another destination")


def _copy_header(store: PredictionStore, ours: Layout, theirs: Layout) -> None:
    """Make a store of the same manifest, unless it is there; raises StoreError for another one."""
    manifest = store.manifest
    ours.obtain(
        file for name, facts in manifest.tables.items() for file in table_files(name, facts)
    )
    if not theirs.exists():
        if not isinstance(theirs, RemoteLayout):
            refuse_nesting(theirs.root)
            refuse_strangers(theirs.root)
        with _copies(ours, manifest.files, theirs) as copies:
            # The manifest is what makes it a store, and comes last.
            place(theirs, {**copies, "manifest.json": ours.manifest.read_bytes()})
    found = theirs.opened().manifest.read_bytes()
    if found != ours.manifest.read_bytes():
        raise StoreError(
            f"{theirs} holds another store than {ours}: choose another destination; nothing was "
            "copied"
        )


@contextmanager
def _copies(ours: Layout, files: dict[str, FileSum], theirs: Layout) -> Iterator[dict[str, Path]]:
    """Files beside the shards, compared with their sums, as they may be put in place."""
    if isinstance(theirs, RemoteLayout):
        for file, expected in files.items():
            _check(ours.root / file, expected)
        yield {file: ours.root / file for file in files}
        return
    with explain_os_errors(f"make {theirs.root}"):
        theirs.tmp.mkdir(parents=True, exist_ok=True)
    folder = theirs.tmp / f"copy-{uuid.uuid4().hex}"
    try:
        for file, expected in files.items():
            _copy_file(ours.root / file, folder / file, expected)
        yield {file: folder / file for file in files}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy_shard(store: PredictionStore, shard: int, theirs: Layout) -> int:
    """Copy a shard whose every file is right; return its bytes. Raises ShardError, StoreError."""
    with store.whole_folder(shard) as folder:
        _check_files(folder)
        files = sorted(leaves_below(folder.path))
        size = sum((folder.path / file).stat().st_size for file in files)
        if isinstance(theirs, RemoteLayout):
            theirs.publish(folder.path, shard, read_back=True)
        else:
            with explain_os_errors(f"copy shard {shard_name(shard)} to {theirs}"):
                _copy_folder(folder, files, shard, theirs)
    return size


def _check_files(folder: ShardFolder) -> None:
    """Compare every file of a shard with its record; raises ShardError."""
    record = folder.record()
    for stranger in folder.strangers(record):
        raise stranger
    for file in record.files:
        folder.check_file(file, record)


def _copy_folder(folder: ShardFolder, files: Sequence[str], shard: int, theirs: Layout) -> None:
    record = folder.record()
    staged = theirs.tmp / f"{shard_name(shard)}-{uuid.uuid4().hex}"
    try:
        theirs.tmp.mkdir(exist_ok=True)
        staged.mkdir()
        for file in files:
            expected = None if file == RECORD_FILE else record.files[file]
            _copy_file(folder.path / file, staged / file, expected)
        sync_subfolders(staged)
        sync_folder(staged)
        theirs.publish(staged, shard)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _copy_file(source: Path, target: Path, expected: FileSum | None) -> None:
    """Copy a file and sync it; raises StoreError where what is read or written has another sum."""
    with explain_os_errors(f"copy {source} to {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        found = write_summed(target, [MappedFile.open(source).content])
    if expected is not None and found != expected:
        raise _altered(source)
    _check(target, found)


def _check(path: Path, expected: FileSum) -> None:
    if file_sum(MappedFile.open(path).content) != expected:
        raise _altered(path)


def _altered(path: Path) -> StoreError:
    return StoreError(f"{path} was altered (its XXH3 differs): restore it from a copy")


def _record_of(layout: Layout, shard: int) -> bytes:
    path = layout.tables_of(shard) / RECORD_FILE
    with explain_os_errors(f"read {path}"):
        return path.read_bytes()
