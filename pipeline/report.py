"""The page of an evaluation: one HTML file that needs nothing beside it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from string import Template

import soundfile
from pydantic import JsonValue, ValidationError

from pipeline import image_report
from pipeline.embedding import data_address, named_file
from pipeline.figures import interval_rows
from pipeline.glance import glance
from pipeline.html_tables import html_table, row_head
from pipeline.metric_tables import (
    MAIN_METRICS,
    METRICS,
    SPEECH_METRICS,
    comparison_table,
    metric_table,
    preference_table,
    rating_table,
    seed_hint,
    system_colour,
    system_label,
    system_name,
)
from pipeline.report_charts import (
    CALIBRATION_HINT,
    DIVERGENCE_HINT,
    LOSSES_HINT,
    calibration_chart,
    divergence_charts,
    loss_charts,
    path_chart,
    path_hint,
)
from pipeline.stage_costs import STAGES_HINT, stage_costs
from stages.errors import UserError
from stages.publish import replace_file
from stages.report_schema import AudioClip, AudioSample, Images, Report
from stages.tally import Tally


def write_report(folder: Path, heard: Tally | None = None) -> Path:
    """Read `folder`/report.json and write `folder`/report.html; returns the path of the page.

    `heard` is what listeners answered. Raises `UserError` when report.json is missing or of another
    shape, or a wav file is missing.
    """
    page = folder / "report.html"
    replace_file(page, render(read_report(folder), folder, heard).encode())
    return page


def read_report(folder: Path) -> Report:
    """Read `folder`/report.json; raises `UserError` when it is missing or of another shape."""
    source = folder / "report.json"
    try:
        return Report.read(source)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist: run `foretell evaluate` first") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{source} is not a report of this version "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}): evaluate again, or read it "
            "with the release that wrote it"
        ) from None


def render(report: Report, folder: Path, heard: Tally | None = None) -> str:
    """Return the page; `folder` holds the wav files that the report names."""
    sections = "\n".join(filter(None, _sections(report, folder, heard)))
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{report.run} · foretell"),
        style=Path(__file__).with_name("report.css").read_text(encoding="utf-8"),
        run=escape(report.run),
        lead=escape(image_report.lead(report) if report.images else _lead(report)),
        footer=escape(image_report.FOOTER if report.images else FOOTER),
        contents=_contents(sections),
        sections=sections,
    )


def _sections(report: Report, folder: Path, heard: Tally | None) -> Iterator[str]:
    yield _section("Warnings", "", _warnings(report))
    yield _section("At a glance", "", glance(report))
    if report.images is None:
        yield from _of_speech(report, folder, heard)
    else:
        yield from _of_images(report, report.images, folder)
    yield _section("Cost of the stages", STAGES_HINT, stage_costs(report))
    yield _section("Loss curves", LOSSES_HINT, loss_charts(report))
    yield _section("Provenance", "", _provenance(report))


def _of_speech(report: Report, folder: Path, heard: Tally | None) -> Iterator[str]:
    table = metric_table(report, MAIN_METRICS, "Metrics of all systems")
    systems = _intervals(report, "wer", "Word error rate") + table
    yield _section("Systems", SYSTEMS_HINT + _rtf_hint(report), systems)
    yield _section("Listeners", *_listeners(report, heard))
    yield _section("Paired differences", COMPARISONS_HINT, comparison_table(report))
    yield _section("Where systems differ", DIVERGENCE_HINT, divergence_charts(report))
    yield _section("Calibration", CALIBRATION_HINT, calibration_chart(report))
    clips = metric_table(report, SPEECH_METRICS, "What the clips of all systems are like")
    yield _section("Duration and repetition", SPEECH_HINT, clips)
    yield _section("Listen", _listen_hint(report), _audio(report, folder))


def _of_images(report: Report, images: Images, folder: Path) -> Iterator[str]:
    error = _intervals(report, "paired_mse", "Error to the guided teacher's images")
    systems = error + image_report.system_table(report, images)
    yield _section("Systems", image_report.systems_hint(images), systems)
    grid = image_report.image_grid(report, images, folder)
    yield _section("Images", image_report.grid_hint(report), grid)
    yield _section("Paired differences", COMPARISONS_HINT, comparison_table(report))
    if images.path is not None:
        chart = path_chart(report, images.path)
        yield _section("Where systems differ", path_hint(images.path), chart)
    others = image_report.other_steps(report, images)
    yield _section("Other numbers of solver steps", image_report.STEPS_HINT, others)


SYSTEMS_HINT = (
    "All systems speak the same held-out sentences and draw with the same random numbers. The "
    "codec copy is the recording through the audio codec, a ceiling for whatever speaks its codes."
)
FOOTER = (
    "Intervals are 95\N{NO-BREAK SPACE}% percentile bootstrap intervals over sentences; all clips "
    "of a sentence are drawn together. Differences are paired: both systems are resampled with the "
    "same sentences. The numbers of this page are in report.json beside it."
)
COMPARISONS_HINT = "Where the interval leaves out zero, the difference is more than chance."
SPEECH_HINT = (
    "Repetition counts frames of the audio codec that are equal in every code, within one clip; "
    "the codec copy shows how much of it speech itself has. Quantiles are those of these samples."
)


def _rtf_hint(report: Report) -> str:
    """Say at which batch size real-time factors were taken, where the settings tell."""
    evaluation = report.settings.get("evaluate")
    if not isinstance(evaluation, dict) or "batch_size" not in evaluation:
        return ""
    return (
        " The real-time factor is the seconds of generation per second of audio made, audio codec "
        f"left out, in batches of {evaluation['batch_size']}."
    )


def _section(title: str, hint: str, content: str) -> str:
    if not content:
        return ""
    explained = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    place, title = title.lower().replace(" ", "-"), escape(title)
    return (
        f'<section id="{place}" aria-label="{title}"><h2>{title}</h2>{explained}{content}</section>'
    )


def _contents(sections: str) -> str:
    """Return the links to the sections of a page."""
    found = re.findall('<section id="([^"]+)" aria-label="([^"]+)">', sections)
    items = "".join(f'<li><a href="#{place}">{title}</a></li>' for place, title in found)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>' if found else ""


def _lead(report: Report) -> str:
    ran = [judge.name for judge in report.judges if judge.reason is None]
    judged = f"judged by {', '.join(ran)}" if ran else "with no judge of the audio"
    return f"{report.samples} held-out samples of {report.sentences} sentences, {judged}."


def _warnings(report: Report) -> str:
    told = "\n".join(report.warnings)
    missing = [j for j in report.judges if j.reason is not None and j.reason not in told]
    items = [*report.warnings, *(f"No {', '.join(j.measures)}: {j.reason}" for j in missing)]
    if not items:
        return ""
    return f'<ul class="warnings">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def _intervals(report: Report, metric: str, title: str) -> str:
    """Draw one metric of all systems with its intervals."""
    rows = [
        (system_label(name), system_colour(name, report), found)
        for name, system in report.systems.items()
        if (found := getattr(system, metric)) is not None
    ]
    if not rows:
        return ""
    figure = interval_rows(rows, METRICS[metric].show)
    return f'<div class="card" style="margin-bottom:12px"><h3>{escape(title)}</h3>{figure}</div>'


def _listeners(report: Report, heard: Tally | None) -> tuple[str, str]:
    """Return what to know of the answers of listeners, and their tables."""
    if heard is None:
        return "", ""
    hint = (
        f"{heard.answers} answers of {len(heard.listeners)} listeners who did not know whom they "
        "heard. Intervals of opinion scores draw sentences and listeners; those of shares are "
        "exact for independent answers, among the answers that found a difference."
    )
    return hint, rating_table(heard, report) + preference_table(heard, report)


def _listen_hint(report: Report) -> str:
    seeded = seed_hint(report)
    recogniser = next((j.name for j in report.judges if "wer" in j.measures and not j.reason), None)
    heard = f" Below each clip: what {recogniser} heard." if recogniser else ""
    return f"The same sentences by every system{seeded}.{heard}"


def _audio(report: Report, folder: Path) -> str:
    return "".join(_sample(sample, report, folder) for sample in report.audio)


def _sample(sample: AudioSample, report: Report, folder: Path) -> str:
    speaker = f" · {sample.speaker}" if sample.speaker else ""
    known = [name for name in report.systems if name in sample.clips]
    clips = "".join(_clip(name, sample.text, sample.clips[name], report, folder) for name in known)
    return (
        f'<article class="card sample"><h3>{escape(sample.text)}</h3>'
        f'<p class="id">{escape(sample.sample_id + speaker)}</p>'
        f'<div class="grid clips">{clips}</div></article>'
    )


def _clip(system: str, text: str, clip: AudioClip, report: Report, folder: Path) -> str:
    heard = "" if clip.heard is None else f"<p>{_heard(clip)}</p>"
    label = escape(f"{system_label(system)}: {text}")
    return (
        f'<div class="clip"><h4>{system_name(system, report)}</h4>'
        f'<audio controls preload="metadata" aria-label="{label}" '
        f'src="{_embedded(folder, clip.file)}"></audio>'
        f"{heard}</div>"
    )


def _heard(clip: AudioClip) -> str:
    heard = f"<q>{escape(clip.heard)}</q>" if clip.heard else "nothing heard"
    if clip.edits is None:
        return heard
    counted = {0: "no error", 1: "1 error"}.get(clip.edits, f"{clip.edits} errors")
    return f"{heard} · {counted}"


def _embedded(folder: Path, file: str) -> str:
    """Return a wav file as a data address: 16-bit FLAC, lossless and about half the size."""
    waveform, rate_hz = soundfile.read(named_file(folder, file, "clip"), dtype="int16")
    packed = io.BytesIO()
    soundfile.write(packed, waveform, rate_hz, format="FLAC", subtype="PCM_16")
    return data_address("audio/flac", packed.getvalue())


def _provenance(report: Report) -> str:
    parts = {
        "Fingerprints": dict(report.fingerprints),
        "Machine": dict(report.environment),
        "Settings": dict(_flat(report.settings)) if report.settings else {},
    }
    return "".join(
        f"<details><summary>{title}</summary>"
        f"{html_table(title, ['name', 'value'], _value_rows(values))}</details>"
        for title, values in parts.items()
        if values
    )


def _value_rows(values: dict[str, str]) -> Iterator[str]:
    for name, value in values.items():
        yield f'{row_head(name)}<td class="text">{escape(value)}</td>'


def _flat(value: JsonValue, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested settings under dotted names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
