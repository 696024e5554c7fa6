"""Tables of plain text that fit 80 columns, and texts of others that cannot steer a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

WIDTH = 80


class Lines(str):
    """Lines that may be wider than 80 columns, as a table of many numbers is."""

    __slots__ = ()


def rendered(parts: Iterable[RenderableType]) -> str:
    """Return tables and texts as plain text, one below the other.

    Lines are folded at 80 columns, but for those of `Lines`, which stay as they are.
    """
    buffer = StringIO()
    console = Console(
        file=buffer, width=WIDTH, highlight=False, markup=False, emoji=False, color_system=None
    )
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Lines))
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return "\n".join(lines).rstrip()


def value_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and values without a head."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def number_table(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> Table:
    """Return a table whose first `texts` columns are texts and whose others are numbers."""
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    for place, head in enumerate(heads):
        if place < texts:
            table.add_column(head, overflow="fold")
        else:
            table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def visible(value: Any) -> Any:
    """Return a JSON value whose texts, names included, hold no character that is not printed.

    Ids and conditions come from elsewhere: a control character would steer the terminal, and one
    that turns the direction of writing would hide what stands there.
    """
    if isinstance(value, str):
        return "".join(c if c.isprintable() else _escaped(c) for c in value)
    if isinstance(value, dict):
        return {visible(name): visible(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [visible(inner) for inner in value]
    return value


def short(number: float | None, digits: int = 3) -> str:
    """Return a number in few letters: `0.0123`, `1,234`, `2.3e-07`; a dash for none."""
    if number is None:
        return "-"
    if isinstance(number, int) or (abs(number) >= 1000 and float(number).is_integer()):
        return f"{int(number):,}"
    if abs(number) >= 10**digits:
        return f"{number:,.0f}"
    return f"{number:.{digits}g}"


def probable(probability: float) -> str:
    """Return a probability with three decimals, or where that would be 0 its power of ten."""
    small = 0 < probability < 0.0005
    return f"{probability:.0e}" if small else f"{probability:.3f}"


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
