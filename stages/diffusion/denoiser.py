"""What the family of diffusion models must be able to do: the only thing that knows a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from stages.architecture import Architecture
from stages.diffusion.facts import ConditionFacts, ImageFacts, ScheduleFacts
from stages.diffusion.model_config import DenoiserConfig, DiffusionTeacher

Conditions = Mapping[str, Tensor]
"""Encoded conditions [b, ...] by name, as in `ImageFacts.conditions`, and what a network is told of
sizes (`time_ids` [b, 6] of SDXL)."""


class Denoiser(Protocol):
    """A denoising network with its noise schedule.

    Teacher and student are the same class; `load` and `build` decide dtype and device once.
    """

    name: Literal["diffusion"]
    module: nn.Module
    """The bare network with its adapter, whose trained parameters require gradients."""
    network: nn.Module
    """What `predict` calls: the module, or its compiled or data-parallel form."""
    config: DenoiserConfig
    dtype: torch.dtype
    """Type that `predict` computes in; `full_precision` changes it for a moment."""
    facts: ImageFacts
    schedule: ScheduleFacts
    condition_dropout: float | None
    """Share of training images whose condition was dropped; None where nobody knows."""
    takes_scale: bool
    """Whether the network is told a guidance scale (`time_cond_proj_dim`, `guidance_embeds`)."""
    embedded_guidance: float | None
    """Guidance scale that a teacher with `takes_scale` is told where `predict` is given none."""
    full_precision: tuple[str, ...]
    """Patterns of the names of linear layers that are never quantized."""
    blocks: tuple[str, ...]
    """Patterns of the names of parts of `module` that a pass calls as modules, each whole."""

    @classmethod
    def build(
        cls,
        config: DenoiserConfig,
        facts: ImageFacts,
        *,
        seed: int,
        schedule: ScheduleFacts | None = None,
        weights: Path | None = None,
        weights_config: Path | None = None,
        device: str = "cpu",
    ) -> Self:
        """Build a denoiser that is to be trained on `device`.

        Its schedule is that of `config`, of its pipeline, or `schedule`, in this order. `weights`
        are a saved model's folder, a pipeline's or a single file's, copied into the network before
        its adapter is put on, quantized and moved; without them they are drawn from `seed`. Raises
        `UserError` where they are of another architecture, or of a pipeline whose latents are
        scaled otherwise, naming what differs; warns of weights that predict another type.
        """
        ...

    @classmethod
    def load(cls, path: Path, *, device: str, dtype: torch.dtype) -> Self:
        """Load what `save` wrote, its adapter on the base that config.json names."""
        ...

    @classmethod
    def pretrained(
        cls, config: DiffusionTeacher, facts: ImageFacts, *, device: str, dtype: torch.dtype
    ) -> Self:
        """Load the denoiser alone of a pipeline; `adapter_off` can switch off its adapter."""
        ...

    def save(self, path: Path) -> None:
        """Write config.json and then weights, as stock diffusers opens them.

        Of a whole network it is a folder to open as one; of an adapter it is a
        `pytorch_lora_weights.safetensors`, to load as a LoRA.
        """
        ...

    def architecture(self) -> Architecture:
        """Return how large the model is and what a forward pass costs."""
        ...

    def fingerprint(self) -> str:
        """Sha256 over configuration, schedule and weights, hexadecimal."""
        ...

    def predict(
        self, x: Tensor, t: Tensor, conditions: Conditions, scale: Tensor | None = None
    ) -> Tensor:
        """Predict [b, *shape], in the type of the model, of noised latents `x` [b, *shape].

        `t` [b] float64 is time on the scale of the schedule, 0 to train_timesteps (what the network
        itself wants of it is the family's business); `scale` [b] float32 the guidance scale that a
        network with `takes_scale` is told, None for 1 or the teacher's `embedded_guidance`.
        """
        ...

    def adapter_off(self) -> AbstractContextManager[None]:
        """Predict without the adapter inside the block; raises `UserError` where there is none."""
        ...


class ImageEncoder(Protocol):
    """Autoencoder and text encoders; each is loaded when it is needed and freed with `free`."""

    downsample: int
    latent_channels: int
    scaling: float
    shift: float

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        config: Path | None = None,
        device: torch.device,
        precision: str = "fp32",
        quantization: Mapping[str, str] | None = None,
    ) -> Self:
        """Look into a pipeline without loading weights; raises `UserError` for one that is none."""
        ...

    def fingerprint(self) -> str:
        """Sha256 over configuration and weights of autoencoder and text encoders."""
        ...

    @property
    def conditions(self) -> Mapping[str, ConditionFacts]:
        """Tensors that `encode_texts` gives."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Encode captions, each to tensors [...] in float16; loads the text encoders."""
        ...

    def zeros(self) -> dict[str, np.ndarray]:
        """Return the condition of no text that is all zeros."""
        ...

    def sizes(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Return what the network is told of (height, width) and (top, left).

        That is `time_ids` [6] float32 of SDXL, and nothing of other models.
        """
        ...

    def encode_images(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Encode images [b, 3, H, W] in [−1, 1] to the model's latents [b, c, h, w] float32.

        `noise` [b, c, h, w] draws from the posterior; None takes its mode. Loads the autoencoder.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the model's latents to images [b, 3, H, W] in [−1, 1] float32."""
        ...

    def keep_decoder(self, folder: Path) -> None:
        """Copy the autoencoder alone into `folder`, which `open` opens for `decode`."""
        ...

    def free(self) -> None:
        """Let go of what is loaded."""
        ...
