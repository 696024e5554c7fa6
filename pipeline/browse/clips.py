"""A clip as a browser takes it: a wav file, the outline of its waveform, its spectrogram."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from stages.errors import UserError

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

OUTLINE_POINTS = 600
SPECTROGRAM_COLUMNS = 900
SPECTROGRAM_ROWS = 128
WINDOW_S = 0.032
RANGE_DB = 75.0
LEAST_HZ = 50.0
PALETTE = (
    (0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21),
    (250, 193, 39), (252, 255, 164),
)  # fmt: skip
"""Colours from the softest to the loudest: of even steps of lightness, for every eye."""


@dataclass(frozen=True)
class Clip:
    """Some audio of one channel."""

    waveform: FloatArray
    """[n] samples in [−1, 1]."""
    rate_hz: int
    """Samples per second."""

    @classmethod
    def read(cls, path: Path) -> Clip:
        """Read an audio file, its channels averaged; raises `UserError` where it is none."""
        try:
            waveform, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise UserError(f"{path} cannot be read as audio: {error}") from error
        return cls(waveform.mean(-1), rate_hz)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.waveform) / self.rate_hz

    @cached_property
    def wav(self) -> bytes:
        """A wav file of 16 bits per sample."""
        packed = io.BytesIO()
        soundfile.write(packed, self.waveform, self.rate_hz, format="WAV", subtype="PCM_16")
        return packed.getvalue()

    @cached_property
    def outline(self) -> list[list[float]]:
        """Least and largest sample of each of at most `OUTLINE_POINTS` stretches."""
        parts = np.array_split(self.waveform, max(1, min(OUTLINE_POINTS, len(self.waveform))))
        return [
            [round(float(part.min()), 3), round(float(part.max()), 3)] if len(part) else [0.0, 0.0]
            for part in parts
        ]

    @cached_property
    def spectrogram(self) -> bytes:
        """PNG: time across, frequency up in equal steps of mel, loudness over `RANGE_DB`."""
        levels = _levels_db(self.waveform, self.rate_hz)
        scaled = np.clip((levels - levels.max()) / RANGE_DB + 1, 0, 1)
        image = Image.fromarray(np.round(scaled[::-1] * 255).astype(np.uint8), "L").convert("P")
        image.putpalette(palette())
        packed = io.BytesIO()
        image.save(packed, "PNG")
        return packed.getvalue()


def palette() -> list[int]:
    """256 colours from `PALETTE`, as red, green and blue by turns."""
    places = np.linspace(0, 255, len(PALETTE))
    channels = [np.interp(np.arange(256), places, c) for c in zip(*PALETTE, strict=True)]
    return np.stack(channels, -1).round().astype(int).reshape(-1).tolist()


def _levels_db(waveform: FloatArray, rate_hz: int) -> FloatArray:
    """[rows, columns] decibels, lowest frequency first."""
    size = max(16, round(WINDOW_S * rate_hz))
    padded = np.pad(waveform, (size // 2, size - size // 2))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)
    hop = max(size // 4, -(-len(frames) // SPECTROGRAM_COLUMNS))
    power = np.square(np.abs(np.fft.rfft(frames[::hop] * np.hanning(size), axis=-1)))
    return np.asarray(10 * np.log10(_in_mels(power.T, rate_hz) + 1e-10))


def _in_mels(power: FloatArray, rate_hz: int) -> FloatArray:
    """[rows, columns] power [bins, columns] read off at frequencies in equal steps of mel."""
    lowest, highest = (2595 * np.log10(1 + hz / 700) for hz in (LEAST_HZ, rate_hz / 2))
    hz = 700 * (10 ** (np.linspace(lowest, highest, SPECTROGRAM_ROWS) / 2595) - 1)
    place = np.clip(hz / (rate_hz / 2) * (len(power) - 1), 0, len(power) - 1)
    below = np.minimum(place.astype(int), len(power) - 2)
    share = (place - below)[:, None]
    return np.asarray(power[below] + share * (power[below + 1] - power[below]))
