"""report.json and the page: what is in them, what is refused, and that nothing leaks in or out."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from pipeline.figures import interval_rows
from pipeline.metric_tables import METRICS, markdown_table
from pipeline.readme_numbers import fill_numbers
from pipeline.report import render, write_report
from stages.errors import UserError
from stages.report_schema import (
    AudioClip,
    AudioSample,
    Bins,
    Calibration,
    Comparison,
    Divergence,
    JudgeUse,
    Metric,
    Points,
    Report,
    StageCost,
    System,
    read_losses,
)

HOSTILE = "<script>alert('&\"')</script>"


def bins(*values):
    """Bins with an interval each; None is one without predictions."""
    metrics = [v and Metric(value=v, low=0.9 * v, high=1.1 * v) for v in values]
    return Bins(values=tuple(metrics), predictions=tuple(0 if v is None else 100 for v in values))


def divergence(axis):
    return Divergence(
        axis=axis,
        bins=("0–4", "5–9", HOSTILE),
        systems={
            "teacher_guided": bins(1e-9, 1e-9, None),
            "teacher_unguided": bins(0.3, 0.2, None),
            "student": bins(0.03, 0.0123, None),
        },
    )


def calibration():
    return Calibration(
        edges=(0, 0.2, 0.5, 1), confidence=(None, 0.3, 0.812), reference=bins(None, 0.25, 0.789)
    )


def example(folder, **changes):
    """A report in which every part is filled; its one clip lies in `folder`."""
    samples = (np.sin(np.arange(4000) / 20) * 20000).astype(np.int16)
    soundfile.write(folder / "clip.wav", samples, 22050)
    clip = AudioClip(file="clip.wav", heard=HOSTILE, edits=2)
    parts = {
        "run": HOSTILE,
        "samples": 120,
        "sentences": 60,
        "codec_copy": System(wer=Metric(value=0.02, low=0.01, high=0.03)),
        "teacher_guided": System(
            wer=Metric(value=0.25, low=0.2, high=0.3),
            paired_kl=Metric(value=0.0, low=0.0, high=0.0),
            rtf=Metric(value=0.04),
            passes=Metric(value=2),
        ),
        "teacher_unguided": System(
            wer=Metric(value=0.35, low=0.3, high=0.4), paired_kl=Metric(value=0.06)
        ),
        "student": System(
            wer=Metric(value=0.27, low=0.22, high=0.32),
            paired_kl=Metric(value=0.012, low=0.011, high=0.013),
            rtf=Metric(value=0.02),
            passes=Metric(value=1),
            parameters=Metric(value=4_410_000),
        ),
        "student_half": System(wer=Metric(value=0.4, low=0.35, high=0.45)),
        "stages": {
            "rollout": StageCost(
                wall_s=65.2,
                peak_rss_bytes=3 * 2**30,
                written_bytes=5 * 2**20,
                made=652,
                unit="timesteps",
            ),
            "train:student": StageCost(wall_s=4000, peak_rss_bytes=2**29, peak_device_bytes=2**20),
        },
        "comparisons": (
            Comparison(
                metric="wer",
                system="student",
                against="teacher_unguided",
                difference=Metric(value=-0.08, low=-0.12, high=-0.04),
            ),
            Comparison(
                metric="wer",
                system="student",
                against="teacher_guided",
                difference=Metric(value=0.02, low=-0.01, high=0.05),
            ),
        ),
        "judges": (
            JudgeUse(name="whisper", measures=("wer", "cer")),
            JudgeUse(name="distillmos", measures=("mos",), reason=f"not installed {HOSTILE}"),
        ),
        "audio": (
            AudioSample(sample_id=HOSTILE, text=HOSTILE, speaker=HOSTILE, clips={"student": clip}),
        ),
        "divergences": tuple(divergence(axis) for axis in ("timestep", "share", "codebook")),
        "calibration": {"student": calibration(), "teacher_guided": calibration()},
        "losses": {HOSTILE: {HOSTILE: Points(steps=(1, 2, 3), values=(3.0, 1.0, 0.1))}},
        "settings": {"rollout": {"guidance": {"scale": 2.0}, "empty": {}, HOSTILE: HOSTILE}},
        "fingerprints": {"teacher": "ab" * 32},
        "environment": {"device": "2 CPU cores"},
        "warnings": (HOSTILE,),
    }
    return Report.model_validate(parts | changes)


class Outline(HTMLParser):
    """Elements with their attributes, and a check that every one is closed in order."""

    VOID = frozenset({"meta", "br", "path", "input", "img"})

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def require_inert(self, carried, absent):
        """Nothing is left open, runs or is fetched: all sources begin with what is `carried`."""
        assert self.open == []
        assert {tag for tag, _ in self.elements} & {"script", "link", "iframe", *absent} == set()
        for _, attributes in self.elements:
            assert not any(name.startswith("on") for name in attributes)
            assert attributes.get("href", "#").startswith("#"), "links stay within the page"
            assert attributes.get("src", carried).startswith(carried)
        policy = [a.get("content", "") for t, a in self.elements if t == "meta"]
        assert any("default-src 'none'" in content for content in policy)


def test_report_json_holds_systems_at_the_top_and_survives_a_round_trip(tmp_path):
    report = example(tmp_path)
    report.write(tmp_path / "report.json")
    raw = json.loads((tmp_path / "report.json").read_text())
    assert raw["student"]["wer"] == {"value": 0.27, "low": 0.22, "high": 0.32}
    assert raw["student_half"]["wer"]["value"] == 0.4
    assert raw["student"]["rtf"] == {"value": 0.02, "low": None, "high": None}
    assert raw["stages"]["rollout"] == {
        "wall_s": 65.2, "peak_rss_bytes": 3 * 2**30, "peak_device_bytes": 0,
        "written_bytes": 5 * 2**20, "made": 652, "unit": "timesteps",
    }  # fmt: skip
    again = Report.read(tmp_path / "report.json")
    assert again == report
    assert list(again.systems) == [
        "codec_copy", "teacher_guided", "teacher_unguided", "student", "student_half",
    ]  # fmt: skip


def test_systems_that_were_not_evaluated_are_left_out_of_report_json(tmp_path):
    example(tmp_path, codec_copy=None).write(tmp_path / "report.json")
    assert "codec_copy" not in json.loads((tmp_path / "report.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {}}, "unknown key 'teacher'"),
        ({"student_b": {"beauty": {"value": 1}}}, "beauty"),
        ({"student": {"wer": {"value": float("nan")}}}, "finite"),
        ({"student": {"wer": {"value": 1, "low": 0.5}}}, "both ends or neither"),
        ({"student": {"wer": {"value": 1, "low": 2, "high": 1}}}, "lies above"),
        (
            {
                "calibration": {
                    "a": {
                        "edges": [0, 1],
                        "confidence": [0.1],
                        "reference": {"values": [], "predictions": []},
                    }
                }
            },
            "1 bins between edges with 1 confidences and 0 references",
        ),
        (
            {
                "divergences": [
                    {
                        "axis": "share",
                        "bins": ["a"],
                        "systems": {"student": {"values": [None], "predictions": []}},
                    }
                ]
            },
            "1 values with 0 counts",
        ),
        (
            {
                "divergences": [
                    {
                        "axis": "share",
                        "bins": ["a"],
                        "systems": {"student": {"values": [], "predictions": []}},
                    }
                ]
            },
            "0 values in 1 bins",
        ),
        ({"losses": {"a": {"kl": {"steps": [1, 2], "values": [0.1]}}}}, "2 steps with 1 values"),
    ],
)
def test_a_report_of_another_shape_is_refused(tmp_path, changes, message):
    with pytest.raises(ValidationError, match=message):
        example(tmp_path, **changes)


@pytest.mark.parametrize("file", ["../clip.wav", "/etc/passwd", "a/../../b.wav", "a\\..\\b", ""])
def test_clips_outside_the_folder_are_refused(file):
    with pytest.raises(ValidationError, match="below the report's folder"):
        AudioClip(file=file)


def test_a_clip_that_leads_out_through_a_link_is_refused(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    report = example(folder)
    (folder / "clip.wav").replace(tmp_path / "clip.wav")
    (folder / "clip.wav").symlink_to(tmp_path / "clip.wav")
    with pytest.raises(UserError, match="leads out of"):
        render(report, folder)


def test_a_missing_clip_is_named(tmp_path):
    report = example(tmp_path)
    (tmp_path / "clip.wav").unlink()
    with pytest.raises(UserError, match=r"'clip\.wav', which is not in"):
        render(report, tmp_path)


def test_the_page_is_well_formed_escapes_every_text_and_loads_nothing(tmp_path):
    outline = Outline(render(example(tmp_path), tmp_path))
    outline.require_inert("data:audio/flac", absent={"img"})
    # Title, heading, sentence, its id and speaker, what was heard, a warning, a reason, a setting
    # twice; of the loss curves the title twice, legend, row and twice the caption; in three charts
    # a tick and a row.
    assert "".join(outline.text).count(HOSTILE) == 22


def test_the_audio_of_the_page_is_the_wav_file_bit_for_bit(tmp_path):
    page = render(example(tmp_path), tmp_path)
    packed = base64.b64decode(re.search(r"base64,([^\"]+)", page).group(1))
    waveform, rate_hz = soundfile.read(io.BytesIO(packed), dtype="int16")
    expected, _ = soundfile.read(tmp_path / "clip.wav", dtype="int16")
    assert rate_hz == 22050
    np.testing.assert_array_equal(waveform, expected)


def test_the_page_states_what_the_numbers_say(tmp_path):
    page = "".join(Outline(render(example(tmp_path), tmp_path)).text)
    assert "20\N{NO-BREAK SPACE}%" in page  # 0.012 of 0.06
    assert "2.00\N{NO-BREAK SPACE}×" in page  # 0.04 over 0.02
    assert "3.00\N{NO-BREAK SPACE}GiB | 512\N{NO-BREAK SPACE}MiB" in page
    assert "1 min 5 s" in page
    assert "1 h 6 min" in page
    assert "4.41 M" in page
    assert "0.270" in page
    assert "0.220 … 0.320" in page
    assert re.search(r"−0\.080−0\.120 … −0\.040yes", page)
    assert re.search(r"0\.020−0\.010 … 0\.050no", page)
    assert "No mos: not installed" in page


def test_rows_stand_below_the_headings_of_their_groups(tmp_path):
    page = render(example(tmp_path), tmp_path)
    pairs = re.findall('scope="rowgroup" colspan="3">([^<]+)<', page)
    assert pairs == ["student minus teacher, unguided", "student minus teacher, guided"]
    systems = page.split('aria-label="Metrics of all systems"')[1].split("</table>")[0]
    groups = re.findall('scope="rowgroup" role="rowheader" colspan="6">([^<]+)<', systems)
    assert groups == ["Speech", "Against the guided teacher", "Time", "Size and work"]
    parts = [
        re.findall('scope="row" role="rowheader">([^<]+)<', p) for p in systems.split("<tbody")
    ]
    assert parts[1:] == [["WER"], ["KL to guided"], ["Real-time factor"], ["Parameters", "Passes"]]


def test_a_judge_that_gave_nothing_is_told_once(tmp_path):
    judges = (JudgeUse(name="whisper", measures=("wer",), reason="whisper is not installed"),)
    for warnings in ((), ("whisper gave no numbers: whisper is not installed",)):
        page = render(example(tmp_path, judges=judges, warnings=warnings), tmp_path)
        assert page.count("whisper is not installed") == 1


def test_a_report_of_little_still_makes_a_page(tmp_path):
    report = Report(run="bare", samples=0, sentences=0)
    page = render(report, tmp_path)
    assert "no judge of the audio" in page
    assert "<section" not in page
    assert "<nav" not in page


def test_writing_the_page_again_gives_the_same_bytes_and_leaves_nothing_else(tmp_path):
    example(tmp_path).write(tmp_path / "report.json")
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.wav", "report.html", "report.json"]


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("{}", "not a report")])
def test_a_missing_or_broken_report_is_a_users_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=message):
        write_report(tmp_path)


def test_losses_come_from_the_log_without_rates_and_thinned_by_means(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [{"step": 10 * i, "kl": float(i), "learning_rate": 1e-3} for i in range(1, 1001)]
    lines.append({"step": 10_000, "dev_kl": 0.5, "kl_broken": float("inf")})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10')
    curves = read_losses(log, points=250)
    assert set(curves) == {"kl", "dev_kl"}
    assert curves["kl"].steps[:2] == (40, 80)
    assert curves["kl"].values[:2] == (2.5, 6.5)
    assert len(curves["kl"].steps) == 250
    assert read_losses(tmp_path / "absent.jsonl") == {}


def test_intervals_lie_on_one_axis_from_zero():
    rows = [("a", 0, Metric(value=0.25, low=0.1, high=0.5)), ("b", 1, Metric(value=1.0))]
    places = re.findall(r"(left|width):([\d.]+)%", interval_rows(rows, str))
    assert [float(place) for _, place in places] == [10, 40, 25, 100, 0, 100]


def test_every_metric_of_a_system_is_shown():
    assert set(METRICS) == set(System.model_fields)


def test_readme_numbers_are_copied_between_the_marks_and_copying_again_changes_nothing(tmp_path):
    example(tmp_path).write(tmp_path / "report.json")
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- numbers -->\nold\n<!-- /numbers -->\nafter\n")
    fill_numbers(tmp_path, document)
    first = document.read_text()
    assert first.startswith("before\n<!-- numbers -->\n")
    assert first.endswith("<!-- /numbers -->\nafter\n")
    assert "old" not in first
    assert "| student | 0.270 [0.220, 0.320] | 0.012 [0.011, 0.013] |" in first
    fill_numbers(tmp_path, document)
    assert document.read_text() == first
    document.write_text("no marks\n")
    with pytest.raises(UserError, match="lacks the lines"):
        fill_numbers(tmp_path, document)


def test_markdown_rows_have_as_many_cells_as_the_head(tmp_path):
    lines = markdown_table(example(tmp_path)).splitlines()
    assert len(lines) == 7
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_a_report_of_before_divergences_were_taken_apart_still_makes_a_page(tmp_path):
    example(tmp_path).write(tmp_path / "report.json")
    old = json.loads((tmp_path / "report.json").read_text())
    for name in ("divergences", "calibration"):
        del old[name]
    for cost in old["stages"].values():
        for name in ("written_bytes", "made", "unit"):
            del cost[name]
    for name in ("teacher_guided", "student"):
        del old[name]["calibration_error"], old[name]["total_flops_per_timestep"]
    (tmp_path / "report.json").write_text(json.dumps(old))
    page = write_report(tmp_path).read_text()
    assert "Loss curves" in page
    assert "Calibration" not in page
    assert "Where systems differ" not in page


def test_a_report_of_a_later_version_is_refused(tmp_path):
    (tmp_path / "report.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match=r"not a report of this version.*format_version"):
        write_report(tmp_path)


def test_bins_without_predictions_are_left_out_of_charts_and_are_a_dash_in_tables(tmp_path):
    page = render(example(tmp_path), tmp_path)
    part = page.partition('<section id="where-systems-differ"')[2].partition("</section>")[0]
    assert "By timestep" in part
    assert "By share of the rollout" in part
    assert "By codebook" in part
    assert part.count('<td class="absent">–</td>') == 6, "two systems in three tables"
    assert "teacher, guided" not in part, "it differs from itself by rounding alone"
    assert "0.0123" in part
