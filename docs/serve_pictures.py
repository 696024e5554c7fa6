"""Make serve_store.png and serve_run.png anew: `python -m docs.serve_pictures RUN_FOLDER KEY`.

KEY is a rollout and a timestep, as in sample=00003-heart&variation=0&timestep=4. The pages are
those of a real Chromium; of the run's sentences one is left in the picture.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from pipeline.browse.serving import browse_of
from tests.browser import Browser, find_chromium
from tests.served_pages import served

HERE = Path(__file__).parent
COLOURS = 224
FEW_SENTENCES = (
    "[...document.querySelectorAll('.run-body > .card:has(.clips)')].slice(1)"
    ".forEach(card => card.remove());"
    # Clips are drawn when they come near to what is seen.
    "document.querySelector('.sight').scrollIntoView()"
)


SHOWN = "[...document.querySelectorAll('.sight')].every(clip => clip.querySelector('img'))"


def picture(browser: Browser, address: str, path: Path, first: str = "") -> None:
    """Wait until a page shows its clips and keep a picture of it; `first` changes the page."""
    browser.open(address)
    browser.wait("document.querySelectorAll('.sight').length >= 2", 60)
    browser.run(first)
    # Where the run lies on this machine is nobody's business.
    browser.run(
        "(path => { path.textContent = path.textContent.split('/').slice(-3).join('/'); })"
        "(document.querySelector('#path'))"
    )
    browser.wait(SHOWN, 60)
    browser.wait("[...document.images].every(image => image.complete)")
    browser.run("scrollTo(0, 0)")
    time.sleep(1)
    drawn = Image.open(io.BytesIO(browser.picture())).convert("RGB")
    drawn.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main(run: str, key: str) -> None:
    """Serve the run and take both pictures."""
    chromium = find_chromium()
    assert chromium is not None, "there is no Chromium: install it (apt-get install chromium)"
    with (
        tempfile.TemporaryDirectory() as profile,
        served(browse_of(run, [], None)) as page,
        Browser(chromium, Path(profile)) as browser,
    ):
        browser.show(1280)
        picture(browser, f"{page.address}#view=store&{key}", HERE / "serve_store.png")
        browser.open("about:blank")
        address = f"{page.address}#view=run&run=0"
        picture(browser, address, HERE / "serve_run.png", FEW_SENTENCES)


if __name__ == "__main__":
    main(*sys.argv[1:])
