"""How commands answer: one JSON object for machines, or text for people."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def print_document(document: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    """Print a document as one line of JSON, or as the text that `text` returns."""
    typer.echo(json.dumps(document, ensure_ascii=False) if as_json else text())
