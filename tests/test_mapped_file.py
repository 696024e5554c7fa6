"""A mapped file is the one that was opened, cannot be written, and stays until nobody views it."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from store import StoreError, mapped_file
from store.mapped_file import Identity, MappedFile
from store.plain_file import open_plain


def test_its_content_and_identity_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40)
    mapped = MappedFile.open(tmp_path / "a")
    assert mapped.content == bytes(range(256)) * 40
    assert mapped.identity == Identity.of(os.stat(tmp_path / "a"))
    assert mapped.unchanged()


def test_a_file_replaced_while_it_is_opened_is_mapped_as_it_was_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    before = Identity.of(os.stat(tmp_path / "a"))

    def replaced(path: Path, subject: str):
        file = open_plain(path, subject)
        (tmp_path / "b").write_bytes(b"newer")
        (tmp_path / "b").rename(path)
        return file

    monkeypatch.setattr(mapped_file, "open_plain", replaced)
    mapped = MappedFile.open(tmp_path / "a")
    assert mapped.content == b"old"
    assert (mapped.identity.inode, mapped.identity.bytes) == (before.inode, before.bytes)
    assert not mapped.unchanged()


def test_it_can_be_written_through_no_view(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    content = MappedFile.open(tmp_path / "a").content
    with pytest.raises(TypeError, match="read-only"):
        content[0] = 0
    for array in (np.frombuffer(content, np.uint8), np.ndarray((4,), np.uint8, content)):
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            array.setflags(write=True)


def test_it_stays_mapped_until_the_last_view_is_gone(tmp_path: Path) -> None:
    def is_mapped() -> bool:
        return str(tmp_path / "a") in Path("/proc/self/maps").read_text()

    (tmp_path / "a").write_bytes(b"1234")
    view = np.frombuffer(MappedFile.open(tmp_path / "a").content, np.uint8)[1:3]
    gc.collect()
    assert is_mapped()
    assert view.tolist() == list(b"23")
    del view
    assert not is_mapped()


def test_it_needs_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    before = os.listdir("/proc/self/fd")
    mapped = [MappedFile.open(tmp_path / "a") for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert all(file.content == b"1234" for file in mapped)


def test_what_is_no_plain_file_with_content_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("empty", "it is empty"),
        ("link", "it is a symbolic link, not a file"),
        ("folder", "it is no plain file"),
        ("pipe", "it is no plain file"),
        ("gone", "it is missing"),
        ("file/below", "it is missing"),
        ("x" * 300, "cannot read .* too long: choose a shorter one"),
    ):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(StoreError, match=f"^{message}"):
            MappedFile.open(tmp_path / name)
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_file_that_cannot_be_mapped_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"1")
    monkeypatch.setattr(mapped_file.mmap, "MAP_SHARED", 0)  # neither shared nor private
    with pytest.raises(StoreError, match=r"cannot read .*a: .*Invalid argument"):
        MappedFile.open(tmp_path / "a")
