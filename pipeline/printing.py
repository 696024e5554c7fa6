"""How commands answer: one JSON object for machines, or text for people; and what they tell."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def print_document(document: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    """Print a document as one line of JSON, or as the text that `text` returns."""
    typer.echo(json.dumps(document, ensure_ascii=False) if as_json else text())


def tell(message: str) -> None:
    """Tell a person what is going on, or what went wrong; standard output is left to reports.

    On a terminal no word is broken at its edge; elsewhere a line stays a line, for who searches.
    """
    lines = message.splitlines()
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        lines = [part for line in lines for part in _wrapped(line, width)]
    sys.stderr.write("\n".join(lines) + "\n")


def _wrapped(line: str, width: int) -> list[str]:
    """Return the lines of a line, as far in as it begins; paths stay whole, to be copied."""
    begun = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line, width, subsequent_indent=begun, break_long_words=False, break_on_hyphens=False,
        replace_whitespace=False,
    ) or [""]  # fmt: skip
