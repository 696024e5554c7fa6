"""Workers that share a rollout, as processes: none waits for a slow one, none does what is done."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store import PredictionStore, verify

pytestmark = pytest.mark.slow


@pytest.fixture
def shared_run(run_of, tiny_run) -> Callable[..., Any]:
    """A rollout of 20 shards, whose workers give signs of life ten times a second."""

    def make(name: str, **cluster: Any) -> Any:
        rollout = tiny_run.document["rollout"] | {"variations": 8, "batch_size": 1}
        return run_of(
            name,
            fitted=True,
            students=None,
            rollout=rollout,
            cluster={"heartbeat_s": 0.1} | cluster,
        )

    return make


def shards_of(run: Any) -> dict[str, bytes]:
    """Every file that a rollout stored, but for the records, which name the manifest."""
    root = run.root / "store" / "shards"
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "shard.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def claims_of(run: Any) -> list[Path]:
    return sorted((run.root / "store" / "tmp" / "claims").glob("*.*"))


def committed(run: Any) -> int:
    shards = run.root / "store" / "shards"
    return len(list(shards.iterdir())) if shards.exists() else 0


def require_whole(run: Any) -> None:
    store = PredictionStore.open(run.root / "store")
    assert store.missing() == []
    assert verify(store.path).ok
    assert list((store.path / "tmp").iterdir()) == [], "losers and claims leave nothing"


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory) -> dict[str, bytes]:
    """What one undisturbed process stores."""
    from tests.conftest import write_run

    folder = tmp_path_factory.mktemp("whole")
    document = {
        "name": "whole", "runs": str(folder), "seed": tiny_run.document["seed"],
        "dataset": str(tiny_run.root / "dataset"),
        "teacher": {"checkpoint": str(tiny_run.root / "teacher")},
        "rollout": tiny_run.document["rollout"] | {"variations": 8, "batch_size": 1},
    }  # fmt: skip
    run = write_run(document, folder)
    run.do("rollout")
    return shards_of(run)


def test_the_shard_of_a_killed_worker_is_taken_over(shared_run, start_worker, whole):
    run = shared_run("killed")
    first = start_worker("rollout", run, "--task=0/2")
    second = start_worker("rollout", run, "--task=1/2")
    assert first.kill_when(lambda: committed(run) >= 4, signal.SIGKILL) == -signal.SIGKILL
    assert second.wait() == 0, second.stderr.read_text()
    for left in (run.root / "store" / "tmp").glob("0*"):
        left.rename(run.root / left.name)  # what a kill leaves is garbage, and for gc
    require_whole(run)
    assert shards_of(run) == whole


def test_a_stopped_worker_that_wakes_up_after_it_was_followed_loses_cleanly(
    shared_run, start_worker, whole
):
    run = shared_run("stopped")
    slow = start_worker("rollout", run, "--task=0/2")
    deadline = time.monotonic() + 60
    while committed(run) < 2 or not claims_of(run):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(slow.pid, signal.SIGSTOP)
    other = start_worker("rollout", run, "--task=1/2")
    assert other.wait() == 0, other.stderr.read_text()
    assert PredictionStore.open(run.root / "store").missing() == [], "it waited for nobody"
    os.kill(slow.pid, signal.SIGCONT)
    assert slow.wait() == 0, slow.stderr.read_text()
    require_whole(run)
    assert shards_of(run) == whole


def test_any_number_of_workers_may_go_on_with_what_others_began(shared_run, start_worker, whole):
    run = shared_run("numbers")
    first = start_worker("rollout", run, "--task=0/1")
    assert first.kill_when(lambda: committed(run) >= 3, signal.SIGTERM) == 75
    assert claims_of(run) == []
    begun = committed(run)
    assert begun < 20
    workers = [start_worker("rollout", run, f"--task={task}/3") for task in range(3)]
    twin = start_worker("rollout", run, "--task=1/3")
    assert [worker.wait() for worker in [*workers, twin]] == [0, 0, 0, 0]
    require_whole(run)
    assert shards_of(run) == whole


def test_a_static_share_is_written_alone_and_without_claims(shared_run, start_worker):
    run = shared_run("static")
    worker = start_worker("rollout", run, "--task=1/4", "--static")
    assert worker.wait() == 0, worker.stderr.read_text()
    assert PredictionStore.open(run.root / "store").committed == [1, 5, 9, 13, 17]
    assert not (run.root / "store" / "tmp" / "claims").exists()


def test_a_lone_task_does_the_work_of_tasks_that_never_came(shared_run, start_worker, whole):
    run = shared_run("lone")
    worker = start_worker("rollout", run, "--task=2/9")
    assert worker.wait() == 0, worker.stderr.read_text()
    require_whole(run)
    assert shards_of(run) == whole
