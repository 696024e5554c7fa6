"""Settings of what trains and evaluates denoisers.

Frozen records whose field docstrings are the help text. Nothing here imports torch, so that reading
a configuration stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.config import LoaderConfig, OptimizerConfig
from stages.diffusion.model_config import DenoiserConfig, TimestepsConfig
from stages.ranges import GuidanceScale, Positive, Share
from store.schema import Record

ErrorName = Literal["mse", "l1", "huber", "log_cosh"]
WeightingName = Literal["constant", "min_snr", "soft_min_snr", "debiased", "p2"]


class DenoisingFitConfig(Record):
    """Training of a teacher on the images themselves."""

    optimizer: OptimizerConfig
    """Steps, batches and learning rate."""
    condition_dropout: Share = 0.1
    """Share of images trained without their condition; guidance needs more than 0."""
    timesteps: TimestepsConfig = TimestepsConfig()
    """Which noise levels are drawn."""
    weighting: WeightingName = "constant"
    """Weight of the loss by noise level."""
    gamma: float = Field(5.0, gt=0)
    """Bound on the signal-to-noise ratio of `min_snr` and `soft_min_snr`."""
    exponent: float = Field(1.0, gt=0)
    """Exponent of `p2`."""

    @property
    def weighting_number(self) -> float:
        """Return the number that the weighting has."""
        return self.exponent if self.weighting == "p2" else self.gamma


class MaskConfig(Record):
    """How masks of the dataset weigh the error; images without a mask count whole."""

    unmasked_weight: Share = 0.1
    """Weight of what lies outside the mask."""
    normalize_area: bool = False
    """Divide by the mean of the mask, so that small masks weigh as much as large ones."""


class DiffusionLossConfig(Record):
    """What a student minimises: one value per row."""

    error: ErrorName = "mse"
    """Error of an element of the prediction."""
    delta: float = Field(1.0, gt=0)
    """Where the Huber error turns linear; scale of log-cosh."""
    guidance_scale: GuidanceScale | None = None
    """Scale, or (low, high) to draw it from per row and epoch, of a store of both branches."""
    data_share: Share = 0.0
    """Share of the image itself in the target of teacher samples; the prediction has the rest."""
    teaches: Literal["prediction", "end", "pairs"] = "prediction"
    """Of trajectories: the prediction at a state, the end that it leads to, or the straight line
    between both ends (reflow)."""
    weighting: WeightingName = "constant"
    """Weight by noise level, in the student's own type of prediction."""
    gamma: float = Field(5.0, gt=0)
    """Bound on the signal-to-noise ratio of `min_snr` and `soft_min_snr`."""
    exponent: float = Field(1.0, gt=0)
    """Exponent of `p2`."""
    mask: MaskConfig | None = None
    """Weigh the error by the masks of the dataset; null ignores them."""
    largest_factor: float = Field(64.0, gt=1)
    """Leave out rows whose target would be amplified more by conversion to the student's type."""

    @property
    def weighting_number(self) -> float:
        """Return the number that the weighting has."""
        return self.exponent if self.weighting == "p2" else self.gamma

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data_share and self.teaches != "prediction":
            raise ValueError(
                f"data_share={self.data_share} with teaches={self.teaches!r}: trajectories begin "
                "in noise and have no image; leave it out"
            )
        return self


class DenoiserInitConfig(Record):
    """Where the weights of a student come from."""

    kind: Literal["fresh", "teacher", "pipeline", "checkpoint"] = "teacher"
    """`fresh` draws them, `teacher` copies the teacher's, `pipeline` those of `model.pipeline`, and
    `checkpoint` loads `path`."""
    path: Path | None = None
    """Folder of a finished model, for `checkpoint`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "checkpoint") != (self.path is not None):
            raise ValueError(
                f"kind={self.kind!r} with path={self.path}: give a path exactly for 'checkpoint'"
            )
        return self


class StudentPreviews(Record):
    """Images during training, with the seeds and conditions of the teacher's."""

    every: Positive = 500
    """Optimizer steps between two grids."""
    guidance_scale: float | None = None
    """Scale that a student conditioned on it is told; null takes the teacher's."""


class DistilConfig(Record):
    """Stage two: one student and how it learns from the store."""

    model: DenoiserConfig
    """Architecture of the student."""
    init: DenoiserInitConfig = DenoiserInitConfig()
    """Where its weights come from."""
    loss: DiffusionLossConfig = DiffusionLossConfig()
    """What it minimises."""
    optimizer: OptimizerConfig
    """Steps, batches (in rows) and learning rate."""
    variations: Literal["all", "one"] = "all"
    """Rows of a sample in an epoch: `all`, or `one` that the epoch draws."""
    buffer_shards: Positive = 4
    """Shards that are shuffled together, and held in memory by each loader process."""
    loader: LoaderConfig = LoaderConfig()
    """How batches are read ahead."""
    previews: StudentPreviews | None = None
    """Images during training."""


class ImageEvaluateConfig(Record):
    """Comparison of guided and unguided teacher and students from the same start noise."""

    split: Literal["train", "dev", "test"] = "test"
    """Split whose conditions are drawn and whose images the Fréchet distance is to."""
    samples: Positive = 500
    """Images per system; conditions are taken in turn."""
    steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (25,)
    """Solver steps; the first leads the report."""
    guidance_scale: float | None = None
    """Scale of the guided teacher; null takes that of `rollout`."""
    judge: Literal["digits"] | None = None
    """Classifier of generated images: a support vector machine on the digits; null has none."""
    images: int = Field(10, ge=0)
    """Conditions whose images the report shows."""
    bootstrap_draws: Annotated[int, Field(ge=100)] = 2000
    """Draws of the 95 % intervals, over images."""
    seed: int = Field(0, ge=0)
    """Seed of the start noise and of the bootstrap."""
    batch_size: Positive = 64
    """Images made together."""
    device: str = "auto"
    """Torch device; `auto` takes CUDA where it is present."""
