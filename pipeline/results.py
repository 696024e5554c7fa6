"""Writing the report of a run: what was measured, what it cost, and under which settings."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline import report as page
from pipeline.config import Run
from pipeline.folders import RunFolders, system_name
from pipeline.made import Made, made
from pipeline.progress import stages_of
from pipeline.record import StageRecord, Usage, read_records
from stages.diffusion.evaluate import ImageEvaluation
from stages.evaluate import Evaluation
from stages.report_schema import Report, StageCost, read_losses
from stages.saved_model import weights_fingerprint
from store import PredictionStore
from store.schema import Manifest, Quantization

FEW_IMAGES = 200
"""Images below which a Fréchet distance over some hundred features says little."""


def write_report(
    config: Run,
    reference: PredictionStore,
    found: Evaluation,
    wall_s: float,
    usage: Usage,
) -> None:
    """Write report.json and report.html of a run.

    `wall_s` and `usage` are what the evaluation itself has needed up to now; what the other stages
    needed is in their records.
    """
    report = Report(
        **_of_run(config, wall_s, usage),
        samples=found.samples,
        sentences=found.sentences,
        **found.systems,
        comparisons=found.comparisons,
        judges=found.judges,
        divergences=found.divergences,
        calibration=found.calibration,
        audio=found.audio,
        fingerprints=_fingerprints(config, reference.manifest),
        warnings=tuple(_warnings(config, reference, found)),
    )
    _publish(config, report)


def write_image_report(
    config: Run,
    manifest: Manifest | None,
    found: ImageEvaluation,
    wall_s: float,
    usage: Usage,
) -> None:
    """Write report.json and report.html of a run of images; `manifest` is its store's."""
    quantization = None if manifest is None else manifest.quantization
    report = Report(
        **_of_run(config, wall_s, usage),
        samples=found.samples,
        sentences=found.conditions,
        **found.systems,
        comparisons=found.comparisons,
        judges=found.judges,
        images=found.images,
        fingerprints=_fingerprints(config, manifest),
        warnings=tuple(_image_warnings(found, quantization)),
    )
    _publish(config, report)


def _of_run(config: Run, wall_s: float, usage: Usage) -> dict[str, Any]:
    """What a report says of any run."""
    return {
        "run": config.name,
        "stages": stage_costs(config, wall_s, usage),
        "losses": _losses(config),
        "settings": config.model_dump(mode="json"),
        "environment": environment(),
    }


def _fingerprints(config: Run, manifest: Manifest | None) -> dict[str, str]:
    """Return the hashes of the store's parts and of the students' weights."""
    stored: dict[str, str | None] = {} if manifest is None else manifest.fingerprints.model_dump()
    students = {
        system_name(name): weights_fingerprint(RunFolders(config).student(name))
        for name in config.students
    }
    return {name: found for name, found in (stored | students).items() if found}


def _publish(config: Run, report: Report) -> None:
    folder = RunFolders(config).report
    report.write(folder / "report.json")
    page.write_report(folder)


def stage_costs(config: Run, wall_s: float, usage: Usage) -> dict[str, StageCost]:
    """Return what every stage of a run took so far, in their order."""
    records = {s: read_records(RunFolders(config).stages, s) for s in stages_of(config)}
    this = StageRecord(stage="evaluate", identity="").after(wall_s, [usage], finished=True)
    records["evaluate"].append(this)
    return {s: _cost(attempts, made(config, s)) for s, attempts in records.items() if attempts}


def _cost(records: Sequence[StageRecord], found: Made) -> StageCost:
    """Return what a stage took: time over all its tasks, memory of the one that needed most."""
    return StageCost(
        **found._asdict(),
        wall_s=sum(record.wall_s for record in records),
        peak_rss_bytes=max(record.peak_rss_bytes for record in records),
        peak_device_bytes=max(record.peak_device_bytes for record in records),
    )


def _losses(config: Run) -> Mapping[str, object]:
    folders = RunFolders(config)
    logs = {"teacher": folders.teacher / "log.jsonl"}
    logs |= {system_name(name): folders.student(name) / "log.jsonl" for name in config.students}
    return {name: read_losses(path) for name, path in logs.items() if path.exists()}


def environment() -> dict[str, str]:
    """Return the machine and versions on which times were taken."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _precision(quantization: Quantization | None) -> list[str]:
    if quantization is None or quantization.method == "none":
        return []
    return [
        f"the teacher was evaluated as it wrote the store: {len(quantization.layers)} of its "
        f"linear layers hold their weights in {quantization.method} ({quantization.backend} "
        f"{quantization.backend_version})"
    ]


def _image_warnings(found: ImageEvaluation, quantization: Quantization | None) -> list[str]:
    warnings = _precision(quantization)
    fewest = min(found.samples, found.images.references)
    if fewest < FEW_IMAGES:
        warnings.append(
            f"the Fréchet distances are of {found.samples} images to {found.images.references} "
            "reference images: so few that they are mostly bias"
        )
    return warnings


def _warnings(config: Run, reference: PredictionStore, found: Evaluation) -> list[str]:
    warnings = _precision(reference.manifest.quantization)
    warnings += [f"{use.name} gave no numbers: {use.reason}" for use in found.judges if use.reason]
    if found.sentences < 50:
        warnings.append(
            f"only {found.sentences} different sentences were spoken: intervals are wide, and "
            "differences between systems may be chance"
        )
    return warnings
