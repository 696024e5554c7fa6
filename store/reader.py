"""Reading a store: by key, by timestep, or shard by shard."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import pyarrow as pa

from store.commit import ShardWriter
from store.create import check_samples, create_store
from store.encoding import Array, array_specs
from store.errors import RolloutNotFound, StoreError
from store.layout import Layout, shard_name
from store.plan import Key, Plan
from store.schema import Manifest
from store.sealed import unseal
from store.shard import Rollout, RolloutTable, Shard, ShardFolder, Timestep
from store.tables import read_table

CACHED_SHARDS = 4


class PredictionStore:
    """What a teacher predicted at every timestep, as it was committed when the store was opened.

    Every byte of a shard is checked against its record whenever it is loaded; the last few shards
    stay in memory. One store object belongs to one thread; processes may each open or fork it.
    """

    manifest: Manifest
    fingerprint: str
    """Checksum of the manifest, and through it of plan and samples."""
    plan: Plan
    samples: pa.Table
    """The conditioning inputs, one row per sample."""
    committed: list[int]
    """Shards that were committed when the store was opened, rising."""

    def __init__(self, layout: Layout, cached_shards: int) -> None:
        self._layout = layout
        self.manifest, self.fingerprint = unseal(layout.manifest, Manifest)
        self.plan = Plan.from_table(read_table(layout.plan, self.manifest), str(layout.plan))
        self.samples = read_table(layout.samples, self.manifest)
        check_samples(self.samples, self.manifest, self.plan, str(layout.samples))
        pa.default_memory_pool().release_unused()  # what decoding and checking the tables took
        self.committed = layout.committed()
        unplanned = [shard for shard in self.committed if shard >= len(self.plan)]
        if unplanned:
            raise StoreError(
                f"{layout.shard(unplanned[0])} is not planned, the plan has {len(self.plan)} "
                "shards: move it out of the store"
            )
        self._specs = array_specs(self.manifest)
        self._pinned = frozenset(self.committed)
        self._cache: OrderedDict[int, Shard] = OrderedDict()
        self._cached_shards = cached_shards

    @classmethod
    def create(
        cls, path: str | Path, manifest: Manifest, plan: Plan, samples: pa.Table
    ) -> PredictionStore:
        """Make a store, or open the equal one that is there.

        `samples` has the column sample_id and those of `manifest.conditions`. Raises StoreError
        when a store with another manifest, plan or samples is there, naming what differs.
        """
        create_store(Layout.at(path), manifest, plan, samples)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, cached_shards: int = CACHED_SHARDS) -> PredictionStore:
        """Open a store for reading and writing, pinning the shards committed by now.

        Raises StoreError when there is none, or its manifest, plan or samples were altered.
        """
        layout = Layout.at(path)
        if not layout.manifest.is_file():
            raise StoreError(f"{layout.root} is no store: it holds no manifest.json; correct it")
        if cached_shards < 1:
            raise StoreError(f"cached_shards is {cached_shards} but must be >= 1: raise it")
        return cls(layout, cached_shards)

    @property
    def path(self) -> Path:
        """Absolute path of the store."""
        return self._layout.root

    @property
    def planned_shards(self) -> int:
        """Number of shards when the store is complete."""
        return len(self.plan)

    def missing(self) -> list[int]:
        """Planned shards that were not committed when the store was opened, rising."""
        return [shard for shard in range(len(self.plan)) if shard not in self._pinned]

    def is_committed(self, shard: int) -> bool:
        """Whether a shard is committed by now; unlike `committed` it asks the disk."""
        return self._layout.shard(shard).exists()

    def writer(self, shard: int) -> ShardWriter:
        """A writer of one planned shard; raises StoreError when it is not planned."""
        return ShardWriter(
            self._layout, shard, self._planned(shard), self.manifest, self.fingerprint
        )

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

    def lengths(self) -> list[Array]:
        """Timesteps of every rollout, one [R] int64 array per committed shard, in that order.

        Reads only each shard's record and table; raises DamagedShard.
        """
        return [self.rollout_table(shard).lengths for shard in self.committed]

    def rollout_table(self, shard: int) -> RolloutTable:
        """Keys, lengths, stop reasons and weights of a committed shard, without its arrays.

        Raises StoreError when it was not committed when the store was opened, DamagedShard.
        """
        self._require_committed(shard)
        folder = self.folder(shard)
        return folder.read_rollouts(folder.record())

    def folder(self, shard: int) -> ShardFolder:
        """A shard as it lies on disk; raises StoreError when it is not planned."""
        path = self._layout.shard(shard)
        return ShardFolder(path, self.fingerprint, self._specs, self._planned(shard))

    def shard(self, shard: int) -> Shard:
        """All rollouts of a committed shard, verified; read-only arrays.

        Raises StoreError when it was not committed when the store was opened, DamagedShard when
        any file of it is missing, altered or foreign.
        """
        self._require_committed(shard)
        if shard not in self._cache:
            # Room is made first, so that at most `cached_shards` are ever held.
            while len(self._cache) >= self._cached_shards:
                self._cache.popitem(last=False)
            self._cache[shard] = self.folder(shard).load()
        self._cache.move_to_end(shard)
        return self._cache[shard]

    @overload
    def __getitem__(self, key: tuple[str, int]) -> Rollout: ...
    @overload
    def __getitem__(self, key: tuple[str, int, int]) -> Timestep: ...
    def __getitem__(self, key: tuple[str, int] | tuple[str, int, int]) -> Rollout | Timestep:
        """`store[sample_id, variation]` or `store[sample_id, variation, timestep]`.

        Raises RolloutNotFound (a KeyError) saying whether the key is planned, StoreError for a
        timestep outside the rollout.
        """
        if not isinstance(key, tuple) or len(key) not in (2, 3):
            raise StoreError(f"key {key!r} must be (sample_id, variation[, timestep]): correct it")
        shard, row = self._locate(key[0], key[1])
        rollout = self.shard(shard)[row]
        return rollout[key[2]] if len(key) == 3 else rollout

    def sample(self, sample_id: str) -> dict[str, Any]:
        """The conditioning inputs of one sample by column; raises RolloutNotFound."""
        if sample_id not in self._sample_rows:
            raise RolloutNotFound(
                f"sample {sample_id!r} is not in {self._layout.samples}: it has "
                f"{self.samples.num_rows} samples; take an id from keys()"
            )
        row: dict[str, Any] = self.samples.slice(self._sample_rows[sample_id], 1).to_pylist()[0]
        return row

    @cached_property
    def _sample_rows(self) -> dict[str, int]:
        return {id_: row for row, id_ in enumerate(self.samples["sample_id"].to_pylist())}

    def _locate(self, sample_id: str, variation: int) -> tuple[int, int]:
        where = f"sample {sample_id!r}, variation {variation!r}"
        place = self.plan.locate((sample_id, variation))
        if place is None:
            raise RolloutNotFound(
                f"{where} is not planned in {self.path}: its plan has {self.plan.rollouts} "
                "rollouts; take a key from keys()"
            )
        if place[0] not in self._pinned:
            raise RolloutNotFound(
                f"{where} is planned in shard {shard_name(place[0])}, which is not committed: "
                f"{self._how_to_commit()}"
            )
        return place

    def _planned(self, shard: int) -> tuple[Key, ...]:
        if not 0 <= shard < len(self.plan):
            raise StoreError(
                f"shard {shard} is not planned: {self.path} has shards 0 to {len(self.plan) - 1}"
            )
        return self.plan[shard]

    def _require_committed(self, shard: int) -> None:
        if shard not in self._pinned:
            self._planned(shard)
            raise StoreError(f"shard {shard_name(shard)} is not committed: {self._how_to_commit()}")

    def _how_to_commit(self) -> str:
        return f"run the rollout of {self.path}, or open the store again if that has happened"
