"""What a diffusion model must know of its dataset, and what a store says of its recording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, JsonValue, ValidationError

from stages.diffusion.model_config import PredictionType
from stages.diffusion.record_config import Contrast, Rows
from stages.errors import UserError
from store.schema import Column, Manifest, Record

Facts = TypeVar("Facts", bound=Record)
MOST_FAULTS = 5
"""Faults of a manifest that a message names."""

NOISE = "philox4x64-boxmuller-f32"
"""Name of the generator of noise (`stages.diffusion.noise`)."""

SIZES = "time_ids"
"""Tensor of the table `latents` that a network is told beside the condition."""

OK, REPEATED, FAILED, END, NOT_ASKED = range(5)
"""Status of a row: predicted; predicted in float32, as it was not finite before; not finite, zeros
are stored; end of a trajectory, where nothing is predicted; of a sample that is its own target."""

COLUMNS = (
    Column(name="t", dtype="float64"),
    Column(name="alpha", dtype="float64"),
    Column(name="sigma", dtype="float64"),
    Column(name="x_t_crc", dtype="uint32"),
    Column(name="x_t_sum", dtype="float64"),
    Column(name="target_crc", dtype="uint32"),
    Column(name="status", dtype="uint8"),
)
NOISE_COLUMN = Column(name="noise", dtype="float16", latent=True)
STATE_COLUMN = Column(name="x_t", dtype="float16", latent=True)


class ConditionFacts(Record):
    """One tensor of an encoded condition, such as `prompt_embeds`."""

    dtype: str
    """Its type in the table `conditions`, a numpy name; `int64` for labels."""
    shape: tuple[int, ...]
    """Its shape; () for a label."""


class ImageFacts(Record):
    """What a model must know of a dataset of images before it can be built."""

    encoder: str
    """Fingerprint of the autoencoder and the text encoders; `pixels` without any."""
    latent_channels: int = Field(ge=1)
    """Channels of a latent."""
    downsample: int = Field(ge=1)
    """Pixels of a side per element of a latent."""
    scaling: float
    """Factor from the autoencoder's latents to the model's, after the shift; 1 for pixels."""
    shift: float = 0.0
    """What is subtracted from the autoencoder's latents first."""
    buckets: tuple[tuple[int, int, int], ...]
    """[channels, height, width] of the latents of every bucket, in the order of its settings."""
    conditions: dict[str, ConditionFacts]
    """Tensors of an encoded condition by name; none of an unconditional dataset."""
    unconditional: Literal["none", "label", "zeros", "empty", "negative"]
    """What stands for no condition, as row 0 of the table `conditions`; `none`: there is no row."""
    unconditional_text: str | None = None
    """The negative prompt."""
    classes: tuple[str, ...] = ()
    """Names of the labels in id order; the id after the last one is no label."""

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Read what a manifest holds; raises `UserError` where that is of no images."""
        return _read(cls, manifest.conditioning, "conditioning")


MATCHED = {
    "encoder": "autoencoder and text encoders",
    "latent_channels": "latent channels",
    "downsample": "pixels per latent",
    "scaling": "scaling of latents",
    "shift": "shift of latents",
    "conditions": "encoded conditions",
    "unconditional": "convention for no condition",
    "unconditional_text": "negative prompt",
    "classes": "classes",
}
"""Fields of `ImageFacts` in words, that models of one image must have alike."""


class ScheduleFacts(Record):
    """A noise schedule: everything that turns a time into alpha and sigma."""

    kind: Literal["ddpm", "flow"]
    """`ddpm`: alpha² + sigma² = 1, by the table; `flow`: alpha + sigma = 1."""
    prediction: PredictionType
    """What the model predicts."""
    train_timesteps: int = Field(1000, ge=1)
    """The time that a model is told runs from 0, clean, to this."""
    alphas_cumprod: tuple[float, ...] = ()
    """Of `ddpm`: alpha² of the steps 0 to train_timesteps − 1, falling."""
    shift: float = Field(1.0, gt=0)
    """Of `flow`: shift towards noise of what is drawn and solved at, s·u / (1 + (s − 1)·u)."""
    scheduler: dict[str, JsonValue] = Field(default_factory=dict)
    """The scheduler's own configuration, where it came with one."""


class Recording(Record):
    """What a store of a diffusion model says of how its rows were made (`Manifest.recording`)."""

    kind: Literal["diffusion"] = "diffusion"
    schedule: ScheduleFacts
    """The teacher's."""
    rows: Rows
    """Where the model was asked."""
    contrast: Contrast
    """What the delta is to; paths of other models are left out, and their fingerprints here."""
    contrast_fingerprint: str = ""
    """The other model's; empty where there is none, as the teacher's is that of its adapter too."""
    embedded_guidance: float | None = None
    """Guidance number that the teacher was told."""
    noise: str = NOISE
    """Generator of noise."""
    precision: str
    """Type of the teacher's arithmetic."""
    versions: dict[str, str]
    """Of torch and diffusers."""

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Read what a manifest holds; raises `UserError` where that is no such recording."""
        return _read(cls, manifest.recording, "recording")


def _read(kind: type[Facts], content: Mapping[str, Any], field: str) -> Facts:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, (field, *fault['loc'])))}: {fault['msg']}"
            for fault in error.errors()[:MOST_FAULTS]
        )
        raise UserError(
            f"the store is not one that this release recorded of a diffusion model (manifest.json, "
            f"{faults}): read it with the release that wrote it, or record again"
        ) from None
