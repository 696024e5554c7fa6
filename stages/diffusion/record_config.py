"""Settings of stage one of diffusion.

Frozen records whose field docstrings are the help text. Nothing here imports torch, so that reading
a configuration stays fast.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.config import FREE_FLOOR
from stages.diffusion.model_config import (
    DiffusionTeacher,
    TimestepsConfig,
    require_quantizable,
)
from stages.ranges import Positive
from store.schema import Dense, Fast, Guidance, Profile, QuantizationMethod, Record


class ForwardRows(Record):
    """Rows of images with noise added (Meng et al. 2210.03142, stage one)."""

    kind: Literal["forward"] = "forward"
    slots: Positive = 8
    """Noise levels per variation, drawn from as many strata."""
    timesteps: TimestepsConfig = TimestepsConfig()
    """Which noise levels are drawn."""
    store_noise: bool = False
    """Store the noise instead of drawing it again from its key: half as many bytes more."""


class TrajectoryRows(Record):
    """Rows along guided trajectories from noise to image (DDIM, or Euler for flow models)."""

    kind: Literal["trajectory"]
    steps: Annotated[int, Field(ge=2)] = 25
    """Solver steps."""
    keep: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Steps whose states are stored, rising; null keeps all. The end is always stored."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        kept = self.keep
        if kept is not None and (
            list(kept) != sorted(set(kept)) or not kept or kept[-1] >= self.steps
        ):
            raise ValueError(
                f"keep={list(kept)} must be rising steps in [0, steps={self.steps}); null keeps all"
            )
        return self


Rows = Annotated[ForwardRows | TrajectoryRows, Field(discriminator="kind")]


class UnconditionalContrast(Record):
    """The delta is to the same model without the condition: classifier-free guidance."""

    kind: Literal["unconditional"] = "unconditional"


class AdapterContrast(Record):
    """The delta is what the teacher's own adapter changes."""

    kind: Literal["adapter"]


class ModelContrast(Record):
    """The delta is to another model of the same kind, which takes turns on the device."""

    kind: Literal["model"]
    other: DiffusionTeacher
    """What is subtracted."""


Contrast = Annotated[
    UnconditionalContrast | AdapterContrast | ModelContrast, Field(discriminator="kind")
]


class PreviewConfig(Record):
    """Images at fixed seeds that the teacher makes once, to stand beside the student's."""

    samples: Positive = 8
    """Images, of the conditions of as many samples."""
    steps: Positive = 25
    """Solver steps."""
    split: str = "dev"
    """Split of the dataset whose conditions they have."""
    seed: int = 0
    """Seed of the start noise."""


class RecordConfig(Record):
    """Stage one: what the teacher predicts, and how it is stored."""

    split: str = "train"
    """Split of the dataset that is recorded."""
    samples: Positive | None = None
    """Samples taken from the split, from its start; null takes all."""
    rows: Rows = ForwardRows()
    """Where the model is asked: on noised images, or along trajectories."""
    contrast: Contrast = UnconditionalContrast()
    """What the stored delta is to."""
    guidance: Guidance = Guidance(scale=7.5)
    """Guidance of trajectories and previews, and of targets that are not `both`."""
    target: Dense = Dense()
    """Both parts, or `branches: guided` for one prediction, as of models without a second pass."""
    profile: Profile = Fast()
    """How it is encoded."""
    rollouts_per_shard: Positive = 64
    """Variations per shard, the unit of commit and of resumption."""
    batch_size: Positive = 8
    """Rows of a forward pass, with both branches twice as many."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Weights and arithmetic of the teacher; a row that is not finite is repeated in fp32."""
    quantization: QuantizationMethod | None = None
    """How the linear layers of the denoiser are held."""
    keep: tuple[str, ...] = ()
    """Layers that are not quantized, by name or pattern."""
    previews: PreviewConfig | None = None
    """Images that are rendered once."""
    disk_check: bool = True
    """Refuse to begin where the disk will not hold what is missing; false begins nevertheless."""
    free_floor: int = Field(FREE_FLOOR, ge=0)
    """Bytes that stay free on the store's disk: with less no shard is begun, and stage one ends."""
    processes: Positive = 1
    """Processes that `run` starts on this machine."""
    device: str = "auto"
    """Torch device; `auto` takes CUDA where it is present."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantization is not None:
            require_quantizable("precision", self.precision, "quantization")
        return self
