"""The local page in a real browser: seen, heard, clicked and walked through by keyboard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import soundfile

from pipeline.browse.application import Browse
from pipeline.browse.reports import run_folders
from pipeline.browse.serving import Listening, browse_of
from pipeline.browse.store_view import MOST_CANDIDATES
from pipeline.candidates import describe_stream
from pipeline.metric_tables import MAIN_METRICS, system_label
from pipeline.report import write_report
from stages.report_schema import AudioClip, AudioSample, Metric, Report, System
from store import PredictionStore
from store.schema import Full, TopK
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from tests.browser import Browser, find_chromium
from tests.conftest import Run
from tests.row_stores import rows_store
from tests.served_pages import Served, served
from tests.test_browse import IDS, TOKEN, store_of
from tests.test_browse_live import begun, commit, log_line

pytestmark = pytest.mark.slow

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "\"quotes' & </a><script>alert(1)</script>",
    "../../etc/passwd",
    "a/b/3",
    "%2Fetc%2Fpasswd%00",
    "?view=run&sample=2#hash",
    "sample-1\u202egpj",
    "${alert(1)} {{x}} \\",
    "long" * 128,
    "   ",
]
NARROW = 390


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        reason = "there is no Chromium: install it (apt-get install chromium)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with Browser(chromium, tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(autouse=True)
def no_complaints(browser: Browser) -> Iterator[None]:
    """Whatever a test does, the browser has nothing to complain about."""
    browser.complaints.clear()
    browser.show(1280)
    yield
    browser.run("1")  # takes in what was told until now
    assert browser.complaints == []


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PredictionStore:
    target = Full(branches="both")
    return store_of(tmp_path_factory.mktemp("page") / "store", [*HOSTILE, *IDS], target)


@pytest.fixture(scope="module")
def page(store: PredictionStore) -> Iterator[Served]:
    with served(Browse(store, [])) as found:
        yield found


@contextmanager
def shown(browser: Browser, browse: Browse, listening: Listening | None = None) -> Iterator[Served]:
    """Serve a page while the block runs; the browser leaves it before the server ends."""
    with served(browse, listening) as page:
        yield page
        browser.open("about:blank")


def show(browser: Browser, page: Served, **place: Any) -> None:
    """Open the page anew at a rollout and wait for its candidates."""
    browser.open("about:blank")
    browser.open(f"{page.address}#{urlencode(place)}")
    browser.wait("document.querySelector('#candidates tbody tr') !== null")


def shown_candidates(browser: Browser) -> list[dict[str, Any]]:
    """What the table of candidates says."""
    rows: list[dict[str, Any]] = browser.run(
        "[...document.querySelectorAll('#candidates tbody tr')].map(row => ({"
        " id: Number(row.dataset.id), drawn: row.classList.contains('drawn'),"
        " cells: [...row.querySelectorAll('td:not(.bars)')].map(cell => cell.innerText),"
        " bar: row.querySelector('.bars span').getBoundingClientRect().width }))"
    )
    return rows


def percent(text: str) -> float:
    return 0.0 if "<" in text else float(text.rstrip("%").strip()) / 100


def require_candidates(
    browser: Browser, store: PredictionStore, key: tuple[str, int, int], stream: int
) -> None:
    """The table shows what `describe_stream` says of a key."""
    expected = describe_stream(store, store[key], stream)
    first = expected["candidates"][:MOST_CANDIDATES]
    rest = expected["candidates"][MOST_CANDIDATES:]
    first += [c for c in rest if c["id"] == expected["code"]]
    shown = shown_candidates(browser)
    assert [row["id"] for row in shown] == [c["id"] for c in first]
    assert [row["id"] for row in shown if row["drawn"]] == [expected["code"]]
    for row, candidate in zip(shown, first, strict=True):
        values = [candidate["probability"], candidate["cond"], candidate["uncond"]]
        assert [percent(cell) for cell in row["cells"]] == pytest.approx(values, abs=5.1e-4)
    widths = np.array([row["bar"] for row in shown])
    shares = np.array([c["probability"] for c in first])
    longest = max(max(c["probability"], c["cond"], c["uncond"]) for c in first)
    full = widths[0] / shares[0] * longest
    assert widths == pytest.approx(np.maximum(shares / longest * full, 1), abs=1.5)


def place_of_cell(browser: Browser, timestep: int, stream: int, timesteps: int) -> list[float]:
    """A place in a cell of the map, near its right lower corner, scrolled into view."""
    browser.run("document.querySelector('.cells').scrollIntoView({ block: 'center' })")
    left, top, width, height = browser.run(
        "(({ left, top, width, height }) => [left, top, width, height])"
        "(document.querySelector('.cells canvas').getBoundingClientRect())"
    )
    return [left + (timestep + 0.8) / timesteps * width, top + (stream + 0.8) / 2 * height]


def test_a_click_into_the_map_shows_the_candidates_of_that_timestep_and_stream(
    browser: Browser, page: Served, store: PredictionStore
) -> None:
    show(browser, page, sample="sample-5", variation=1)
    require_candidates(browser, store, ("sample-5", 1, 0), 0)
    timesteps = len(store["sample-5", 1])
    assert timesteps > 3
    browser.click(*place_of_cell(browser, 2, 0, timesteps))
    browser.wait("document.querySelector('#at').textContent.startsWith('Timestep 2 ')")
    require_candidates(browser, store, ("sample-5", 1, 2), 0)
    browser.click(*place_of_cell(browser, 1, 1, timesteps))
    browser.wait("document.querySelector('#at').textContent.startsWith('Timestep 1 ')")
    require_candidates(browser, store, ("sample-5", 1, 1), 1)
    assert "timestep=1" in browser.run("location.hash")
    said = browser.run("document.querySelector('#told').innerText")
    code = store["sample-5", 1, 1].codes[1]
    assert said.startswith(f"Timestep 1 at 0.08 s, backbone.1: drew code {code} with ")


def test_hostile_ids_are_text_and_are_reached_from_the_list_and_by_their_address(
    browser: Browser, page: Served, store: PredictionStore
) -> None:
    show(browser, page, sample="sample-1", variation=0)
    for number, sample_id in enumerate(HOSTILE):
        browser.run(f"document.querySelector('[data-place=\"{number}\"]').click()")
        require_shown(browser, store, sample_id)
        current = browser.run(
            "document.querySelector('#rollouts [aria-current] .name').textContent"
        )
        assert current == sample_id.replace("\u202e", "\\u202e")
        assert browser.run("document.querySelectorAll('main img, main script, svg').length") == 0
    for sample_id in HOSTILE[::3]:
        show(browser, page, sample=sample_id, variation=0)
        require_shown(browser, store, sample_id)


def require_shown(browser: Browser, store: PredictionStore, sample_id: str) -> None:
    """The page shows the first rollout of a sample, and spells its id out."""
    spelled = json.dumps(sample_id.replace("\u202e", "\\u202e"))
    browser.wait(f"document.querySelector('#sample').textContent === {spelled}")
    browser.wait("document.querySelector('#candidates tbody tr') !== null")
    require_candidates(browser, store, (sample_id, 0, 0), 0)


def test_the_page_is_walked_through_by_keyboard(
    browser: Browser, page: Served, store: PredictionStore
) -> None:
    show(browser, page, sample=HOSTILE[0], variation=0)
    focused = "document.activeElement"
    browser.press("Tab")
    assert browser.run(f"{focused}.className") == "skip"
    assert browser.run(f"{focused}.getBoundingClientRect().top") >= 0, "it can be seen"
    browser.press("/")
    assert browser.run(f"{focused}.name") == "text"
    for letter in "sample-2":
        browser.press(letter)
    browser.wait("document.querySelector('#found').innerText.startsWith('22 of ')")
    browser.run("document.querySelector('#rollouts a').focus()")
    assert browser.run(f"getComputedStyle({focused}).outlineStyle") == "solid", "focus is seen"
    browser.press("ArrowDown")
    browser.wait("document.querySelector('#sample').textContent === 'sample-20'")
    browser.press("ArrowDown")
    browser.wait("document.querySelector('#sample').textContent === 'sample-21'")
    browser.press("ArrowUp")
    browser.wait("document.querySelector('#sample').textContent === 'sample-20'")
    browser.run("document.querySelector('.cells').focus()")
    last = len(store["sample-20", 0]) - 1
    assert last >= 2
    moves = [("ArrowRight", 1, 0), ("ArrowRight", 2, 0), ("ArrowLeft", 1, 0), ("ArrowDown", 1, 1)]
    for key, timestep, stream in [*moves, ("ArrowDown", 1, 1), ("End", last, 1), ("Home", 0, 1)]:
        browser.press(key)
        told = f"Timestep {timestep} at {0.08 * timestep:.2f} s, backbone.{stream}: "
        browser.wait(f"document.querySelector('#told').innerText.startsWith('{told}')")
        assert browser.run(f"{focused}.getAttribute('aria-valuenow')") == str(timestep)
        require_candidates(browser, store, ("sample-20", 0, timestep), stream)
    said = browser.run(f"{focused}.getAttribute('aria-valuetext')")
    assert said.startswith(f"timestep 0 of {last + 1}, 0.00 s, backbone.1: entropy ")


def test_a_search_that_needs_entropies_and_pages(browser: Browser, page: Served) -> None:
    show(browser, page, sample="sample-1", variation=0)
    browser.run("document.querySelector('details').open = true")
    browser.run(
        "(order => { order.value = 'most_entropy';"
        " order.dispatchEvent(new Event('input', { bubbles: true })); })"
        "(document.querySelector('[name=order]'))"
    )
    entropies = (
        "[...document.querySelectorAll('.numbers')]"
        ".map(each => parseFloat(each.innerText.split('·').at(-1)))"
    )
    browser.wait(f"{entropies}.every((value, at, all) => !at || all[at - 1] >= value)")
    assert browser.run("document.querySelector('#page').innerText") == "1–40 of 104"
    browser.run("document.querySelector('#next').click()")
    browser.wait("document.querySelector('#page').innerText === '41–80 of 104'")


def test_landmarks_headings_and_names_are_in_the_order_of_reading(
    browser: Browser, page: Served
) -> None:
    show(browser, page, sample="sample-1", variation=0)
    levels = browser.run(
        "[...document.querySelectorAll('h1, h2, h3, h4')].filter(h => h.offsetParent)"
        ".map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels)), levels
    unnamed = browser.run(
        "[...document.querySelectorAll("
        "'input, select, button, audio, a, [role=slider], [role=region]')]"
        ".filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []
    assert browser.run("document.querySelectorAll('header, main, footer').length") == 3
    assert browser.run("document.documentElement.lang") == "en"
    rows = browser.run(
        "(() => { const table = [...document.querySelectorAll('summary')]"
        ".find(s => s.innerText === 'The map as a table').parentElement; table.open = true;"
        "return new Promise(done => setTimeout(() => done("
        "table.querySelectorAll('tbody tr').length), 50)); })()"
    )
    assert rows == int(browser.run("document.querySelector('.cells').ariaValueMax")) + 1


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_sticks_out_at_the_width_of_a_phone(
    browser: Browser, page: Served, dark: bool
) -> None:
    browser.show(NARROW, dark=dark)
    for sample_id in (HOSTILE[0], "long" * 128):
        show(browser, page, sample=sample_id, variation=0)
        browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert browser.run("document.documentElement.scrollWidth") == NARROW
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    assert light == ("rgb(20, 22, 26)" if dark else "rgb(247, 247, 245)")


def test_a_token_opens_the_page_and_leaves_the_address(
    browser: Browser, store: PredictionStore
) -> None:
    with shown(browser, Browse(store, []), Listening(port=0, token=TOKEN)) as page:
        browser.open(page.address)
        browser.wait("document.querySelector('#candidates tbody tr') !== null")
        address = browser.run("location.href")
    assert TOKEN in page.address
    assert address.startswith(f"http://127.0.0.1:{page.port}/#")


def test_what_goes_wrong_is_told_and_no_more_than_that(
    browser: Browser, page: Served, tmp_path: Path
) -> None:
    browser.open("about:blank")
    browser.open(f"{page.address}#sample=none&variation=0")
    told = browser.wait("document.querySelector('#notice:not([hidden])')?.innerText")
    assert "'none'" in told
    (complaint,) = browser.complaints  # the browser itself tells of the 404
    assert "404" in complaint
    browser.complaints.clear()


def speech_report(folder: Path) -> None:
    """A report of two systems that say a melody each, with hostile texts."""
    folder.mkdir()
    clips = {}
    for number, system in enumerate(("teacher_guided", "student")):
        wave = 0.4 * np.sin(2 * np.pi * 300 * (1 + number) * np.arange(24000) / 16000)
        soundfile.write(folder / f"{system}.wav", wave, 16000)
        clips[system] = AudioClip(file=f"{system}.wav", heard=HOSTILE[0], edits=number)
    hostile = "\x01\x1b[31m" + HOSTILE[0]
    sample = AudioSample(sample_id=hostile, text=hostile, speaker=hostile, clips=clips)
    Report.model_validate({
        "run": HOSTILE[0], "samples": 3, "sentences": 3, "audio": (sample, sample),
        "teacher_guided": System(paired_kl=Metric(value=0.0), rtf=Metric(value=0.5)),
        "student": System(paired_kl=Metric(value=0.02, low=0.01, high=0.03)),
        "warnings": (HOSTILE[1],),
    }).write(folder / "report.json")  # fmt: skip
    write_report(folder)


def test_teacher_and_student_are_seen_and_heard_side_by_side(
    browser: Browser, tmp_path: Path
) -> None:
    speech_report(tmp_path / "report")
    with shown(browser, Browse(None, run_folders([tmp_path]))) as page:
        browser.open(page.address)
        browser.wait("document.querySelectorAll('.sight img').length === 4")
        browser.wait("[...document.images].every(i => i.complete && i.naturalHeight === 128)")
        labels = "[...document.querySelectorAll('.clip h4')].slice(0, 2).map(h => h.textContent)"
        assert browser.run(labels) == ["teacher, guided1.50\u00a0s", "student1.50\u00a0s"]
        heading = browser.run("document.querySelector('.card h3').textContent")
        assert heading == "\\u0001\\u001b[31m" + HOSTILE[0]
        browser.run("document.querySelector('.sight').scrollIntoView({ block: 'center' })")
        left, top, width = browser.run(
            "(({ left, top, width }) => [left, top, width])"
            "(document.querySelector('.sight').getBoundingClientRect())"
        )
        browser.click(left + width / 3, top + 20)
        clip = "document.querySelectorAll('audio')[{}]"
        first, second = clip.format(0), clip.format(1)
        browser.wait(f"!{first}.paused && {first}.currentTime > 0.55")  # a third of 1.5 s is 0.5 s
        browser.press("2")
        browser.wait(f"!{second}.paused && {second}.currentTime > 0.6")
        assert browser.run(f"{first}.paused"), "one clip at a time"
        browser.wait(f"{second}.ended")
        assert browser.run(f"{second}.duration") == pytest.approx(1.5, abs=0.01)
        browser.show(NARROW)
        assert browser.run("document.documentElement.scrollWidth") == NARROW
        assert browser.run("document.querySelector('main script, main img[src=x]')") is None
        browser.open(f"{page.address}report?run=0")
        assert browser.run("document.querySelector('h1').textContent") == HOSTILE[0]


def test_a_rollout_of_a_run_is_decoded_and_heard(browser: Browser, tiny_run: Run) -> None:
    browse = browse_of(str(tiny_run.root), [], None)
    assert browse.store is not None
    sample_id, variation = next(iter(browse.store.keys()))
    with shown(browser, browse) as page:
        browser.open(f"{page.address}#{urlencode({'sample': sample_id, 'variation': variation})}")
        browser.wait("document.querySelectorAll('.sight img').length === 2")
        titles = "[...document.querySelectorAll('.clip h4')].map(h => h.childNodes[1].textContent)"
        assert browser.run(titles) == [
            "Rollout of the teacher", "The recording, through the audio codec"
        ]  # fmt: skip
        for number in range(2):
            browser.run(
                f"document.querySelectorAll('.sight')[{number}].scrollIntoView({{block: 'center'}})"
            )
            left, top = browser.run(
                "(({ left, top }) => [left, top])"
                f"(document.querySelectorAll('.sight')[{number}].getBoundingClientRect())"
            )
            browser.click(left + 2, top + 20)
            audio = f"document.querySelectorAll('audio')[{number}]"
            browser.wait(f"{audio}.currentTime > 0.05")
        rate_hz = 8000
        expected = browse.audio.waveform(sample_id, variation)
        assert expected.rate_hz == rate_hz
        duration = browser.run("document.querySelector('audio').duration")
        assert duration == pytest.approx(len(expected.samples) / rate_hz, abs=1e-3)
        assert browser.run("document.querySelector('#views').innerText").split() == ["Store", "Run"]
        browser.run("document.querySelectorAll('#views a')[1].click()")
        browser.wait("document.querySelector('#run').innerText.includes('no report yet')")


def test_a_store_of_images_shows_its_channels(browser: Browser, tmp_path: Path) -> None:
    store = rows_store(tmp_path / "store", tmp_path / "table")
    with shown(browser, Browse(store, [])) as page:
        browser.open(f"{page.address}#sample=a&variation=0&timestep=1")
        browser.wait("document.querySelector('#summaries tbody tr') !== null")
        browser.wait("document.images.length >= 2")
        browser.wait("[...document.images].every(i => i.complete && i.naturalWidth === 4 * 3)")
        assert browser.run("document.querySelector('[name=order] [value=most_entropy]')") is None
        assert browser.run("document.querySelector('audio')") is None
        browser.open(f"{page.address}#sample=d&variation=1")
        browser.wait("document.querySelector('#sample').textContent === 'd'")
        browser.wait(
            "[...document.images].map(i => i.alt).join() === 'Channels of row.noise at timestep 0'"
        )


def test_of_many_streams_the_chosen_one_is_in_sight(browser: Browser, tmp_path: Path) -> None:
    manifest = synthetic_manifest(TopK(k=4), streams=32, vocabulary=34)
    store = synthetic_store(tmp_path / "store", manifest, 1, 1, 1)
    write_synthetic_shard(store, 0, 5)
    with shown(browser, Browse(PredictionStore.open(store.path), [])) as page:
        show(browser, page, sample="sample-0", variation=0)
        browser.run("document.querySelector('.cells').focus()")
        for stream in range(1, 32):
            browser.press("ArrowDown")
            browser.wait(f"document.querySelector('#told').innerText.includes('.{stream}: ')")
        row, box = browser.run(
            "['tr.chosen', '.tall:has(#streams)'].map(each => (({ top, bottom }) => [top, bottom])"
            "(document.querySelector(each).getBoundingClientRect()))"
        )
        assert box[0] <= row[0] < row[1] <= box[1] + 1
        last = browser.run("document.querySelectorAll('#streams button')[31].innerText")
        assert browser.run("document.querySelector('tr.chosen button').innerText") == last


# What is still written


LOOK = "document.dispatchEvent(new Event('visibilitychange'))"
"""Makes a page look for what is new before its time, unless it does so already."""
LISTED = "[...document.querySelectorAll('#rollouts .name')].map(each => each.textContent)"


def fact(name: str) -> str:
    """Script of what the page says of the store under a name."""
    return (
        "[...document.querySelectorAll('#facts div')]"
        f".find(each => each.firstChild.textContent === '{name}')?.lastChild.textContent"
    )


def test_an_open_page_says_that_there_is_more_and_lists_it_when_asked(
    browser: Browser, tmp_path: Path
) -> None:
    place = tmp_path / "store"
    store = begun(place, [0, 3])
    with shown(browser, Browse(store, [], look_s=0)) as page:
        show(browser, page, sample="sample-3", variation=0)
        assert browser.run(fact("Shards")) == "2 of 4"
        commit(place, 1, stop_reason="truncated")
        browser.wait(f"{LOOK} && {fact('Shards')} === '3 of 4'")
        assert browser.run(fact("Rollouts")) == "3"
        browser.wait("document.querySelector('#more').textContent.startsWith('1 more rollout was')")
        assert browser.run("document.querySelector('#more').getAttribute('role')") == "status"
        reasons = "[...document.querySelectorAll('[name=stop_reason] option')].map(o => o.value)"
        assert browser.run(reasons) == ["", "end", "truncated"]
        assert browser.run(LISTED) == ["sample-0", "sample-3"], "what a person reads stays"
        browser.run("document.querySelector('#more button').focus()")
        browser.press("Enter")
        browser.wait(f"{LISTED}.join() === 'sample-0,sample-1,sample-3'")
        assert browser.run("document.querySelector('#more').textContent") == ""
        current = browser.run("document.querySelector('#rollouts [aria-current]').textContent")
        assert current.startswith("sample-3")
        browser.run("document.querySelector('#rollouts a[href*=sample-1]').click()")
        browser.wait("document.querySelector('#sample').textContent === 'sample-1'")
        require_candidates_of(browser, store, ("sample-1", 0, 0))


def require_candidates_of(
    browser: Browser, store: PredictionStore, key: tuple[str, int, int]
) -> None:
    browser.wait("document.querySelector('#candidates tbody tr') !== null")
    store.refresh()
    expected = describe_stream(store, store[key], 0)["candidates"][:MOST_CANDIDATES]
    assert [row["id"] for row in shown_candidates(browser)][: len(expected)] == [
        candidate["id"] for candidate in expected
    ]


def test_a_page_of_a_store_without_shards_fills_by_itself(browser: Browser, tmp_path: Path) -> None:
    place = tmp_path / "store"
    with shown(browser, Browse(begun(place, []), [], look_s=0)) as page:
        browser.open(page.address)
        browser.wait("document.querySelector('#sample')?.textContent === 'No rollout is there yet'")
        commit(place, 2)
        browser.wait(LOOK + " && document.querySelector('#candidates tbody tr') !== null")
        assert browser.run(LISTED) == ["sample-2"]
        assert browser.run("document.querySelector('#sample').textContent") == "sample-2"


def test_a_page_of_a_run_shows_its_training_and_then_its_reports(
    browser: Browser, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    store_of(run / "store", ["a"])
    with shown(browser, browse_of(str(run), [], None)) as page:
        browser.open(f"{page.address}#view=run&run=0")
        browser.wait("document.querySelector('#run').innerText.includes('no report yet')")
        assert browser.run("document.querySelector('.curve')") is None
        log_line(run / "student", 20, kl=0.5)
        browser.wait(LOOK + " && document.querySelector('.curve') !== null")
        log_line(run / "student", 40, kl=0.02)
        said = "document.querySelector('.curve').getAttribute('aria-label')"
        browser.wait(f"{LOOK} && {said}.endsWith('kl from 0.5 at step 20 to 0.02 at step 40')")
        assert "step 40" in browser.run("document.querySelector('.curves figcaption').textContent")
        speech_report(run / "report")
        browser.wait(LOOK + " && document.querySelectorAll('.sight').length === 4")
        stamp = browse_of(str(run), [], None).runs[0].report_stamp
        report = Report.read(run / "report" / "report.json").model_copy(update={"samples": 77})
        report.write(run / "report" / "report.json")
        assert browse_of(str(run), [], None).runs[0].report_stamp != stamp
        browser.wait(LOOK + " && document.querySelector('#run-news button') !== null")
        assert "3 held-out samples" in browser.run("document.querySelector('#run').innerText")
        browser.run("document.querySelector('#run-news button').click()")
        browser.wait("document.querySelector('#run').innerText.includes('77 held-out samples')")
        assert browser.run("document.querySelector('#run-news').textContent") == ""


# All metrics of five systems


SYSTEMS = ("codec_copy", "teacher_guided", "teacher_unguided", "student", "student_half")


def wide_run(folder: Path, systems: tuple[str, ...] = SYSTEMS) -> Path:
    """A run whose systems have every metric, with long intervals, and a clip each."""
    (folder / "report").mkdir(parents=True)
    soundfile.write(folder / "report" / "clip.wav", np.zeros(800), 16000)
    clips = {name: AudioClip(file="clip.wav", heard="a clip", edits=0) for name in systems}
    metric = Metric(value=0.000398, low=0.000305, high=0.000615)
    system = System(**dict.fromkeys(MAIN_METRICS, metric))
    sample = AudioSample(sample_id="s", text="A sentence.", clips=clips)
    Report.model_validate(
        {"run": "wide", "samples": 2, "sentences": 2, "audio": (sample,)}
        | dict.fromkeys(systems, system)
    ).write(folder / "report" / "report.json")
    write_report(folder / "report")
    return folder


OVERFLOWS = (
    "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
)


@contextmanager
def table_of_systems(browser: Browser, folder: Path, place: str, width: int) -> Iterator[None]:
    """Show the page or the report of a wide run at a width, its table drawn."""
    with shown(browser, browse_of(str(wide_run(folder / "run")), [], None)) as page:
        browser.show(width)
        browser.open(page.address if place == "page" else f"{page.address}report?run=0")
        browser.wait("document.querySelector('tbody td') !== null")
        yield


@pytest.mark.parametrize("place", ["page", "report"])
@pytest.mark.parametrize("width", [1280, 1440, 760, NARROW])
def test_all_metrics_of_five_systems_are_read_without_scrolling_sideways(
    browser: Browser, tmp_path: Path, place: str, width: int
) -> None:
    with table_of_systems(browser, tmp_path, place, width):
        assert browser.run(OVERFLOWS) == 0
        assert browser.run("document.documentElement.scrollWidth") == width
        lines = browser.run(
            "[...document.querySelectorAll('tbody td')].filter(cell => {"
            " const range = document.createRange(); range.selectNodeContents(cell.firstChild);"
            " return range.getClientRects().length > 1; }).length"
        )
        assert lines == 0, "a number stands on one line"


@pytest.mark.parametrize("place", ["page", "report"])
@pytest.mark.parametrize("width", [1280, NARROW])
def test_the_table_of_systems_is_a_table_to_a_screen_reader_at_any_width(
    browser: Browser, tmp_path: Path, place: str, width: int
) -> None:
    with table_of_systems(browser, tmp_path, place, width):
        heard = [(n["role"], n["name"]) for n in browser.accessible("table.systems, table.stacked")]
        columns = [name for role, name in heard if role == "columnheader"]
        assert columns == ["metric", *map(system_label, SYSTEMS)]
        rows = [name for role, name in heard if role == "rowheader"]
        assert rows[:2] == ["Speech", "WER word error rate; lower is better"]
        assert len(rows) == len(MAIN_METRICS) + len({m.group for m in MAIN_METRICS.values()})
        cells = [name for role, name in heard if role in ("cell", "gridcell")]
        assert len(cells) == len(SYSTEMS) * len(MAIN_METRICS)
        assert not any("student" in cell for cell in cells), "who hears it has the column's head"


@pytest.mark.parametrize(
    ("clips", "width", "rows"),
    [(5, 1280, [5]), (5, 1000, [3, 2]), (4, 1280, [4]), (4, 800, [2, 2]), (6, 1280, [3, 3]),
     (8, 1280, [4, 4]), (5, NARROW, [1] * 5)],
)  # fmt: skip
def test_clips_stand_in_rows_of_as_many(
    browser: Browser, tmp_path: Path, clips: int, width: int, rows: list[int]
) -> None:
    systems = (*SYSTEMS, "student_a", "student_b", "student_c")[:clips]
    run = wide_run(tmp_path / "run", systems)
    with shown(browser, browse_of(str(run), [], None)) as page:
        for address in (page.address, f"{page.address}report?run=0"):
            browser.show(width)
            browser.open("about:blank")
            browser.open(address)
            browser.wait(f"document.querySelectorAll('.clip').length === {clips}")
            tops = browser.run(
                "[...document.querySelectorAll('.clip')].map(c => c.getBoundingClientRect().top)"
            )
            assert [tops.count(top) for top in dict.fromkeys(tops)] == rows
