"""What `foretell status` says: what is stored, joined with what the queue of Slurm shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.config import Run
from pipeline.folders import RunFolders
from pipeline.progress import Progress, progress, stages_of
from pipeline.slurm import QueueEntry, queue
from pipeline.submission import Job, read_jobs
from pipeline.text_tables import short
from stages.errors import UserError
from store import PredictionStore
from store.schema import Record

LATEST = 100
"""Shards over whose commits the rate is taken, at most."""
UNITS = {"fit": "steps", "rollout": "shards", "train": "steps"}
"""What a stage is counted in; the others are done whole."""
WEIGHED = 200
"""Shards that are weighed, at most; of more, these stand for all."""


class JobsOfStage(Record):
    """Jobs of a stage, or tasks of its arrays, by what the queue shows of them.

    Of what was submitted again, the latest counts.
    """

    job_ids: tuple[int, ...]
    """What was submitted, oldest first."""
    running: int
    pending: int
    held: tuple[str, ...]
    """Wait until a person releases them: `scontrol release`."""
    failed: tuple[str, ...]
    """Ended with an error, or were cancelled."""
    finished: int
    unknown: int
    """Ended so long ago that the queue has forgotten them."""
    requeues: int
    """Times that any of them was put back in line."""
    reasons: tuple[str, ...]
    """Why jobs wait or failed, in Slurm's words."""


class StoreState(Record):
    """How large the store of a rollout is, and how fast it grows."""

    bytes: int
    """Of all committed shards; with many of them, as those that were weighed let expect."""
    shards_per_min: float | None
    """Over the latest commits, by the clock of the disk; None with fewer than two."""
    left_s: float | None
    """Seconds until it is complete at that rate; None where there is none."""


class RunStatus(Record):
    """How far a run is."""

    stages: dict[str, Progress]
    jobs: dict[str, JobsOfStage] | None
    """By stage; None where jobs were submitted and the queue did not answer."""
    no_queue: str | None
    """Why it did not."""
    stores: dict[str, StoreState]
    """By the stage that writes it."""


def run_status(config: Run) -> RunStatus:
    """Return how far a run is, from its files and the queue; loads no model.

    What is stored is told where the queue does not answer, too.
    """
    stages = {stage: progress(config, stage) for stage in stages_of(config)}
    stores = {
        stage: _store_state(_store(config, stage))
        for stage, state in stages.items()
        if stage.startswith("rollout") and state.done
    }
    jobs, no_queue = _jobs(config)
    return RunStatus(stages=stages, jobs=jobs, no_queue=no_queue, stores=stores)


def _jobs(config: Run) -> tuple[dict[str, JobsOfStage] | None, str | None]:
    """Return the jobs of a run by stage, or why they are not known."""
    submitted = read_jobs(config)
    if submitted is None:
        return {}, None
    try:
        found = submitted.of(config, queue())
    except UserError as error:
        return None, str(error)
    return {stage: _jobs_of(submitted.jobs[stage], found[stage]) for stage in found}, None


def _jobs_of(jobs: Sequence[Job], listed: Sequence[QueueEntry]) -> JobsOfStage:
    latest = {task: job.job_id for job in jobs for task in job.tasks or (None,)}
    entries = [entry for entry in listed if latest.get(entry.task) == entry.job_id]
    by_condition: dict[str, list[str]] = {}
    for entry in entries:
        by_condition.setdefault(entry.condition, []).append(entry.label)
    troubled = [e for e in entries if e.condition in ("pending", "held", "failed")]
    return JobsOfStage(
        job_ids=tuple(job.job_id for job in jobs),
        running=len(by_condition.get("running", ())),
        pending=len(by_condition.get("pending", ())),
        held=tuple(by_condition.get("held", ())),
        failed=tuple(by_condition.get("failed", ())),
        finished=len(by_condition.get("completed", ())),
        unknown=len(latest) - len(entries),
        requeues=sum(entry.requeues for entry in listed),
        reasons=tuple(dict.fromkeys(_reason(entry) for entry in troubled)),
    )


def _reason(entry: QueueEntry) -> str:
    return entry.state if entry.reason in ("", "None") else f"{entry.state}: {entry.reason}"


def _store(config: Run, stage: str) -> PredictionStore:
    return PredictionStore.open(RunFolders(config).store_of(stage.partition(":")[2] or None))


def _store_state(store: PredictionStore) -> StoreState:
    step = -(-len(store.committed) // WEIGHED)
    weighed = store.committed[::step]
    sizes = [sum(file.bytes for file in store.folder(s).record().files.values()) for s in weighed]
    committed_s = sorted(map(store.committed_s, store.committed))
    latest = committed_s[-LATEST:]
    per_min = None
    if latest[-1] > latest[0]:
        per_min = 60 * (len(latest) - 1) / (latest[-1] - latest[0])
    missing = len(store.missing())
    return StoreState(
        bytes=sum(sizes) * len(store.committed) // len(weighed),
        shards_per_min=per_min,
        left_s=60 * missing / per_min if missing and per_min else None,
    )


def status_text(status: RunStatus) -> str:
    """Return a line for each stage, and below it what is known of its store and its jobs."""
    lines = []
    for stage, state in status.stages.items():
        unit = UNITS.get(stage.partition(":")[0], "")
        lines.append(f"{stage:<20}{state.done:>8} of {state.planned:<8}{unit:<8}{state.state}")
        if stage in status.stores:
            lines.append(f"  {_store_text(status.stores[stage])}")
        if status.jobs and stage in status.jobs:
            lines += [f"  {line}" for line in _jobs_text(status.jobs[stage])]
    if status.no_queue is not None:
        lines.append(f"jobs were submitted, but the queue does not answer: {status.no_queue}")
    return "\n".join(lines)


def _store_text(store: StoreState) -> str:
    parts = [f"{store.bytes:,} bytes"]
    parts += [f"{short(store.shards_per_min)} shards/min"] if store.shards_per_min else []
    parts += [f"{span(store.left_s)} left"] if store.left_s else []
    return ", ".join(parts)


def _jobs_text(jobs: JobsOfStage) -> list[str]:
    counts: Mapping[str, int] = {
        "running": jobs.running, "pending": jobs.pending, "held": len(jobs.held),
        "failed": len(jobs.failed), "finished": jobs.finished, "unknown": jobs.unknown,
        "requeued": jobs.requeues,
    }  # fmt: skip
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    why = f" ({'; '.join(jobs.reasons)})" if jobs.reasons else ""
    lines = [f"job {', '.join(map(str, jobs.job_ids))}: {told}{why}"]
    lines += [f"failed: {', '.join(jobs.failed)}"] if jobs.failed else []
    lines += [f"to let held ones run: scontrol release {','.join(jobs.held)}"] if jobs.held else []
    return lines


def span(seconds: float) -> str:
    """Return a time as a person says it: 3 h 05 min, 12 min, or 40 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
