"""Charts: what they draw, that they fit every theme, and that nothing reaches out of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.charts import DASHES, LOG_SPAN, Series, line_chart, point_chart, reliability_chart
from pipeline.figures import COLOURS
from pipeline.report import write_report
from tests.browser import Browser, find_chromium
from tests.test_report import HOSTILE, example

ROOT = Path(__file__).parent.parent


def plain(y, index=3, **changes):
    return Series(**({"label": "student", "colour": index, "x": range(len(y)), "y": y} | changes))


def banded(y, index=1):
    return plain(y, index, low=[0.9 * v for v in y], high=[1.1 * v for v in y], label="teacher")


KINDS = ("bins", "curve", "points", "reliability")


@cache
def drawings():
    """One of every kind."""
    names = ["0–4", "<b>&'", "10–14"]
    points = Series(
        "teacher", 1, (0.1, 0.5, 0.9), (0.2, 0.5, 0.7), (0.1, 0.4, 0.6), (0.3, 0.6, 0.8)
    )
    return {
        "bins": line_chart(
            [banded((0.3, 0.2, 0.4)), plain((0.1, 0.1, 0.2))], f"KL {HOSTILE}",
            x_label="timestep", y_label="KL, nats", names=names,
        ),
        "curve": line_chart([plain([1 / (n + 1) for n in range(100)])], "loss", x_label="step"),
        "points": point_chart(
            [banded((0.3, 0.2, 0.4)), plain((0.1, 0.1, 0.2))], "KL by codebook",
            x_label="codebook", y_label="KL, nats", names=names,
        ),
        "reliability": reliability_chart(
            [points], [(0.5, 0.25, 0.25)], (0, 0.2, 0.5, 1), "reliability"
        ),
    }  # fmt: skip


def svg_of(chart):
    return ElementTree.fromstring(re.search(r'<svg class="chart".*?</svg>', chart).group())


def paths(chart, variable):
    """Points of the lines that are drawn in a colour."""
    found = []
    for element in svg_of(chart).iter("path"):
        style = element.get("style", "")
        if (
            f"stroke: var({variable})" in style
            and "fill: none" in style
            and "L" in element.get("d")
        ):
            pairs = re.findall(r"(-?[\d.]+) (-?[\d.]+)", element.get("d"))
            found.append([(float(x), float(y)) for x, y in pairs])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_chart_has_no_colour_letters_or_address_of_its_own(kind):
    chart = drawings()[kind]
    assert re.findall(r"#(?![pm][0-9a-f]{10})", chart) == [], "colours are variables"
    assert not re.search(r"rgb|http|font-family|<style|<script|@import|url\((?!#)", chart)
    style = (ROOT / "pipeline" / "report.css").read_text()
    for variable in set(re.findall(r"var\((--[a-z0-9]+)\)", chart)):
        assert style.count(f"{variable}:") == 2, "of both themes"
    named = re.findall(r' id="([^"]+)"', chart)
    assert len(set(named)) == len(named)
    assert {*re.findall(r'"#([^"]+)"', chart), *re.findall(r"url\(#([^)]+)\)", chart)} == {*named}


def test_names_within_charts_of_one_page_differ():
    named = [re.findall(r' id="([^"]+)"', chart) for chart in drawings().values()]
    assert len({name for each in named for name in each}) == sum(map(len, named))


def test_text_of_a_chart_is_text_that_is_escaped_and_described():
    chart = drawings()["bins"]
    svg = svg_of(chart)
    words = [element.text for element in svg.iter("text")]
    assert {"0–4", "<b>&'", "10–14", "timestep", "KL, nats"} <= set(words)
    assert (svg.get("role"), svg.get("aria-label")) == ("img", f"KL {HOSTILE}")
    assert "<script>" not in chart
    assert "<b>" not in chart


def test_dollars_are_no_formula():
    chart = line_chart([plain((1, 2))], "kl", x_label="$x_1$ and ${", names=["$a$", "b"])
    assert {"$x_1$ and ${", "$a$"} <= {element.text for element in svg_of(chart).iter("text")}


@pytest.mark.parametrize(
    ("values", "heights"),
    [
        ((0.0, 0.5, 1.0), (0, 0.5, 1)),
        ((1.0, 10.0, 100.0), (0, 0.5, 1)),  # two decades: logarithmic
        ((-1.0, 0.0, 1.0), (0, 0.5, 1)),
        ((1.0, 2.0, 1.0 * LOG_SPAN - 0.1), (0, 1 / 10.9, 1)),  # below the span: linear
    ],
)
def test_curves_are_placed_by_value(values, heights):
    ((*points,),) = paths(line_chart([plain(values)], "kl", x_label="step"), "--s3")
    (first, bottom), (middle, place), (last, top) = points
    assert middle - first == pytest.approx(last - middle, abs=0.11)
    assert top < bottom, "larger values lie higher"
    found = [(bottom - y) / (bottom - top) for y in (bottom, place, top)]
    assert found == pytest.approx(heights, abs=0.003)


def test_a_band_keeps_the_axis_linear_and_lies_around_its_line():
    wide = Series("student", 3, (0, 1), (1.0, 100.0), (0.5, 90.0), (1.5, 110.0))
    chart = line_chart([wide], "kl", x_label="step")
    assert "fill-opacity: 0.2" in chart
    assert "0" in [element.text for element in svg_of(chart).iter("text")], "it begins at zero"


def test_systems_differ_by_more_than_colour():
    assert len(set(DASHES)) == len(DASHES) == COLOURS
    charts = [line_chart([plain((1, 2), index)], "kl", x_label="x") for index in range(COLOURS)]
    strokes = [
        re.search(
            r"stroke-dasharray: [^;\"]+|stroke-linecap: square\"", c[c.index(f"--s{i})") - 200 :]
        )
        for i, c in enumerate(charts)
    ]
    assert len({stroke and stroke.group() for stroke in strokes}) == COLOURS


def test_a_drawing_is_the_same_every_time_whatever_a_person_has_set_up():
    import matplotlib

    first = drawings()
    with matplotlib.rc_context({"axes.edgecolor": "red", "svg.fonttype": "path", "font.size": 30}):
        drawings.cache_clear()
        assert drawings() == first
        assert matplotlib.rcParams["font.size"] == 30


def test_the_command_line_does_not_wait_for_matplotlib():
    script = "import sys, pipeline.cli, pipeline.report; print('matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_the_page_of_speech_fits_a_phone_and_a_desk_light_and_dark(tmp_path):
    chromium = find_chromium()
    if chromium is None:
        reason = "no Chromium is installed: put one on the path, or name it in CHROMIUM"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    example(tmp_path).write(tmp_path / "report.json")
    page = write_report(tmp_path)
    lines, levels = set(), "[...document.querySelectorAll('h1,h2,h3,h4')].map(h => h.tagName[1])"
    with Browser(chromium, tmp_path / "profile") as browser:
        for width in (1280, 390):
            for dark in (False, True):
                browser.show(width, dark=dark)
                browser.open(page)
                wide = browser.run("document.documentElement.scrollWidth")
                assert wide <= width, "nothing is wider than the window"
                words = "[...document.querySelectorAll('.chart text')]"
                least = f"Math.min(...{words}.map(t => t.getBoundingClientRect().height))"
                assert browser.run(least) > 9, "it can be read"
                axis = "document.querySelector('.chart [style*=\"stroke: var(--s3)\"]')"
                lines.add(browser.run(f"getComputedStyle({axis}).stroke"))
        depths = [int(level) for level in browser.run(levels)]
        assert depths.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(depths)), "none is skipped"
        unnamed = (
            "[...document.querySelectorAll('section,table,svg:not(.key),audio,nav')].filter(e => "
        )
        unnamed += "!(e.getAttribute('aria-label') || e.caption?.textContent)).length"
        assert browser.run(unnamed) == 0
        targets = "[...document.querySelectorAll('nav a')].every(a => document.querySelector("
        assert browser.run(targets + "'[id=\"' + a.getAttribute('href').slice(1) + '\"]'))")
        assert browser.complaints == []
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        browser._ask("Emulation.setEmulatedMedia", media="print", features=dark)
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(247, 247, 245)", "paper is light, whatever the screen is"
    assert len(lines) == 2, "one drawing has the colours of both themes"
