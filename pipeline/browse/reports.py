"""Runs beside a store: what their evaluations found, and the clips and pictures they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.browse.training import TrainingLogs
from pipeline.embedding import named_file
from pipeline.image_report import REFERENCE
from pipeline.metric_tables import MAIN_METRICS, Shown, system_colour, system_label
from pipeline.report import read_report
from stages.errors import UserError
from stages.report_schema import AudioSample, ImageSample, Metric, Report

Document = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    name: str
    """What it is called on the page, unique there."""
    path: Path
    asked_for: bool = True
    """Whether a person named it; the folder around a store may be that of no run."""

    @cached_property
    def logs(self) -> TrainingLogs:
        """What its models are trained with."""
        return TrainingLogs(self.path)

    @property
    def is_shown(self) -> bool:
        """Whether there is anything to show by now, or a person expects it."""
        return self.asked_for or self.is_evaluated or bool(self.logs.paths())

    @property
    def report_stamp(self) -> str | None:
        """What tells the report from an earlier one; None where there is none."""
        try:
            found = (self.report_folder / "report.json").stat()
        except OSError:
            return None
        return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"

    @property
    def report_folder(self) -> Path:
        """Where an evaluation leaves what it found."""
        return self.path / "report"

    @property
    def is_evaluated(self) -> bool:
        """Whether there is a report by now."""
        return (self.report_folder / "report.json").is_file()

    @property
    def page(self) -> Path | None:
        """The report for people; None where there is none."""
        found = self.report_folder / "report.html"
        return found if found.is_file() else None

    def report(self) -> Report:
        """What the last evaluation found; raises `UserError`."""
        return read_report(self.report_folder)

    def clip(self, item: int, system: str) -> Path:
        """The file of what a system said of a sample; raises `UserError`."""
        clips = _item(self.report().audio, item).clips
        if system not in clips:
            raise UserError(f"sample {item} has no clip of {system!r}: it has {sorted(clips)}")
        return named_file(self.report_folder, clips[system].file, "clip")

    def picture(self, item: int, system: str) -> Path:
        """The file of what a system drew of a sample; raises `UserError`."""
        images = self.report().images
        files = _pictures(_item(() if images is None else images.samples, item))
        if system not in files:
            raise UserError(f"sample {item} has no picture of {system!r}: it has {sorted(files)}")
        return named_file(self.report_folder, files[system], "picture")


def run_folders(paths: Sequence[Path], around_store: Path | None = None) -> list[RunFolder]:
    """Name the folders of runs, each once; a name that is there twice gets a number behind it.

    `around_store`, which comes first, may be that of no run.
    """
    named = [path.resolve() for path in paths]
    around = None if around_store is None else around_store.resolve()
    runs: list[RunFolder] = []
    for path in dict.fromkeys([*([] if around is None else [around]), *named]):
        taken = {run.name for run in runs}
        names = (path.name if n == 1 else f"{path.name} ({n})" for n in range(1, len(paths) + 3))
        name = next(name for name in names if name not in taken)
        runs.append(RunFolder(name, path, path in named))
    return runs


def describe_run(run: RunFolder) -> Document:
    """Return what a page shows of a run; raises `UserError` where its report cannot be read."""
    stamp = run.report_stamp
    document: Document = {"name": run.name, "evaluated": stamp is not None, "report": stamp}
    if stamp is None:
        return document
    report = run.report()
    systems = report.systems
    shown = [name for name in MAIN_METRICS if any(getattr(s, name, None) for s in systems.values())]
    return document | {
        "run": report.run,
        "samples": report.samples,
        "sentences": report.sentences,
        "has_page": run.page is not None,
        "warnings": list(report.warnings),
        "metrics": [_named(MAIN_METRICS[name]) for name in shown],
        "systems": [
            {
                "name": name,
                "label": system_label(name),
                "colour": system_colour(name, report),
                "values": [_value(getattr(system, metric), metric) for metric in shown],
            }
            for name, system in systems.items()
        ],
        "audio": [_audio(sample, report) for sample in report.audio],
        "images": [] if report.images is None else list(map(_image, report.images.samples)),
    }


def _named(metric: Shown) -> Document:
    return {"title": metric.title, "hint": metric.hint, "group": metric.group}


def _value(found: Metric | None, metric: str) -> Document | None:
    if found is None:
        return None
    show = MAIN_METRICS[metric].show
    ends = None if found.low is None or found.high is None else [show(found.low), show(found.high)]
    return {"value": show(found.value), "interval": ends}


def _audio(sample: AudioSample, report: Report) -> Document:
    return {
        "sample_id": sample.sample_id,
        "text": sample.text,
        "speaker": sample.speaker,
        "clips": [
            {
                "system": name,
                "heard": sample.clips[name].heard,
                "edits": sample.clips[name].edits,
            }
            for name in report.systems
            if name in sample.clips
        ],
    }


def _image(sample: ImageSample) -> Document:
    return {
        "sample_id": sample.sample_id,
        "text": sample.text,
        "systems": list(_pictures(sample)),
    }


def _pictures(sample: ImageSample) -> dict[str, str]:
    first = {} if sample.reference is None else {REFERENCE: sample.reference}
    return first | sample.files


def _item(items: Sequence[Any], number: int) -> Any:
    if not 0 <= number < len(items):
        raise UserError(f"sample {number} is not in [0, {len(items)}): the report has no other")
    return items[number]
