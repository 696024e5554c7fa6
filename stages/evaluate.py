"""Comparing teacher, guided and unguided, with the students on held-out samples."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stages import verdict
from stages.config import EvaluateConfig
from stages.dataset import Dataset
from stages.family import Sample
from stages.interruption import StopRequest
from stages.measure import (
    Contender,
    Measure,
    measure,
    measure_copy,
    read_measure,
    write_measure,
    write_recordings,
)
from stages.metrics import Bootstrap, Ratio, comparisons
from stages.paired import Axes
from stages.profiles import calibration, divergences
from stages.publish import claim
from stages.report_schema import (
    RECORDING,
    AudioSample,
    Calibration,
    Comparison,
    Divergence,
    JudgeUse,
    System,
)
from store import PredictionStore

AUDIO = "audio"
"""Folder of the clips, below the report's."""


@dataclass(frozen=True)
class Evaluation:
    """The parts of a report that this stage finds out."""

    systems: dict[str, System]
    comparisons: tuple[Comparison, ...]
    judges: tuple[JudgeUse, ...]
    audio: tuple[AudioSample, ...]
    samples: int
    sentences: int
    divergences: tuple[Divergence, ...]
    calibration: dict[str, Calibration]


def evaluate(
    contenders: Sequence[Contender],
    reference: PredictionStore,
    samples: Mapping[str, Sample],
    dataset: Dataset,
    config: EvaluateConfig,
    folder: Path,
    *,
    identity: str,
    stop: StopRequest,
) -> Evaluation | None:
    """Measure every system against the reference store, let judges hear it, and sum up.

    `reference` holds the guided teacher's rollouts of the held-out samples. One model is in memory
    at a time. A system that was measured, and a judge that has listened, are not asked again;
    `identity` names what their answers depend on, and `UserError` refuses a folder of another.
    Returns None when `stop` was requested first.
    """
    claim(folder / "identity", identity)
    chosen = [samples[sample_id] for sample_id, _ in reference]
    audio_codec = dataset.audio_codec()
    write_recordings(dataset, chosen, folder / AUDIO / RECORDING)
    copy = _measure_once(folder, "codec_copy", partial(measure_copy, chosen, audio_codec))
    measures = [copy]
    for contender in contenders:
        if stop.requested:
            return None
        measures.append(
            _measure_once(
                folder,
                contender.name,
                partial(
                    measure,
                    contender,
                    reference,
                    samples,
                    audio_codec,
                    batch_size=config.batch_size,
                    single_samples=config.single_samples,
                ),
            )
        )
        gc.collect()
    if stop.requested:
        return None
    return _sum_up(config, measures, chosen, Axes.of(reference), folder)


def _measure_once(folder: Path, name: str, work: Callable[[Path], Measure]) -> Measure:
    """Return what was measured of a system; measure it first where that has not been done."""
    path = folder / "systems" / f"{name}.json"
    found = read_measure(path)
    if found is None:
        found = work(folder / AUDIO / name)
        write_measure(path, found)
    return found


def _sum_up(
    config: EvaluateConfig,
    measures: Sequence[Measure],
    samples: Sequence[Sample],
    axes: Axes,
    folder: Path,
) -> Evaluation:
    names = [measure.name for measure in measures]
    heard = verdict.listen(config, names, folder / AUDIO)
    texts = [sample["text"] for sample in samples]
    bootstrap = Bootstrap.over(texts, draws=config.bootstrap_draws, seed=config.seed)
    found: dict[str, dict[str, Ratio]] = {
        measure.name: verdict.ratios(
            measure, measures[0], samples, heard, config.plausible_duration
        )
        for measure in measures
    }
    paired = {measure.name: measure.paired for measure in measures if measure.paired}
    return Evaluation(
        systems={
            measure.name: verdict.system_numbers(
                measure, measures[0], found[measure.name], bootstrap
            )
            for measure in measures
        },
        comparisons=comparisons(found, bootstrap, verdict.PAIRED),
        judges=verdict.judge_uses(config, heard),
        audio=verdict.audio_samples(config, names, samples, found, heard, AUDIO),
        samples=len(samples),
        sentences=len(set(texts)),
        divergences=divergences(paired, axes, bootstrap),
        calibration=calibration(paired, bootstrap),
    )
