"""From what was measured and heard to the numbers of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from stages import metrics
from stages.config import EvaluateConfig, JudgeName
from stages.family import Sample
from stages.judges import Clip, Judgement, judge
from stages.measure import Measure, wav_name
from stages.metrics import Array, Bootstrap, Ratio, ratio
from stages.profiles import calibration_error
from stages.publish import replace_file
from stages.report_schema import (
    RECORDING,
    AudioClip,
    AudioSample,
    JudgeUse,
    Metric,
    System,
)
from store.schema import Record

RECOGNISERS: tuple[JudgeName, ...] = ("whisper", "pocketsphinx")
COSTS = ("parameters", "active_parameters", "flops_per_timestep", "dense_flops_per_timestep")
"""What a report says of a system's architecture."""
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95}
"""What is said of a distribution beside its mean."""
PAIRED = ("wer", "cer", "success", "paired_kl", "agreement")
"""Metrics whose differences between systems are reported with paired intervals."""


class Heard(Record):
    """What one judge said of every clip of every system; kept so that it need not listen twice."""

    judge: JudgeName
    values: dict[str, list[Any]] | None
    """System → one value per sample; null when the judge could not run."""
    reason: str | None = None
    """Why it could not."""


def listen(config: EvaluateConfig, systems: Sequence[str], folder: Path) -> dict[JudgeName, Heard]:
    """Let every judge hear the clips of all systems below `folder`, or read what it said before.

    That a judge could not run is not kept: it is asked again when its package may be there.
    """
    heard: dict[JudgeName, Heard] = {}
    for name in config.judges:
        path = folder / f"{name}.json"
        if path.exists():
            heard[name] = Heard.model_validate_json(path.read_bytes())
            continue
        heard[name] = _listen(name, config, systems, folder)
        if heard[name].values is not None:
            replace_file(path, heard[name].model_dump_json().encode())
    return heard


def _listen(name: JudgeName, config: EvaluateConfig, systems: Sequence[str], folder: Path) -> Heard:
    if name == "resemblyzer":
        systems = [RECORDING, *systems]
    files = [(system, path) for system in systems for path in sorted((folder / system).iterdir())]
    verdict: Judgement = judge(name, [_clip(path) for _, path in files], processes=config.processes)
    if verdict.values is None:
        return Heard(judge=name, values=None, reason=verdict.reason)
    values: dict[str, list[Any]] = {system: [] for system in systems}
    for (system, _), value in zip(files, verdict.values, strict=True):
        values[system].append(value.tolist() if isinstance(value, np.ndarray) else value)
    return Heard(judge=name, values=values)


def _clip(path: Path) -> Clip:
    waveform, rate_hz = soundfile.read(path, dtype="float32")
    return Clip(waveform, rate_hz)


def ratios(
    measure: Measure,
    copy: Measure,
    samples: Sequence[Sample],
    heard: Mapping[JudgeName, Heard],
    plausible_duration: tuple[float, float],
) -> dict[str, Ratio]:
    """Return every metric of a system that has an interval, before it is summed."""
    found = _spoken_ratios(measure, copy)
    if measure.paired:
        predictions = [rollout.predictions for rollout in measure.paired]
        found["paired_kl"] = ratio([rollout.kl for rollout in measure.paired], predictions)
        found["agreement"] = ratio([rollout.agreed for rollout in measure.paired], predictions)
    if measure.ended:
        found["ended"] = ratio(measure.ended)
        found["success"] = ratio(_successes(measure, copy, plausible_duration))
    if sum(measure.audio_s[: len(measure.single_s)]) > 0:
        found["rtf_single"] = _first(measure.single_s, measure.audio_s)
    texts = [sample["text"] for sample in samples]
    first, second = _recognised(measure.name, heard)
    if first is not None:
        found["wer"] = metrics.word_errors(texts, first)
        found["cer"] = metrics.character_errors(texts, first)
        found["repetition"] = metrics.repetition(texts, first)
    if second is not None:
        found["wer_second"] = metrics.word_errors(texts, second)
        found["cer_second"] = metrics.character_errors(texts, second)
    if (scores := _values("distillmos", measure.name, heard)) is not None:
        found["mos"] = ratio(scores)
    if (voices := _values("resemblyzer", measure.name, heard)) is not None:
        recordings = _values("resemblyzer", RECORDING, heard)
        found |= _speaker_ratios(voices, recordings, [sample["speaker"] for sample in samples])
    return found


def _spoken_ratios(measure: Measure, copy: Measure) -> dict[str, Ratio]:
    """How long the clips are and how much their frames repeat themselves."""
    spoken = measure.spoken
    return {
        "duration_s": ratio(measure.audio_s),
        "duration_ratio": ratio(measure.audio_s, copy.audio_s),
        "duration_ratio_mean": ratio(_duration_ratios(measure, copy)),
        "silent": ratio([not clip.sounds for clip in spoken]),
        "longest_run_frames": ratio([clip.longest_run for clip in spoken]),
        "repeated_pairs": ratio([clip.repeated_pairs for clip in spoken]),
        "repeated_fours": ratio([clip.repeated_fours for clip in spoken]),
        "looped": ratio([clip.ends_in_loop for clip in spoken]),
    }


def _duration_ratios(measure: Measure, copy: Measure) -> Array:
    """[U]: seconds of every clip per second of its recording."""
    seconds, recorded = np.asarray(measure.audio_s), np.asarray(copy.audio_s)
    quotients: Array = seconds / recorded
    return quotients


def _successes(measure: Measure, copy: Measure, plausible_duration: tuple[float, float]) -> Array:
    """[U]: 1 where a rollout ended by itself, can be heard and is about as long as it should be."""
    least, most = plausible_duration
    seconds = _duration_ratios(measure, copy)
    sounds = np.array([clip.sounds for clip in measure.spoken])
    plausible = (least <= seconds) & (seconds <= most)
    successes: Array = (np.array(measure.ended) & sounds & plausible).astype(np.float64)
    return successes


def _first(seconds: Sequence[float], audio_s: Sequence[float]) -> Ratio:
    """Time per audio of the first samples, over all [U]: the others add nothing to either."""
    timed = np.arange(len(audio_s)) < len(seconds)
    padded = np.pad(np.asarray(seconds), (0, len(audio_s) - len(seconds)))
    return ratio(padded, np.where(timed, audio_s, 0))


def _values(name: JudgeName, system: str, heard: Mapping[JudgeName, Heard]) -> list[Any] | None:
    verdict = heard.get(name)
    return None if verdict is None or verdict.values is None else verdict.values[system]


def _recognised(
    system: str, heard: Mapping[JudgeName, Heard]
) -> tuple[list[str] | None, list[str] | None]:
    texts = [
        values
        for name in heard
        if name in RECOGNISERS and (values := _values(name, system, heard)) is not None
    ]
    return (*texts, None, None)[:2]  # type: ignore[return-value]


def _speaker_ratios(
    voices: Sequence[Any], recordings: Any, speakers: Sequence[str]
) -> dict[str, Ratio]:
    """Compare voices with their own recordings, and with the mean voice of the other speakers."""
    ours, names = np.asarray(recordings, float), np.asarray(speakers)
    others = np.stack(
        [ours[names != name].mean(0) if (names != name).any() else ours[0] * 0 for name in names]
    )
    return {
        "speaker_similarity": ratio(metrics.cosine(voices, recordings)),
        "speaker_contrast": ratio(metrics.cosine(voices, others)),
    }


def system_numbers(
    measure: Measure, copy: Measure, found: Mapping[str, Ratio], bootstrap: Bootstrap
) -> System:
    """Return a system's numbers, the means and ratios among them with their intervals."""
    values = {name: bootstrap.metric(value) for name, value in found.items()}
    values |= _quantiles("duration_{}_s", np.asarray(measure.audio_s))
    values |= _quantiles("duration_ratio_{}", _duration_ratios(measure, copy))
    if (error := calibration_error(measure.paired, bootstrap)) is not None:
        values["calibration_error"] = error
    if measure.passes:
        values["passes"] = Metric(value=measure.passes)
        if sum(measure.audio_s) > 0:
            values["rtf"] = Metric(value=measure.decode_s / sum(measure.audio_s))
    if measure.architecture is not None:
        values |= {name: Metric(value=getattr(measure.architecture, name)) for name in COSTS}
        flops = measure.architecture.flops_per_timestep * measure.passes
        values["total_flops_per_timestep"] = Metric(value=flops)
    return System(**values)


def _quantiles(name: str, values: Array) -> dict[str, Metric]:
    """Median and outer twentieths of values [U], interpolated; they describe just these samples."""
    return {
        name.format(quantile): Metric(value=float(np.quantile(values, share)))
        for quantile, share in QUANTILES.items()
    }


def judge_uses(config: EvaluateConfig, heard: Mapping[JudgeName, Heard]) -> tuple[JudgeUse, ...]:
    """Return which judges were asked, what they measure and why one gave nothing."""
    recognisers = [name for name in config.judges if name in RECOGNISERS]
    measures: dict[JudgeName, tuple[str, ...]] = {
        "distillmos": ("mos",),
        "resemblyzer": ("speaker_similarity", "speaker_contrast"),
    }
    for name, fields in zip(
        recognisers, (("wer", "cer", "repetition"), ("wer_second", "cer_second")), strict=False
    ):
        measures[name] = fields
    return tuple(
        JudgeUse(name=name, measures=measures[name], reason=heard[name].reason)
        for name in config.judges
    )


def audio_samples(
    config: EvaluateConfig,
    systems: Sequence[str],
    samples: Sequence[Sample],
    found: Mapping[str, Mapping[str, Ratio]],
    heard: Mapping[JudgeName, Heard],
    folder: str,
) -> tuple[AudioSample, ...]:
    """Return the first samples to listen to, as every system speaks them."""
    return tuple(
        AudioSample(
            sample_id=sample["sample_id"],
            text=sample["text"],
            speaker=sample["speaker"],
            clips={
                system: _audio_clip(system, index, found[system], heard, folder)
                for system in systems
            },
        )
        for index, sample in enumerate(samples[: config.audio_samples])
    )


def _audio_clip(
    system: str,
    index: int,
    found: Mapping[str, Ratio],
    heard: Mapping[JudgeName, Heard],
    folder: str,
) -> AudioClip:
    first, _ = _recognised(system, heard)
    return AudioClip(
        file=f"{folder}/{system}/{wav_name(index)}",
        heard=None if first is None else first[index],
        edits=None if first is None else int(found["wer"].numerator[index]),
    )
