"""What was written is what is read, by key, by timestep, by shard and by stock Zarr."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr

from store import (
    DamagedShard,
    Plan,
    PredictionStore,
    Rollout,
    RolloutNotFound,
    StoreError,
    reader,
)
from store.plan import Key
from store.schema import (
    Compact,
    Dense,
    Fast,
    Full,
    Hidden,
    Profile,
    Sampled,
    Target,
    TopK,
)
from store.shard_folder import ShardFolder
from store.synthetic import (
    synthetic_arrays,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)
from store.zarr_files import ArrayFiles

TARGETS: dict[str, Target] = {
    "top_k": TopK(k=4, temperatures=(1.0, 2.0), moments=True, tail_samples=5),
    "top_k_fp32": TopK(k=3, dtype="float32"),
    "full": Full(),
    "full_levels": Full(levels=True),
    "full_fp32_both": Full(branches="both", dtype="float32"),
    "sampled": Sampled(draws=7),
    "hidden": Hidden(),
    "hidden_both": Hidden(branches="both", dtype="float32"),
    "dense": Dense(),
    "dense_guided": Dense(branches="guided", dtype="float32"),
}
LOSSY = ("logits", "hidden", "tail_logmass", "moments")
"""Parts of the names of arrays that the profile `compact` rounds."""
PROFILES: dict[str, Profile] = {"fast": Fast(), "compact": Compact()}
ROOT = Path(__file__).parent.parent
by_profile = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)


@pytest.fixture(scope="module", params=PROFILES.values(), ids=PROFILES)
def store(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> PredictionStore:
    """Three shards of four rollouts, of which the last is not committed."""
    path = tmp_path_factory.mktemp("reader") / "store"
    manifest = synthetic_manifest(TARGETS["top_k"], profile=request.param)
    made = synthetic_store(path, manifest, 6, 2, 4)
    for shard in (0, 1):
        write_synthetic_shard(made, shard, 40)
    return PredictionStore.open(path)


def assert_written(store: PredictionStore, rollout: Rollout) -> None:
    """A rollout holds what was written: exactly, but for what `compact` rounds."""
    key = (rollout.sample_id, rollout.variation)
    written = synthetic_arrays(store.manifest, key, len(rollout))
    assert set(rollout.arrays) == set(written)
    for name, array in written.items():
        found = rollout.arrays[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        rounded = any(part in name for part in LOSSY) and isinstance(
            store.manifest.profile, Compact
        )
        if rounded:
            np.testing.assert_allclose(found, array, rtol=0.02, atol=0.5)
        else:
            np.testing.assert_array_equal(found, array)


@by_profile
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_stock_zarr_reads_every_array_as_we_do(
    tmp_path: Path, target: Target, profile: Profile
) -> None:
    made = synthetic_store(tmp_path, synthetic_manifest(target, 3, profile=profile), 2, 1, 2)
    write_synthetic_shard(made, 0, 600)  # over the 256 timesteps of a chunk
    store = PredictionStore.open(tmp_path)
    shard = store.shard(0)
    group = zarr.open_group(tmp_path / "shards/00000", mode="r")
    assert shard.offsets[-1] > 512
    assert sorted(group.array_keys()) == sorted(shard.arrays)
    for name, array in shard.arrays.items():
        stock = group[name]
        assert isinstance(stock, zarr.Array)
        assert stock.dtype == array.dtype
        np.testing.assert_array_equal(stock[:], array)
    for key in made.plan[0]:
        assert_written(store, store[key])


def test_a_rollout_and_its_timesteps_are_found_by_key(store: PredictionStore) -> None:
    assert len(store) == len(list(store.keys())) == 8
    for key in store:
        rollout = store[key]
        assert key in store
        assert (rollout.sample_id, rollout.variation, rollout.stop_reason) == (*key, "end")
        assert_written(store, rollout)
        last = store[*key, len(rollout) - 1]
        for name, array in rollout.arrays.items():
            np.testing.assert_array_equal(last.arrays[name], array[-1])
        np.testing.assert_array_equal(last.codes, rollout.codes[-1])


def test_a_rollout_by_key_is_the_one_in_its_shard(store: PredictionStore) -> None:
    alone = {key: store[key] for key in store}
    for shard in store.committed:
        for rollout in store.shard(shard):
            found = alone[rollout.sample_id, rollout.variation]
            assert (found.weight, found.seed) == (rollout.weight, rollout.seed)
            for name, array in rollout.arrays.items():
                np.testing.assert_array_equal(found.arrays[name], array)


def test_a_rollout_of_encoded_arrays_decodes_only_the_chunks_that_it_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = synthetic_store(tmp_path, synthetic_manifest(TopK(k=3), profile=Compact()), 8, 1, 8)
    write_synthetic_shard(made, 0, 200)
    store, decode = PredictionStore.open(tmp_path), ArrayFiles.decode_chunk
    decoded: list[tuple[str, int]] = []

    def counted(self: ArrayFiles, content: Any, bounds: Any, chunk: int, out: Any) -> None:
        decoded.append((self.spec.name, chunk))
        decode(self, content, bounds, chunk, out)

    monkeypatch.setattr(ArrayFiles, "decode_chunk", counted)
    offsets = store.rollout_table(0).offsets
    for row, key in enumerate(store.plan[0]):
        decoded.clear()
        store[key]
        chunks = range(int(offsets[row]) // 256, (int(offsets[row + 1]) - 1) // 256 + 1)
        assert (
            sorted(decoded)
            == sorted((name, chunk) for name in store.shard(0).arrays for chunk in chunks)
            or not chunks
        )
        store = PredictionStore.open(tmp_path)


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


def test_a_shard_or_timestep_that_is_no_integer_is_refused(store: PredictionStore) -> None:
    for timestep in (1.0, 1.5, "1", None):
        with pytest.raises(StoreError, match=r"timestep .* of key .* must be an integer"):
            store["sample-0", 0, timestep]  # type: ignore[index]
    for shard in (1.0, 0.5, "1", None):
        for read in (store.shard, store.rollout_table, store.folder, store.writer):
            with pytest.raises(StoreError, match=rf"shard {shard!r} of .* must be an integer"):
                read(shard)  # type: ignore[arg-type]
    assert store.shard(np.int64(1)) is not None
    assert store["sample-0", 0, np.int32(1)].timestep == 1


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


def test_progress_over_lengths_moves_with_the_shards_that_were_read(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def progress(shards):
        for shard in shards:
            events.append(f"next {shard}")
            yield shard

    monkeypatch.setattr(reader, "in_threads", map)
    real = ShardFolder.read_lengths
    monkeypatch.setattr(
        ShardFolder, "read_lengths", lambda self: events.append(f"read {self.number}") or real(self)
    )
    store.lengths(progress)
    assert events == ["next 0", "read 0", "next 1", "read 1"]


def test_rollouts_cannot_be_written_and_are_views_where_they_can(store: PredictionStore) -> None:
    shard = store.shard(0)
    for rollout in (PredictionStore.open(store.path)["sample-1", 0], shard[1]):
        for array in rollout.arrays.values():
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0
            if isinstance(store.manifest.profile, Fast):
                with pytest.raises(ValueError, match="cannot set WRITEABLE"):
                    array.setflags(write=True)
    for name, array in store["sample-1", 0].arrays.items():
        assert np.shares_memory(array, shard.arrays[name])


def test_at_most_the_asked_number_of_shards_stays_in_memory(store: PredictionStore) -> None:
    reader = PredictionStore.open(store.path, cached_shards=1, mapped_shards=1)
    first = reader.shard(0)
    assert reader.shard(0) is first
    reader.shard(1)
    assert reader.shard(0) is not first
    for name in ("cached_shards", "mapped_shards"):
        with pytest.raises(StoreError, match=f"{name} is 0 but must be >= 1"):
            PredictionStore.open(store.path, **{name: 0})


def test_opening_reads_no_shard_and_lists_no_array_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = synthetic_store(tmp_path, synthetic_manifest(TopK(k=3)), 1000, 1, 1)
    for shard in range(1000):
        (tmp_path / f"shards/{shard:05}").mkdir()
    monkeypatch.setattr(ShardFolder, "__init__", None)
    store = PredictionStore.open(tmp_path)
    assert store.committed == list(range(1000))
    assert (len(store), store.missing()) == (1000, [])
    assert list(store) == [key for keys in made.plan for key in keys]


def test_few_files_stay_open_however_many_shards_are_read(tmp_path: Path) -> None:
    made = synthetic_store(tmp_path, synthetic_manifest(TopK(k=3)), 12, 1, 1)
    for shard in range(12):
        write_synthetic_shard(made, shard, 3)
    store = PredictionStore.open(tmp_path, mapped_shards=3)
    before = mapped_below(tmp_path)
    for key in [*store, *store]:
        store[key]
    assert mapped_below(tmp_path) - before <= 3 * len(store.shard(0).arrays)


def mapped_below(folder: Path) -> int:
    """Files of a folder that this process maps."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/")


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open only so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    filler = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest)]  # what is free below
    limit = max(map(int, os.listdir("/proc/self/fd"))) + count
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in filler:
            os.close(descriptor)


@by_profile
def test_rollouts_of_any_number_of_shards_may_be_held_without_a_descriptor(
    tmp_path: Path, profile: Profile
) -> None:
    made = synthetic_store(tmp_path, synthetic_manifest(TopK(k=3), profile=profile), 40, 1, 1)
    for shard in range(40):
        write_synthetic_shard(made, shard, 3)
    store = PredictionStore.open(tmp_path)
    with descriptors_left(10):
        held = [store[key] for key in store]
        shards = [store.shard(shard) for shard in store.committed]
    for shard, rollout in zip(shards, held, strict=True):
        assert_written(store, rollout)
        assert_written(store, shard[0])


def test_a_want_of_descriptors_is_no_damage(store: PredictionStore) -> None:
    reader = PredictionStore.open(store.path)
    with (
        descriptors_left(0),
        pytest.raises(StoreError, match=r"00001/shard.json.*`ulimit -n`") as e,
    ):
        reader.shard(1)
    assert not isinstance(e.value, DamagedShard)
    assert "Restore" not in str(e.value)
    assert_written(reader, reader.shard(1)[0])


def test_a_shard_is_verified_once_however_often_it_is_mapped(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = PredictionStore.open(store.path, mapped_shards=1)
    keys = [store.plan[0][0], store.plan[1][0]]
    first = [reader[key] for key in keys]
    monkeypatch.setattr(ShardFolder, "open", None)
    for key, rollout in zip(keys, first, strict=True):
        np.testing.assert_array_equal(reader[key].codes, rollout.codes)


def test_conditions_are_found_by_sample(store: PredictionStore) -> None:
    assert store.sample("sample-3") == {"sample_id": "sample-3", "text": "3-elpmas"}
    with pytest.raises(RolloutNotFound, match="sample 'unheard' is not in"):
        store.sample("unheard")


def test_conditions_are_found_by_place_in_whatever_order_the_samples_are(tmp_path: Path) -> None:
    plan = Plan.lay_out(["a", "b", "c"], 2, 4)
    samples = pa.table({"sample_id": ["c", "unplanned", "a", "b"], "text": ["3", "0", "1", "2"]})
    store = PredictionStore.create(tmp_path, synthetic_manifest(TopK(k=3)), plan, samples)
    expected = {"a": "1", "b": "2", "c": "3"}
    places = [(shard, row) for shard, keys in enumerate(plan) for row in range(len(keys))][::-1]
    found = store.samples_at(*map(list, zip(*places, strict=True)))
    keys = [plan[shard][row] for shard, row in places]
    assert found == [{"sample_id": name, "text": expected[name]} for name, _ in keys]


def test_a_store_and_its_errors_travel_to_other_processes(store: PredictionStore) -> None:
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy["sample-2", 0].codes, store["sample-2", 0].codes)
    path = store.path / "shards/00001"
    error = pickle.loads(pickle.dumps(DamagedShard(path, "a/c", "sample 's'", "bad")))
    assert (error.shard, error.array, error.reason) == (1, "a", "bad")


def test_a_store_that_travels_keeps_the_shards_that_it_pinned(tmp_path: Path) -> None:
    manifest = synthetic_manifest(TopK(k=3))
    made = synthetic_store(tmp_path / "store", manifest, 4, 1, 2)
    write_synthetic_shard(made, 0, 5)
    packed = pickle.dumps(PredictionStore.open(made.path, cached_shards=2))
    write_synthetic_shard(made, 1, 5)
    assert pickle.loads(packed).committed == [0]
    shutil.rmtree(made.path)
    synthetic_store(made.path, manifest.model_copy(update={"seed": 9}), 4, 1, 2)
    with pytest.raises(StoreError, match="is another store than the one that was pickled"):
        pickle.loads(packed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_read_what_their_parent_reads(store: PredictionStore, method: str) -> None:
    script = ROOT / "tests/read_in_processes.py"
    command = [sys.executable, "-W", "error", str(script), str(store.path), method]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=300
    )
    digests = done.stdout.split()
    assert len(digests) == 6
    assert len(set(digests)) == 1


def test_threads_may_share_a_store(store: PredictionStore) -> None:
    expected = {key: store[key] for key in store}
    shared, keys = PredictionStore.open(store.path, 1, 1), list(store) * 20

    def read(key: Key) -> None:
        for rollout in (
            shared[key],
            shared.shard(store.plan.locate(key)[0])[store.plan.locate(key)[1]],
        ):
            for name, array in expected[key].arrays.items():
                np.testing.assert_array_equal(rollout.arrays[name], array)

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(read, keys))) == len(keys)


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
