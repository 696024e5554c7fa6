"""What is asked of Slurm: sbatch, squeue and scontrol, each as a command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pipeline.job_environment import IN_JOB
from pipeline.launch import MORE_TO_DO
from stages.errors import UserError
from stages.interruption import StopRequest
from store.schema import Record

FIELDS = {
    "ArrayJobID": 20, "ArrayTaskID": 20, "State": 24, "TimeUsed": 24, "RestartCnt": 12,
    "Reason": 80, "Name": 200,
}  # fmt: skip
"""Columns that squeue is asked for, and their widths in letters."""
ALIVE = {
    "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT",
    "RESIZING",
}  # fmt: skip
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "RESV_DEL_HOLD"}
HELD = {"REQUEUE_HOLD", "SPECIAL_EXIT"}
PATIENCE_S = 60
"""Seconds after which a command of Slurm's is given up."""

Condition = Literal["running", "pending", "held", "failed", "completed"]


class QueueEntry(Record):
    """One job of the queue, or one task of an array, as squeue shows it."""

    job_id: int
    """Of an array: of all of it."""
    task: int | None
    """Index in the array; None for a job that is none."""
    name: str
    state: str
    """Slurm's own word."""
    reason: str
    """Why it waits, or ended."""
    requeues: int
    """Times that it was put back in line."""
    elapsed: str
    """Time since it was started last, as Slurm writes it."""

    @property
    def label(self) -> str:
        """What scontrol and scancel call it."""
        return str(self.job_id) if self.task is None else f"{self.job_id}_{self.task}"

    @property
    def condition(self) -> Condition:
        """What a person has to know of its state."""
        if self.state in HELD or (self.state in WAITING and "held" in self.reason.lower()):
            return "held"
        if self.state in WAITING:
            return "pending"
        if self.state in ALIVE:
            return "running"
        return "completed" if self.state == "COMPLETED" else "failed"

    @property
    def is_active(self) -> bool:
        """Whether it runs or may run yet, be it that a person has to release it."""
        return self.condition in ("running", "pending", "held")


def queue() -> list[QueueEntry]:
    """Return this user's jobs, those that ended lately among them; raises `UserError`."""
    columns = ",".join(f"{name}:{width}" for name, width in FIELDS.items())
    listed = _ask(
        "squeue", "--states=all", "--array", "--noheader", f"--user={os.getuid()}",
        f"--Format={columns}",
    )  # fmt: skip
    return [_entry(line) for line in listed.splitlines() if line.strip()]


def _entry(line: str) -> QueueEntry:
    """Read one line of squeue; raises `UserError` for one that is no job."""
    cells, start = {}, 0
    for name, width in FIELDS.items():
        cells[name] = line[start : start + width].strip()
        start += width
    task = cells["ArrayTaskID"]
    return QueueEntry(
        job_id=_number(cells["ArrayJobID"], "squeue", line),
        task=int(task) if task.isdigit() else None,
        name=cells["Name"],
        state=cells["State"],
        reason=cells["Reason"],
        requeues=_number(cells["RestartCnt"], "squeue", line),
        elapsed=cells["TimeUsed"],
    )


def _number(text: str, program: str, answer: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{program} gave an answer that is not understood: {answer.strip()!r}")
    return int(text)


def sbatch(script: Path, after: Iterable[int] = ()) -> int:
    """Submit a script that waits until other jobs have ended; return its id."""
    answer = _ask(*sbatch_words(script, after))
    # In the last line, behind which a cluster may be named; sites have their own words before it.
    job_id, *_ = (answer.splitlines() or [""])[-1].split(";")
    return _number(job_id.strip(), "sbatch", answer)


def sbatch_words(script: Path, after: Iterable[int | str] = ()) -> list[str]:
    """Return the command that submits a script."""
    waits = [f"--dependency={dependency(after)}"] if after else []
    return ["sbatch", "--parsable", *waits, str(script)]


def dependency(after: Iterable[int | str]) -> str:
    """Return what a job waits for: the end of others, however they end."""
    return "afterany:" + ":".join(map(str, after))


def wait_for(job_id: int, after: Iterable[int]) -> None:
    """Let a job that is in line wait for the end of these jobs, and of no others."""
    _ask("scontrol", "update", f"JobId={job_id}", f"Dependency={dependency(after)}")


def requeue_if_asked(code: int, stop: StopRequest) -> None:
    """Put this job back in line when it was stopped, with more to do, by USR1: its time is over.

    After SIGTERM Slurm does so itself where it was preemption. Only in jobs that foretell wrote,
    and of several processes one.
    """
    first = os.environ.get("RANK", "0") == "0"
    asked = code == MORE_TO_DO and signal.SIGUSR1 in stop.signals
    if IN_JOB in os.environ and first and asked:
        _ask("scontrol", "requeue", _own_job())


def _own_job() -> str:
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def require_slurm() -> None:
    """Refuse a machine without the commands of Slurm; raises `UserError`."""
    for program in ("sbatch", "squeue", "scontrol"):
        if shutil.which(program) is None:
            raise _absent(program)


def _absent(program: str) -> UserError:
    return UserError(
        f"{program} is not on the PATH: do this on a machine of the cluster, or load the "
        "module that brings Slurm"
    )


def _ask(*words: str) -> str:
    try:
        # In a session of its own: Ctrl-C must not leave unsaid whether a job was submitted.
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
            start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise _absent(words[0]) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} gave no answer in {PATIENCE_S} s: try again later") from None
    if done.returncode != 0:
        raise UserError(
            f"{' '.join(words)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}"
        )
    return done.stdout
