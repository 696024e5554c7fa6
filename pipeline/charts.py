"""Charts of the report: drawn by matplotlib, written into the page as inline SVG.

A chart is as wide as a phone shows it, so that its text keeps its size there. Text stays text, and
every colour is a variable of the style sheet: one drawing is readable on light and dark screens and
on paper. matplotlib is imported when the first chart is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from pipeline.figures import COLOURS, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH_PX, HEIGHT_PX, TEXT_PX = 340, 210, 11
"""Size of a chart and of its text at natural size, in CSS pixels."""
MOST_TICKS = 5
"""Named ticks that fit beside each other."""
LOG_SPAN = 12
"""Ratio of the largest to the smallest value from which a curve is drawn on a log axis."""
INK, SOFT, LINE = "#010101", "#010102", "#010103"
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line"}
SYSTEM_COLOURS = tuple(f"#0102{index:02x}" for index in range(COLOURS))
VARIABLES |= {drawn: f"--s{index}" for index, drawn in enumerate(SYSTEM_COLOURS)}
"""What matplotlib is told to draw with, and the variable that takes its place."""
DASHES = ("1 3", "6 2", "2 2", "", "7 2 1 2", "4 1 1 1 1 1")
"""Strokes of lines, so that colour is not the only difference."""
ROOT_TICKS = (0, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
"""Named probabilities on an axis of roots."""
MARKERS = "osD^vP"
"""Marks of points, for the same reason."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": TEXT_PX,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    """What the legend calls it."""
    colour: int
    """Which of the colours `--s0` to `--s5` it has."""
    x: Sequence[float]
    """Places along the axis, rising."""
    y: Sequence[float]
    """Values."""
    low: Sequence[float] = ()
    """Lower ends of intervals; empty without any."""
    high: Sequence[float] = ()
    """Upper ends of intervals; empty without any."""
    note: str = ""
    """What the legend says beside the label."""

    @property
    def ends(self) -> list[float]:
        """Values and ends of intervals."""
        return [*self.y, *self.low, *self.high]


def line_chart(
    series: Sequence[Series],
    described: str,
    *,
    x_label: str,
    y_label: str = "",
    names: Sequence[str] = (),
) -> str:
    """Draw lines with bands for intervals, and a legend below.

    `names` are those of the places 0, 1, … of the axis, where these are no numbers. The other axis
    begins at 0, or is logarithmic where there are no intervals and the values span more than
    `LOG_SPAN`. `described` is what the chart shows, for those who do not see it.
    """
    with _drawing(described, HEIGHT_PX) as (figure, done):
        axes = figure.add_subplot()
        for each in series:
            _draw_line(axes, each, with_marks=bool(names))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _scale(axes, series)
        _name_places(axes, names)
    return done() + legend(series)


def point_chart(
    series: Sequence[Series], described: str, *, x_label: str, y_label: str, names: Sequence[str]
) -> str:
    """Draw points with bars for intervals over named places, and a legend below.

    The systems of a place stand beside each other.
    """
    with _drawing(described, HEIGHT_PX) as (figure, done):
        axes = figure.add_subplot()
        for place, each in enumerate(series):
            beside = 0.6 * ((place + 0.5) / len(series) - 0.5)
            _draw_points(axes, each, [x + beside for x in each.x])
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(bottom=0)
        _write_numbers(axes.yaxis, MOST_TICKS)
        _name_places(axes, names)
    return done() + legend(series, lines=False)


def reliability_chart(
    series: Sequence[Series],
    shares: Sequence[Sequence[float]],
    edges: Sequence[float],
    described: str,
) -> str:
    """Draw reliability diagrams with the diagonal, and below how many predictions are where.

    x is the confidence and y what it is compared with; `shares` are those of the predictions of
    each of the series between `edges`, from 0 to 1. Both axes are roots: most codes of speech are
    not very sure, and the diagonal stays straight.
    """
    with _drawing(described, HEIGHT_PX + 130) as (figure, done):
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for axis, scale in ((upper.xaxis, upper.set_xscale), (upper.yaxis, upper.set_yscale)):
            scale("function", functions=(_root, np.square))
            axis.set_ticks(ROOT_TICKS, [f"{tick:g}" for tick in ROOT_TICKS])
        upper.plot((0, 1), (0, 1), color=SOFT, linewidth=1, dashes=(2, 2))
        for each, heights in zip(series, shares, strict=True):
            _draw_points(upper, each, each.x, joined=True)
            drawn, dashes = SYSTEM_COLOURS[each.colour % COLOURS], _dashes(each.colour)
            percent = [100 * share for share in heights]
            lower.stairs(percent, edges, color=drawn, linestyle=dashes)
        upper.set(xlim=(0, 1), ylim=(0, 1))
        upper.set_ylabel("guided teacher's probability")
        lower.set_ylim(bottom=0)
        lower.set_ylabel("codes, %")
        lower.set_xlabel("system's probability of its likeliest code")
        _write_numbers(lower.yaxis, 3)
    return done() + legend(series)


def _root(values: Any) -> Any:
    return np.sqrt(np.maximum(values, 0))  # an axis looks beyond its ends too


def legend(series: Sequence[Series], *, lines: bool = True) -> str:
    """Return the legend of a chart as HTML, so that it wraps as text does."""
    items = (
        f"<li>{_key(each.colour, lines=lines)}{escape(each.label)}"
        f'<span class="absent">{escape(each.note)}</span></li>'
        for each in series
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _key(index: int, *, lines: bool) -> str:
    if not lines:
        return f'<span class="dot" {colour(index)}></span>'
    dashes = DASHES[index % len(DASHES)]
    return (
        f'<svg class="key" viewBox="0 0 26 8" aria-hidden="true" {colour(index)}>'
        f'<path d="M1 4H25" stroke-dasharray="{dashes or 0}"/></svg>'
    )


def _dashes(index: int) -> Any:
    numbers = [float(number) for number in DASHES[index % len(DASHES)].split()]
    return (0, numbers) if numbers else "solid"


def _draw_line(axes: Axes, series: Series, *, with_marks: bool) -> None:
    drawn = SYSTEM_COLOURS[series.colour % COLOURS]
    mark = MARKERS[series.colour % len(MARKERS)] if with_marks or len(series.x) == 1 else ""
    axes.plot(series.x, series.y, color=drawn, linestyle=_dashes(series.colour), marker=mark)
    if series.low:
        axes.fill_between(series.x, series.low, series.high, color=drawn, alpha=0.2, linewidth=0)


def _draw_points(axes: Axes, series: Series, x: Sequence[float], *, joined: bool = False) -> None:
    drawn = SYSTEM_COLOURS[series.colour % COLOURS]
    below = [max(y - low, 0) for y, low in zip(series.y, series.low, strict=False)]
    above = [max(high - y, 0) for y, high in zip(series.y, series.high, strict=False)]
    axes.errorbar(
        x, series.y, yerr=(below, above) if below else None, color=drawn,
        linestyle=_dashes(series.colour) if joined else "none", elinewidth=1.2,
        marker=MARKERS[series.colour % len(MARKERS)],
    )  # fmt: skip


def _scale(axes: Axes, series: Sequence[Series]) -> None:
    """Choose the scale of the values: linear from zero, or logarithmic for long curves."""
    ends = [end for each in series for end in each.ends]
    banded = any(each.low for each in series)
    if not banded and min(ends) > 0 and max(ends) / min(ends) >= LOG_SPAN:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        subs = (1.0, 2.0, 5.0) if max(ends) / min(ends) < 1000 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    elif min(ends) >= 0:
        axes.set_ylim(bottom=0)
    _write_numbers(axes.xaxis, MOST_TICKS, integer=True)
    _write_numbers(axes.yaxis, MOST_TICKS)


def _write_numbers(axis: Axis, most: int, *, integer: bool = False) -> None:
    """Write at most `most` ticks as plain numbers: a formula is no text to who has it read out."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}".replace("-", "−")))
    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], integer=integer))


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    """Name as many places of the axis as there is room for."""
    if names:
        letters = max(map(len, names))
        most = max(2, min(len(names), 44 // (letters + 2)))
        step = -(-len(names) // most)
        axes.set_xticks(range(0, len(names), step), names[::step])


@contextmanager
def _drawing(described: str, height: int) -> Iterator[tuple[Figure, Callable[[], str]]]:
    """Give a figure to draw on, and what returns it as SVG once the block has ended."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn: list[str] = []
    # The salt makes names within the drawing those of this drawing alone, the same every time.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a person has set up for drawings of their own
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": described})
        figure = Figure(figsize=(WIDTH_PX / 72, height / 72), layout="constrained")
        yield figure, lambda: drawn[0]
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    drawn.append(_inline(written.getvalue(), described))


XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
REFERENCE = re.compile(r"#([pm][0-9a-f]{10})")
NUMBER = re.compile(r"\d+\.\d{2,}")
COLOUR = re.compile(r"#[0-9a-f]{6}\b")


def _inline(svg: str, described: str) -> str:
    """Return matplotlib's SVG as an element of a page: no names or styles that reach out of it."""
    root = ElementTree.fromstring(svg)
    named = set(REFERENCE.findall(svg))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = dict(_attributes(element, named))
        element.tail = None
        element.text = element.text if element.tag == "text" else None
    box = root.get("viewBox", "")
    root.attrib = {"class": "chart", "viewBox": box, "role": "img", "aria-label": described}
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(element: ElementTree.Element, named: set[str]) -> Iterator[tuple[str, str]]:
    for name, value in element.attrib.items():
        if name == "id" and value not in named:
            continue
        if name == XLINK_HREF:
            yield "href", value
        elif name == "style":
            yield name, _style(value)
        elif name in ("d", "x", "y", "transform"):
            yield name, NUMBER.sub(lambda n: f"{float(n[0]):.1f}", " ".join(value.split()))
        else:
            yield name, value


def _style(value: str) -> str:
    """Return the style of an element with the variables of the page, and the page's own letters."""
    value = re.sub(r" ?font-family: [^;]*;?", "", value)
    return COLOUR.sub(lambda found: f"var({VARIABLES[found[0]]})", value)
