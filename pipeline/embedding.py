"""Files of a report inside its page, so that the page needs nothing beside it."""

from __future__ import annotations

import base64
from pathlib import Path

from stages.errors import UserError


def named_file(folder: Path, file: str, kind: str) -> Path:
    """Return the path of a file that report.json names below `folder`.

    `kind` is what a person calls it. Raises `UserError` where it is missing or leads out of there.
    """
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"{file!r} in report.json leads out of {folder}: correct the report")
    if not path.is_file():
        raise UserError(
            f"report.json names the {kind} {file!r}, which is not in {folder}: evaluate again"
        )
    return path


def data_address(media_type: str, content: bytes) -> str:
    """Return the address under which a page finds content in itself."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
