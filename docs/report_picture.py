"""Make report.png anew, the top of a report in a browser: `python -m docs.report_picture REPORT`.

REPORT is the folder of an evaluation, such as runs/demo/report.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser import Browser, find_chromium

WIDTH, HEIGHT = 1280, 1000
SCROLL_BAR = 15
"""Pixels that the window needs beside the page."""


def main(report: str) -> None:
    """Show the page in light colours and keep its top."""
    chromium = find_chromium()
    assert chromium is not None, "there is no Chromium: install it (apt-get install chromium)"
    with tempfile.TemporaryDirectory() as profile, Browser(chromium, Path(profile)) as browser:
        browser.show(WIDTH + SCROLL_BAR)
        browser.open(Path(report).resolve() / "report.html")
        drawn = Image.open(io.BytesIO(browser.picture())).convert("RGB")
    top = drawn.crop((0, 0, WIDTH, HEIGHT))
    top.save(Path(__file__).parent / "report.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
