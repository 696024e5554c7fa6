"""Rows of dots and bars as HTML, with the colours of the style sheet.

A value stands beside each mark, so that nothing is told by the figure alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from stages.report_schema import Metric

COLOURS = 6
"""Colours of the style sheet, `--s0` to `--s5`."""

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
