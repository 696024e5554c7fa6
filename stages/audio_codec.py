"""Audio as codes and back: the interface of audio codecs, and the project's own quantiser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchaudio.functional import griffinlim
from torchaudio.transforms import MelSpectrogram

from stages.errors import UserError
from stages.family import load_audio_codec_class
from stages.prepare_config import FitAudioCodecConfig
from stages.residual_kmeans import fit_codebooks, quantise
from stages.spectrum_decoder import SpectrumDecoder, dequantise, fit_decoder, new_decoder

BATCH_CLIPS = 32
"""Clips that are transformed together; it bounds memory."""

GRIFFIN_LIM_ROUNDS = 48
"""Rounds of phase retrieval; more are not heard."""


class AudioCodec(Protocol):
    """What the stages ask of an audio codec: C codes of V entries per frame, at a fixed rate."""

    sample_rate_hz: int
    """Rate of the audio that is encoded."""
    output_sample_rate_hz: int
    """Rate of the audio that is decoded; most audio codecs do not change it."""
    frame_rate_hz: float
    """Codec frames per second of audio."""
    codebooks: int
    codes_per_codebook: int
    slots: tuple[tuple[int, int], ...]
    """Per code of a frame (level, place), as `FrameSlots` has it; empty where all levels have one
    rate."""

    def encode(self, waveforms: Sequence[Tensor]) -> list[np.ndarray]:
        """Waveforms [samples] float32 at `sample_rate_hz` → codes [F, C] uint16, in order."""

    def decode(self, codes: np.ndarray) -> Tensor:
        """Codes [F, C] → waveform [samples] float32 at `output_sample_rate_hz`."""

    def code_vectors(self) -> Tensor:
        """[C, V, D] float32: what every code stands for; near codes sound alike."""

    def fingerprint(self) -> str:
        """Hexadecimal sha256 of all that encoding and decoding depend on."""

    def save(self, path: Path) -> None:
        """Write the audio codec into a folder."""


class ResidualMel:
    """Residual vector quantiser over log-mel spectra, a decoder to finer ones, and Griffin–Lim.

    A codec frame is `mels_per_frame` consecutive log-mel spectra laid end to end (D features).
    Codebook i holds the k-means centroids of what codebooks 0 … i-1 left over.
    Centred: frame f spans samples f·hop·mels_per_frame onward; the end is padded with silence.
    """

    slots: tuple[tuple[int, int], ...] = ()

    def __init__(
        self,
        config: FitAudioCodecConfig,
        mean: Tensor,
        codebooks: Tensor,
        decoder: SpectrumDecoder | None,
    ):
        """Take the mean [D] of the features, the codebooks [C, V, D] float32 and the decoder."""
        self.config, self.mean, self.centroids, self.decoder = config, mean, codebooks, decoder
        self.sample_rate_hz = self.output_sample_rate_hz = config.sample_rate_hz
        self.frame_samples = config.hop * config.mels_per_frame
        self.frame_rate_hz = config.sample_rate_hz / self.frame_samples
        self.codebooks, self.codes_per_codebook = config.codebooks, config.codes_per_codebook
        self.mel = _mel_spectrogram(config)

    def code_vectors(self) -> Tensor:
        """[C, V, D] float32: the centroids, as log-mel spectra laid end to end."""
        return self.centroids

    @classmethod
    def fit(cls, config: FitAudioCodecConfig, waveforms: Sequence[Tensor]) -> ResidualMel:
        """Learn the codebooks, then the decoder, from waveforms [samples] at the codec's rate.

        Raises UserError when there are fewer frames than entries of a codebook.
        """
        features = list(_features(config, _mel_spectrogram(config), waveforms))
        stacked = torch.cat(features)
        if len(stacked) < config.codes_per_codebook:
            raise UserError(
                f"the train split gives {len(stacked)} codec frames, fewer than "
                f"audio_codec.codes_per_codebook={config.codes_per_codebook}; add recordings or "
                "ask for fewer codes"
            )
        mean = stacked.mean(dim=0)
        codebooks = fit_codebooks(stacked - mean, config)
        if config.decoder is None:
            return cls(config, mean, codebooks, None)
        codes = [quantise(clip - mean, codebooks) for clip in features]
        return cls(config, mean, codebooks, fit_decoder(config, waveforms, codes, codebooks))

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[Tensor]) -> list[np.ndarray]:
        """Waveforms [samples] float32 → codes [F, C] uint16, F = samples / frame, rounded up."""
        features = _features(self.config, self.mel, waveforms)
        codes = (quantise(clip - self.mean, self.centroids) for clip in features)
        return [each.numpy().astype(np.uint16) for each in codes]

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> Tensor:
        """Codes [F, C] → waveform [F · frame] float32.

        Raises ValueError when a code is no entry of a codebook.
        """
        quantised = self._dequantise(codes)
        if self.decoder is None:
            mel = (self.mean + quantised).reshape(-1, self.config.mels).exp().T
            magnitudes = torch.linalg.pinv(self.mel.mel_scale.fb.T) @ mel
        else:
            magnitudes = self._sharpen(self.decoder(quantised[None])[0].T)
        return self._invert(magnitudes.clamp(min=1e-6), len(codes) * self.frame_samples)

    def _dequantise(self, codes: np.ndarray) -> Tensor:
        """Codes [F, C] → features [F, D], less their mean."""
        check_codes(codes, self.codebooks, self.codes_per_codebook)
        return dequantise(torch.from_numpy(codes.astype(np.int64)), self.centroids)

    def _sharpen(self, log_magnitudes: Tensor) -> Tensor:
        """Raise predicted magnitudes to a power and restore their energy.

        A regression blurs spectra; a power of 1.2 before Griffin–Lim is from Tacotron
        (Wang et al., 2017).
        """
        assert self.config.decoder is not None
        blurred = log_magnitudes.exp()
        sharp = (self.config.decoder.sharpening * log_magnitudes).exp()
        return sharp * (blurred.square().sum() / sharp.square().sum()).sqrt()

    def _invert(self, magnitude: Tensor, samples: int) -> Tensor:
        """Find phases for magnitudes [bins, F · mels_per_frame] that begin at sample 0."""
        spectrogram = self.mel.spectrogram
        padded = torch.nn.functional.pad(magnitude, (0, 1), value=1e-6)
        waveform: Tensor = griffinlim(
            padded,
            spectrogram.window,
            spectrogram.n_fft,
            self.config.hop,
            spectrogram.n_fft,
            power=1.0,
            n_iter=GRIFFIN_LIM_ROUNDS,
            momentum=0.99,
            length=samples,
            rand_init=False,
        )
        return waveform

    def fingerprint(self) -> str:
        """Hexadecimal sha256 of the settings and of every learned number."""
        digest = hashlib.sha256(self.config.model_dump_json().encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        decoder = {} if self.decoder is None else self.decoder.state_dict(prefix="decoder.")
        return {"mean": self.mean, "codebooks": self.centroids} | dict(decoder)

    def save(self, path: Path) -> None:
        """Write `audio_codec.json` and `audio_codec.safetensors` into a folder."""
        path.mkdir(parents=True, exist_ok=True)
        header = {
            "kind": "residual_mel",
            "fingerprint": self.fingerprint(),
            "config": self.config.model_dump(),
        }
        save_file(self._tensors(), path / WEIGHTS)
        (path / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


HEADER, WEIGHTS = "audio_codec.json", "audio_codec.safetensors"


def check_codes(codes: np.ndarray, codebooks: int, codes_per_codebook: int) -> None:
    """Raise ValueError unless codes are [F, C] and every one is an entry of its codebook."""
    if codes.ndim != 2 or codes.shape[1] != codebooks:
        raise ValueError(f"codes have shape {codes.shape}, not [frames, {codebooks}]")
    if codes.size and codes.max() >= codes_per_codebook:
        raise ValueError(
            f"code {codes.max()} is no entry of a codebook of {codes_per_codebook}; "
            "strip start and end codes before decoding"
        )


def load_audio_codec(path: Path) -> AudioCodec:
    """Load the audio codec of a folder, of whatever kind its header says.

    Raises UserError when a file is missing, damaged or not what the fingerprint says.
    """
    try:
        header = json.loads((path / HEADER).read_text(encoding="utf-8"))
        kind, fingerprint = header["kind"], header["fingerprint"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"no audio codec can be read from {path}: {error}; prepare the dataset again"
        ) from error
    audio_codec: AudioCodec
    if kind == "residual_mel":
        audio_codec = _load_residual_mel(path, header)
    else:
        audio_codec = load_audio_codec_class(kind).load(path)
    if audio_codec.fingerprint() != fingerprint:
        raise UserError(
            f"the audio codec in {path} has fingerprint {audio_codec.fingerprint()}, but its "
            f"header says {fingerprint}: a file was altered; prepare the dataset again"
        )
    return audio_codec


def _load_residual_mel(path: Path, header: dict[str, Any]) -> ResidualMel:
    try:
        tensors = load_file(path / WEIGHTS)
        config = FitAudioCodecConfig.model_validate(header["config"])
        return ResidualMel(
            config, tensors["mean"], tensors["codebooks"], _load_decoder(config, tensors)
        )
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"no audio codec can be read from {path}: {error}; fit it again") from error


def _load_decoder(
    config: FitAudioCodecConfig, tensors: dict[str, Tensor]
) -> SpectrumDecoder | None:
    if config.decoder is None:
        return None
    decoder = new_decoder(config)
    prefix = "decoder."
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if prefix in name}
    decoder.load_state_dict(weights)
    return decoder.eval().requires_grad_(requires_grad=False)


def _mel_spectrogram(config: FitAudioCodecConfig) -> MelSpectrogram:
    return MelSpectrogram(
        sample_rate=config.sample_rate_hz,
        n_fft=4 * config.hop,
        hop_length=config.hop,
        f_max=min(8000.0, config.sample_rate_hz / 2),
        n_mels=config.mels,
        power=1.0,
        norm="slaney",
        mel_scale="slaney",
        pad_mode="constant",
    )


def _features(
    config: FitAudioCodecConfig, mel: MelSpectrogram, waveforms: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Waveforms [samples] → features [F, mels_per_frame · mels] of each, batch by batch."""
    frame_samples = config.hop * config.mels_per_frame
    for start in range(0, len(waveforms), BATCH_CLIPS):
        clips = waveforms[start : start + BATCH_CLIPS]
        frames = [-(-len(clip) // frame_samples) for clip in clips]
        batch = torch.zeros(len(clips), max(frames) * frame_samples)
        for row, clip in zip(batch, clips, strict=True):
            row[: len(clip)] = clip
        spectra = mel(batch).clamp(min=config.floor).log()[..., :-1].transpose(1, 2)
        stacked = spectra.reshape(len(batch), max(frames), -1)
        for features, count in zip(stacked, frames, strict=True):
            yield features[:count].clone()
