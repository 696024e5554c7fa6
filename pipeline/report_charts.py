"""The charts of a report, each with a table of its numbers below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from pipeline.charts import Series, line_chart, point_chart, reliability_chart
from pipeline.html_tables import html_table, row_head
from pipeline.metric_tables import (
    ROUNDING,
    decimals,
    metric_cell,
    significant,
    system_colour,
    system_label,
    system_name,
)
from stages.report_schema import (
    Axis,
    Bins,
    Calibration,
    Divergence,
    Metric,
    Points,
    Report,
    SolverPath,
)

AXES: dict[Axis, tuple[str, str]] = {
    "timestep": ("By timestep", "timestep from the start"),
    "share": ("By share of the rollout", "share of the length of each rollout"),
    "codebook": ("By codebook", "codebook"),
}
"""Title of a chart, and what stands below its axis."""
FIRST_COLOUR = 3
"""Colour of the first curve of a training run: that of a student, an unbroken line."""

DIVERGENCE_HINT = (
    "KL to the guided teacher, in nats per code on the same codes, taken apart; weighted by their "
    "predictions the bins have the mean of the table above. Bands are 95\N{NO-BREAK SPACE}% "
    "intervals. The guided teacher is left out, for it is what is compared with."
)
CALIBRATION_HINT = (
    "How sure a system is of its likeliest code, against the probability that the guided teacher "
    "gives to that code before the sampler's temperature and filters: the distribution that "
    "students learn. Codes that were drawn are no reference, for the sampler makes likely ones "
    "likelier. On the dashed diagonal both agree; below it the system is too sure. The "
    "calibration error is the mean distance to the diagonal, weighted by how many codes are where."
)
LOSSES_HINT = (
    "Means over the steps between two lines of the training log; the legend shows the last value."
)


def divergence_charts(report: Report) -> str:
    """Return one card per axis along which KL was taken apart."""
    return _grid(map(lambda d: _divergence(d, report), report.divergences))


def _divergence(divergence: Divergence, report: Report) -> str:
    title, x_label = AXES[divergence.axis]
    shown = {name: bins for name, bins in divergence.systems.items() if _differs(bins)}
    if not shown:
        return ""
    names, series = _short(divergence.bins), [_series(n, b, report) for n, b in shown.items()]
    described = f"KL to the guided teacher, {title.lower()}, of {_listed(shown)}"
    chart = (
        point_chart(series, described, x_label=x_label, y_label="KL, nats", names=names)
        if divergence.axis == "codebook"
        else line_chart(series, described, x_label=x_label, y_label="KL, nats", names=names)
    )
    columns = [x_label, *(system_name(n, report) for n in shown), "predictions"]
    rows = (
        row_head(name)
        + "".join(metric_cell(bins.values[place], significant) for bins in shown.values())
        + f"<td>{max(bins.predictions[place] for bins in shown.values()):,}</td>"
        for place, name in enumerate(divergence.bins)
    )
    return _card(title, chart, html_table(described, columns, rows))


def _differs(bins: Bins) -> bool:
    return any(value is not None and value.value > ROUNDING for value in bins.values)


def _series(name: str, bins: Bins, report: Report) -> Series:
    """Return the line of a system over the bins that hold something."""
    found = [(place, value) for place, value in enumerate(bins.values) if value is not None]
    return _interval_series(name, report, [x for x, _ in found], [value for _, value in found])


def _interval_series(
    name: str, report: Report, x: Sequence[float], values: Sequence[Metric]
) -> Series:
    ends = [
        (v.value, v.value) if v.low is None or v.high is None else (v.low, v.high) for v in values
    ]
    banded = any(value.low is not None for value in values)
    return Series(
        label=system_label(name),
        colour=system_colour(name, report),
        x=x,
        y=[value.value for value in values],
        low=[low for low, _ in ends] if banded else (),
        high=[high for _, high in ends] if banded else (),
    )


def _short(names: Sequence[str]) -> Sequence[str]:
    """Return names of streams without the group, where all have the same."""
    groups = {name.rpartition(".")[0] for name in names}
    return [name.rpartition(".")[2] for name in names] if len(groups) == 1 else names


def calibration_chart(report: Report) -> str:
    """Return the reliability diagram of all systems with the table of its numbers."""
    if not report.calibration:
        return ""
    found = report.calibration
    series = [_reliability(name, each, report) for name, each in found.items()]
    shares = [
        [count / sum(each.reference.predictions) for count in each.reference.predictions]
        for each in found.values()
    ]
    described = f"Reliability of {_listed(found)} against the guided teacher's probabilities"
    edges = next(iter(found.values())).edges
    chart = reliability_chart(series, shares, edges, described)
    columns = ["system, confidence", "system's", "guided teacher's", "codes"]
    rows = (
        row for name, each in found.items() for row in _calibration_rows(system_label(name), each)
    )
    return _grid([_card("Reliability", chart, html_table(described, columns, rows))])


def _reliability(name: str, found: Calibration, report: Report) -> Series:
    pairs = [
        (x, value)
        for x, value in zip(found.confidence, found.reference.values, strict=True)
        if x is not None and value is not None
    ]
    return _interval_series(name, report, [x for x, _ in pairs], [value for _, value in pairs])


def _calibration_rows(label: str, found: Calibration) -> Iterable[str]:
    for place, confidence in enumerate(found.confidence):
        if confidence is not None:
            between = f"{found.edges[place]:g} to {found.edges[place + 1]:g}"
            yield (
                f"{row_head(label, between)}<td>{confidence:.3f}</td>"
                f"{metric_cell(found.reference.values[place], decimals(3))}"
                f"<td>{found.reference.predictions[place]:,}</td>"
            )


def path_hint(path: SolverPath) -> str:
    """Say what is compared on the way from noise to image."""
    return (
        f"Mean squared error to the guided teacher's latents after the same solver steps, from the "
        f"same noise, over the first {path.images} images; after the last step it is that of the "
        "images themselves. Bands are 95\N{NO-BREAK SPACE}% intervals over images."
    )


def path_chart(report: Report, path: SolverPath) -> str:
    """Return the chart of the error by solver step with the table of its numbers."""
    shown = {n: v for n, v in path.systems.items() if any(m.value > ROUNDING for m in v)}
    if not shown:
        return ""
    places = list(range(len(path.steps)))
    series = [_interval_series(name, report, places, v) for name, v in shown.items()]
    described = f"Error to the guided teacher by solver step, of {_listed(shown)}"
    names = [str(step) for step in path.steps]
    chart = line_chart(series, described, x_label="solver step", y_label="MSE", names=names)
    columns = ["solver step", *(system_name(name, report) for name in shown)]
    rows = (
        row_head(name) + "".join(metric_cell(v[place], significant) for v in shown.values())
        for place, name in enumerate(names)
    )
    return _grid([_card("By solver step", chart, html_table(described, columns, rows))])


def loss_charts(report: Report) -> str:
    """Return one card per training run with the curves of its loss terms."""
    return _grid(_losses(name, curves) for name, curves in report.losses.items())


def _losses(name: str, curves: dict[str, Points]) -> str:
    drawn = {term: curve for term, curve in curves.items() if curve.steps}
    if not drawn:
        return _card(name, '<p class="hint">The log holds no values.</p>', "")
    series = [
        Series(
            term, FIRST_COLOUR + place, curve.steps, curve.values, note=f"{curve.values[-1]:.4g}"
        )
        for place, (term, curve) in enumerate(drawn.items())
    ]
    described = f"Loss curves of {name}: {', '.join(drawn)}"
    columns = ["term", "first step", "value there", "last step", "value there"]
    rows = (
        f"{row_head(term)}<td>{curve.steps[0]:,}</td><td>{curve.values[0]:.4g}</td>"
        f"<td>{curve.steps[-1]:,}</td><td>{curve.values[-1]:.4g}</td>"
        for term, curve in drawn.items()
    )
    chart = line_chart(series, described, x_label="optimizer step")
    return _card(name, chart, html_table(described, columns, rows))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(system_label, names))


def _card(title: str, chart: str, table: str) -> str:
    named = f'Numbers<span class="heard">: {escape(title)}</span>'
    numbers = f"<details><summary>{named}</summary>{table}</details>" if table else ""
    return (
        f'<figure class="card"><figcaption><h3>{escape(title)}</h3></figcaption>{chart}{numbers}'
        "</figure>"
    )


def _grid(cards: Iterable[str]) -> str:
    found = "".join(cards)
    return f'<div class="grid charts">{found}</div>' if found else ""
