"""Pipelines of diffusers', small and of random weights, to try everything on.

    python -m stages.families.diffusion_tiny sdxl FOLDER

writes a whole pipeline into FOLDER: denoiser, scheduler, and where its like has them autoencoder,
tokenizers and text encoders. Its tokenizers read letters; nothing is downloaded.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from stages.errors import UserError
from stages.families.diffusion_library import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    quiet,
)
from stages.silence import silenced

with silenced():
    from diffusers import (
        DDIMScheduler,
        DDPMPipeline,
        DDPMScheduler,
        DiTPipeline,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )

TinyKind = Literal["sd15", "sdxl", "sd3", "flux", "ddpm", "dit"]
"""Stable Diffusion 1.5, XL and 3, Flux, and what has no text: pixels, and labels."""
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
TOKENS = 77
"""Longest text of CLIP, in tokens."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Of Stable Diffusion."""
CLASSES = 10
"""Labels of `dit`."""


def clip_tokenizer() -> CLIPTokenizer:
    """A tokenizer of CLIP's whose words are letters."""
    letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    names = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that pads and ends as T5's does, and whose words are letters."""
    names = ["<pad>", "</s>", "<unk>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=512,
    )  # fmt: skip


def _clip(class_: Any, tokenizer: CLIPTokenizer, width: int) -> Any:
    return class_(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=37,
            num_hidden_layers=3, num_attention_heads=4, projection_dim=width, hidden_act="gelu",
            max_position_embeddings=TOKENS, pad_token_id=1, bos_token_id=len(tokenizer) - 2,
            eos_token_id=len(tokenizer) - 1,
        )
    )  # fmt: skip


def _t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4,
            pad_token_id=0, eos_token_id=1, use_cache=False,
        )
    )  # fmt: skip


def _autoencoder(channels: int, **settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(16, 16),
        norm_num_groups=8, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **settings,
    )  # fmt: skip


def _text_unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **settings,
    )  # fmt: skip


def _sd15() -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_autoencoder(4),
        text_encoder=_clip(CLIPTextModel, tokenizer, 32),
        tokenizer=tokenizer,
        unet=_text_unet(cross_attention_dim=32, attention_head_dim=4),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_autoencoder(4, scaling_factor=0.13025),
        text_encoder=_clip(CLIPTextModel, tokenizer, 32),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer, 32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_text_unet(
            cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True,
            transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )  # fmt: skip


def _sd3() -> StableDiffusion3Pipeline:
    tokenizer, long = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
            joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(4, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_clip(CLIPTextModelWithProjection, tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer, 16),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(long),
        tokenizer_3=long,
    )  # fmt: skip


def _flux() -> FluxPipeline:
    tokenizer, long = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=_autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(CLIPTextModel, tokenizer, 32),
        tokenizer=tokenizer,
        text_encoder_2=_t5(long),
        tokenizer_2=long,
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
            guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        ),
    )  # fmt: skip


def _ddpm() -> DDPMPipeline:
    return DDPMPipeline(
        unet=UNet2DModel(
            sample_size=16, in_channels=3, out_channels=3, block_out_channels=(16, 32),
            layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=DDPMScheduler(),
    )  # fmt: skip


def _dit() -> DiTPipeline:
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            sample_size=8, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2,
            attention_head_dim=8, patch_size=2, num_embeds_ada_norm=CLASSES,
        ),
        vae=_autoencoder(4),
        scheduler=DDIMScheduler(clip_sample=False),
        id2label={number: f"class {number}" for number in range(CLASSES)},
    )  # fmt: skip


MAKERS: dict[str, Callable[[], Any]] = {
    "sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "ddpm": _ddpm, "dit": _dit,
}  # fmt: skip


def tiny_pipeline(kind: TinyKind, *, seed: int = 0) -> Any:
    """Build a pipeline of random weights, float32 on the CPU."""
    if kind not in MAKERS:
        raise UserError(f"kind {kind!r} of tiny pipeline: take one of {get_args(TinyKind)}")
    with torch.random.fork_rng(devices=[]), silenced():
        torch.manual_seed(seed)
        pipeline = MAKERS[kind]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny(kind: TinyKind, folder: Path, *, seed: int = 0) -> Any:
    """Write a pipeline of random weights into a folder, and return it."""
    pipeline = tiny_pipeline(kind, seed=seed)
    with quiet():
        pipeline.save_pretrained(folder)
    return pipeline


def main(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(MAKERS)}.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write into; it is made if need be.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a small pipeline of random weights into FOLDER."""
    try:
        pipeline = save_tiny(kind, folder, seed=seed)  # type: ignore[arg-type] # checked there
    except UserError as error:
        raise typer.BadParameter(str(error)) from None
    parts = ", ".join(name for name, part in pipeline.components.items() if part is not None)
    typer.echo(f"{folder}: a {type(pipeline).__name__} of {parts}")


if __name__ == "__main__":
    typer.run(main)
