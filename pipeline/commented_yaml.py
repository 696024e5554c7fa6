"""YAML of a configuration in which every key is explained by the docstring of its field."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from store.schema import Record

WIDTH = 96


def commented_yaml(document: Mapping[str, Any], config: Record) -> str:
    """Return the text of `document`, which was read as `config`.

    A comment stands above the first of alike keys; later ones have none.
    """
    lines: list[str] = []
    told: set[tuple[str, str]] = set()
    for key, value in document.items():
        if isinstance(value, Mapping):
            lines.append("")
        lines += _key(key, value, config, 0, told)
    return "\n".join(lines) + "\n"


def _key(
    key: str, value: Any, config: Any, depth: int, told: set[tuple[str, str]]
) -> Iterator[str]:
    indent = "  " * depth
    fields = type(config).model_fields if isinstance(config, Record) else {}
    explained = fields[key].description or "" if key in fields else ""
    if (key, explained) not in told:
        told.add((key, explained))
        lead = f"{indent}# "
        yield from textwrap.wrap(
            " ".join(explained.split()), WIDTH, initial_indent=lead, subsequent_indent=lead,
            break_on_hyphens=False,
        )  # fmt: skip
    inner = getattr(config, key) if key in fields else config[key]
    if isinstance(value, Mapping) and value:
        yield f"{indent}{_scalar(key)}:"
        for name, each in value.items():
            yield from _key(name, each, inner, depth + 1, told)
    else:
        yield f"{indent}{_scalar(key)}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    """Return a value, a key or a list as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return str(text).removesuffix("\n").removesuffix("\n...")
