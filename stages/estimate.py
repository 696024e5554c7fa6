"""What stage one will write and how long it will take, from a few batches that are really timed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stages.background_writer import Drawn
from stages.errors import UserError
from stages.free_space import Lengths, expected_timesteps, free_bytes, plain_bytes
from store import Plan, PredictionStore
from store.encoding import Array
from store.object_url import ObjectUrl, folder_here
from store.plan import Key
from store.remote import store_exists
from store.schema import Compact, Manifest, Record
from store.zarr_files import ArrayFiles

TIMED_BATCHES = 3
"""Batches that are timed, after one that is not: the first one waits for memory and caches."""


class Estimate(Record):
    """What stage one will write, and how long it will take."""

    samples: int
    """Samples of the plan."""
    rejected: int
    """Samples that the teacher refuses, which are left out."""
    rollouts: int
    """Rollouts of the plan."""
    shards: int
    """Shards of the plan."""
    timesteps: int
    """Timesteps that all rollouts will have, as far as the timed batches can tell."""
    bytes: dict[str, int]
    """Of every array, all shards together."""
    targets: dict[str, int]
    """The same, by what comes before the first dot of the name of an array."""
    bytes_in_all: int
    """Of all arrays."""
    missing_shards: int
    """Shards that are not committed."""
    missing_bytes: int
    """What their arrays will take."""
    timed_rollouts: int
    """Rollouts that were predicted to measure the rate; none was stored."""
    timesteps_per_s: float | None
    """Rate of one process; null when nothing is left for the teacher to predict."""
    processes: int
    """Processes that share the work (rollout.processes)."""
    hours: float
    """How long the missing shards take all processes together, if the rate is theirs."""
    free_bytes: int
    """Free where the store lies."""
    free_floor: int
    """Least that must stay free (rollout.free_floor)."""
    fits: bool
    """Whether the missing shards leave the floor free."""


class Timed(NamedTuple):
    """Some batches that were predicted and timed."""

    rollouts: int
    timesteps: int
    expected: int
    """Timesteps that the same rollouts were expected to have."""
    seconds: float
    share: dict[str, float]
    """Bytes of every array on disk per plain byte; an array that is not in it takes as many."""


def missing_of(path: Path | ObjectUrl, plan: Plan) -> list[int]:
    """Shards of a plan that the store at `path` lacks: all of them where there is no store.

    Raises UserError for a store of another plan, StoreError.
    """
    if not store_exists(path):
        return list(range(len(plan)))
    store = PredictionStore.open(path)
    if store.plan != plan:
        raise UserError(
            f"the store {path} was planned with other settings than the configuration has now, so "
            "`foretell rollout` would refuse it: choose another folder, or give its configuration"
        )
    return store.missing()


def trial_plan(
    manifest: Manifest, plan: Plan, missing: Sequence[int], batch_size: int
) -> Plan | None:
    """Plan what is timed: batches of so many rollouts, each as a shard, spread over those missing.

    They are taken from the midst of shards, whose rollouts are laid out by length, and only from
    those of which the teacher predicts anything; None where there is no such shard.
    """
    asked = _asked(manifest, plan, missing)
    if not asked:
        return None
    places = sorted({asked[len(asked) * at // TIMED_BATCHES] for at in range(TIMED_BATCHES)})
    buckets = None if plan.buckets is None else [int(plan.buckets[shard]) for shard in places]
    return Plan.of([_midst(plan[shard], batch_size) for shard in places], buckets)


def _midst(keys: Sequence[Key], count: int) -> Sequence[Key]:
    start = max(0, (len(keys) - count) // 2)
    return keys[start : start + count]


def _asked(manifest: Manifest, plan: Plan, shards: Iterable[int]) -> list[int]:
    """Those of some shards of which the teacher predicts anything."""
    if plan.buckets is None:
        return list(shards)
    return [shard for shard in shards if manifest.buckets[plan.buckets[shard]].predicted]


def time_batches(
    manifest: Manifest,
    trial: Plan,
    lengths: Lengths,
    predict: Callable[[Iterable[int]], Iterable[Drawn]],
) -> Timed:
    """Time how long `predict` takes for the rollouts of the shards of a trial, all of them.

    The first shard is predicted once more before, and not timed.
    """
    for _ in predict([0]):
        pass
    started = time.perf_counter()
    drawn = list(predict(range(len(trial))))
    seconds = time.perf_counter() - started
    return Timed(
        rollouts=len(drawn),
        timesteps=sum(map(_timesteps, drawn)),
        expected=sum(lengths(rollout.key) for rollout in drawn),
        seconds=seconds,
        share=_encoded_share(manifest, trial, drawn),
    )


def _timesteps(drawn: Drawn) -> int:
    return len(next(iter(drawn.arrays.values())))


def _encoded_share(manifest: Manifest, trial: Plan, drawn: Sequence[Drawn]) -> dict[str, float]:
    """Bytes on disk per plain byte, of every array of which anything was predicted."""
    if not isinstance(manifest.profile, Compact):
        return {}
    by_key = {rollout.key: rollout.arrays for rollout in drawn}
    together: dict[int | None, list[Mapping[str, Array]]] = {}
    for shard, keys in enumerate(trial):
        together.setdefault(trial.bucket_of(shard), []).extend(by_key[key] for key in keys)
    encoded, plain = Counter[str](), Counter[str]()
    for bucket, rollouts in together.items():
        for name, files in ArrayFiles.of_all(manifest, bucket).items():
            parts = [arrays[name] for arrays in rollouts]
            encoded[name] += sum(map(len, files.encode(parts)))
            plain[name] += sum(part.nbytes for part in parts)
    return {name: encoded[name] / plain[name] for name in plain}


def estimated(
    manifest: Manifest,
    plan: Plan,
    missing: Sequence[int],
    lengths: Lengths,
    timed: Timed | None,
    *,
    rejected: int,
    processes: int,
    path: Path | ObjectUrl,
    free_floor: int,
) -> Estimate:
    """Put together what a plan takes; `timed` is None when the teacher has nothing left to predict.

    Expected lengths are scaled by how long the timed rollouts became; a store lies at `path` or
    will lie there.
    """
    longer = 1.0 if timed is None else timed.timesteps / timed.expected
    every = range(len(plan))
    counts = [round(longer * count) for count in expected_timesteps(plan, every, lengths)]
    sizes = _sizes(manifest, plan, dict(zip(every, counts, strict=True)), timed)
    missing_sizes = _sizes(manifest, plan, {shard: counts[shard] for shard in missing}, timed)
    targets: Counter[str] = Counter()
    for name, size in sizes.items():
        targets[name.partition(".")[0]] += size
    rate = None if timed is None else timed.timesteps / timed.seconds
    left = sum(counts[shard] for shard in _asked(manifest, plan, missing))
    free = free_bytes(folder_here(path))
    return Estimate(
        samples=len(plan.sample_ids),
        rejected=rejected,
        rollouts=plan.rollouts,
        shards=len(plan),
        timesteps=sum(counts),
        bytes=sizes,
        targets=dict(targets),
        bytes_in_all=sum(sizes.values()),
        missing_shards=len(missing),
        missing_bytes=sum(missing_sizes.values()),
        timed_rollouts=0 if timed is None else timed.rollouts,
        timesteps_per_s=rate,
        processes=processes,
        hours=0.0 if rate is None else left / rate / processes / 3600,
        free_bytes=free,
        free_floor=free_floor,
        # How much object storage holds, nobody knows.
        fits=isinstance(path, ObjectUrl)
        or not missing
        or sum(missing_sizes.values()) + free_floor <= free,
    )


def _sizes(
    manifest: Manifest, plan: Plan, timesteps: dict[int, int], timed: Timed | None
) -> dict[str, int]:
    share = {} if timed is None else timed.share
    plain = plain_bytes(manifest, plan, timesteps)
    return {name: round(size * share.get(name, 1)) for name, size in plain.items()}
