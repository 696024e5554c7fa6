"""The page of an evaluation: one HTML file that needs nothing beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from string import Template

import soundfile
from pydantic import JsonValue, ValidationError

from pipeline import image_report
from pipeline.embedding import data_address, named_file
from pipeline.figures import bar_rows, interval_rows, line_plot
from pipeline.metric_tables import (
    MAIN_METRICS,
    METRICS,
    SPEECH_METRICS,
    comparison_table,
    html_table,
    metric_table,
    preference_table,
    rating_table,
    significant,
    system_colour,
    system_dot,
    system_label,
)
from stages.errors import UserError
from stages.publish import replace_file
from stages.report_schema import AudioClip, AudioSample, Images, Metric, Report, System
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
        raise UserError(f"{source} is not a report of this version: {error}") from None


def render(report: Report, folder: Path, heard: Tally | None = None) -> str:
    """Return the page; `folder` holds the wav files that the report names."""
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{report.run} · foretell"),
        style=Path(__file__).with_name("report.css").read_text(encoding="utf-8"),
        run=escape(report.run),
        lead=escape(image_report.lead(report) if report.images else _lead(report)),
        footer=escape(image_report.FOOTER if report.images else FOOTER),
        sections="\n".join(filter(None, _sections(report, folder, heard))),
    )


def _sections(report: Report, folder: Path, heard: Tally | None) -> Iterator[str]:
    yield _warnings(report)
    yield _section("At a glance", "", _glance(report))
    if report.images is None:
        yield from _of_speech(report, folder, heard)
    else:
        yield from _of_images(report, report.images, folder)
    yield _section("Cost of the stages", STAGES_HINT, _stages(report))
    yield _section("Loss curves", LOSSES_HINT, _losses(report))
    yield _section("Provenance", "", _provenance(report))


def _of_speech(report: Report, folder: Path, heard: Tally | None) -> Iterator[str]:
    systems = _intervals(report, "wer", "Word error rate") + metric_table(report, MAIN_METRICS)
    yield _section("Systems", SYSTEMS_HINT + _rtf_hint(report), systems)
    yield _section("Listeners", *_listeners(report, heard))
    yield _section("Paired differences", COMPARISONS_HINT, comparison_table(report))
    yield _section("Duration and repetition", SPEECH_HINT, metric_table(report, SPEECH_METRICS))
    yield _section("Listen", _listen_hint(report), _audio(report, folder))


def _of_images(report: Report, images: Images, folder: Path) -> Iterator[str]:
    error = _intervals(report, "paired_mse", "Error to the guided teacher's images")
    systems = error + image_report.system_table(report, images)
    yield _section("Systems", image_report.systems_hint(images), systems)
    grid = image_report.image_grid(report, images, folder)
    yield _section("Images", image_report.GRID_HINT, grid)
    yield _section("Paired differences", COMPARISONS_HINT, comparison_table(report))
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
STAGES_HINT = (
    "Every stage is a process of its own: teacher and student never share memory. Peak memory is "
    "summed over the processes of a stage that ran together, time over its attempts."
)
LOSSES_HINT = (
    "Means over the steps between two lines of the training log; the legend shows the last value."
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
    return f"<section><h2>{escape(title)}</h2>{explained}{content}</section>"


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


def _glance(report: Report) -> str:
    asked = (_words, _distance, _frechet, _speed, _memory)
    cards = (
        f'<div class="card fact"><h3>{escape(title)}</h3><p class="big">{escape(big)}</p>'
        f"<p>{escape(rest)}</p></div>"
        for title, big, rest in filter(None, (fact(report) for fact in asked))
    )
    facts = "".join(cards)
    return f'<div class="grid">{facts}</div>' if facts else ""


def _of(report: Report, system: str, metric: str) -> float | None:
    """Return a value of the report, None where it was not measured."""
    found = getattr(report.systems.get(system, System()), metric)
    return found.value if found is not None else None


def _words(report: Report) -> tuple[str, str, str] | None:
    student, guided = _of(report, "student", "wer"), _of(report, "teacher_guided", "wer")
    unguided = _of(report, "teacher_unguided", "wer")
    if student is None or guided is None or unguided is None:
        return None
    rest = f"WER; the guided teacher {guided:.3f}, unguided {unguided:.3f}"
    return "Words the student gets wrong", f"{student:.3f}", rest


def _distance(report: Report) -> tuple[str, str, str] | None:
    metric, unit = ("paired_mse", "MSE") if report.images else ("paired_kl", "KL")
    student, unguided = (_of(report, s, metric) for s in ("student", "teacher_unguided"))
    if student is None or unguided is None or unguided == 0:
        return None
    rest = (
        f"of the unguided teacher's: {unit} {significant(student)} against {significant(unguided)}"
    )
    return (
        "Distance to the guided teacher",
        f"{100 * student / unguided:.0f}\N{NO-BREAK SPACE}%",
        rest,
    )


def _frechet(report: Report) -> tuple[str, str, str] | None:
    student, guided = (_of(report, system, "frechet") for system in ("student", "teacher_guided"))
    if student is None or guided is None or guided == 0:
        return None
    rest = (
        f"of the guided teacher's, to the reference images: {significant(student)} against "
        f"{significant(guided)}"
    )
    return "Fréchet distance", f"{student / guided:.2f}\N{NO-BREAK SPACE}×", rest


def _speed(report: Report) -> tuple[str, str, str] | None:
    metric = "seconds_per_image" if report.images else "rtf"
    student, guided = (_of(report, system, metric) for system in ("student", "teacher_guided"))
    if student is None or guided is None or student == 0:
        return None
    now, was = significant(student), significant(guided)
    rest = (
        f"of guided sampling: {now} s per image, was {was} s"
        if report.images
        else f"of guided decoding: real-time factor {now}, was {was}"
    )
    return "Speed of the student", f"{guided / student:.2f}\N{NO-BREAK SPACE}×", rest


def _memory(report: Report) -> tuple[str, str, str] | None:
    one, two = report.stages.get("rollout"), report.stages.get("train")
    two = two or next((c for n, c in report.stages.items() if n.startswith("train")), None)
    if one is None or two is None:
        return None
    big = f"{_bytes(one.peak_rss_bytes)} | {_bytes(two.peak_rss_bytes)}"
    return "Peak memory, stage one | two", big, "teacher alone | student alone"


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
    recogniser = next((j.name for j in report.judges if "wer" in j.measures and not j.reason), None)
    heard = f" Below each clip: what {recogniser} heard." if recogniser else ""
    return f"The same sentences by every system.{heard}"


def _audio(report: Report, folder: Path) -> str:
    return "".join(_sample(sample, report, folder) for sample in report.audio)


def _sample(sample: AudioSample, report: Report, folder: Path) -> str:
    speaker = f" · {sample.speaker}" if sample.speaker else ""
    known = [name for name in report.systems if name in sample.clips]
    clips = "".join(_clip(name, sample.clips[name], report, folder) for name in known)
    return (
        f'<article class="card sample"><h3>{escape(sample.text)}</h3>'
        f'<p class="id">{escape(sample.sample_id + speaker)}</p>'
        f'<div class="grid clips">{clips}</div></article>'
    )


def _clip(system: str, clip: AudioClip, report: Report, folder: Path) -> str:
    heard = "" if clip.heard is None else f"<p>{_heard(clip)}</p>"
    return (
        f'<div class="clip"><h4>{system_dot(system, report)}{escape(system_label(system))}</h4>'
        f'<audio controls preload="metadata" src="{_embedded(folder, clip.file)}"></audio>'
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


def _stages(report: Report) -> str:
    if not report.stages:
        return ""
    costs = [(name.replace(":", " "), cost) for name, cost in report.stages.items()]
    memory = bar_rows(
        [(name, 1, Metric(value=cost.peak_rss_bytes)) for name, cost in costs], _bytes
    )
    time = bar_rows([(name, 3, Metric(value=cost.wall_s)) for name, cost in costs], _duration)
    figures = [("Peak memory", memory), ("Time", time)]
    device = [(n, 4, Metric(value=c.peak_device_bytes)) for n, c in costs if c.peak_device_bytes]
    if device:
        figures.insert(1, ("Peak accelerator memory", bar_rows(device, _bytes)))
    cards = (f'<div class="card"><h3>{title}</h3>{figure}</div>' for title, figure in figures)
    return f'<div class="grid wide">{"".join(cards)}</div>'


def _bytes(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.{2 if unit == 'GiB' else 0}f}\N{NO-BREAK SPACE}{unit}"
    return f"{value:.0f}\N{NO-BREAK SPACE}B"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _losses(report: Report) -> str:
    cards = (
        f'<div class="card"><h3>{escape(name)}</h3>{line_plot(curves)}</div>'
        for name, curves in report.losses.items()
    )
    return f'<div class="grid wide">{"".join(cards)}</div>' if report.losses else ""


def _provenance(report: Report) -> str:
    parts = {
        "Fingerprints": dict(report.fingerprints),
        "Machine": dict(report.environment),
        "Settings": dict(_flat(report.settings)) if report.settings else {},
    }
    return "".join(
        f"<details><summary>{title}</summary>"
        f"{html_table('<th>name</th><th>value</th>', _value_rows(values))}</details>"
        for title, values in parts.items()
        if values
    )


def _value_rows(values: dict[str, str]) -> str:
    return "".join(
        f'<tr><th>{escape(name)}</th><td class="text">{escape(value)}</td></tr>'
        for name, value in values.items()
    )


def _flat(value: JsonValue, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested settings under dotted names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
