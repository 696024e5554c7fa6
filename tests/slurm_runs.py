"""Runs as jobs of a real Slurm: slow ones until a fault has happened, and how they have to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.slurm import QueueEntry, queue
from pipeline.status import RunStatus, run_status
from pipeline.submission import read_jobs, submit
from stages.interruption import StopRequest
from store import PredictionStore, verify
from tests.conftest import ROOT, Run, write_run
from tests.slurm_cluster import Cluster, wait_until

CLUSTER = {
    "preamble": [f"export PYTHONPATH={ROOT}", "export PYTHONWARNINGS=error OMP_NUM_THREADS=1"],
    "heartbeat_s": 0.5,
    "partition": "low",
}
PACE = """
import os, sys, time
if "pipeline.worker" in sys.orig_argv:
    import stages.rollout
    begin, begun = stages.rollout.begin, []
    def paced(*arguments):
        begun.append(arguments)
        if len(begun) > 4 and not os.path.exists(os.environ["PACE_ENDS"]):
            time.sleep(0.8)
        return begin(*arguments)
    stages.rollout.begin = paced
"""
"""What Python does first in jobs of a long run: after its first shard each batch takes its time, on
the fastest machine too, until the fault has happened."""


def rollout_of(tiny_run: Run) -> dict[str, Any]:
    """The rollout of a long run: 50 shards of four batches."""
    longer = {"variations": 20, "rollouts_per_shard": 8, "batch_size": 2}
    return tiny_run.document["rollout"] | longer


def long_run(run_of: Callable[..., Run], tiny_run: Run, folder: Path, **sections: Any) -> Run:
    """Write the configuration of a run whose rollout takes a minute, until `speed_up`."""
    (folder / "pace").mkdir()
    (folder / "pace" / "sitecustomize.py").write_text(PACE)
    paced = f"export PYTHONPATH={folder}/pace:{ROOT} PACE_ENDS={folder}/runs/long/paced"
    settings = CLUSTER | {"preamble": [*CLUSTER["preamble"], paced]}
    default = {"rollout": rollout_of(tiny_run), "students": None, "cluster": settings}
    return run_of("long", fitted=True, **(default | sections))


def undisturbed_shards(tiny_run: Run, folder: Path) -> dict[str, bytes]:
    """The files of the shards of a long run that one process wrote in peace."""
    document = {
        "name": "whole", "runs": str(folder), "rollout": rollout_of(tiny_run),
        "seed": tiny_run.document["seed"], "dataset": str(tiny_run.root / "dataset"),
        "teacher": {"checkpoint": str(tiny_run.root / "teacher")},
    }  # fmt: skip
    run = write_run(document, folder)
    run.do("rollout")
    return shards_of(run)


def shards_of(run: Run) -> dict[str, bytes]:
    """Every file of the shards, but for the records, which name the manifest and so the run."""
    root = run.root / "store" / "shards"
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "shard.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def status_of(run: Run) -> RunStatus:
    return run_status(run.load())


def entries(run: Run, stage: str = "rollout") -> list[QueueEntry]:
    return all_entries(run)[stage]


def all_entries(run: Run) -> dict[str, list[QueueEntry]]:
    config = run.load()
    jobs = read_jobs(config)
    assert jobs is not None
    return jobs.of(config, queue())


def requeues(run: Run, stage: str = "rollout") -> Mapping[int | None, int]:
    return {entry.task: entry.requeues for entry in entries(run, stage)}


def told(run: Run) -> Callable[[], str]:
    """What to show when something never comes true."""

    def show() -> str:
        logs = sorted((run.root / "logs").glob("*.out"))
        texts = [f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in logs]
        return "\n".join([str(queue()), str(status_of(run)), *texts])

    return show


def until(ready: Callable[[], object], what: str, run: Run) -> None:
    """Wait for a state that is seen, and tell all of the run when it never comes."""
    wait_until(ready, what, told(run))


def committed(run: Run) -> int:
    shards = run.root / "store" / "shards"
    return len(list(shards.iterdir())) if shards.exists() else 0


def begin(run: Run, tasks: int, shards: int = 3) -> int:
    """Submit a run and wait until it has committed a few shards; return the id of its rollout."""
    job = submit(run.path, (), run.load(), StopRequest(), tasks=tasks)["rollout"]
    assert job.job_id is not None
    until(lambda: committed(run) >= shards, "the first shards", run)
    return job.job_id


def speed_up(run: Run) -> None:
    (run.root / "paced").touch()


def finish(run: Run) -> None:
    """Let a run work at full speed, until nothing of it is in the queue; all must be done."""
    speed_up(run)
    at_work = {"running", "pending"}
    until(
        lambda: not at_work & {e.condition for es in all_entries(run).values() for e in es},
        "no job in the queue", run,
    )  # fmt: skip
    assert {s.state for s in status_of(run).stages.values()} == {"done"}, told(run)()


def require_equal(run: Run, undisturbed: Mapping[str, bytes]) -> None:
    """Every shard is there once, sound, and as an undisturbed run wrote it."""
    store = PredictionStore.open(run.root / "store")
    assert store.missing() == []
    report = verify(store.path)
    assert report.ok
    assert report.rollouts == len(store) == len(set(store.keys()))
    assert not (store.path / "tmp" / "claims").exists()
    assert shards_of(run) == undisturbed


def preempt(cluster: Cluster, job: str) -> None:
    """Submit a job of the partition that goes first, for the node where another job runs."""
    script = cluster.root / "urgent.sh"
    script.write_text("#!/bin/bash\n")
    cluster.do(
        "sbatch", "--partition=high", f"--nodelist={cluster.node_of(job)}", "--exclusive",
        "--output=/dev/null", str(script),
    )  # fmt: skip
