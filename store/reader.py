"""Reading a store: by key, by timestep, or shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from store.commit import ShardWriter
from store.create import create_store
from store.download_ahead import DownloadAhead
from store.encoding import Array
from store.errors import DamagedShard, RolloutNotFound, StoreError
from store.heads import Heads, find_heads, read_heads
from store.layout import Layout, shard_name
from store.object_url import ObjectUrl
from store.plain_file import lies_at
from store.plan import Key, Plan
from store.recent import Recent
from store.rejected import Rejected, read_rejected
from store.remote import ObjectFault, RemoteLayout, layout_of
from store.samples import Samples
from store.schema import Fast, Manifest
from store.sealed import unseal
from store.shard import Rollout, RolloutTable, Shard, Timestep
from store.shard_folder import MappedShard, ShardFolder, VerifiedShard
from store.side_tables import SideTable, check_listing, table_files
from store.tables import read_table
from store.threads import in_threads
from store.zarr_files import ArrayFiles

MAPPED_SHARDS = 64
"""Shards whose files stay mapped, one mapping per array; a process may have 65,530 (Linux)."""

DECODED_SHARDS = 4
"""Shards of encoded arrays that stay in memory whole."""


class PredictionStore:
    """What a teacher predicted at every timestep, as it was committed when the store was opened.

    `refresh` takes in what was committed since.

    Every byte of a shard is checked against its record when the store first touches it. What is
    small (record, headers, table of rollouts) is then kept, and decoded arrays are too (`compact`:
    a whole shard, or the chunks that a rollout lies in). Arrays of the profile `fast` are views of
    files mapped into memory: before any are handed out, the reader looks whether the files still
    lie there as they were, at most every 10 ms; if not, all is checked anew.
    Nothing guards a view that was handed out: who cuts or writes a committed file in place changes
    it, and reading where a file was cut off ends the process (SIGBUS).
    Processes may fork the store or pickle it; threads may share it.
    """

    manifest: Manifest
    fingerprint: str
    """Checksum of the manifest, and through it of plan and samples."""
    plan: Plan
    committed: list[int]
    """Shards that were committed when the store was opened, rising."""

    def __init__(self, layout: Layout, cached_shards: int, mapped_shards: int) -> None:
        self._layout = layout
        self.manifest, self.fingerprint = unseal(layout.manifest, Manifest)
        self.plan = Plan.from_table(read_table(layout.plan, self.manifest), str(layout.plan))
        self.plan.check_buckets(len(self.manifest.buckets), str(layout.plan))
        pa.default_memory_pool().release_unused()  # what decoding and checking the table took
        self._samples = Samples(layout.samples, self.manifest, self.plan)
        pa.default_memory_pool().release_unused()
        find_heads(layout.heads, self.manifest)
        check_listing(self.manifest, str(layout.manifest))
        self.stamps: Mapping[int, float] = layout.stamps()
        """Of every committed shard what tells its commit from a later one."""
        self._pin(list(self.stamps))
        self._files = {
            bucket: ArrayFiles.of_all(self.manifest, bucket)
            for bucket in range(len(self.manifest.buckets)) or [None]
        }
        self._tables: dict[str, SideTable] = {}
        self._mapped_only = isinstance(self.manifest.profile, Fast)
        self._limits = cached_shards, mapped_shards
        self._keep_nothing()

    @classmethod
    def create(
        cls,
        path: str | Path | ObjectUrl,
        manifest: Manifest,
        plan: Plan,
        samples: pa.Table,
        heads: Heads | None = None,
        rejected: Rejected = (),
        tables: Mapping[str, str | Path] | None = None,
    ) -> PredictionStore:
        """Make a store, or open the equal one that is there.

        `samples` has the column sample_id and those of `manifest.conditions`; `heads` holds, for
        every head of the manifest, `GROUP.weight` [C_g, V, D] and `GROUP.bias` [C_g, V] float32;
        `rejected` names samples that the plan leaves out, and the reason of each; `tables` has the
        folder of every table of the manifest, whose files are linked, or else copied. Raises
        StoreError when a store with another manifest, plan, samples, heads or tables is there, or
        one that leaves out other samples, naming what differs.
        """
        folders = {name: Path(folder) for name, folder in (tables or {}).items()}
        create_store(layout_of(path), manifest, plan, samples, heads or {}, rejected, folders)
        return cls.open(path)

    @classmethod
    def open(
        cls,
        path: str | Path | ObjectUrl,
        cached_shards: int = DECODED_SHARDS,
        mapped_shards: int = MAPPED_SHARDS,
    ) -> PredictionStore:
        """Open a store for reading and writing, pinning the shards committed by now.

        At most `cached_shards` decoded shards (`compact`) stay in memory. The files of at most
        `mapped_shards` stay mapped; that takes neither descriptors nor memory, and mapping them
        anew costs a quarter of what it takes to read them.
        Raises StoreError when there is none, or its manifest, plan or samples were altered.
        """
        layout = layout_of(path).opened()
        if not lies_at(layout.manifest):
            raise StoreError(layout.why_no_store())
        for name, limit in (("cached_shards", cached_shards), ("mapped_shards", mapped_shards)):
            if limit < 1:
                raise StoreError(f"{name} is {limit} but must be >= 1: raise it")
        return cls(layout, cached_shards, mapped_shards)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as its path: another process opens it again, with the same pinned shards."""
        return _reopen, (self.path, self._limits, self.fingerprint, self.committed)

    @property
    def path(self) -> Path | ObjectUrl:
        """Absolute path of the store, or its URL."""
        return self._layout.place

    @property
    def is_remote(self) -> bool:
        """Whether the store is in object storage."""
        return isinstance(self._layout, RemoteLayout)

    @property
    def folder_here(self) -> Path:
        """Folder on this machine where shards are made: of the store, or of its copy."""
        return self._layout.root

    @property
    def claims(self) -> Path | None:
        """Folder of what says who writes which shard; None where workers have none in common."""
        return None if self.is_remote else self._layout.claims

    @property
    def samples(self) -> pa.Table:
        """The conditioning inputs, one row per sample: all of them, in memory from then on.

        Raises StoreError when the file was altered. `samples_of` takes less.
        """
        return self._samples.table

    @property
    def rejected(self) -> Rejected:
        """Samples that the plan leaves out, and the reason of each; raises StoreError."""
        return read_rejected(self._layout.rejected, self.manifest)

    @property
    def planned_shards(self) -> int:
        """Number of shards when the store is complete."""
        return len(self.plan)

    def missing(self) -> list[int]:
        """Planned shards that were not committed when the store was opened, rising."""
        return [shard for shard in range(len(self.plan)) if shard not in self._pinned]

    def refresh(self) -> bool:
        """Pin the shards committed by now; whether they are others than before.

        Lists them and reads nothing of them. What is kept of shards stays, unless one of them was
        taken out. Who shares the store with threads calls it from one of them. Raises StoreError.
        """
        stamps, before = self._layout.stamps(), self.stamps
        if stamps == before and self.committed == list(stamps):
            return False
        self._pin(list(stamps))
        self.stamps = stamps
        if any(stamps.get(shard) != stamp for shard, stamp in before.items()):
            self._keep_nothing()
        return True

    def _keep_nothing(self) -> None:
        cached_shards, mapped_shards = self._limits
        if self.is_remote:
            # What is mapped stays in the cache, where others need room too.
            mapped_shards = min(mapped_shards, cached_shards)
        self._verified: dict[int, VerifiedShard] = {}
        self._mapped: Recent[MappedShard] = Recent(mapped_shards)
        self._decoded: Recent[Shard] = Recent(cached_shards)

    def is_committed(self, shard: int) -> bool:
        """Whether a shard is committed by now; unlike `committed` it asks the disk."""
        self._check_planned(shard)
        return self._layout.is_committed(shard)

    def committed_s(self, shard: int) -> float:
        """When a shard of `committed` was committed, in seconds since 1970; raises StoreError."""
        self._require_committed(shard)
        return self._layout.committed_s(shard)

    def writer(self, shard: int) -> ShardWriter:
        """A writer of one planned shard; raises StoreError when it is not planned."""
        self._check_planned(shard)
        return ShardWriter(self._layout, shard, self.plan, self.manifest, self.fingerprint)

    def __len__(self) -> int:
        return int(self.plan.sizes[self.committed].sum())

    def __iter__(self) -> Iterator[Key]:
        return self.keys()

    def __contains__(self, key: object) -> bool:
        place = self.plan.locate(key) if isinstance(key, tuple) else None
        return place is not None and place[0] in self._pinned

    def keys(self) -> Iterator[Key]:
        """(sample_id, variation) of every committed rollout, in the order of the plan."""
        return (key for shard in self.committed for key in self.plan[shard])

    def lengths(self, progress: Callable[[Sequence[int]], Iterable[int]] = iter) -> list[Array]:
        """Timesteps of every rollout, one [R] int64 array per committed shard, in that order.

        Reads only each shard's record and table, half a millisecond each; `progress` may wrap the
        list of shards (tqdm). Raises ShardError.
        """
        found = in_threads(lambda shard: self.folder(shard).read_lengths(), self.committed)
        return [lengths for _, lengths in zip(progress(self.committed), found, strict=True)]

    def rollout_table(self, shard: int) -> RolloutTable:
        """Lengths, stop reasons and weights of a committed shard, without its arrays.

        Raises StoreError when it was not committed when the store was opened, DamagedShard.
        """
        self._require_committed(shard)
        folder = self.folder(shard)
        return folder.read_rollouts(folder.record())

    def folder(self, shard: int) -> ShardFolder:
        """A shard as it lies on disk; of one in object storage its record and table alone.

        Raises StoreError when it is not planned; from object storage ShardError too.
        """
        self._check_planned(shard)
        with self._blaming(shard):
            return self._folder_at(self._layout.tables_of(shard), shard)

    @contextmanager
    def whole_folder(self, shard: int) -> Iterator[ShardFolder]:
        """A committed shard with all that is stored of it, be it right or wrong, meanwhile.

        Raises StoreError when it is not planned; from object storage ShardError too.
        """
        self._check_planned(shard)
        with ExitStack() as stack:
            with self._blaming(shard):
                path = stack.enter_context(self._layout.whole(shard))
            yield self._folder_at(path, shard)

    def expect(self, shards: Sequence[int]) -> None:
        """Say which shards are needed next; those in object storage are downloaded ahead."""
        if isinstance(self._layout, RemoteLayout):
            self._ahead.expect(self._layout.fitting(shards))

    @cached_property
    def _ahead(self) -> DownloadAhead:
        assert isinstance(self._layout, RemoteLayout)
        return DownloadAhead(self._layout.fetch_ahead)

    def _folder_at(self, path: Path, shard: int) -> ShardFolder:
        files = self._files[self.plan.bucket_of(shard)]
        return ShardFolder(path, self.fingerprint, files, self.plan, self.manifest.drawn)

    @contextmanager
    def _blaming(self, shard: int) -> Iterator[None]:
        """Ascribe what is wrong with an object to its shard: DamagedShard."""
        try:
            yield
        except ObjectFault as error:
            folder = self._folder_at(self._layout.shard(shard), shard)
            raise folder.damaged(error.file, error.reason) from error

    def shard(self, shard: int) -> Shard:
        """All rollouts of a committed shard, verified; read-only arrays.

        Raises StoreError when it was not committed when the store was opened, DamagedShard when
        any file of it is missing, altered or foreign, UnreadableShard when the system does not let
        us read it.
        """
        self._require_committed(shard)
        if self._mapped_only:
            return self._mapped_shard(shard).whole
        decoded = self._decoded.get(shard)
        if decoded is None:
            self._decoded.make_room()
            decoded = self._mapped_shard(shard).load()
            self._decoded.put(shard, decoded)
        return decoded

    @cached_property
    def heads(self) -> dict[str, Array]:
        """`GROUP.weight` [C_g, V, D] and `GROUP.bias` [C_g, V] float32 of every head, read-only.

        Empty where the target is not `hidden`. Raises StoreError when the file was altered.
        """
        return read_heads(self._layout.heads, self.manifest)

    def table(self, name: str) -> SideTable:
        """A side table, whose files are compared with their sums when first opened.

        Raises StoreError for a name that the manifest does not list.
        """
        if name not in self.manifest.tables:
            raise StoreError(
                f"{self.path} has no table {name!r}: it has {sorted(self.manifest.tables)}"
            )
        if name not in self._tables:
            folder, facts = self._layout.tables / name, self.manifest.tables[name]
            self._layout.obtain(table_files(name, facts))
            sums = {Path(file).name: self.manifest.files[file] for file in table_files(name, facts)}
            self._tables[name] = SideTable(folder, facts, sums)
        return self._tables[name]

    @overload
    def __getitem__(self, key: tuple[str, int]) -> Rollout: ...
    @overload
    def __getitem__(self, key: tuple[str, int, int]) -> Timestep: ...
    def __getitem__(self, key: tuple[str, int] | tuple[str, int, int]) -> Rollout | Timestep:
        """`store[sample_id, variation]` or `store[sample_id, variation, timestep]`.

        Raises RolloutNotFound (a KeyError) saying whether the key is planned, StoreError for a
        timestep outside the rollout, ShardError.
        """
        if not isinstance(key, tuple) or len(key) not in (2, 3):
            raise StoreError(f"key {key!r} must be (sample_id, variation[, timestep]): correct it")
        if len(key) == 3 and not isinstance(key[2], int | np.integer):
            raise StoreError(f"timestep {key[2]!r} of key {key!r} must be an integer: correct it")
        shard, row = self._locate(key[0], key[1])
        decoded = None if self._mapped_only else self._decoded.get(shard)
        if decoded is None:
            rollout = self._mapped_shard(shard).rollout(row, key[:2])
        else:
            rollout = decoded[row]
        return rollout[key[2]] if len(key) == 3 else rollout

    def sample(self, sample_id: str) -> dict[str, Any]:
        """The conditioning inputs of one sample by column; raises RolloutNotFound."""
        return self.samples_of([sample_id])[0]

    def samples_of(self, sample_ids: Sequence[str]) -> list[dict[str, Any]]:
        """The conditioning inputs of some samples, in their order; raises RolloutNotFound."""
        rows = [self._sample_row(sample_id) for sample_id in sample_ids]
        return self._samples.take(sample_ids, rows)

    def samples_at(self, shards: Sequence[int], rows: Sequence[int]) -> list[dict[str, Any]]:
        """The conditioning inputs of some planned rollouts, by their shards and rows in these.

        What a batch needs; nothing is looked up by its text.
        """
        numbers = self.plan.samples[self.plan.starts[shards] + rows]
        sample_ids = self.plan.sample_ids.take(pa.array(numbers)).to_pylist()
        return self._samples.take(sample_ids, self._samples.rows_of(numbers))

    def _sample_row(self, sample_id: str) -> int:
        row = self._samples.find(sample_id) if isinstance(sample_id, str) else None
        if row is None:
            raise RolloutNotFound(
                f"sample {sample_id!r} is not in {self._layout.samples}: it has "
                f"{self._samples.count} samples; take an id from keys()"
            )
        return row

    def _mapped_shard(self, shard: int) -> MappedShard:
        mapped = self._mapped.get(shard)
        if mapped is None or not mapped.unchanged_lately():
            self._mapped.make_room()
            mapped = self._map(shard)
            self._verified[shard] = mapped.verified
            self._mapped.put(shard, mapped)
        return mapped

    def _map(self, shard: int) -> MappedShard:
        """Map a shard, verifying it unless it lies there as when it was verified."""
        with self._blaming(shard):
            path, lease = self._layout.lease(shard, self._mapped.clear)
        folder, verified = self._folder_at(path, shard), self._verified.get(shard)
        mapped = folder.reopen(verified) if verified else None
        if mapped is None:
            try:
                mapped = folder.open()
            except DamagedShard:
                if not self._layout.forget(shard):  # the only one there is
                    raise
                with self._blaming(shard):
                    path, lease = self._layout.lease(shard, self._mapped.clear)
                mapped = self._folder_at(path, shard).open()
        mapped.lease = lease
        return mapped

    def _pin(self, committed: list[int]) -> None:
        unplanned = [shard for shard in committed if shard >= len(self.plan)]
        if unplanned:
            raise StoreError(
                f"{self._layout.shard(unplanned[0])} is not planned, the plan has "
                f"{len(self.plan)} shards: move it out of the store"
            )
        self.committed = committed
        self._pinned = frozenset(committed)

    def _locate(self, sample_id: str, variation: int) -> tuple[int, int]:
        place = self.plan.locate((sample_id, variation))
        if place is not None and place[0] in self._pinned:
            return place
        where = f"sample {sample_id!r}, variation {variation!r}"
        if place is None:
            raise RolloutNotFound(
                f"{where} is not planned in {self.path}: its plan has {self.plan.rollouts} "
                "rollouts; take a key from keys(), or from `foretell inspect STORE --shard NUMBER`"
            )
        raise RolloutNotFound(
            f"{where} is planned in shard {shard_name(place[0])}, which is not committed: "
            f"{self._how_to_commit()}"
        )

    def _check_planned(self, shard: int) -> None:
        if not isinstance(shard, int | np.integer):
            raise StoreError(f"shard {shard!r} of {self.path} must be an integer: correct it")
        if not 0 <= shard < len(self.plan):
            raise StoreError(
                f"shard {shard} is not planned: {self.path} has shards 0 to {len(self.plan) - 1}"
            )

    def _require_committed(self, shard: int) -> None:
        if shard not in self._pinned or not isinstance(shard, int | np.integer):
            self._check_planned(shard)
            raise StoreError(f"shard {shard_name(shard)} is not committed: {self._how_to_commit()}")

    def _how_to_commit(self) -> str:
        return f"run the rollout of {self.path}, or open the store again if that has happened"


def _reopen(
    path: Path | ObjectUrl, limits: tuple[int, int], fingerprint: str, committed: list[int]
) -> PredictionStore:
    store = PredictionStore.open(path, *limits)
    if store.fingerprint != fingerprint:
        raise StoreError(f"{path} is another store than the one that was pickled: open it again")
    store._pin(committed)
    return store
