"""Pictures of a store and of one rollout, drawn by matplotlib from what `inspect` found."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.text_tables import visible
from stages.errors import UserError
from stages.publish import replace_file

Document = dict[str, Any]
Panel = Callable[[Axes, Document], None]

FORMATS = (".png", ".svg")
PANEL_INCHES = (5.2, 3.4)
DOTS_PER_INCH = 150
BLUE, ORANGE, GREEN = "#1f6fb2", "#d1730b", "#2a8a57"
"""Told apart in print and by those who see red and green alike, with marks and labels besides."""
MOST_NAMED = 16
"""Streams that are named along an axis; of more, every nth is."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "foretell",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
}


def check_format(path: Path) -> None:
    """Refuse a file that is to be no PNG or SVG, by its name; raises UserError."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} is to be a picture: give a name that ends in .png or .svg")


def plot_store(document: Document, title: str, path: Path) -> None:
    """Draw the distributions of a store, of which `store_parts` found all, into a PNG or SVG.

    Raises UserError as `check_format` does, or where no array was read.
    """
    check_format(path)
    found = visible(document)
    if not found["statistics"]["shards"]:
        raise UserError(f"{title} holds no shard that could be read: nothing can be drawn")
    panels: list[Panel] = [_lengths, _bytes]
    if found["statistics"]["entropy_is"] is not None:
        panels = [_lengths, _stop_reasons, _bytes, _entropy, _drawn]
        panels += [_tail] * ("tail_mass" in found["statistics"]["streams"][0])
    elif "levels" in found["statistics"]:
        panels.append(_levels)
    else:
        panels.append(_sizes)
    with _drawing() as figure:
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure.set_size_inches(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.4)
        for place, panel in enumerate(panels):
            panel(figure.add_subplot(rows, columns, place + 1), found)
        figure.suptitle(_heading(found, visible(title)), x=0.01, ha="left")
        _save(figure, path)


def _heading(found: Document, title: str) -> str:
    statistics = found["statistics"]
    read = f"over {statistics['shards']:,} of {statistics['of_shards']:,} shards"
    heading = f"{title}: {found['rollouts']:,} rollouts, {found['timesteps']:,} timesteps"
    if statistics["entropy_is"] is None:
        return f"{heading}; sizes of values {read}"
    key = "dot: median, thick bar: 10 to 90 %, thin bar: 1 to 99 % of the timesteps"
    return f"{heading}\nby stream, {read}; {key}"


def plot_rollout(document: Document, streams: list[str], path: Path) -> None:
    """Draw one rollout that `describe_key` found into a PNG or SVG.

    Of codes: a heat map of entropy and one of the drawn codes' probability, over timesteps and
    streams, whose names are given. Of rows without codes: how far their values spread, by array.
    Raises UserError as `check_format` does.
    """
    check_format(path)
    found = visible(document)
    title = f"{found['sample_id']}/{found['variation']}: {found['timesteps']:,} timesteps"
    with _drawing() as figure:
        if "certainty" in found:
            _heat_maps(figure, found, visible(streams))
            title += f", stop reason {found['stop_reason']}"
        else:
            figure.set_size_inches(7, 4)
            _spread_of_rows(figure.add_subplot(), found["rows"])
        figure.suptitle(title, x=0.01, ha="left")
        _save(figure, path)


@contextmanager
def _drawing() -> Iterator[Figure]:
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        yield Figure(layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    kind = path.suffix.lower().removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {}
    content = BytesIO()
    with warnings.catch_warnings():
        # Ids may be of any alphabet; an SVG has them as text, for the fonts of who reads it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(content, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
    replace_file(path, content.getvalue())


def _lengths(axes: Axes, found: Document) -> None:
    edges, counts = np.array(found["lengths"]["edges"]), found["lengths"]["counts"]
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BLUE, edgecolor="white")
    axes.set(title="Length of rollouts", xlabel="timesteps", ylabel="rollouts")
    axes.xaxis.set_major_locator(_whole())
    axes.yaxis.set_major_locator(_whole())
    per_timestep = found.get("timestep_s")
    if per_timestep is not None:
        above = axes.secondary_xaxis(
            "top", functions=(lambda x: x * per_timestep, lambda s: s / per_timestep)
        )
        above.set_xlabel("seconds of audio")


def _stop_reasons(axes: Axes, found: Document) -> None:
    reasons = sorted(found["stop_reasons"].items(), key=lambda item: item[1])
    bars = axes.barh([name for name, _ in reasons], [count for _, count in reasons], color=BLUE)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.15)
    axes.set(title="Why rollouts ended", xlabel="rollouts")


def _bytes(axes: Axes, found: Document) -> None:
    arrays = [line for line in reversed(found["arrays"]) if line["array"] != "all"]
    bars = axes.barh(
        [line["array"] for line in arrays],
        [line["bytes_per_timestep"] for line in arrays],
        color=GREEN,
    )
    axes.bar_label(bars, fmt="{:,.1f}", padding=3)
    axes.margins(x=0.2)
    axes.set(title="Size on disk", xlabel="bytes per timestep")


def _entropy(axes: Axes, found: Document) -> None:
    kind = found["statistics"]["entropy_is"]
    _by_stream(axes, found, "entropy", BLUE)
    axes.set(title=f"Entropy of the teacher ({kind})", ylabel="nats")
    axes.set_ylim(bottom=0)


def _drawn(axes: Axes, found: Document) -> None:
    _by_stream(axes, found, "code_probability", GREEN)
    axes.set(title="Probability of the drawn code", ylabel="probability", ylim=(0, 1))


def _tail(axes: Axes, found: Document) -> None:
    _by_stream(axes, found, "tail_mass", ORANGE)
    axes.set(title="Tail: mass of the ids that were not kept", ylabel="probability")
    axes.set_ylim(bottom=0)


def _by_stream(axes: Axes, found: Document, measure: str, colour: str) -> None:
    """Median of every stream, a thick bar from 10 to 90 % and a thin one from 1 to 99 %."""
    streams = found["statistics"]["streams"]
    x = np.arange(len(streams))
    at = {name: [s[measure][name] for s in streams] for name in ("p1", "p10", "p50", "p90", "p99")}
    axes.vlines(x, at["p1"], at["p99"], color=colour, linewidth=1)
    axes.vlines(x, at["p10"], at["p90"], color=colour, linewidth=5, alpha=0.5)
    axes.plot(x, at["p50"], "o", color=colour, markersize=5)
    _name_streams(axes, [stream["stream"] for stream in streams])
    axes.set_xlim(-0.6, len(streams) - 0.4)


def _whole() -> MaxNLocator:
    """Ticks at round whole numbers."""
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _name_streams(axes: Axes, names: list[str]) -> None:
    step = -(-len(names) // MOST_NAMED)
    places = range(0, len(names), step)
    axes.set_xticks(list(places), [names[place] for place in places])
    if max(map(len, names)) * len(names) > 40:
        axes.tick_params("x", rotation=45)


def _levels(axes: Axes, found: Document) -> None:
    levels = found["statistics"]["levels"]
    middle = np.array([(level["from"] + level["to"]) / 2 for level in levels])
    names = [name for name in levels[0] if name.startswith("rms ")]
    for name, mark, colour in zip(names, "osD^vP" * len(names), _colours(len(names)), strict=False):
        known = [bool(level[name]) for level in levels]
        there = [level[name] for level in levels if level[name]]
        x = middle[known]
        axes.plot(x, [t["p50"] for t in there], f"-{mark}", color=colour, label=name[4:])
        axes.fill_between(
            x, [t["p10"] for t in there], [t["p90"] for t in there], color=colour, alpha=0.15,
            linewidth=0,
        )  # fmt: skip
    axes.set(
        title="Root mean square by noise level (median, 10 to 90 %)",
        xlabel="noise level t", ylabel="root mean square",
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _sizes(axes: Axes, found: Document) -> None:
    streams = found["statistics"]["streams"]
    names = [name for name in streams[0] if name.startswith("rms ")]
    x = np.arange(len(streams))
    for place, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        at = {q: [stream[name][q] for stream in streams] for q in ("p10", "p50", "p90")}
        shifted = x + (place - (len(names) - 1) / 2) * 0.2
        axes.vlines(shifted, at["p10"], at["p90"], color=colour, linewidth=5, alpha=0.5)
        axes.plot(shifted, at["p50"], "osD^vP"[place % 6], color=colour, label=name[4:])
    _name_streams(axes, [stream["stream"] for stream in streams])
    axes.set_xlim(-0.6, len(streams) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set(title="Root mean square (median, 10 to 90 %)", ylabel="root mean square")
    axes.legend(fontsize="small")


def _colours(count: int) -> list[str]:
    return ([BLUE, ORANGE, GREEN, "#7a4fa3", "#6b6b6b", "#b23b5c"] * count)[:count]


def _heat_maps(figure: Figure, found: Document, streams: list[str]) -> None:
    rows = found["certainty"]
    figure.set_size_inches(min(14, max(7, len(rows) / 40)), max(4.2, 0.34 * len(streams) + 2.6))
    kind = found["entropy_is"]
    maps = (
        ("entropy", f"Entropy ({kind})", "nats", "viridis", None),
        ("code_probability", "Probability of the drawn code", "probability", "cividis", 1.0),
    )
    for place, (measure, title, unit, colours, most) in enumerate(maps):
        axes = figure.add_subplot(2, 1, place + 1)
        values = np.array([row[measure] for row in rows]).T  # [C, T]
        image = axes.imshow(
            values, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=most
        )
        axes.grid(visible=False)
        axes.set(title=title, xlabel="timestep", ylabel="stream")
        axes.xaxis.set_major_locator(_whole())
        step = -(-len(streams) // MOST_NAMED)
        places = list(range(0, len(streams), step))
        axes.set_yticks(places, [streams[at] for at in places])
        figure.colorbar(image, ax=axes, label=unit)


def _spread_of_rows(axes: Axes, rows: list[Document]) -> None:
    """By noise level where the rows have one, else by timestep."""
    level = "t" in rows[0]
    rows = sorted(rows, key=lambda row: row["t"]) if level else rows
    x = [row["t"] for row in rows] if level else range(len(rows))
    names = [name for name, value in rows[0].items() if isinstance(value, dict)]
    for name, mark, colour in zip(names, "osD^vP" * len(names), _colours(len(names)), strict=False):
        axes.plot(x, [row[name]["std"] for row in rows], f"-{mark}", color=colour, label=name)
    if names:
        axes.legend(fontsize="small")
    axes.set(
        title="Spread of the stored values of every row",
        xlabel="noise level t" if level else "timestep",
        ylabel="standard deviation",
    )
    axes.set_ylim(bottom=0)
