"""A MagpieTTS model and its audio codec, small and of random weights, to try everything on.

    python -m stages.families.magpie_tiny FOLDER

writes codec.nemo and teacher.nemo into FOLDER. What they say is noise; every shape, file and code
path is that of the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from omegaconf import OmegaConf
from torch import Tensor, nn

from stages.families.nemo_archive import quiet

with quiet():
    from nemo.collections.tts.models import AudioCodecModel, MagpieTTSModel

CODEC_RATE_HZ = 22050
CODEC_FRAME_SAMPLES = 1024
CODEBOOKS = 4
LEVELS = (4, 4, 4)
"""Of the scalar quantiser: 64 codes per codebook, 72 with NeMo's special tokens."""
MODULES = "nemo.collections.tts.modules.audio_codec_modules"
LOSSES = "nemo.collections.tts.losses.audio_codec_loss"
LOGIT_SPREAD = 4.0
"""Standard deviation of the logits: those of fresh heads predict nearly uniform distributions."""


def codec_config(*, codebooks: int = CODEBOOKS, levels: Sequence[int] = LEVELS) -> dict[str, Any]:
    """NeMo's configuration of an audio codec of 21.5 frames per second.

    `levels` are those of the scalar quantiser, whose product is the codes of each codebook.
    """
    latent = codebooks * len(levels)
    rates = [4, 4, 8, 8]
    return {
        "sample_rate": CODEC_RATE_HZ,
        "samples_per_frame": CODEC_FRAME_SAMPLES,
        "audio_encoder": {
            "_target_": f"{MODULES}.HiFiGANEncoder",
            "encoded_dim": latent,
            "down_sample_rates": rates,
            "base_channels": 4,
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [1],
        },
        "vector_quantizer": {
            "_target_": f"{MODULES}.GroupFiniteScalarQuantizer",
            "num_groups": codebooks,
            "num_levels_per_group": list(levels),
        },
        "audio_decoder": {
            "_target_": f"{MODULES}.HiFiGANDecoder",
            "input_dim": latent,
            "up_sample_rates": rates[::-1],
            "base_channels": 64,
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [1],
        },
        "commit_loss_scale": 0.0,  # the quantiser has none
        "loss_resolutions": [[512, 128, 512]],
        "mel_loss_dims": [16],
        "generator_loss": {"_target_": f"{LOSSES}.GeneratorSquaredLoss"},
        "discriminator_loss": {"_target_": f"{LOSSES}.DiscriminatorSquaredLoss"},
    }


def model_config(
    codec: Path,
    *,
    width: int = 64,
    layers: int = 2,
    encoder_layers: int = 1,
    heads: int = 4,
    feed_forward: int = 128,
    cross_width: int = 32,
    local_width: int = 32,
    frame_stacking: int = 1,
    experts: int = 0,
    local_transformer: bool = True,
    dropout: float = 0.1,
    positions: int = 256,
) -> dict[str, Any]:
    """NeMo's configuration of a MagpieTTS model that speaks the codes of the codec's .nemo.

    `experts` 0 is the dense decoder; otherwise each position visits 2 of them. `positions` bounds
    context and timesteps together.
    """
    stack = {"d_model": width, "d_ffn": feed_forward, "sa_n_heads": heads, "p_dropout": dropout}
    learned = {
        "is_causal": True,
        "apply_norm_out": True,
        "use_learnable_pos_emb": True,
        "max_length_causal_mask": positions,
    }
    mixture = {"use_moe": True, "num_experts": experts, "top_k_experts": min(2, experts)}
    return {
        "model_type": "decoder_ce",
        "codecmodel_path": str(codec),
        "embedding_dim": width,
        "frame_stacking_factor": frame_stacking,
        "text_tokenizers": {
            "english_chars": {
                "_target_": "nemo.collections.common.tokenizers.text_to_speech."
                "tts_tokenizers.EnglishCharsTokenizer",
                "punct": True,
                "apostrophe": True,
                "pad_with_space": False,
            }
        },
        "text_conditioning_tokenizer_name": None,
        "use_text_conditioning_encoder": False,
        "context_duration_min": 5.0,
        "context_duration_max": 5.0,
        "prior_scaling_factor": None,
        "prior_end_step": 0,
        "prior_scaledown_start_step": 0,
        "cfg_unconditional_prob": 0.1,
        "local_transformer_type": "autoregressive" if local_transformer else "none",
        "local_transformer_n_layers": 1,
        "local_transformer_n_heads": 1,
        "local_transformer_hidden_dim": local_width,
        "encoder": {**stack, **learned, "n_layers": encoder_layers, "kernel_size": 3},
        "context_encoder": {**stack, **learned, "n_layers": 1, "kernel_size": 3},
        "decoder": {
            **stack,
            **learned,
            "n_layers": layers,
            "kernel_size": 1,
            "has_xattn": True,
            "xa_d_memory": width,
            "xa_n_heads": 1,
            "xa_d_head": cross_width,
            **(mixture if experts else {}),
        },
        **({"use_moe": True} if experts else {}),
        "router_load_balancing_loss_coeff": 0.01,
        "router_z_loss_coeff": 0.001,
        "train_ds": None,
        "validation_ds": None,
    }


def build_codec(path: Path, *, seed: int = 0, **shape: Any) -> Path:
    """Write an audio codec of random weights as a .nemo, and return its path.

    `shape` is that of `codec_config`.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        codec = AudioCodecModel(OmegaConf.create(codec_config(**shape)))
        enliven(codec)
        codec.save_to(str(path))
    return path


@torch.no_grad()
def enliven(codec: AudioCodecModel) -> None:
    """Let an encoder of random weights hear its input: as drawn, it gives one code for all."""
    for name, parameter in codec.audio_encoder.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    noise = 0.1 * torch.randn(1, CODEC_RATE_HZ)
    encoded, _ = codec.encode_audio(audio=noise, audio_len=torch.tensor([CODEC_RATE_HZ]))
    codec.audio_encoder.post_conv.conv.parametrizations.weight.original0.div_(encoded.std())


def build_model(
    path: Path, codec: Path, *, seed: int = 0, baked: Tensor | None = None, **shape: Any
) -> Path:
    """Write a MagpieTTS model of random weights as a .nemo, and return its path.

    `shape` is that of `model_config`. With `baked` [speakers, positions, width], these contexts
    take the place of the context encoder.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = MagpieTTSModel(OmegaConf.create(model_config(codec, **shape)))
        sharpen(model)
        if baked is not None:
            bake(model, baked)
        model.save_to(str(path))
    return path


@torch.no_grad()
def sharpen(model: MagpieTTSModel) -> None:
    """Let fresh heads tell ids apart, and let attention matter, to the conditions above all."""
    for name, weight in model.decoder.named_parameters():
        if "attention" in name and weight.dim() == 2:
            weight.mul_(6.0)
    heads = {model.final_proj: 1.0}
    if hasattr(model, "local_transformer"):
        noise = torch.randn(16, 1, model.cfg.embedding_dim, generator=torch.Generator())
        inputs = model.local_transformer_in_projection(noise)
        states = model.local_transformer(inputs, torch.ones(16, 1))["output"]
        heads |= dict.fromkeys(model.local_transformer_out_projections, float(states.std()))
    for head, size in heads.items():
        head.weight.mul_(LOGIT_SPREAD / (head.weight.std() * size * head.in_features**0.5))
        nn.init.normal_(head.bias, std=0.5)


def bake(model: MagpieTTSModel, contexts: Tensor) -> None:
    """Give a model baked contexts [speakers, positions, width], each one position shorter."""
    speakers, positions, width = contexts.shape
    model.baked_context_embedding = nn.Embedding(speakers, positions * width)
    model.baked_context_embedding.weight.data = contexts.flatten(1)
    model._baked_embedding_T = torch.tensor(positions)
    model._baked_embedding_D = torch.tensor(width)
    model.baked_context_embedding_len = positions - torch.arange(speakers)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder that the two .nemo are written into.")],
    experts: Annotated[int, typer.Option(help="Experts of the decoder; 0 for none.")] = 0,
    frame_stacking: Annotated[int, typer.Option(help="Codec frames per decoding step.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write codec.nemo and teacher.nemo, small and of random weights, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    codec = build_codec(folder / "codec.nemo", seed=seed)
    build_model(
        folder / "teacher.nemo", codec, seed=seed, experts=experts, frame_stacking=frame_stacking
    )


if __name__ == "__main__":
    typer.run(main)
