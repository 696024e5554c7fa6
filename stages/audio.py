"""Reading, resampling, trimming and writing of single-channel audio."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torchaudio.functional import resample as sinc_resample

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
"""File endings that are looked for, in this order."""

ENVELOPE_HZ = 100
"""Resolution of the level envelope that silence is measured on."""

FULL_SCALE = 32768
"""Of 16-bit samples."""

CLIPPED = 0.999
"""Magnitude from which a sample counts as clipped."""

QUIETEST = 0.1
"""Share of a recording in which nothing is heard but its noise."""


MOST_SAMPLES = 2**28
"""Samples of all channels that are read at once: an hour and a half at 48 kHz, and a GiB."""


class AudioError(Exception):
    """Audio that cannot be read or used; the message is the reason, without the file's name."""


def read_audio(
    source: Path | bytes, start_s: float = 0.0, length_s: float | None = None
) -> tuple[Tensor, int]:
    """Read a file, or the bytes of one, as one channel, from `start_s` on for at most `length_s`.

    Returns the waveform [samples] float32 in -1..1 (channels averaged) and its rate in Hz.
    Raises AudioError when the audio is unreadable, empty, not finite, or far too long to be read.
    """
    try:
        with soundfile.SoundFile(
            io.BytesIO(source) if isinstance(source, bytes) else source
        ) as file:
            rate_hz = file.samplerate
            start = round(min(start_s * rate_hz, file.frames))
            left = file.frames - start
            count = left if length_s is None else round(min(length_s * rate_hz, left))
            if count * file.channels > MOST_SAMPLES:
                raise AudioError(
                    f"too long to be read: {count / rate_hz:.0f} s of {file.channels} channels; "
                    "cut it"
                )
            if start > 0:
                file.seek(start)
            samples = file.read(count, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError(f"unreadable audio: {getattr(error, 'error_string', error)}") from error
    if not len(samples):
        raise AudioError("empty audio: 0 samples")
    if not np.isfinite(samples).all():
        raise AudioError("audio holds NaN or infinity")
    return torch.from_numpy(samples.mean(axis=1)), rate_hz


def resample(waveform: Tensor, rate_hz: int, target_hz: int) -> Tensor:
    """Change the rate of a waveform [..., samples] by windowed-sinc interpolation."""
    if rate_hz == target_hz:
        return waveform
    changed: Tensor = sinc_resample(
        waveform, rate_hz, target_hz, lowpass_filter_width=32, rolloff=0.95
    )
    return changed


def trim_silence(waveform: Tensor, rate_hz: int, below_peak_db: float, keep_s: float) -> Tensor:
    """Cut what lies before and after the speech of a waveform [samples].

    Speech begins and ends where the level of 10 ms comes within `below_peak_db` of the loudest
    10 ms; `keep_s` seconds around it stay. A silent waveform is returned as it is.
    """
    window = max(1, rate_hz // ENVELOPE_HZ)
    count = -(-len(waveform) // window)
    padded = torch.nn.functional.pad(waveform, (0, count * window - len(waveform)))
    power = padded.view(count, window).square().mean(dim=1)
    loud = torch.nonzero(power > power.max() * 10 ** (-below_peak_db / 10)).flatten()
    if not len(loud):
        return waveform
    keep = round(keep_s * rate_hz)
    start = max(0, int(loud[0]) * window - keep)
    return waveform[start : (int(loud[-1]) + 1) * window + keep]


def level_dbfs(waveform: Tensor) -> float:
    """Root-mean-square level of a waveform [samples] in dB of full scale; -inf for silence."""
    return float(10 * torch.log10(waveform.double().square().mean()))


def clipped_share(waveform: Tensor) -> float:
    """Share of the samples of a waveform [samples] that lie at full scale, within 0.1 % of it."""
    return float((waveform.abs() >= CLIPPED).double().mean())


def estimate_snr_db(waveform: Tensor, rate_hz: int) -> float:
    """Estimate how far the speech of a waveform [samples] stands out from its noise, in dB.

    The noise is as loud as the quietest tenth of all stretches of 10 ms, in which no one speaks;
    the speech is what the mean power of all exceeds it by. Stretches of digital silence say nothing
    and are left out; without others the estimate is -inf. Noise that is there only while someone
    speaks is not found, and speech without a pause is taken for noise.
    """
    window = max(1, rate_hz // ENVELOPE_HZ)
    whole = waveform[: len(waveform) // window * window].double()
    power = whole.view(-1, window).square().mean(dim=1)
    power = power[power > 1 / FULL_SCALE**2]
    if not len(power):
        return -math.inf
    noise = torch.quantile(power, QUIETEST)
    return float(10 * torch.log10((power.mean() - noise).clamp(min=0) / noise))


def set_level(waveform: Tensor, target_dbfs: float) -> Tensor:
    """Scale a waveform [samples] to an RMS level, lower where its peak would exceed 0.99."""
    gain = 10 ** ((target_dbfs - level_dbfs(waveform)) / 20)
    return waveform * min(gain, 0.99 / float(waveform.abs().max()))


def to_pcm16(waveform: Tensor | np.ndarray) -> np.ndarray:
    """Samples [samples] in -1..1 as int16, clipped; dividing by 32768 is the way back."""
    scaled = np.asarray(waveform, dtype=np.float32) * FULL_SCALE
    return scaled.round().clip(-FULL_SCALE, FULL_SCALE - 1).astype("<i2")


def encode_wav(waveform: Tensor | np.ndarray, rate_hz: int) -> bytes:
    """The 16-bit WAV file of a waveform [samples]; what exceeds -1..1 is clipped."""
    file = io.BytesIO()
    soundfile.write(file, to_pcm16(waveform), rate_hz, subtype="PCM_16", format="WAV")
    return file.getvalue()


def write_wav(path: Path, waveform: Tensor | np.ndarray, rate_hz: int) -> None:
    """Write a waveform [samples] as a 16-bit WAV file; what exceeds -1..1 is clipped."""
    path.write_bytes(encode_wav(waveform, rate_hz))
