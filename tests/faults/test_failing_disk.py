"""A disk that is full or breaks: one message, an exit code, and the run goes on afterwards."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from store import PredictionStore, verify
from store.schema import TopK
from store.synthetic import synthetic_manifest, synthetic_store
from tests.conftest import ROOT
from tests.faults.machine import require_program, small_disk
from tests.test_cli_runs import LONG
from tests.test_store_commit import tree

pytestmark = pytest.mark.slow

POINTS = ("posix/io/rw/write", "posix/io/sync/fsync", "posix/io/dir/rename", "posix/io/oc/open")
ADVICE = {errno.ENOSPC: "the disk is full: free space", errno.EIO: "check it (dmesg)"}
ONE_THREAD = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Of pyarrow's allocators one starts a thread while it is loaded; libfiu, which sees every malloc,
and the loader then wait for each other."""


@pytest.mark.slow
@pytest.mark.parametrize("number", ADVICE, ids=errno.errorcode.get)
@pytest.mark.parametrize("point", POINTS)
def test_whichever_call_of_the_system_fails_a_commit_says_so_and_leaves_nothing(
    tmp_path: Path, point: str, number: int
) -> None:
    require_program("fiu-run", "fiu-utils")
    store = synthetic_store(tmp_path / "store", synthetic_manifest(TopK(k=3)), 2, 1, 2)
    script = str(Path(__file__).with_name("failing_calls.py"))
    command = ["fiu-run", "-x", sys.executable, script, str(store.path), point, str(number)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)} | ONE_THREAD
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *failures, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(failures) >= (1 if point.endswith("rename") else 8)
    assert (last["failed"], last["done"], last["committed"]) == (False, True, True)
    for each in failures:
        assert each["failed"]
        assert not each["done"]
        assert "cannot commit shard 00000 of" in each["said"]
        assert ADVICE[number] in each["said"]
        assert each["left"] == 0
        # After the rename only its durability can fail: then it is said, and the shard is whole.
        syncing = point.endswith(("fsync", "open"))
        assert each["committed"] == (syncing and each is failures[-1])
    assert verify(store.path).ok


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 8) as folder:
        yield folder


def fill(disk: Path, free: int) -> Path:
    """Leave so many bytes free."""
    found = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(found.f_bavail * found.f_frsize - free, 0)))
    return ballast


def run_on(disk: Path, run_of: Any, **sections: Any) -> Any:
    run = run_of("own", fitted=True, runs=str(disk / "runs"), **sections)
    run.root.parent.mkdir(parents=True)
    return run


@pytest.mark.slow
def test_a_rollout_on_a_full_disk_ends_with_its_message_and_goes_on_once_there_is_space(
    disk: Path, run_of, tiny_run, start_worker
) -> None:
    section = tiny_run.document["rollout"] | {"free_floor": 0, "disk_check": False}
    run = run_on(disk, run_of, students=None, rollout=section)
    ballast = fill(disk, 160_000)
    worker = start_worker("rollout", run)
    assert worker.wait() == 1, worker.stderr.read_text()
    message = worker.stderr.read_text()
    assert "the disk is full: free space there, then run the same command again" in message
    assert "Traceback" not in message
    path = run.root / "store"
    found = verify(path)
    assert found.ok
    assert 0 < found.shards < 5, "the disk was filled by shards"
    assert list((path / "tmp").iterdir()) == []
    ballast.unlink()
    again = start_worker("rollout", run)
    assert again.wait() == 0, again.stderr.read_text()
    shards = {n: c for n, c in tree(path).items() if n.startswith("shards/")}
    expected = tree(tiny_run.root / "store")
    assert shards == {n: c for n, c in expected.items() if n.startswith("shards/")}


@pytest.mark.slow
def test_a_rollout_refuses_a_disk_that_is_too_small_and_heeds_the_floor(
    disk: Path, run_of, tiny_run, start_worker
) -> None:
    """Without patches: a real small disk, asked through the real system."""
    run = run_on(disk, run_of, students=None)
    refused = start_worker("rollout", run)
    assert refused.wait() == 2  # the floor of a GiB is more than this disk has
    assert "rollout.free_floor keeps 1,073,741,824 free" in refused.stderr.read_text()
    options = ("--set=rollout.disk_check=false", "--set=rollout.free_floor=7000000")
    fill(disk, 7_150_000)
    stopped = start_worker("rollout", run, *options)
    assert stopped.wait() == 1, stopped.stderr.read_text()
    assert "lets no shard be begun with less than 7,000,000" in stopped.stderr.read_text()
    store = PredictionStore.open(run.root / "store")
    assert 0 < len(store.committed) < store.planned_shards
    assert verify(store.path).ok
    again = start_worker("rollout", run, "--set=rollout.free_floor=0")
    assert again.wait() == 0, again.stderr.read_text()


@pytest.mark.slow
def test_a_training_on_a_full_disk_ends_with_its_message_and_goes_on_once_there_is_space(
    disk: Path, run_of, tiny_run, start_worker
) -> None:
    students = {"student": tiny_run.document["students"]["student"] | {"optimizer": LONG}}
    own = run_on(disk, run_of, students=students)
    whole = run_of("whole", fitted=True, students=students)
    store = f"--set=store={tiny_run.root / 'store'}"
    ballast = fill(disk, 250_000)
    worker = start_worker("train:student", own, store)
    assert worker.wait() == 1, worker.stderr.read_text()
    message = worker.stderr.read_text()
    assert "Traceback" not in message
    assert "No space left on device" in message
    assert "what was finished before is safe: free space" in message
    ballast.unlink()
    again = start_worker("train:student", own, store)
    assert again.wait() == 0, again.stderr.read_text()
    assert start_worker("train:student", whole, store).wait() == 0
    ours, theirs = (load_file(r.root / "student/model.safetensors") for r in (own, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
