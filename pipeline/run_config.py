"""What runs of all kinds have in common, and the configuration of a run of speech models."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.cluster_config import ClusterConfig
from stages.config import EvaluateConfig, FitConfig, RolloutConfig, TrainConfig
from stages.errors import UserError
from stages.model_config import ModelConfig, PretrainedConfig
from stages.prepare_config import PrepareConfig
from stages.support import require_teachable
from store.object_url import Place
from store.schema import Guidance, Record

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


Section = TypeVar("Section")


def given(section: Section | None, name: str) -> Section:
    """Return a section that a stage needs; raises `UserError` where the configuration has none."""
    if section is None:
        raise UserError(f"the configuration has no section {name!r}, which this stage needs")
    return section


def require_round(run: str, rounds: Collection[str], name: str | None) -> None:
    """Refuse the name of a round that a run has not; None, its own, it always has."""
    if name is not None and name not in rounds:
        known = f"give one of {', '.join(map(repr, rounds))}" if rounds else "it has none"
        raise UserError(f"run {run!r} has no round {name!r}: {known}")


class OneTeacher(Record):
    """Where a teacher comes from: exactly one of several places."""

    checkpoint: Path | None = None
    """Folder of a finished teacher; then there is nothing to fit."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        places = ("model", "checkpoint", "pretrained")
        given = [name for name in places if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of model (to be fitted), checkpoint (a folder that fit wrote) "
                f"and pretrained (trained elsewhere), not {' and '.join(given) or 'none'}"
            )
        return self


class TeacherConfig(OneTeacher):
    """Where the teacher comes from: fitted here, a checkpoint folder, or trained elsewhere."""

    model: ModelConfig | None = None
    """Architecture of a teacher that `fit` trains."""
    pretrained: PretrainedConfig | None = None
    """Checkpoint of a model that was trained elsewhere; then there is nothing to fit."""


class RoundConfig(Record):
    """A further round of stage one: what a student has learnt teaches the next ones."""

    teacher: str
    """Name of the student that is rolled out, once it is trained."""
    rollout: RolloutConfig | None = None
    """Settings of the round; null takes those of the run's own rollout, without guidance."""


class CommonRun(Record):
    """What a run of any kind of model has."""

    name: str
    """Name of the run; everything is written below `<runs>/<name>/`."""
    runs: Path = Path("runs")
    """Folder that holds the runs."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything that is random."""
    dataset: Path | None = None
    """Folder of a prepared dataset; by default the run's own."""
    store: Place | None = None
    """Folder of the store, or its URL s3://BUCKET/PREFIX, alone or with settings (`{url: …}`); by
    default the run's own."""
    cluster: ClusterConfig | None = None
    """How `submit` gives the run to Slurm; it changes nothing that the run produces."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a run name: use up to 64 letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit"
            )
        return name

    @field_validator("rounds", "students", check_fields=False)
    @classmethod
    def _check_names(cls, named: dict[str, Record], info: ValidationInfo) -> dict[str, Record]:
        kind = str(info.field_name).removesuffix("s")
        for name in named:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a {kind} name: use letters, digits, '_', '-'")
        return named

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        prepare, teacher, fit = (getattr(self, name) for name in ("prepare", "teacher", "fit"))
        for stage in ("fit", "rollout", "evaluate"):
            if getattr(self, stage) is not None and teacher is None:
                raise ValueError(f"{stage} needs the section teacher")
        if teacher is not None and (teacher.model is None) != (fit is None):
            raise ValueError("give the section fit exactly when teacher.model is to be trained")
        if prepare is not None and self.dataset is not None:
            raise ValueError("give prepare (to make a dataset) or dataset (a prepared one)")
        self._check_jobs()
        return self

    def _check_jobs(self) -> None:
        """Refuse what is asked for the job of a student or a round that there is not."""
        named = {"train": "students", "rollout": "rounds"}
        for stage in self.cluster.stages if self.cluster else ():
            kind, _, name = stage.partition(":")
            known = getattr(self, named.get(kind, ""), {})
            if name and name not in known:
                raise ValueError(
                    f"cluster.stages.{stage} is for no stage of the run: give one of "
                    f"{', '.join(f'{kind}:{other}' for other in known) or kind}"
                )


class RunConfig(CommonRun):
    """Everything a run needs; the stages it names are the stages that `foretell run` does."""

    kind: Literal["speech"] = "speech"
    """What tells it from a run of diffusion models."""
    prepare: PrepareConfig | None = None
    """How the dataset is made; none when `dataset` names a prepared one."""
    teacher: TeacherConfig | None = None
    """The model that is distilled."""
    fit: FitConfig | None = None
    """How the teacher is trained; none when it is trained already."""
    rollout: RolloutConfig | None = None
    """Stage one."""
    rounds: dict[str, RoundConfig] = Field(default_factory=dict)
    """Further rounds of stage one by name, each with a store that students may learn from."""
    students: dict[str, TrainConfig] = Field(default_factory=dict)
    """Stage two: the students by name; the one called `student` leads the report."""
    evaluate: EvaluateConfig | None = None
    """Comparison of the teacher, guided and unguided, with the students."""

    def round_of(self, student: str) -> str | None:
        """Return the round whose store a student learns from; None stands for the run's own."""
        return self.students[student].round

    def rollout_of(self, round_name: str | None) -> RolloutConfig | None:
        """Return the settings of a round of stage one; None stands for the run's own."""
        if round_name is None:
            return self.rollout
        own = self.rounds[round_name].rollout
        if own is not None or self.rollout is None:
            return own
        return self.rollout.model_copy(update={"guidance": Guidance(scale=1)})

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
            self._check_loss(name)
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

    def _check_loss(self, name: str) -> None:
        """Refuse a loss that the store cannot teach, hours before stage two would."""
        student = self.students[name]
        rollout = self.rollout_of(student.round)
        if rollout is None:
            return  # the store is there already, and its manifest says what it holds
        try:
            require_teachable(student.loss, rollout.target, rollout.guidance.scale)
        except UserError as error:
            raise ValueError(f"students.{name}.{error}") from None

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
