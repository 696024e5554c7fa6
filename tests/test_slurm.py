"""Whole runs as jobs of a real Slurm: whatever happens to jobs, nodes and controller, all is done.

Every case ends with a store whose files are those of an undisturbed run in one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.slurm import QueueEntry, queue
from pipeline.status import RunStatus, run_status, status_text
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


@pytest.fixture(autouse=True)
def _idle(cluster) -> Iterator[None]:
    """Leave nothing of a test to the next."""
    yield
    cluster.resume()


PACE = """
import os, sys, time
if "pipeline.worker" in sys.orig_argv:
    import stages.rollout
    begin = stages.rollout.begin
    def paced(*arguments):
        if not os.path.exists(os.environ["PACE_ENDS"]):
            time.sleep(0.4)
        return begin(*arguments)
    stages.rollout.begin = paced
"""
"""What Python does first in jobs of a long run: a batch takes its time, on the fastest machine too,
until the fault has happened."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder,
        slurm_cluster(Path(folder)) as started,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SLURM_CONF", started.environment["SLURM_CONF"])
        yield started


@pytest.fixture
def long_run(run_of, tiny_run, cluster, tmp_path) -> Callable[..., Any]:
    """Write the configuration of a run whose rollout takes half a minute, until `finish`."""
    (tmp_path / "pace").mkdir()
    (tmp_path / "pace" / "sitecustomize.py").write_text(PACE)
    paced = f"export PYTHONPATH={tmp_path}/pace:{ROOT} PACE_ENDS={tmp_path}/runs/long/paced"
    settings = CLUSTER | {"preamble": [*CLUSTER["preamble"], paced]}

    def make(**sections: Any) -> Any:
        rollout = tiny_run.document["rollout"] | {
            "variations": 20, "rollouts_per_shard": 8, "batch_size": 2
        }  # fmt: skip
        default = {"rollout": rollout, "students": None, "cluster": settings}
        return run_of("long", fitted=True, **(default | sections))

    return make


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory) -> Path:
    """The shards of a long run that one process wrote."""
    from tests.conftest import write_run

    rollout = tiny_run.document["rollout"] | {
        "variations": 20, "rollouts_per_shard": 8, "batch_size": 2
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


def begin(run: Any, tasks: int = 3, shards: int = 3) -> int:
    """Submit a run and wait until it has committed a few shards; return the id of its rollout."""
    job = submit(run.path, (), run.load(), StopRequest(), tasks=tasks)["rollout"]
    assert job.job_id is not None
    wait_until(lambda: committed(run) >= shards, "the first shards", told(run))
    return job.job_id


def speed_up(run: Any) -> None:
    (run.root / "paced").touch()


def finish(run: Any, seconds: float = 240) -> None:
    """Let a run work at full speed, until nothing of it is in the queue; all must be done."""
    speed_up(run)
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


def test_a_run_goes_from_submit_to_an_evaluated_student(run_of, tiny_run, tmp_path, cluster):
    folder = tmp_path / 'a folder, 100% "odd" #1'
    sections = {"runs": str(folder), "evaluate": tiny_run.document["evaluate"]}
    run = run_of(fitted=True, cluster=CLUSTER, **sections)
    done = foretell("submit", run.path, "--tasks", "3", "--max-running", "2")
    assert done.returncode == 0, done.stderr
    rollout, train, evaluate = done.stdout.splitlines()
    assert rollout.startswith("rollout: job ")
    assert rollout.endswith(", tasks 0-2")
    assert train.endswith(", after rollout")
    assert evaluate.endswith(", after rollout, train:student")
    again = foretell("submit", run.path)
    assert again.returncode == 2
    assert "run 'own' has jobs in the queue: rollout (" in again.stderr
    status = foretell("status", run.path)
    assert status.returncode == 1
    assert "pending" in status.stdout
    wait_until(
        lambda: entries(run, "evaluate")[0].condition == "completed", "it was evaluated", told(run)
    )
    assert foretell("status", run.path).returncode == 0
    assert (run.root / "report" / "report.html").exists()
    assert verify(run.root / "store").ok
    array = entries(run)[0].job_id
    logs = {path.name for path in (run.root / "logs").iterdir()}
    assert {f"rollout_{array}_{task}.out" for task in range(3)} <= logs
    assert resubmit(run.path, (), run.load(), StopRequest()) == {}


def test_tasks_that_are_requeued_preempted_or_out_of_time_go_on_where_they_were(
    long_run, cluster, undisturbed
):
    run = long_run()
    job = begin(run)
    cluster.do("scontrol", "requeue", f"{job}_0")
    cluster.do("scancel", "--signal=USR1", "--batch", f"{job}_1")
    wait_until(lambda: requeues(run) == {0: 1, 1: 1, 2: 0}, "both are requeued", told(run))
    urgent = cluster.root / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    cluster.do(
        "sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", str(urgent)
    )
    wait_until(lambda: requeues(run)[2] == 1, "the third is preempted", told(run))
    finish(run)
    require_equal(run, undisturbed)
    assert status_of(run).jobs["rollout"].requeues >= 3
    log = (run.root / "logs" / f"rollout_{job}_1.out").read_text()
    assert "rollout: stopped; nothing is lost" in log
    assert log.count("rollout: ") >= 3, "the second attempt is told of in the same file"


def requeues(run: Any) -> dict[int | None, int]:
    return {entry.task: entry.requeues for entry in entries(run)}


def test_a_signal_before_python_listens_is_heeded_and_a_held_task_is_left_to_a_person(
    run_of, cluster
):
    slow = CLUSTER | {"preamble": [*CLUSTER["preamble"], "sleep 2"]}
    run = run_of("early", fitted=True, students=None, cluster=slow)
    job = submit(run.path, (), run.load(), StopRequest(), tasks=2)["rollout"].job_id
    wait_until(lambda: all(e.condition == "running" for e in entries(run)), "it runs", told(run))
    cluster.do("scancel", "--signal=USR1", "--batch", f"{job}_0")
    cluster.do("scontrol", "requeuehold", f"{job}_1")
    wait_until(lambda: requeues(run) == {0: 1, 1: 1}, "both are requeued", told(run))
    assert committed(run) == 0
    wait_until(lambda: "held" in {e.condition for e in entries(run)}, "one is held", told(run))
    again = foretell("resubmit", run.path)
    assert again.returncode == 0, again.stderr
    assert f"scontrol release {job}_1" in again.stdout
    with pytest.raises(UserError, match="jobs in the queue"):
        submit(run.path, (), run.load(), StopRequest())
    assert f"scontrol release {job}_1" in foretell("status", run.path).stdout
    cluster.do("scontrol", "release", f"{job}_1")
    finish(run)
    assert verify(run.root / "store").ok


def test_a_lost_node_costs_nothing_but_time(long_run, cluster, undisturbed):
    run = long_run()
    job = begin(run)
    node = cluster.do("squeue", "--noheader", f"--jobs={job}_2", "--format=%N").strip()
    cluster.lose_node(node)
    finish(run)
    require_equal(run, undisturbed)
    assert requeues(run)[2] == 1, "Slurm saw that the node was gone"


def test_workers_outlive_the_controller(long_run, cluster, undisturbed):
    run = long_run()
    begin(run, shards=1)
    cluster.kill("slurmctld")
    wait_until(lambda: committed(run) >= 6, "they work on", told(run))
    cluster.start_controller()
    finish(run)  # whether Slurm shows tasks as completed, or holds them: their workers ended well
    for label in entries_held(run):
        assert f"scontrol release {label}" in status_text(status_of(run))
    require_equal(run, undisturbed)


def test_what_was_lost_is_submitted_again_and_nothing_else(
    long_run, tiny_run, cluster, undisturbed
):
    run = long_run(students=tiny_run.document["students"])
    job = begin(run, shards=3)
    cluster.do("scancel", str(job))  # in the middle, and for good
    wait_until(lambda: not any(e.is_active for e in entries(run)), "it ended", told(run))
    wait_until(
        lambda: entries(run, "train:student")[0].condition == "failed",
        "training said no",
        told(run),
    )
    said = "".join(path.read_text() for path in (run.root / "logs").glob("train-student_*.out"))
    assert "so stage one is not finished" in said
    missing = PredictionStore.open(run.root / "store").missing()
    speed_up(run)
    done = resubmit(run.path, (), run.load(), StopRequest())
    assert list(done) == ["rollout", "train:student"]
    assert done["rollout"].tasks == tuple(sorted({shard % 3 for shard in missing}))
    assert done["train:student"].after == ("rollout",)
    wait_until(
        lambda: "completed" in [e.condition for e in entries(run, "train:student")],
        "it is trained", told(run),
    )  # fmt: skip
    jobs = status_of(run).jobs
    assert (jobs["rollout"].failed, jobs["train:student"].failed) == ((), ()), "made good"
    require_equal(run, undisturbed)
    assert {s.state for s in status_of(run).stages.values()} == {"done"}


def test_training_on_two_nodes_is_noted_as_done(run_of, tiny_run, cluster):
    several = {"stages": {"train": {"nodes": 2}}}
    meeting = {"preamble": [*CLUSTER["preamble"], "export MASTER_ADDR=127.0.0.1"]}
    run = run_of(
        "nodes", fitted=True, rollout=None, store=str(tiny_run.root / "store"),
        cluster=CLUSTER | several | meeting,
    )  # fmt: skip
    submit(run.path, (), run.load(), StopRequest())
    wait_until(lambda: not entries(run, "train:student")[0].is_active, "it is trained", told(run))
    assert entries(run, "train:student")[0].condition == "completed", told(run)()
    assert status_of(run).stages["train:student"].state == "done"
    assert (run.root / "student" / "model.safetensors").exists()


def entries_held(run: Any) -> list[str]:
    return [entry.label for entry in entries(run) if entry.condition == "held"]
