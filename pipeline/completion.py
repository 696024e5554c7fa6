"""What the shell offers at the Tab key: configurations, stores, and names within a configuration.

Everything is looked up in the files below the present folder, near and few, for a person waits. A
mistake in them offers nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

from pipeline.config import Run, load_config
from pipeline.folders import system_name
from stages.errors import UserError

DEEPEST = 4
"""Folders below the present one that are looked into."""
MOST_ENTRIES = 5000
"""Files and folders that are looked at."""


def configurations(incomplete: str) -> list[str]:
    """Return the YAML files that begin with what was typed, those in folders below it too."""
    return [path for path, _ in _below(incomplete) if path.endswith((".yaml", ".yml"))]


def stores(incomplete: str) -> list[str]:
    """Return the folders of stores that begin with what was typed."""
    return [path for path, is_folder in _below(incomplete) if is_folder and _is_store(path)]


def students(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the students of the configuration that was typed before."""
    config = _typed(ctx)
    return _begun(incomplete, config.students if config else ())


def rounds(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the rounds of the configuration that was typed before."""
    config = _typed(ctx)
    return _begun(incomplete, config.rounds if config else ())


def systems(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return what can be heard of the run whose configuration was typed before."""
    config = _typed(ctx)
    named = map(system_name, config.students) if config else ()
    return _begun(incomplete, ["recording", "codec_copy", "teacher_guided", *named])


def _typed(ctx: typer.Context) -> Run | None:
    # Behind an option that still has no value, what was typed has not become parameters yet.
    words = [ctx.params.get("config"), *ctx.args]
    path = next((word for word in words if word and Path(word).is_file()), None)
    try:
        return load_config(Path(path)) if path else None
    except UserError:
        return None


def _begun(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _below(incomplete: str) -> Iterator[tuple[str, bool]]:
    """Yield paths that begin with what was typed, and whether each is a folder, breadth first."""
    above, slash, begun = incomplete.rpartition("/")
    waiting = [(above + slash, begun)]
    left, deepest = MOST_ENTRIES, incomplete.count("/") + DEEPEST
    while waiting and left > 0:
        folder, begun = waiting.pop(0)
        for entry in _entries(folder)[:left]:
            left -= 1
            hidden = entry.name.startswith(".") and not begun
            if hidden or not entry.name.startswith(begun):
                continue
            path, is_folder = f"{folder}{entry.name}", entry.is_dir()
            yield path, is_folder
            if is_folder and path.count("/") < deepest and not _is_store(path):
                waiting.append((f"{path}/", ""))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder or ".") as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _is_store(path: str) -> bool:
    return Path(path, "manifest.json").is_file()
