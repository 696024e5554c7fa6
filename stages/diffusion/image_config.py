"""Settings of `prepare` for images.

Frozen records whose field docstrings are the help text. Nothing here imports torch, so that reading
a configuration stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.diffusion.model_config import require_quantizable
from stages.ranges import Positive, Share
from store.schema import QuantizationMethod, Record

TargetSource = Literal["teacher", "data", "prior"]
Size = tuple[Positive, Positive]


class DigitsConfig(Record):
    """The demo images: scikit-learn's 1,797 handwritten digits, 8×8, labelled 0 to 9."""

    seed: int = 0
    """Chooses the splits."""


class PixelsConfig(Record):
    """No autoencoder: the model works on the pixels themselves, scaled to [-1, 1]."""

    kind: Literal["pixels"] = "pixels"
    channels: Literal[1, 3] = 3
    """Grey or RGB."""


class PipelineEncoderConfig(Record):
    """Autoencoder and text encoders of a diffusers pipeline, loaded one after the other."""

    kind: Literal["pipeline"]
    path: Path
    """Local folder of the pipeline, or a single .safetensors checkpoint."""
    config: Path | None = None
    """Folder with the configuration files of a single-file checkpoint; a folder has its own."""
    posterior: Literal["sample", "mode"] = "sample"
    """Latents are drawn once from the autoencoder's posterior, by key, or are its mode."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Weights and arithmetic of the encoders."""
    quantization: dict[str, QuantizationMethod] = Field(default_factory=dict)
    """Component name, such as `text_encoder_2` → how its linear layers are held."""
    device: str = "auto"
    """Torch device that encodes; `auto` takes CUDA where it is present."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantization:
            require_quantizable("precision", self.precision, "quantization")
        return self


ImageEncoderConfig = Annotated[PixelsConfig | PipelineEncoderConfig, Field(discriminator="kind")]


class ImageBucketsConfig(Record):
    """Sizes that images are brought to; each image takes the one nearest to its aspect ratio."""

    sizes: Annotated[tuple[Size, ...], Field(min_length=1)]
    """(width, height) in pixels, multiples of what the autoencoder and the denoiser halve."""
    aspect_tolerance: float = Field(1.15, ge=1)
    """Reject an image whose aspect ratio is further than this factor from every bucket's."""
    largest_upscale: float = Field(1.25, ge=1)
    """Reject an image that would be enlarged by more than this factor to fill its bucket."""


class UnconditionalConfig(Record):
    """What stands for no condition: of texts; with labels it is the label after the last one."""

    kind: Literal["zeros", "empty", "negative"] = "empty"
    """Zeros, as SDXL's pipeline has it; the encoded empty text; or an encoded negative prompt."""
    text: str | None = None
    """The negative prompt."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "negative") != (self.text is not None):
            raise ValueError(
                f"kind={self.kind!r} with text={self.text!r}: give a text exactly for 'negative'"
            )
        return self


class ImagesConfig(Record):
    """From a folder of images with captions or labels to latents and encoded conditions."""

    source: Path | None = None
    """Folder with metadata.jsonl or metadata.csv: file_name, and text, texts or label."""
    digits: DigitsConfig | None = None
    """The demo images where there is no `source`."""
    classes: Positive | None = None
    """Number of labels, for sources that number them; null takes the largest label plus one."""
    encoder: ImageEncoderConfig = PixelsConfig()
    """What makes latents of images and conditions of captions."""
    buckets: ImageBucketsConfig
    """Sizes that images are brought to."""
    image_variations: Positive = 1
    """Draws of crop and flip per image."""
    text_variations: Positive = 1
    """Draws of caption and order of tags per image."""
    crop: Literal["center", "random"] = "center"
    """Where an image that is larger than its bucket is cut out."""
    flip: Share = 0.0
    """Probability that an image variation is mirrored."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated tags of a caption, in every text variation anew."""
    keep_tags: int = Field(0, ge=0)
    """First tags that stay in front."""
    unconditional: UnconditionalConfig = UnconditionalConfig()
    """What stands for no condition."""
    dev_images: int = Field(0, ge=0)
    """Images of the dev split."""
    test_images: int = Field(0, ge=0)
    """Images of the test split, whose conditions `evaluate` draws images for."""
    batch_size: Positive = 8
    """Images, or captions, that are encoded together."""
    seed: int = 0
    """Chooses splits, crops, flips, captions and posterior draws."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source is None) == (self.digits is None):
            raise ValueError(
                "give exactly one of source (a folder of images) and digits (the demo)"
            )
        return self
