"""Figures of the report as HTML and inline SVG: nothing external, colours from the style sheet.

Text stays HTML, so that it keeps its size when a figure shrinks to the width of a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from stages.report_schema import Metric, Points

COLOURS = 6
"""Colours of the style sheet, `--s0` to `--s5`."""

LOG_SPAN = 12
"""Ratio of the largest to the smallest value from which a curve is drawn on a log axis."""

Row = tuple[str, int, Metric]
"""Label, colour, and what is shown."""


def colour(index: int) -> str:
    """Return the style attribute that sets the colour of a mark."""
    return f'style="--colour:var(--s{index % COLOURS})"'


def interval_rows(rows: Sequence[Row], show: Callable[[float], str]) -> str:
    """Draw values with their intervals as dots on one common axis that begins at zero."""
    low = min(0.0, *(_ends(metric)[0] for _, _, metric in rows))
    high = max(_ends(metric)[1] for _, _, metric in rows) or 1.0

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    def mark(metric: Metric) -> str:
        start, end = (place(value) for value in _ends(metric))
        return (
            f'<span class="range" style="left:{start:.2f}%;width:{end - start:.2f}%"></span>'
            f'<span class="point" style="left:{place(metric.value):.2f}%"></span>'
        )

    return _rows(rows, mark, show)


def bar_rows(rows: Sequence[Row], show: Callable[[float], str]) -> str:
    """Draw values of at least 0 as bars on one common axis."""
    high = max(metric.value for _, _, metric in rows) or 1.0
    return _rows(
        rows, lambda m: f'<span class="bar" style="width:{100 * m.value / high:.2f}%"></span>', show
    )


def _ends(metric: Metric) -> tuple[float, float]:
    low = metric.value if metric.low is None else min(metric.low, metric.value)
    high = metric.value if metric.high is None else max(metric.high, metric.value)
    return low, high


def _rows(rows: Sequence[Row], mark: Callable[[Metric], str], show: Callable[[float], str]) -> str:
    cells = (
        f"<span>{escape(label)}</span>"
        f'<span class="value">{escape(show(metric.value))}</span>'
        f'<span class="track" {colour(index)}>{mark(metric)}</span>'
        for label, index, metric in rows
    )
    return f'<div class="rows">{"".join(cells)}</div>'


def line_plot(curves: Mapping[str, Points]) -> str:
    """Draw curves over optimizer steps; the axis is logarithmic where the values ask for it."""
    drawn = {name: curve for name, curve in curves.items() if curve.steps}
    if not drawn:
        return '<p class="hint">The log holds no values.</p>'
    values = [value for curve in drawn.values() for value in curve.values]
    last_step = max(1, *(curve.steps[-1] for curve in drawn.values()))
    ticks, height = _axis(min(values), max(values))
    rules = "".join(f'<path class="rule" d="M0 {100 - height(t):.2f}H100"/>' for t in ticks)
    paths = "".join(
        f'<path {colour(index)} d="{_path(curve, last_step, height)}"/>'
        for index, curve in enumerate(drawn.values(), 1)
    )
    labels = "".join(
        f'<span class="ytick" style="bottom:{height(t):.2f}%">{t:g}</span>' for t in ticks
    )
    return (
        f'<div class="plot"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="loss curves">{rules}{paths}</svg>{labels}{_step_ticks(last_step)}</div>'
        f"{_legend(drawn)}"
    )


def _path(curve: Points, last_step: int, height: Callable[[float], float]) -> str:
    points = zip(curve.steps, curve.values, strict=True)
    where = (f"{100 * step / last_step:.2f} {100 - height(value):.2f}" for step, value in points)
    # A single point becomes a short stroke, for a path of no length shows nothing.
    return "M" + "L".join(where) + ("h1" if len(curve.steps) == 1 else "")


def _step_ticks(last_step: int) -> str:
    marks = ((0, ""), (last_step // 2, ""), (last_step, " last"))
    return "".join(
        f'<span class="xtick{kind}" style="left:{100 * step / last_step:.2f}%">{step:,}</span>'
        for step, kind in dict(marks).items()
    )


def _legend(curves: Mapping[str, Points]) -> str:
    items = (
        f'<li><span class="dot" {colour(index)}></span>{escape(name)} '
        f'<span class="absent">{curve.values[-1]:.4g}</span></li>'
        for index, (name, curve) in enumerate(curves.items(), 1)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _axis(low: float, high: float) -> tuple[list[float], Callable[[float], float]]:
    """Return the ticks of an axis, and the function from a value to per cent of the height."""
    if low > 0 and high / low >= LOG_SPAN:
        bottom, top = math.log(low), math.log(high)
        ticks = [t for t in _log_ticks(low, high) if low <= t <= high]
        return ticks, lambda value: 100 * (math.log(value) - bottom) / (top - bottom)
    low = min(low, 0.0)
    span = (high - low) or 1.0
    step = _round_step(span / 4)
    ticks = [step * i for i in range(math.ceil(low / step), math.floor((low + span) / step) + 1)]
    return ticks, lambda value: 100 * (value - low) / span


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    return [float(f"{factor}e{decade}") for decade in decades for factor in factors]


def _round_step(step: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
