"""Side tables: what was written is read, lazily; what was damaged is refused, never guessed."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from store import StoreError, side_tables
from store.schema import TableFacts
from store.side_tables import DTYPES, OPEN_PARTS, SideTable, SideTableWriter, part_file
from store.sums import file_sum
from tests.row_stores import ROWS, table_at

Row = dict[str, np.ndarray]

tensors = st.sampled_from(list(DTYPES)).flatmap(
    lambda dtype: arrays(dtype, st.just(()) | array_shapes(max_dims=3, max_side=4, min_side=0))
)
names = st.from_regex(side_tables.GROUP, fullmatch=True)
rows = st.dictionaries(names, tensors, min_size=1, max_size=3)


def assert_equal(found: Row, expected: Row) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
        assert found[name].tobytes() == values.tobytes()


def sums_of(folder: Path) -> dict[str, Any]:
    return {path.name: file_sum(path.read_bytes()) for path in folder.iterdir()}


@settings(deadline=None, max_examples=40)
@given(st.lists(rows, max_size=7), st.integers(1, 4))
def test_what_was_written_is_read(written: list[Row], rows_per_part: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / name for name in ("one", "two")]
        for folder in folders:
            writer = SideTableWriter(folder, rows_per_part)
            assert [writer.append(row) for row in written] == list(range(len(written)))
            facts = writer.finish()
        one, two = (sums_of(folder) for folder in folders)
        assert one == two, "the same rows make the same bytes"
        assert len(one) == facts.parts == -(-len(written) // rows_per_part)
        table = pickle.loads(pickle.dumps(SideTable(folders[0], facts, one)))
        assert len(table) == len(written)
        for row in reversed(range(len(written))):
            assert_equal(table[row], written[row])
        table.check()


def test_a_row_is_copied_when_given_and_when_read(tmp_path: Path) -> None:
    writer, values = SideTableWriter(tmp_path, 4), np.arange(3.0)
    writer.append({"a": values, "b": np.arange(6, dtype=">i4").reshape(2, 3).T})
    values[:] = -1
    table = SideTable(tmp_path, writer.finish())
    table[0]["a"][:] = 7
    assert_equal(table[0], {"a": np.arange(3.0), "b": np.arange(6, dtype=np.int32).reshape(2, 3).T})


@pytest.mark.parametrize("row", [-1, 5, 2**70, 1.0, "1", None])
def test_a_row_that_is_not_there_is_refused_by_its_number(tmp_path: Path, row: Any) -> None:
    table = SideTable(tmp_path, table_at(tmp_path))
    with pytest.raises(IndexError, match=r"row .* it has the rows 0 to 4"):
        table[row]
    assert len(list(table)) == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "has no tensor"),
        ({"a/b": np.ones(1)}, "tensor 'a/b' must be 1 to 64 of the letters"),
        ({"../x": np.ones(1)}, r"tensor '\.\./x' must be"),
        ({"": np.ones(1)}, "tensor '' must be"),
        ({"a": np.ones(1, complex)}, "tensor 'a' is complex128 but must be one of"),
        ({"a": np.array(["x"])}, "tensor 'a' is <U1 but must be one of"),
        ({"a": np.array([None])}, "tensor 'a' is object but must be one of"),
    ],
)
def test_what_no_table_can_hold_is_refused(tmp_path: Path, row: Row, message: str) -> None:
    writer = SideTableWriter(tmp_path, 2)
    with pytest.raises(StoreError, match=message):
        writer.append({"good": np.ones(1)} | row if row else row)
    assert writer.append({"a": np.ones(1)}) == 0
    assert SideTable(tmp_path, writer.finish())[0].keys() == {"a"}, "nothing of it was kept"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    table_at(tmp_path)
    before = sums_of(tmp_path)
    with pytest.raises(StoreError, match=r"cannot write .*00000\.safetensors"):
        table_at(tmp_path)
    assert sums_of(tmp_path) == before


def test_few_files_stay_open_and_each_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, count = SideTableWriter(tmp_path, 1), 3 * OPEN_PARTS
    for row in range(count):
        writer.append({"a": np.array(row)})
    table = SideTable(tmp_path, writer.finish(), sums_of(tmp_path))
    hashed: list[str] = []
    check = side_tables.check_sum
    monkeypatch.setattr(side_tables, "check_sum", lambda *a: (hashed.append(a[1].xxh3), check(*a)))
    for _ in range(2):
        for row in range(count):
            assert table[row]["a"] == row
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    files = {line.split()[-1] for line in mapped.splitlines() if str(tmp_path) in line}
    assert 0 < len(files) <= OPEN_PARTS
    assert len(hashed) == count
    table.check()
    assert len(hashed) == 2 * count, "who checks a table hashes it anew, whatever is known of it"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("table")
    table_at(folder)
    return (folder / part_file(1)).read_bytes()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, TableFacts]]:
    folder = tmp_path_factory.mktemp("damaged")
    return folder, table_at(folder)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_file_that_was_cut_or_altered_is_refused_by_its_name(
    content: bytes, damaged: tuple[Path, TableFacts], data: st.DataObject
) -> None:
    """With its sum always; without it a row is read, or the file refused, and nothing else."""
    folder, facts = damaged
    altered = bytearray(content)
    if data.draw(st.booleans(), "cut"):
        del altered[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        altered[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / part_file(1)).write_bytes(altered)
    table = SideTable(folder, facts, {part_file(1): file_sum(content)})
    with pytest.raises(StoreError, match=r"00001\.safetensors: it .*restore it from a copy"):
        table[2]
    with suppress(StoreError):
        SideTable(folder, facts).check_part(1)


def by_hand(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F16", shape: tuple[int, ...] = (1,), end: int = 2) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (b"", "it is empty"),
        (struct.pack("<Q", 2**63), "restore"),
        (by_hand([]), "restore"),
        (by_hand({"0/a": entry(), "1/a": entry()}, bytes(2)), "restore"),
        (by_hand({"0/a": entry(shape=(2**62, 4))}, bytes(2)), "restore"),
        (by_hand({"0/a": entry()}, bytes(2)), "it holds 1 rows but must hold 2"),
        (by_hand({"0/../../a": entry()}, bytes(2)), r"it holds '0/\.\./\.\./a', which is in none"),
        (by_hand({"2/a": entry()}, bytes(2)), "it holds '2/a', which is in none of the rows"),
        (by_hand({"00/a": entry()}, bytes(2)), "it holds '00/a'"),
        (by_hand({"a": entry()}, bytes(2)), "it holds 'a'"),
        (by_hand({"0/a": entry("BF16")}, bytes(2)), "of the type BF16, which no table has"),
        (by_hand({"0/a": entry("F8_E4M3", end=1)}, bytes(1)), "of the type F8_E4M3"),
    ],
)
def test_what_is_no_file_of_the_table_is_refused(
    tmp_path: Path, hostile: bytes, message: str
) -> None:
    (tmp_path / part_file(0)).write_bytes(hostile)
    with pytest.raises(StoreError, match=message):
        SideTable(tmp_path, TableFacts(rows=2, rows_per_part=2))[0]


def test_files_in_each_others_place_links_and_folders_are_refused(tmp_path: Path) -> None:
    facts = table_at(tmp_path)
    first, second, aside = (tmp_path / name for name in (part_file(0), part_file(1), "aside"))
    first.rename(aside)
    with pytest.raises(StoreError, match=r"00000\.safetensors: it is missing"):
        SideTable(tmp_path, facts)[0]
    first.symlink_to(aside)
    with pytest.raises(StoreError, match="is a symbolic link"):
        SideTable(tmp_path, facts)[0]
    first.unlink()
    first.mkdir()
    with pytest.raises(StoreError, match=r"it is no plain file"):
        SideTable(tmp_path, facts)[0]
    first.rmdir()
    second.rename(first)
    with pytest.raises(StoreError, match="it holds '2/label', which is in none of the rows"):
        SideTable(tmp_path, facts)[0]


def test_a_file_that_changes_after_it_was_opened_is_read_and_checked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_tables, "RECHECK_S", 0)
    facts, other = table_at(tmp_path / "one"), tmp_path / "two"
    table_at(other, [{"latent": -row["latent"]} for row in ROWS])
    path = tmp_path / "one" / part_file(1)
    summed = SideTable(tmp_path / "one", facts, sums_of(tmp_path / "one"))
    free = SideTable(tmp_path / "one", facts)
    assert summed[3]["label"] == free[3]["label"] == 3
    os.replace(other / part_file(1), path)
    assert_equal(free[3], {"latent": -ROWS[3]["latent"]})
    with pytest.raises(StoreError, match=r"00001\.safetensors: it has \d+ bytes"):
        summed[3]


def test_a_link_to_a_file_that_is_being_opened_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another store is made of the table: its time of change is a new one."""
    table = SideTable(tmp_path, table_at(tmp_path), sums_of(tmp_path))
    opened = side_tables.safe_open

    def linking(path: Path, framework: str) -> Any:
        os.link(path, tmp_path / f"link-to-{path.name}")
        return opened(path, framework=framework)

    monkeypatch.setattr(side_tables, "safe_open", linking)
    assert_equal(table[3], ROWS[3])


def test_a_file_that_is_replaced_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SideTable(tmp_path, table_at(tmp_path), sums_of(tmp_path))
    opened = side_tables.safe_open

    def replacing(path: Path, framework: str) -> Any:
        content = path.read_bytes()
        path.unlink()
        (tmp_path / "other").write_bytes(content)
        (tmp_path / "other").rename(path)
        return opened(path, framework=framework)

    monkeypatch.setattr(side_tables, "safe_open", replacing)
    with pytest.raises(StoreError, match=r"00001\.safetensors: it was written to meanwhile"):
        table[3]
