"""Settings of model families: what is built, and what is loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from stages.causal_lm_config import CausalLMConfig, CausalLMTeacher
from stages.ranges import Positive, Share
from store.schema import Record

FamilyName = Literal["codec_lm", "magpie", "causal_lm"]


class LocalTransformerConfig(Record):
    """The autoregressive transformer over the codebooks of one timestep."""

    d_model: Positive = 256
    """Width, in features."""
    layers: Positive = 1
    """Layers."""
    heads: Positive = 4
    """Attention heads."""


class ExpertsConfig(Record):
    """Mixture-of-experts feed-forward of the decoder."""

    experts: Annotated[int, Field(ge=2)] = 8
    """Experts per layer."""
    active: Positive = 2
    """Experts that each position visits."""
    routing: Literal["top_k", "sinkhorn"] = "top_k"
    """How training assigns positions to experts; inference always takes the top ones."""
    balance_weight: float = Field(0.01, ge=0.0)
    """Weight of the load-balancing loss (0 with sinkhorn)."""
    z_weight: float = Field(0.001, ge=0.0)
    """Weight of the router z loss."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.active > self.experts:
            raise ValueError(f"active={self.active} exceeds experts={self.experts}; lower it")
        if self.routing == "sinkhorn" and self.balance_weight > 0:
            raise ValueError(
                f"routing='sinkhorn' balances by itself, so balance_weight={self.balance_weight} "
                "must be 0; set it"
            )
        return self


class CodecLMConfig(Record):
    """Architecture of the family `codec_lm`."""

    family: Literal["codec_lm"] = "codec_lm"
    d_model: Positive = 768
    """Width of encoder and decoder, in features."""
    heads: Positive = 12
    """Attention heads; must divide `d_model`."""
    text_layers: Positive = 6
    """Layers of the text encoder."""
    decoder_layers: Positive = 12
    """Layers of the causal decoder."""
    context_layers: Positive = 1
    """Layers of the context encoder; used when samples carry context codes."""
    feed_forward: Positive = 3072
    """Width of the feed-forward (of one expert when there are experts), in features."""
    dropout: Share = 0.1
    """Dropout share in training."""
    code_noise: Share = 0.0
    """Share of input codes replaced at random in training; 0 for students."""
    timestep_noise: Share = 0.0
    """Mean share of earlier timesteps hidden in training, so that the text is needed."""
    frames_per_step: Literal[1, 2, 4] = 1
    """Codec frames that one decoding step predicts (frame stacking)."""
    max_timesteps: Positive = 2048
    """Longest sequence, in decoding steps."""
    max_characters: Positive = 1024
    """Longest text, in characters."""
    local_transformer: LocalTransformerConfig | None = None
    """Autoregression over codebooks within a timestep; none when null."""
    experts: ExpertsConfig | None = None
    """Mixture of experts in place of the dense feed-forward; none when null."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide d_model={self.d_model}; choose a divisor"
            )
        if self.experts is not None and (self.d_model % 8 or self.feed_forward % 8):
            raise ValueError(
                f"with experts, d_model={self.d_model} and feed_forward={self.feed_forward} must "
                "be multiples of 8, because the grouped product reads blocks of 16 bytes"
            )
        return self


class MagpieSettings(Record):
    """What foretell must know of a MagpieTTS model beside NeMo's own configuration."""

    family: Literal["magpie"]
    tokenizer: str | None = None
    """Which of the model's text tokenizers reads the texts; null takes its first."""
    speakers: tuple[str, ...] = ()
    """Speakers of the baked context embeddings, in their order; none where contexts are codes."""
    local_streams: bool = True
    """Distil the local transformer too, where the model has one; it doubles the stored bytes."""
    history: Literal["backbone", "local"] = "backbone"
    """Whose draws continue a rollout: the decoder's own, drawn in parallel, as in NeMo's
    distillation, or the local transformer's, as in its inference."""

    @model_validator(mode="after")
    def _check_history(self) -> Self:
        if self.history == "local" and not self.local_streams:
            raise ValueError("history='local' needs the local transformer: set local_streams: true")
        return self


class MagpieConfig(MagpieSettings):
    """A MagpieTTS model to build: the family `magpie`."""

    nemo: Path
    """NeMo's model configuration: a .yaml, or a .nemo whose configuration alone is read."""
    overrides: dict[str, JsonValue] = Field(default_factory=dict)
    """Keys of that configuration to change, such as `decoder.n_layers: 6`."""


class MagpieTeacher(MagpieSettings):
    """A trained MagpieTTS checkpoint of NeMo's."""

    path: Path
    """The checkpoint: a .nemo, or a .ckpt of NeMo's training."""
    nemo: Path | None = None
    """NeMo's model configuration (.yaml) of a .ckpt; a .nemo holds its own."""
    audio_codec: Path | None = None
    """The audio codec's .nemo; null takes the file that the model's configuration names."""

    @property
    def weights(self) -> Path:
        """What a student that begins as its teacher reads."""
        return self.path

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path.suffix not in (".nemo", ".ckpt"):
            raise ValueError(
                f"path={self.path} is no MagpieTTS checkpoint: give a .nemo, or a .ckpt with its "
                "configuration"
            )
        if (self.path.suffix == ".ckpt") != (self.nemo is not None):
            raise ValueError(
                f"path={self.path} with nemo={self.nemo}: a .ckpt needs the .yaml of its model in "
                "nemo, and a .nemo holds its own"
            )
        return self


ModelConfig = Annotated[
    CodecLMConfig | MagpieConfig | CausalLMConfig, Field(discriminator="family")
]
PretrainedConfig = Annotated[MagpieTeacher | CausalLMTeacher, Field(discriminator="family")]
