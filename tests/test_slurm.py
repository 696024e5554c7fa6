"""Whole runs as jobs of a real Slurm: whatever happens to jobs and controller, all will be done.

Every case of faults ends with a store whose files are those of an undisturbed run in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest

from pipeline.status import status_text
from pipeline.submission import resubmit
from stages.interruption import StopRequest
from store import PredictionStore, verify
from tests.conftest import Run
from tests.slurm_cluster import Cluster, slurm_cluster
from tests.slurm_runs import (
    CLUSTER,
    begin,
    committed,
    entries,
    finish,
    long_run,
    preempt,
    requeues,
    require_equal,
    speed_up,
    status_of,
    undisturbed_shards,
    until,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_cluster() as started:
        yield started


@pytest.fixture(autouse=True)
def _idle(cluster) -> Iterator[None]:
    """Leave nothing of a test to the next."""
    yield
    cluster.resume()


@pytest.fixture
def long(run_of, tiny_run, tmp_path) -> Callable[..., Run]:
    return partial(long_run, run_of, tiny_run, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory) -> Mapping[str, bytes]:
    return undisturbed_shards(tiny_run, tmp_path_factory.mktemp("undisturbed"))


def test_a_run_goes_from_submit_to_an_evaluated_student(
    run_of, tiny_run, tmp_path, cluster, foretell
):
    """On the way three jobs are told to stop and one of these is held; training has two nodes."""
    folder, gate = tmp_path / 'a folder, 100% "odd" #1', tmp_path / "gate"
    gated = ["export MASTER_ADDR=127.0.0.1", f"until [ -e {gate} ]; do sleep 0.1; done"]
    student: dict[str, Any] = dict(tiny_run.document["students"]["student"])
    student["optimizer"] = student["optimizer"] | {"steps": 200, "checkpoint_every": 10}
    sections = {"runs": str(folder), "evaluate": tiny_run.document["evaluate"]}
    sections["cluster"] = CLUSTER | {
        "preamble": [*CLUSTER["preamble"], *gated], "stages": {"train": {"nodes": 2}}
    }  # fmt: skip
    run = run_of(fitted=True, students={"student": student}, **sections)
    done = foretell("submit", run.path, "--tasks", "3", "--max-running", "2")
    rollout, train, evaluate = done.stdout.splitlines()
    assert rollout.startswith("rollout: job ")
    assert rollout.endswith(", tasks 0-2")
    assert train.endswith(", after rollout")
    assert evaluate.endswith(", after rollout, train:student")
    array = entries(run)[0].job_id

    def first_two() -> list[str]:
        return [entry.condition for entry in entries(run) if entry.task in (0, 1)]

    until(lambda: first_two() == ["running"] * 2, "two run", run)
    cluster.do("scancel", "--signal=USR1", "--batch", f"{array}_0")
    cluster.do("scontrol", "requeuehold", f"{array}_1")
    gate.touch()
    until(lambda: requeues(run) == {0: 1, 1: 1, 2: 0}, "both are requeued", run)
    until(lambda: "held" in first_two(), "one is held", run)
    again = foretell("submit", run.path, code=2)
    assert "run 'own' has jobs in the queue: rollout (" in again.stderr
    status = foretell("status", run.path, code=1)
    for said in (status.stdout, foretell("resubmit", run.path).stdout):
        assert f"scontrol release {array}_1" in said
    cluster.do("scontrol", "release", f"{array}_1")
    until((run.root / "student" / "checkpoints" / "step_00000010").exists, "a checkpoint", run)
    training = entries(run, "train:student")[0].job_id
    cluster.do("scancel", "--signal=USR1", "--batch", str(training))
    until(lambda: requeues(run, "train:student") == {None: 1}, "training is back in line", run)
    finish(run)
    assert "requeued" in foretell("status", run.path).stdout
    assert (run.root / "report" / "report.html").exists()
    assert verify(run.root / "store").ok
    logs = {path.name: path.read_text() for path in (run.root / "logs").iterdir()}
    assert {f"rollout_{array}_{task}.out" for task in range(3)} <= set(logs)
    assert "started" not in logs[f"rollout_{array}_0.out"].partition("stopped")[0]
    assert "train:student: stopped; nothing is lost" in logs[f"train-student_{training}.out"]
    assert resubmit(run.path, (), run.load(), StopRequest()) == {}


def test_tasks_that_are_requeued_preempted_doubled_or_out_of_time_go_on_where_they_were(
    long, cluster, undisturbed
):
    run = long()
    job = begin(run, tasks=3)
    twin = cluster.do("sbatch", "--parsable", "--array=0", str(run.root / "jobs" / "rollout.sh"))
    log = run.root / "logs" / f"rollout_{twin.strip()}_0.out"
    until(lambda: log.exists() and "rollout: started" in log.read_text(), "a twin begins", run)
    cluster.do("scontrol", "requeue", f"{job}_0")
    cluster.do("scancel", "--signal=USR1", "--batch", f"{job}_1")
    preempt(cluster, f"{job}_2")
    until(lambda: requeues(run) == {0: 1, 1: 1, 2: 1}, "all are requeued", run)
    finish(run)
    until(lambda: not cluster.do("squeue", "--noheader"), "the twin ends", run)
    require_equal(run, undisturbed)
    assert status_of(run).jobs["rollout"].requeues == 3
    said = (run.root / "logs" / f"rollout_{job}_1.out").read_text()
    assert "rollout: stopped; nothing is lost" in said
    assert said.count("rollout: ") >= 3, "the second attempt is told of in the same file"


def test_workers_outlive_the_controller(long, cluster, undisturbed):
    run = long()
    begin(run, tasks=2, shards=1)
    cluster.kill("slurmctld")
    before = committed(run)
    until_committed = partial(until, lambda: committed(run) >= before + 4, "they work on")
    until_committed(run)
    cluster.start_controller()
    finish(run)  # whether Slurm shows tasks as completed, or holds them: their workers ended well
    for entry in entries(run):
        if entry.condition == "held":
            assert f"scontrol release {entry.label}" in status_text(status_of(run))
    require_equal(run, undisturbed)


def test_what_was_lost_is_submitted_again_and_nothing_else(long, tiny_run, cluster, undisturbed):
    run = long(students=tiny_run.document["students"])
    job = begin(run, tasks=2)
    cluster.do("scancel", str(job))  # in the middle, and for good
    until(lambda: entries(run, "train:student")[0].condition == "failed", "training said no", run)
    assert not any(entry.is_active for entry in entries(run))
    said = "".join(path.read_text() for path in (run.root / "logs").glob("train-student_*.out"))
    assert "so stage one is not finished" in said
    missing = PredictionStore.open(run.root / "store").missing()
    speed_up(run)
    done = resubmit(run.path, (), run.load(), StopRequest())
    assert list(done) == ["rollout", "train:student"]
    assert done["rollout"].tasks == tuple(sorted({shard % 2 for shard in missing}))
    assert done["train:student"].after == ("rollout",)
    finish(run)
    jobs = status_of(run).jobs
    assert (jobs["rollout"].failed, jobs["train:student"].failed) == ((), ()), "made good"
    require_equal(run, undisturbed)
