"""Settings of denoisers: their networks, noise schedules, adapters, and the types they are held in.

Frozen records whose field docstrings are the help text. Nothing here imports torch, so that reading
a configuration stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from stages.ranges import Positive, Share
from store.schema import QuantizationMethod, Record

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
"""What a denoiser predicts of x_t = alpha·x0 + sigma·noise: the noise, alpha·noise − sigma·x0, x0,
or noise − x0."""
NetworkClass = Literal[
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
]


def require_quantizable(name: str, precision: str, quantization: str) -> None:
    """Raise ValueError for a type in which quantized layers do not compute, naming both settings.

    Said when a configuration is read: a model says it itself only when it is quantized, hours
    later.
    """
    if precision == "fp16":
        raise ValueError(
            f"{name} is fp16, but with {quantization} a model computes in fp32 or bf16: set "
            f"{name}: bf16, or leave {quantization} out"
        )


class ScheduleConfig(Record):
    """The noise schedule of a model that is trained here."""

    kind: Literal["ddpm", "flow"] = "ddpm"
    """Variance preserving steps, or the straight line between data and noise."""
    prediction: PredictionType = "v_prediction"
    """What the model predicts."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """Schedule of betas, as diffusers names it; `ddpm` only."""
    train_timesteps: Positive = 1000
    """Number of steps, which the time that the model is told runs over."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last step is pure noise; `ddpm` only."""
    shift: float = Field(1.0, gt=0)
    """Shift of the flow's time towards noise; `flow` only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "flow") != (self.prediction == "flow"):
            raise ValueError(
                f"kind={self.kind!r} with prediction={self.prediction!r}: flow predicts 'flow', "
                "and nothing else does"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr with prediction='epsilon': at the last step the noise is the "
                "input, so nothing would be learned; use v_prediction"
            )
        return self


class LoraConfig(Record):
    """A low-rank adapter on a frozen denoiser (peft)."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank; null takes the rank."""
    dropout: Share = 0.0
    """Dropout before the update."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the layers that are adapted."""


class DenoiserConfig(Record):
    """Architecture of a denoiser: the family `diffusion`."""

    family: Literal["diffusion"] = "diffusion"
    pipeline: Path | None = None
    """Local diffusers folder, or a single .safetensors file, whose denoiser and scheduler are
    taken; null builds `network`."""
    pipeline_config: Path | None = None
    """Folder with the configuration files of a single-file checkpoint."""
    network: NetworkClass | None = None
    """Class of the network that is built; null takes the pipeline's."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the network by diffusers' names; beside a pipeline only those that change."""
    schedule: ScheduleConfig | None = None
    """Noise schedule; null takes the pipeline's, or for a student that of the store."""
    prediction: PredictionType | None = None
    """What a student predicts, where that is not what its teacher did."""
    adapter: LoraConfig | None = None
    """Train a low-rank adapter on the frozen network; null trains all weights."""
    scale_input: bool = False
    """Tell the model the guidance scale (`time_cond_proj_dim`), so that one student has many."""
    gradient_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them."""
    base_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of frozen weights under an adapter; what is trained is fp32."""
    base_quantization: QuantizationMethod | None = None
    """How the linear layers of the frozen network under an adapter are held."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pipeline is None and self.network is None:
            raise ValueError(
                "give pipeline (a local folder) or network (a class to build), or both"
            )
        frozen = self.base_precision != "fp32" or self.base_quantization is not None
        if frozen and self.adapter is None:
            raise ValueError(
                "base_precision and base_quantization hold frozen weights, but without an adapter "
                "all weights are trained: give an adapter, or leave them out"
            )
        if self.base_quantization is not None:
            require_quantizable("base_precision", self.base_precision, "base_quantization")
        return self


class DiffusionTeacher(Record):
    """A trained pipeline of diffusers'."""

    family: Literal["diffusion"] = "diffusion"
    path: Path
    """Local folder of the pipeline, or a single .safetensors checkpoint."""
    config: Path | None = None
    """Folder with the configuration files of a single-file checkpoint."""
    adapter: Path | None = None
    """LoRA file of the teacher, in diffusers' or kohya's format."""
    adapter_scale: float = 1.0
    """Factor on the adapter's update, applied once."""
    embedded_guidance: float | None = Field(None, ge=0)
    """Guidance number that a model conditioned on it, such as FLUX.1-dev, is told."""

    @property
    def weights(self) -> Path:
        """What a student that begins as its teacher reads."""
        return self.path


class TimestepsConfig(Record):
    """Which noise levels are drawn: one stratum of the distribution per slot and variation."""

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Of the share of the schedule, 0 being clean and 1 pure noise."""
    mean: float = 0.0
    """Mean of the logit; `logit_normal` only."""
    std: float = Field(1.0, gt=0)
    """Standard deviation of the logit; `logit_normal` only."""
    low: Share = 0.0
    """Least share of the schedule."""
    high: Share = 1.0
    """Largest share of the schedule."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must lie below high={self.high}")
        return self
