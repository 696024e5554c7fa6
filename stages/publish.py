"""Publishing results in one step: what is there is whole, after a crash too."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from stages.errors import UserError
from store.durable import sync_folder

OS_ERROR = re.compile(r"\(os error (?P<number>[0-9]+)\)")
"""How safetensors spells what the system said."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole, or leave what was there; durable when this returns."""
    with publish_file(path) as draft:
        draft.write_bytes(content)


def claim(path: Path, identity: str) -> None:
    """Mark a folder, by the file `path` in it, as belonging to one evaluation.

    Raises `UserError` for a folder that holds what another one left half done.
    """
    if not path.exists():
        replace_file(path, identity.encode())
    if path.read_text(encoding="utf-8") != identity:
        raise UserError(
            f"{path.parent} holds parts of an evaluation of other models or settings: move it "
            "away, then evaluate again"
        )


@contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Give the name of a draft to write, and make it `path` when the block ends without an error.

    A file that is there before is replaced in one step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with _as_os_error(path):
            yield draft
        _sync_file(draft)
        os.replace(draft, path)
    finally:
        # Gone already where the draft became `path`.
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Give a draft folder to fill, and make it `path` when the block ends without an error.

    `path` must not exist yet. Every file of the draft is synced before the one rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        with _as_os_error(path):
            yield draft
        _sync_tree(draft)
        os.rename(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync_folder(path.parent)


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Raise OSError where safetensors could not write: it has an error of its own for that."""
    try:
        yield
    except SafetensorError as error:
        found = OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found["number"])
        raise OSError(number, os.strerror(number), str(path)) from error


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            _sync_file(Path(folder) / name)
        sync_folder(Path(folder))


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
