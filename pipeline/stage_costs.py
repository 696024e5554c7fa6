"""What the stages of a run cost: bars of time and memory, and a table of all of it."""

from __future__ import annotations

from pipeline.figures import bar_rows
from pipeline.html_tables import html_table, row_head
from pipeline.metric_tables import significant
from stages.report_schema import Metric, Report, StageCost

STAGES_HINT = (
    "Every stage is a process of its own, and its peak is that which the system counted for this "
    "process: teacher and student never share memory. Peak memory is summed over the processes of "
    "a stage that ran together, time over its attempts and the jobs of an array. The rate is what "
    "was made per second of that time, loading and writing included; bytes are those left on disk, "
    "checkpoints included."
)
MODELS = {
    "prepare": "audio codec",
    "fit": "teacher",
    "rollout": "teacher",
    "train": "student",
    "evaluate": "one system at a time",
}
"""Stage → the models that its process loads."""
IMAGE_MODELS = MODELS | {
    "prepare": "encoders",
    "evaluate": "one system at a time, then the decoder",
}


def stage_costs(report: Report) -> str:
    """Return the bars and the table of what the stages took."""
    if not report.stages:
        return ""
    return _bars(report) + _table(report)


def _bars(report: Report) -> str:
    costs = [(name.replace(":", " "), cost) for name, cost in report.stages.items()]
    memory = bar_rows([(n, 1, Metric(value=c.peak_rss_bytes)) for n, c in costs], bytes_text)
    time = bar_rows([(n, 3, Metric(value=c.wall_s)) for n, c in costs], duration_text)
    figures = [("Peak memory", memory), ("Time", time)]
    device = [(n, 4, Metric(value=c.peak_device_bytes)) for n, c in costs if c.peak_device_bytes]
    if device:
        figures.insert(1, ("Peak accelerator memory", bar_rows(device, bytes_text)))
    cards = (f'<div class="card"><h3>{title}</h3>{figure}</div>' for title, figure in figures)
    return f'<div class="grid wide">{"".join(cards)}</div>'


def _table(report: Report) -> str:
    models = MODELS if report.images is None else IMAGE_MODELS
    columns = ["stage", "in memory", "time", "peak memory", "accelerator", "written", "rate"]
    rows = (
        f"{row_head(name.replace(':', ' '))}<td>{models.get(name.partition(':')[0], '–')}</td>"
        f"<td>{duration_text(cost.wall_s)}</td><td>{bytes_text(cost.peak_rss_bytes)}</td>"
        f"<td>{bytes_text(cost.peak_device_bytes) if cost.peak_device_bytes else '–'}</td>"
        f"<td>{'–' if cost.written_bytes is None else bytes_text(cost.written_bytes)}</td>"
        f"<td>{_rate(cost)}</td>"
        for name, cost in report.stages.items()
    )
    return html_table("Cost of the stages", columns, rows)


def _rate(cost: StageCost) -> str:
    if not cost.made or cost.unit is None or cost.wall_s == 0:
        return "–"
    rate = f"{significant(cost.made / cost.wall_s)}/s"
    return f'{rate}<span class="unit">{cost.made:,} {cost.unit}</span>'


def bytes_text(value: float) -> str:
    """Write a number of bytes with the unit that fits."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.{2 if unit == 'GiB' else 0}f}\N{NO-BREAK SPACE}{unit}"
    return f"{value:.0f}\N{NO-BREAK SPACE}B"


def duration_text(seconds: float) -> str:
    """Write a time in the units that a person waits in."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
