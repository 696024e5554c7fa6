"""The configuration of a run of diffusion models: `kind: diffusion`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.run_config import CommonRun, OneTeacher, RoundConfig
from stages.diffusion.image_config import ImagesConfig
from stages.diffusion.loss_support import require_teachable
from stages.diffusion.model_config import DenoiserConfig, DiffusionTeacher
from stages.diffusion.record_config import RecordConfig
from stages.diffusion.train_config import DenoisingFitConfig, DistilConfig, ImageEvaluateConfig
from stages.errors import UserError


class DenoisingTeacherConfig(OneTeacher):
    """Where the teacher comes from: fitted here, a checkpoint folder, or a pipeline."""

    model: DenoiserConfig | None = None
    """Architecture of a teacher that `fit` trains."""
    pretrained: DiffusionTeacher | None = None
    """A trained pipeline of diffusers'; then there is nothing to fit."""


class DiffusionRunConfig(CommonRun):
    """Everything a run of diffusion models needs; it does the stages that it names."""

    kind: Literal["diffusion"]
    """What tells it from a run of speech models."""
    prepare: ImagesConfig | None = None
    """How the dataset is made; none when `dataset` names a prepared one."""
    teacher: DenoisingTeacherConfig | None = None
    """The model that is distilled."""
    fit: DenoisingFitConfig | None = None
    """How the teacher is trained; none when it is trained already."""
    rollout: RecordConfig | None = None
    """Stage one."""
    students: dict[str, DistilConfig] = Field(default_factory=dict)
    """Stage two: the students by name; the one called `student` leads the report."""
    evaluate: ImageEvaluateConfig | None = None
    """Comparison of the teacher, guided and unguided, with the students."""

    @property
    def rounds(self) -> dict[str, RoundConfig]:
        """Return the further rounds of stage one: a diffusion run has none."""
        return {}

    def rollout_of(self, round_name: str | None) -> RecordConfig | None:
        """Return the settings of stage one, whose only round is the run's own."""
        return None if round_name else self.rollout

    def round_of(self, student: str) -> str | None:
        """Return the round whose store a student learns from: always the run's own."""
        return None

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        """Refuse a loss that the store cannot teach, hours before stage two would."""
        rollout = self.rollout
        if rollout is None:
            return self  # the store is there already, and its manifest says what it holds
        for name, student in self.students.items():
            try:
                require_teachable(
                    student.loss, rollout.rows, rollout.target.branches, rollout.guidance.scale
                )
            except UserError as error:
                raise ValueError(f"students.{name}.{error}") from None
        return self
