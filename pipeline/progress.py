"""How far a run is: planned and done per stage, read from files without loading a model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pipeline.config import Run
from pipeline.folders import RunFolders
from pipeline.identity import identity
from pipeline.inputs import contents
from pipeline.record import read_records
from stages.config import RolloutConfig
from stages.diffusion.record_config import RecordConfig
from stages.errors import UserError
from stages.saved_model import is_saved
from store import PredictionStore
from store.object_url import ObjectUrl
from store.remote import store_exists
from store.schema import Record

State = Literal["done", "partial", "missing", "stale"]


class Progress(Record):
    """How much of a stage is done."""

    planned: int
    """Units of work: datasets, optimizer steps, shards or systems."""
    done: int
    """Units done."""
    missing: int
    """Units left to do."""
    state: State
    """`stale`: finished once, for other settings or inputs than the present ones."""


def stages_of(config: Run) -> list[str]:
    """Return the stages that a configuration names, in order.

    Students are `train:NAME` and rounds `rollout:NAME`, each after what it depends on.
    """
    stages = [name for name in ("prepare", "fit", "rollout") if getattr(config, name) is not None]
    for student in config.students:
        stages += _until_trained(config, student)
    stages += [_rollout_of(name) for name in config.rounds]
    stages += [] if config.evaluate is None else ["evaluate"]
    return list(dict.fromkeys(stages))


def _until_trained(config: Run, student: str) -> list[str]:
    """Return the rounds and students that lead to a student, itself the last."""
    name = config.round_of(student)
    if name is None:
        return [f"train:{student}"]
    teacher = config.rounds[name].teacher
    return [*_until_trained(config, teacher), _rollout_of(name), f"train:{student}"]


def needs(config: Run, stage: str) -> list[str]:
    """Return the stages of the configuration without which a stage cannot begin."""
    earlier = _earlier(config, stage)
    return [other for other in stages_of(config) if other in earlier]


def _earlier(config: Run, stage: str) -> list[str]:
    name, _, part = stage.partition(":")
    match name:
        case "prepare":
            return []
        case "fit":
            return ["prepare"]
        case "rollout":
            return [f"train:{config.rounds[part].teacher}"] if part else ["prepare", "fit"]
        case "train":
            return [_rollout_of(config.round_of(part))]
        case _:
            return ["prepare", "fit", "rollout", *(f"train:{name}" for name in config.students)]


def _rollout_of(round_name: str | None) -> str:
    return "rollout" if round_name is None else f"rollout:{round_name}"


def progress(config: Run, stage: str) -> Progress:
    """Return how far one stage is.

    A stage is done when its record says so for the present settings and inputs, and when what it
    made is still there.
    """
    folders = RunFolders(config)
    planned, done = _units(config, folders, stage)
    finished = [record for record in read_records(folders.stages, stage) if record.finished]
    if done == planned and finished:
        current = stage_identity(config, stage) in {record.identity for record in finished}
        return Progress(
            planned=planned, done=planned, missing=0, state="done" if current else "stale"
        )
    state: State = "partial" if done else "missing"
    return Progress(planned=planned, done=done, missing=planned - done, state=state)


def _units(config: Run, folders: RunFolders, stage: str) -> tuple[int, int]:
    """Return (planned, done) of a stage, in its own unit of work."""
    name, _, part = stage.partition(":")
    match name:
        case "prepare":
            return 1, int((folders.dataset / "dataset.json").exists())
        case "fit":
            steps = config.fit.optimizer.steps if config.fit else 0
            return steps, _steps_done(folders.teacher, steps)
        case "rollout":
            return _shards(folders.store_of(part or None))
        case "train":
            steps = config.students[part].optimizer.steps
            return steps, _steps_done(folders.student(part), steps)
        case _:
            return 1, int((folders.report / "report.json").exists())


def _steps_done(folder: Path, steps: int) -> int:
    if is_saved(folder):
        return steps
    checkpoints = sorted((folder / "checkpoints").glob("step_" + "[0-9]" * 8))
    return min(int(checkpoints[-1].name.removeprefix("step_")), steps) if checkpoints else 0


def _shards(path: Path | ObjectUrl) -> tuple[int, int]:
    if not store_exists(path):
        return 1, 0
    store = PredictionStore.open(path)
    return store.planned_shards, store.planned_shards - len(store.missing())


def stage_identity(config: Run, stage: str) -> str:
    """Return what the result of a stage depends on, upstream stages included."""
    name, _, part = stage.partition(":")
    match name:
        case "prepare":
            return identity("prepare", config.prepare, _inputs(config, config.prepare))
        case "fit":
            inputs = _inputs(config, config.teacher)
            return identity(
                "fit", _dataset(config), config.teacher, inputs, config.fit, config.seed
            )
        case "rollout":
            rollout = config.rollout_of(part or None)
            inputs = _inputs(config, rollout)
            taught_by = _teacher_of(config, part or None)
            return identity("rollout", taught_by, *_rollout(rollout), inputs, config.seed)
        case "train":
            student = config.students[part]
            inputs = _inputs(config, student)
            return identity(
                "train", _store(config, config.round_of(part)), student, inputs, config.seed
            )
        case _:
            students = [stage_identity(config, f"train:{name}") for name in config.students]
            return identity("evaluate", _teacher(config), config.evaluate, *students)


def _inputs(config: Run, section: Record | None) -> dict[str, str]:
    """Return what the files hold that a section names."""
    return contents(section, RunFolders(config).stages)


def _dataset(config: Run) -> str:
    """Return what the dataset depends on: how it is made, or the fingerprint of a given one."""
    if config.dataset is None:
        return stage_identity(config, "prepare")
    path = config.dataset / "dataset.json"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"dataset: cannot read {path}: {error.strerror}") from None


def _teacher(config: Run) -> str:
    if config.fit is not None:
        return stage_identity(config, "fit")
    inputs = _inputs(config, config.teacher)
    return identity("checkpoint", _dataset(config), config.teacher, inputs)


def _teacher_of(config: Run, round_name: str | None) -> str:
    """Return what the teacher of a round depends on: the run's own, or a student."""
    if round_name is None:
        return _teacher(config)
    return stage_identity(config, f"train:{config.rounds[round_name].teacher}")


def _rollout(
    settings: RolloutConfig | RecordConfig | None,
) -> tuple[RolloutConfig | RecordConfig | str | None, ...]:
    """Return the settings of stage one, and the store that it replays, by what is in it."""
    if not isinstance(settings, RolloutConfig) or settings.replay is None:
        return (settings,)
    codes = PredictionStore.open(settings.replay).fingerprint
    return settings.model_copy(update={"replay": None}), codes


def _store(config: Run, round_name: str | None) -> str:
    if round_name is not None:
        return stage_identity(config, f"rollout:{round_name}")
    if config.rollout is not None and config.store is None:
        return stage_identity(config, "rollout")
    return PredictionStore.open(RunFolders(config).store).fingerprint
