"""Stores that this release and those before it wrote read as they did, here and elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from store import PredictionStore
from store.encoding import array_specs
from store.synthetic import synthetic_manifest
from store.tables import parse_table
from store.verify import verify
from store.zarr_codecs import CODECS
from store.zarr_files import ArrayFiles
from tests.golden_stores import GOLDEN, PROFILES, TARGETS

STORES = [(profile, name) for profile in PROFILES for name in TARGETS]
each_store = pytest.mark.parametrize(("profile", "name"), STORES)


def expected(profile: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays by name, and the facts of the rollouts, as they were when the store was made."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        values = {key: file[key] for key in file.files}
    prefix = f"{profile}/"
    arrays = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    return arrays, {k: v for k, v in values.items() if "/" not in k}


def assert_same(found: Any, wanted: Any) -> None:
    """Equal in type, shape and every bit."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == wanted.tobytes()


@each_store
def test_a_golden_store_reads_as_it_did(profile: str, name: str) -> None:
    store = PredictionStore.open(GOLDEN / profile / name)
    arrays, facts = expected(profile, name)
    shard = store.shard(0)
    assert shard.arrays.keys() == arrays.keys()
    for array, values in arrays.items():
        assert_same(shard.arrays[array], values)
    for row, key in enumerate([("a", 0), ("日本", 0)]):
        rollout, rows = store[key], slice(*facts["offsets"][row : row + 2])
        assert rollout.stop_reason == facts["stop_reasons"][row] == f"end of {key[0]}"
        assert (rollout.weight, rollout.seed) == (facts["weights"][row], facts["seeds"][row])
        for array, values in arrays.items():
            assert_same(rollout.arrays[array], values[rows])
    assert verify(store.path).ok


@each_store
def test_stock_zarr_reads_a_golden_store_as_it_did(profile: str, name: str) -> None:
    group = zarr.open_group(GOLDEN / profile / name / "shards/00000", mode="r")
    arrays, _ = expected(profile, name)
    assert {array.basename for _, array in group.arrays()} == arrays.keys()
    for array, values in arrays.items():
        stock = group[array]
        assert isinstance(stock, zarr.Array)
        assert_same(stock[:], values)


def files_of(store: PredictionStore) -> dict[str, bytes]:
    folder = store.path / "shards/00000"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@each_store
def test_what_a_golden_store_holds_is_written_as_it_was(
    tmp_path: Path, profile: str, name: str
) -> None:
    """Data of `fast` byte for byte; of `compact` so that they decode to the same.

    A header is compared as JSON and a table as a table: other releases of Zarr and Arrow may spell
    them in other bytes.
    """
    golden = PredictionStore.open(GOLDEN / profile / name)
    manifest = golden.manifest.model_copy(update={"files": {}})
    made = PredictionStore.create(tmp_path, manifest, golden.plan, golden.samples, golden.heads)
    inputs, facts = expected("fast", name)
    with made.writer(0) as writer:
        for row, key in enumerate(golden.plan[0]):
            rows = slice(*facts["offsets"][row : row + 2])
            writer.append(
                *key,
                {array: values[rows] for array, values in inputs.items()},
                stop_reason=str(facts["stop_reasons"][row]),
                weight=float(facts["weights"][row]),
                seed=int(facts["seeds"][row]),
            )
        writer.commit()
    before, after = files_of(golden), files_of(made)
    assert before.keys() == after.keys()
    for file, content in before.items():
        if file.endswith("zarr.json"):
            assert json.loads(after[file]) == json.loads(content)
        elif "/c/" in file and profile == "fast":
            assert after[file] == content
    table = "rollouts.parquet"
    assert parse_table(after[table], table) == parse_table(before[table], table)
    for array, values in expected(profile, name)[0].items():
        assert_same(PredictionStore.open(tmp_path).shard(0).arrays[array], values)


def test_the_golden_stores_hold_every_kind_of_array_and_codec() -> None:
    stores = [PredictionStore.open(GOLDEN / profile / name) for profile, name in STORES]
    specs = [spec for store in stores for spec in array_specs(store.manifest).values()]
    assert {spec.name.split(".")[0] for spec in specs} == {
        "codes", "top_k", "full", "sampled", "hidden", "dense",
    }  # fmt: skip
    top_k = synthetic_manifest(TARGETS["top_k"])
    assert array_specs(top_k).keys() <= {spec.name for spec in specs}
    used = {
        type(ArrayFiles.of(spec, store.manifest.profile).codec)
        for store in stores
        for spec in array_specs(store.manifest).values()
    }
    assert used - {type(None)} == set(CODECS)
