"""A small network that hears more in quantised mel spectra than the mel filter bank kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import trange

from stages.prepare_config import FitAudioCodecConfig, SpectrumDecoderConfig

COMPRESSION = 0.3
"""Exponent that magnitudes are compared under: about as loud parts are heard."""

WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
WARMUP_STEPS = 50


class SpectrumDecoder(nn.Module):
    """Quantised codec frames → log magnitudes of the short-time spectrum.

    Convolutional blocks over time see neighbouring frames, which the quantiser coded apart.
    Block: ConvNeXt (Liu et al., A ConvNet for the 2020s, 2022), as in Vocos (Siuzdak, 2023).
    """

    scale: Tensor

    def __init__(self, config: SpectrumDecoderConfig, features: int, bins: int, frames: int):
        """Take D features per codec frame, and the bins of each of its `frames` spectra."""
        super().__init__()
        self.bins = bins
        self.register_buffer("scale", torch.ones(()))
        self.input = nn.Linear(features, config.width)
        self.blocks = nn.Sequential(*(Block(config.width) for _ in range(config.layers)))
        self.output = nn.Linear(config.width, frames * bins)

    def forward(self, quantised: Tensor) -> Tensor:
        """Features [B, F, D] less their mean → log magnitudes [B, F · frames, bins]."""
        hidden = self.blocks(self.input(quantised / self.scale))
        log_magnitudes: Tensor = self.output(hidden)
        return log_magnitudes.reshape(len(quantised), -1, self.bins)


class Block(nn.Module):
    """Depthwise convolution over time, then a pointwise feed-forward, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Conv1d(width, width, kernel_size=7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden [B, F, width] → the same shape."""
        mixed = self.mix(x.transpose(1, 2)).transpose(1, 2)
        added: Tensor = self.narrow(nn.functional.gelu(self.wide(self.norm(mixed))))
        return x + added


class Crops:
    """Random stretches of clips: the codes of some frames and the spectra they stand for."""

    def __init__(
        self, config: FitAudioCodecConfig, waveforms: Sequence[Tensor], codes: Sequence[Tensor]
    ):
        """Take waveforms [samples] and their codes [F, C]; clips shorter than a crop are padded."""
        assert config.decoder is not None
        self.n_fft, self.hop = 4 * config.hop, config.hop
        self.frame_samples = config.hop * config.mels_per_frame
        self.frames, self.floor = config.decoder.crop_frames, config.floor
        self.clips = [self._pad(*clip) for clip in zip(waveforms, codes, strict=True)]
        self.window = torch.hann_window(self.n_fft)

    def _pad(self, waveform: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        missing = max(0, self.frames - len(codes))
        codes = torch.cat([codes, codes[-1:].expand(missing, -1)])
        after = len(codes) * self.frame_samples - len(waveform) + self.n_fft
        return nn.functional.pad(waveform, (self.n_fft // 2, after)), codes

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Codes [B, F, C] and magnitudes [B, F · mels_per_frame, bins] of `count` crops."""
        codes, pieces = [], []
        span = self.frames * self.frame_samples - self.hop + self.n_fft
        for index in torch.randint(len(self.clips), (count,), generator=generator).tolist():
            waveform, clip_codes = self.clips[index]
            last = len(clip_codes) - self.frames
            start = int(torch.randint(last + 1, (1,), generator=generator))
            codes.append(clip_codes[start : start + self.frames])
            begin = start * self.frame_samples
            pieces.append(waveform[begin : begin + span])
        spectra = torch.stft(
            torch.stack(pieces), self.n_fft, self.hop, window=self.window, center=False,
            return_complex=True,
        )  # fmt: skip
        return torch.stack(codes), spectra.abs().clamp(min=self.floor).transpose(1, 2)


def fit_decoder(
    config: FitAudioCodecConfig,
    waveforms: Sequence[Tensor],
    codes: Sequence[Tensor],
    codebooks: Tensor,
) -> SpectrumDecoder:
    """Train a decoder on clips and their codes [F, C] int64 with codebooks [C, V, D].

    The loss is the L1 distance of compressed magnitudes. In a share of the steps only the first
    codebooks are summed, so that a code which a model got wrong in the last ones does little harm.
    """
    decoder_config = config.decoder
    assert decoder_config is not None
    crops = Crops(config, waveforms, codes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        decoder = new_decoder(config)
    generator = torch.Generator().manual_seed(config.seed)
    _start_from(decoder, *crops.draw(64, generator), codebooks)
    optimizer = torch.optim.AdamW(
        decoder.parameters(), decoder_config.learning_rate, (0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    steps = decoder_config.steps
    for step in trange(steps, desc="audio decoder", unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = decoder_config.learning_rate * _schedule(step, steps)
        index, magnitudes = crops.draw(decoder_config.batch_size, generator)
        kept = _kept_codebooks(config, decoder_config, generator)
        predicted = decoder(dequantise(index, codebooks[:kept]))
        loss = ((COMPRESSION * predicted).exp() - magnitudes**COMPRESSION).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), CLIP_NORM)
        optimizer.step()
    return decoder.eval().requires_grad_(requires_grad=False)


def new_decoder(config: FitAudioCodecConfig) -> SpectrumDecoder:
    """An untrained decoder of the shape that an audio codec's settings ask for."""
    assert config.decoder is not None
    features, bins = config.mels * config.mels_per_frame, 2 * config.hop + 1
    return SpectrumDecoder(config.decoder, features, bins, config.mels_per_frame)


def dequantise(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Codes [..., ≥ C] int64 → features [..., D]: the sum of their centroids [C, V, D]."""
    total = codebooks[0][codes[..., 0]]
    for c in range(1, len(codebooks)):
        total = total + codebooks[c][codes[..., c]]
    return total


@torch.no_grad()
def _start_from(decoder: SpectrumDecoder, codes: Tensor, spectra: Tensor, books: Tensor) -> None:
    """Start at the mean spectrum, with inputs of standard deviation 1."""
    decoder.scale.copy_(dequantise(codes, books).std())
    mean = spectra.log().reshape(-1, len(decoder.output.bias)).mean(dim=0)
    decoder.output.bias.copy_(mean)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up times half a cosine, as a share of the peak learning rate."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _kept_codebooks(
    config: FitAudioCodecConfig, decoder: SpectrumDecoderConfig, generator: torch.Generator
) -> int:
    if float(torch.rand((), generator=generator)) >= decoder.codebook_dropout:
        return config.codebooks
    return int(
        torch.randint((config.codebooks + 1) // 2, config.codebooks + 1, (), generator=generator)
    )
