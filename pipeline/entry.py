"""The program `foretell`: Ctrl-C ends it at once, however long its imports take."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def main() -> None:
    """Run the command line, or answer the shell of a person who types it."""
    with ending_at_once():
        from pipeline.program import app_of, is_asked, offer, run_app  # noqa: PLC0415, a second of imports

        if is_asked():
            offer()
        app, name, arguments = app_of(sys.argv[1:])
    run_app(app, name, arguments)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process inside the block, silently, as a shell expects of a program.

    As an exception it would be lost: modules in C that are being imported swallow it, or go on as
    broken ones.
    """
    heard = signal.getsignal(signal.SIGINT)
    if heard is signal.default_int_handler:  # who starts us may have it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heard)
