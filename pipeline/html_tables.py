"""Tables of a report as HTML: with a caption, named rows and columns, and headings of groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

STACKED = "stacked"
"""Kind of a table of which a phone shows the cells of a row below each other.

Each cell says in `data-of` which column it is of.
"""
ROLES = {
    "table": "table",
    "thead": "rowgroup",
    "tbody": "rowgroup",
    "tr": "row",
    "td": "cell",
    'th scope="col"': "columnheader",
    'th scope="row"': "rowheader",
    'th scope="rowgroup"': "rowheader",
}
OPENED = re.compile(f"<({'|'.join(ROLES)})(?=[ >])")


def row_head(title: str, hint: str = "", mark: str = "") -> str:
    """Return the first cell of a row: a title, a hint below it, and HTML of a mark before it."""
    below = f'<span class="unit">{escape(hint)}</span>' if hint else ""
    return f'<th scope="row">{mark}{escape(title)}{below}</th>'


def html_table(caption: str, columns: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """Return a table from the HTML of the names of its columns and of the cells of its rows.

    A wide table scrolls within itself, by keyboard too. The caption is for those who hear the page;
    others have the heading above it.
    """
    return grouped_table(caption, columns, {"": rows}, kind)


def grouped_table(
    caption: str,
    columns: Sequence[str],
    groups: Mapping[str, Iterable[str]],
    kind: str = "",
) -> str:
    """Return a table whose rows stand in groups below their headings, if these are not empty."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(_group(title, len(columns), rows) for title, rows in groups.items())
    named = f' class="{kind}"' if kind else ""
    table = (
        f'<table{named}><caption class="heard">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>{body}</table>"
    )
    return (
        f'<div class="scroll" role="group" tabindex="0" aria-label="{escape(caption)}">'
        f"{_with_roles(table) if kind == STACKED else table}</div>"
    )


def _group(title: str, columns: int, rows: Iterable[str]) -> str:
    head = f'<th scope="rowgroup" colspan="{columns}">{escape(title)}</th>'
    first = f'<tr class="group">{head}</tr>' if title else ""
    return f"<tbody>{first}{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody>"


def _with_roles(table: str) -> str:
    """Say of every part what it is: some browsers forget it where the parts are stacked."""
    return OPENED.sub(lambda found: f'{found[0]} role="{ROLES[found[1]]}"', table)
