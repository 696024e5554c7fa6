"""What is used of diffusers, and how what it raises of files is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stages.errors import UserError
from stages.silence import silenced

with silenced():
    import diffusers
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        DiffusionPipeline,
        DiTTransformer2DModel,
        FluxPipeline,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
        UNet2DModel,
    )
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from diffusers.models.embeddings import LabelEmbedding
    from peft import LoraConfig as PeftLoraConfig
    from peft.tuners.lora import LoraLayer
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_talk

__all__ = [
    "AutoencoderKL",
    "DDPMScheduler",
    "DiTTransformer2DModel",
    "DiffusionPipeline",
    "FluxPipeline",
    "FluxTransformer2DModel",
    "LabelEmbedding",
    "LoraLayer",
    "PeftLoraConfig",
    "SD3Transformer2DModel",
    "StableDiffusion3Pipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "UNet2DConditionModel",
    "UNet2DModel",
    "diffusers",
    "get_peft_model_state_dict",
    "quiet",
    "reading",
    "set_peft_model_state_dict",
]

UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, OSError,
    RuntimeError, SafetensorError, SingleFileComponentError, TypeError, ValueError,
)  # fmt: skip
"""What diffusers raises of files that do not say what it expects."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of both packages off the screen, where ours are."""
    talks = (transformers_talk, diffusers.utils.logging)
    bars = [talk.is_progress_bar_enabled() for talk in talks]
    for talk in talks:
        talk.disable_progress_bar()
    try:
        with silenced():
            yield
    finally:
        for talk, shown in zip(talks, bars, strict=True):
            if shown:
                talk.enable_progress_bar()


@contextmanager
def reading(path: object, advice: str) -> Iterator[None]:
    """Turn whatever diffusers raises of a model's files into a UserError of one line."""
    try:
        with quiet():
            yield
    except UNREADABLE as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read: {told}; {advice}") from error
