"""Writing one shard: buffer in memory, write to tmp/, sync, rename once."""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from store.durable import Content, sync_folder, sync_subfolders, write_file
from store.encoding import Array, find_fault
from store.errors import StoreError, array_of, explain_os_errors
from store.layout import Layout, shard_name
from store.plan import Key, Plan
from store.schema import Manifest
from store.sealed import seal
from store.shard import RolloutTable, ShardRecord
from store.shard_folder import RECORD_FILE, ROLLOUTS_FILE
from store.sums import write_summed
from store.tables import table_bytes
from store.zarr_files import HEADER_FILE, ArrayFiles, Unencodable, group_header

MAX_STOP_REASON_LETTERS = 64


class _Draft(NamedTuple):
    timesteps: int
    arrays: dict[str, Array]
    stop_reason: str
    weight: float
    seed: int
    drawn: dict[str, int]


class ShardWriter:
    """Collects the rollouts of one shard and publishes them in one act.

    Rollouts may come in any order; they are laid out in the order of the plan, so that the bytes
    do not depend on who wrote them. A writer left without `commit` leaves nothing behind.
    """

    def __init__(
        self, layout: Layout, shard: int, plan: Plan, manifest: Manifest, seal: str
    ) -> None:
        self._layout = layout
        self._shard = shard
        self._keys = dict.fromkeys(plan[shard])
        self._bucket = plan.bucket_of(shard)
        self._manifest = manifest
        self._manifest_seal = seal
        self._files = ArrayFiles.of_all(manifest, self._bucket)
        self._drafts: dict[Key, _Draft] = {}
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def append(
        self,
        sample_id: str,
        variation: int,
        arrays: Mapping[str, Array],
        *,
        stop_reason: str,
        weight: float,
        seed: int,
        drawn: Mapping[str, int] | None = None,
    ) -> None:
        """Add one rollout; each array is [T, …] as `array_specs` declares it, and is copied.

        `drawn` has every name of the manifest's. Raises StoreError for a key that this shard does
        not plan or already holds, for other names or no 64-bit integers in `drawn`, and for
        arrays that the manifest does not allow (naming timestep and stream).
        """
        self._check_open()
        key = (sample_id, variation)
        if key not in self._keys:
            raise StoreError(
                f"sample {sample_id!r}, variation {variation} is not planned in {self._place}: "
                "append the keys that the plan lists for it"
            )
        where = f"{self._place}, sample {sample_id!r}, variation {variation}"
        if key in self._drafts:
            raise StoreError(f"{where} was appended twice: append each key of the plan once")
        self._check_arrays(arrays, where)
        _check_facts(where, stop_reason, weight, seed)
        numbers = _numbers(where, self._manifest.drawn, drawn or {})
        copies = {name: np.array(arrays[name], order="C") for name in self._files}
        timesteps = len(next(iter(copies.values())))
        facts = (stop_reason, float(weight), int(seed), numbers)
        self._drafts[key] = _Draft(timesteps, copies, *facts)

    def commit(self) -> bool:
        """Publish the shard durably; False when another writer had already published it.

        Raises StoreError when planned rollouts are missing or the disk fails; then nothing is
        published and nothing is left in tmp/.
        """
        self._check_open()
        missing = [key for key in self._keys if key not in self._drafts]
        if missing:
            raise StoreError(
                f"{self._place} lacks {len(missing)} of {len(self._keys)} "
                f"planned rollouts, first sample {missing[0][0]!r}, variation {missing[0][1]}: "
                "append them before committing"
            )
        staged = self._layout.tmp / f"{shard_name(self._shard)}-{uuid.uuid4().hex}"
        try:
            with explain_os_errors(f"commit {self._place}"):
                if self._layout.is_committed(self._shard):
                    return False
                self._stage(staged)
                return self._layout.publish(staged, self._shard)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            self._close()

    def _stage(self, staged: Path) -> None:
        """Write and sync everything below `staged`, the record last."""
        self._layout.tmp.mkdir(exist_ok=True)
        staged.mkdir()
        rollouts, sums = self._rollouts(), {}
        for file, content in self._contents(rollouts):
            path = staged / file
            with self._writing(file):
                path.parent.mkdir(parents=True, exist_ok=True)
                sums[file] = write_summed(path, content)
        sync_subfolders(staged)
        record = ShardRecord(
            shard=self._shard,
            manifest=self._manifest_seal,
            rows=int(rollouts.offsets[-1]),
            rollouts=len(self._keys),
            files=sums,
        )
        with self._writing(RECORD_FILE):
            write_file(staged / RECORD_FILE, [seal(record)])
        sync_folder(staged)

    def _contents(self, rollouts: RolloutTable) -> Iterator[tuple[str, Iterable[Content]]]:
        """Every file except the record; an array is let go once it is written."""
        arrays, timesteps = list(self._files.values()), int(rollouts.offsets[-1])
        yield HEADER_FILE, [group_header(arrays, timesteps)]
        yield ROLLOUTS_FILE, [table_bytes(rollouts.to_table(tuple(self._keys)))]
        for files in arrays:
            parts = [self._drafts[key].arrays.pop(files.spec.name) for key in self._keys]
            yield files.header, [files.encode_header(timesteps)]
            yield files.data, self._encoded(files, parts, rollouts)

    def _encoded(
        self, files: ArrayFiles, parts: Sequence[Array], rollouts: RolloutTable
    ) -> Iterator[Content]:
        try:
            yield from files.encode(parts)
        except Unencodable as error:
            sample_id, variation = tuple(self._keys)[rollouts.row_of(error.timestep)]
            raise StoreError(
                f"{self._place_of(files.data)}, at or behind sample {sample_id!r}, variation "
                f"{variation}: {error}"
            ) from error

    def _rollouts(self) -> RolloutTable:
        drafts = [self._drafts[key] for key in self._keys]
        lengths = [draft.timesteps for draft in drafts]
        return RolloutTable(
            offsets=np.cumsum([0, *lengths], dtype=np.int64),
            stop_reasons=tuple(draft.stop_reason for draft in drafts),
            weights=np.array([draft.weight for draft in drafts]),
            seeds=np.array([draft.seed for draft in drafts], np.uint64),
            drawn={
                name: np.array([draft.drawn[name] for draft in drafts], np.int64)
                for name in self._manifest.drawn
            },
        )

    def _check_arrays(self, arrays: Mapping[str, Array], where: str) -> None:
        fault = find_fault(self._manifest, arrays, self._bucket)
        if fault is None:
            return
        place = "" if fault.timestep is None else f", timestep {fault.timestep}"
        if fault.stream is not None:
            place += f", stream {self._manifest.streams[fault.stream].name!r}"
        file = self._files[fault.array].data
        raise StoreError(
            f"{where}{place}: array {fault.array!r} (file {file!r}) is refused because "
            f"{fault.reason}; the manifest sets what is allowed, correct what the family or the "
            "target computes"
        )

    @property
    def _place(self) -> str:
        return f"shard {shard_name(self._shard)} of {self._layout}"

    def _place_of(self, file: str) -> str:
        array = array_of(file)
        return f"{self._place}, file {file!r}{f' (array {array!r})' if array else ''}"

    def _writing(self, file: str) -> AbstractContextManager[None]:
        """Explains OSErrors in the block by the file, and by the rollouts that it is of."""
        (sample_id, variation), *more = self._keys
        rollouts = f"sample {sample_id!r}, variation {variation}"
        rollouts += f" and {len(more)} more" if more else ""
        return explain_os_errors(f"commit {self._place_of(file)}, {rollouts}")

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the writer of {self._place} is closed: open another with writer()")

    def _close(self) -> None:
        self._drafts.clear()
        self._closed = True


def _check_facts(where: str, stop_reason: str, weight: float, seed: int) -> None:
    if not 0 < len(stop_reason) <= MAX_STOP_REASON_LETTERS or not stop_reason.isprintable():
        raise StoreError(
            f"{where}: stop reason {stop_reason[:80]!r} must be 1 to {MAX_STOP_REASON_LETTERS} "
            "printable letters: name the cause in a word"
        )
    if not (math.isfinite(weight) and weight >= 0):
        raise StoreError(f"{where}: weight is {weight} but must be finite and >= 0: correct it")
    if not 0 <= seed < 2**64:
        raise StoreError(f"{where}: seed is {seed} but must be in [0, 2**64): correct it")


def _numbers(where: str, names: Sequence[str], drawn: Mapping[str, int]) -> dict[str, int]:
    """What a variation drew, in the order of the manifest; raises StoreError."""
    if set(drawn) != set(names):
        raise StoreError(
            f"{where}: drawn has {sorted(drawn)} but the manifest lists {sorted(names)}: give each"
        )
    for name, number in drawn.items():
        if not isinstance(number, int | np.integer) or not -(2**63) <= number < 2**63:
            raise StoreError(
                f"{where}: drawn {name!r} is {number!r} but must be an integer of 64 bits: "
                "correct it"
            )
    return {name: int(drawn[name]) for name in names}
