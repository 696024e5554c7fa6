"""The page of an image run: what it says, what it leaves out, and that nothing leaks in or out."""

from __future__ import annotations

import base64
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.config import load_config
from pipeline.folders import RunFolders
from pipeline.metric_tables import markdown_table
from pipeline.record import Usage
from pipeline.report import render, write_report
from pipeline.results import write_image_report
from stages.diffusion.evaluate import ImageEvaluation, write_png
from stages.errors import UserError
from stages.report_schema import (
    Comparison,
    Images,
    ImageSample,
    JudgeUse,
    Metric,
    Points,
    Report,
    SolverPath,
    StageCost,
    System,
)
from store.schema import Quantization
from tests.browser import Browser, find_chromium
from tests.row_stores import manifest_of
from tests.test_report import HOSTILE, Outline
from tests.test_report import example as speech

SPEECH_SECTIONS = ("Listen", "Listeners", "Duration and repetition")
IMAGE_SECTIONS = ("Images", "Other numbers of solver steps")


def system(mse, frechet, seconds, passes):
    return System(
        paired_mse=Metric(value=mse, low=mse / 2, high=2 * mse),
        frechet=Metric(value=frechet),
        seconds_per_image=Metric(value=seconds),
        passes=Metric(value=passes),
        parameters=Metric(value=164_689),
    )


def difference_of(value):
    return Metric(value=value, low=value / 2, high=2 * value)


def grey(side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 1), np.uint8)


def example(folder, side=8, columns=1, **changes):
    """A report in which every part is filled; its pictures lie in `folder`."""
    systems = {
        "teacher_guided": system(0.0, 0.8, 0.004, 2),
        "teacher_unguided": system(0.05, 0.2, 0.002, 1),
        "student": system(0.01, 1.0, 0.002, 1),
        "student_half": system(0.02, 1.5, 0.001, 1),
    }
    for place, name in enumerate(("reference", *systems)):
        write_png(folder / "images" / f"{name}.png", grey(side, place))
    sample = ImageSample(
        sample_id=HOSTILE,
        text=HOSTILE,
        reference="images/reference.png",
        files={name: f"images/{name}.png" for name in systems},
    )
    difference = Metric(value=-0.04, low=-0.05, high=-0.03)
    parts = {
        "run": HOSTILE,
        "samples": 500,
        "sentences": 10,
        **systems,
        "stages": {
            "rollout": StageCost(wall_s=31, peak_rss_bytes=3 * 2**30),
            "train:student": StageCost(wall_s=70, peak_rss_bytes=2**29),
        },
        "comparisons": (
            Comparison(
                metric="paired_mse", system="student", against="teacher_unguided",
                difference=difference,
            ),
        ),
        "judges": (JudgeUse(name="digits", measures=("accuracy",), reason=f"no {HOSTILE}"),),
        "images": Images(
            solver_steps=25,
            other_steps={4: {name: system(0.123, 7, 0.001, 1) for name in systems}},
            features="pixels",
            references=540,
            reference=System(frechet=Metric(value=0.29)),
            path=SolverPath(
                steps=(1, 25),
                images=64,
                systems={
                    "teacher_guided": (Metric(value=0), Metric(value=0)),
                    "student": (difference_of(0.0004), difference_of(0.0123)),
                },
            ),
            samples=(sample,) * columns,
        ),
        "losses": {HOSTILE: {HOSTILE: Points(steps=(1, 2, 3), values=(3.0, 1.0, 0.1))}},
        "settings": {"rollout": {HOSTILE: HOSTILE}},
        "fingerprints": {"teacher": "ab" * 32},
        "environment": {"device": "2 CPU cores"},
        "warnings": (HOSTILE,),
    }  # fmt: skip
    return Report.model_validate(parts | changes)


def text_of(page):
    return "".join(Outline(page).text)


def headings(page):
    return re.findall(r"<h2>([^<]*)</h2>", page)


def embedded(page):
    return [
        (kind, base64.b64decode(content))
        for kind, content in re.findall(r'src="data:image/(\w+);base64,([^"]+)"', page)
    ]


def test_report_json_of_images_survives_a_round_trip_with_systems_at_the_top(tmp_path):
    report = example(tmp_path)
    report.write(tmp_path / "report.json")
    raw = json.loads((tmp_path / "report.json").read_text())
    assert raw["student"]["paired_mse"] == {"value": 0.01, "low": 0.005, "high": 0.02}
    assert raw["student_half"]["frechet"]["value"] == 1.5
    assert raw["images"]["other_steps"]["4"]["student"]["paired_mse"]["value"] == 0.123
    assert Report.read(tmp_path / "report.json") == report


def test_a_report_of_speech_has_no_key_of_images(tmp_path):
    speech(tmp_path).write(tmp_path / "report.json")
    assert "images" not in json.loads((tmp_path / "report.json").read_text())


def test_the_page_is_well_formed_escapes_every_text_and_loads_nothing(tmp_path):
    outline = Outline(render(example(tmp_path), tmp_path))
    outline.require_inert("data:image/png;", absent={"audio"})
    policy = [a.get("content", "") for t, a in outline.elements if t == "meta"]
    assert any("img-src data:" in content for content in policy)
    # Title, heading, caption, a warning, a reason, a setting twice; of the loss curves the title
    # twice, legend, row and twice the caption.
    assert "".join(outline.text).count(HOSTILE) == 13
    pictures = [attributes for tag, attributes in outline.elements if tag == "img"]
    assert [p["alt"].endswith(f": {HOSTILE}") for p in pictures] == [True] * 5
    assert [a["title"] for _, a in outline.elements if "title" in a] == [HOSTILE]


def test_rows_are_systems_below_the_reference_and_pictures_are_the_files(tmp_path):
    page = render(example(tmp_path, columns=2), tmp_path)
    names = ("reference", "teacher_guided", "teacher_unguided", "student", "student_half")
    files = [(tmp_path / "images" / f"{name}.png").read_bytes() for name in names]
    assert embedded(page) == [("png", file) for file in files for _ in range(2)]
    assert page.count('class="squares"') == 10


def test_large_pictures_are_scaled_for_the_page_and_stay_whole_beside_it(tmp_path):
    report = example(tmp_path, side=600)
    before = (tmp_path / "images" / "student.png").read_bytes()
    pictures = embedded(render(report, tmp_path))
    assert [kind for kind, _ in pictures] == ["jpeg"] * 5
    with Image.open(io.BytesIO(pictures[3][1])) as picture:
        assert picture.size == (384, 384)
    assert (tmp_path / "images" / "student.png").read_bytes() == before
    assert 'class="squares"' not in render(report, tmp_path)


def test_sections_of_speech_vanish_for_images_and_those_of_images_for_speech(tmp_path):
    page = render(example(tmp_path), tmp_path)
    assert not {*headings(page)} & {*SPEECH_SECTIONS}
    assert {*headings(page)} >= {*IMAGE_SECTIONS, "Systems", "Cost of the stages", "Loss curves"}
    assert "codec" not in page.partition("</style>")[2]
    assert "sentence" not in page
    spoken = render(speech(tmp_path), tmp_path)
    assert not {*headings(spoken)} & {*IMAGE_SECTIONS}
    assert "<img" not in spoken
    assert "solver" not in spoken


def test_the_page_states_what_the_numbers_say(tmp_path):
    page = text_of(render(example(tmp_path), tmp_path))
    assert "500 images per system of 10 different conditions, 25 solver steps" in page
    assert "20\N{NO-BREAK SPACE}%of the unguided teacher's: MSE 0.01 against 0.05" in page
    assert "1.25\N{NO-BREAK SPACE}×of the guided teacher's, to the reference images" in page
    assert "2.00\N{NO-BREAK SPACE}×of guided sampling: 0.002 s per image, was 0.004 s" in page
    assert "to 540 reference images" in page
    assert re.search(r"Fréchet distanceto the reference images; lower0\.290\.80\.211\.5", page)
    assert re.search(r"−0\.04−0\.05 … −0\.03yes", page)
    # The table of four steps has what depends on them alone.
    further = page.split("Other numbers of solver steps")[-1].partition("Cost of")[0]
    assert "0.123" in further
    assert "Parameters" not in further
    assert "Parameters" in page


def test_the_error_by_solver_step_is_drawn_and_written_without_the_guided_teacher(tmp_path):
    page = render(example(tmp_path), tmp_path)
    part = page.partition('<section id="where-systems-differ"')[2].partition("</section>")[0]
    assert "over the first 64 images" in part
    assert re.search(r"<text[^>]*>solver step</text>", part)
    assert "0.0123" in part
    assert "teacher, guided" not in part


def test_what_was_not_evaluated_is_left_out(tmp_path):
    images = Images(solver_steps=4, features="areas", references=0)
    report = example(tmp_path, images=images, teacher_guided=None)
    page = render(report, tmp_path)
    assert not {*headings(page)} & {*IMAGE_SECTIONS}
    assert "grid of areas" in page
    assert "Fréchet distance</h3>" not in page


@pytest.mark.parametrize("length", [40, 41])
def test_captions_that_a_column_cannot_hold_are_written_below_in_full(tmp_path, length):
    (sample,) = example(tmp_path).images.samples
    sample = sample.model_copy(update={"text": "a" * length})
    images = example(tmp_path).images.model_copy(update={"samples": (sample,)})
    page = render(example(tmp_path, images=images), tmp_path)
    assert ("<summary>Captions</summary>" in page) == (length > 40)


@pytest.mark.parametrize("file", ["../a.png", "/etc/passwd", "a/../../b.png", "a\\..\\b", ""])
def test_pictures_outside_the_folder_are_refused(file):
    with pytest.raises(ValidationError, match="below the report's folder"):
        ImageSample(sample_id="a", text="", files={"student": file})
    with pytest.raises(ValidationError, match="below the report's folder"):
        ImageSample(sample_id="a", text="", reference=file, files={})


def test_a_picture_that_leads_out_through_a_link_and_a_missing_one_are_refused(tmp_path):
    folder = tmp_path / "report"
    report = example(folder)
    picture = folder / "images" / "student.png"
    picture.rename(tmp_path / "student.png")
    with pytest.raises(UserError, match=r"the picture 'images/student\.png', which is not in"):
        render(report, folder)
    picture.symlink_to(tmp_path / "student.png")
    with pytest.raises(UserError, match="leads out of"):
        render(report, folder)


def test_markdown_has_the_metrics_of_images(tmp_path):
    table = markdown_table(example(tmp_path))
    head = "| system | MSE to guided | Fréchet distance | Time per image | Passes | Parameters |"
    assert table.startswith(head)
    assert "| student | 0.01 [0.005, 0.02] | 1 | 0.002 | 1 | 164.69 k |" in table


def test_the_report_of_a_run_has_its_costs_settings_and_warnings(tmp_path):
    sections = {
        "name": "tried",
        "runs": str(tmp_path),
        "evaluate": {},
        "teacher": {"checkpoint": "x"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(sections))
    config = load_config(tmp_path / "run.yaml")
    folder = RunFolders(config).report
    made = example(folder)
    found = ImageEvaluation(
        made.systems, made.comparisons, made.judges, made.images, samples=150, conditions=10
    )
    held = Quantization(
        method="int8", dtype="float32", backend="torchao", backend_version="1.0", layers=("a",)
    )
    manifest = manifest_of(quantization=held)
    write_image_report(config, manifest, found, 12.5, Usage(peak_rss_bytes=7, peak_device_bytes=0))
    report = Report.read(folder / "report.json")
    assert report.systems == made.systems
    assert report.images == made.images
    assert (report.samples, report.sentences) == (150, 10)
    cost = report.stages["evaluate"]
    assert (cost.wall_s, cost.peak_rss_bytes, cost.made) == (12.5, 7, None)
    assert cost.written_bytes == sum(p.stat().st_size for p in folder.rglob("*.png"))
    stored = manifest.fingerprints.model_dump()
    assert report.fingerprints == {name: found for name, found in stored.items() if found}
    assert report.settings["name"] == "tried"
    assert "1 of its linear layers hold their weights in int8" in report.warnings[0]
    assert "150 images to 540 reference images: so few" in report.warnings[1]
    assert "150 images to 540" in (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("side", [8, 600])
def test_the_page_fits_a_phone_and_a_desk_light_and_dark(tmp_path, side):
    chromium = find_chromium()
    if chromium is None:
        reason = "no Chromium is installed: put one on the path, or name it in CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    example(tmp_path, side, columns=12).write(tmp_path / "report.json")
    page = write_report(tmp_path)
    backgrounds = set()
    with Browser(chromium, tmp_path / "profile") as browser:
        for width in (1280, 390):
            for dark in (False, True):
                browser.show(width, dark=dark)
                browser.open(page)
                wide = browser.run("document.documentElement.scrollWidth")
                assert wide <= width, "nothing is wider than the window"
                assert browser.run(
                    "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
                )
                first = "document.querySelector('.pictures tbody th').getBoundingClientRect()"
                assert browser.run(f"{first}.width") >= 90, "names of systems can be read"
                backgrounds.add(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
