"""NeMo's audio codecs, read from a .nemo: codes that a MagpieTTS model speaks, and sound again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from stages.audio_codec import HEADER, check_codes
from stages.errors import UserError
from stages.families.exact_convolutions import exact_convolutions
from stages.families.nemo_archive import (
    REFUSALS,
    archive_fingerprint,
    check_class,
    quiet,
    read_config,
    read_weights,
    tensors_only,
)
from stages.ranges import Positive
from store.schema import Record

with quiet():
    from nemo.collections.tts.models import AudioCodecModel
    from nemo.core.classes.common import safe_instantiate
    from nemo.utils import model_utils

AUDIO_CODEC_CLASSES = (
    "nemo.collections.tts.models.audio_codec.AudioCodecModel",
    "nemo.collections.tts.models.AudioCodecModel",
)
"""What a configuration's `target` may be."""

ARCHIVE = "codec.nemo"
"""Its name in the folder of a dataset's audio codec."""

KEPT = (
    "sample_rate", "output_sample_rate", "samples_per_frame", "audio_encoder", "vector_quantizer",
    "audio_decoder",
)  # fmt: skip
"""Settings that encoding and decoding depend on."""

LOSSES = "nemo.collections.tts.losses.audio_codec_loss"
NO_TRAINING = {
    "loss_resolutions": [],
    "mel_loss_dims": [],
    "commit_loss_scale": 0.0,
    "generator_loss": {"_target_": f"{LOSSES}.GeneratorSquaredLoss"},
    "discriminator_loss": {"_target_": f"{LOSSES}.DiscriminatorSquaredLoss"},
}
"""Settings that NeMo insists on, such that no discriminator or judge is built or downloaded."""

LEAST_FRAMES = 4
"""Frames that convolutions which mirror the ends need; MagpieTTS pads to as many."""


class NemoCodecFacts(Record):
    """What an archive's configuration says of an audio codec."""

    sample_rate_hz: Positive
    """Rate of the audio that is encoded."""
    output_sample_rate_hz: Positive
    """Rate of the audio that is decoded."""
    frame_samples: Positive
    """Samples at the encoded rate that one codec frame holds."""
    codebooks: Positive
    """Codebooks of each frame."""
    codes_per_codebook: Positive
    """Entries of each codebook, special tokens left out."""

    @property
    def frame_rate_hz(self) -> float:
        """Codec frames per second of audio."""
        return self.sample_rate_hz / self.frame_samples


def describe(path: Path) -> NemoCodecFacts:
    """Tell what a .nemo holds from its configuration alone: no encoder, no decoder, no weights.

    Raises UserError when the archive cannot be read or is no audio codec with a quantiser.
    """
    config = _audio_codec_config(path)
    with _building(path):
        quantiser = safe_instantiate(config.vector_quantizer)
        return NemoCodecFacts(
            sample_rate_hz=config.sample_rate,
            output_sample_rate_hz=config.get("output_sample_rate", config.sample_rate),
            frame_samples=config.samples_per_frame,
            codebooks=quantiser.num_codebooks,
            codes_per_codebook=quantiser.codebook_size,
        )


class NemoCodec:
    """An `AudioCodec` over NeMo's AudioCodecModel.

    Clips are encoded one by one. Encoders that mirror the end of their input see something else
    where a longer clip of a batch lets padding follow; and on no device does a convolution promise
    the same last bit for another batch size, where one bit can turn a code.
    """

    slots: tuple[tuple[int, int], ...] = ()

    def __init__(self, path: Path, facts: NemoCodecFacts, model: Any, device: torch.device):
        """Use `open`, which checks what it reads."""
        self.path, self.facts, self.model, self.device = path, facts, model, device
        self.sample_rate_hz = facts.sample_rate_hz
        self.output_sample_rate_hz = facts.output_sample_rate_hz
        self.frame_rate_hz = facts.frame_rate_hz
        self.codebooks = facts.codebooks
        self.codes_per_codebook = facts.codes_per_codebook
        self._fingerprint = archive_fingerprint(path)

    @classmethod
    def open(cls, path: Path, device: str | torch.device = "cpu") -> NemoCodec:
        """Build the model of a .nemo on a device.

        Raises UserError when the archive cannot be read, is another model, or lacks weights.
        """
        facts = describe(path)
        config = _trimmed(_audio_codec_config(path), path)
        with _building(path), torch.random.fork_rng(devices=[]):
            model = AudioCodecModel(cfg=config)
        _load_weights(model, path)
        model.eval().requires_grad_(requires_grad=False)
        return cls(path, facts, model.to(device), torch.device(device))

    @classmethod
    def load(cls, folder: Path) -> NemoCodec:
        """Load what `save` wrote; raises UserError when its files are missing or damaged."""
        return cls.open(folder / ARCHIVE)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[Tensor]) -> list[np.ndarray]:
        """Waveforms [samples] float32 → codes [F, C] uint16, F = samples / frame, rounded up."""
        with quiet(), exact_convolutions():
            return [self._encode(waveform) for waveform in waveforms]

    def _encode(self, waveform: Tensor) -> np.ndarray:
        frame_samples = self.facts.frame_samples
        frames = -(-len(waveform) // frame_samples)
        missing = max(frames, LEAST_FRAMES) * frame_samples - len(waveform)
        audio = nn.functional.pad(waveform, (0, missing))[None].to(self.device)
        length = torch.tensor([audio.shape[1]], device=self.device)
        tokens, _ = self.model.encode(audio=audio, audio_len=length)
        codes: np.ndarray = tokens[0, :, :frames].T.cpu().numpy().astype(np.uint16)
        return codes

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> Tensor:
        """Codes [F, C] → waveform [samples] float32 at `output_sample_rate_hz`.

        Raises ValueError when a code is no entry of a codebook.
        """
        check_codes(codes, self.codebooks, self.codes_per_codebook)
        frames = len(codes)
        if frames == 0:
            return torch.zeros(0)
        padding = np.repeat(codes[-1:], max(0, LEAST_FRAMES - frames), axis=0)
        tokens = torch.from_numpy(np.concatenate([codes, padding]).astype(np.int64).T)[None]
        length = torch.tensor([tokens.shape[2]], device=self.device)
        with quiet(), exact_convolutions():
            audio, _ = self.model.decode(tokens=tokens.to(self.device), tokens_len=length)
        samples = audio.shape[1] * frames // tokens.shape[2]
        waveform: Tensor = audio[0, :samples].float().cpu()
        return waveform

    @torch.inference_mode()
    def code_vectors(self) -> Tensor:
        """[C, V, D] float32: what each code adds to the dequantised frame, centred.

        Quantisers add up their codebooks, or give each its own features; those of the others are
        then 0. The frame of codes [C] is the sum of their vectors, and what all frames share.
        """
        entries, books = self.codes_per_codebook, self.codebooks
        tokens = torch.zeros(books, books, entries, dtype=torch.int64)
        tokens[range(books), range(books)] = torch.arange(entries)
        lengths = torch.full((books,), entries, device=self.device)
        with quiet():
            frames = self.model.dequantize(tokens=tokens.to(self.device), tokens_len=lengths)
        vectors: Tensor = (frames - frames.mean(dim=2, keepdim=True)).transpose(1, 2)
        return vectors.float().cpu().clone()

    def fingerprint(self) -> str:
        """Hexadecimal sha256 of the archive's files, however they are packed."""
        return self._fingerprint

    def save(self, path: Path) -> None:
        """Write `audio_codec.json`, and the archive as `codec.nemo`, into a folder."""
        path.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, path / ARCHIVE)
        header = {
            "kind": "nemo",
            "fingerprint": self.fingerprint(),
            "facts": self.facts.model_dump(),
        }
        (path / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def _audio_codec_config(path: Path) -> DictConfig:
    """Read the configuration of an audio codec; raises UserError when it is another model's."""
    config = read_config(path)
    check_class(path, config, "an audio codec", *AUDIO_CODEC_CLASSES)
    missing = [key for key in KEPT if key not in config and key != "output_sample_rate"]
    if missing:
        raise UserError(
            f"the configuration of {path} lacks {', '.join(missing)}: it is no audio codec that "
            "turns sound into codes and back"
        )
    # As NeMo does: settings of its older releases in the form of today's.
    updated: DictConfig = model_utils.maybe_update_config_version(config)
    return updated


def _trimmed(config: DictConfig, path: Path) -> DictConfig:
    """Leave out of a configuration what only training needs."""
    kept: dict[str, Any] = {key: config[key] for key in KEPT if key in config} | NO_TRAINING
    if config.get("semantic_codec"):
        kept["semantic_codec"] = _trimmed(config.semantic_codec, path)
    elif config.get("semantic_codec_path"):
        raise UserError(
            f"{path} takes half of its codes from {config.semantic_codec_path}, which is not in "
            "the archive: save the audio codec with NeMo, which packs both into one"
        )
    return OmegaConf.create(kept)


@contextmanager
def _building(path: Path) -> Iterator[None]:
    """Build something of an archive's configuration; raises UserError where NeMo refuses it."""
    try:
        with quiet(), tensors_only():
            yield
    except REFUSALS as error:
        raise UserError(
            f"no audio codec can be built from the configuration of {path}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load weights of an archive by torch's own rules: NeMo's overlook those that are missing."""
    try:
        found = nn.Module.load_state_dict(model, read_weights(path), strict=False)
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit its configuration: {error}") from error
    if found.missing_keys:
        raise UserError(
            f"{path} lacks {len(found.missing_keys)} weights of its audio codec, such as "
            f"{found.missing_keys[0]}: get the file again"
        )
