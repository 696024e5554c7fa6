"""Whole runs as jobs of a real Slurm: whatever happens to jobs, nodes and controller, all is done.

Every case ends with a store whose files are those of an undisturbed run in one process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.slurm import QueueEntry, queue
from pipeline.status import RunStatus, run_status
from pipeline.submission import read_jobs, resubmit, submit
from stages.errors import UserError
from store import PredictionStore, verify
from tests.slurm_cluster import Cluster, slurm_cluster, wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CLUSTER = {
    "preamble": [f"export PYTHONPATH={ROOT}", "export PYTHONWARNINGS=error OMP_NUM_THREADS=1"],
    "heartbeat_s": 0.5,
    "partition": "low",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        with slurm_cluster(Path(folder)) as started, pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", started.environment["SLURM_CONF"])
            yield started


@pytest.fixture
def long_run(run_of, tiny_run, cluster) -> Callable[..., Any]:
    """Write the configuration of a run whose rollout takes its tasks several seconds."""

    def make(**sections: Any) -> Any:
        rollout = tiny_run.document["rollout"] | {
            "variations": 30, "rollouts_per_shard": 8, "batch_size": 2
        }  # fmt: skip
        default = {"rollout": rollout, "students": None, "cluster": CLUSTER}
        return run_of("long", fitted=True, **(default | sections))

    return make


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory) -> Path:
    """The shards of a long run that one process wrote."""
    from tests.conftest import write_run

    rollout = tiny_run.document["rollout"] | {
        "variations": 30, "rollouts_per_shard": 8, "batch_size": 2
    }  # fmt: skip
    kept = {k: v for k, v in tiny_run.document.items() if k == "seed"}
    folder = tmp_path_factory.mktemp("undisturbed")
    document = kept | {
        "name": "whole", "runs": str(folder), "rollout": rollout,
        "dataset": str(tiny_run.root / "dataset"),
        "teacher": {"checkpoint": str(tiny_run.root / "teacher")},
    }  # fmt: skip
    run = write_run(document, folder)
    run.do("rollout")
    return run.root / "store" / "shards"


def status_of(run: Any) -> RunStatus:
    return run_status(run.load())


def entries(run: Any, stage: str = "rollout") -> list[QueueEntry]:
    jobs = read_jobs(run.load())
    assert jobs is not None
    return jobs.of(run.load(), queue())[stage]


def told(run: Any) -> Callable[[], str]:
    """What to show when something never comes true."""

    def show() -> str:
        logs = sorted((run.root / "logs").glob("*.out"))
        texts = [f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in logs]
        return "\n".join([str(queue()), str(status_of(run)), *texts])

    return show


def committed(run: Any) -> int:
    shards = run.root / "store" / "shards"
    return len(list(shards.iterdir())) if shards.exists() else 0


def begin(run: Any, tasks: int = 4, shards: int = 3) -> int:
    """Submit a run and wait until it has committed a few shards; return the id of its rollout."""
    job = submit(run.path, (), run.load(), tasks=tasks)["rollout"]
    assert job.job_id is not None
    wait_until(lambda: committed(run) >= shards, "the first shards", told(run))
    return job.job_id


def finish(run: Any, seconds: float = 120) -> None:
    """Wait until nothing of a run is in the queue, with everything done."""
    wait_until(
        lambda: not any(e.condition in ("running", "pending") for e in entries(run)),
        "no job in the queue", told(run), seconds,
    )  # fmt: skip
    assert {s.state for s in status_of(run).stages.values()} == {"done"}, told(run)()


def require_equal(run: Any, undisturbed: Path) -> None:
    """Every shard is there once, sound, and as an undisturbed run wrote it."""
    store = PredictionStore.open(run.root / "store")
    assert store.missing() == []
    report = verify(store.path)
    assert report.ok
    assert report.rollouts == len(store) == len(set(store.keys()))
    assert not (store.path / "tmp" / "claims").exists()
    for data in (path for path in undisturbed.rglob("*") if path.is_file()):
        if data.name == "shard.json":
            continue  # names the manifest, and with it the run
        ours = store.path / "shards" / data.relative_to(undisturbed)
        assert ours.read_bytes() == data.read_bytes(), ours


def foretell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_run_goes_from_submit_to_an_evaluated_student(whole_run, cluster, tmp_path):
    folder = tmp_path / "a folder, 100% \"odd\" #1"
    folder.mkdir()
    run = whole_run(folder, cluster=CLUSTER)
    done = foretell("submit", run.path, "--tasks", "3", "--max-running", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(": job ")[0] for line in lines] == [
        "prepare", "fit", "rollout", "train:student", "evaluate",
    ]  # fmt: skip
    assert lines[2].endswith(", tasks 0-2, after prepare, fit")
    again = foretell("submit", run.path)
    assert again.returncode == 2
    assert "run 'tiny' has jobs in the queue: prepare (" in again.stderr
    status = foretell("status", run.path)
    assert status.returncode == 1
    assert "1 pending" in status.stdout or "1 running" in status.stdout
    finish_all = lambda: all(  # noqa: E731
        e.condition == "completed" for stage in read_jobs(run.load()).jobs for e in entries(run, stage)
    )
    wait_until(finish_all, "all jobs have completed", told(run), 120)
    assert foretell("status", run.path).returncode == 0
    assert (run.root / "report" / "report.html").exists()
    assert verify(run.root / "store").ok
    assert {p.name for p in (run.root / "logs").iterdir()} >= {"prepare_1.out", "rollout_3_2.out"}
