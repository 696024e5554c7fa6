"""Doing the stages of a run in order, each in its own processes, skipping what is done."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Run
from pipeline.folders import RunFolders
from pipeline.job_environment import IN_JOB
from pipeline.launch import FINISHED, MORE_TO_DO, launch
from pipeline.printing import tell
from pipeline.progress import progress, stage_identity, stages_of
from pipeline.record import StageRecord, Usage, read_record, write_record
from stages.config import RolloutConfig
from stages.errors import UserError
from stages.interruption import StopRequest, stop_request


def run(path: Path, overrides: Sequence[str], config: Run) -> int:
    """Do every stage that the configuration names and that is not done; return the exit code."""
    with stop_request() as stop:
        for stage in stages_of(config):
            code = do_stage(stage, path, overrides, config, stop)
            if code != FINISHED:
                return code
    say(f"{RunFolders(config).root}: all stages are done")
    return FINISHED


def do_stage(
    stage: str,
    path: Path,
    overrides: Sequence[str],
    config: Run,
    stop: StopRequest,
    task: str | None = None,
    *,
    static: bool = False,
) -> int:
    """Do one stage in its own processes, unless it is done; return the exit code.

    Nothing is begun once `stop` is requested. `task` is "I/N" for one job of an array, which
    writes its own shards alone where the split is `static`. Raises `UserError` for a stage that was
    finished with other settings: nothing is overwritten.
    """
    if not is_left(stage, path, config):
        say(f"{stage}: done")
        return FINISHED
    if not stop.requested:
        say(f"{stage}: started")
    code = FINISHED
    arguments = [str(path), *(f"--set={override}" for override in overrides)]
    arguments += [f"--task={task}"] if task is not None else []
    arguments += ["--static"] if static else []
    for part in _parts(config, stage):
        if code == FINISHED:
            code = _attempt(part, arguments, config, stop, task)
    if code == MORE_TO_DO:
        _say_stopped(stage, path)
    return code


def _say_stopped(stage: str, path: Path) -> None:
    goes_on = f"To go on: foretell run {path}"
    if IN_JOB in os.environ:
        goes_on = f"It goes on if Slurm starts this job again; else: foretell resubmit {path}"
    say(f"{stage}: stopped; nothing is lost. {goes_on}")


def do_stage_among_peers(
    stage: str, path: Path, overrides: Sequence[str], config: Run, stop: StopRequest
) -> int:
    """Do one stage as one of the processes that torchrun or srun started; return the exit code.

    The first of them notes that it is done, and what it needed itself.
    """
    from pipeline.worker import main as work  # noqa: PLC0415 - it imports torch

    if not is_left(stage, path, config):
        return FINISHED
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="foretell-") as scratch:
        noted = Path(scratch) / "usage"
        os.environ["FORETELL_USAGE"] = str(noted)
        try:
            code = work([stage, str(path), *(f"--set={override}" for override in overrides)], stop)
        finally:
            del os.environ["FORETELL_USAGE"]  # what is started later notes nothing here
        usages = [Usage.model_validate_json(noted.read_bytes())] if noted.exists() else []
    if os.environ["RANK"] == "0":
        _note(config, stage, code, time.monotonic() - started, usages)
        if code == MORE_TO_DO:
            _say_stopped(stage, path)
    return code


def is_left(stage: str, path: Path, config: Run) -> bool:
    """Return whether a stage is yet to be done.

    Raises `UserError` for one that the configuration does not name, and for one that was finished
    with other settings.
    """
    if stage not in stages_of(config):
        raise UserError(
            f"{path} has no section for the stage {stage!r}: its stages are "
            f"{', '.join(stages_of(config)) or 'none'}"
        )
    state = progress(config, stage).state
    if state == "stale":
        raise UserError(
            f"{stage} of run {config.name!r} was finished with other settings or inputs than "
            f"{path} has now: change `name`, or move {RunFolders(config).root} away"
        )
    return state != "done"


def _parts(config: Run, stage: str) -> tuple[str, ...]:
    """Return what a stage does one after the other, each in processes of its own."""
    name, _, part = stage.partition(":")
    rollout = config.rollout_of(part or None) if name == "rollout" else None
    if not isinstance(rollout, RolloutConfig) or rollout.source != "student":
        return (stage,)
    return (stage.replace("rollout", "draw", 1), stage)


def _attempt(
    stage: str, arguments: Sequence[str], config: Run, stop: StopRequest, task: str | None
) -> int:
    if stop.requested:
        return MORE_TO_DO
    processes = 1 if task is not None else processes_of(config, stage)
    code, wall_s, usages = launch([stage, *arguments], processes, stop)
    _note(config, stage, code, wall_s, usages, task)
    return code


def _note(
    config: Run,
    stage: str,
    code: int,
    wall_s: float,
    usages: list[Usage],
    task: str | None = None,
) -> None:
    folder = RunFolders(config).stages
    identity = stage_identity(config, re.sub("^draw", "rollout", stage))
    record = read_record(folder, stage, task)
    if record is None or record.identity != identity:
        record = StageRecord(stage=stage, identity=identity)
    write_record(folder, record.after(wall_s, usages, finished=code == FINISHED), task)


def processes_of(config: Run, stage: str) -> int:
    """Return the processes that a stage starts on one machine."""
    name, _, part = stage.partition(":")
    match name:
        case "fit":
            return config.fit.optimizer.processes if config.fit else 1
        case "rollout" | "draw":
            rollout = config.rollout_of(part or None)
            return rollout.processes if rollout else 1
        case "train":
            return config.students[part].optimizer.processes
        case _:
            return 1


def own_code(code: int) -> int:
    """Return with which exit code this process ends: of several, one says that there is more to do.

    torchrun and srun end all others at the first code that is not 0, and the first process has yet
    to note the stop.
    """
    return code if code != MORE_TO_DO or os.environ.get("RANK", "0") == "0" else FINISHED


def under_torchrun() -> bool:
    """Whether this process is one of a group that torchrun (or srun with its variables) started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def say(message: str) -> None:
    """Tell a person what is going on; standard output is left to reports."""
    tell(message)
