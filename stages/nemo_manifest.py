"""NeMo's manifests: one JSON object a line, each naming a stretch of audio and what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

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


class NamedRow(NamedTuple):
    """A line of a manifest with the id of its sample."""

    sample_id: str
    row: ManifestRow
    fault: str | None
    """What is wrong with a value of the line, whose `row` then says which audio it is and no more;
    None where nothing is."""


def manifest_rows(table: Path, root: Path) -> Iterator[NamedRow]:
    """Read the lines of a manifest in order.

    An id is the path of the audio below `root` without its ending, with the offset where there is
    one, and #2, #3, … where the same clip stands again, such as with another context. Raises
    UserError with the number of a line that is no JSON object.
    """
    times: Counter[str] = Counter()
    for number, row, fault in _rows(table):
        name = _name(row, root.absolute()) or f"line {number}"
        times[name] += 1
        yield NamedRow(name if times[name] == 1 else f"{name}#{times[name]}", row, fault)


def names_speakers(table: Path) -> bool:
    """Whether any line of a manifest names a speaker."""
    return any(row.speaker is not None for _, row, _ in _rows(table))


def _rows(table: Path) -> Iterator[tuple[int, ManifestRow, str | None]]:
    with table.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, *_parse(table, number, line)
        except UnicodeDecodeError as error:
            raise UserError(f"{table} is not UTF-8 ({error}); convert it with iconv") from error


def _parse(table: Path, number: int, line: str) -> tuple[ManifestRow, str | None]:
    try:
        return ManifestRow.model_validate_json(line), None
    except ValidationError as error:
        faults = {str(fault["loc"][0]): fault["msg"] for fault in error.errors() if fault["loc"]}
        if faults:
            found = "; ".join(f"{key}: {message}" for key, message in faults.items())
            return _audio_alone(line, faults), f"unreadable row: line {number}: {found}"
        raise UserError(
            f"{table} line {number} is no row of a manifest: {error.errors()[0]['msg']}; one JSON "
            "object a line is needed, as docs/data.md shows"
        ) from error


def _audio_alone(line: str, faults: Container[str]) -> ManifestRow:
    """Return what is sound of a faulty line and names its sample."""
    keys = [key for key in ("audio_filepath", "offset") if key not in faults]
    given = from_json(line)
    return ManifestRow.model_validate({key: given.get(key) for key in keys})


def _name(row: ManifestRow, root: Path) -> str:
    if not row.audio_filepath:
        return ""
    path = PurePosixPath(row.audio_filepath)
    if path.is_relative_to(root):
        path = path.relative_to(root)
    name = str(path.with_suffix(""))
    return name if row.offset is None else f"{name}@{row.offset}"
