"""Bash parts the words of a line at `=` and `:`; completion has to see them whole.

Of `--set seed=1` it makes the words `--set`, `seed`, `=` and `1`, and puts what it is offered in
the place of the last one alone.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

import typer

ASKED = "_FORETELL_COMPLETE"
"""Variable by which a shell asks what to offer."""
BREAKS = frozenset("=:")


@contextmanager
def whole_words() -> Iterator[None]:
    """Let completion within see whole words, and print of what it offers what bash is to insert.

    Does nothing where no bash asks.
    """
    words = os.environ.get("COMP_WORDS", "").split("\n")
    current = int(os.environ.get("COMP_CWORD", len(words)))
    if os.environ.get(ASKED) != "complete_bash" or current >= len(words):
        yield
        return
    joined, before = _joined(words[: current + 1])
    os.environ |= {"COMP_WORDS": "\n".join(joined), "COMP_CWORD": str(len(joined) - 1)}
    offered = io.StringIO()
    try:
        with redirect_stdout(offered):
            yield
    finally:
        for each in _without_blank(offered.getvalue().splitlines()):
            typer.echo(_rest(each, before))


def _without_blank(offered: list[str]) -> list[str]:
    """Return what is offered, with a second one beside a key alone, so that no blank follows it."""
    if len(offered) == 1 and offered[0].endswith("="):
        return [*offered, f"{offered[0]}..."]
    return offered


def _joined(words: Sequence[str]) -> tuple[list[str], str]:
    """Return words that bash parted as they were typed, and of the last what stands before it."""
    whole: list[str] = []
    before, parted = "", False
    for word in words:
        breaks = bool(word) and BREAKS.issuperset(word)
        if whole and (breaks or (parted and word)):
            before = whole[-1] + (word if breaks else "")
            whole[-1] += word
        else:
            before = ""
            whole.append(word)
        parted = breaks
    return whole, before


def _rest(offered: str, before: str) -> str:
    """Return what is left of a word, or of the value of an option, behind what stands already."""
    starts = [0, *(place + 1 for place, letter in enumerate(before) if letter in BREAKS)]
    start = next(start for start in starts if offered.startswith(before[start:]))
    return offered[len(before) - start :]
