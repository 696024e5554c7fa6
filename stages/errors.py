"""The one error a user can cause and repair."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what was given to a stage: the message says what, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def in_one_line(error: Exception) -> str:
    """Return what an error of another package says, without its line breaks."""
    return " ".join(str(error).split())
