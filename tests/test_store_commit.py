"""A shard is published whole or not at all, and its bytes do not depend on who wrote it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store import PredictionStore, StoreError
from store.schema import (
    Compact,
    Dense,
    Fast,
    Full,
    Hidden,
    Manifest,
    Profile,
    Sampled,
    Target,
    TopK,
)
from store.synthetic import (
    synthetic_arrays,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)
from store.verify import verify
from store.zarr_codecs import Pco

MANIFEST = synthetic_manifest(TopK(k=4, moments=True))
COMPACT = synthetic_manifest(TopK(k=4, moments=True), profile=Compact())
FACTS: dict[str, Any] = {"stop_reason": "end", "weight": 1.0, "seed": 7}
CRASH = [sys.executable, "-W", "error", str(Path(__file__).with_name("crash_commit.py"))]
ROOT = Path(__file__).parent.parent
by_profile = pytest.mark.parametrize(
    "profile", [Fast(), Compact()], ids=lambda profile: profile.kind
)


@pytest.fixture
def store(tmp_path: Path) -> PredictionStore:
    return synthetic_store(tmp_path / "store", MANIFEST, 4, 1, 2)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def arrays_of(store: PredictionStore, shard: int = 0, row: int = 0) -> dict[str, np.ndarray]:
    return synthetic_arrays(store.manifest, store.plan[shard][row], 6)


def run(*arguments: str) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = subprocess.run(
        [*CRASH, *arguments], env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@by_profile
def test_a_writer_killed_at_any_disk_call_publishes_all_or_nothing(
    tmp_path: Path, profile: Profile
) -> None:
    manifest = synthetic_manifest(Full(), streams=1, profile=profile)
    whole = synthetic_store(tmp_path / "whole/store", manifest, 4, 1, 2)
    write_synthetic_shard(whole, 0, 8)
    store = synthetic_store(tmp_path / "store", manifest, 4, 1, 2)
    steps = run("crash", str(store.path))

    committed = [step["committed"] for step in steps]
    assert [step["killed"] for step in steps] == [True] * (len(steps) - 1) + [False]
    assert committed == sorted(committed)
    assert 30 < committed.index(True) < len(steps) - 1  # killed before and after the rename
    for step in steps[committed.index(True) :]:
        assert tree(tmp_path / f"after-{step['step']}") == tree(whole.path / "shards/00000")

    # What the dead writers left is no data, and the next writer is not disturbed by it.
    # (Killed at either of the first two calls, they had made no folder yet.)
    assert len(os.listdir(store.path / "tmp")) == committed.index(True) - 2
    found = verify(store.path)
    assert (found.ok, found.shards, found.not_committed) == (True, 0, (0, 1))
    assert write_synthetic_shard(store, 0, 8)
    assert tree(store.path / "shards") == tree(whole.path / "shards")


def test_of_writers_that_race_exactly_one_wins(store: PredictionStore) -> None:
    rounds = run("race", str(store.path))
    assert [entry["codes"] for entry in rounds] == [[0, 3, 3, 3]] * store.planned_shards
    assert os.listdir(store.path / "tmp") == []
    assert verify(store.path).ok


@by_profile
@pytest.mark.parametrize("target", [TopK(k=4, moments=True, tail_samples=3), Hidden(), Dense()])
def test_an_interrupted_and_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, target: Target, profile: Profile
) -> None:
    manifest = synthetic_manifest(target, profile=profile)
    whole, resumed = (synthetic_store(tmp_path / name, manifest, 4, 2, 3) for name in "ab")
    for shard in whole.missing():
        write_synthetic_shard(whole, shard, 300)
    write_synthetic_shard(resumed, 1, 300)
    with resumed.writer(0) as writer:
        writer.append(*resumed.plan[0][0], arrays_of(resumed), **FACTS)
    again = PredictionStore.open(resumed.path)
    assert again.missing() == [0, 2]
    for shard in again.missing():
        write_synthetic_shard(again, shard, 300)
    assert tree(whole.path) == tree(resumed.path)


def test_the_order_of_appending_does_not_show(tmp_path: Path) -> None:
    stores = [synthetic_store(tmp_path / name, MANIFEST, 4, 1, 4) for name in "ab"]
    for store, keys in zip(stores, (stores[0].plan[0], stores[1].plan[0][::-1]), strict=True):
        with store.writer(0) as writer:
            for key in keys:
                writer.append(*key, synthetic_arrays(MANIFEST, key, 5), **FACTS)
            assert writer.commit()
    assert tree(stores[0].path) == tree(stores[1].path)


def test_a_second_writer_loses_and_leaves_nothing(store: PredictionStore) -> None:
    assert write_synthetic_shard(store, 0, 5)
    before = tree(store.path)
    assert not write_synthetic_shard(store, 0, 6)
    assert tree(store.path) == before


def test_a_writer_that_loses_at_the_rename_removes_its_work(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        assert write_synthetic_shard(store, 0, 5)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert not write_synthetic_shard(store, 0, 6)
    assert os.listdir(store.path / "tmp") == []
    found = verify(store.path)
    assert (found.ok, found.shards) == (True, 1)


def test_a_rename_that_reports_failure_after_success_has_won(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def repeated(source: Path, target: Path) -> None:
        rename(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", repeated)
    assert write_synthetic_shard(store, 0, 5)
    assert verify(store.path).shards == 1


@pytest.mark.parametrize("cause", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_writer_left_by_an_exception_publishes_nothing(
    store: PredictionStore, cause: type[BaseException]
) -> None:
    before = tree(store.path)

    def leave() -> None:
        with store.writer(0) as writer:
            for key in store.plan[0]:
                writer.append(*key, arrays_of(store), **FACTS)
            raise cause

    with pytest.raises(cause):
        leave()
    assert tree(store.path) == before
    assert not store.is_committed(0)


def test_a_writer_left_without_commit_publishes_nothing(store: PredictionStore) -> None:
    with store.writer(0) as writer:
        for key in store.plan[0]:
            writer.append(*key, arrays_of(store), **FACTS)
    assert PredictionStore.open(store.path).missing() == [0, 1]
    with pytest.raises(StoreError, match=r"writer of shard 00000 of .* is closed"):
        writer.commit()


def test_every_file_and_folder_is_synced_before_the_rename_and_the_parent_after_it(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = os.fsync, os.rename

    def traced_sync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def traced_rename(source: Path, target: Path) -> None:
        staged = [str(source), *(str(path) for path in source.rglob("*"))]
        assert sorted(events) == sorted(staged)
        assert events[-2:] == [f"{source}/shard.json", str(source)]
        rename(source, target)
        events.append("rename")

    monkeypatch.setattr(os, "fsync", traced_sync)
    monkeypatch.setattr(os, "rename", traced_rename)
    write_synthetic_shard(store, 0, 5)
    assert events[-2:] == ["rename", str(store.path / "shards")]


@pytest.mark.parametrize("call", ["mkdir", "open", "write", "fsync", "rename"])
@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "disk is full: free space"), (errno.EIO, r"check it \(dmesg\)")],
)
def test_a_failing_disk_is_explained_and_nothing_is_left(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch, call: str, code: int, advice: str
) -> None:
    real = getattr(os, call)

    def fail(*arguments: Any, **options: Any) -> Any:
        if call == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments, **options)  # also used to remove what was written
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, store.writer(0) as writer:
        for key in store.plan[0]:
            writer.append(*key, arrays_of(store), **FACTS)
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError, match=f"cannot commit shard 00000 of .*{advice}"):
            writer.commit()
    assert os.listdir(store.path / "tmp") == []
    assert not store.is_committed(0)
    assert write_synthetic_shard(store, 0, 5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_explained_and_the_run_goes_on_once_there_is_space(small_disk: Path) -> None:
    store = synthetic_store(small_disk / "store", synthetic_manifest(Full()), 4, 1, 2)
    assert write_synthetic_shard(store, 0, 10)
    (small_disk / "ballast").write_bytes(bytes(900_000))
    with pytest.raises(StoreError, match="the disk is full: free space there"):
        write_synthetic_shard(store, 1, 2000)
    assert os.listdir(store.path / "tmp") == []
    assert verify(store.path).not_committed == (1,)
    (small_disk / "ballast").unlink()
    assert write_synthetic_shard(store, 1, 200)
    assert verify(store.path).ok


def test_a_shard_may_be_built_in_one_thread_and_committed_in_another(tmp_path: Path) -> None:
    one, two = (synthetic_store(tmp_path / name, COMPACT, 4, 1, 4) for name in "ab")
    assert write_synthetic_shard(one, 0, 300)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second, two.writer(0) as writer:
        for rollout in PredictionStore.open(one.path).shard(0):
            key = (rollout.sample_id, rollout.variation)
            arrays = synthetic_arrays(COMPACT, key, len(rollout))
            facts = {"stop_reason": "end", "weight": 1.0, "seed": rollout.seed}
            first.submit(writer.append, *key, arrays, **facts).result()
        assert second.submit(writer.commit).result()
    assert tree(one.path) == tree(two.path)


def test_values_that_cannot_be_encoded_are_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = synthetic_store(tmp_path / "store", COMPACT, 4, 1, 2)

    def refuse(codec: Pco, values: np.ndarray) -> bytes:
        raise ValueError("too odd: use the profile `fast`")

    monkeypatch.setattr(Pco, "encode_chunk", refuse)
    file = r"file 'codes/c/0/0' \(array 'codes'\)"
    place = f"shard 00000 of {store.path}, {file}, at or behind sample 'sample-0', variation 0"
    message = f"{place}: too odd"
    with pytest.raises(StoreError, match=message):
        write_synthetic_shard(store, 0, 300)
    assert os.listdir(store.path / "tmp") == []


@pytest.mark.parametrize("file", ["zarr.json", "rollouts.parquet", "codes/c/0/0", "shard.json"])
def test_a_disk_that_fills_up_within_a_file_is_reported_with_file_array_and_rollouts(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    write = os.write

    def fill_up(descriptor: int, content: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", fill_up)
    place = f"shard 00000 of {store.path}, file '{file}'" + " (array 'codes')" * ("/c/" in file)
    with pytest.raises(StoreError) as caught:
        write_synthetic_shard(store, 0, 10)
    message = str(caught.value)
    assert f"cannot commit {place}, sample 'sample-0', variation 0 and 1 more: " in message
    assert "the disk is full" in message


def test_refused_predictions_name_their_shard_and_the_file_that_they_were_for(
    store: PredictionStore,
) -> None:
    arrays = arrays_of(store)
    arrays["top_k.logits"][3, 1, 2] = np.nan
    with store.writer(0) as writer, pytest.raises(StoreError) as caught:
        writer.append(*store.plan[0][0], arrays, **FACTS)
    place = f"shard 00000 of {store.path}, sample 'sample-0', variation 0, timestep 3, stream"
    assert str(caught.value).startswith(place)
    assert "array 'top_k.logits' (file 'top_k.logits/c/0/0/0') is refused" in str(caught.value)


def test_a_key_outside_the_shard_is_refused(store: PredictionStore) -> None:
    with store.writer(0) as writer:
        for key in (store.plan[1][0], ("unheard", 0), (store.plan[0][0][0], 9)):
            with pytest.raises(StoreError, match="is not planned in shard 00000"):
                writer.append(*key, arrays_of(store), **FACTS)
    with pytest.raises(StoreError, match=r"shard 2 is not planned: .* shards 0 to 1"):
        store.writer(2)


def test_a_key_appended_twice_is_refused(store: PredictionStore) -> None:
    with store.writer(0) as writer:
        writer.append(*store.plan[0][0], arrays_of(store), **FACTS)
        with pytest.raises(StoreError, match="sample 'sample-0', variation 0 was appended twice"):
            writer.append(*store.plan[0][0], arrays_of(store), **FACTS)


def test_a_commit_that_lacks_rollouts_is_refused(store: PredictionStore) -> None:
    with store.writer(0) as writer:
        writer.append(*store.plan[0][0], arrays_of(store), **FACTS)
        with pytest.raises(
            StoreError, match="lacks 1 of 2 planned rollouts, first sample 'sample-1'"
        ):
            writer.commit()
    assert not store.is_committed(0)


def test_a_writer_keeps_its_own_copy(store: PredictionStore) -> None:
    arrays = arrays_of(store)
    kept = {name: array.copy() for name, array in arrays.items()}
    with store.writer(0) as writer:
        for key in store.plan[0]:
            writer.append(*key, arrays, **FACTS)
        for array in arrays.values():
            array[...] = 0
        writer.commit()
    stored = PredictionStore.open(store.path)[store.plan[0][0]]
    assert all((stored.arrays[name] == kept[name]).all() for name in kept)


def set_value(name: str, index: tuple[int, ...], value: float) -> Any:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][index] = value

    return change


def replace(name: str, change: Any) -> Any:
    def apply(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = change(arrays[name])

    return apply


PLACE = "sample 'sample-0', variation 0, timestep 3, stream 'backbone.1': array "
TOP_K_FAULTS = [
    (set_value("top_k.logits", (3, 1, 2), np.nan), PLACE + "'top_k.logits' .* holds NaN"),
    (set_value("top_k.tail_logmass", (3, 1, 0), np.nan), PLACE + "'top_k.tail_logmass' .* NaN"),
    (set_value("top_k.tail_logmass", (3, 1, 0), 0.1), PLACE + ".* a probability mass over 1"),
    (set_value("top_k.moments", (3, 1, 1), np.inf), PLACE + "'top_k.moments' .* NaN or infinity"),
    (set_value("top_k.logits", (3, 1), -1), PLACE + ".* a largest logit that is not 0"),
    (set_value("top_k.logits", (3, 1, 3), 1), PLACE + ".* a largest logit that is not 0"),
    (set_value("top_k.ids", (3, 1, 2), 34), PLACE + ".* an id beyond the vocabulary"),
    (set_value("top_k.ids", (3, 1, 2), 32), PLACE + ".* an id that the manifest forbids"),
    (set_value("codes", (3, 1), 34), PLACE + "'codes' .* an id beyond the vocabulary"),
    (set_value("codes", (3, 1), 32), PLACE + "'codes' .* an id that the manifest forbids"),
    (replace("top_k.ids", lambda ids: ids[..., [0, 1, 1, 2]]), "ids that do not rise"),
    (replace("top_k.ids", lambda ids: ids[..., ::-1]), "ids that do not rise"),
    (replace("codes", lambda codes: codes.astype(np.int64)), "type is int64 but must be uint16"),
    (replace("codes", lambda codes: codes.astype(">u2")), "type is >u2 but must be uint16"),
    (replace("codes", lambda codes: codes[:0]), "it has no timestep"),
    (replace("codes", lambda codes: codes[:4]), r"shape is \(6, 2, 4\) but must be \(4, 2, 4\)"),
    (replace("top_k.ids", lambda ids: ids[..., :3]), r"\(6, 2, 3\) but must be \(6, 2, 4\)"),
    (lambda arrays: arrays.pop("top_k.ids"), r"arrays \['top_k.ids'\] are missing"),
    (lambda arrays: arrays.update(extra=arrays["codes"]), r"\['extra'\] are not of this store"),
]


def drop_code(arrays: dict[str, np.ndarray]) -> None:
    ids, code = arrays["top_k.ids"][3, 1], arrays["codes"][3, 1]
    unused = next(i for i in range(32) if i not in ids)
    arrays["top_k.ids"][3, 1] = np.sort(np.where(ids == code, unused, ids))


@pytest.mark.parametrize(
    ("change", "message"), [*TOP_K_FAULTS, (drop_code, PLACE + ".* no place for the drawn code")]
)
def test_wrong_predictions_are_refused_where_they_stand(
    store: PredictionStore, change: Any, message: str
) -> None:
    arrays = arrays_of(store)
    change(arrays)
    with store.writer(0) as writer, pytest.raises(StoreError, match=message):
        writer.append(*store.plan[0][0], arrays, **FACTS)


def keep_a_tail_id(arrays: dict[str, np.ndarray]) -> None:
    arrays["top_k.tail_ids"][3, 1] = arrays["top_k.ids"][3, 1, 0]


TAIL = TopK(k=4, tail_samples=3)
LEVELS = Full(levels=True)
HIDDEN_PLACE = "sample 'sample-0', variation 0, timestep 3: array 'hidden.cond.backbone' .* "


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        (Full(), set_value("full.logits", (3, 1, 5), np.nan), PLACE + "'full.logits' .* NaN"),
        (Full(), set_value("full.logits", (3, 1, 32), -1), PLACE + ".* at an id that is not allow"),
        (Full(), set_value("full.logits", (3, 1, 4), 9), PLACE + ".* a largest logit that is not"),
        (LEVELS, set_value("full.levels", (3, 1), np.inf), PLACE + "'full.levels' .* infinity"),
        (TAIL, set_value("top_k.tail_ids", (3, 1, 0), 33), PLACE + ".* ids that fall"),
        (TAIL, set_value("top_k.tail_ids", (3, 1, 2), 34), PLACE + ".* beyond the vocabulary"),
        (TAIL, keep_a_tail_id, PLACE + "'top_k.tail_ids' .* an id that is kept, not in the tail"),
        (Sampled(draws=3), set_value("sampled.ids", (3, 1, 0), 33), PLACE + ".* ids that fall"),
        (Sampled(draws=3), set_value("sampled.ids", (3, 1, 2), 32), PLACE + ".* forbids"),
        (
            Hidden(branches="both"),
            set_value("hidden.cond.backbone", (3, 0, 5), np.inf),
            HIDDEN_PLACE + "NaN or infinity",
        ),
        (Dense(), set_value("dense.delta", (3, 1, 0, 0), np.nan), PLACE + "'dense.delta' .* NaN"),
    ],
)
def test_wrong_predictions_of_other_targets_are_refused_where_they_stand(
    tmp_path: Path, target: Target, change: Any, message: str
) -> None:
    store = synthetic_store(tmp_path, synthetic_manifest(target), 4, 1, 2)
    arrays = arrays_of(store)
    change(arrays)
    with store.writer(0) as writer, pytest.raises(StoreError, match=message):
        writer.append(*store.plan[0][0], arrays, **FACTS)


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        ({"weight": float("nan")}, "weight is nan but must be finite and >= 0"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"stop_reason": ""}, "stop reason '' must be 1 to 64 printable letters"),
        ({"stop_reason": "a\n"}, "stop reason"),
        ({"seed": 2**64}, "seed is 18446744073709551616 but must be in"),
    ],
)
def test_wrong_facts_of_a_rollout_are_refused(
    store: PredictionStore, fact: dict[str, Any], message: str
) -> None:
    with store.writer(0) as writer, pytest.raises(StoreError, match=message):
        writer.append(*store.plan[0][0], arrays_of(store), **(FACTS | fact))


def test_ids_are_as_narrow_as_the_vocabulary_allows(tmp_path: Path) -> None:
    for vocabulary, kind in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        manifest: Manifest = synthetic_manifest(TopK(k=2), streams=1, vocabulary=vocabulary)
        store = synthetic_store(tmp_path / str(vocabulary), manifest, 1, 1, 1)
        assert write_synthetic_shard(store, 0, 2)
        rollout = PredictionStore.open(store.path)["sample-0", 0]
        assert rollout.codes.dtype == rollout.arrays["top_k.ids"].dtype == kind
