"""What a report says first: the student at one pass beside the teacher, guided and unguided."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import NamedTuple

from pipeline.metric_tables import short_count, significant
from pipeline.stage_costs import bytes_text
from stages.report_schema import Report, System

TIMES = "\N{NO-BREAK SPACE}×"
PERCENT = "\N{NO-BREAK SPACE}%"


class Fact(NamedTuple):
    """One card."""

    title: str
    """What it is about."""
    big: str
    """The number."""
    rest: str
    """What it is compared with."""


def glance(report: Report) -> str:
    """Return the cards of what was measured; those of other things are left out."""
    asked: tuple[Callable[[Report], Fact | None], ...] = (
        _words, _voice, _success, _distance, _frechet, _speed, _work, _memory,
    )  # fmt: skip
    facts = "".join(_card(fact) for fact in (ask(report) for ask in asked) if fact is not None)
    return f'<div class="grid facts">{facts}</div>' if facts else ""


def _card(fact: Fact) -> str:
    return (
        f'<div class="card fact"><h3>{escape(fact.title)}</h3><p class="big">{escape(fact.big)}</p>'
        f"<p>{escape(fact.rest)}</p></div>"
    )


def _of(report: Report, system: str, metric: str) -> float | None:
    """Return a value of the report, None where it was not measured."""
    found = getattr(report.systems.get(system, System()), metric)
    return found.value if found is not None else None


def _three(report: Report, metric: str) -> tuple[float, float, float] | None:
    """Return a value of the student and of the teacher, guided and unguided; None without one."""
    found = [_of(report, s, metric) for s in ("student", "teacher_guided", "teacher_unguided")]
    student, guided, unguided = found
    if student is None or guided is None or unguided is None:
        return None
    return student, guided, unguided


def _words(report: Report) -> Fact | None:
    if (found := _three(report, "wer")) is None:
        return None
    student, guided, unguided = found
    rest = f"WER; the guided teacher {guided:.3f}, unguided {unguided:.3f}"
    return Fact("Words the student gets wrong", f"{student:.3f}", rest)


def _voice(report: Report) -> Fact | None:
    if (found := _three(report, "speaker_similarity")) is None:
        return None
    student, guided, unguided = found
    rest = f"similarity to the recordings; guided {guided:.3f}, unguided {unguided:.3f}"
    return Fact("Voice of the student", f"{student:.3f}", rest)


def _success(report: Report) -> Fact | None:
    if (found := _three(report, "success")) is None:
        return None
    student, guided, unguided = (f"{100 * value:.0f}{PERCENT}" for value in found)
    rest = f"ended, heard, of plausible duration; guided {guided}, unguided {unguided}"
    length, looped = (_of(report, "student", m) for m in ("duration_ratio", "looped"))
    if length is not None and looped is not None:
        rest += (
            f"; {length:.2f} as long as the recordings, {100 * looped:.0f}{PERCENT} end in loops"
        )
    return Fact("Rollouts that succeed", student, rest)


def _distance(report: Report) -> Fact | None:
    metric, unit = ("paired_mse", "MSE") if report.images else ("paired_kl", "KL")
    student, unguided = (_of(report, s, metric) for s in ("student", "teacher_unguided"))
    if student is None or unguided is None or unguided == 0:
        return None
    rest = (
        f"of the unguided teacher's: {unit} {significant(student)} against {significant(unguided)}"
    )
    return Fact("Distance to the guided teacher", f"{100 * student / unguided:.0f}{PERCENT}", rest)


def _frechet(report: Report) -> Fact | None:
    student, guided = (_of(report, system, "frechet") for system in ("student", "teacher_guided"))
    if student is None or guided is None or guided == 0:
        return None
    rest = (
        f"of the guided teacher's, to the reference images: {significant(student)} against "
        f"{significant(guided)}"
    )
    return Fact("Fréchet distance", f"{student / guided:.2f}{TIMES}", rest)


def _speed(report: Report) -> Fact | None:
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
    return Fact("Speed of the student", f"{guided / student:.2f}{TIMES}", rest)


def _work(report: Report) -> Fact | None:
    metric = "total_flops_per_timestep"
    student, guided = (_of(report, system, metric) for system in ("student", "teacher_guided"))
    if student is None or guided is None or guided == 0:
        return None
    now, was = short_count(student), short_count(guided)
    rest = f"of guided: {now} FLOPs per timestep in all passes, were {was}"
    sizes = [_of(report, system, "parameters") for system in ("student", "teacher_guided")]
    if sizes[0] is not None and sizes[1] is not None:
        rest += f"; {short_count(sizes[0])} parameters, were {short_count(sizes[1])}"
    return Fact("Work of the student", f"{student / guided:.2f}{TIMES}", rest)


def _memory(report: Report) -> Fact | None:
    one, two = report.stages.get("rollout"), report.stages.get("train")
    two = two or next((c for n, c in report.stages.items() if n.startswith("train")), None)
    if one is None or two is None:
        return None
    big = f"{bytes_text(one.peak_rss_bytes)} | {bytes_text(two.peak_rss_bytes)}"
    return Fact("Peak memory, stage one | two", big, "teacher alone | student alone")
