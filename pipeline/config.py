"""The configuration of a run: one YAML file, checked against frozen records before work begins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from stages.config import EvaluateConfig, FitConfig, RolloutConfig, TrainConfig
from stages.errors import UserError
from stages.loss_config import LOSS_FORMS
from stages.model_config import ModelConfig, PretrainedConfig
from stages.prepare_config import PrepareConfig
from store.schema import Guidance, Record

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LARGEST_FILE_BYTES = 2**20


class TeacherConfig(Record):
    """Where the teacher comes from: fitted here, a checkpoint folder, or trained elsewhere."""

    model: ModelConfig | None = None
    """Architecture of a teacher that `fit` trains."""
    checkpoint: Path | None = None
    """Folder of a finished teacher; then there is nothing to fit."""
    pretrained: PretrainedConfig | None = None
    """Checkpoint of a model that was trained elsewhere; then there is nothing to fit."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in TeacherConfig.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of model (to be fitted), checkpoint (a folder that fit wrote) "
                f"and pretrained (trained elsewhere), not {' and '.join(given) or 'none'}"
            )
        return self


class RoundConfig(Record):
    """A further round of stage one: what a student has learnt teaches the next ones."""

    teacher: str
    """Name of the student that is rolled out, once it is trained."""
    rollout: RolloutConfig | None = None
    """Settings of the round; null takes those of the run's own rollout, without guidance."""


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
    """How the teacher is trained; none when it is trained already."""
    rollout: RolloutConfig | None = None
    """Stage one."""
    store: Path | None = None
    """Folder of an existing store to train from; by default the run's own."""
    rounds: dict[str, RoundConfig] = Field(default_factory=dict)
    """Further rounds of stage one by name, each with a store that students may learn from."""
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

    def rollout_of(self, round_name: str | None) -> RolloutConfig | None:
        """Return the settings of a round of stage one; None stands for the run's own."""
        if round_name is None:
            return self.rollout
        own = self.rounds[round_name].rollout
        if own is not None or self.rollout is None:
            return own
        return self.rollout.model_copy(update={"guidance": Guidance(scale=1)})

    @field_validator("rounds", "students")
    @classmethod
    def _check_names(cls, named: dict[str, Record], info: ValidationInfo) -> dict[str, Record]:
        kind = str(info.field_name).removesuffix("s")
        for name in named:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a {kind} name: use letters, digits, '_', '-'")
        return named

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

    @model_validator(mode="after")
    def _check_chain(self) -> Self:
        for name, round_ in self.rounds.items():
            if round_.teacher not in self.students:
                raise ValueError(
                    f"rounds.{name}.teacher is {round_.teacher!r}, which is no student: give one "
                    f"of {', '.join(map(repr, self.students)) or 'students, which has none'}"
                )
            self._check_guidance(name)
        for name, student in self.students.items():
            if student.round is not None and student.round not in self.rounds:
                raise ValueError(
                    f"students.{name}.round is {student.round!r}, which is no round: give one of "
                    f"{', '.join(map(repr, self.rounds)) or 'rounds, which has none'}"
                )
        for name in self.students:
            self._check_beginning(name)
        return self

    def _check_guidance(self, name: str) -> None:
        """Refuse to guide a student: training never drops its conditions, so it cannot be."""
        rollout = self.rollout_of(name)
        if rollout is None:
            raise ValueError(
                f"rounds.{name}.rollout is null, and there is no section rollout to take its "
                "settings from: give either"
            )
        both = getattr(rollout.target, "branches", "guided") == "both"
        if both or rollout.guidance.scale != 1:
            asked = "target.branches: both" if both else f"guidance.scale {rollout.guidance.scale}"
            wanted = "target.branches: guided" if both else "guidance: {scale: 1}"
            raise ValueError(
                f"rounds.{name} rolls out with {asked}, but its teacher is a student, which learns "
                "without dropped conditions and has no unconditional branch: give it a section "
                f"rollout with {wanted}"
            )

    def _check_beginning(self, student: str) -> None:
        """Refuse a student that waits for itself."""
        seen = [student]
        while (name := self.students[seen[-1]].round) is not None:
            seen.append(self.rounds[name].teacher)
            if seen[-1] == student:
                chain = " <- ".join(seen)
                raise ValueError(
                    f"student {student!r} would learn from itself ({chain}): let one of them learn "
                    "from the run's own store (round: null)"
                )
            if seen[-1] in seen[:-1]:
                return  # said of another student


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
        told = dict.fromkeys(_problems(error, document))  # a union tells of each member alike
        problems = "\n".join(f"  {line}" for line in told)
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
        inner = place.get(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {section!r} is a value, not a section")
        # A section may stand in several places (YAML anchors): only the one that is named changes.
        place[section] = dict(inner)
        place = place[section]
    place[last] = value


def _problems(error: ValidationError, document: Mapping[str, Any]) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        where = _place(problem, document)
        match problem["type"]:
            case "extra_forbidden":
                yield f"{where}: unknown key{_suggestion(problem['loc'])}"
            case "missing":
                yield f"{where}: missing; this key has no default"
            case "union_tag_not_found":
                known = ", ".join(map(repr, _tags_at(problem["loc"])))
                yield f"{where}.{_discriminator(problem)}: missing; give one of {known}"
            case "union_tag_invalid":
                yield f"{where}.{_discriminator(problem)}: {_unknown_tag(problem)}"
            case _:
                message = problem["msg"].removeprefix("Value error, ")
                given = problem["input"]
                shown = "" if isinstance(given, Mapping) else f" (given: {given!r})"
                yield f"{where}: {message}{shown}"


def _place(problem: ErrorDetails, document: Mapping[str, Any]) -> str:
    """Return the key at fault as the document has it.

    Pydantic's location also names the member of a union that was tried, which nobody wrote: what
    the document does not hold is left out, but for the key that is missing.
    """
    *path, last = problem["loc"] or ("the configuration",)
    parts: list[int | str] = []
    value: Any = document
    for part in path:
        if _holds(value, part):
            parts.append(part)
            value = value[part]
    if problem["type"] == "missing" or _holds(value, last) or not problem["loc"]:
        parts.append(last)
    return ".".join(map(str, parts)) or "the configuration"


def _holds(value: Any, part: int | str) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _discriminator(problem: ErrorDetails) -> str:
    return str(problem["ctx"]["discriminator"]).strip("'")


def _unknown_tag(problem: ErrorDetails) -> str:
    given, known = problem["ctx"]["tag"], _tags_at(problem["loc"])
    close = difflib.get_close_matches(given, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{given!r} is none of {', '.join(map(repr, known))}{meant}"


def _suggestion(location: tuple[int | str, ...]) -> str:
    known = {name for record in _records_at(location[:-1]) for name in record.model_fields}
    close = difflib.get_close_matches(str(location[-1]), sorted(known), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


def _tags_at(location: Sequence[int | str]) -> list[str]:
    """Return what tells the records apart that may stand at a location, in their order."""
    return [tag for record in _records_at(location) for tag in _tags(record)]


def _records_at(location: Sequence[int | str]) -> list[type[BaseModel]]:
    """Return the records that a location of pydantic's may lead to, in their order."""
    records: list[type[BaseModel]] = [RunConfig]
    for part in location:
        if part in LOSS_FORMS:
            records = [LOSS_FORMS[str(part)]]
            continue
        inner = [
            record
            for candidate in records
            if part in candidate.model_fields
            for record in _records_in(candidate.model_fields[str(part)].annotation)
        ]
        tagged = [candidate for candidate in records if part in list(_tags(candidate))]
        # A part that is neither is a key of a mapping or a place in a list: stay where we are.
        records = inner or tagged or records
    return records


def _tags(record: type[BaseModel]) -> Iterator[str]:
    """Yield the one value that a field of a record may have, which tells it from its union."""
    for field in record.model_fields.values():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            yield from get_args(field.annotation)


def _records_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _records_in(argument)
