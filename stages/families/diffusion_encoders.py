"""Autoencoder and text encoders of diffusers' pipelines, called as the pipelines call them.

Each is loaded when it is needed and let go of with `free`; the denoiser never is.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from stages.diffusion.facts import ConditionFacts
from stages.errors import UserError
from stages.families.diffusion_library import (
    AutoencoderKL,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    quiet,
    reading,
)
from stages.families.diffusion_sources import (
    CONFIG_FILE,
    DTYPES,
    SCALING,
    read_json,
    require_there,
    safetensors_in,
)
from stages.quantization import quantize

SD3_TOKENS, FLUX_TOKENS = 256, 512
"""Longest text of T5 that the pipelines encode."""
BYTE_WEIGHTS = ("int4", "fp8")
"""Methods that keep weights as bytes, whose type T5 would take for that of its activations."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _TextSide:
    """How a pipeline makes conditions of captions."""

    pipeline: Any
    """Its class."""
    encoders: tuple[str, ...]
    """Its text encoders."""
    shapes: Callable[[PipelineEncoder], dict[str, tuple[int, ...]]]
    """Tensors that it makes of a caption."""
    encode: Callable[[Any, list[str], torch.device], dict[str, Tensor]]
    """Of (pipeline, captions, device): tensors [b, ...]."""


class PipelineEncoder:
    """Autoencoder and text encoders of a pipeline, or the autoencoder that was kept of one."""

    def __init__(
        self, path: Path, config: Path, device: torch.device, dtype: torch.dtype,
        quantization: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._path, self._folder, self._device, self._dtype = path, config, device, dtype
        self._quantization = dict(quantization)
        self._vae: Any = None
        self._texts: Any = None
        self._vae_config = _autoencoder_config(config)
        self._text_side = _text_side(config)
        self.downsample: int = 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        self.latent_channels: int = self._vae_config["latent_channels"]
        self.scaling: float = self._vae_config["scaling_factor"]
        self.shift: float = self._vae_config.get("shift_factor") or 0.0
        self._told_sizes = _told_sizes(config)

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
        """Look into a pipeline without loading weights; raises `UserError` for one that is none.

        A single file needs the folder of its configuration files in `config`. `quantization` names
        components, which are loaded in bfloat16 or float32, and how their linear layers are held.
        """
        require_there(path)
        if path.is_file() and (path.suffix != ".safetensors" or config is None):
            raise UserError(
                f"{path} with config={config}: a single file must be .safetensors (others are "
                "pickles, which run code), and needs the folder with its configuration files"
            )
        encoder = cls(
            path, config if path.is_file() and config else path, device, DTYPES[precision],
            quantization or {},
        )  # fmt: skip
        known = ("vae", *(encoder._text_side.encoders if encoder._text_side else ()))
        unknown = sorted(encoder._quantization.keys() - set(known))
        if unknown:
            raise UserError(
                f"encoder.quantization names {unknown}, which {path} does not have: its encoders "
                f"are {', '.join(known)}, and the denoiser is quantized by rollout.quantization"
            )
        return encoder

    def fingerprint(self) -> str:
        """Sha256 over configuration and weights of autoencoder and text encoders."""
        digest = hashlib.sha256()
        folders = [f for n in ("vae", "text_encoder*", "tokenizer*") for f in self._folder.glob(n)]
        files = [f for folder in folders for f in folder.rglob("*") if f.suffix in HASHED]
        for file in sorted(files) + ([self._path] if self._path.is_file() else []):
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            name = file.name if file == self._path else file.relative_to(self._folder).as_posix()
            digest.update(f"{name} {found}\n".encode())
        return digest.hexdigest()

    @property
    def conditions(self) -> Mapping[str, ConditionFacts]:
        """Tensors that `encode_texts` gives; none of a pipeline without text encoders."""
        shapes = {} if self._text_side is None else self._text_side.shapes(self)
        return {n: ConditionFacts(dtype="float16", shape=shape) for n, shape in shapes.items()}

    def encode_texts(self, texts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Encode captions, each to tensors [...] in float16; loads the text encoders.

        What a caption overflows to is left for its reader to refuse. Raises `UserError` where the
        pipeline has none, or what they give has another shape than their configuration says.
        """
        if self._text_side is None:
            raise UserError(f"{self._path} has no text encoders: give its images labels, not texts")
        if self._texts is None:
            self._texts = self._load_texts(self._text_side)
        with torch.no_grad():
            encoded = self._text_side.encode(self._texts, list(texts), self._device)
        found = {name: x.half().cpu().numpy() for name, x in encoded.items()}
        for name, facts in self.conditions.items():
            if found[name].shape[1:] != facts.shape:
                raise UserError(
                    f"the text encoders of {self._path} made {name} of shape "
                    f"{found[name].shape[1:]}, but their configuration says {facts.shape}: the "
                    "folder holds parts of several pipelines; take one pipeline whole"
                )
        return [{name: array[i] for name, array in found.items()} for i in range(len(texts))]

    def zeros(self) -> dict[str, np.ndarray]:
        """Return the condition of no text that is all zeros, as SDXL's pipeline has it."""
        return {n: np.zeros(facts.shape, np.float16) for n, facts in self.conditions.items()}

    def sizes(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Return what the network is told of (height, width) and (top, left).

        That is `time_ids` [6] float32 of SDXL, and nothing of other models.
        """
        if not self._told_sizes:
            return {}
        return {"time_ids": np.array([*original, *crop, *target], np.float32)}

    def encode_images(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Encode images [b, 3, H, W] in [−1, 1] to the model's latents [b, c, h, w] float32.

        `noise` [b, c, h, w] draws from the posterior; None takes its mode. Loads the autoencoder.
        """
        vae = self._loaded_vae()
        with torch.no_grad():
            posterior = vae.encode(images.to(self._device, vae.dtype)).latent_dist
        latents: Tensor = posterior.mean.float()
        if noise is not None:
            latents = latents + posterior.std.float() * noise.to(latents)
        return (latents - self.shift) * self.scaling

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the model's latents to images [b, 3, H, W] in [−1, 1] float32."""
        vae = self._loaded_vae()
        own = latents.to(self._device, torch.float32) / self.scaling + self.shift
        with torch.no_grad():
            images: Tensor = vae.decode(own.to(vae.dtype), return_dict=False)[0]
        return images.float().clamp(-1, 1)

    def keep_decoder(self, folder: Path) -> None:
        """Copy the autoencoder alone into `folder`, which `open` opens for `decode`."""
        if not self._path.is_file():
            shutil.copytree(self._folder / "vae", folder / "vae")
            return
        with quiet():
            self._load_vae(torch.float32).save_pretrained(folder / "vae")

    def free(self) -> None:
        """Let go of what is loaded."""
        self._vae = self._texts = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def length(self, tokenizer: str) -> int:
        """Tokens of a caption, padded."""
        return self._number(tokenizer, "tokenizer_config.json", "model_max_length")

    def setting(self, encoder: str, name: str) -> int:
        """Number in the configuration of a text encoder."""
        return self._number(encoder, CONFIG_FILE, name)

    def _number(self, component: str, file: str, name: str) -> int:
        found = read_json(self._folder / component / file).get(name)
        if not isinstance(found, int):
            raise UserError(
                f"{self._folder / component / file} has {name}={found!r}, and a whole number is "
                "needed to know the size of an encoded caption: get the pipeline whole"
            )
        return found

    def _loaded_vae(self) -> Any:
        if self._vae is None:
            # In float16 those that say so overflow; the pipelines widen them too.
            overflows = self._vae_config.get("force_upcast", True) and self._dtype == torch.float16
            vae = self._load_vae(torch.float32 if overflows else self._dtype)
            self._vae = self._held(vae, "vae")
        return self._vae

    def _load_vae(self, dtype: torch.dtype) -> Any:
        with reading(self._path, "get it again"):
            if self._path.is_file():
                return AutoencoderKL.from_single_file(
                    str(self._path), config=str(self._folder), subfolder="vae",
                    local_files_only=True, dtype=dtype,
                )  # fmt: skip
            return AutoencoderKL.from_pretrained(
                self._folder / "vae", local_files_only=True, use_safetensors=True, dtype=dtype,
                variant=safetensors_in(self._folder / "vae").variant,
            )  # fmt: skip

    def _load_texts(self, side: _TextSide) -> Any:
        """Load the pipeline without what makes images of latents, and what makes latents."""
        others = {n: None for n in read_json(self._folder / "model_index.json") if n in NOT_TEXT}
        options: Any = {**others, "local_files_only": True, "dtype": self._dtype}
        with reading(self._path, "get it again, whole"):
            if self._path.is_file():
                found = side.pipeline.from_single_file(
                    str(self._path), config=str(self._folder), **options
                )
            else:
                files = [safetensors_in(self._folder / name) for name in side.encoders]
                found = side.pipeline.from_pretrained(
                    self._folder, use_safetensors=True, variant=files[0].variant, **options
                )
        for name in side.encoders:
            setattr(found, name, self._held(getattr(found, name), name))
        return found

    def _held(self, module: Any, component: str) -> Any:
        """Put a component on the device, quantized where that was asked for."""
        module.requires_grad_(False).eval()
        method = self._quantization.get(component)
        if method is None:
            return module.to(self._device)
        logger.info("quantizing %s of %s", component, self._path)
        keep = ("*.wo",) if method in BYTE_WEIGHTS else ()
        quantize(module, method, device=self._device, keep=keep)  # type: ignore[arg-type]
        return module


HASHED = (".json", ".txt", ".model", ".safetensors")
"""Ends of the names of files that say what encoders do."""
NOT_TEXT = (
    "unet", "transformer", "vae", "scheduler", "safety_checker", "feature_extractor",
    "image_encoder",
)  # fmt: skip
"""Components of pipelines that encode no captions."""


def _autoencoder_config(folder: Path) -> dict[str, Any]:
    file = folder / "vae" / CONFIG_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} has no autoencoder (vae/config.json): give the local folder of a pipeline "
            "with one, or encoder.kind 'pixels' for a model of pixels"
        )
    config = read_json(file)
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(
            f"{file} is a {config.get('_class_name')}: only AutoencoderKL is supported, that of "
            "Stable Diffusion 1 to 3, Flux and DiT"
        )
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise UserError(
            f"{file} scales every channel by its own latents_mean and latents_std, which is not "
            "supported: use an autoencoder with one scaling_factor"
        )
    return {"force_upcast": True, "scaling_factor": SCALING} | config


def _text_side(folder: Path) -> _TextSide | None:
    """How captions are encoded; None where nothing encodes them."""
    if not (folder / "model_index.json").is_file():
        return None
    index = read_json(folder / "model_index.json")
    if not any(name.startswith("text_encoder") for name in index):
        return None
    name = index.get("_class_name")
    if name not in TEXT_SIDES:
        raise UserError(
            f"{folder} is a {name}: captions are encoded as {', '.join(TEXT_SIDES)} do; give one "
            "of these"
        )
    side = TEXT_SIDES[name]
    missing = [encoder for encoder in side.encoders if not (folder / encoder).is_dir()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: give the pipeline whole, or with the "
            "configuration files of a single file"
        )
    return side


def _told_sizes(folder: Path) -> bool:
    file = folder / "unet" / CONFIG_FILE
    return file.is_file() and read_json(file).get("addition_embed_type") == "text_time"


def _sd(pipeline: Any, texts: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, _ = pipeline.encode_prompt(texts, device, 1, False)
    return {"prompt_embeds": embeds}


def _sdxl(pipeline: Any, texts: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts, device=device, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _sd3(pipeline: Any, texts: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, device=device, do_classifier_free_guidance=False,
        max_sequence_length=SD3_TOKENS,
    )  # fmt: skip
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _flux(pipeline: Any, texts: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, pooled, _ = pipeline.encode_prompt(
        texts, device=device, max_sequence_length=FLUX_TOKENS
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _sd_shapes(encoder: PipelineEncoder) -> dict[str, tuple[int, ...]]:
    width = encoder.setting("text_encoder", "hidden_size")
    return {"prompt_embeds": (encoder.length("tokenizer"), width)}


def _sdxl_shapes(encoder: PipelineEncoder) -> dict[str, tuple[int, ...]]:
    width = sum(encoder.setting(name, "hidden_size") for name in ("text_encoder", "text_encoder_2"))
    pooled = encoder.setting("text_encoder_2", "projection_dim")
    return {
        "prompt_embeds": (encoder.length("tokenizer"), width),
        "pooled_prompt_embeds": (pooled,),
    }


def _sd3_shapes(encoder: PipelineEncoder) -> dict[str, tuple[int, ...]]:
    names = ("text_encoder", "text_encoder_2")
    tokens = encoder.length("tokenizer") + SD3_TOKENS
    return {
        "prompt_embeds": (tokens, encoder.setting("text_encoder_3", "d_model")),
        "pooled_prompt_embeds": (sum(encoder.setting(n, "projection_dim") for n in names),),
    }


def _flux_shapes(encoder: PipelineEncoder) -> dict[str, tuple[int, ...]]:
    return {
        "prompt_embeds": (FLUX_TOKENS, encoder.setting("text_encoder_2", "d_model")),
        "pooled_prompt_embeds": (encoder.setting("text_encoder", "hidden_size"),),
    }


TEXT_SIDES: dict[str, _TextSide] = {
    "StableDiffusionPipeline": _TextSide(
        StableDiffusionPipeline, ("text_encoder",), _sd_shapes, _sd
    ),
    "StableDiffusionXLPipeline": _TextSide(
        StableDiffusionXLPipeline, ("text_encoder", "text_encoder_2"), _sdxl_shapes, _sdxl
    ),
    "StableDiffusion3Pipeline": _TextSide(
        StableDiffusion3Pipeline, ("text_encoder", "text_encoder_2", "text_encoder_3"),
        _sd3_shapes, _sd3,
    ),
    "FluxPipeline": _TextSide(
        FluxPipeline, ("text_encoder", "text_encoder_2"), _flux_shapes, _flux
    ),
}  # fmt: skip
"""Pipeline class → how it encodes captions."""
