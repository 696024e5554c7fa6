"""What the files that a configuration names hold: a path alone does not say that they changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.publish import replace_file
from stages.saved_model import WEIGHTS_FILES
from store.schema import Record

FOLDER_FILES = ("config.json", "audio_codec.json", *WEIGHTS_FILES)
"""What is read of a folder that is a model or an audio codec."""

NO_INPUTS = {"source", "audio_root", "replay"}
"""Paths that are known by what was read from them, or hold more than can be hashed."""

CACHE_FILE = "inputs.json"


def contents(record: Record | None, folder: Path) -> dict[str, str]:
    """Sha256 of every file that a section of the configuration names, by its path.

    A missing file is an empty string: the stage that needs it says so. Hashes are kept in `folder`,
    where it exists, by size and time of modification, so that large files are read once.
    """
    cache = _Cache(folder / CACHE_FILE)
    found = {str(path): cache.sha256(path) for path in sorted(set(_files(record)))}
    cache.save()
    return found


def _files(value: Any) -> Iterator[Path]:
    """Files below a section: those named, and those read of the folders that are named."""
    if isinstance(value, Record):
        fields = {n: getattr(value, n) for n in type(value).model_fields if n not in NO_INPUTS}
        yield from _files(fields)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _files(inner)
    elif isinstance(value, Path) and (value / "model_index.json").exists():
        yield from sorted(p for p in value.rglob("*") if p.suffix in (".json", ".safetensors"))
    elif isinstance(value, Path) and value.is_dir():
        yield from (value / name for name in FOLDER_FILES if (value / name).exists())
    elif isinstance(value, Path):
        yield value


class _Cache:
    """Hashes of files as they were when they were last read."""

    def __init__(self, path: Path) -> None:
        self._path, self._known, self._changed = path, _read(path), False

    def sha256(self, path: Path) -> str:
        """Hash a file, or take what is known of it; an empty string where it cannot be read."""
        try:
            stat = path.stat()
            state = [stat.st_size, stat.st_mtime_ns]
            known = self._known.get(str(path.resolve()))
            if known is not None and known[:2] == state:
                return str(known[2])
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return ""
        self._known[str(path.resolve())] = [*state, found]
        self._changed = True
        return found

    def save(self) -> None:
        """Keep what was found, where the run has begun."""
        if self._changed and self._path.parent.is_dir():
            replace_file(self._path, json.dumps(self._known, indent=1).encode())


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {n: each for n, each in entries if isinstance(each, list) and len(each) == 3}
