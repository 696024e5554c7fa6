"""What the shell offers at the Tab key: configurations, stores, names and keys of a configuration.

Everything is looked up in the files below the present folder, near and few, for a person waits. A
mistake in them offers nothing. The settings of stages are imported where they are asked for alone:
commands that need none name these functions too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import typer

from stages.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import Run

DEEPEST = 4
"""Folders below the present one that are looked into."""
MOST_ENTRIES = 5000
"""Files and folders that are looked at."""
HELP_WIDTH = 76
"""Most letters of what is said of a key, which shells show on one line."""


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
    from pipeline.folders import system_name  # noqa: PLC0415

    config = _typed(ctx)
    named = map(system_name, config.students) if config else ()
    return _begun(incomplete, ["recording", "codec_copy", "teacher_guided", *named])


def settings(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the keys of the configuration that was typed before, and their values behind a `=`.

    Where none was typed that can be read, the keys are those of all families. A key that alone
    begins so and has few values comes with each of them.
    """
    from pipeline.config_keys import settable_keys  # noqa: PLC0415

    known = settable_keys(_typed(ctx))
    key, equals, _ = incomplete.partition("=")
    begun = [key] if equals else [name for name in known if name.startswith(key)]
    if equals or (len(begun) == 1 and len(known[begun[0]].values) > 1):
        values = known[begun[0]].values if begun[0] in known else ()
        return [(f"{begun[0]}={value}", "") for value in values]
    return [(f"{name}=", shorten(known[name].help, HELP_WIDTH)) for name in begun]


def _typed(ctx: typer.Context) -> Run | None:
    from pipeline.config import load_config  # noqa: PLC0415

    # Behind an option that still has no value, what was typed has not become parameters yet.
    words = [ctx.params.get("config"), *ctx.args]
    path = next((word for word in words if word and _is_file(word)), None)
    try:
        return load_config(Path(path)) if path else None
    except UserError:
        return None


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except OSError:  # a word that no name can be, or a folder that may not be looked into
        return False


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
    return _is_file(f"{path}/manifest.json")
