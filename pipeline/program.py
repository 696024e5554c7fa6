"""The command line: it imports no more than the command needs that is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import typer

from pipeline.bash_words import ASKED, whole_words
from pipeline.launch import FAILED, USAGE_ERROR
from pipeline.printing import tell
from stages.errors import UserError
from store import StoreError
from store.errors import SystemFailure, explain_os_errors


def app_of(arguments: Sequence[str]) -> tuple[typer.Typer, str, Sequence[str]]:
    """Import the commands that are asked for: return them, their name and what follows it."""
    if arguments[:1] == ["inspect"]:
        # Settings of stages take a quarter of a second, and who looks into a store needs none.
        from pipeline.inspect_commands import inspect_app  # noqa: PLC0415

        return inspect_app, "foretell inspect", arguments[1:]
    from pipeline.cli import app  # noqa: PLC0415

    return app, "foretell", arguments


def is_asked() -> bool:
    """Return whether a shell asks what a person may type next."""
    return ASKED in os.environ


def offer() -> NoReturn:
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
        with explain_os_errors("go on"):
            app(args=list(arguments), prog_name=name)
    except (UserError, StoreError) as error:
        tell(f"foretell: {error}")
        sys.exit(FAILED if isinstance(error, SystemFailure) else USAGE_ERROR)
