"""Whether the disk holds what stage one is about to write, and still does before every shard."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from stages.errors import UserError
from store import Plan, PredictionStore
from store.encoding import ArraySpec, array_specs
from store.plan import Key
from store.schema import Compact, Manifest

logger = logging.getLogger(__name__)

Lengths = Callable[[Key], int]
"""Timesteps that a planned rollout is expected to have."""

MEASURED_SHARDS = 32
"""Committed shards whose sizes say what an encoded timestep takes, at most."""


class FloorReached(OSError):
    """Too little space is left to begin another shard; what was committed is safe.

    An OSError, so that the exit code is 1: a person must act. With 75 a scheduler would requeue
    the job at once, again and again.
    """


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write to the file system of a path, which need not exist."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize


def require_floor(path: Path, floor: int) -> None:
    """Raise FloorReached when less than `floor` bytes are free at `path`."""
    free = free_bytes(path)
    if free < floor:
        raise FloorReached(
            f"{free:,} bytes are free at {path}, and rollout.free_floor lets no shard be begun "
            f"with less than {floor:,}"
        )


def expected_timesteps(plan: Plan, shards: Sequence[int], lengths: Lengths) -> list[int]:
    """Timesteps of each of some shards, in their order."""
    return [sum(map(lengths, plan[shard])) for shard in shards]


def plain_bytes(manifest: Manifest, plan: Plan, timesteps: Mapping[int, int]) -> Counter[str]:
    """Bytes of every array of some shards, given the timesteps of each, before any encoding."""
    found: Counter[str] = Counter()
    for shard, count in timesteps.items():
        for name, spec in array_specs(manifest, plan.bucket_of(shard)).items():
            found[name] += spec.row_bytes * _stored_timesteps(manifest, spec, count)
    return found


def _stored_timesteps(manifest: Manifest, spec: ArraySpec, timesteps: int) -> int:
    """Timesteps that take space: the last plain chunk is filled up; encoded, that is nothing."""
    if isinstance(manifest.profile, Compact):
        return timesteps
    return -(-timesteps // spec.chunk_timesteps) * spec.chunk_timesteps


def committed_share(store: PredictionStore) -> dict[str, float] | None:
    """Bytes of every array on disk per plain byte, as committed shards have it; None without any.

    Raises ShardError.
    """
    rows, found = {}, Counter[str]()
    for shard in islice(store.committed, MEASURED_SHARDS):
        folder = store.folder(shard)
        record = folder.record()
        rows[shard] = record.rows
        found.update({name: record.files[f.data].bytes for name, f in folder.files.items()})
    plain = plain_bytes(store.manifest, store.plan, rows)
    return {name: found[name] / plain[name] for name in plain} if plain else None


def refuse_small_disk(store: PredictionStore, lengths: Lengths, floor: int) -> None:
    """Refuse to begin when the missing shards and the floor do not fit on the disk.

    What encoded shards take is known from those that are committed; before there are any, a disk
    that would not hold them plain is warned of. How much object storage holds, nobody knows.
    Raises UserError, ShardError.
    """
    missing = store.missing()
    if not missing:
        return
    timesteps = dict(zip(missing, expected_timesteps(store.plan, missing, lengths), strict=True))
    plain = plain_bytes(store.manifest, store.plan, timesteps)
    encoded = isinstance(store.manifest.profile, Compact)
    share = committed_share(store) if encoded else None
    needed = round(sum(size * (share or {}).get(name, 1) for name, size in plain.items()))
    free = free_bytes(store.folder_here)
    if store.is_remote or needed + floor <= free:
        return
    found = (
        f"the {len(missing)} missing shards of {store.path} will take about {needed:,} bytes, and "
        f"rollout.free_floor keeps {floor:,} free, but {free:,} are free there"
    )
    if encoded and share is None:
        logger.warning(
            "%s. The profile `compact` takes less, and how much less the first shards will tell; "
            "`foretell rollout CONFIG --estimate` measures it before",
            found,
        )
        return
    raise UserError(
        f"{found}: free space, let the store lie elsewhere (store, runs), keep less "
        "(rollout.target, rollout.profile, rollout.samples), or begin nevertheless with "
        "rollout.disk_check: false; `foretell rollout CONFIG --estimate` shows what takes how much"
    )
