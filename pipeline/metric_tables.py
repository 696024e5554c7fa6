"""How the metrics of a report are called, written and put into tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from html import escape

from pipeline.figures import colour
from pipeline.html_tables import STACKED, grouped_table, html_table, row_head
from stages.report_schema import SYSTEMS, Comparison, Metric, Report, System
from stages.tally import Tally

LABELS = {
    "recording": "recording",
    "reference": "reference images",
    "codec_copy": "codec copy",
    "teacher_guided": "teacher, guided",
    "teacher_unguided": "teacher, unguided",
    "student": "student",
}

ROUNDING = 1e-7
"""Divergences below this are those of a system from itself, in float32."""


@dataclass(frozen=True)
class Shown:
    """How a metric is shown."""

    title: str
    """What it is called."""
    hint: str
    """What it is, and which way is better."""
    show: Callable[[float], str]
    """Writes a value."""
    group: str = ""
    """Under which heading of its table it stands."""


def system_label(name: str) -> str:
    """Return what a system is called on the page."""
    return LABELS.get(name) or f"student {name.removeprefix('student_')}"


def system_colour(name: str, report: Report) -> int:
    """Return the colour of a system's marks: the same wherever it appears."""
    named = [*SYSTEMS, *report.__pydantic_extra__]
    # The recording is no system of the report; it looks like its copy.
    return named.index(name) if name in named else 0


def system_dot(name: str, report: Report) -> str:
    """Return the coloured dot before a system's name."""
    return f'<span class="dot" {colour(system_colour(name, report))}></span>'


def seed_hint(report: Report) -> str:
    """Say with which seed the samples were drawn, where the settings tell."""
    evaluation = report.settings.get("evaluate")
    seed = evaluation.get("seed") if isinstance(evaluation, dict) else None
    return "" if seed is None else f", drawn with seed {seed}"


def decimals(count: int) -> Callable[[float], str]:
    """Return a function that writes a number with a fixed count of decimals."""
    return lambda value: f"{value:.{count}f}".replace("-", "−")


def short_count(value: float) -> str:
    """Write a count with a unit, as in 4.41 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:g}"


def significant(value: float) -> str:
    """Write a number with three significant digits; what is left of a zero by rounding is 0."""
    if abs(value) < ROUNDING:
        return "0"
    return f"{value:.3g}".replace("-", "−")


def _grouped(groups: Mapping[str, Mapping[str, Shown]]) -> dict[str, Shown]:
    return {
        name: replace(shown, group=group)
        for group, metrics in groups.items()
        for name, shown in metrics.items()
    }


MAIN_METRICS = _grouped(
    {
        "Speech": {
            "wer": Shown("WER", "word error rate; lower is better", decimals(3)),
            "cer": Shown("CER", "character error rate; lower is better", decimals(3)),
            "wer_second": Shown("WER, second judge", "by the second recogniser", decimals(3)),
            "cer_second": Shown("CER, second judge", "by the second recogniser", decimals(3)),
            "mos": Shown("MOS, predicted", "1 to 5; higher is better", decimals(2)),
            "speaker_similarity": Shown(
                "Speaker similarity", "to the recording; higher", decimals(3)
            ),
            "speaker_contrast": Shown(
                "Other speakers", "similarity to the others; lower", decimals(3)
            ),
            "success": Shown("Success", "ended, heard, of plausible duration; higher", decimals(3)),
        },
        "Images": {
            "frechet": Shown("Fréchet distance", "to the reference images; lower", significant),
            "frechet_to_guided": Shown(
                "Fréchet to guided", "to the guided teacher's; lower", significant
            ),
            "accuracy": Shown("Accuracy", "share the judge recognises; higher", decimals(3)),
            "log_probability": Shown(
                "Log-probability", "of the condition, nats; higher", decimals(3)
            ),
            "class_spread": Shown(
                "Class spread", "within a class; near the reference's", decimals(3)
            ),
        },
        "Against the guided teacher": {
            "paired_kl": Shown(
                "KL to guided", "nats per code, on the same codes; lower", significant
            ),
            "paired_mse": Shown(
                "MSE to guided", "final latents, from the same noise; lower", significant
            ),
            "calibration_error": Shown(
                "Calibration error", "expected, to the guided teacher; lower", significant
            ),
            "agreement": Shown("Agreement", "same most probable code; higher", decimals(3)),
        },
        "Time": {
            "rtf": Shown("Real-time factor", "generation per second of audio; lower", significant),
            "rtf_single": Shown(
                "Real-time factor, single", "each sample alone; lower", significant
            ),
            "seconds_per_image": Shown(
                "Time per image", "seconds, decoder left out; lower", significant
            ),
        },
        "Size and work": {
            "parameters": Shown("Parameters", "of the model", short_count),
            "active_parameters": Shown("Active", "parameters that a position visits", short_count),
            "flops_per_timestep": Shown(
                "FLOPs", "per timestep and pass, without attention", short_count
            ),
            "dense_flops_per_timestep": Shown(
                "FLOPs, dense", "were all experts one layer", short_count
            ),
            "total_flops_per_timestep": Shown(
                "FLOPs, all passes", "per timestep; lower", short_count
            ),
            "passes": Shown("Passes", "forward passes per step", decimals(0)),
        },
    }
)
"""What systems are compared by, in the order of the table."""

SPEECH_METRICS = _grouped(
    {
        "Endings": {
            "ended": Shown("Ended", "share that stopped by itself; higher", decimals(3)),
            "silent": Shown(
                "Silent", "share below −60 dBFS, empty or not finite; lower", decimals(3)
            ),
            "looped": Shown("Looped tail", "share that ends in a loop; lower", decimals(3)),
        },
        "Duration": {
            "duration_s": Shown("Duration", "mean, in seconds", decimals(2)),
            "duration_p5_s": Shown("Duration, shortest 5 %", "up to, in seconds", decimals(2)),
            "duration_median_s": Shown("Duration, median", "in seconds", decimals(2)),
            "duration_p95_s": Shown("Duration, longest 5 %", "from, in seconds", decimals(2)),
            "duration_ratio": Shown(
                "To the recordings", "all seconds per all; near 1", decimals(2)
            ),
            "duration_ratio_mean": Shown(
                "To the recording", "mean of the ratios; near 1", decimals(2)
            ),
            "duration_ratio_p5": Shown(
                "To the recording, 5 %", "a twentieth is shorter", decimals(2)
            ),
            "duration_ratio_median": Shown("To the recording, median", "near 1", decimals(2)),
            "duration_ratio_p95": Shown(
                "To the recording, 95 %", "a twentieth is longer", decimals(2)
            ),
        },
        "Repetition": {
            "longest_run_frames": Shown("Longest run", "equal frames in a row, mean", decimals(2)),
            "repeated_pairs": Shown(
                "Repeated pairs", "of frames, share; near the copy's", decimals(3)
            ),
            "repeated_fours": Shown(
                "Repeated fours", "of frames, share; near the copy's", decimals(3)
            ),
            "repetition": Shown("Repetition", "words said again, per word; lower", decimals(3)),
        },
    }
)
"""What the clips are like, in the order of the table."""

METRICS = MAIN_METRICS | SPEECH_METRICS
"""All metrics of a report."""


def metric_table(
    report: Report,
    metrics: Mapping[str, Shown],
    caption: str,
    systems: Mapping[str, System] | None = None,
) -> str:
    """Return the table of metrics × systems, without the metrics that nobody measured.

    `systems` are others than the report's own.
    """
    systems = report.systems if systems is None else systems
    measured = [m for m in metrics if any(getattr(s, m) is not None for s in systems.values())]
    if not measured:
        return ""
    rows: dict[str, list[str]] = defaultdict(list)
    for metric in measured:
        rows[METRICS[metric].group].append(_metric_row(metric, systems, report))
    columns = ["metric", *(system_name(name, report) for name in systems)]
    return grouped_table(caption, columns, rows, STACKED)


def _metric_row(metric: str, systems: Mapping[str, System], report: Report) -> str:
    """Return the cells of a metric; each names its system, for where its column has no head."""
    shown = METRICS[metric]
    cells = (
        metric_cell(
            getattr(system, metric),
            shown.show,
            f' data-of="{escape(system_label(name))}" {colour(system_colour(name, report))}',
        )
        for name, system in systems.items()
    )
    return row_head(shown.title, shown.hint) + "".join(cells)


def system_name(name: str, report: Report) -> str:
    """Return the HTML of a system's name with its dot."""
    return f"{system_dot(name, report)}{escape(system_label(name))}"


def metric_cell(metric: Metric | None, show: Callable[[float], str], attributes: str = "") -> str:
    """Return the cell of a number with its interval."""
    if metric is None:
        return f'<td class="absent"{attributes}>–</td>'
    return f"<td{attributes}>{escape(show(metric.value))}{_interval(metric, show)}</td>"


def _interval(metric: Metric, show: Callable[[float], str]) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return f'<span class="interval">{escape(show(metric.low))} … {escape(show(metric.high))}</span>'


def comparison_table(report: Report) -> str:
    """Return the table of paired differences."""
    if not report.comparisons:
        return ""
    rows: dict[str, list[str]] = defaultdict(list)
    for each in report.comparisons:
        pair = f"{system_label(each.system)} minus {system_label(each.against)}"
        rows[pair].append(_comparison_row(each))
    return grouped_table("Paired differences", ["metric", "difference", "differs"], rows)


def _comparison_row(comparison: Comparison) -> str:
    shown, difference = METRICS[comparison.metric], comparison.difference
    low, high = difference.low, difference.high
    differs = "–" if low is None or high is None else "yes" if low > 0 or high < 0 else "no"
    return f"{row_head(shown.title)}{metric_cell(difference, shown.show)}<td>{differs}</td>"


def rating_table(heard: Tally, report: Report) -> str:
    """Return the table of mean opinion scores of listeners, or nothing without any."""
    if not heard.ratings:
        return ""
    rows = (
        f"{row_head(system_label(name), mark=system_dot(name, report))}"
        f"{metric_cell(rating.mos, decimals(2))}<td>{rating.answers}</td>"
        f"<td>{rating.listeners}</td>"
        for name, rating in heard.ratings.items()
    )
    columns = ["system", "MOS, 1 to 5", "answers", "listeners"]
    return html_table("Mean opinion scores of listeners", columns, rows)


def preference_table(heard: Tally, report: Report) -> str:
    """Return the table of what listeners preferred, or nothing without any."""
    if not heard.preferences:
        return ""
    rows = (
        row_head(
            system_label(pair.system),
            f"against {system_label(pair.against)}",
            system_dot(pair.system, report),
        )
        + f"<td>{pair.preferred}</td><td>{pair.rejected}</td><td>{pair.equal}</td>"
        f"{metric_cell(pair.share, decimals(3))}<td>{significant(pair.p_value)}</td>"
        for pair in heard.preferences
    )
    columns = ["systems", "preferred", "the other", "no difference", "share preferred"]
    return html_table("What listeners preferred", [*columns, "sign test, p"], rows)


MARKDOWN_METRICS = (
    "wer", "paired_kl", "agreement", "mos", "rtf",
    "paired_mse", "frechet", "accuracy", "seconds_per_image",
    "passes", "parameters",
)  # fmt: skip


def markdown_table(report: Report) -> str:
    """Return the main metrics as a Markdown table: one row per system, intervals in brackets."""
    names = [m for m in MARKDOWN_METRICS if any(getattr(s, m) for s in report.systems.values())]
    head = ["system", *(METRICS[name].title for name in names)]
    rows = [
        [system_label(system), *(_markdown_cell(values, name) for name in names)]
        for system, values in report.systems.items()
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _markdown_cell(system: System, name: str) -> str:
    metric, show = getattr(system, name), METRICS[name].show
    if metric is None:
        return "–"
    if metric.low is None or metric.high is None:
        return show(metric.value)
    return f"{show(metric.value)} [{show(metric.low)}, {show(metric.high)}]"
