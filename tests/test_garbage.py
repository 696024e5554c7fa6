"""`foretell gc` lists what interrupted work left, asks, and deletes that and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

from pipeline.entry import main
from store import PredictionStore, StoreError, commit, verify
from store.garbage import delete_garbage, find_garbage
from store.schema import TopK
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard


class Done(NamedTuple):
    code: object
    out: str
    err: str


class Terminal(StringIO):
    """Someone who types an answer."""

    def isatty(self) -> bool:
        return True


def foretell(*arguments: str | Path, stdin: StringIO | None = None) -> Done:
    with (
        patch.object(sys, "argv", ["foretell", *map(str, arguments)]),
        patch.object(sys, "stdin", stdin or StringIO()),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return Done(ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two committed shards, and the work of two writers that were killed."""
    store = synthetic_store(tmp_path / "store", synthetic_manifest(TopK(k=3)), 6, 1, 2)
    for shard in (0, 1):
        write_synthetic_shard(store, shard, 5)
    shutil.copytree(store.path / "shards/00001", store.path / "tmp/00002-dead")
    (store.path / "tmp/create-dead").mkdir()
    return store.path


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_all_that_lies_in_tmp_is_listed(path: Path) -> None:
    os.utime(path / "tmp/create-dead", (0, 0))
    dead, created = find_garbage(path)
    assert (dead.name, created.name) == ("00002-dead", "create-dead")
    content = tree(path / "tmp/00002-dead")
    assert (dead.files, dead.bytes) == (len(content), sum(map(len, content.values())))
    assert dead.age_s < 3600 < 10**9 < created.age_s
    assert (created.files, created.bytes) == (0, 0)
    shutil.rmtree(path / "tmp")
    assert find_garbage(path) == []


def test_what_was_listed_is_deleted_and_nothing_else(path: Path) -> None:
    before = {name: content for name, content in tree(path).items() if not name.startswith("tmp/")}
    found = find_garbage(path)
    (path / "tmp/00003-new").mkdir()
    shutil.rmtree(path / "tmp/create-dead")  # another gc was faster
    assert delete_garbage(path, found) == []
    assert os.listdir(path / "tmp") == ["00003-new"]
    assert tree(path) == before
    assert verify(path).ok


def test_links_in_tmp_are_deleted_and_not_followed(path: Path) -> None:
    before = tree(path / "shards")
    (path / "tmp/link").symlink_to(path / "shards")
    (path / "tmp/00002-dead/link").symlink_to(path / "shards/00000")
    assert delete_garbage(path, find_garbage(path)) == []
    assert os.listdir(path / "tmp") == []
    assert tree(path / "shards") == before


def test_a_tmp_that_is_a_link_is_refused(path: Path) -> None:
    """It could lead to the committed shards of this store, or of another."""
    found = find_garbage(path)
    shutil.rmtree(path / "tmp")
    (path / "tmp").symlink_to(path / "shards")
    for refused in (lambda: find_garbage(path), lambda: delete_garbage(path, found)):
        with pytest.raises(StoreError, match="tmp is a link and may lead to anything: replace"):
            refused()
    assert PredictionStore.open(path).committed == [0, 1]


def test_a_folder_that_is_no_store_keeps_its_tmp(tmp_path: Path) -> None:
    (tmp_path / "tmp/precious").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"manifest\.json is missing"):
        find_garbage(tmp_path)
    assert foretell("gc", tmp_path, "--yes").code == 2
    assert (tmp_path / "tmp/precious").exists()


def test_what_cannot_be_deleted_is_said_and_the_rest_is_deleted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rmdir

    def refused(at, **options):
        if "00002" in str(at):
            raise PermissionError(13, "Permission denied", str(at))
        real(at, **options)

    monkeypatch.setattr(os, "rmdir", refused)
    done = foretell("gc", path, "--yes")
    assert done.code == 1
    assert "tmp/'00002-dead' is still there: cannot delete" in done.out
    assert "permission is missing" in done.out
    assert "1 of 2 deleted" in done.out
    assert os.listdir(path / "tmp") == ["00002-dead"]


def test_nothing_is_deleted_before_someone_says_so(path: Path) -> None:
    for answer in ("n\n", "\n"):
        done = foretell("gc", path, stdin=Terminal(answer))
        assert "tmp/'00002-dead': " in done.out
        assert "A job that writes now has its work there too" in done.out
        assert "nothing was deleted" in done.out
        assert len(os.listdir(path / "tmp")) == 2
    silent = foretell("gc", path)
    assert (silent.code, "nothing was deleted: there is no terminal" in silent.err) == (2, True)
    listed = foretell("gc", path, "--json")
    assert (listed.code, json.loads(listed.out)["deleted"]) == (0, False)
    assert len(os.listdir(path / "tmp")) == 2
    assert "2 of 2 deleted" in foretell("gc", path, stdin=Terminal("y\n")).out
    assert os.listdir(path / "tmp") == []


def test_scripts_need_not_be_asked(path: Path) -> None:
    done = foretell("gc", path, "--yes", "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert [entry["name"] for entry in document["found"]] == ["00002-dead", "create-dead"]
    assert (document["kept"], document["deleted"]) == ([], True)
    assert os.listdir(path / "tmp") == []
    again = foretell("gc", path, "--yes")
    assert (again.code, "nothing to delete" in again.out) == (0, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_conversion_that_is_stopped_leaves_nothing_and_goes_on_later(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A scheduler sends SIGTERM, a person Ctrl-C."""
    there = path.parent / "compact"
    arguments = ("convert", path, there, "--profile", "compact")
    with monkeypatch.context() as stopped:
        stopped.setattr(commit, "sync_subfolders", lambda _: os.kill(os.getpid(), number))
        assert foretell(*arguments).code == 75
    assert os.listdir(there / "tmp") == []
    assert PredictionStore.open(there).committed == []
    assert foretell(*arguments).code == 0
    assert verify(there).shards == 2
