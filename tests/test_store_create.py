"""Creating a store is idempotent, and refuses what would damage or shadow another one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from store import Plan, PredictionStore, StoreError
from store.schema import FileSum, Full, Guidance, Hidden, Manifest, TopK
from store.sealed import seal
from store.sums import file_sum
from store.synthetic import (
    synthetic_heads,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)
from store.tables import table_bytes
from store.verify import verify

MANIFEST = synthetic_manifest(TopK(k=4))
PLAN = Plan.lay_out(["a", "b", "c"], variations=2, rollouts_per_shard=4)
SAMPLES = pa.table({"sample_id": ["a", "b", "c"], "text": ["x", "y", "z"], "duration_s": [1, 2, 3]})


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_creating_twice_opens_what_is_there(tmp_path: Path) -> None:
    first = PredictionStore.create(tmp_path / "store", MANIFEST, PLAN, SAMPLES)
    before = tree(first.path)
    again = PredictionStore.create(tmp_path / "store", MANIFEST, PLAN, SAMPLES)
    assert tree(first.path) == before
    assert set(before) == {"manifest.json", "plan.parquet", "samples.parquet"}
    assert (again.manifest, again.plan, again.samples) == (first.manifest, PLAN, SAMPLES)


def test_a_store_of_before_architectures_is_opened_by_who_knows_one(tmp_path: Path) -> None:
    PredictionStore.create(tmp_path / "store", MANIFEST, PLAN, SAMPLES)
    known = MANIFEST.model_copy(update={"architecture": {"parameters": 7}})
    opened = PredictionStore.create(tmp_path / "store", known, PLAN, SAMPLES)
    assert opened.manifest.architecture == {}


def test_two_stores_of_the_same_inputs_have_the_same_bytes(tmp_path: Path) -> None:
    pandas_like = SAMPLES.replace_schema_metadata({"pandas": "{}"})
    one = PredictionStore.create(tmp_path / "one", MANIFEST, PLAN, SAMPLES)
    two = PredictionStore.create(tmp_path / "two", MANIFEST, PLAN, pandas_like)
    assert tree(one.path) == tree(two.path)
    assert one.fingerprint == two.fingerprint


def test_many_workers_may_create_the_same_store_at_once(tmp_path: Path) -> None:
    def create(_: int) -> str:
        return PredictionStore.create(tmp_path / "store", MANIFEST, PLAN, SAMPLES).fingerprint

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(create, range(24)))) == 1
    assert os.listdir(tmp_path / "store/tmp") == []


def test_of_two_different_creators_one_wins_and_the_other_hears_why(tmp_path: Path) -> None:
    def create(scale: float) -> str:
        manifest = MANIFEST.model_copy(update={"guidance": Guidance(scale=scale)})
        try:
            PredictionStore.create(tmp_path / "store", manifest, PLAN, SAMPLES)
        except StoreError as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(2) as pool:
        outcomes = sorted(pool.map(create, (1.0, 3.0)))
    assert outcomes[1] == "won"
    assert "guidance.scale: " in outcomes[0]
    PredictionStore.open(tmp_path / "store")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": Guidance(scale=1.5)}, "guidance.scale: 2.5 in the store, 1.5 given"),
        ({"seed": 5}, "seed: 1234 in the store, 5 given"),
        ({"target": TopK(k=5)}, "target.k: 4 in the store, 5 given"),
        ({"target": Full()}, "target.kind: 'top_k' in the store, 'full' given"),
        ({"conditioning": {"alphabet": "ab"}}, "conditioning.alphabet: None .* 'ab' given"),
    ],
)
def test_a_differing_manifest_is_refused_with_both_values(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    PredictionStore.create(tmp_path, MANIFEST, PLAN, SAMPLES)
    with pytest.raises(StoreError, match=f"exists and differs in .*{message}"):
        PredictionStore.create(tmp_path, MANIFEST.model_copy(update=change), PLAN, SAMPLES)


def test_differing_plan_and_samples_are_refused_and_named(tmp_path: Path) -> None:
    PredictionStore.create(tmp_path, MANIFEST, PLAN, SAMPLES)
    fewer = Plan.lay_out(["a", "b"], variations=2, rollouts_per_shard=4)
    with pytest.raises(StoreError, match=r"plan\.parquet: 6 rows in the store, 4 given"):
        PredictionStore.create(tmp_path, MANIFEST, fewer, SAMPLES)
    other = SAMPLES.set_column(1, "text", pa.array(["x", "y", "!"]))
    with pytest.raises(StoreError, match=r"samples\.parquet: other values .* \['text'\]"):
        PredictionStore.create(tmp_path, MANIFEST, PLAN, other)


def test_a_creation_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    whole = PredictionStore.create(tmp_path / "whole", MANIFEST, PLAN, SAMPLES)
    (tmp_path / "half/tmp/create-dead").mkdir(parents=True)
    (tmp_path / "half/plan.parquet").write_bytes((whole.path / "plan.parquet").read_bytes())
    PredictionStore.create(tmp_path / "half", MANIFEST, PLAN, SAMPLES)
    assert tree(tmp_path / "half") == tree(whole.path)


def test_an_interrupted_creation_of_another_plan_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "plan.parquet").write_bytes(b"another")
    with pytest.raises(StoreError, match="begun here with another plan; remove"):
        PredictionStore.create(tmp_path, MANIFEST, PLAN, SAMPLES)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(StoreError, match=r"holds no manifest\.json"):
        PredictionStore.open(tmp_path)


@pytest.mark.parametrize("below", ["shards/00000", "tmp/x", "store", "a/../store/b"])
def test_a_store_inside_a_store_is_refused(tmp_path: Path, below: str) -> None:
    PredictionStore.create(tmp_path, MANIFEST, PLAN, SAMPLES)
    with pytest.raises(StoreError, match=f"lies inside the store {tmp_path}: choose a path"):
        PredictionStore.create(tmp_path / below, MANIFEST, PLAN, SAMPLES)


def test_a_store_reached_through_a_link_is_refused_inside_another(tmp_path: Path) -> None:
    PredictionStore.create(tmp_path / "outer", MANIFEST, PLAN, SAMPLES)
    (tmp_path / "link").symlink_to(tmp_path / "outer/shards")
    with pytest.raises(StoreError, match="lies inside the store"):
        PredictionStore.create(tmp_path / "link/inner", MANIFEST, PLAN, SAMPLES)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(StoreError, match=r"holds \['thesis\.tex'\], which no store has"):
        PredictionStore.create(tmp_path, MANIFEST, PLAN, SAMPLES)


@pytest.mark.parametrize("path", ["gs://bucket/store", "a\0b"])
def test_a_path_that_is_no_local_folder_is_refused(path: str) -> None:
    with pytest.raises(StoreError, match=r"must be s3://|NUL character"):
        PredictionStore.open(path)


def test_a_file_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        PredictionStore.create(tmp_path / "store", MANIFEST, PLAN, SAMPLES)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (SAMPLES.drop_columns("text"), r"lack the columns \['text'\]"),
        (SAMPLES.slice(1), "lack the planned sample 'a': plan from them"),
        (pa.concat_tables([SAMPLES, SAMPLES]), "name 'a' twice: make sample ids unique"),
        (pa.table({"sample_id": ["a", None], "text": ["", ""]}), "sample id None must be"),
    ],
)
def test_samples_that_cannot_feed_a_student_are_refused(
    tmp_path: Path, samples: pa.Table, message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        PredictionStore.create(tmp_path / "store", MANIFEST, PLAN, samples)
    assert not (tmp_path / "store").exists()


def test_samples_may_lie_in_another_order_than_the_plan_and_among_others(tmp_path: Path) -> None:
    ids = ["x", "c", "a", "y", "b"]
    samples = pa.table(
        {"text": [f"of {i}" for i in ids], "sample_id": pa.array(ids, "large_string")}
    )
    store = PredictionStore.create(tmp_path / "store", MANIFEST, PLAN, samples)
    found = store.samples_of(["b", "y", "a", "b", "x"])
    assert found == [{"sample_id": i, "text": f"of {i}"} for i in ("b", "y", "a", "b", "x")]
    assert store.samples == samples
    twice = pa.concat_tables([samples, samples.slice(3, 1)])
    with pytest.raises(StoreError, match="name 'y' twice"):
        PredictionStore.create(tmp_path / "other", MANIFEST, PLAN, twice)


def test_samples_without_conditions_are_their_ids(tmp_path: Path) -> None:
    manifest = MANIFEST.model_copy(update={"conditions": ()})
    store = PredictionStore.create(tmp_path, manifest, PLAN, SAMPLES.select(["sample_id"]))
    assert store.samples_of(["c", "a"]) == [{"sample_id": "c"}, {"sample_id": "a"}]


def test_conditions_that_changed_since_the_store_was_opened_are_refused(tmp_path: Path) -> None:
    """They are read when they are first asked for."""
    store = PredictionStore.create(tmp_path, MANIFEST, PLAN, SAMPLES)
    opened = PredictionStore.open(tmp_path)
    content = (store.path / "samples.parquet").read_bytes()
    (store.path / "samples.parquet").write_bytes(content[:50] + b"?" + content[51:])
    with pytest.raises(StoreError, match=r"samples\.parquet was altered.*from a copy"):
        opened.sample("a")


HIDDEN = synthetic_manifest(Hidden())
HEADS = synthetic_heads(HIDDEN)


def test_heads_are_stored_once_and_read_back(tmp_path: Path) -> None:
    store = PredictionStore.create(tmp_path / "a", HIDDEN, PLAN, SAMPLES, HEADS)
    assert store.heads.keys() == HEADS.keys()
    for name, head in HEADS.items():
        np.testing.assert_array_equal(store.heads[name], head)
        assert not store.heads[name].flags.writeable
    assert "heads/heads.safetensors" in store.manifest.files
    again = PredictionStore.create(
        tmp_path / "b", HIDDEN, PLAN, SAMPLES, dict(reversed(HEADS.items()))
    )
    assert tree(store.path) == tree(again.path)
    assert PredictionStore.create(tmp_path / "c", MANIFEST, PLAN, SAMPLES).heads == {}


def test_differing_heads_are_refused_and_named(tmp_path: Path) -> None:
    PredictionStore.create(tmp_path, HIDDEN, PLAN, SAMPLES, HEADS)
    other = HEADS | {"backbone.bias": HEADS["backbone.bias"] + 1}
    with pytest.raises(
        StoreError, match=r"heads\.safetensors: other values in .*backbone\.bias'\]"
    ):
        PredictionStore.create(tmp_path, HIDDEN, PLAN, SAMPLES, other)


@pytest.mark.parametrize(
    ("manifest", "heads", "message"),
    [
        (HIDDEN, None, r"hold \[\] but the manifest calls for \['backbone.bias', 'backbone.w"),
        (MANIFEST, HEADS, r"calls for \[\]: give .* none where the target is not `hidden`"),
        (HIDDEN, HEADS | {"backbone.bias": HEADS["backbone.weight"]}, r"must be float32 \(2, 34\)"),
        (HIDDEN, {n: h.astype(np.float64) for n, h in HEADS.items()}, "is float64 "),
        (HIDDEN, HEADS | {"backbone.bias": HEADS["backbone.bias"] * np.nan}, "holds NaN"),
    ],
)
def test_heads_that_are_not_those_of_the_manifest_are_refused(
    tmp_path: Path, manifest: Manifest, heads: Any, message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        PredictionStore.create(tmp_path / "store", manifest, PLAN, SAMPLES, heads)
    assert not (tmp_path / "store").exists()


def test_a_plan_with_duplicates_is_refused_with_what_to_do(tmp_path: Path) -> None:
    store = PredictionStore.create(tmp_path, MANIFEST, PLAN, SAMPLES)
    table = PLAN.to_table()
    twice = pa.concat_tables([table.slice(0, 1), table.slice(0, 5)])
    content = table_bytes(twice.set_column(2, table.schema.field(2), table["shard"]))
    (tmp_path / "plan.parquet").write_bytes(content)
    files = store.manifest.files | {"plan.parquet": file_sum(content)}
    manifest = store.manifest.model_copy(update={"files": files})
    (tmp_path / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(StoreError, match=r"plan\.parquet.*sample 'a', variation 0\) twice: .*make"):
        PredictionStore.open(tmp_path)


@pytest.mark.parametrize("name", ["plan.parquet", "samples.parquet"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "link"])
def test_damaged_plan_and_samples_are_refused(tmp_path: Path, name: str, damage: str) -> None:
    store = PredictionStore.create(tmp_path / "store", MANIFEST, PLAN, SAMPLES)
    file = store.path / name
    content = file.read_bytes()
    file.unlink()
    if damage == "flip":
        file.write_bytes(content[:50] + bytes([content[50] ^ 4]) + content[51:])
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        StoreError, match=f"{name} (was altered|has|is missing|is a symbolic link).*from a copy"
    ):
        PredictionStore.open(store.path)


def test_a_manifest_of_huge_files_costs_no_memory(tmp_path: Path) -> None:
    store = PredictionStore.create(tmp_path, MANIFEST, PLAN, SAMPLES)
    huge = {name: FileSum(bytes=2**60, xxh3="0") for name in store.manifest.files}
    manifest = Manifest(**(store.manifest.model_dump() | {"files": huge}))
    (tmp_path / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(StoreError, match=f"must have {2**60}"):
        PredictionStore.open(tmp_path)


def test_a_shard_that_is_not_planned_is_refused(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path, MANIFEST, 4, 1, 2)
    write_synthetic_shard(store, 0, 5)
    (tmp_path / "shards/00000").rename(tmp_path / "shards/00007")
    with pytest.raises(StoreError, match="00007 is not planned, the plan has 2 shards"):
        PredictionStore.open(tmp_path)


def test_what_the_plan_leaves_out_is_kept_and_verified(tmp_path: Path) -> None:
    rejected = (("d", "sample 'd': its text is too long"), ("e", "sample 'e': no text: 'ü'"))
    store = PredictionStore.create(tmp_path / "store", MANIFEST, PLAN, SAMPLES, rejected=rejected)
    assert PredictionStore.open(store.path).rejected == rejected
    assert verify(store.path).ok
    file = store.path / "rejected.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    found = verify(store.path)
    assert [damage.file for damage in found.bad] == ["rejected.parquet"]


def test_a_store_that_leaves_out_nothing_has_no_such_file(tmp_path: Path) -> None:
    store = PredictionStore.create(tmp_path / "store", MANIFEST, PLAN, SAMPLES)
    assert store.rejected == ()
    assert not (store.path / "rejected.parquet").exists()
