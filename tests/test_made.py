"""What stages left and how fast they were is what lies on disk."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pipeline.made import made
from pipeline.record import StageRecord, Usage, write_record
from pipeline.results import stage_costs
from pipeline.stage_costs import stage_costs as costs_page
from stages.report_schema import Report, StageCost
from stages.saved_model import weights_fingerprint
from store import PredictionStore

NOW = Usage(peak_rss_bytes=1, peak_device_bytes=0)


def bytes_below(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_store_has_its_timesteps_and_the_bytes_of_its_shards(tiny_run):
    found = made(tiny_run.load(), "rollout")
    store = PredictionStore.open(tiny_run.root / "store")
    shards = tiny_run.root / "store" / "shards"
    assert found.made == np.concatenate(store.lengths()).sum() > 0
    assert found.unit == "timesteps"
    records = sum(path.stat().st_size for path in shards.rglob("shard.json"))
    assert found.written_bytes == bytes_below(shards) - records


@pytest.mark.parametrize(
    ("stage", "folder", "made_of", "unit"),
    [
        ("prepare", "dataset", 30, "samples"),
        ("fit", "teacher", 6, "optimizer steps"),
        ("train:student", "student", 6, "optimizer steps"),
    ],
)
def test_other_stages_have_their_unit_and_what_lies_in_their_folder(
    tiny_run, stage, folder, made_of, unit
):
    assert made(tiny_run.load(), stage) == (bytes_below(tiny_run.root / folder), made_of, unit)


@pytest.mark.parametrize("stage", ["fit", "rollout", "train:student", "evaluate"])
def test_nothing_is_told_of_what_is_not_there(whole_run, tmp_path, stage):
    assert (*made(whole_run(tmp_path).load(), stage)[:2],) == (None, None)


def test_costs_have_the_time_of_all_attempts(whole_run, tmp_path):
    config = whole_run(tmp_path).load()
    record = StageRecord(stage="fit", identity="a").after(2.0, [NOW], finished=False)
    write_record(tmp_path / "runs" / "tiny" / "stages", record.after(3.0, [NOW], finished=True))
    costs = stage_costs(config, 1.0, NOW)
    assert list(costs) == ["fit", "evaluate"]
    assert (costs["fit"].wall_s, costs["fit"].made) == (5.0, None)


def test_the_page_has_the_rate_and_says_whose_memory_it_is():
    costs = {
        "rollout": StageCost(
            wall_s=10, peak_rss_bytes=2**30, peak_device_bytes=2**20, written_bytes=3 * 2**20,
            made=1234, unit="timesteps",
        ),
        "train:student": StageCost(wall_s=10, peak_rss_bytes=2**29),
        "evaluate": StageCost(wall_s=0, peak_rss_bytes=1, made=3, unit="x"),
    }  # fmt: skip
    page = costs_page(Report(run="a", samples=0, sentences=0, stages=costs))
    rows = page.split('<th scope="row">')[1:]
    assert "<td>teacher</td>" in rows[0]
    assert "123/s" in rows[0]
    assert "1,234 timesteps" in rows[0]
    assert "3\N{NO-BREAK SPACE}MiB" in rows[0]
    assert "<td>student</td>" in rows[1]
    assert rows[1].count("–") == 3, "no accelerator, bytes and rate"
    assert "<td>one system at a time</td>" in rows[2]
    assert "/s" not in rows[2]


def test_a_students_fingerprint_is_that_of_its_weights(tiny_run, tmp_path):
    content = (tiny_run.root / "student" / "model.safetensors").read_bytes()
    expected = hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()
    assert weights_fingerprint(tiny_run.root / "student") == expected
    assert weights_fingerprint(tmp_path) is None
