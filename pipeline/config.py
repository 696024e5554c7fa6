"""The configuration of a run: one YAML file, checked against frozen records before work begins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from stages.config import (
    LOSS_FORMS,
    EvaluateConfig,
    FitConfig,
    ModelConfig,
    PrepareConfig,
    RolloutConfig,
    TrainConfig,
)
from stages.errors import UserError
from store.schema import Record

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LARGEST_FILE_BYTES = 2**20


class TeacherConfig(Record):
    """Where the teacher comes from: fitted here, or a checkpoint folder."""

    model: ModelConfig | None = None
    """Architecture of a teacher that `fit` trains."""
    checkpoint: Path | None = None
    """Folder of a finished teacher; then there is nothing to fit."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model is None) == (self.checkpoint is None):
            raise ValueError("give either teacher.model (to be fitted) or teacher.checkpoint")
        return self


class RunConfig(Record):
    """Everything a run needs; the stages it names are the stages that `foretell run` does."""

    name: str
    """Name of the run; everything is written below `<runs>/<name>/`."""
    runs: Path = Path("runs")
    """Folder that holds the runs."""
    seed: int = Field(0, ge=0)
    """Seed of everything that is random."""
    prepare: PrepareConfig | None = None
    """How the dataset is made; none when `dataset` names a prepared one."""
    dataset: Path | None = None
    """Folder of a prepared dataset; by default the run's own."""
    teacher: TeacherConfig | None = None
    """The model that is distilled."""
    fit: FitConfig | None = None
    """How the teacher is trained; none when it comes from a checkpoint."""
    rollout: RolloutConfig | None = None
    """Stage one."""
    store: Path | None = None
    """Folder of an existing store to train from; by default the run's own."""
    students: dict[str, TrainConfig] = Field(default_factory=dict)
    """Stage two: the students by name; the one called `student` leads the report."""
    evaluate: EvaluateConfig | None = None
    """Comparison of the teacher, guided and unguided, with the students."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a run name: use up to 64 letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit"
            )
        return name

    @field_validator("students")
    @classmethod
    def _check_students(cls, students: dict[str, TrainConfig]) -> dict[str, TrainConfig]:
        for name in students:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a student name: use letters, digits, '_', '-'")
        return students

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        for stage, needs in (("fit", "teacher"), ("rollout", "teacher"), ("evaluate", "teacher")):
            if getattr(self, stage) is not None and getattr(self, needs) is None:
                raise ValueError(f"{stage} needs the section {needs}")
        if self.teacher is not None and (self.teacher.model is None) != (self.fit is None):
            raise ValueError("give the section fit exactly when teacher.model is to be trained")
        if self.prepare is not None and self.dataset is not None:
            raise ValueError("give prepare (to make a dataset) or dataset (a prepared one)")
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML configuration and apply `key.path=value` overrides.

    Raises `UserError` that names every key at fault, what was given and what is possible.
    """
    document = _read_yaml(path)
    for override in overrides:
        _apply(document, override)
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        problems = "\n".join(f"  {line}" for line in _problems(error))
        raise UserError(f"{path} is not a valid configuration:\n{problems}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise UserError(
                f"{path} is larger than {LARGEST_FILE_BYTES} bytes: not a configuration"
            )
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold a mapping of sections, not {type(document).__name__}")
    return document


def _apply(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(f"--set {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    *sections, last = key.split(".")
    place = document
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {section!r} is a value, not a section")
        place = inner
    place[last] = value


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        words = [str(part) for part in problem["loc"] if part not in LOSS_FORMS]
        where = ".".join(words) or "the configuration"
        if problem["type"] == "extra_forbidden":
            yield f"{where}: unknown key{_suggestion(problem['loc'])}"
        elif problem["type"] == "missing":
            yield f"{where}: missing; this key has no default"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            shown = "" if isinstance(given, Mapping) else f" (given: {given!r})"
            yield f"{where}: {message}{shown}"


def _suggestion(location: tuple[int | str, ...]) -> str:
    known = _keys_at(RunConfig, location[:-1])
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


def _keys_at(record: type[BaseModel], location: Sequence[int | str]) -> set[str]:
    """Return the field names of the records that a location may lead to."""
    records: set[type[BaseModel]] = {record}
    for part in location:
        if part in LOSS_FORMS:
            records = {LOSS_FORMS[str(part)]}
            continue
        inner: set[type[BaseModel]] = set()
        for candidate in records:
            if part in candidate.model_fields:
                inner |= set(_records_in(candidate.model_fields[str(part)].annotation))
        # A part that is no field is a key of a mapping or the tag of a union: stay where we are.
        records = inner or records
    return {name for candidate in records for name in candidate.model_fields}


def _records_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _records_in(argument)
