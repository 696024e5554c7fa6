"""NeMo's manifests: one JSON object a line, each naming a stretch of audio and what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from stages.errors import UserError

SUFFIXES = (".json", ".jsonl")
"""File endings of a manifest."""


class ManifestRow(BaseModel):
    """What is read of a line; NeMo writes much more, which is ignored."""

    model_config = ConfigDict(
        frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    audio_filepath: str | None = None
    """Path of the audio."""
    offset: float | None = Field(None, ge=0)
    """Seconds into the audio at which the clip begins; null takes the whole file."""
    duration: float | None = Field(None, gt=0)
    """Seconds of the clip; cuts only beside an `offset`, for it may be rounded."""
    text: str | None = None
    """What is said."""
    normalized_text: str | None = None
    """The same in words; preferred where it is there, as NeMo does."""
    speaker: int | str | None = Field(
        None, validation_alias=AliasChoices("speaker", "speaker_id", "speaker_index")
    )
    """Who says it."""
    context_audio_filepath: str | None = None
    """Path of the audio that shows the voice."""
    context_audio_duration: float | None = Field(None, gt=0)
    """Seconds of it that may be used, from its start; null takes all."""


def manifest_rows(table: Path, root: Path) -> Iterator[tuple[str, ManifestRow]]:
    """Read the lines of a manifest in order, each with its sample id.

    An id is the path of the audio below `root` without its ending, with the offset where there is
    one, and #2, #3, … where the same clip stands again, such as with another context. Raises
    UserError with the number of a line that is no JSON object or has a value of another type.
    """
    times: Counter[str] = Counter()
    for number, row in _rows(table):
        name = _name(row, root.absolute()) or f"line {number}"
        times[name] += 1
        yield name if times[name] == 1 else f"{name}#{times[name]}", row


def names_speakers(table: Path) -> bool:
    """Whether any line of a manifest names a speaker."""
    return any(row.speaker is not None for _, row in _rows(table))


def _rows(table: Path) -> Iterator[tuple[int, ManifestRow]]:
    with table.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(table, number, line)
        except UnicodeDecodeError as error:
            raise UserError(f"{table} is not UTF-8 ({error}); convert it with iconv") from error


def _parse(table: Path, number: int, line: str) -> ManifestRow:
    try:
        return ManifestRow.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "it"
        raise UserError(
            f"{table} line {number} is no row of a manifest: {place}: {first['msg']}; one JSON "
            "object a line is needed, as docs/data.md shows"
        ) from error


def _name(row: ManifestRow, root: Path) -> str:
    if not row.audio_filepath:
        return ""
    path = PurePosixPath(row.audio_filepath)
    if path.is_relative_to(root):
        path = path.relative_to(root)
    name = str(path.with_suffix(""))
    return name if row.offset is None else f"{name}@{row.offset}"
