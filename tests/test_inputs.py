"""Files that a configuration names: what they hold counts, not only where they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.inputs import CACHE_FILE, contents
from pipeline.progress import stage_identity
from stages.config import InitConfig
from stages.model_config import MagpieTeacher

RUN = {
    "name": "run",
    "dataset": None,
    "prepare": {"source": "recordings", "audio_codec": {"kind": "nemo", "path": "codec.nemo"}},
    "teacher": {"pretrained": {"family": "magpie", "path": "teacher.nemo"}},
    "rollout": {"sampler": {}},
    "students": {
        "student": {
            "model": {"family": "magpie", "nemo": "student.yaml"},
            "optimizer": {"steps": 1},
        }
    },
}
STAGES = ("prepare", "rollout", "train:student")
DEPENDENTS = {
    "codec.nemo": set(STAGES),
    "teacher.nemo": {"rollout", "train:student"},
    "student.yaml": {"train:student"},
}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in DEPENDENTS:
        (tmp_path / name).write_text(f"the first {name}")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    return tmp_path


def identities(run: Path) -> dict[str, str]:
    config = load_config(run / "run.yaml")
    return {stage: stage_identity(config, stage) for stage in STAGES}


@pytest.mark.parametrize("name", DEPENDENTS)
def test_another_file_under_the_same_path_makes_its_stages_stale_and_no_others(run, name):
    before = identities(run)
    (run / name).write_text(f"the other {name}")
    after = identities(run)
    assert {stage for stage in STAGES if after[stage] != before[stage]} == DEPENDENTS[name]
    (run / name).write_text(f"the first {name}")
    assert identities(run) == before


def test_a_file_that_was_only_touched_is_the_same(run):
    before = identities(run)
    os.utime(run / "teacher.nemo", ns=(1, 1))
    assert identities(run) == before


def test_a_missing_file_is_left_to_the_stage_that_needs_it(run):
    before = identities(run)
    (run / "teacher.nemo").unlink()
    assert identities(run)["rollout"] != before["rollout"]


def test_a_file_is_read_once_until_it_changes(run, monkeypatch):
    settings = MagpieTeacher(family="magpie", path=run / "teacher.nemo")
    folder = run / "stages"
    folder.mkdir()
    first, read, digest = contents(settings, folder), [], hashlib.file_digest

    def counted(file, *arguments):
        read.append(file.name)
        return digest(file, *arguments)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    assert contents(settings, folder) == first
    assert read == []
    (run / "teacher.nemo").write_text("longer than it was before")
    assert contents(settings, folder) != first
    assert read == [str(run / "teacher.nemo")]
    (folder / CACHE_FILE).write_text("damaged")
    assert contents(settings, folder) != first


def test_of_a_folder_the_files_of_a_model_count(run):
    model = run / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.nemo").write_text("weights")
    settings = InitConfig(kind="checkpoint", path=model)
    before = contents(settings, run / "none")
    assert set(before) == {str(model / "config.json"), str(model / "model.nemo")}
    (model / "log.jsonl").write_text("no input")
    assert contents(settings, run / "none") == before
    (model / "model.nemo").write_text("other weights")
    assert contents(settings, run / "none") != before
