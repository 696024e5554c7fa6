"""Integrity of every file, array and key of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import Field

from store.encoding import find_fault
from store.errors import (
    DamagedShard,
    ShardError,
    StoreError,
    SystemFailure,
    explain_os_errors,
)
from store.layout import Layout, parse_shard
from store.object_client import NotConfigured
from store.object_url import ObjectUrl
from store.plain_file import lies_at
from store.reader import PredictionStore
from store.remote import RemoteLayout, layout_of
from store.schema import Record
from store.shard_folder import RECORD_FILE, ShardFolder, leaves_below
from store.side_tables import TABLES, table_files


class Damage(Record):
    """One thing wrong in a store."""

    shard: int | None
    """Number of the shard; null for files beside the shards."""
    file: str
    """Path below the shard, or below the store."""
    array: str | None
    """Array that the file belongs to; null for the others."""
    reason: str
    """What is wrong and what to do."""
    unreadable: bool = Field(False, exclude=True)
    """Whether the system did not let us look, so that it may well be sound."""


class Verification(Record):
    """What `verify` found; counts cover the committed shards that are sound."""

    ok: bool
    """Whether nothing is bad; a store that lacks shards can be sound."""
    shards: int
    """Committed shards that are sound."""
    rollouts: int
    """Rollouts in them."""
    timesteps: int
    """Timesteps in them."""
    not_committed: tuple[int, ...]
    """Planned shards that are not there yet; not bad."""
    bad: tuple[Damage, ...]
    """Everything wrong."""


def verify(
    path: str | Path | ObjectUrl, progress: Callable[[Sequence[int]], Iterable[int]] = iter
) -> Verification:
    """Read every byte of a store and check it against manifest, plan and records.

    `progress` may wrap the list of shards (tqdm). Raises neither for damage nor for what the system
    does not let us read: it is in the result. Raises NotConfigured where nothing can be asked.
    """
    try:
        store = PredictionStore.open(path, cached_shards=1)
    except NotConfigured:
        raise
    except StoreError as error:
        return _report(0, 0, 0, (), [_damage_of_store(layout_of(path), error)])
    layout = layout_of(path)
    bad = [*_damages_beside(store, layout), *_strangers(layout), *_strange_tables(store, layout)]
    shards = rollouts = timesteps = 0
    for shard in progress(store.committed):
        damages = list(damages_of(store, shard))
        bad.extend(damages)
        if not damages:
            shards += 1
            rollouts += int(store.plan.sizes[shard])
            timesteps += store.folder(shard).record().rows
    return _report(shards, rollouts, timesteps, tuple(store.missing()), bad)


def _report(
    shards: int, rollouts: int, timesteps: int, missing: tuple[int, ...], bad: list[Damage]
) -> Verification:
    return Verification(
        ok=not bad,
        shards=shards,
        rollouts=rollouts,
        timesteps=timesteps,
        not_committed=missing,
        bad=tuple(bad),
    )


def _damage_of_store(layout: Layout, error: StoreError) -> Damage:
    """A fault of the store itself, ascribed to the file that its message names."""
    paths = (
        layout.plan, layout.samples, layout.rejected, layout.heads, layout.shards, layout.manifest,
    )  # fmt: skip
    files = [str(path.relative_to(layout.root)) for path in paths]
    places = [f"{place}/{file}" for file in files for place in {str(layout.root), str(layout)}]
    named = next((place for place in places if place in str(error)), "")
    file = next((file for file in files if named.endswith(f"/{file}")), layout.manifest.name)
    unreadable = isinstance(error, SystemFailure)
    return Damage(shard=None, file=file, array=None, reason=str(error), unreadable=unreadable)


def _damages_beside(store: PredictionStore, layout: Layout) -> Iterator[Damage]:
    """Faults of the files that opening a store does not read."""
    for read in (lambda: store.heads, lambda: store.rejected):
        try:
            read()
        except StoreError as error:
            yield _damage_of_store(layout, error)
    for name, facts in store.manifest.tables.items():
        for part, file in enumerate(table_files(name, facts)):
            try:
                store.table(name).check_part(part)
            except StoreError as error:
                yield Damage(shard=None, file=file, array=None, reason=str(error))


def _strangers(layout: Layout) -> Iterator[Damage]:
    for name in layout.shard_entries():
        if parse_shard(name) is None:
            reason = "it is no shard: move it out of the store"
            yield Damage(shard=None, file=_shown(f"shards/{name}"), array=None, reason=reason)


def _strange_tables(store: PredictionStore, layout: Layout) -> Iterator[Damage]:
    """What lies in tables/ and is no file of a table."""
    tables = store.manifest.tables.items()
    listed = {file for name, facts in tables for file in table_files(name, facts)}
    try:
        with explain_os_errors(f"list {layout.tables}"):
            if isinstance(layout, RemoteLayout):
                found = [f"{TABLES}/{found.name}" for found in layout.client.below(TABLES)]
            else:
                found = _leaves(layout.tables)
    except StoreError as error:
        found = []
        yield Damage(shard=None, file=TABLES, array=None, reason=str(error))
    for leaf in found:
        if leaf not in listed:
            reason = "it is no file of a table: move it out of the store"
            yield Damage(shard=None, file=_shown(leaf), array=None, reason=reason)


def _leaves(folder: Path) -> list[str]:
    """Paths below the store of what lies in a folder of it, or of the folder if it is a link."""
    if folder.is_symlink():
        return [folder.name]
    found = sorted(leaves_below(folder)) if lies_at(folder) else []
    return [f"{folder.name}/{leaf}" for leaf in found]


def _shown(file: str) -> str:
    return file.encode(errors="backslashreplace").decode()


def damages_of(store: PredictionStore, shard: int) -> Iterator[Damage]:
    """Everything wrong with one shard: files first, and what they mean if they are sound."""
    damages: list[ShardError] = []
    try:
        with store.whole_folder(shard) as folder:
            damages += _file_damages(folder)
            if not damages:
                damages += _content_damages(store, folder)
    except ShardError as fault:
        damages.append(fault)
    except SystemFailure as failure:  # of object storage
        reason = str(failure)
        yield Damage(shard=shard, file=RECORD_FILE, array=None, reason=reason, unreadable=True)
    for error in damages:
        yield Damage(
            shard=error.shard,
            file=error.file,
            array=error.array,
            reason=f"{error.rollouts}: {error.reason}",
            unreadable=not isinstance(error, DamagedShard),
        )


def _file_damages(folder: ShardFolder) -> Iterator[ShardError]:
    try:
        record = folder.record()
    except ShardError as error:
        yield error
        return
    yield from folder.strangers(record)
    for file in record.files:
        try:
            folder.check_file(file, record)
        except ShardError as error:
            yield error


def _content_damages(store: PredictionStore, folder: ShardFolder) -> Iterator[ShardError]:
    try:
        shard = folder.open().load()
    except ShardError as error:
        yield error
        return
    fault = find_fault(store.manifest, shard.arrays, store.plan.bucket_of(folder.number))
    if fault is not None:
        at = fault.timestep or 0
        row = shard.rollouts.row_of(at)
        reason = f"timestep {at - int(shard.offsets[row])}: {fault.reason}"
        yield folder.damaged(folder.files[fault.array].data, reason, shard.rollouts, at)
