"""Which packages foretell asks for, and which of them are installed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from store.schema import Record

NAME = "foretell"
NOT_FOR_USERS = {"bench", "dev"}
"""Extras for those who work on foretell itself."""
EXTRA = re.compile(r"""\bextra\s*==\s*["']([^"']+)["']""")


class Package(Record):
    """A package that foretell asks for."""

    name: str
    wanted: str
    """Versions that do, as pip writes them; empty where any does."""
    installed: str | None
    """Version that is there; None where there is none."""
    ok: bool


def asked_for() -> dict[str, tuple[Package, ...]]:
    """Return the packages by extra; those that are always needed have the empty name.

    Where foretell runs from a checkout its pyproject.toml counts, else what was installed.
    """
    found: dict[str, list[Package]] = {}
    for extra, requirement in _requirements():
        if extra not in NOT_FOR_USERS and requirement.name != NAME:
            found.setdefault(extra, []).append(_package(requirement))
    return {extra: tuple(packages) for extra, packages in found.items()}


def python_wanted() -> str:
    """Return the versions of Python that do, as pip writes them."""
    project = _checkout()
    return str(project["requires-python"] if project else metadata(NAME)["Requires-Python"])


def fits(found: str, wanted: str) -> bool:
    """Whether a version is among those wanted; builds such as 2.14.1+cu130 count as 2.14.1."""
    return SpecifierSet(wanted, prereleases=True).contains(Version(found).public)


def _package(requirement: Requirement) -> Package:
    wanted = str(requirement.specifier)
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        installed = None
    ok = installed is not None and fits(installed, wanted)
    return Package(name=requirement.name, wanted=wanted, installed=installed, ok=ok)


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """Yield (extra, requirement); the extra is empty for what is always needed."""
    project = _checkout()
    if project is None:
        for line in metadata(NAME).get_all("Requires-Dist") or ():
            named = EXTRA.search(line)
            yield named[1] if named else "", Requirement(line)
        return
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    yield from ((extra, Requirement(line)) for extra, lines in groups.items() for line in lines)


def _checkout() -> dict[str, Any] | None:
    """Return the table `project` of the checkout that this runs from; None where it is none."""
    try:
        text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    project: dict[str, Any] = tomllib.loads(text).get("project", {})
    return project if project.get("name") == NAME else None
