"""What was written is what is read, by key, by timestep, by shard and by stock Zarr."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr

from store import DamagedShard, Plan, PredictionStore, RolloutNotFound, StoreError
from store.schema import Full, Target, TopK
from store.synthetic import (
    synthetic_arrays,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)

TARGETS: dict[str, Target] = {
    "top_k": TopK(k=4, temperatures=(1.0, 2.0), moments=True),
    "top_k_fp32": TopK(k=3, dtype="float32"),
    "full": Full(),
    "full_fp32": Full(dtype="float32"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PredictionStore:
    """Three shards of four rollouts, of which the last is not committed."""
    path = tmp_path_factory.mktemp("reader") / "store"
    made = synthetic_store(path, synthetic_manifest(TARGETS["top_k"]), 6, 2, 4)
    for shard in (0, 1):
        write_synthetic_shard(made, shard, 40)
    return PredictionStore.open(path)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_stock_zarr_reads_every_array_as_we_do(tmp_path: Path, target: Target) -> None:
    made = synthetic_store(tmp_path, synthetic_manifest(target, streams=3), 2, 1, 2)
    write_synthetic_shard(made, 0, 6000)  # over the 4096 timesteps of a file
    shard = PredictionStore.open(tmp_path).shard(0)
    group = zarr.open_group(tmp_path / "shards/00000", mode="r")
    assert shard.offsets[-1] > 4096
    for name, array in shard.arrays.items():
        stock = group[name]
        assert isinstance(stock, zarr.Array)
        assert stock.dtype == array.dtype
        np.testing.assert_array_equal(stock[:], array)
    for row, key in enumerate(made.plan[0]):
        written = synthetic_arrays(made.manifest, key, len(shard[row]))
        for name, array in written.items():
            np.testing.assert_array_equal(shard[row].arrays[name], array)


def test_a_rollout_and_its_timesteps_are_found_by_key(store: PredictionStore) -> None:
    assert len(store) == len(list(store.keys())) == 8
    for key in store:
        rollout = store[key]
        assert key in store
        assert (rollout.sample_id, rollout.variation, rollout.stop_reason) == (*key, "end")
        written = synthetic_arrays(store.manifest, key, len(rollout))
        assert set(rollout.arrays) == set(written)
        for name, array in written.items():
            np.testing.assert_array_equal(rollout.arrays[name], array)
        last = store[*key, len(rollout) - 1]
        np.testing.assert_array_equal(last.codes, written["codes"][-1])
        np.testing.assert_array_equal(last.arrays["top_k.logits"], written["top_k.logits"][-1])


def test_what_is_not_there_is_named(store: PredictionStore) -> None:
    with pytest.raises(KeyError, match=r"^sample 'unheard', variation 0 is not planned in .*"):
        store["unheard", 0]
    with pytest.raises(RolloutNotFound, match="'sample-0', variation 2 is not planned"):
        store["sample-0", 2]
    pending = store.plan[2][0]
    with pytest.raises(RolloutNotFound, match="planned in shard 00002, which is not committed"):
        store[pending]
    assert pending not in store
    assert "sample-0" not in store
    with pytest.raises(StoreError, match="shard 00002 is not committed: run the rollout"):
        store.shard(2)
    with pytest.raises(StoreError, match="shard 00002 is not committed: run the rollout"):
        store.rollout_table(2)
    with pytest.raises(StoreError, match="shard 3 is not planned"):
        store.shard(3)
    length = len(store["sample-0", 0])
    for timestep in (-1, length):
        with pytest.raises(StoreError, match=rf"timestep {timestep} of .* not in \[0, {length}\)"):
            store["sample-0", 0, timestep]
    with pytest.raises(StoreError, match="key 'sample-0' must be"):
        store["sample-0"]  # type: ignore[call-overload]


def test_a_reader_pins_the_shards_it_found(tmp_path: Path) -> None:
    made = synthetic_store(tmp_path, synthetic_manifest(TARGETS["top_k"]), 4, 1, 2)
    write_synthetic_shard(made, 1, 5)
    reader = PredictionStore.open(tmp_path)
    write_synthetic_shard(made, 0, 5)
    assert (reader.committed, reader.missing(), len(reader)) == ([1], [0], 2)
    assert reader.is_committed(0)
    with pytest.raises(RolloutNotFound, match="open the store again"):
        reader[made.plan[0][0]]
    assert PredictionStore.open(tmp_path).committed == [0, 1]


def test_unpublished_work_is_never_data(tmp_path: Path) -> None:
    made = synthetic_store(tmp_path, synthetic_manifest(TARGETS["top_k"]), 4, 1, 2)
    write_synthetic_shard(made, 0, 5)
    shutil.copytree(tmp_path / "shards/00000", tmp_path / "tmp/00001-dead")
    assert PredictionStore.open(tmp_path).committed == [0]


def test_lengths_are_those_of_the_rollouts(store: PredictionStore) -> None:
    for shard, lengths in zip(store.committed, store.lengths(), strict=True):
        assert lengths.tolist() == [len(rollout) for rollout in store.shard(shard)]
        assert store.shard(shard).keys == store.plan[shard]


def test_rollouts_are_views_and_cannot_be_written(store: PredictionStore) -> None:
    rollout, shard = store["sample-1", 0], store.shard(0)
    for name, array in rollout.arrays.items():
        assert np.shares_memory(array, shard.arrays[name])
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_at_most_the_asked_number_of_shards_stays_in_memory(store: PredictionStore) -> None:
    reader = PredictionStore.open(store.path, cached_shards=1)
    first = reader.shard(0)
    assert reader.shard(0) is first
    reader.shard(1)
    assert reader.shard(0) is not first
    with pytest.raises(StoreError, match="cached_shards is 0 but must be >= 1"):
        PredictionStore.open(store.path, cached_shards=0)


def test_conditions_are_found_by_sample(store: PredictionStore) -> None:
    assert store.sample("sample-3") == {"sample_id": "sample-3", "text": "3-elpmas"}
    with pytest.raises(RolloutNotFound, match="sample 'unheard' is not in"):
        store.sample("unheard")


def test_a_store_and_its_errors_travel_to_other_processes(store: PredictionStore) -> None:
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy["sample-2", 0].codes, store["sample-2", 0].codes)
    error = pickle.loads(pickle.dumps(DamagedShard(store.path / "shards/1", "a/c", "s", "bad")))
    assert (error.shard, error.array, error.reason) == (1, "a", "bad")


def test_odd_sample_ids_name_no_files(tmp_path: Path) -> None:
    ids = ["../../up", "/etc/passwd", "con", "a/b\\c", "日本 😀", "."]
    manifest = synthetic_manifest(TARGETS["top_k"])
    samples = pa.table({"sample_id": ids, "text": ids})
    made = PredictionStore.create(tmp_path / "s", manifest, Plan.lay_out(ids, 1, 3), samples)
    for shard in made.missing():
        write_synthetic_shard(made, shard, 4)
    reader = PredictionStore.open(tmp_path / "s")
    assert [reader[sample_id, 0].sample_id for sample_id in ids] == ids
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
