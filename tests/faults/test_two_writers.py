"""Of those who write the same, one wins; the others leave nothing and disturb nobody."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from store import PredictionStore, verify
from store.repair import repair
from store.schema import Full
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from tests.test_store_commit import by_profile, tree

pytestmark = pytest.mark.slow

WRITERS = 4


@by_profile
def test_of_threads_that_write_the_same_shards_one_wins_each(tmp_path: Path, profile) -> None:
    """Processes race in test_store_commit."""
    manifest = synthetic_manifest(Full(), streams=1, profile=profile)
    whole, path = (synthetic_store(tmp_path / name, manifest, 24, 1, 2).path for name in "ab")
    shards = range(PredictionStore.open(whole).planned_shards)
    for shard in shards:
        write_synthetic_shard(PredictionStore.open(whole), shard, 8)
    barrier = Barrier(WRITERS)

    def write_all(_writer: int) -> list[bool]:
        store, won = PredictionStore.open(path), []
        for shard in shards:
            barrier.wait()
            won.append(write_synthetic_shard(store, shard, 8))
        return won

    with ThreadPoolExecutor(WRITERS) as threads:
        won = list(threads.map(write_all, range(WRITERS)))
    assert [sum(each) for each in zip(*won, strict=True)] == [1] * len(shards)
    assert os.listdir(path / "tmp") == []
    assert tree(path) == tree(whole)


def test_of_threads_that_make_the_same_store_one_wins_and_the_others_open_it(
    tmp_path: Path,
) -> None:
    barrier = Barrier(WRITERS)
    manifest = synthetic_manifest(Full())

    def make(_writer: int) -> str:
        barrier.wait()
        return synthetic_store(tmp_path / "store", manifest, 4, 1, 2).fingerprint

    with ThreadPoolExecutor(WRITERS) as threads:
        assert len(set(threads.map(make, range(WRITERS)))) == 1
    assert os.listdir(tmp_path / "store/tmp") == []
    assert verify(tmp_path / "store").ok


def test_of_repairs_at_the_same_time_one_takes_the_shard_out(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "store", synthetic_manifest(Full()), 4, 1, 2)
    write_synthetic_shard(store, 0, 8)
    (store.path / "shards/00000/extra").write_bytes(b"x")
    barrier = Barrier(WRITERS)

    def take_out(_repair: int) -> int:
        barrier.wait()
        return len(repair(store.path, [0]))

    with ThreadPoolExecutor(WRITERS) as threads:
        assert sum(threads.map(take_out, range(WRITERS))) == 1
    assert len(os.listdir(store.path / "tmp")) == 1


@pytest.mark.slow
def test_workers_of_the_same_task_end_with_every_shard_once(run_of, tiny_run, start_worker) -> None:
    section = tiny_run.document["rollout"] | {"rollouts_per_shard": 2, "batch_size": 2}
    own, whole = (run_of(n, fitted=True, students=None, rollout=section) for n in ("own", "whole"))
    workers = [start_worker("rollout", own, f"--task={task}/2") for task in (0, 1, 0, 1)]
    assert [worker.wait() for worker in workers] == [0] * 4
    whole.do("rollout")
    assert tree(own.root / "store") == tree(whole.root / "store")
    assert os.listdir(own.root / "store/tmp") == []
