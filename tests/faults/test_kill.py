"""kill -9 at any moment of either stage: nothing half is ever data, and the end is the same."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from store import PredictionStore, verify
from store.schema import Full, Profile
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from tests.conftest import Run, Worker, write_run
from tests.test_cli_runs import LONG, children, steps_done
from tests.test_store_commit import by_profile, run, tree

pytestmark = pytest.mark.slow

ROUNDS = 260
"""Kills per profile."""


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder that waits for no disk: killing a process loses nothing that was written."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.slow
@by_profile
def test_writers_killed_at_random_moments_publish_whole_shards_only(
    memory: Path, profile: Profile
) -> None:
    manifest = synthetic_manifest(Full(), streams=1, profile=profile)
    whole, store = (synthetic_store(memory / name, manifest, 16, 1, 2) for name in "ab")
    for shard in whole.missing():
        write_synthetic_shard(whole, shard, 8)
    rounds = run("kill", str(store.path), str(whole.path), str(ROUNDS))

    assert len(rounds) == ROUNDS
    assert all(each["sound"] for each in rounds)
    assert sum(each["killed"] for each in rounds) > ROUNDS // 2
    assert sum(each["left"] for each in rounds) > 0  # amid a commit
    assert sum(each["complete"] for each in rounds) > 0  # and the next ones went on from there
    assert verify(store.path).ok
    again = PredictionStore.open(store.path)
    for shard in again.missing():
        assert write_synthetic_shard(again, shard, 8)
    assert tree(store.path) == tree(whole.path)


@pytest.mark.slow
def test_who_makes_a_store_may_be_killed_at_any_disk_call(memory: Path) -> None:
    steps = run("create", str(memory / "store"))
    there = [step["there"] for step in steps]
    assert [step["killed"] for step in steps] == [True] * (len(steps) - 1) + [False]
    assert there == sorted(there)
    assert 10 < there.index(True) < len(steps) - 1
    assert all(step["opened"] == step["there"] for step in steps)
    first = tree(memory / "after-0")
    assert set(first) >= {"manifest.json", "plan.parquet", "samples.parquet"}
    assert all(tree(memory / f"after-{step['step']}") == first for step in steps)


def test_a_repair_that_is_killed_at_any_disk_call_loses_nothing(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "store", synthetic_manifest(Full()), 4, 1, 2)
    write_synthetic_shard(store, 0, 8)
    (store.path / "shards/00000/extra").write_bytes(b"x")
    steps = run("repair", str(store.path))
    assert [step["killed"] for step in steps] == [True] * (len(steps) - 1) + [False]
    moved = [step["moved"] for step in steps]
    assert moved == sorted(moved)
    assert {0, 1} == set(moved)
    assert all(step["there"] == (not step["moved"]) for step in steps)


KILLS = 5
"""Of each stage, end to end."""


def kill_again_and_again(
    start: Callable[[], Worker], done: Callable[[], int], drafts: Callable[[], set[str]], seed: int
) -> None:
    """Kill a stage at its start, after it has done some more pieces, and amid one, by turns."""
    chance = random.Random(seed)
    for attempt in range(KILLS):
        enough, left = done() + 1 + chance.randrange(2), drafts()
        worker = start()

        def ready(kind: int = attempt % 3, enough: int = enough, left: set[str] = left) -> bool:
            return kind == 0 or done() >= enough or (kind == 2 and bool(drafts() - left))

        assert worker.kill_when(ready, signal.SIGKILL) == -signal.SIGKILL


def shards_in(store: Path) -> int:
    return len(os.listdir(store / "shards")) if (store / "shards").exists() else 0


def names_in(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def arrays_of(store: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(store).items() if name.startswith("shards/")}


def sections_of(document: dict[str, Any]) -> dict[str, Any]:
    """Both stages in many small pieces."""
    rollout = {"variations": 4, "rollouts_per_shard": 2, "batch_size": 2}
    student = document["students"]["student"] | {"optimizer": LONG | {"steps": 160}}
    return {"rollout": document["rollout"] | rollout, "students": {"student": student}}


@pytest.fixture(scope="module")
def whole(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    document = {
        "name": "whole", "runs": str(folder), "seed": tiny_run.document["seed"],
        "dataset": str(tiny_run.root / "dataset"),
        "teacher": {"checkpoint": str(tiny_run.root / "teacher")},
    }  # fmt: skip
    run = write_run(document | sections_of(tiny_run.document), folder)
    run.do("rollout", "train:student")
    return run.root


@pytest.fixture
def own(run_of: Callable[..., Run], tiny_run: Run) -> Run:
    """The same run, to be killed."""
    return run_of("own", fitted=True, **sections_of(tiny_run.document))


def require_same_student(own: Path, whole: Path) -> None:
    ours, theirs = (load_file(root / "student/model.safetensors") for root in (own, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_rollout_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(
    own, whole, start_worker
) -> None:
    path = own.root / "store"
    start = partial(start_worker, "rollout", own)
    drafts = partial(names_in, path / "tmp", "0*")
    kill_again_and_again(start, lambda: shards_in(path), drafts, 1)
    found = verify(path)
    assert found.ok
    assert found.not_committed
    last = start_worker("rollout", own)
    assert last.wait() == 0, last.stderr.read_text()
    assert verify(path).ok
    assert arrays_of(path) == arrays_of(whole / "store")
    assert (path / "manifest.json").read_bytes() == (whole / "store/manifest.json").read_bytes()


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_with_the_weights_of_one_that_was_not(
    own, whole, start_worker
) -> None:
    store = f"--set=store={whole / 'store'}"
    folder = own.root / "student"
    start = partial(start_worker, "train:student", own, store)
    drafts = partial(names_in, folder / "checkpoints", ".*")
    kill_again_and_again(start, lambda: steps_done(folder) // 10, drafts, 2)
    assert 20 <= steps_done(folder) < 160
    last = start_worker("train:student", own, store)
    assert last.wait() == 0, last.stderr.read_text()
    require_same_student(own.root, whole)


@pytest.mark.slow
def test_commands_that_are_killed_with_all_their_workers_go_on_where_they_were(
    own, whole, start_program, foretell
) -> None:
    def kill_when(ready: Callable[[], bool], *arguments: str) -> None:
        command = start_program("foretell", *arguments)

        def kill_workers() -> bool:
            if not ready():
                return False
            for pid in children(command.pid):
                os.kill(pid, signal.SIGKILL)
            return True

        assert command.kill_when(kill_workers, signal.SIGKILL) == -signal.SIGKILL

    kill_when(lambda: shards_in(own.root / "store") > 2, "rollout", str(own.path))
    kill_when(lambda: steps_done(own.root / "student") >= 20, "run", str(own.path))
    foretell("run", own.path)
    assert arrays_of(own.root / "store") == arrays_of(whole / "store")
    require_same_student(own.root, whole)
