"""The demo in miniature, through the command line, every stage in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "mini.yaml"
STAGES = ("prepare", "fit", "rollout", "train:student", "train:half", "evaluate")
SYSTEMS = ("codec_copy", "teacher_guided", "teacher_unguided", "student", "student_half")


def foretell(runs: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", command, str(CONFIG), "--set", f"runs={runs}",
         *(["--json"] if command == "status" else [])],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, require) -> Path:
    """The folder of a finished run of configs/mini.yaml."""
    require("hibari", "pip install 'foretell[voices]'")
    require("faster_whisper", "pip install 'foretell[report]'")
    runs = tmp_path_factory.mktemp("runs")
    done = foretell(runs, "run")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return runs / "mini"


@pytest.fixture(scope="module")
def report(folder) -> dict:
    return json.loads((folder / "report" / "report.json").read_text())


def test_every_stage_is_done_and_a_second_run_does_nothing(folder):
    status = foretell(folder.parent, "status")
    assert status.returncode == 0, status.stdout
    stages = json.loads(status.stdout)["stages"]
    assert tuple(stages) == STAGES
    assert {stage["state"] for stage in stages.values()} == {"done"}
    again = foretell(folder.parent, "run")
    assert again.returncode == 0
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
    assert report["samples"] == 12


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
