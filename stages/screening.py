"""Which recordings enter a dataset: checks of ids, texts, audio, alphabet and speakers."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stages.audio import (
    FULL_SCALE,
    AudioError,
    clipped_share,
    estimate_snr_db,
    level_dbfs,
    resample,
    set_level,
    to_pcm16,
    trim_silence,
)
from stages.prepare_config import PrepareConfig
from stages.recordings import Audio, Recording, load_audio, read_ids, read_recordings
from stages.rejections import Rejection

MAX_SAMPLE_ID_BYTES = 512
"""What a store can hold in a key."""


@dataclass(frozen=True)
class Stretch:
    """Samples start … start + length of the spilled audio."""

    start: int
    length: int


@dataclass(frozen=True)
class Clip(Stretch):
    """An accepted recording."""

    sample_id: str
    text: str
    speaker: str
    context: Stretch | None
    """What shows the voice, where the source names it and contexts are wanted."""


@dataclass
class Screened:
    """What was accepted, in the source's order, and what was not, check by check."""

    audio: Path
    """Samples of all accepted clips end to end, 16-bit, little-endian."""
    clips: list[Clip] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of sample_id and reason."""

    def waveform(self, part: Stretch) -> Tensor:
        """Samples [length] float32 of an accepted clip, or of a context."""
        spilled = np.memmap(
            self.audio, dtype="<i2", mode="r", offset=2 * part.start, shape=part.length
        )
        return torch.from_numpy(spilled.astype(np.float32) / FULL_SCALE)

    def drop(self, reason: Callable[[Clip], str | None]) -> None:
        """Reject the accepted clips for which there is a reason."""
        reasons = [reason(clip) for clip in self.clips]
        pairs = list(zip(self.clips, reasons, strict=True))
        self.clips = [clip for clip, why in pairs if why is None]
        self.rejected += [(clip.sample_id, why) for clip, why in pairs if why is not None]


def screen(config: PrepareConfig, table: Path, sample_rate_hz: int, audio: Path) -> Screened:
    """Check every recording of a table, and spill the audio of the good ones into a file.

    Audio is resampled, trimmed and brought to its level before its length and level are judged.
    All rows of a sample_id that stands more than once are rejected: none of them is the right one.
    """
    screened = Screened(audio)
    root = config.audio_root or table.parent
    times = Counter(read_ids(table, root))
    rows = read_recordings(table, root, config.single_speaker)
    progress = tqdm(rows, total=times.total(), desc="reading", unit="clip", disable=None)
    with audio.open("wb") as spill:
        listener = _Listener(config, root, sample_rate_hz, spill)
        for recording in progress:
            try:
                clip = _accept(recording, times, config, listener)
            except (Rejection, AudioError) as error:
                screened.rejected.append((recording.sample_id, str(error)))
            else:
                screened.clips.append(clip)
    return screened


@dataclass
class _Listener:
    """Reads audio below a root, brings it into form, and spills it."""

    config: PrepareConfig
    root: Path
    sample_rate_hz: int
    spill: BinaryIO
    contexts: dict[Audio, Stretch] = field(default_factory=dict)
    """Those that were spilled; many recordings may share one."""

    def clip(self, audio: Audio, declared_s: float | None) -> Stretch:
        """Spill a clip that sounds as it should and is neither too short nor too long."""
        waveform = self._condition(audio, declared_s=declared_s)
        seconds = len(waveform) / self.sample_rate_hz
        limits = self.config
        if seconds < limits.min_duration_s:
            raise Rejection(f"too short: {seconds:.2f} s, the limit is {limits.min_duration_s:g}")
        if seconds > limits.max_duration_s:
            raise Rejection(f"too long: {seconds:.2f} s, the limit is {limits.max_duration_s:g}")
        return self._write(waveform)

    def context(self, audio: Audio) -> Stretch:
        """Spill the first `context_s` seconds of a context that sounds as it should."""
        if audio not in self.contexts:
            try:
                waveform = self._condition(audio, most_s=self.config.context_s)
            except (Rejection, AudioError) as error:
                raise Rejection(f"context: {error}") from error
            self.contexts[audio] = self._write(waveform)
        return self.contexts[audio]

    def _condition(
        self, audio: Audio, *, declared_s: float | None = None, most_s: float | None = None
    ) -> Tensor:
        """Resample, trim and cut to `most_s` seconds; raises Rejection for what sounds wrong."""
        trim = self.config.trim
        waveform, rate_hz = load_audio(self.root, audio)
        _check_recorded(waveform, rate_hz, declared_s, self.config)
        waveform = resample(waveform, rate_hz, self.sample_rate_hz)
        _check_noise(waveform, self.sample_rate_hz, self.config)
        if trim is not None:
            waveform = trim_silence(waveform, self.sample_rate_hz, trim.below_peak_db, trim.keep_s)
        if most_s is not None:
            waveform = waveform[: round(most_s * self.sample_rate_hz)]
        level, limit = level_dbfs(waveform), self.config.silence_dbfs
        if level < limit:
            raise Rejection(f"silent audio: {level:.1f} dBFS, the limit is {limit:g}")
        return waveform

    def _write(self, waveform: Tensor) -> Stretch:
        if self.config.level_dbfs is not None:
            waveform = set_level(waveform, self.config.level_dbfs)
        start = self.spill.tell() // 2
        self.spill.write(to_pcm16(waveform).tobytes())
        return Stretch(start, len(waveform))


def normalise(text: str, *, lower_case: bool = True) -> str:
    """Compose (NFC), lower-case if wanted, and collapse the whitespace of a text."""
    composed = unicodedata.normalize("NFC", text)
    return " ".join((composed.lower() if lower_case else composed).split())


def _accept(
    recording: Recording, times: Counter[str], config: PrepareConfig, listener: _Listener
) -> Clip:
    _check_id(recording.sample_id, times)
    if recording.fault is not None:
        raise Rejection(recording.fault)
    text = _check_text(recording.text, config)
    if not recording.speaker:
        raise Rejection("no speaker: the row's cell is empty")
    if recording.audio is None:
        raise Rejection("missing audio: the row names none")
    clip = listener.clip(recording.audio, recording.declared_s)
    wanted = recording.context if config.context_s > 0 else None
    context = None if wanted is None else listener.context(wanted)
    return Clip(clip.start, clip.length, recording.sample_id, text, recording.speaker, context)


def _check_recorded(
    waveform: Tensor, rate_hz: int, declared_s: float | None, config: PrepareConfig
) -> None:
    """Check the samples of a file, which later steps would change."""
    seconds, tolerance_s = len(waveform) / rate_hz, config.duration_tolerance_s
    # Written so that a declared NaN is no match.
    if (
        declared_s is not None
        and tolerance_s is not None
        and not abs(seconds - declared_s) <= tolerance_s
    ):
        raise Rejection(
            f"wrong duration: {declared_s:.2f} s are declared, the audio has {seconds:.2f} s, the "
            f"tolerance is {tolerance_s:g}"
        )
    limit = config.max_clipped_share
    if limit is not None and (share := clipped_share(waveform)) > limit:
        raise Rejection(
            f"clipped audio: {share:.2%} of the samples are at full scale, the limit is {limit:.2%}"
        )


def _check_noise(waveform: Tensor, rate_hz: int, config: PrepareConfig) -> None:
    """Check how far speech stands out, in what the audio codec can hear and before trimming.

    Silence is left to its own check.
    """
    limit = config.min_snr_db
    if limit is None or level_dbfs(waveform) < config.silence_dbfs:
        return
    estimate = estimate_snr_db(waveform, rate_hz)
    if estimate < limit:
        raise Rejection(f"noisy audio: estimated SNR {estimate:.1f} dB, the limit is {limit:g}")


def _check_id(sample_id: str, times: Counter[str]) -> None:
    if not sample_id:
        raise Rejection("no sample_id: the row's first cell is empty")
    if len(sample_id.encode()) > MAX_SAMPLE_ID_BYTES:
        raise Rejection(f"sample_id too long: the limit is {MAX_SAMPLE_ID_BYTES} bytes")
    if times[sample_id] > 1:
        raise Rejection(f"duplicate sample_id: {times[sample_id]} rows have it")


def _check_text(text: str | None, config: PrepareConfig) -> str:
    alphabet = config.alphabet
    normalised = normalise(text or "", lower_case=config.lower_case)
    if not normalised:
        raise Rejection("empty text: nothing is left after normalisation")
    strange = strange_characters(normalised, alphabet) if alphabet is not None else None
    if strange:
        raise Rejection(strange)
    return normalised


def strange_characters(text: str, alphabet: str) -> str | None:
    """Reason to reject a text with characters outside an alphabet, or None."""
    outside = sorted(set(text) - set(alphabet))
    return f"text outside the alphabet: {outside}" if outside else None


def choose_splits(texts: Sequence[str], config: PrepareConfig) -> dict[str, str]:
    """Split of every different text: the first of a keyed order are test, the next dev.

    All clips of a text share its split, whoever speaks it, so no held-out text was ever trained.
    """
    order = sorted(set(texts), key=lambda text: keyed(config.seed, "split", text))
    dev_end = config.test_texts + config.dev_texts
    splits = dict.fromkeys(order, "train")
    splits.update(dict.fromkeys(order[:dev_end], "dev"))
    splits.update(dict.fromkeys(order[: config.test_texts], "test"))
    return splits


def keyed(seed: int, use: str, name: str) -> int:
    """A number of 64 bits that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}/{use}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
