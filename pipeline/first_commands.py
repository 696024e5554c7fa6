"""The commands that a person types first: each parses, calls one function, and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.completion import configurations
from pipeline.config import load_config
from pipeline.doctor import diagnose
from pipeline.doctor_text import diagnosis_text
from pipeline.launch import FAILED, FINISHED
from pipeline.printing import Json, print_document


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML configuration of a run; without one, all that foretell may do.",
            show_default=False,
            autocompletion=configurations,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what can run on this machine, and what to install.

    Imports what is installed, which takes seconds. Exit code 0 when the base works and, of a
    configuration, all that it needs is there; 1 otherwise.
    """
    found = diagnose(load_config(config) if config else None)
    print_document(found.model_dump(mode="json"), as_json, lambda: diagnosis_text(found))
    raise typer.Exit(FINISHED if found.ok else FAILED)
