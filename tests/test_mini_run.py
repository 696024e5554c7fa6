"""The demo in miniature, through the command line, every stage in a process of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from tests.conftest import ROOT, Program

pytestmark = pytest.mark.slow

CONFIG = ROOT / "configs" / "mini.yaml"
STAGES = ("prepare", "fit", "rollout", "train:student", "train:half", "evaluate")
SYSTEMS = ("codec_copy", "teacher_guided", "teacher_unguided", "student", "student_half")
SAMPLES = 6
"""Half of the configuration's: a recogniser takes longest by far."""


@pytest.fixture(scope="module")
def do(require, foretell) -> Callable[..., Program]:
    require("hibari", "pip install 'foretell[voices]'")
    require("faster_whisper", "pip install 'foretell[report]'")

    def command(name: str, runs: Path, *more: str) -> Program:
        fewer = f"evaluate.samples={SAMPLES}"
        return foretell(name, CONFIG, "--set", f"runs={runs}", "--set", fewer, *more)

    return command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, do) -> Path:
    """The folder of a finished run of configs/mini.yaml."""
    runs = tmp_path_factory.mktemp("runs")
    do("run", runs)
    return runs / "mini"


@pytest.fixture(scope="module")
def report(folder) -> dict:
    return json.loads((folder / "report" / "report.json").read_text())


def test_every_stage_is_done_and_a_second_run_does_nothing(folder, do):
    status = do("status", folder.parent, "--json")
    stages = json.loads(status.stdout)["stages"]
    assert tuple(stages) == STAGES
    assert {stage["state"] for stage in stages.values()} == {"done"}
    again = do("run", folder.parent)
    assert "started" not in again.stderr


def test_the_report_has_every_system_with_its_metrics_and_intervals(report):
    for name in SYSTEMS:
        system = report[name]
        for metric in ("wer", "cer"):
            assert system[metric]["low"] <= system[metric]["value"] <= system[metric]["high"]
        if name != "codec_copy":
            assert system["parameters"]["value"] > 0
            assert system["rtf"]["value"] > 0
            kl, agreement = system["paired_kl"], system["agreement"]
            success, single = system["success"], system["rtf_single"]
            assert 0 <= success["low"] <= success["value"] <= success["high"] <= 1
            assert success["value"] <= system["ended"]["value"]
            assert 0 < single["low"] <= single["value"] <= single["high"]
            quantiles = [system[f"duration_{q}_s"]["value"] for q in ("p5", "median", "p95")]
            assert quantiles == sorted(quantiles)
            assert -1e-6 < kl["low"] <= kl["value"] <= kl["high"]
            assert 0 <= agreement["low"] <= agreement["value"] <= agreement["high"] <= 1
    passes = [report[name]["passes"]["value"] for name in SYSTEMS[1:]]
    assert passes == [2, 1, 1, 1]
    assert report["teacher_guided"]["paired_kl"]["value"] < 1e-6, "it is its own reference"
    assert report["teacher_guided"]["agreement"]["value"] > 0.999
    assert report["samples"] == SAMPLES


def test_every_stage_has_its_own_time_and_peak(report):
    assert set(report["stages"]) >= set(STAGES) - {"evaluate"}
    for cost in report["stages"].values():
        assert cost["wall_s"] > 0
        assert 50 * 2**20 < cost["peak_rss_bytes"] < 16 * 2**30
        assert cost["peak_device_bytes"] >= 0


def test_the_students_divergence_fell(folder, report):
    lines = [json.loads(x) for x in (folder / "student" / "log.jsonl").read_text().splitlines()]
    curve = [line["kl"] for line in lines if "kl" in line]
    assert curve[-1] < 0.8 * curve[0]
    # It starts from the teacher's weights, so unguided is where it came from.
    unguided = report["teacher_unguided"]["paired_kl"]["value"]
    assert report["student"]["paired_kl"]["value"] < unguided


def test_the_page_needs_nothing_beside_its_folder(folder, report):
    page = (folder / "report" / "report.html").read_text()
    for name in ("student", "teacher"):
        assert name in page
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#]+)""", page)
    outside = [link for link in links if re.match(r"(?:https?:)?//", link)]
    assert not outside
    local = [link for link in links if not link.startswith("data:")]
    assert all((folder / "report" / link).exists() for link in local)
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:|#)", page)


def test_there_is_something_to_hear(folder, report):
    assert len(report["audio"]) == 3
    for sample in report["audio"]:
        assert set(sample["clips"]) == set(SYSTEMS)
        for clip in sample["clips"].values():
            waveform, rate_hz = soundfile.read(folder / "report" / clip["file"])
            assert len(waveform) / rate_hz > 0.05
