"""Stores that this release and those before it wrote read as they did, here and elsewhere."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from store import PredictionStore
from store.encoding import ArraySpec, array_specs
from store.tables import parse_table
from store.verify import verify
from store.zarr_codecs import CODECS
from store.zarr_files import ArrayFiles
from tests.golden_stores import ANCESTOR, GOLDEN, GOLDENS, PROFILES

STORES = [(profile, name) for profile in PROFILES for name in GOLDENS]
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


def test_the_golden_stores_hold_every_kind_of_array() -> None:
    stores = [PredictionStore.open(GOLDEN / profile / name) for profile, name in STORES]
    found = {name for store in stores for name in array_specs(store.manifest)}
    assert found == {
        "codes", "top_k.ids", "top_k.logits", "top_k.tail_logmass", "top_k.tail_ids",
        "top_k.moments", "full.logits", "full.cond", "full.uncond", "sampled.ids",
        "hidden.backbone", "hidden.cond.a", "hidden.cond.b.c", "hidden.uncond.a",
        "hidden.uncond.b.c", "dense.guided", "dense.cond", "dense.delta",
    }  # fmt: skip


def chunks_of(store: PredictionStore, spec: ArraySpec) -> list[bytes]:
    """The encoded chunks of an array of shard 0, by the index at the end of its data file."""
    content = (store.path / f"shards/00000/{spec.name}/c/0{'/0' * len(spec.trailing)}").read_bytes()
    index, end = [], len(content) - 4
    while not index or index[0][0] != 0:
        end -= 16
        index.insert(0, struct.unpack_from("<QQ", content, end))
    return [content[offset : offset + size] for offset, size in index]


def parts_of(chunk: bytes) -> tuple[int, bytes, bytes]:
    """The count and the two parts of a chunk."""
    count, size = struct.unpack_from("<II", chunk)
    return count, chunk[8 : 8 + size], chunk[8 + size :]


def layout_of(codec: str, chunk: bytes) -> str:
    """Which of the layouts of docs/format.md a chunk has, read from its headers alone."""
    match codec:
        case "rising_ids":
            return "dictionary" if parts_of(chunk)[0] else "no dictionary"
        case "sorted_draws":
            return layout_of("rising_ids", parts_of(chunk)[1])
        case "logits":
            _, tops, levels = parts_of(chunk)
            if not tops:
                return "exact"
            form = struct.unpack_from("<hH", levels)[1]
            exceptions = form == 1 and parts_of(levels[4:])[0] > 0
            return f"form {form}{' with exceptions' if exceptions else ''}"
        case _:
            return "only"


def test_the_golden_stores_hold_every_layout_of_every_codec() -> None:
    found: dict[str, set[str]] = {codec.name.split(".")[1]: set() for codec in CODECS}
    longest = dict.fromkeys(found, 0)
    for name in GOLDENS:
        store = PredictionStore.open(GOLDEN / "compact" / name)
        for spec in array_specs(store.manifest).values():
            codec = ArrayFiles.of(spec, store.manifest.profile).codec
            assert codec is not None
            kind, chunks = codec.name.split(".")[1], chunks_of(store, spec)
            found[kind] |= {f"{spec.dtype}: {layout_of(kind, chunk)}" for chunk in chunks}
            longest[kind] = max(longest[kind], len(chunks))
    ids = {"uint16: no dictionary", "uint32: no dictionary", "uint32: dictionary"}
    assert found == {
        "pco": {"uint16: only", "uint32: only", "float16: only", "float32: only"},
        "rising_ids": ids,
        "sorted_draws": ids,
        "logits": {
            *("float16: form 1", "float16: form 1 with exceptions", "float32: form 0"),
            "float16: exact",
        },
        "states": {"float16: only", "float32: only"},
        "log_mass": {"float32: only"},
        "rounded": {"float32: only"},
    }
    assert set(longest.values()) == {2}


def test_the_golden_stores_hold_the_values_that_codecs_spell_apart() -> None:
    logits = expected("compact", "full_peak")[0]["full.logits"]
    assert np.isneginf(logits).any()
    assert ((logits < -10) & np.isfinite(logits)).any(), "a level below 2"
    masses = expected("compact", "top_k_wide")[0]["top_k.tail_logmass"]
    assert np.isneginf(masses).any()
    assert (masses == 0).any()


def test_a_golden_store_of_converted_values_knows_where_they_came_from() -> None:
    for profile in PROFILES:
        manifest = PredictionStore.open(GOLDEN / profile / "hidden").manifest
        assert manifest.lineage == (ANCESTOR,)
