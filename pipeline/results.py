"""Writing the report of a run: what was measured, what it cost, and under which settings."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import torch

from pipeline import report as page
from pipeline.config import Run
from pipeline.folders import RunFolders, system_name
from pipeline.progress import stages_of
from pipeline.record import StageRecord, Usage, read_record
from stages.evaluate import Evaluation
from stages.report_schema import Report, StageCost, read_losses
from store import PredictionStore
from store.schema import Quantization


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
    folders = RunFolders(config)
    report = Report(
        run=config.name,
        samples=found.samples,
        sentences=found.sentences,
        **found.systems,
        stages=stage_costs(config, wall_s, usage),
        comparisons=found.comparisons,
        judges=found.judges,
        audio=found.audio,
        losses=_losses(config),
        settings=config.model_dump(mode="json"),
        fingerprints=reference.manifest.fingerprints.model_dump(),
        environment=environment(),
        warnings=tuple(_warnings(config, reference, found)),
    )
    report.write(folders.report / "report.json")
    page.write_report(folders.report)


def stage_costs(config: Run, wall_s: float, usage: Usage) -> dict[str, StageCost]:
    """Return what every stage of a run took so far, in their order."""
    records = {s: read_record(RunFolders(config).stages, s) for s in stages_of(config)}
    so_far = records["evaluate"] or StageRecord(stage="evaluate", identity="")
    records["evaluate"] = so_far.after(wall_s, [usage], finished=True)
    return {
        stage: StageCost(
            wall_s=record.wall_s,
            peak_rss_bytes=record.peak_rss_bytes,
            peak_device_bytes=record.peak_device_bytes,
        )
        for stage, record in records.items()
        if record is not None
    }


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


def _warnings(config: Run, reference: PredictionStore, found: Evaluation) -> list[str]:
    warnings = _precision(reference.manifest.quantization)
    warnings += [f"{use.name} gave no numbers: {use.reason}" for use in found.judges if use.reason]
    if found.sentences < 50:
        warnings.append(
            f"only {found.sentences} different sentences were spoken: intervals are wide, and "
            "differences between systems may be chance"
        )
    return warnings
