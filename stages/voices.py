"""The demo's speech corpus: sentences of a closed grammar, spoken by voices that packages bring."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stages.audio import AudioError, encode_wav, read_audio, resample
from stages.errors import UserError
from stages.prepare_config import VoiceConfig, VoicesConfig
from stages.publish import replace_file

SLOTS: dict[str, tuple[str, ...]] = {
    "name": ("anna", "oliver", "susan", "peter", "my brother", "the teacher"),
    "verb": ("open", "close", "find", "bring", "carry", "paint", "hide", "watch"),
    "colour": ("red", "blue", "green", "yellow", "purple", "silver", "white", "black"),
    "object": (
        "door", "window", "basket", "table", "bottle", "hammer", "ladder", "pencil", "kettle",
        "box",
    ),
    "place": (
        "in the garden", "under the bridge", "near the river", "behind the house",
        "beside the road", "on the mountain", "in the kitchen", "near the school",
    ),
    "time": ("now", "today", "tomorrow", "again", "before dinner", "every morning"),
}  # fmt: skip
"""Words of each slot of the grammar."""

PATTERNS: tuple[str, ...] = (
    "{verb} the {object}",
    "please {verb} the {colour} {object}",
    "{verb} the {object} {time}",
    "{verb} the {colour} {object} {place}",
    "please {verb} the {object} {place}",
    "{name} will {verb} the {object} {time}",
    "{name} will {verb} the {colour} {object}",
    "the {colour} {object} is {place}",
    "can you {verb} the {colour} {object} {time}",
    "we saw the {object} {place} {time}",
)
"""Shapes of a sentence, drawn with equal chances: 3 to 9 words."""


@dataclass(frozen=True)
class Clip:
    """One sentence to be spoken by one voice into one file."""

    path: Path
    text: str
    voice: VoiceConfig
    seed: int


def sentences(count: int, seed: int) -> list[str]:
    """The first `count` different sentences of the grammar for a seed.

    Every choice is keyed by (seed, draw, slot), so a longer list begins with the shorter one.
    Raises UserError when the grammar runs dry.
    """
    found: dict[str, None] = {}
    draw = 0
    while len(found) < count:
        if draw > 50 * count + 1000:
            raise UserError(
                f"sentences={count} is more than the demo grammar easily gives "
                f"({len(found)} after {draw} draws); ask for fewer"
            )
        pattern = _choose(PATTERNS, seed, draw, "pattern")
        words = {slot: _choose(fills, seed, draw, slot) for slot, fills in SLOTS.items()}
        found[pattern.format(**words)] = None
        draw += 1
    return list(found)


def _choose(options: tuple[str, ...], seed: int, draw: int, slot: str) -> str:
    digest = hashlib.sha256(f"{seed}/{draw}/{slot}".encode()).digest()
    return options[int.from_bytes(digest[:8], "big") % len(options)]


def make_corpus(config: VoicesConfig, out: Path) -> Path:
    """Speak every sentence with every voice into a recorded folder and return the folder.

    Writes `wavs/<id>.wav` (16-bit, the engine's rate), then `metadata.csv` with the lines
    `id|text|text|speaker`; the latter exists only when all clips do. A folder left half-made is
    finished, clips that cannot be read are made again, and the same config gives the same bytes.
    Raises UserError when `out` was made with other settings or a voice's package is missing.
    """
    made_with = _describe(config)
    settings = out / "voices.json"
    if settings.exists() and settings.read_text() != made_with:
        raise UserError(
            f"{out} holds a corpus of other settings or another grammar (see {settings}); remove "
            "it or choose another folder"
        )
    if (out / "metadata.csv").exists():
        return out
    for voice in config.voices:
        check_engine(voice)
    (out / "wavs").mkdir(parents=True, exist_ok=True)
    replace_file(settings, made_with.encode())
    clips = list(_clips(config, out))
    _speak_missing([clip for clip in clips if not _is_clip(clip.path)], config.processes)
    lines = (f"{c.path.stem}|{c.text}|{c.text}|{c.voice.speaker}\n" for c in clips)
    replace_file(out / "metadata.csv", "".join(lines).encode())
    return out


def _describe(config: VoicesConfig) -> str:
    """What decides the bytes of a corpus: the settings, and the sentences' grammar."""
    grammar = hashlib.sha256(json.dumps([SLOTS, PATTERNS]).encode()).hexdigest()
    made_with = config.model_dump(mode="json", exclude={"processes"}) | {"grammar": grammar}
    return json.dumps(made_with, indent=1) + "\n"


def _clips(config: VoicesConfig, out: Path) -> Iterator[Clip]:
    for index, text in enumerate(sentences(config.sentences, config.seed)):
        for voice in config.voices:
            clip_id = f"{index:05d}-{voice.speaker}"
            yield Clip(out / "wavs" / f"{clip_id}.wav", text, voice, config.seed)


def _is_clip(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        read_audio(path)
    except AudioError:
        return False
    return True


def _speak_missing(clips: list[Clip], processes: int) -> None:
    progress = tqdm(total=len(clips), desc="speaking", unit="clip", disable=None)
    with progress:
        if processes == 1 or len(clips) < 2 * processes:
            for clip in clips:
                _speak_clip(clip)
                progress.update()
            return
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes, initializer=_start_worker) as pool:
            for _ in pool.imap_unordered(_speak_clip, clips, chunksize=16):
                progress.update()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _speak_clip(clip: Clip) -> None:
    waveform, rate_hz = ENGINES[clip.voice.engine](clip)
    replace_file(clip.path, encode_wav(waveform, rate_hz))


def _speak_hibari(clip: Clip) -> tuple[Tensor, int]:
    pitch = clip.voice.pitch
    digest = hashlib.sha256(f"{clip.seed}/{clip.path.stem}".encode()).digest()
    engine = _load_hibari(clip.voice.voice)
    spoken = engine(f"{clip.text}.", speed=1 / pitch, seed=int.from_bytes(digest[:4], "big"))
    return _shift(torch.from_numpy(spoken), engine.sample_rate, pitch), engine.sample_rate


def _speak_flite(clip: Clip) -> tuple[Tensor, int]:
    pitch = clip.voice.pitch
    with tempfile.TemporaryDirectory() as folder:
        spoken = Path(folder) / "spoken.wav"
        arguments = ["-voice", clip.voice.voice, "--setf", f"duration_stretch={pitch}"]
        _run_flite([*arguments, "-t", clip.text, "-o", str(spoken)])
        waveform, rate_hz = read_audio(spoken)
    return _shift(waveform, rate_hz, pitch), rate_hz


def _run_flite(arguments: list[str]) -> None:
    done = subprocess.run(["flite", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"flite {' '.join(arguments)} failed: {done.stderr.strip()}")


ENGINES: dict[str, Callable[[Clip], tuple[Tensor, int]]] = {
    "hibari": _speak_hibari,
    "flite": _speak_flite,
}


def _shift(waveform: Tensor, rate_hz: int, pitch: float) -> Tensor:
    """Play a waveform [samples] at `pitch` times its speed: pitch and formants move together."""
    return resample(waveform, round(rate_hz * pitch), rate_hz)


@cache
def _load_hibari(voice: str) -> Any:
    from hibari import Hibari

    return Hibari(voice=voice, threads=1)


def check_engine(voice: VoiceConfig) -> None:
    """Refuse a voice whose engine, or who, is not on this machine; raises `UserError`."""
    if voice.engine == "flite" and shutil.which("flite") is None:
        raise UserError(
            f"speaker {voice.speaker!r} needs the program `flite`, which is not on the PATH; "
            "apt-get install flite, or name another engine in prepare.voices"
        )
    if voice.engine == "hibari" and importlib.util.find_spec("hibari") is None:
        raise UserError(
            f"speaker {voice.speaker!r} needs the package hibari-tts, which is not installed; "
            "pip install 'foretell[voices]', or name a recorded folder in prepare.source"
        )
    known = _hibari_voices() if voice.engine == "hibari" else _flite_voices()
    if voice.voice not in known:
        raise UserError(
            f"speaker {voice.speaker!r} asks for the voice {voice.voice!r}, but {voice.engine} has "
            f"{', '.join(known)}"
        )


def _hibari_voices() -> list[str]:
    from hibari.voices import VOICES

    return list(VOICES)


def _flite_voices() -> list[str]:
    """Asked beforehand, because flite speaks with another voice where it lacks one."""
    listed = subprocess.run(["flite", "-lv"], capture_output=True, text=True, check=True).stdout
    return listed.partition(":")[2].split()
