"""A committed shard on disk: which files it must have, and how they are verified and read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from time import monotonic

import numpy as np

from store.encoding import Array
from store.errors import (
    DamagedShard,
    ShardError,
    StoreError,
    SystemFailure,
    UnreadableShard,
    array_of,
    explain_os_errors,
)
from store.mapped_file import Identity, MappedFile
from store.plan import Key, Plan
from store.schema import FileSum
from store.sealed import unseal
from store.shard import Rollout, RolloutTable, Shard, ShardRecord
from store.sums import check_size, check_sum, read_summed
from store.tables import parse_table
from store.threads import share_out
from store.zarr_files import (
    HEADER_FILE,
    ArrayFiles,
    check_group,
)

RECORD_FILE = "shard.json"
ROLLOUTS_FILE = "rollouts.parquet"

THREADED_BYTES = 2**22
"""Arrays smaller than this are decoded before threads would have begun."""

RECHECK_S = 0.01
"""Seconds for which a mapped file may be gone, cut or written to before a reader looks again.

Looking takes as long as finding a rollout by its key, so not every one can pay it.
"""


@dataclass(frozen=True)
class VerifiedShard:
    """What is known of a shard of which every byte was verified: enough to map it again."""

    rows: int
    """N."""
    rollouts: RolloutTable
    identities: Mapping[str, Identity]
    """Of the data file of each array, when it was verified."""
    bounds: Mapping[str, Array]
    """Where the chunks of each array lie in its data file, [chunks + 1] int64."""


@dataclass(frozen=True)
class ShardFolder:
    """A committed shard on disk, as the store that holds it expects it to be."""

    path: Path
    manifest: str
    """Checksum of the store's manifest."""
    files: Mapping[str, ArrayFiles]
    """By the name of the array."""
    plan: Plan
    drawn: Sequence[str] = ()
    """Columns that the manifest adds to the table of rollouts."""

    @property
    def number(self) -> int:
        """Number of the shard."""
        return int(self.path.name)

    @property
    def _planned(self) -> int:
        """R: planned rollouts."""
        return int(self.plan.starts[self.number + 1] - self.plan.starts[self.number])

    def damaged(
        self, file: str, reason: str, table: RolloutTable | None = None, timestep: int | None = None
    ) -> DamagedShard:
        """The error for one file of this shard, naming the first rollout that it affects.

        That is the one at `timestep` of the shard if `table` is known, else the first of all.
        """
        return DamagedShard(self.path, file, self._rollouts(table, timestep), reason)

    def _rollouts(self, table: RolloutTable | None = None, timestep: int | None = None) -> str:
        keys = self.plan[self.number]
        row = table.row_of(timestep) if table is not None and timestep is not None else 0
        sample_id, variation = keys[row]
        place = f"sample {sample_id!r}, variation {variation}"
        more = len(keys) - 1
        if timestep is None and more:
            place += f" and {more} more"
        return place

    @contextmanager
    def _blaming(self, file: str) -> Iterator[None]:
        """Ascribe what goes wrong in the block to a file: DamagedShard, or UnreadableShard."""
        try:
            yield
        except ShardError:
            raise
        except SystemFailure as error:
            raise UnreadableShard(self.path, file, self._rollouts(), str(error)) from error
        except StoreError as error:
            raise self.damaged(file, str(error)) from error

    def record(self) -> ShardRecord:
        """The sealed record, checked against store and plan; raises ShardError."""
        with self._blaming(RECORD_FILE):
            self._check_is_folder()
            record, _ = unseal(self.path / RECORD_FILE, ShardRecord)
            if record.manifest != self.manifest:
                raise StoreError(
                    f"manifest is {record.manifest!r} but must be {self.manifest!r}: it is of "
                    "another store"
                )
            if record.shard != self.number:
                raise StoreError(
                    f"shard is {record.shard} but must be {self.number}: its folder was renamed"
                )
            if record.rollouts != self._planned:
                raise StoreError(
                    f"rollouts is {record.rollouts} but the plan has {self._planned} here"
                )
        self._check_listing(record)
        return record

    def strangers(self, record: ShardRecord) -> list[ShardError]:
        """What lies below the shard and is no file that it lists, or no folder of one.

        If the folders cannot be listed, that is the answer.
        """
        expected = {RECORD_FILE, *record.files, *_folders_of(record.files)}
        try:
            with self._blaming(RECORD_FILE), explain_os_errors(f"list {self.path}"):
                found = sorted(leaves_below(self.path))
        except ShardError as error:
            return [error]
        reason = "it is not a file of this shard"
        return [self.damaged(leaf, reason) for leaf in found if leaf not in expected]

    def read(self, file: str, record: ShardRecord) -> bytes:
        """Content of one file, which must be as the record says; raises ShardError."""
        with self._blaming(file):
            return read_summed(self.path / file, record.files[file], "it")

    def read_rollouts(self, record: ShardRecord) -> RolloutTable:
        """The rollouts of the shard, checked against record and plan; raises ShardError."""
        content = self.read(ROLLOUTS_FILE, record)
        with self._blaming(ROLLOUTS_FILE):
            table = parse_table(content, ROLLOUTS_FILE)
            return RolloutTable.from_table(table, self.plan, self.number, record.rows, self.drawn)

    def read_lengths(self) -> Array:
        """[R] int64 timesteps of every rollout, from record and table; raises ShardError."""
        record = self.record()
        content = self.read(ROLLOUTS_FILE, record)
        with self._blaming(ROLLOUTS_FILE):
            lengths: Array = parse_table(content, ROLLOUTS_FILE, ["length"])["length"].to_numpy()
            if len(lengths) != record.rollouts or lengths.sum() != record.rows:
                raise StoreError(f"its lengths are not those of {record.rollouts} rollouts")
        return lengths

    def open(self) -> MappedShard:
        """Verify every byte of the shard and map its arrays; raises ShardError."""
        record = self.record()
        for stranger in self.strangers(record):
            raise stranger
        self._check_headers(record)
        table = self.read_rollouts(record)
        mapped, bounds = {}, {}
        for name, files in self.files.items():
            mapped[name] = self._map(files, record.files[files.data], table)
            with self._blaming(files.data):
                bounds[name] = files.chunk_bounds(mapped[name].content, record.rows)
        identities = {name: file.identity for name, file in mapped.items()}
        return MappedShard(self, VerifiedShard(record.rows, table, identities, bounds), mapped)

    def reopen(self, verified: VerifiedShard) -> MappedShard | None:
        """Map the arrays of a shard that was verified; None when a file is not as it was then."""
        mapped = {}
        for name, files in self.files.items():
            try:
                mapped[name] = MappedFile.open(self.path / files.data)
            except StoreError:
                return None
            if mapped[name].identity != verified.identities[name]:
                return None
        return MappedShard(self, verified, mapped)

    def check_file(self, file: str, record: ShardRecord) -> None:
        """Compare a file with its sum; raises ShardError."""
        arrays = [files for files in self.files.values() if files.data == file]
        if arrays:
            self._map(arrays[0], record.files[file], None)
        else:
            self.read(file, record)

    def _check_is_folder(self) -> None:
        with explain_os_errors(f"look up {self.path}"):
            try:
                mode = os.lstat(self.path).st_mode
            except FileNotFoundError:
                raise StoreError("it is missing, and so is its folder") from None
        if not stat.S_ISDIR(mode):
            raise StoreError(f"{self.path} is no folder of its own, but a link or a file")

    def _check_headers(self, record: ShardRecord) -> None:
        arrays = list(self.files.values())
        content = self.read(HEADER_FILE, record)
        with self._blaming(HEADER_FILE):
            check_group(content, arrays, record.rows)
        for array in arrays:
            content = self.read(array.header, record)
            with self._blaming(array.header):
                array.check_header(content, record.rows)

    def _map(self, files: ArrayFiles, expected: FileSum, table: RolloutTable | None) -> MappedFile:
        with self._blaming(files.data):
            mapped = MappedFile.open(self.path / files.data)
            try:
                check_size(mapped.identity.bytes, expected, "it")
            except StoreError as error:
                end = files.timesteps_within(mapped.identity.bytes)
                raise self.damaged(files.data, str(error), table, end) from error
            check_sum(mapped.content, expected, "it")
        return mapped

    def _check_listing(self, record: ShardRecord) -> None:
        expected = {HEADER_FILE, ROLLOUTS_FILE}
        for files in self.files.values():
            expected.update((files.header, files.data))
        wrong = sorted(expected ^ set(record.files))
        if wrong:
            raise self.damaged(
                RECORD_FILE,
                f"it does not list exactly the files of its arrays: {wrong[:3]} (array "
                f"{array_of(wrong[0])})",
            )
        # Bounds what is allocated below: a record cannot claim more than its files may index.
        limit = min(f.most_timesteps(record.files[f.data].bytes) for f in self.files.values())
        if not 0 < record.rows <= limit:
            raise self.damaged(RECORD_FILE, f"rows is {record.rows} but must be in [1, {limit}]")


@dataclass
class MappedShard:
    """A verified shard whose arrays are mapped into memory."""

    folder: ShardFolder
    verified: VerifiedShard
    mapped: Mapping[str, MappedFile]
    """The data file of each array."""
    checked_s: float = field(default_factory=monotonic)
    """When the files were last looked at."""
    lease: object = None
    """What keeps the files where they are, in a cache that deletes others."""

    def unchanged(self) -> bool:
        """Whether every mapped file lies there as it was."""
        self.checked_s = monotonic()
        return all(file.unchanged() for file in self.mapped.values())

    def unchanged_lately(self) -> bool:
        """Whether every mapped file lay there as it was when one last looked, `RECHECK_S` ago."""
        return monotonic() - self.checked_s < RECHECK_S or self.unchanged()

    @cached_property
    def views(self) -> Mapping[str, Array] | None:
        """[N, …] each array as a view of its mapped file; None where arrays are encoded."""
        files, rows = self.folder.files, self.verified.rows
        if any(array.codec is not None for array in files.values()):
            return None
        return {name: files[name].view(file.content, rows) for name, file in self.mapped.items()}

    @cached_property
    def whole(self) -> Shard:
        """All rollouts as views of the mapped files; for arrays that are not encoded."""
        return self._shard(self.views or {})

    def load(self) -> Shard:
        """All rollouts: `whole`, or with their arrays decoded; raises DamagedShard."""
        if self.views is not None:
            return self.whole
        return self._shard(self.decode_rows(0, self.verified.rows))

    def rollout(self, row: int, key: Key) -> Rollout:
        """The rollout of a row, whose key is given; raises DamagedShard."""
        table, views = self.verified.rollouts, self.views
        start, stop = table.offsets.item(row), table.offsets.item(row + 1)
        if views is None:
            arrays = self.decode_rows(start, stop)
        else:
            arrays = {name: array[start:stop] for name, array in views.items()}
        return table.rollout(row, key, arrays)

    def decode_rows(self, start: int, stop: int) -> dict[str, Array]:
        """Arrays [stop − start, …] of some timesteps, decoding only the chunks that they lie in.

        Read-only. Raises DamagedShard, from whichever thread.
        """
        each = self.folder.files
        chunks = {n: range(start // f.chunk, f.chunk_count(stop)) for n, f in each.items()}
        arrays = {
            name: np.empty(
                (len(chunks[name]) * files.chunk, *files.spec.trailing), files.spec.dtype
            )
            for name, files in each.items()
        }
        jobs = [(name, chunk) for name in arrays for chunk in chunks[name]]

        def decode(job: tuple[str, int]) -> None:
            name, chunk = job
            size = each[name].chunk
            at = (chunk - chunks[name].start) * size
            self._decode_chunk(name, chunk, arrays[name][at : at + size])

        size = sum(array.nbytes for array in arrays.values())
        if size < THREADED_BYTES:
            for job in jobs:
                decode(job)
        else:
            share_out(decode, jobs)
        skipped = {name: start - chunks[name].start * files.chunk for name, files in each.items()}
        rows = {n: array[skipped[n] : skipped[n] + stop - start] for n, array in arrays.items()}
        for array in rows.values():
            array.setflags(write=False)
        return rows

    def _shard(self, arrays: Mapping[str, Array]) -> Shard:
        return Shard(self.folder.number, self.folder.plan, arrays, self.verified.rollouts)

    def _decode_chunk(self, name: str, chunk: int, out: Array) -> None:
        files, bounds = self.folder.files[name], self.verified.bounds[name]
        try:
            files.decode_chunk(self.mapped[name].content, bounds, chunk, out)
        except StoreError as error:
            table, start = self.verified.rollouts, chunk * files.chunk
            reason = f"chunk {chunk}: {error}"
            raise self.folder.damaged(files.data, reason, table, start) from error


def _folders_of(files: Iterable[str]) -> set[str]:
    """Every folder above one of some relative paths, with a slash behind."""
    return {f"{folder}/" for file in files for folder in PurePosixPath(file).parents}


def leaves_below(root: Path) -> Iterator[str]:
    """Relative paths of all files and links, and of empty folders with a slash behind."""
    for folder, folders, files in os.walk(root, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        here = os.path.relpath(folder, root)
        for name in (*files, *links):
            yield os.path.normpath(os.path.join(here, name))
        if not (folders or files):
            yield f"{here}/"


def _raise(error: OSError) -> None:
    raise error
