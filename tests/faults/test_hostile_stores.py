"""Stores that nobody meant well, sealed as if they were sound: refused with the file, never run."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store import Plan, PredictionStore, StoreError, verify
from store.sealed import checksum
from store.sums import file_sum
from store.synthetic import write_synthetic_shard
from store.tables import parse_table, table_bytes
from tests.faults.machine import little_memory
from tests.faults.test_damage import KINDS, everything

pytestmark = pytest.mark.slow

HOSTILE_TEXTS = ("", "..", "../../etc", "/etc/passwd", "a\0b", "\ud7ff✓", "x" * 600, "shards/00000")
HOSTILE_NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**53, 2**63, 2**70, 1e300, -0.5)
leaves = st.none() | st.booleans() | st.sampled_from((*HOSTILE_TEXTS, *HOSTILE_NUMBERS))
values = leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=4), leaves)


@pytest.fixture(scope="module", params=KINDS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "store"
    KINDS[request.param](path)
    return path


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "store")


def sealed(content: Any) -> bytes:
    """As `store.sealed` spells it, whatever it says; raises StoreError for what is no JSON."""
    content = {name: value for name, value in content.items() if name != "checksum"}
    whole = content | {"checksum": checksum(content)}
    return (json.dumps(whole, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def reseal(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_bytes(sealed(content))


def reseal_manifest(path: Path, change: Callable[[Any], object]) -> None:
    """Change the manifest, and have every shard say that it is of it."""
    reseal(path / "manifest.json", change)
    fingerprint = json.loads((path / "manifest.json").read_text())["checksum"]
    for record in path.glob("shards/*/shard.json"):
        reseal(record, lambda content: content.update(manifest=fingerprint))


def rewrite(path: Path, file: str, content: bytes) -> None:
    """Replace a file beside the manifest, which lists it as if it were meant."""
    (path / file).write_bytes(content)
    sums = file_sum(content).model_dump()
    reseal_manifest(path, lambda manifest: manifest["files"].update({file: sums}))


def rewrite_in_shard(path: Path, file: str, content: bytes) -> None:
    """The same of a file of shard 0."""
    (path / "shards/00000" / file).write_bytes(content)
    sums = file_sum(content).model_dump()
    record = path / "shards/00000/shard.json"
    reseal(record, lambda content: content["files"].update({file: sums}))


def refusals(path: Path) -> list[str]:
    """What is said of a store by all that read it; anything but a StoreError fails the test."""
    said = []
    with little_memory():
        try:
            everything(path)
        except StoreError as error:
            said.append(str(error))
        found = verify(path)
        said += [damage.reason for damage in found.bad]
    return said


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value."""
    items: Any = ()
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    return [at, *(place for key, inner in items for place in places(inner, (*at, key)))]


def put(document: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        document = document[key]
    document[place[-1]] = value


def copy_of(sound: Path, folder: Path) -> Path:
    path = folder / "store"
    shutil.rmtree(path, ignore_errors=True)
    return shutil.copytree(sound, path)


@given(data=st.data(), value=values)
@settings(max_examples=30)
def test_no_value_anywhere_in_a_manifest_breaks_reading_other_than_as_a_store_error(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    path = copy_of(sound, tmp_path_factory.mktemp("fuzz", numbered=True))
    manifest = json.loads((path / "manifest.json").read_text())
    place = data.draw(st.sampled_from(places(manifest)[1:]))
    with suppress(StoreError):
        reseal_manifest(path, lambda content: put(content, place, value))
    for said in refusals(path):
        assert len(said) < 20_000


@given(data=st.data(), value=values)
@settings(max_examples=20)
def test_no_value_anywhere_in_a_record_breaks_reading_other_than_as_damage_of_its_shard(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    path = copy_of(sound, tmp_path_factory.mktemp("fuzz", numbered=True))
    record = path / "shards/00000/shard.json"
    place = data.draw(st.sampled_from(places(json.loads(record.read_text()))[1:]))
    with suppress(StoreError):
        reseal(record, lambda content: put(content, place, value))
    refusals(path)
    assert {damage.shard for damage in verify(path).bad} <= {0}
    assert PredictionStore.open(path).shard(1).arrays, "the others are read as before"


TYPES = (pa.string(), pa.int64(), pa.int16(), pa.float64(), pa.binary(), pa.bool_())
CELLS = (*HOSTILE_TEXTS, 0, -1, 1, 5, 2**31, 2**62, 0.5, float("nan"), None, True)


@st.composite
def tables(draw: st.DrawFn, table: pa.Table) -> pa.Table:
    """A table with a column of other values, of another type, without it, or of other rows."""
    name = draw(st.sampled_from(table.schema.names))
    index = table.schema.get_field_index(name)
    match draw(st.sampled_from(["values", "type", "without", "rows", "twice", "empty"])):
        case "values" | "type" as what:
            kind = table.schema.field(name).type
            kind = kind if what == "values" else draw(st.sampled_from(TYPES))
            cells = draw(st.lists(st.sampled_from(CELLS), min_size=len(table), max_size=len(table)))
            cells = [draw(st.sampled_from([old, new])) for old, new in zip(
                table[name].to_pylist(), cells, strict=True)]  # fmt: skip
            column = pa.array([cell if castable(cell, kind) else None for cell in cells], kind)
            return table.set_column(index, pa.field(name, kind), column)
        case "without":
            return table.remove_column(index)
        case "rows":
            return table.slice(draw(st.integers(0, len(table))))
        case "twice":
            return pa.concat_tables([table, table])
        case _:
            return table.slice(0, 0)


def castable(cell: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([cell], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeError):
        return False
    return True


@given(data=st.data(), file=st.sampled_from(["plan", "samples", "rejected", "rollouts"]))
@settings(max_examples=30)
def test_no_table_breaks_reading_other_than_as_a_store_error(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, file: str
) -> None:
    path = copy_of(sound, tmp_path_factory.mktemp("fuzz", numbered=True))
    place = f"shards/00000/{file}.parquet" if file == "rollouts" else f"{file}.parquet"
    if not (path / place).exists():
        return
    table = data.draw(tables(parse_table((path / place).read_bytes(), place)))
    write = rewrite_in_shard if file == "rollouts" else rewrite
    write(path, f"{file}.parquet", table_bytes(table))
    before = everything(sound)
    with suppress(StoreError), little_memory():
        for name, found in everything(path).items():
            # What is stored beside the arrays may be anything; they themselves may not.
            if name in before and not name.endswith(("facts", "samples", "rejected")):
                np.testing.assert_array_equal(found, before[name])
    refusals(path)


@given(data=st.data(), value=values)
@settings(max_examples=20)
def test_no_header_of_tensors_breaks_reading_other_than_as_a_store_error(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    path = copy_of(sound, tmp_path_factory.mktemp("fuzz", numbered=True))
    files = [f for f in ("heads/heads.safetensors", "tables/latents/00001.safetensors")
             if (path / f).exists()]  # fmt: skip
    if not files:
        return
    content = (path / files[0]).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    changed = deepcopy(header)
    put(changed, data.draw(st.sampled_from(places(header)[1:])), value)
    text = json.dumps(changed).encode()
    rewrite(path, files[0], struct.pack("<Q", len(text)) + text + content[8 + size :])
    refusals(path)
    length = data.draw(st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
    rewrite(path, files[0], struct.pack("<Q", length) + content[8:])
    assert refusals(path)


CLIMBING = ("../outside", "/tmp/outside", "shards/../../outside", "plan.parquet/../../outside")


@pytest.mark.parametrize("name", CLIMBING)
def test_no_path_leads_out_of_a_store(path: Path, name: str) -> None:
    outside = path.parent / "outside"
    outside.write_bytes(b"private")
    sums = file_sum(b"private").model_dump()
    reseal_manifest(path, lambda manifest: manifest["files"].update({name: sums}))
    for said in refusals(path):
        assert "private" not in said
    reseal(path / "shards/00000/shard.json", lambda c: c["files"].update({name: sums}))
    assert refusals(path)
    assert outside.read_bytes() == b"private"


def test_sample_ids_are_any_text_and_lead_nowhere(tmp_path: Path) -> None:
    ids = ["../climbs", "/etc/passwd", "a/b", "日本 ✓", "e\u0301", "é", "a" * 512, ".", "-rf"]
    samples = pa.table({"sample_id": ids, "text": ids})
    manifest = PredictionStore.open(make_top_k(tmp_path / "other")).manifest
    store = PredictionStore.create(
        tmp_path / "in/store", manifest, Plan.lay_out(ids, 1, 3), samples
    )
    for shard in store.missing():
        assert write_synthetic_shard(store, shard, 3)
    store = PredictionStore.open(store.path)
    assert [key[0] for key in store] == ids
    assert all(store[name, 0].sample_id == store.sample(name)["text"] == name for name in ids)
    assert verify(store.path).ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "other"]


def make_top_k(path: Path) -> Path:
    KINDS["top_k"](path)
    return path


def test_a_small_file_that_fills_the_memory_is_not_decoded(tmp_path: Path) -> None:
    """Arrow takes memory beside Python's: what it says of it is not an answer."""
    path, rows = make_top_k(tmp_path / "store"), 20_000_000
    plan = parse_table((path / "plan.parquet").read_bytes(), "plan.parquet")
    ids = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["plain"]).cast(pa.string())
    columns = [ids, np.zeros(rows, np.int64), np.zeros(rows, np.int64)]
    sink = BytesIO()
    whole = {"row_group_size": rows, "max_rows_per_page": rows, "compression": "zstd"}
    pq.write_table(pa.table(columns, schema=plan.schema), sink, **whole)
    content = sink.getvalue()
    assert len(content) < 20_000
    rewrite(path, "plan.parquet", content)
    (said,) = set(refusals(path))
    assert f"plan.parquet has {len(content):,} bytes and would take" in said
