"""SNAC audio codecs, read from a folder: codes of several rates, and sound again.

A codec frame is what one code of the slowest level spans. Its codes are laid out by when they
begin, those that begin together from coarse to fine: for levels of rates 1 : 2 : 4 it has the
7 codes L0[i], L1[2i], L2[4i], L2[4i+1], L1[2i+1], L2[4i+2], L2[4i+3], which is Orpheus' order.
`SnacSettings.order` maps both ways.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.audio_codec import HEADER, check_codes
from stages.errors import UserError
from stages.families.exact_convolutions import exact_convolutions
from stages.families.weights import load_tensors
from stages.ranges import Positive
from stages.slot_layout import FrameSlots
from store.schema import Record

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script`")
    from snac import SNAC

CONFIG, SAFE_WEIGHTS, PUBLISHED_WEIGHTS = "config.json", "model.safetensors", "pytorch_model.bin"

HEAD_WIDTH = 64
"""Features of an attention head, which the package does not let a configuration change."""

Rates = Annotated[tuple[Positive, ...], Field(min_length=1)]


class SnacSettings(Record):
    """config.json of a SNAC model: the arguments that its package builds it with."""

    sampling_rate: Positive = 44100
    """Rate of the audio, in Hz."""
    encoder_dim: Positive = 64
    """Channels of the first convolution."""
    encoder_rates: Rates = (3, 3, 7, 7)
    """Factors by which the encoder slows down."""
    latent_dim: Positive | None = None
    """Channels of the quantised signal; null, or `encoder_dim` doubled for every rate."""
    decoder_dim: Positive = 1536
    """Channels that the decoder begins with."""
    decoder_rates: Rates = (7, 7, 3, 3)
    """Factors by which the decoder speeds up."""
    attn_window_size: Positive | None = 32
    """Finest steps that attend to each other; null has no attention."""
    codebook_size: Annotated[int, Field(ge=2, le=65536)] = 4096
    """Entries of each codebook."""
    codebook_dim: Positive = 8
    """Features of an entry."""
    vq_strides: Rates = (8, 4, 2, 1)
    """Finest steps that a code of each level spans, the longest first."""
    noise: bool = True
    """Whether the decoder adds noise, shaped by what it decodes."""
    depthwise: bool = True
    """Whether convolutions keep channels apart."""

    @property
    def step_samples(self) -> int:
        """Samples that a finest step spans."""
        return math.prod(self.encoder_rates)

    @property
    def frame_samples(self) -> int:
        """Samples that a codec frame spans."""
        return self.step_samples * self.vq_strides[0]

    @property
    def frame_rate_hz(self) -> float:
        """Codec frames per second of audio."""
        return self.sampling_rate / self.frame_samples

    @property
    def window_frames(self) -> int:
        """The least number of codec frames whose steps fill whole windows of attention."""
        steps = self.vq_strides[0]
        return math.lcm(steps, self.attn_window_size or 1) // steps

    @cached_property
    def order(self) -> FrameSlots:
        """The order of a frame's codes."""
        return FrameSlots.by_time(self.vq_strides)

    @model_validator(mode="after")
    def _check(self) -> Self:
        longest = self.vq_strides[0]
        if any(longest % stride or stride > longest for stride in self.vq_strides):
            raise ValueError(
                f"vq_strides={list(self.vq_strides)} must divide the first, so that a frame is one "
                "code of the first level"
            )
        if math.prod(self.decoder_rates) != self.step_samples:
            raise ValueError(
                f"decoder_rates={list(self.decoder_rates)} do not undo "
                f"encoder_rates={list(self.encoder_rates)}: their products differ"
            )
        encoded = self.encoder_dim * 2 ** len(self.encoder_rates)
        if self.latent_dim not in (None, encoded):
            raise ValueError(f"latent_dim={self.latent_dim} is not what the encoder has: {encoded}")
        if self.attn_window_size and (encoded % HEAD_WIDTH or self.decoder_dim % HEAD_WIDTH):
            raise ValueError(
                f"attention over {encoded} and {self.decoder_dim} channels needs multiples of "
                f"{HEAD_WIDTH}: correct encoder_dim or decoder_dim, or set attn_window_size to null"
            )
        if self.decoder_dim % 2 ** len(self.decoder_rates):
            raise ValueError(
                f"decoder_dim={self.decoder_dim} cannot be halved {len(self.decoder_rates)} times"
            )
        return self


def describe(folder: Path) -> SnacSettings:
    """Tell what a folder holds from its configuration alone: nothing is built, no weights are read.

    Raises UserError when config.json is missing or is no SNAC's.
    """
    path = folder / CONFIG
    try:
        return SnacSettings.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"no SNAC can be read from {folder}: {error}; give the folder of a published model, "
            f"with {CONFIG} and {PUBLISHED_WEIGHTS}"
        ) from error
    except ValidationError as error:
        raise UserError(f"{path} is no configuration of a SNAC: {error}") from error


class SnacCodec:
    """An `AudioCodec` over the package snac.

    Clips are encoded one by one. Convolutions see zeros beyond the end of a clip but not what
    padding becomes a layer later, so in a longer batch the last codes would change; on no device
    does a convolution promise the same last bit for another batch size; and on a CPU a batch was
    measured to take longer, not less.
    """

    def __init__(self, settings: SnacSettings, model: nn.Module, device: torch.device):
        """Use `open`, which checks what it reads. The model is on the CPU still."""
        self.settings, self.device = settings, device
        self.sample_rate_hz = self.output_sample_rate_hz = settings.sampling_rate
        self.frame_rate_hz = settings.frame_rate_hz
        self.order = settings.order
        self.slots = settings.order.slots if len(set(settings.vq_strides)) > 1 else ()
        self.codebooks = len(settings.order.slots)
        self.codes_per_codebook = settings.codebook_size
        self._fingerprint = _fingerprint(settings, model.state_dict())
        self.model: Any = model.to(device)

    @classmethod
    def open(cls, folder: Path, device: str | torch.device = "cpu") -> SnacCodec:
        """Build the model of a folder on a device.

        Raises UserError when a file is missing or damaged, or when weights do not fit.
        """
        settings = describe(folder)
        with torch.random.fork_rng(devices=[]):
            model = SNAC(**settings.model_dump())
        _load_weights(model, folder)
        model.eval().requires_grad_(requires_grad=False)
        return cls(settings, model, torch.device(device))

    @classmethod
    def load(cls, folder: Path) -> SnacCodec:
        """Load what `save` wrote; raises UserError when its files are missing or damaged."""
        return cls.open(folder)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[Tensor]) -> list[np.ndarray]:
        """Waveforms [samples] float32 → codes [F, C] uint16, F = samples / frame, rounded up."""
        with exact_convolutions():
            return [self._encode(waveform) for waveform in waveforms]

    def _encode(self, waveform: Tensor) -> np.ndarray:
        frames = -(-len(waveform) // self.settings.frame_samples)
        if frames == 0:
            return np.zeros((0, self.codebooks), np.uint16)
        # The model itself pads to whole windows of attention, which may be many frames.
        levels = self.model.encode(waveform[None, None].to(self.device))
        codes = self.order.interleave([level[0] for level in levels])[:frames]
        return codes.cpu().numpy().astype(np.uint16)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> Tensor:
        """Codes [F, C] → waveform [samples] float32; the same every time.

        Raises ValueError when a code is no entry of a codebook.
        """
        check_codes(codes, self.codebooks, self.codes_per_codebook)
        if len(codes) == 0:
            return torch.zeros(0)
        missing = -len(codes) % self.settings.window_frames
        padded = np.concatenate([codes, np.repeat(codes[-1:], missing, axis=0)])
        levels = self.order.separate(torch.from_numpy(padded.astype(np.int64)))
        on_cuda = [self.device] if self.device.type == "cuda" else []
        with exact_convolutions(), torch.random.fork_rng(devices=on_cuda):
            torch.manual_seed(0)  # the decoder adds noise
            audio = self.model.decode([level[None].to(self.device) for level in levels])
        waveform: Tensor = audio[0, 0, : len(codes) * self.settings.frame_samples].float().cpu()
        return waveform

    @torch.inference_mode()
    def code_vectors(self) -> Tensor:
        """[C, V, D] float32: what each code adds to the quantised frame, centred.

        A frame's finest steps lie end to end, each in coordinates of what all codebooks span
        together, which keep distances: 96 numbers, not 3,072, for the 24 kHz model. The frame of
        codes [C] is the sum of their vectors, and what all frames share.
        """
        levels = self.model.quantizer.quantizers
        projections = [level.out_proj.weight[..., 0].double().cpu() for level in levels]
        _, triangle = torch.linalg.qr(torch.cat(projections, dim=1))
        coordinates = triangle.split([each.shape[1] for each in projections], dim=1)
        steps, width = self.settings.vq_strides[0], len(triangle)
        vectors = torch.zeros(self.codebooks, self.codes_per_codebook, steps, width)
        for slot, (level, place) in enumerate(self.order.slots):
            entries = levels[level].codebook.weight.double().cpu() @ coordinates[level].T
            stride = self.settings.vq_strides[level]
            centred = (entries - entries.mean(dim=0)).float()
            vectors[slot, :, place * stride : (place + 1) * stride] = centred[:, None]
        return vectors.flatten(2)

    def fingerprint(self) -> str:
        """Hexadecimal sha256 of the settings and of every weight, in whatever file they came."""
        return self._fingerprint

    def save(self, path: Path) -> None:
        """Write `audio_codec.json`, and the model as `open` reads it, into a folder."""
        path.mkdir(parents=True, exist_ok=True)
        weights = {name: t.cpu().contiguous() for name, t in self.model.state_dict().items()}
        save_file(weights, path / SAFE_WEIGHTS)
        settings = self.settings.model_dump_json(indent=1)
        (path / CONFIG).write_text(settings + "\n", encoding="utf-8")
        header = {"kind": "snac", "fingerprint": self.fingerprint()}
        (path / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def _fingerprint(settings: SnacSettings, weights: dict[str, Tensor]) -> str:
    # Whether a file spells out what follows from its other settings makes no difference.
    digest = hashlib.sha256(settings.model_dump_json(exclude={"latent_dim"}).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights of a folder, all of them; raises UserError naming what does not fit."""
    path, weights = _read_weights(folder)
    try:
        found = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {folder / CONFIG}: {error}") from error
    for names, fault in ((found.missing_keys, "lacks"), (found.unexpected_keys, "has unknown")):
        if names:
            raise UserError(
                f"{path} {fault} {len(names)} weights, such as {names[0]}: it does not fit "
                f"{folder / CONFIG}; get both files again"
            )


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Weights by their names and the file they are from: safetensors where there are both."""
    safe, published = folder / SAFE_WEIGHTS, folder / PUBLISHED_WEIGHTS
    if not safe.exists():
        return published, load_tensors(published, str(published))
    try:
        return safe, load_file(safe)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights in {safe} are damaged ({error}); get it again") from error
