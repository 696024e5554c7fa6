"""One committed shard: its record, its verified files, and what they hold in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from store import zarr_files
from store.encoding import Array, ArraySpec
from store.errors import DamagedShard, StoreError, array_of, explain_os_errors
from store.plan import Key
from store.schema import FORMAT_VERSION, FileSum, Record
from store.sealed import unseal
from store.sums import read_summed
from store.tables import parse_table

RECORD_FILE = "shard.json"
ROLLOUTS_FILE = "rollouts.parquet"
ROLLOUTS_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("variation", pa.int64(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("stop_reason", pa.string(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=False),
    ]
)


class ShardRecord(Record):
    """The content of shard.json: what the shard holds, file by file."""

    format_version: int = FORMAT_VERSION
    shard: int
    """Number of the shard in the plan."""
    manifest: str
    """Checksum of the manifest of the store that the shard belongs to."""
    rows: int
    """N: timesteps of all rollouts."""
    rollouts: int
    """R: rollouts."""
    files: dict[str, FileSum]
    """Every file of the shard except shard.json, by its path below the shard."""


@dataclass(frozen=True)
class Timestep:
    """What is stored of one timestep."""

    sample_id: str
    variation: int
    timestep: int
    arrays: Mapping[str, Array]
    """Each [C, …], read-only."""

    @property
    def codes(self) -> Array:
        """[C] codes drawn, uint16 or uint32."""
        return self.arrays["codes"]


@dataclass(frozen=True)
class Rollout:
    """All timesteps of one (sample, variation)."""

    sample_id: str
    variation: int
    arrays: Mapping[str, Array]
    """Each [T, C, …], a read-only view into its shard."""
    stop_reason: str
    weight: float
    """Weight in training, >= 0."""
    seed: int

    @property
    def codes(self) -> Array:
        """[T, C] codes drawn, uint16 or uint32."""
        return self.arrays["codes"]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, timestep: int) -> Timestep:
        if not 0 <= timestep < len(self):
            raise StoreError(
                f"timestep {timestep} of sample {self.sample_id!r}, variation {self.variation} "
                f"is not in [0, {len(self)}): the rollout has {len(self)} timesteps"
            )
        arrays = {name: array[timestep] for name, array in self.arrays.items()}
        return Timestep(self.sample_id, self.variation, timestep, arrays)


@dataclass(frozen=True)
class RolloutTable:
    """The content of rollouts.parquet, in the order of the plan."""

    keys: tuple[Key, ...]
    offsets: Array
    """[R + 1] int64: rollout r holds the rows offsets[r] to offsets[r + 1]."""
    stop_reasons: tuple[str, ...]
    weights: Array
    """[R] float64."""
    seeds: Array
    """[R] uint64."""

    @property
    def lengths(self) -> Array:
        """[R] int64 timesteps of each rollout."""
        return np.diff(self.offsets)

    def to_table(self) -> pa.Table:
        """The content of rollouts.parquet."""
        columns = [
            [key[0] for key in self.keys],
            [key[1] for key in self.keys],
            self.offsets[:-1],
            self.lengths,
            list(self.stop_reasons),
            self.weights,
            self.seeds,
        ]
        return pa.table(columns, schema=ROLLOUTS_SCHEMA)


@dataclass(frozen=True)
class Shard:
    """A shard in memory: `shard[row]` is a rollout, `len(shard)` their number."""

    number: int
    arrays: Mapping[str, Array]
    """Each [N, …], read-only."""
    rollouts: RolloutTable

    @property
    def offsets(self) -> Array:
        """[R + 1] int64: rollout r holds the rows offsets[r] to offsets[r + 1]."""
        return self.rollouts.offsets

    def __len__(self) -> int:
        return len(self.rollouts.keys)

    def __getitem__(self, row: int) -> Rollout:
        row = range(len(self))[row]
        start, stop = self.offsets[row], self.offsets[row + 1]
        table = self.rollouts
        sample_id, variation = table.keys[row]
        return Rollout(
            sample_id,
            variation,
            {name: array[start:stop] for name, array in self.arrays.items()},
            table.stop_reasons[row],
            float(table.weights[row]),
            int(table.seeds[row]),
        )

    def __iter__(self) -> Iterator[Rollout]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class ShardFolder:
    """A committed shard on disk, as the store that holds it expects it to be."""

    path: Path
    manifest: str
    """Checksum of the store's manifest."""
    specs: Mapping[str, ArraySpec]
    keys: tuple[Key, ...]
    """The planned keys of this shard."""

    def damaged(self, file: str, reason: str) -> DamagedShard:
        """The error for one file of this shard."""
        return DamagedShard(self.path, file, reason)

    def record(self) -> ShardRecord:
        """The sealed record, checked against store and plan; raises DamagedShard."""
        try:
            record, _ = unseal(self.path / RECORD_FILE, ShardRecord)
        except StoreError as error:
            raise self.damaged(RECORD_FILE, str(error)) from error
        for name, found, expected in (
            ("shard", record.shard, int(self.path.name)),
            ("manifest", record.manifest, self.manifest),
            ("rollouts", record.rollouts, len(self.keys)),
        ):
            if found != expected:
                reason = f"{name} is {found!r} but must be {expected!r}: it is of another store"
                raise self.damaged(RECORD_FILE, reason)
        self._check_listing(record)
        return record

    def strangers(self, record: ShardRecord) -> Iterator[DamagedShard]:
        """Files below the shard that it does not list, and everything that is no plain file."""
        with explain_os_errors(f"list {self.path}"):
            found = sorted(_files_below(self.path))
        for file in found:
            if file not in record.files and file != RECORD_FILE:
                yield self.damaged(file, "it is not a file of this shard")

    def read(self, file: str, expected: FileSum) -> bytes:
        """Content of one file; raises DamagedShard when it is missing, short, long or altered."""
        try:
            return read_summed(self.path / file, expected, "it")
        except StoreError as error:
            raise self.damaged(file, str(error)) from error

    def read_rollouts(self, record: ShardRecord) -> RolloutTable:
        """The rollouts of the shard, checked against record and plan; raises DamagedShard."""
        content = self.read(ROLLOUTS_FILE, record.files[ROLLOUTS_FILE])
        try:
            return _rollout_table(parse_table(content, ROLLOUTS_FILE), self.keys, record.rows)
        except StoreError as error:
            raise self.damaged(ROLLOUTS_FILE, str(error)) from error

    def read_array(self, record: ShardRecord, spec: ArraySpec) -> Array:
        """[N, …] one verified array, read-only; raises DamagedShard."""
        names = zarr_files.expected_files(spec, record.rows)
        files = {name: self.read(name, record.files[name]) for name in names}
        try:
            return zarr_files.decode_array(spec, files, record.rows)
        except StoreError as error:
            raise self.damaged(f"{spec.name}/zarr.json", str(error)) from error

    def load(self) -> Shard:
        """The whole shard, every byte of it verified; raises DamagedShard."""
        record = self.record()
        for stranger in self.strangers(record):
            raise stranger
        self.read(zarr_files.GROUP_FILE, record.files[zarr_files.GROUP_FILE])
        rollouts = self.read_rollouts(record)
        arrays = {name: self.read_array(record, spec) for name, spec in self.specs.items()}
        return Shard(record.shard, arrays, rollouts)

    def _check_listing(self, record: ShardRecord) -> None:
        # Bounds the list below: a record that claims more timesteps than it has files for is wrong.
        limit = len(record.files) * zarr_files.FILE_TIMESTEPS
        if not 0 < record.rows <= limit:
            raise self.damaged(RECORD_FILE, f"rows is {record.rows} but must be in [1, {limit}]")
        expected = {zarr_files.GROUP_FILE, ROLLOUTS_FILE}
        for spec in self.specs.values():
            expected.update(zarr_files.expected_files(spec, record.rows))
        wrong = sorted(expected ^ set(record.files))
        if wrong:
            raise self.damaged(
                RECORD_FILE,
                f"it does not list exactly the files of its arrays: {wrong[:3]} (array "
                f"{array_of(wrong[0])})",
            )


def _files_below(root: Path) -> Iterator[str]:
    """Relative paths of all that is no folder; links are not followed."""
    for folder, folders, files in os.walk(root, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        here = os.path.relpath(folder, root)
        for name in (*files, *links):
            yield os.path.normpath(os.path.join(here, name))


def _raise(error: OSError) -> None:
    raise error


def _rollout_table(table: pa.Table, keys: tuple[Key, ...], rows: int) -> RolloutTable:
    if not table.schema.equals(ROLLOUTS_SCHEMA):
        raise StoreError(f"its columns are {table.schema.names}, not those of rollouts")
    columns = {name: table[name].to_numpy() for name in ("start", "length", "weight", "seed")}
    found = zip(table["sample_id"].to_pylist(), table["variation"].to_pylist(), strict=True)
    if tuple(found) != keys:
        raise StoreError("its keys are not the planned ones")
    offsets = np.append(columns["start"], rows)
    if offsets[0] != 0 or (np.diff(offsets) != columns["length"]).any():
        raise StoreError("its rollouts do not lie end to end on the time axis")
    if (columns["length"] < 1).any():
        raise StoreError("it holds a rollout without timesteps")
    weights = columns["weight"]
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise StoreError("it holds a weight that is no finite number >= 0")
    reasons = tuple(table["stop_reason"].to_pylist())
    return RolloutTable(keys, offsets, reasons, weights, columns["seed"])
