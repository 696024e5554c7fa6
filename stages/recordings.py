"""A recorded folder: its table of clips, and the audio that a row names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from stages.audio import SUFFIXES, AudioError, read_audio
from stages.errors import UserError


@dataclass(frozen=True)
class Recording:
    """One row of a source. `text` and `speaker` are as they stand there, None where absent."""

    sample_id: str
    text: str | None
    speaker: str | None
    audio: str | bytes | None
    """Path relative to the folder (a missing ending is looked for), or the bytes of a file."""
    has_speaker_column: bool
    """Whether an absent speaker is a gap in this row only."""


def find_table(source: Path) -> Path:
    """The metadata.csv or parquet file of a source; raises UserError where there is not one."""
    if source.is_file() and source.suffix == ".parquet":
        return source
    found = [
        path for name in ("metadata.csv", "metadata.parquet") if (path := source / name).exists()
    ]
    if len(found) != 1:
        raise UserError(
            f"prepare.source={source} holds {len(found)} tables, but exactly one of metadata.csv "
            "and metadata.parquet is needed; docs/data.md shows their columns"
        )
    return found[0]


def read_ids(table: Path) -> list[str]:
    """Sample ids of a table, in its order; raises UserError when it has no rows."""
    if table.suffix == ".csv":
        ids = [row.sample_id for row in _csv_rows(table)]
    else:
        column = _open_parquet(table).read(columns=["clip_id"]).column("clip_id")
        ids = [each or "" for each in column.to_pylist()]
    if not ids:
        raise UserError(f"{table} has no rows, so there is nothing to prepare")
    return ids


def read_recordings(table: Path, single_speaker: str | None) -> Iterator[Recording]:
    """Rows of a table, in its order, with `single_speaker` in place of its speakers if given.

    Raises UserError when the table cannot be read, or has neither speakers nor a single one.
    """
    for row in _csv_rows(table) if table.suffix == ".csv" else _parquet_rows(table):
        if single_speaker is not None:
            yield replace(row, speaker=single_speaker)
        elif row.speaker is None and not row.has_speaker_column:
            raise UserError(
                f"{table} has no speaker column; add one, or name the only speaker in "
                "prepare.single_speaker"
            )
        else:
            yield row


def load_recording(root: Path, recording: Recording) -> tuple[Tensor, int]:
    """The waveform [samples] of a recording and its rate in Hz.

    Raises AudioError when the file is missing, outside of `root` or unreadable.
    """
    if recording.audio is None:
        raise AudioError("missing audio: the row names none")
    if isinstance(recording.audio, bytes):
        return read_audio(recording.audio)
    root = root.resolve()
    for suffix in ("", *SUFFIXES):
        path = (root / f"{recording.audio}{suffix}").resolve()
        if not path.is_relative_to(root):
            raise AudioError(f"audio outside the folder: {recording.audio}")
        if path.is_file():
            return read_audio(path)
    raise AudioError(f"missing audio: {recording.audio}")


def _csv_rows(table: Path) -> Iterator[Recording]:
    """LJSpeech's form: `id|text[|normalised text[|speaker]]`, no header, no quoting."""
    try:
        lines = table.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 ({error}); convert it with iconv") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("|")]
        if not 2 <= len(cells) <= 4:
            raise UserError(
                f"{table} line {number} has {len(cells)} columns, but 2 to 4 are known: "
                "id|text|normalised text|speaker"
            )
        normalised = cells[2] if len(cells) > 2 and cells[2] else cells[1]
        speaker = cells[3] if len(cells) > 3 else None
        yield Recording(cells[0], normalised, speaker, f"wavs/{cells[0]}", len(cells) > 3)


def _parquet_rows(table: Path) -> Iterator[Recording]:
    """Columns clip_id, text, audio and, if there, speaker; audio a path or a struct of bytes."""
    file = _open_parquet(table)
    spoken = "speaker" in file.schema_arrow.names
    columns = ["clip_id", "text", "audio", *(["speaker"] if spoken else [])]
    for batch in file.iter_batches(batch_size=64, columns=columns):
        for row in batch.to_pylist():
            audio, sample_id = _audio(row["audio"]), row["clip_id"] or ""
            yield Recording(sample_id, row["text"], row.get("speaker"), audio, spoken)


def _open_parquet(table: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(table)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{table} cannot be read as parquet: {error}") from error
    schema = file.schema_arrow
    lacking = [name for name in ("clip_id", "text", "audio") if name not in schema.names]
    if lacking:
        raise UserError(f"{table} lacks the columns {lacking}; it has {schema.names}")
    for name in {"clip_id", "text", "speaker"} & set(schema.names):
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{table} has {name} of type {kind}; make it a string column")
    return file


def _audio(cell: Any) -> str | bytes | None:
    audio: str | bytes | None = cell
    if isinstance(cell, dict):
        audio = cell["path"] if cell.get("bytes") is None else cell["bytes"]
    return audio
