"""Memory does not grow with the number of shards: real processes over more than 200 of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from store import PredictionStore
from tests.conftest import ROOT, Worker
from tests.test_cli_runs import LONG
from tests.test_shared_rollout import committed

pytestmark = pytest.mark.slow
if not Path("/proc/self/status").exists():
    pytest.skip("memory is read from /proc", allow_module_level=True)

SHARDS = 200
GROWTH = 1.03
"""Most that memory may be after all shards, over what it was after a third of them."""
KINDS = ("VmRSS", "RssAnon")
"""Resident memory, and the part of it that is no file."""


def memory_kib(pid: int | str) -> tuple[int, ...]:
    """Of a process, by `KINDS`; nothing of one that has ended."""
    text = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines())
    return tuple(int(lines[kind].split()[0]) for kind in KINDS if kind in lines)


def watch(worker: Worker, done: Callable[[], int]) -> list[tuple[int, ...]]:
    """Memory of a process whenever it has done more, until it ends."""
    seen: dict[int, tuple[int, ...]] = {}
    while memory := memory_kib(worker.pid):
        seen[done()] = memory
        time.sleep(0.005)
    assert worker.wait() == 0, worker.stderr.read_text()
    return [seen[count] for count in sorted(seen)]


def require_flat(memory: list[tuple[int, ...]]) -> None:
    assert len(memory) >= 15, "seen too seldom to say anything"
    third = len(memory) // 3
    for kind, values in zip(KINDS, zip(*memory, strict=True), strict=True):
        early, late = median(values[third : 2 * third]), median(values[2 * third :])
        assert late < GROWTH * early, f"{kind} grew from {early} to {late} KiB: {values}"


@pytest.fixture(scope="module")
def long_run(tiny_run, tmp_path_factory) -> Any:
    """A run whose rollouts are a shard each."""
    from tests.conftest import write_run

    folder = tmp_path_factory.mktemp("long")
    rollout = tiny_run.document["rollout"] | {
        "rollouts_per_shard": 1, "batch_size": 1, "variations": 10,
    }  # fmt: skip
    student = tiny_run.document["students"]["student"]
    optimizer = LONG | {"steps": 3 * SHARDS // 4, "log_every": 2, "checkpoint_every": 40}
    document = {
        "name": "long", "runs": str(folder), "seed": 1,
        "dataset": str(tiny_run.root / "dataset"),
        "teacher": {"checkpoint": str(tiny_run.root / "teacher")},
        "rollout": rollout, "students": {"student": student | {"optimizer": optimizer}},
    }  # fmt: skip
    return write_run(document, folder)


def test_memory_of_both_stages_is_flat_over_many_shards(long_run, start_worker) -> None:
    require_flat(watch(start_worker("rollout", long_run), lambda: committed(long_run)))
    store = PredictionStore.open(long_run.root / "store")
    assert len(store.committed) == len(store.plan) >= SHARDS
    log = long_run.root / "student" / "log.jsonl"

    def logged() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    require_flat(watch(start_worker("train:student", long_run), logged))


RECORD = f"""
import json, sys
from pathlib import Path
from stages.diffusion.record import record
from stages.interruption import StopRequest
from tests.faults.test_long_run import memory_kib
from tests.recorded import FakeDenoiser, facts_of_images, images, planned

folder, shapes = Path(sys.argv[1]), ((4, 32, 32),)
facts = facts_of_images(latent_channels=4, buckets=shapes)
dataset = images(folder / "images", ["teacher"] * {-(-SHARDS // 4)}, shapes=shapes, facts=facts)
denoiser = FakeDenoiser(dataset.facts)
store, config = planned(folder / "store", dataset, denoiser, rollouts_per_shard=1, free_floor=0)

def shards():
    for shard in store.missing():
        yield shard
        print(json.dumps(memory_kib("self")), flush=True)

assert record(denoiser, store, dataset, shards(), config, stop=StopRequest())
"""


def test_memory_of_a_recording_is_flat_over_many_shards(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", RECORD, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(memory) >= SHARDS
    require_flat(memory)
