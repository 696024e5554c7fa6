"""Damage of every kind is found by verify, named, and refused by the reader; never zeros."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest

from store import DamagedShard, PredictionStore, StoreError, shard_folder
from store.schema import Compact, Hidden, TopK
from store.sealed import seal, unseal
from store.shard import ShardRecord
from store.sums import file_sum
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from store.tables import parse_table, table_bytes
from store.verify import verify

MANIFEST = synthetic_manifest(TopK(k=3), streams=1)
COMPACT = synthetic_manifest(TopK(k=3), streams=1, profile=Compact())
SHARD = "shards/00001"
CHUNKS = f"{SHARD}/top_k.ids/c/0/0/0"


@pytest.fixture(scope="module", params=[MANIFEST, COMPACT], ids=["fast", "compact"])
def sound(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Three planned shards, of which the first two are committed."""
    path = tmp_path_factory.mktemp("verify") / "store"
    store = synthetic_store(path, request.param, 6, 1, 2)
    for shard in (0, 1):
        write_synthetic_shard(store, shard, 5)
    return path


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "store")


def read_everything(path: Path) -> None:
    store = PredictionStore.open(path)
    for shard in store.committed:
        store.shard(shard)


def test_a_sound_store_is_counted(sound: Path) -> None:
    found = verify(sound)
    timesteps = int(sum(lengths.sum() for lengths in PredictionStore.open(sound).lengths()))
    assert found.model_dump(mode="json") == {
        "ok": True,
        "shards": 2,
        "rollouts": 4,
        "timesteps": timesteps,
        "not_committed": [2],
        "bad": [],
    }


def test_progress_wraps_the_list_of_shards(sound: Path) -> None:
    seen: list[int] = []

    def progress(shards: Any) -> Any:
        seen.extend(shards)
        return shards

    verify(sound, progress)
    assert seen == [0, 1]


def test_a_flipped_bit_in_any_file_is_found_and_refused(path: Path) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    kinds = {file.name for file in files}
    assert kinds >= {"manifest.json", "plan.parquet", "samples.parquet", "shard.json"}
    assert kinds >= {"rollouts.parquet", "zarr.json", "0"}
    chance = random.Random(8)
    for file in files * (100 // len(files) + 1):
        content = file.read_bytes()
        altered = bytearray(content)
        altered[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(altered)
        found = verify(path)
        assert not found.ok
        assert len(found.bad) == 1
        assert str(file).endswith(found.bad[0].file)
        with pytest.raises(StoreError, match=file.name):
            read_everything(path)
        file.write_bytes(content)
    assert verify(path).ok


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [Path.unlink, cut, lengthen], ids=["missing", "short", "long"])
def test_every_missing_short_or_long_file_is_found_and_refused(
    path: Path, damage: Callable[[Path], None]
) -> None:
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        content = file.read_bytes()
        damage(file)
        found = verify(path)
        assert len(found.bad) == 1
        assert str(file).endswith(found.bad[0].file)
        with pytest.raises(StoreError):
            read_everything(path)
        file.write_bytes(content)


def test_damage_names_shard_file_and_array(path: Path) -> None:
    (path / CHUNKS).unlink()
    (damage,) = verify(path).bad
    assert damage.model_dump() == {
        "shard": 1,
        "file": "top_k.ids/c/0/0/0",
        "array": "top_k.ids",
        "reason": "sample 'sample-2', variation 0 and 1 more: it is missing",
    }
    place = r"shard 00001, file 'top_k.ids/c/0/0/0' \(array 'top_k.ids'\), sample 'sample-2', var"
    with pytest.raises(DamagedShard, match=place):
        read_everything(path)


def test_all_damage_is_listed_not_only_the_first(path: Path) -> None:
    (path / CHUNKS).unlink()
    cut(path / "shards/00001/rollouts.parquet")
    (path / "shards/00000/notes.txt").write_text("")
    found = verify(path)
    assert [(entry.shard, entry.file) for entry in found.bad] == [
        (0, "notes.txt"),
        (1, "rollouts.parquet"),
        (1, "top_k.ids/c/0/0/0"),
    ]
    assert (found.shards, found.rollouts) == (0, 0)


@pytest.mark.parametrize(
    "name", ["extra", "top_k.ids/c/1/0/0", "codes/c/0/.0.partial", "new/zarr.json"]
)
def test_a_foreign_file_is_found_and_refused(path: Path, name: str) -> None:
    file = path / SHARD / name
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(b"x")
    assert [(entry.shard, entry.file) for entry in verify(path).bad] == [(1, name)]
    with pytest.raises(DamagedShard, match="is not a file of this shard"):
        read_everything(path)


def test_a_link_is_foreign_and_not_followed(path: Path) -> None:
    (path / SHARD / "link").symlink_to(path)
    assert [entry.file for entry in verify(path).bad] == ["link"]


@pytest.mark.parametrize("file", ["shard.json", "zarr.json", "codes/c/0/0", "codes/c", "codes", ""])
def test_a_file_or_folder_replaced_by_a_link_is_refused(path: Path, file: str) -> None:
    """What it leads to may be anywhere, and be removed or changed by anyone."""
    place = path / SHARD / file
    place.rename(path.parent / "elsewhere")
    place.symlink_to(path.parent / "elsewhere")
    assert [(entry.shard, entry.file) for entry in verify(path).bad][:1] == [
        (1, file or "shard.json")
    ]
    with pytest.raises(DamagedShard, match=r"link|is not a file of this shard"):
        read_everything(path)


@pytest.mark.parametrize("file", ["shard.json", "rollouts.parquet", "codes/c/0/0"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(path: Path, file: str) -> None:
    (path / SHARD / file).unlink()
    os.mkfifo(path / SHARD / file)
    assert [(entry.shard, entry.file) for entry in verify(path).bad] == [(1, file)]
    with pytest.raises(DamagedShard, match="is no plain file"):
        read_everything(path)


def test_a_link_in_place_of_the_manifest_is_refused(path: Path) -> None:
    (path / "manifest.json").rename(path.parent / "elsewhere")
    (path / "manifest.json").symlink_to(path.parent / "elsewhere")
    assert [entry.file for entry in verify(path).bad] == ["manifest.json"]
    with pytest.raises(StoreError, match=r"manifest\.json is a symbolic link, not a file"):
        read_everything(path)


@pytest.mark.parametrize("name", ["foo/bar", "codes/c/1"])
def test_a_foreign_folder_without_files_is_found_and_refused(path: Path, name: str) -> None:
    (path / SHARD / name).mkdir(parents=True)
    assert [(entry.shard, entry.file) for entry in verify(path).bad] == [(1, f"{name}/")]
    with pytest.raises(DamagedShard, match="is not a file of this shard"):
        read_everything(path)


def refuse_to(monkeypatch: pytest.MonkeyPatch, call: str, path: Path, number: int) -> None:
    """Let a call of `os` fail for one path, as the system would."""
    real = getattr(os, call)

    def refused(at: Any, *arguments: Any, **options: Any) -> Any:
        if str(at) == str(path):
            raise OSError(number, os.strerror(number), str(at))
        return real(at, *arguments, **options)

    monkeypatch.setattr(os, call, refused)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize(
    "file", ["shard.json", "rollouts.parquet", "codes/zarr.json", "codes/c/0/0"]
)
def test_what_the_system_does_not_let_us_read_is_found_and_is_no_damage(
    path: Path, monkeypatch: pytest.MonkeyPatch, file: str, number: int
) -> None:
    (path / "shards/00000/codes/c/0/0").unlink()
    refuse_to(monkeypatch, "open", path / SHARD / file, number)
    lost, unreadable = verify(path).bad
    assert (lost.shard, unreadable.shard, unreadable.file) == (0, 1, file)
    assert unreadable.reason.startswith("sample 'sample-2', variation 0 and 1 more: cannot read ")
    with pytest.raises(StoreError, match=r"shard 00001, .*sample 'sample-2'.*cannot read") as error:
        PredictionStore.open(path).shard(1)
    assert not isinstance(error.value, DamagedShard)
    assert isinstance(pickle.loads(pickle.dumps(error.value)), type(error.value))


def test_a_folder_that_cannot_be_listed_is_found_beside_all_other_damage(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(path / CHUNKS)
    refuse_to(monkeypatch, "scandir", path / SHARD / "codes/c", errno.EACCES)
    refused, short = verify(path).bad
    assert "cannot list" in refused.reason
    assert (short.shard, short.array) == (1, "top_k.ids")


def test_a_path_that_cannot_be_looked_up_is_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(StoreError, match=r"File name too long.*choose a shorter one"):
        PredictionStore.open(path)
    with pytest.raises(StoreError, match="File name too long"):
        synthetic_store(path, MANIFEST, 2, 1, 2)
    (bad,) = verify(path).bad
    assert "File name too long" in bad.reason


@pytest.mark.parametrize("name", ["plan.parquet", "samples.parquet", "heads/heads.safetensors"])
def test_a_file_of_the_store_that_cannot_be_read_is_not_to_be_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = synthetic_store(tmp_path / "store", synthetic_manifest(Hidden()), 2, 1, 2).path
    refuse_to(monkeypatch, "open", path / name, errno.EACCES)
    with pytest.raises(StoreError, match=f"cannot read .*{name}.*permission is missing") as error:
        PredictionStore.open(path)
    assert "restore" not in str(error.value)
    assert [bad.file for bad in verify(path).bad] == [name]


def test_files_of_equal_size_cannot_be_exchanged(path: Path) -> None:
    one, two = (path / f"shards/0000{shard}/codes/c/0/0" for shard in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    assert first != second
    one.write_bytes(second)
    two.write_bytes(first)
    assert [entry.shard for entry in verify(path).bad] == [0, 1]


def test_a_short_file_of_plain_values_names_the_first_rollout_that_lost_some(
    sound: Path, path: Path
) -> None:
    table = PredictionStore.open(sound).rollout_table(1)
    spec = PredictionStore.open(sound).folder(1).files["top_k.ids"].spec
    content = (path / CHUNKS).read_bytes()
    for timesteps, sample in ((int(table.offsets[1]) - 1, "2"), (int(table.offsets[1]), "3")):
        (path / CHUNKS).write_bytes(content[: timesteps * spec.row_bytes + 1])
        store = PredictionStore.open(path)
        known = store.manifest.profile.kind == "fast"
        place = f"sample 'sample-{sample}', variation 0: it" if known else "variation 0 and 1 more"
        with pytest.raises(DamagedShard, match=f"{place}.* bytes but must have"):
            store.shard(1)


def test_a_shard_of_another_place_or_store_is_refused(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path / "shards/00000", path / "shards/00002")
    other = synthetic_store(tmp_path / "other", MANIFEST.model_copy(update={"seed": 1}), 6, 1, 2)
    write_synthetic_shard(other, 1, 5)
    shutil.rmtree(path / SHARD)
    shutil.copytree(other.path / SHARD, path / SHARD)
    bad = verify(path).bad
    assert [(entry.shard, entry.file) for entry in bad] == [(1, "shard.json"), (2, "shard.json")]
    assert "it is of another store" in bad[0].reason
    assert "shard is 0 but must be 2: its folder was renamed" in bad[1].reason


def test_what_is_no_shard_among_the_shards_is_found(path: Path) -> None:
    (path / "shards/0001").mkdir()
    (path / "shards/notes").write_text("")
    assert [entry.file for entry in verify(path).bad] == ["shards/0001", "shards/notes"]


def test_what_is_no_store_is_bad(tmp_path: Path) -> None:
    found = verify(tmp_path)
    assert not found.ok
    assert "holds no manifest.json" in found.bad[0].reason


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a shard's record with a right checksum, as a faulty writer might."""
    record, _ = unseal(path / SHARD / "shard.json", ShardRecord)
    content = record.model_dump()
    change(content)
    (path / SHARD / "shard.json").write_bytes(seal(ShardRecord(**content)))


def rewrite(path: Path, file: str, content: bytes) -> None:
    """Replace a file and its sum, so that only the meaning is wrong."""
    (path / SHARD / file).write_bytes(content)
    reseal(path, lambda record: record["files"].update({file: file_sum(content).model_dump()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(rows=2**60), r"rows is \d+ but must be in \[1, "),
        (lambda record: record.update(rows=0), "rows is 0"),
        (lambda record: record.update(rollouts=3), "rollouts is 3 but the plan has 2"),
        (lambda record: record["files"].pop("codes/c/0/0"), "does not list exactly the files"),
        (
            lambda record: record["files"].update({"../../../x": {"bytes": 1, "xxh3": ""}}),
            "does not list exactly the files of its arrays: .*/x",
        ),
        (
            lambda record: record["files"]["codes/c/0/0"].update(bytes=2**60),
            f"bytes but must have {2**60}",
        ),
        (lambda record: record.update(rows=record["rows"] + 1), r"its shape is \[\d+, 1\] but"),
    ],
)
def test_a_record_that_lies_is_refused(
    path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    reseal(path, change)
    with pytest.raises(DamagedShard, match=message):
        read_everything(path)
    assert not verify(path).ok


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("sample_id", ["sample-0", "sample-1"], "keys are not the planned ones"),
        ("start", [1, 5], "do not lie end to end"),
        ("length", [9, 9], "do not lie end to end"),
        ("weight", [1.0, float("nan")], "no finite number >= 0"),
    ],
)
def test_rollouts_that_contradict_the_plan_or_themselves_are_refused(
    path: Path, column: str, values: list[Any], message: str
) -> None:
    table = parse_table((path / SHARD / "rollouts.parquet").read_bytes(), "x")
    field = table.schema.field(column)
    index = table.schema.get_field_index(column)
    table = table.set_column(index, field, pa.array(values, field.type))
    rewrite(path, "rollouts.parquet", table_bytes(table))
    assert [entry.file for entry in verify(path).bad] == ["rollouts.parquet"]
    with pytest.raises(DamagedShard, match=message):
        read_everything(path)


def test_an_array_whose_values_are_wrong_is_found(path: Path) -> None:
    store = PredictionStore.open(path)
    shard = store.shard(1)
    logits = shard.arrays["top_k.logits"].copy()
    logits[shard.offsets[1] + 2, 0, 1] = np.nan
    rewrite_array(store, path, "top_k.logits", logits)
    (damage,) = verify(path).bad
    assert (damage.array, damage.file) == ("top_k.logits", "top_k.logits/c/0/0/0")
    assert damage.reason == "sample 'sample-3', variation 0: timestep 2: it holds NaN or infinity"


def test_an_array_of_another_shape_than_the_manifest_says_is_refused(path: Path) -> None:
    store = PredictionStore.open(path)
    codes = store.shard(1).arrays["codes"]
    rewrite_array(store, path, "codes", np.concatenate([codes] * 2))
    (damage,) = verify(path).bad
    assert (damage.array, "its shape is" in damage.reason) == ("codes", True)


def rewrite_array(store: PredictionStore, path: Path, name: str, values: Any) -> None:
    files = store.folder(1).files[name]
    rewrite(path, files.header, files.encode_header(len(values)))
    rewrite(path, files.data, b"".join(map(bytes, files.encode([values]))))


@pytest.mark.parametrize("damage", ["offset", "size", "crc"])
def test_an_index_that_does_not_lay_the_chunks_end_to_end_is_refused(
    path: Path, damage: str
) -> None:
    content = bytearray((path / CHUNKS).read_bytes())
    offset, size = struct.unpack("<QQ", content[-20:-4])
    offset, size = offset + (damage == "offset"), size - (damage == "size")
    content[-20:-4] = struct.pack("<QQ", offset, size)
    crc = google_crc32c.value(bytes(content[-20:-4])) + (damage == "crc")
    content[-4:] = struct.pack("<I", crc)
    rewrite(path, CHUNKS.removeprefix(f"{SHARD}/"), bytes(content))
    message = "does not end in an index of 1 chunks" if damage == "crc" else "chunks end to end"
    with pytest.raises(DamagedShard, match=message):
        read_everything(path)
    assert [entry.file for entry in verify(path).bad] == ["top_k.ids/c/0/0/0"]


def test_a_chunk_that_no_codec_wrote_is_refused_with_its_rollout(tmp_path: Path) -> None:
    """A faulty writer gave the file a right sum."""
    store = synthetic_store(tmp_path / "store", COMPACT, 4, 1, 2)
    for shard in (0, 1):
        write_synthetic_shard(store, shard, 300)
    store = PredictionStore.open(tmp_path / "store")
    table, files = store.rollout_table(1), store.folder(1).files["top_k.ids"]
    content = bytearray((store.path / CHUNKS).read_bytes())
    chunks = files.chunk_count(int(table.offsets[-1]))
    first = struct.unpack_from("<QQ", content, len(content) - 4 - 16 * chunks)[1]
    content[first + 8 : first + 12] = b"\0" * 4  # the magic number of the second chunk
    rewrite(store.path, files.data, bytes(content))
    key = store.plan[1][table.row_of(256)]
    message = f"{files.data}.*sample {key[0]!r}, variation 0: chunk 1: Pco cannot decode it"
    for read in (lambda opened: opened.shard(1), lambda opened: opened[key]):
        with pytest.raises(DamagedShard, match=message):
            read(PredictionStore.open(store.path))
    (damage,) = verify(store.path).bad
    assert damage.reason.startswith(f"sample {key[0]!r}, variation 0: chunk 1")


def test_a_file_that_changes_while_the_store_is_open_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout that was read before does not vouch for the files after."""
    monkeypatch.setattr(shard_folder, "RECHECK_S", 0)
    store = PredictionStore.open(path, mapped_shards=1)
    key = store.plan[1][0]
    content, place = (path / CHUNKS).read_bytes(), path / CHUNKS
    for damage in (Path.unlink, cut, lengthen, flip):
        store[key]
        damage(place)
        with pytest.raises(DamagedShard, match=r"it is missing|bytes but must|was altered"):
            store[key]
        place.unlink(missing_ok=True)
        place.write_bytes(content)
    store[key]  # a copy of the right content is as good as the file that was verified
    store[store.plan[0][0]]  # which lets go of shard 1
    flip(place)
    with pytest.raises(DamagedShard, match="was altered"):
        store[key]


@pytest.mark.parametrize("size", [0, 100])
def test_a_file_that_is_cut_is_soon_refused_by_shard_and_by_key(path: Path, size: int) -> None:
    """And nothing beyond its end is read, which would end the process."""
    for read in (lambda store: store.shard(1), lambda store: store[store.plan[1][0]]):
        store = PredictionStore.open(path)
        content = (path / CHUNKS).read_bytes()
        store.shard(1)
        store[store.plan[1][0]]
        os.truncate(path / CHUNKS, size)
        time.sleep(shard_folder.RECHECK_S)
        if store.manifest.profile.kind == "fast":
            with pytest.raises(DamagedShard, match=r"bytes but must|it is empty"):
                read(store)
        else:
            read(store)  # what was decoded was verified
        (path / CHUNKS).write_bytes(content)


def test_what_was_verified_is_served_until_a_mapped_file_changes(path: Path) -> None:
    """Record and table are in memory by then; only the next opening reads them again."""
    store = PredictionStore.open(path)
    whole = store.shard(1)
    (path / SHARD / "shard.json").unlink()
    (path / SHARD / "rollouts.parquet").unlink()
    assert store.shard(1).rollouts is whole.rollouts
    with pytest.raises(DamagedShard, match=r"shard\.json is missing"):
        PredictionStore.open(path).shard(1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip], ids=["missing", "short", "altered"])
def test_damaged_heads_are_found_and_refused(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    store = synthetic_store(tmp_path / "store", synthetic_manifest(Hidden()), 2, 1, 2)
    assert verify(store.path).ok
    damage(tmp_path / "store/heads/heads.safetensors")
    (bad,) = verify(store.path).bad
    assert bad.file == "heads/heads.safetensors"
    with pytest.raises(StoreError, match=r"heads\.safetensors.*: restore it from a copy"):
        assert PredictionStore.open(store.path).heads
