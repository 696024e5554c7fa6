"""Columns, buckets, drawn numbers and tables of a store: written, read, verified, converted."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from store import DamagedShard, Plan, PredictionStore, StoreError, create, verify
from store.convert import convert
from store.encoding import array_specs, find_fault
from store.schema import (
    ROLLOUT_COLUMNS,
    Bucket,
    Column,
    Compact,
    Dense,
    Fast,
    Manifest,
    Profile,
    TableFacts,
    TopK,
)
from store.sealed import checksum, seal, unseal
from store.shard import ROLLOUTS_SCHEMA, RolloutTable, ShardRecord
from store.sums import file_sum
from store.synthetic import (
    synthetic_arrays,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)
from store.tables import table_bytes
from tests.golden_stores import GOLDEN
from tests.row_stores import (
    BUCKETS,
    COLUMNS,
    PLAN,
    ROWS,
    SAMPLES,
    manifest_of,
    rows_store,
    table_at,
)

PROFILES = [Fast(), Compact()]
each_profile = pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.kind)


@pytest.fixture(scope="module", params=PROFILES, ids=lambda profile: profile.kind)
def whole(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    return rows_store(folder / "store", folder / "table", request.param).path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "store")


def test_what_was_written_is_read(whole: Path) -> None:
    store = pickle.loads(pickle.dumps(PredictionStore.open(whole)))
    assert store.plan == PLAN
    assert store.manifest.timestep_s is None
    for shard, keys in enumerate(PLAN):
        bucket = PLAN.bucket_of(shard)
        for key in keys:
            found = store[key]
            expected = synthetic_arrays(store.manifest, key, len(found), bucket)
            assert found.arrays.keys() == expected.keys()
            for name, values in expected.items():
                assert found.arrays[name].dtype == values.dtype
                np.testing.assert_array_equal(found.arrays[name], values)
                np.testing.assert_array_equal(found[2].arrays[name], values[2])
            drawn = {"latent": found.seed, "condition": found.seed + 1}
            assert found.drawn == found[2].drawn == drawn
            row = keys.index(key)
            assert {n: int(v[row]) for n, v in store.rollout_table(shard).drawn.items()} == drawn
    for row, tensors in enumerate(ROWS):
        found = store.table("latents")[row]
        assert found.keys() == tensors.keys()
        for name, values in tensors.items():
            np.testing.assert_array_equal(found[name], values)
    found = verify(whole)
    assert (found.ok, found.shards, found.rollouts) == (True, 3, 5)


def test_every_shard_has_the_arrays_of_its_bucket(whole: Path) -> None:
    manifest = PredictionStore.open(whole).manifest
    rows = [f"row.{column.name}" for column in COLUMNS]
    shapes = [{n: s.trailing for n, s in array_specs(manifest, b).items()} for b in range(3)]
    assert [list(names) for names in shapes] == [
        ["dense.cond", "dense.delta", *rows],
        ["dense.cond", "dense.delta", *rows],
        rows,
    ]
    assert shapes[0]["row.t"] == shapes[2]["row.status"] == ()
    assert shapes[0]["row.noise"] == shapes[0]["dense.cond"] == (1, 4, 2, 3)
    assert shapes[1]["row.noise"] == shapes[1]["dense.delta"] == (1, 4, 3, 2)
    assert array_specs(manifest) == array_specs(manifest, 0)
    for shard, names in enumerate(shapes):
        record = json.loads((whole / f"shards/{shard:05d}/shard.json").read_text())
        files = {file.split("/")[0] for file in record["files"] if "/" in file}
        assert files == set(names)


def test_stock_zarr_and_parquet_read_it(whole: Path) -> None:
    store = PredictionStore.open(whole)
    for shard in store.committed:
        folder = whole / f"shards/{shard:05d}"
        group = zarr.open_group(folder, mode="r")
        for name, values in store.shard(shard).arrays.items():
            array = group[name]
            assert isinstance(array, zarr.Array)
            assert (array.dtype, array.shape) == (values.dtype, values.shape)
            np.testing.assert_array_equal(array[:], values)
            header = json.loads((folder / name / "zarr.json").read_text())
            spelled = json.loads(json.dumps(array.metadata.to_dict()["codecs"]))
            assert header["codecs"] == spelled
        table = pq.read_table(folder / "rollouts.parquet")
        assert table.schema.names[-3:] == ["seed", "latent", "condition"]
        assert table.schema.field("latent") == pa.field("latent", pa.int64(), nullable=False)
    plan = pq.read_table(whole / "plan.parquet")
    assert plan.schema.field("bucket") == pa.field("bucket", pa.int16(), nullable=False)
    assert plan["bucket"].to_pylist() == [0, 0, 1, 2, 2]


@each_profile
def test_a_golden_store_reads_as_it_did(profile: Profile) -> None:
    store = PredictionStore.open(GOLDEN / profile.kind / "rows")
    with np.load(GOLDEN / "rows.npz", allow_pickle=False) as file:
        prefix = f"{profile.kind}/"
        expected = {n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)}
    assert store.fingerprint == expected.pop("fingerprint").item()
    found: dict[str, Any] = {}
    for key in store:
        rollout, name = store[key], f"{key[0]}/{key[1]}"
        found |= {f"{name}/{array}": values for array, values in rollout.arrays.items()}
        found |= {f"{name}/drawn/{n}": np.int64(number) for n, number in rollout.drawn.items()}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
        assert found[name].tobytes() == values.tobytes()
    assert [row["label"].item() for row in store.table("latents")] == list(range(5))
    assert verify(store.path).ok


def test_a_store_without_any_of_it_is_spelled_as_before() -> None:
    document = synthetic_manifest(TopK(k=3)).model_dump(mode="json")
    assert not document.keys() & {"columns", "drawn", "buckets", "tables", "recording"}
    assert document["timestep_s"] == 0.08
    assert {field.name for field in ROLLOUTS_SCHEMA} == ROLLOUT_COLUMNS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": (COLUMNS[0], COLUMNS[0])}, r"names of columns given twice is \['t'\]"),
        ({"columns": ({"name": "../t", "dtype": "float64"},)}, r"group is '\.\./t'"),
        ({"columns": ({"name": "t", "dtype": "complex64"},)}, "dtype"),
        ({"drawn": ("latent", "latent")}, r"names of drawn given twice is \['latent'\]"),
        ({"drawn": ("latent", "seed")}, r"drawn is \['seed'\] but must be other names than"),
        ({"drawn": (".",)}, r"group is '\.'"),
        ({"tables": {"a/b": {"rows": 1, "rows_per_part": 1}}}, "group is 'a/b'"),
        ({"tables": {"..": {"rows": 1, "rows_per_part": 1}}}, r"group is '\.\.'"),
        ({"tables": {"a": {"rows": -1, "rows_per_part": 1}}}, "rows"),
        ({"tables": {"a": {"rows": 1, "rows_per_part": 0}}}, "rows_per_part"),
        ({"buckets": ({"shape": (4, 3, 2)},)}, r"shape of bucket 0 is \(4, 3, 2\)"),
        ({"buckets": ({"shape": (4, 0, 2)},)}, "buckets.0.shape"),
        ({"buckets": ({"shape": (2**13, 2**14)},)}, "must be of at most 67108864 numbers"),
        ({"columns": ()}, r"buckets is .*predicted=False.* but must be predicted: a shard needs"),
        ({"target": TopK(k=2)}, "target"),
        ({"timestep_s": 0.0}, r"timestep_s is 0\.0 but must be > 0"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        manifest_of(**changes)


def test_what_only_dense_targets_have_is_refused_of_others() -> None:
    document = synthetic_manifest(TopK(k=2)).model_dump()
    for name, values in (("columns", COLUMNS), ("buckets", BUCKETS)):
        with pytest.raises(ValueError, match=rf"{name} is .* but must be empty: use the target"):
            Manifest.model_validate(document | {name: values})


def test_the_plan_and_the_manifest_agree_on_buckets(tmp_path: Path) -> None:
    keys = list(PLAN)
    with pytest.raises(StoreError, match="buckets names 2 shards of 3"):
        Plan.of(keys, buckets=[0, 1])
    for bucket in (-1, 2**15):
        with pytest.raises(StoreError, match=rf"bucket {bucket} must be in \[0, 4096\)"):
            Plan.of(keys, buckets=[0, 1, bucket])
    assert Plan.of(keys) != PLAN != Plan.of(keys, buckets=[0, 1, 1])
    assert Plan.of(keys, buckets=[0, 1, 2]) == PLAN
    table = PLAN.to_table()
    assert Plan.from_table(table, "plan") == PLAN
    torn = table.set_column(3, table.schema.field(3), pa.array([0, 1, 1, 2, 2], pa.int16()))
    with pytest.raises(StoreError, match="plan: a shard is of several buckets"):
        Plan.from_table(torn, "plan")
    manifest = manifest_of()
    below = table.set_column(3, table.schema.field(3), pa.array([0, 0, 1, -1, -1], pa.int16()))
    for plan, message in (
        (Plan.from_table(below, "plan"), "shard 2 is of bucket -1 but the manifest has buckets 0"),
        (Plan.of(keys), "has no bucket but the manifest has 3"),
        (Plan.of(keys, buckets=[0, 1, 3]), "shard 2 is of bucket 3 but the manifest has buckets 0"),
    ):
        with pytest.raises(StoreError, match=message):
            PredictionStore.create(tmp_path / "store", manifest, plan, SAMPLES)
    with pytest.raises(StoreError, match="has buckets but the manifest has 0"):
        PredictionStore.create(tmp_path / "store", manifest_of(buckets=()), PLAN, SAMPLES)
    assert not (tmp_path / "store").exists()


def refusing(path: Path, shard: int, change: Callable[[dict[str, Any]], object]) -> str:
    """What a writer says of the first rollout of a shard whose arguments were changed."""
    store = PredictionStore.open(path)
    shutil.rmtree(path / f"shards/{shard:05d}")
    key = PLAN[shard][0]
    given = {
        "arrays": synthetic_arrays(store.manifest, key, 3, PLAN.bucket_of(shard)),
        "drawn": {"latent": 1, "condition": -(2**63)},
    }
    with PredictionStore.open(path).writer(shard) as writer:
        change(given)
        with pytest.raises(StoreError) as caught:
            writer.append(
                *key, given["arrays"], stop_reason="x", weight=1.0, seed=0, drawn=given["drawn"]
            )
    assert repr(key[0]) in str(caught.value)
    return str(caught.value)


def poke(array: str, value: float) -> Callable[[dict[str, Any]], object]:
    """Set a value of the second timestep."""
    return lambda given: given["arrays"][array].__setitem__((1, ...), value)


@pytest.mark.parametrize(
    ("shard", "change", "messages"),
    [
        (0, poke("row.t", np.nan), ["timestep 1: array 'row.t'", "it holds NaN or infinity"]),
        (0, poke("row.scale", np.inf), ["timestep 1: array 'row.scale'"]),
        (0, poke("row.half", np.inf), ["array 'row.half'", "set a wider type of the column"]),
        (2, poke("row.noise", -np.inf), ["timestep 1, stream 'prediction': array 'row.noise'"]),
        (0, poke("dense.delta", np.nan), ["array 'dense.delta'", "set target.dtype: float32"]),
        (0, lambda g: g["arrays"].pop("row.t"), ["['row.t'] are missing"]),
        (2, lambda g: g["arrays"].update({"dense.cond": 0}), ["['dense.cond'] are not of this"]),
        (1, lambda g: g["arrays"].update({"row.noise": np.zeros((3, 1, 4, 2, 3), np.float16)}),
         ["array 'row.noise'", "must be (3, 1, 4, 3, 2)"]),
        (0, lambda g: g["arrays"].update({"row.t": np.zeros((3, 1))}), ["must be (3,)"]),
        (0, lambda g: g["arrays"].update({"row.status": np.zeros(3, np.int64)}), ["uint8"]),
        (0, lambda g: g["drawn"].pop("latent"), ["drawn has ['condition'] but the manifest lists"]),
        (0, lambda g: g["drawn"].update(more=1), ["drawn has ['condition', 'latent', 'more']"]),
        (0, lambda g: g["drawn"].update(latent=2**63), ["drawn 'latent' is 9223372036854775808"]),
        (0, lambda g: g["drawn"].update(latent=0.5), ["drawn 'latent' is 0.5 but must be an int"]),
    ],
)  # fmt: skip
def test_a_rollout_that_the_manifest_does_not_allow_is_refused_by_place(
    path: Path, shard: int, change: Callable[[dict[str, Any]], object], messages: list[str]
) -> None:
    text = refusing(path, shard, change)
    assert all(message in text for message in messages), text


def test_a_table_of_rollouts_has_exactly_the_columns_of_the_manifest() -> None:
    keys = PLAN[0]
    numbers = {"latent": np.array([1, -2]), "condition": np.array([3, 4])}
    facts = (np.array([0, 2, 5]), ("x", "y"), np.ones(2), np.zeros(2, np.uint64))
    table = RolloutTable(*facts, numbers).to_table(keys)
    found = RolloutTable.from_table(table, PLAN, 0, 5, ["latent", "condition"])
    assert {name: values.tolist() for name, values in found.drawn.items()} == {
        "latent": [1, -2], "condition": [3, 4]
    }  # fmt: skip
    for drawn in ([], ["latent"], ["condition", "latent"], ["latent", "condition", "more"]):
        with pytest.raises(StoreError, match=r"its columns are .* not those of rollouts"):
            RolloutTable.from_table(table, PLAN, 0, 5, drawn)


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alter a manifest and give it a checksum that is right."""
    content = json.loads((path / "manifest.json").read_text())
    del content["checksum"]
    change(content)
    content |= {"checksum": checksum(content)}
    text = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    (path / "manifest.json").write_text(text)


PART = "tables/latents/00000.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tables"]["latents"].update(rows=7), "are not the 4 files of the tables"),
        (lambda m: m["tables"]["latents"].update(rows=2**31 - 1), "are not the 1073741824 files"),
        (lambda m: m["tables"].update({"../x": m["tables"].pop("latents")}), "group is '../x'"),
        (lambda m: m["tables"].update(other=m["tables"].pop("latents")), "tables ['other']"),
        (lambda m: m.pop("tables"), "which are not the 0 files of the tables []"),
        (lambda m: m["files"].update({"tables/../../x": m["files"].pop(PART)}), "tables/../../x"),
        (lambda m: m["files"].pop(PART), "are not the 3 files of the tables"),
        (lambda m: m.pop("buckets"), "has buckets but the manifest has 0"),
        (lambda m: m["buckets"].pop(), "shard 2 is of bucket 2 but the manifest has buckets 0"),
        (lambda m: m["columns"][0].pop("latent"), "columns.0.latent: Field required"),
        (lambda m: m["columns"][0].update(shape=[1]), "columns.0.shape: Extra inputs"),
        (lambda m: m.pop("timestep_s"), "timestep_s: Field required"),
    ],
)
def test_a_hostile_manifest_is_refused_and_verify_names_a_file(
    path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    reseal(path, change)
    with pytest.raises(StoreError) as caught:
        PredictionStore.open(path)
    assert message in str(caught.value)
    found = verify(path)
    assert not found.ok
    assert {damage.file for damage in found.bad} <= {"manifest.json", "plan.parquet"}


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(),
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["../x", "/etc", "a", []]),
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_value_in_what_describes_rows_is_refused_or_reads_within_the_store(
    whole: Path, data: st.DataObject
) -> None:
    """Of any one value altered: the store is refused, or what is read is what lies in it."""
    names = ("columns", "drawn", "buckets", "tables", "recording", "timestep_s", "files")

    def change(content: dict[str, Any]) -> None:
        at: Any = content
        key: Any = data.draw(st.sampled_from(names))
        while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
            key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if isinstance(at, dict) and data.draw(st.booleans()):
            at[data.draw(st.text(max_size=9))] = at.pop(key)
        else:
            at[key] = data.draw(VALUES)

    with tempfile.TemporaryDirectory() as root:
        path = Path(root)
        for entry in whole.iterdir():
            if entry.name != "manifest.json":
                os.symlink(entry, path / entry.name)
        shutil.copy(whole / "manifest.json", path)
        reseal(path, change)
        try:
            store = PredictionStore.open(path)
        except StoreError:
            assert not verify(path).ok
            return
        manifest = PredictionStore.open(whole).manifest
        assert store.manifest.tables == manifest.tables
        assert store.manifest.files.keys() >= {PART, "plan.parquet", "samples.parquet"}
        for damage in verify(path).bad:
            assert damage.reason


@pytest.mark.parametrize("shard", range(3))
def test_a_store_of_other_columns_does_not_read_these_shards(path: Path, shard: int) -> None:
    """Whatever the manifest says now, a shard is of the one that it was made for."""
    reseal(path, lambda content: content["columns"].pop())
    store = PredictionStore.open(path)
    with pytest.raises(DamagedShard, match="it is of another store"):
        store.shard(shard)


def rewrite(path: Path, shard: int, file: str, content: bytes) -> None:
    """Replace a file of a shard, and its sum in the record, so that only its meaning is wrong."""
    folder = path / f"shards/{shard:05d}"
    record, _ = unseal(folder / "shard.json", ShardRecord)
    (folder / file).write_bytes(content)
    sums = record.files | {file: file_sum(content)}
    (folder / "shard.json").write_bytes(seal(record.model_copy(update={"files": sums})))


def test_a_shard_with_a_value_or_column_that_none_may_have_is_named(path: Path) -> None:
    rollouts = pq.read_table(path / "shards/00000/rollouts.parquet")
    rewrite(path, 0, "rollouts.parquet", table_bytes(rollouts.drop_columns(["latent"])))
    store = PredictionStore.open(path)
    with pytest.raises(DamagedShard, match=r"rollouts\.parquet.* its columns are"):
        store.shard(0)
    found = verify(path)
    assert [(d.shard, d.file, d.array) for d in found.bad] == [(0, "rollouts.parquet", None)]
    assert found.shards == 2


def test_verify_finds_a_value_that_is_not_finite_in_a_column(tmp_path: Path) -> None:
    store = rows_store(tmp_path / "store", tmp_path / "table")
    file = "row.scale/c/0"
    content = bytearray((store.path / "shards/00001" / file).read_bytes())
    content[8:12] = np.float32(np.inf).tobytes()
    rewrite(store.path, 1, file, bytes(content))
    (damage,) = verify(store.path).bad
    assert (damage.shard, damage.file, damage.array) == (1, file, "row.scale")
    assert "sample 'c', variation 0" in damage.reason
    assert "timestep 2: it holds NaN or infinity" in damage.reason


def test_what_a_codec_rounds_is_no_column(whole: Path) -> None:
    store = PredictionStore.open(whole)
    for shard in store.committed:
        bucket = store.plan.bucket_of(shard)
        assert find_fault(store.manifest, store.shard(shard).arrays, bucket) is None
        other = find_fault(store.manifest, store.shard(shard).arrays, 2 - bucket)
        assert (other is None) == (bucket == 1 or shard == 1 == 2 - bucket)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (lambda p: (p / PART).unlink(), PART, "it is missing"),
        (lambda p: flipped(p / PART), PART, "it was altered"),
        (lambda p: os.truncate(p / PART, 40), PART, "it has 40 bytes but must have"),
        (lambda p: (p / "tables/x").touch(), "tables/x", "it is no file of a table: move it out"),
        (lambda p: (p / "tables/latents/x").mkdir(), "tables/latents/x/", "it is no file of a"),
        (lambda p: (p / "tables/other").symlink_to(p), "tables/other", "it is no file of a table"),
    ],
)
def test_verify_names_what_is_wrong_with_a_table(
    path: Path, damage: Callable[[Path], object], file: str, reason: str
) -> None:
    damage(path)
    found = verify(path)
    assert found.shards == 3
    (bad,) = found.bad
    assert (bad.shard, bad.file, bad.array) == (None, file, None)
    assert reason in bad.reason
    if file == PART:
        with pytest.raises(StoreError, match=rf"00000\.safetensors: {reason}"):
            PredictionStore.open(path).table("latents")[1]
        assert PredictionStore.open(path).table("latents")[2]["label"] == 2


def test_a_folder_of_tables_that_is_a_link_is_named(path: Path) -> None:
    (path / "tables").rename(path.parent / "elsewhere")
    (path / "tables").symlink_to(path.parent / "elsewhere")
    assert [damage.file for damage in verify(path).bad] == ["tables"]


def test_an_unknown_table_is_refused_by_name(whole: Path) -> None:
    with pytest.raises(StoreError, match=r"has no table '\.\./latents': it has \['latents'\]"):
        PredictionStore.open(whole).table("../latents")


def test_tables_are_linked_into_a_store_or_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = rows_store(tmp_path / "one", tmp_path / "table")
    source = tmp_path / "table" / "00000.safetensors"
    assert (linked.path / PART).samefile(source)

    link = os.link

    def elsewhere(source: Path, target: Path, **options: Any) -> None:
        if Path(source).parent == tmp_path / "table":
            raise OSError(errno.EXDEV, "another file system")
        link(source, target, **options)

    monkeypatch.setattr(create.os, "link", elsewhere)
    shutil.rmtree(tmp_path / "table")
    copied = rows_store(tmp_path / "two", tmp_path / "table")
    assert not (copied.path / PART).samefile(source)
    assert (copied.path / PART).read_bytes() == source.read_bytes()
    assert copied.fingerprint == linked.fingerprint
    assert verify(copied.path).ok
    assert list((copied.path / "tmp").iterdir()) == []


def test_tables_and_their_folders_are_durable_before_the_manifest_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, link = os.fsync, os.link
    synced: set[tuple[int, int]] = set()
    before: list[bool] = []
    root = tmp_path / "store"

    def place_of(status: os.stat_result) -> tuple[int, int]:
        return status.st_dev, status.st_ino

    def traced_sync(descriptor: int) -> None:
        synced.add(place_of(os.fstat(descriptor)))
        sync(descriptor)

    def traced_link(source: Path, target: Path, **options: Any) -> None:
        if target == root / "manifest.json":
            lie = [root, *root.glob("tables/**/*"), root / "tables"]
            before.extend(place_of(path.stat()) in synced for path in lie)
        link(source, target, **options)

    # What was synced when the table was written does not count.
    manifest = manifest_of(tables={"latents": table_at(tmp_path / "table").model_dump()})
    monkeypatch.setattr(os, "fsync", traced_sync)
    monkeypatch.setattr(os, "link", traced_link)
    PredictionStore.create(root, manifest, PLAN, SAMPLES, tables={"latents": tmp_path / "table"})
    assert before == [True] * (1 + 1 + 3 + 1), "the store, tables/latents, its files, tables/"


def test_workers_that_create_a_store_at_once_make_one(tmp_path: Path) -> None:
    manifest = manifest_of(tables={"latents": table_at(tmp_path / "table").model_dump()})
    barrier = Barrier(6)

    def begin(_: int) -> str:
        barrier.wait()
        tables = {"latents": tmp_path / "table"}
        path = tmp_path / "store"
        return PredictionStore.create(path, manifest, PLAN, SAMPLES, tables=tables).fingerprint

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(begin, range(6)))) == 1
    assert verify(tmp_path / "store").ok
    assert list((tmp_path / "store/tmp").iterdir()) == []


def test_another_table_than_the_stores_is_refused(tmp_path: Path) -> None:
    store = rows_store(tmp_path / "store", tmp_path / "table")
    facts = store.manifest.tables
    manifest = manifest_of(tables={name: facts.model_dump() for name, facts in facts.items()})

    def create_with(table: Path | None) -> PredictionStore:
        tables = {} if table is None else {"latents": table}
        return PredictionStore.create(store.path, manifest, PLAN, SAMPLES, tables=tables)

    shutil.copytree(tmp_path / "table", tmp_path / "copy")
    for same in (tmp_path / "table", tmp_path / "copy"):
        assert create_with(same).fingerprint == store.fingerprint
    table_at(tmp_path / "other", [row | {"latent": row["latent"] + 1} for row in ROWS])
    with pytest.raises(StoreError, match=rf"differs in {PART}: other tensors than in .*other"):
        create_with(tmp_path / "other")
    with pytest.raises(StoreError, match=r"tables given for .* are \[\] but the manifest calls"):
        create_with(None)


def test_a_store_is_not_made_of_a_damaged_table(tmp_path: Path) -> None:
    facts = table_at(tmp_path / "table")
    manifest = manifest_of(tables={"latents": facts.model_dump()})
    file = tmp_path / "table" / "00002.safetensors"
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(StoreError, match=r"00002\.safetensors"):
        PredictionStore.create(
            tmp_path / "store", manifest, PLAN, SAMPLES, tables={"latents": tmp_path / "table"}
        )
    assert not (tmp_path / "store").exists()


def test_a_store_begun_with_another_table_is_not_finished(tmp_path: Path) -> None:
    manifest = manifest_of(tables={"latents": table_at(tmp_path / "table").model_dump()})
    begun = tmp_path / "store" / PART
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"other")
    with pytest.raises(StoreError, match="a store was begun here with another plan"):
        PredictionStore.create(
            tmp_path / "store", manifest, PLAN, SAMPLES, tables={"latents": tmp_path / "table"}
        )
    assert begun.read_bytes() == b"other"


def test_conversion_keeps_every_bit_and_all_beside_it(tmp_path: Path) -> None:
    source = rows_store(tmp_path / "fast", tmp_path / "table")
    there = convert(source.path, tmp_path / "compact", Compact())
    back = convert(tmp_path / "compact", tmp_path / "again", Fast())
    for result in (there, back):
        assert (result.shards, result.rollouts, result.stated_nats) == (3, 5, 0)
        assert result.losses.keys() == array_specs(source.manifest).keys()
        assert all(loss.exact for loss in result.losses.values())
    again = PredictionStore.open(tmp_path / "again")
    for key in source:
        one, two = source[key], again[key]
        assert one.drawn == two.drawn
        for name, values in one.arrays.items():
            assert two.arrays[name].tobytes() == values.tobytes()
    assert (again.path / PART).samefile(source.path / PART)
    assert verify(tmp_path / "compact").ok
    flipped(source.path / PART)
    with pytest.raises(StoreError, match=r"00000\.safetensors: it was altered"):
        convert(source.path, tmp_path / "more", Compact())


def test_a_difference_in_a_column_is_found_at_its_timestep(tmp_path: Path) -> None:
    source = rows_store(tmp_path / "one", tmp_path / "table", timesteps=20)
    convert(source.path, tmp_path / "two", Fast())
    file = "row.t/c/0"
    content = bytearray((tmp_path / "two/shards/00000" / file).read_bytes())
    content[8 * 5] ^= 1
    rewrite(tmp_path / "two", 0, file, bytes(content))
    with pytest.raises(StoreError, match=r"array 'row\.t'.*sample 'a', variation 0, timestep 5 "):
        convert(source.path, tmp_path / "two", Fast())


def test_a_difference_in_what_was_drawn_is_found(tmp_path: Path) -> None:
    source = rows_store(tmp_path / "one", tmp_path / "table")
    convert(source.path, tmp_path / "two", Fast())
    table = pq.read_table(tmp_path / "two/shards/00002/rollouts.parquet")
    other = table.set_column(7, table.schema.field(7), pa.array([1, 2], pa.int64()))
    rewrite(tmp_path / "two", 2, "rollouts.parquet", table_bytes(other))
    with pytest.raises(StoreError, match=r"shard 00002 .* holds another latent of the rollouts"):
        convert(source.path, tmp_path / "two", Fast())


def test_a_store_without_buckets_may_have_columns_and_no_table(tmp_path: Path) -> None:
    manifest = synthetic_manifest(Dense(branches="guided"), streams=2)
    columns = (Column(name="t", dtype="float64"), Column(name="x", dtype="float32", latent=True))
    manifest = Manifest.model_validate(manifest.model_dump() | {"columns": columns})
    store = synthetic_store(tmp_path / "store", manifest, 2, 1, 2)
    write_synthetic_shard(store, 0, 4)
    shard = PredictionStore.open(store.path).shard(0)
    assert shard.arrays["row.x"].shape[1:] == (2, 4, 3)
    assert shard.arrays["row.t"].ndim == 1
    assert shard[0].drawn == {}
    assert verify(store.path).ok
    assert "bucket" not in pq.read_schema(store.path / "plan.parquet").names


def test_a_bucket_has_any_shape(tmp_path: Path) -> None:
    """Of one axis, of several, and of none."""
    shapes: list[tuple[int, ...]] = [(4, 2, 3), (5,), ()]
    manifest = manifest_of(buckets=[Bucket(shape=shape) for shape in shapes])
    store = PredictionStore.create(tmp_path / "store", manifest, PLAN, SAMPLES)
    for shard, shape in enumerate(shapes):
        write_synthetic_shard(store, shard, 4)
        arrays = PredictionStore.open(store.path).shard(shard).arrays
        assert arrays["dense.cond"].shape[1:] == (1, *shape)
    assert verify(store.path).ok


def test_facts_of_a_table_count_its_files() -> None:
    counts = [TableFacts(rows=rows, rows_per_part=2).parts for rows in range(5)]
    assert counts == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("profile", [Fast(), Compact()], ids=lambda profile: profile.kind)
def test_large_latents_lie_in_chunks_that_waste_less_than_a_mebibyte(tmp_path, profile):
    shape = (4, 64, 64)  # 32 KiB of float16, so that a chunk of 1 MiB has 32 of them
    manifest = manifest_of(
        profile,
        streams=[{"kind": "continuous", "name": "x", "group": "x", "shape": shape}],
        buckets=[{"shape": shape}],
    )
    plan, samples = (
        Plan.of([[("a", 0)]], buckets=[0]),
        pa.table({"sample_id": ["a"], "text": ["w"]}),
    )
    store = PredictionStore.create(tmp_path / "store", manifest, plan, samples)
    write_synthetic_shard(store, 0, 70)
    store = PredictionStore.open(tmp_path / "store")
    group = zarr.open_group(tmp_path / "store" / "shards" / "00000", mode="r")
    rows = {name: np.asarray(group[name][:]) for name in store.shard(0).arrays}
    for name, values in store.shard(0).arrays.items():
        large = name in ("dense.cond", "dense.delta", "row.noise")
        assert group[name].chunks[0] == (32 if large else 256)
        assert group[name].shards[0] == (96 if large else 256)
        np.testing.assert_array_equal(values, rows[name])
    alone = PredictionStore.open(tmp_path / "store")
    for timestep in (0, 31, 32, 69):
        for name, values in alone["a", 0, timestep].arrays.items():
            np.testing.assert_array_equal(values, rows[name][timestep])
    assert verify(store.path).ok


@pytest.mark.parametrize(
    ("shape", "timesteps"),
    [
        ((16, 256, 256), 1),  # 2 MiB of float16
        ((8, 256, 256), 1),  # 1 MiB
        ((3, 100, 100), 16),  # of 17 that would fit, a power of two
        ((1, 8, 8), 256),
    ],
)
def test_a_chunk_of_latents_is_the_largest_power_of_two_that_fits(shape, timesteps):
    manifest = manifest_of(
        streams=[{"kind": "continuous", "name": "x", "group": "x", "shape": shape}],
        buckets=[{"shape": shape}],
    )
    assert array_specs(manifest, 0)["dense.cond"].chunk_timesteps == timesteps
