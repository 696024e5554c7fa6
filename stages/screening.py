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
    level_dbfs,
    resample,
    set_level,
    to_pcm16,
    trim_silence,
)
from stages.config import PrepareConfig
from stages.recordings import Recording, load_recording, read_ids, read_recordings

MAX_SAMPLE_ID_BYTES = 512
"""What a store can hold in a key."""


class Rejection(Exception):
    """Why a recording is left out: a kind, a colon, and what was found."""


@dataclass(frozen=True)
class Clip:
    """An accepted recording; its samples are start … start + length of the spilled audio."""

    sample_id: str
    text: str
    speaker: str
    start: int
    length: int


@dataclass
class Screened:
    """What was accepted, in the source's order, and what was not, check by check."""

    audio: Path
    """Samples of all accepted clips end to end, 16-bit, little-endian."""
    clips: list[Clip] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of sample_id and reason."""

    def waveform(self, clip: Clip) -> Tensor:
        """Samples [length] float32 of an accepted clip."""
        spilled = np.memmap(
            self.audio, dtype="<i2", mode="r", offset=2 * clip.start, shape=clip.length
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
    times = Counter(read_ids(table))
    rows = read_recordings(table, config.single_speaker)
    progress = tqdm(rows, total=times.total(), desc="reading", unit="clip", disable=None)
    with audio.open("wb") as spill:
        for recording in progress:
            try:
                clip = _accept(recording, times, config, sample_rate_hz, table.parent, spill)
            except (Rejection, AudioError) as error:
                screened.rejected.append((recording.sample_id, str(error)))
            else:
                screened.clips.append(clip)
    return screened


def normalise(text: str) -> str:
    """Compose (NFC), lower-case and collapse the whitespace of a text."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _accept(
    recording: Recording,
    times: Counter[str],
    config: PrepareConfig,
    sample_rate_hz: int,
    root: Path,
    spill: BinaryIO,
) -> Clip:
    _check_id(recording.sample_id, times)
    text = _check_text(recording.text, config.alphabet)
    if not recording.speaker:
        raise Rejection("no speaker: the row's cell is empty")
    waveform = _condition(*load_recording(root, recording), config, sample_rate_hz)
    start = spill.tell() // 2
    spill.write(to_pcm16(waveform).tobytes())
    return Clip(recording.sample_id, text, recording.speaker, start, len(waveform))


def _check_id(sample_id: str, times: Counter[str]) -> None:
    if not sample_id:
        raise Rejection("no sample_id: the row's first cell is empty")
    if len(sample_id.encode()) > MAX_SAMPLE_ID_BYTES:
        raise Rejection(f"sample_id too long: the limit is {MAX_SAMPLE_ID_BYTES} bytes")
    if times[sample_id] > 1:
        raise Rejection(f"duplicate sample_id: {times[sample_id]} rows have it")


def _check_text(text: str | None, alphabet: str | None) -> str:
    normalised = normalise(text or "")
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


def _condition(
    waveform: Tensor, rate_hz: int, config: PrepareConfig, sample_rate_hz: int
) -> Tensor:
    waveform = resample(waveform, rate_hz, sample_rate_hz)
    if config.trim is not None:
        waveform = trim_silence(
            waveform, sample_rate_hz, config.trim.below_peak_db, config.trim.keep_s
        )
    level = level_dbfs(waveform)
    if level < config.silence_dbfs:
        raise Rejection(f"silent audio: {level:.1f} dBFS, the limit is {config.silence_dbfs:g}")
    seconds = len(waveform) / sample_rate_hz
    if seconds < config.min_duration_s:
        raise Rejection(f"too short: {seconds:.2f} s, the limit is {config.min_duration_s:g}")
    if seconds > config.max_duration_s:
        raise Rejection(f"too long: {seconds:.2f} s, the limit is {config.max_duration_s:g}")
    return waveform if config.level_dbfs is None else set_level(waveform, config.level_dbfs)


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
