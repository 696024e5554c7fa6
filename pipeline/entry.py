"""The program `foretell`: it imports no more than the command needs that is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import typer

from pipeline.bash_words import ASKED, whole_words
from pipeline.launch import FAILED, USAGE_ERROR
from pipeline.printing import tell
from stages.errors import UserError
from store import StoreError
from store.errors import SystemFailure


def main() -> None:
    """Run the command line, or answer the shell of a person who types it."""
    if ASKED in os.environ:
        offer()
    elif sys.argv[1:2] == ["inspect"]:
        # Settings of stages take a quarter of a second, and who looks into a store needs none.
        from pipeline.inspect_commands import inspect_app  # noqa: PLC0415

        run_app(inspect_app, "foretell inspect", sys.argv[2:])
    else:
        from pipeline.cli import app  # noqa: PLC0415

        run_app(app, "foretell", sys.argv[1:])


def offer() -> None:
    """Print what the shell may offer; a fault offers nothing, and never a traceback."""
    from pipeline.cli import app  # noqa: PLC0415

    with suppress(Exception), whole_words():
        app(prog_name="foretell")
    sys.exit(FAILED)


def run_app(app: typer.Typer, name: str, arguments: Sequence[str]) -> None:
    """Run commands; a user's mistake is one message and exit code 2, never a traceback.

    Where a disk or object storage refuses, the code is 1.
    """
    try:
        app(args=list(arguments), prog_name=name)
    except (UserError, StoreError) as error:
        tell(f"foretell: {error}")
        sys.exit(FAILED if isinstance(error, SystemFailure) else USAGE_ERROR)
