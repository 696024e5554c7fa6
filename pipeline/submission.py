"""Giving a run to Slurm: which jobs, after which others, and which of them were lost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from pipeline.cluster_config import ClusterConfig
from pipeline.config import Run
from pipeline.exclusion import alone
from pipeline.folders import RunFolders
from pipeline.job_scripts import JobScripts, job_name, ranges
from pipeline.progress import needs, stages_of
from pipeline.run import is_left
from pipeline.slurm import QueueEntry, queue, sbatch, sbatch_words, wait_for
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.publish import replace_file
from store import PredictionStore
from store.remote import store_exists
from store.schema import Record


class Job(Record):
    """One job that was submitted, or an array."""

    job_id: int
    tasks: tuple[int, ...] = ()
    """Tasks of a rollout that it is an array of."""


class Jobs(Record):
    """The content of jobs/jobs.json: what was submitted for a run, and how."""

    tasks: int
    """Jobs that share a rollout."""
    max_running: int | None
    """Most of them at a time."""
    overrides: tuple[str, ...]
    """What --set changed in the configuration."""
    jobs: dict[str, tuple[Job, ...]]
    """By stage, oldest first; several where lost tasks were submitted again."""

    def of(self, config: Run, entries: Sequence[QueueEntry]) -> dict[str, list[QueueEntry]]:
        """Return which of the entries of the queue are of this run, by stage.

        An id may come again when a cluster was set up anew: the name has to be right too.
        """
        found: dict[str, list[QueueEntry]] = {}
        for stage, jobs in self.jobs.items():
            ids, name = {job.job_id for job in jobs}, job_name(config, stage)
            found[stage] = [e for e in entries if e.job_id in ids and e.name == name]
        return found


class Submitted(Record):
    """What `submit` and `resubmit` did, or would do."""

    script: str
    """The script of the job."""
    job_id: int | None
    """None where nothing was submitted."""
    tasks: tuple[int, ...]
    """Tasks of the array; empty for a job that is none."""
    after: tuple[str, ...]
    """Stages whose jobs it waits for."""
    command: str
    """What submits it, with the stages' names in place of ids that do not exist yet."""


def read_jobs(config: Run) -> Jobs | None:
    """Read what was submitted for a run; None when nothing was. Raises `UserError`."""
    path = _path(config)
    try:
        return Jobs.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(
            f"{path} does not list jobs ({error.error_count()} faults): move it away, and look "
            "into the queue for jobs that it listed"
        ) from None


def _path(config: Run) -> Path:
    return RunFolders(config).jobs / "jobs.json"


@dataclass
class Submission:
    """Submits stages, each after those that it needs, and notes every job at once."""

    config: Run
    scripts: JobScripts
    stop: StopRequest
    dry_run: bool
    jobs: dict[str, tuple[Job, ...]] = field(default_factory=dict)
    """Jobs of earlier submissions that still count."""
    waiting_for: dict[str, list[int]] = field(default_factory=dict)
    """Jobs by stage that are in line or run."""
    done: dict[str, Submitted] = field(default_factory=dict)

    def add(self, stage: str, tasks: Sequence[int] = ()) -> None:
        """Write the script of a stage and submit it, unless a stop was requested.

        Raises `UserError` with what Slurm says, and what it had taken before.
        """
        if self.stop.requested:
            return
        try:
            self._add(stage, tasks)
        except UserError as error:
            taken = [str(job.job_id) for job in self.done.values() if job.job_id is not None]
            if not taken:
                raise
            raise UserError(
                f"{error}; submitted before that: {', '.join(taken)}. To submit the rest: foretell "
                f"resubmit {self.scripts.path}; to take all back: scancel {' '.join(taken)}"
            ) from None

    def _add(self, stage: str, tasks: Sequence[int]) -> None:
        script = self.scripts.write(stage, tasks)
        after = [s for s in needs(self.config, stage) if s in self.done or s in self.waiting_for]
        ids = self._ids(after)
        job_id = None
        if not self.dry_run:
            job_id = sbatch(script, ids)
            self.jobs[stage] = (*self.jobs.get(stage, ()), Job(job_id=job_id, tasks=tuple(tasks)))
            self.waiting_for.setdefault(stage, []).append(job_id)
            self._note()
        self.done[stage] = Submitted(
            script=str(script),
            job_id=job_id,
            tasks=tuple(tasks),
            after=tuple(after),
            command=shlex.join(sbatch_words(script, ids or [f"<{s}>" for s in after])),
        )

    def _ids(self, stages: Sequence[str]) -> list[int]:
        return [job_id for stage in stages for job_id in self.waiting_for.get(stage, ())]

    def hold_back(self, stage: str, waiting: Sequence[QueueEntry]) -> None:
        """Let jobs that are in line wait for what was submitted again of what they need."""
        again = [s for s in needs(self.config, stage) if s in self.done]
        if again and not self.dry_run:
            for job_id in sorted({entry.job_id for entry in waiting}):
                wait_for(job_id, self._ids(needs(self.config, stage)))

    def _note(self) -> None:
        noted = Jobs(
            tasks=self.scripts.tasks,
            max_running=self.scripts.max_running,
            overrides=tuple(self.scripts.overrides),
            jobs=self.jobs,
        )
        replace_file(_path(self.config), noted.model_dump_json(indent=1).encode())


def submit(
    path: Path,
    overrides: Sequence[str],
    config: Run,
    stop: StopRequest,
    *,
    tasks: int | None = None,
    max_running: int | None = None,
    dry_run: bool = False,
) -> dict[str, Submitted]:
    """Write and submit the jobs of every stage that is not done; return them by stage.

    With `dry_run` scripts are written and nothing is submitted; once `stop` is requested no more
    is. Raises `UserError` where jobs of the run are in the queue, for stages that were finished
    with other settings, and what Slurm answers; what was submitted by then is noted.
    """
    cluster = config.cluster or ClusterConfig()
    tasks, max_running = tasks or cluster.tasks, max_running or cluster.max_running
    scripts = JobScripts(config, path, overrides, tasks, max_running)
    left = _left(config, path)
    with alone(RunFolders(config).jobs / "lock"):
        if not dry_run:
            _refuse_second(config)
        submission = Submission(config, scripts, stop, dry_run)
        for stage in left:
            rollout = stage.startswith("rollout")
            submission.add(stage, _lost_tasks(config, stage, tasks) if rollout else ())
    return submission.done


def resubmit(
    path: Path,
    overrides: Sequence[str],
    config: Run,
    stop: StopRequest,
    *,
    dry_run: bool = False,
) -> dict[str, Submitted]:
    """Submit what is missing and neither runs nor is in line; return the jobs by stage.

    Of a rollout these are the tasks whose own shards are missing. Jobs in line that need what is
    submitted again wait for it. Once `stop` is requested no more is submitted. Raises `UserError`
    as `submit` does, and when nothing was submitted before.
    """
    with alone(RunFolders(config).jobs / "lock"):
        before = read_jobs(config)
        if before is None:
            raise UserError(f"nothing of run {config.name!r} was submitted: foretell submit {path}")
        if tuple(overrides) != before.overrides:
            raise UserError(
                f"run {config.name!r} was submitted with --set {list(before.overrides)}, not "
                f"{list(overrides)}: give the same"
            )
        entries = _active(before.of(config, queue()))
        submission = Submission(
            config,
            JobScripts(config, path, overrides, before.tasks, before.max_running),
            stop,
            dry_run,
            dict(before.jobs),
            {stage: sorted({e.job_id for e in es}) for stage, es in entries.items() if es},
        )
        for stage in _left(config, path):
            _resubmit(submission, stage, entries.get(stage, []))
    return submission.done


def _resubmit(submission: Submission, stage: str, entries: Sequence[QueueEntry]) -> None:
    if stage.startswith("rollout"):
        at_work = {entry.task for entry in entries}
        lost = _lost_tasks(submission.config, stage, submission.scripts.tasks)
        tasks = [task for task in lost if task not in at_work]
        if tasks:
            submission.add(stage, tasks)
    elif not entries:
        submission.add(stage)
    if stage not in submission.done:
        submission.hold_back(stage, [e for e in entries if e.condition == "pending"])


def _left(config: Run, path: Path) -> list[str]:
    """Return the stages that are not done; refuse those that were done with other settings."""
    return [stage for stage in stages_of(config) if is_left(stage, path, config)]


def _lost_tasks(config: Run, stage: str, tasks: int) -> list[int]:
    """Return the tasks whose own shards are missing; all before there is a store.

    Where all shards are there but nobody noted that the stage is finished, one task does.
    """
    store = RunFolders(config).store_of(stage.partition(":")[2] or None)
    if not store_exists(store):
        return list(range(tasks))
    return sorted({shard % tasks for shard in PredictionStore.open(store).missing()}) or [0]


def _refuse_second(config: Run) -> None:
    before = read_jobs(config)
    if before is None:
        return
    active = _active(before.of(config, queue()))
    listed = [f"{stage} ({entries[0].job_id})" for stage, entries in active.items() if entries]
    if listed:
        ids = sorted({entry.job_id for entries in active.values() for entry in entries})
        raise UserError(
            f"run {config.name!r} has jobs in the queue: {', '.join(listed)}. Watch them with "
            "foretell status, add lost ones with foretell resubmit, or end them: scancel "
            f"{' '.join(map(str, ids))}"
        )


def _active(found: Mapping[str, Sequence[QueueEntry]]) -> dict[str, list[QueueEntry]]:
    return {stage: [e for e in entries if e.is_active] for stage, entries in found.items()}


def submission_text(done: Mapping[str, Submitted], held: Sequence[QueueEntry] = ()) -> str:
    """Return what was submitted, a line for each job, and what a person has to release."""
    lines = []
    for stage, job in done.items():
        if job.job_id is None:
            lines.append(f"{stage}: {job.command}")
            continue
        array = f", tasks {ranges(job.tasks)}" if job.tasks else ""
        after = f", after {', '.join(job.after)}" if job.after else ""
        lines.append(f"{stage}: job {job.job_id}{array}{after}")
    lines += [f"held: {e.label} ({e.reason}): scontrol release {e.label}" for e in held]
    return "\n".join(lines or ["nothing was submitted: what is not done runs or is in line"])


def held_jobs(config: Run) -> list[QueueEntry]:
    """Return the jobs of a run that wait until a person releases them; raises `UserError`."""
    before = read_jobs(config)
    if before is None:
        return []
    listed = before.of(config, queue())
    return [e for es in listed.values() for e in es if e.condition == "held"]
