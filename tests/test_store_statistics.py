"""What `foretell inspect STORE` says of all of a store: each number as a plain loop finds it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import store_statistics
from pipeline.inspection import describe_shard, store_parts
from pipeline.inspection_text import store_text
from pipeline.quantiles import histogram, outliers, quantiles
from pipeline.row_statistics import statistics_of
from pipeline.store_statistics import spread
from store import Plan, PredictionStore, StoreError
from store.schema import Compact, TopK
from store.synthetic import (
    synthetic_arrays,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)
from tests.row_stores import rows_store


def whole(store: PredictionStore, *, everything: bool = False) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for part in store_parts(store, everything):
        document |= part
    json.dumps(document, allow_nan=False)
    return document


@pytest.fixture
def store(tmp_path: Path) -> PredictionStore:
    """Two of three shards are there."""
    store = synthetic_store(
        tmp_path / "s", synthetic_manifest(TopK(k=5), profile=Compact()), 6, 1, 2
    )
    for shard in (0, 2):
        write_synthetic_shard(store, shard, 6)
    return PredictionStore.open(store.path)


def test_a_store_tells_what_is_missing_and_what_every_array_takes(store: PredictionStore) -> None:
    found = whole(store)
    assert (found["shards"], found["planned_shards"], found["missing_shards"]) == (2, 3, 1)
    assert (found["rollouts"], found["planned_rollouts"]) == (4, 6)
    arrays = {line["array"]: line for line in found["arrays"]}
    for name, values in store.shard(0).arrays.items():
        plain = sum(store.shard(shard).arrays[name].nbytes for shard in (0, 2))
        folders = [store.path / "shards" / shard / name for shard in ("00000", "00002")]
        size = sum(f.stat().st_size for at in folders for f in at.rglob("*") if f.is_file())
        line = arrays[name]
        assert (line["plain_bytes"], line["bytes"], line["ratio"]) == (plain, size, plain / size)
        assert line["bytes_per_timestep"] == size / found["timesteps"]
        assert line["bytes_per_audio_s"] == pytest.approx(size / found["audio_s"])
        assert values.dtype.name
    assert arrays["all"]["bytes"] == sum(found["bytes"].values())


def test_quantiles_are_over_all_rows_that_were_read(store: PredictionStore) -> None:
    found = whole(store)["statistics"]
    rows = [statistics_of(store, store.shard(shard).arrays) for shard in (0, 2)]
    for stream, line in enumerate(found["streams"]):
        for name in ("entropy", "kept_mass", "tail_mass", "code_probability"):
            values = np.concatenate([getattr(r, name)[:, stream] for r in rows]).astype(float)
            assert line[name]["p50"] == pytest.approx(np.median(values))
            assert line[name]["mean"] == pytest.approx(values.mean())
            assert (line[name]["least"], line[name]["most"]) == (values.min(), values.max())
    assert found["entropy_is"] == "lower bound"
    assert (found["shards"], found["of_shards"], found["rollouts"]) == (2, 2, 4)


def test_few_shards_are_read_unless_all_are_asked_for(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_synthetic_shard(store, 1, 6)
    store = PredictionStore.open(store.path)
    monkeypatch.setattr(store_statistics, "MOST_SHARDS", 2)
    some = whole(store)
    assert (some["statistics"]["shards"], some["statistics"]["of_shards"]) == (2, 3)
    text = store_text(some)
    assert "Over 2 of 3 shards" in text
    assert "--all reads all" in text
    assert whole(store, everything=True)["statistics"]["shards"] == 3
    monkeypatch.setattr(store_statistics, "MOST_BYTES", 1)
    assert whole(store)["statistics"]["shards"] == 1, "one shard is always read"


def test_shards_are_taken_evenly_from_first_to_last() -> None:
    assert spread(list(range(1000)), 5) == [0, 250, 500, 749, 999]
    assert spread([3, 8], 5) == [3, 8]
    assert spread([], 5) == []


def test_a_damaged_shard_is_named_and_the_others_are_summed_up(store: PredictionStore) -> None:
    data = store.path / "shards/00002/top_k.logits/c/0/0/0"
    data.write_bytes(data.read_bytes()[:-1] + b"\0")
    found = whole(PredictionStore.open(store.path))
    (bad,) = found["statistics"]["unreadable"]
    assert (bad["shard"], found["statistics"]["shards"]) == (2, 1)
    text = store_text(found)
    assert "shard 2 cannot be read" in text
    assert "--all" not in text, "which would read no more"
    shard = describe_shard(store.path, 2)
    assert [fault["array"] for fault in shard["faults"]] == ["top_k.logits"]
    assert "DAMAGED" in store_text(shard)
    assert all("entropy" not in row for row in shard["table"])


def test_a_shard_without_a_readable_table_is_named_and_left_out_of_everything(
    store: PredictionStore,
) -> None:
    write_synthetic_shard(store, 1, 6)
    lengths = PredictionStore.open(store.path).lengths()
    (store.path / "shards/00000/rollouts.parquet").write_bytes(b"none")
    (store.path / "shards/00001/shard.json").unlink()
    found = whole(PredictionStore.open(store.path))
    assert [bad["shard"] for bad in found["unreadable"]] == [0, 1]
    assert found["timesteps"] == found["statistics"]["timesteps"] == lengths[2].sum()
    assert found["stop_reasons"] == {"end": 2}
    read = found["statistics"]
    assert (read["shards"], read["of_shards"], read["unreadable"]) == (1, 1, [])
    text = store_text(found)
    assert "shard 0 cannot be read" in text
    assert "shard 1 cannot be read" in text
    assert "(--all" not in text


def test_outliers_have_their_own_keys_where_a_shard_before_them_is_damaged(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "s", synthetic_manifest(TopK(k=3)), 48, 1, 24)
    for shard in (0, 1):
        with store.writer(shard) as writer:
            for number, key in enumerate(store.plan[shard]):
                arrays = synthetic_arrays(
                    store.manifest, key, 90 if number == 5 else 4 + number % 3
                )
                writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=1)
            writer.commit()
    (store.path / "shards/00000/rollouts.parquet").write_bytes(b"none")
    (far,) = whole(PredictionStore.open(store.path))["outliers"]["length"]
    sample_id, variation = store.plan[1][5]
    assert (far["key"], far["value"]) == (f"{sample_id}/{variation}", 90)


def test_a_shard_shows_its_arrays_rollouts_and_that_its_files_are_sound(
    store: PredictionStore,
) -> None:
    found = describe_shard(store.path, 2)
    json.dumps(found, allow_nan=False)
    shard = store.shard(2)
    assert (found["rollouts"], found["timesteps"]) == (2, shard.offsets[-1])
    assert [tuple(a["shape"]) for a in found["arrays"]] == [a.shape for a in shard.arrays.values()]
    assert found["faults"] == []
    entropy = statistics_of(store, shard.arrays).entropy
    for row, line in enumerate(found["table"]):
        rollout = shard[row]
        assert (line["sample_id"], line["timesteps"]) == (rollout.sample_id, len(rollout))
        rows = slice(line["start"], line["start"] + line["timesteps"])
        assert line["entropy"] == pytest.approx(float(entropy[rows].mean()))
    for wrong in (1, 7):
        with pytest.raises(StoreError):
            describe_shard(store.path, wrong)


def test_equal_rollouts_and_samples_are_told(tmp_path: Path) -> None:
    manifest = synthetic_manifest(TopK(k=3))
    ids = ["a", "b", "c", "d"]
    samples = pa.table({"sample_id": ids, "text": ["same", "same", "other", None]})
    store = PredictionStore.create(tmp_path / "s", manifest, Plan.lay_out(ids, 2, 4), samples)
    for shard in range(2):
        with store.writer(shard) as writer:
            for key in store.plan[shard]:
                source = ("c", 1) if key == ("a", 0) else key
                arrays = synthetic_arrays(manifest, source, 5)
                writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=1)
            writer.commit()
    found = whole(PredictionStore.open(store.path))["duplicates"]
    assert found["rollouts"] == {"groups": 1, "members": 2, "examples": [["a/0", "c/1"]]}
    assert found["samples"] == {"groups": 1, "members": 2, "examples": [["a", "b"]]}
    text = store_text({"duplicates": found})
    assert "a/0 = c/1" in text


def test_a_diffusion_store_is_summed_up_by_noise_level(tmp_path: Path) -> None:
    store = rows_store(tmp_path / "s", tmp_path / "table", timesteps=12)
    found = whole(store)
    levels = found["statistics"]["levels"]
    t = np.concatenate([store.shard(shard).arrays["row.t"] for shard in store.committed])
    assert sum(level["rows"] for level in levels) == len(t)
    assert (levels[0]["from"], levels[-1]["to"]) == (t.min(), t.max())
    first = np.concatenate([
        np.sqrt(np.square(a["row.noise"].astype(float)).mean((1, 2, 3, 4)))[
            a["row.t"] < levels[0]["to"]
        ]
        for a in (store.shard(shard).arrays for shard in store.committed)
    ])  # fmt: skip
    assert levels[0]["rms row.noise"]["mean"] == pytest.approx(first.mean(), rel=1e-5)
    assert found["duplicates"]["rollouts"]["members"] == 0
    assert "noise level t" in store_text(found)


def test_values_far_from_the_median_are_outliers_farthest_first() -> None:
    values = np.array([10.0, 11, 9, 10, 12, 40, -60])
    found = outliers("abcdefg".__getitem__, values)
    assert [line["key"] for line in found] == ["g", "f"]
    assert found[1]["z"] == pytest.approx((40 - 10) / (1.4826 * 1))
    mostly_equal = np.array([5.0] * 20 + [6.0])
    (far,) = outliers(str, mostly_equal)
    assert far["key"] == "20"
    assert far["z"] == pytest.approx(1 / (1.2533 / 21))
    assert outliers(str, np.array([3.0, 3.0])) == []


def test_bars_have_round_widths_and_hold_every_length() -> None:
    lengths = np.array([8, 19, 20, 57, 57])
    found = histogram(lengths)
    assert found["edges"] == list(range(5, 61, 5))
    assert sum(found["counts"]) == 5
    counted = Counter(int(length) // 5 * 5 for length in lengths)
    expected = [counted[edge] for edge in found["edges"][:-1]]
    assert found["counts"] == expected
    assert histogram(np.array([7])) == {"edges": [7, 8], "counts": [1]}
    assert histogram(np.array([], np.int64))["counts"] == []


def test_quantiles_are_those_of_the_sorted_values() -> None:
    found = quantiles(np.arange(101))
    assert found == {"least": 0, "p1": 1, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "most": 100,
                     "mean": 50}  # fmt: skip
    assert quantiles(np.array([])) == {}
    assert math.isfinite(quantiles(np.array([1e-30]))["mean"])


def test_an_empty_store_has_no_statistics(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "s", synthetic_manifest(TopK(k=3)), 2, 1, 2)
    found = whole(store)
    assert found["statistics"]["shards"] == 0
    assert "Over 0 of 0 shards" in store_text(found)


def test_the_outliers_of_length_are_named_by_their_keys(tmp_path: Path) -> None:
    manifest = synthetic_manifest(TopK(k=3))
    store = synthetic_store(tmp_path / "s", manifest, 9, 1, 2)
    for shard in (0, 2, 3):
        with store.writer(shard) as writer:
            for key in store.plan[shard]:
                timesteps = 60 if key[0] == "sample-5" else 4 + int(key[0][-1]) % 2
                arrays = synthetic_arrays(manifest, key, timesteps)
                writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=1)
            writer.commit()
    (far,) = whole(PredictionStore.open(store.path))["outliers"]["length"]
    assert (far["key"], far["value"]) == ("sample-5/0", 60)
