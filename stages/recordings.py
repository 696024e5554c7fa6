"""A recorded folder: its table of clips, and the audio that a row names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from stages.audio import SUFFIXES, AudioError, read_audio
from stages.errors import UserError
from stages.nemo_manifest import SUFFIXES as MANIFESTS
from stages.nemo_manifest import ManifestRow, manifest_rows, names_speakers

COLUMNS, OPTIONAL_COLUMNS = ("clip_id", "text", "audio"), ("speaker", "duration_s")
"""Columns of a parquet table: those that it must have, and what else is read."""

CSV_COLUMNS = ("id", "text", "normalised text", "speaker")
"""Columns of a CSV table without a header."""
HEADERS = {
    "clip_id": "id", "sample_id": "id", "file": "id", "file_name": "id",
    "transcript": "text", "transcription": "text",
    "normalised": "normalised text", "normalized": "normalised text",
    "normalised_text": "normalised text", "normalized_text": "normalised text",
    "normalized text": "normalised text", "normalised_transcription": "normalised text",
    "normalized_transcription": "normalised text",
    "speaker_id": "speaker",
} | {name: name for name in CSV_COLUMNS}  # fmt: skip
"""What a header may call them, in any case of letters."""


@dataclass(frozen=True)
class Audio:
    """A stretch of a file of audio."""

    file: str | bytes
    """Path relative to the root (a missing ending is looked for), or the bytes of a file."""
    start_s: float = 0.0
    """Seconds into the file."""
    length_s: float | None = None
    """Seconds; None for all that follows."""


@dataclass(frozen=True)
class Recording:
    """One row of a source. `text` and `speaker` are as they stand there, None where absent."""

    sample_id: str
    text: str | None
    speaker: str | None
    audio: Audio | None
    has_speaker_column: bool
    """Whether an absent speaker is a gap in this row only."""
    context: Audio | None = None
    """What shows the voice, where the row names it."""
    fault: str | None = None
    """Why the row cannot be used: a kind, a colon, and what was found."""
    declared_s: float | None = None
    """Seconds that the row says its audio lasts, where it does."""


def find_table(source: Path) -> Path:
    """The table of a source: CSV, parquet or manifest; raises UserError where there is not one."""
    if source.is_file() and source.suffix in (".parquet", *MANIFESTS):
        return source
    if not source.exists():
        raise UserError(f"prepare.source={source} does not exist; name a folder or a table")
    found = [
        path for name in ("metadata.csv", "metadata.parquet") if (path := source / name).exists()
    ]
    if len(found) != 1:
        raise UserError(
            f"prepare.source={source} holds {len(found)} tables, but exactly one of metadata.csv "
            "and metadata.parquet is needed, or name a .parquet file or a manifest itself; "
            "docs/data.md shows their columns"
        )
    return found[0]


def read_ids(table: Path, root: Path) -> list[str]:
    """Sample ids of a table with audio below `root`, in its order.

    Raises UserError when it has no rows.
    """
    if table.suffix == ".csv":
        ids = [row.sample_id for row in _csv_rows(table)]
    elif table.suffix in MANIFESTS:
        ids = [row.sample_id for row in manifest_rows(table, root)]
    else:
        column = _open_parquet(table).read(columns=["clip_id"]).column("clip_id")
        ids = [each or "" for each in column.to_pylist()]
    if not ids:
        raise UserError(f"{table} has no rows, so there is nothing to prepare")
    return ids


def read_recordings(table: Path, root: Path, single_speaker: str | None) -> Iterator[Recording]:
    """Rows of a table with audio below `root`, in its order.

    `single_speaker`, if given, takes the place of its speakers. Raises UserError when the table
    cannot be read, or has neither speakers nor a single one.
    """
    for row in _rows(table, root):
        if single_speaker is not None:
            yield replace(row, speaker=single_speaker)
        elif row.speaker is None and not row.has_speaker_column:
            raise UserError(
                f"{table} has no speaker column; add one, or name the only speaker in "
                "prepare.single_speaker"
            )
        else:
            yield row


def load_audio(root: Path, audio: Audio) -> tuple[Tensor, int]:
    """The waveform [samples] of a stretch of audio and its rate in Hz.

    Raises AudioError when the file is missing, outside of `root` or unreadable.
    """
    if isinstance(audio.file, bytes):
        return read_audio(audio.file, audio.start_s, audio.length_s)
    return read_audio(_find(root.resolve(), audio.file), audio.start_s, audio.length_s)


def _find(root: Path, file: str) -> Path:
    """Path of a file of audio below a resolved root; raises AudioError."""
    for suffix in ("", *SUFFIXES):
        try:
            path = (root / f"{file}{suffix}").resolve()
            if not path.is_relative_to(root):
                raise AudioError(
                    f"audio outside the folder: {file} (prepare.audio_root names the folder)"
                )
            if path.is_file():
                return path
        except OSError as error:
            raise AudioError(f"unreadable audio: {file}: {error.strerror}") from error
        except (ValueError, RuntimeError) as error:  # a zero byte; links in a circle
            raise AudioError(f"unreadable audio: {file!r}: {error}") from error
    raise AudioError(f"missing audio: {file}")


def _rows(table: Path, root: Path) -> Iterator[Recording]:
    if table.suffix == ".csv":
        return _csv_rows(table)
    return _manifest_rows(table, root) if table.suffix in MANIFESTS else _parquet_rows(table)


def _csv_rows(table: Path) -> Iterator[Recording]:
    """LJSpeech's form: `id|text[|normalised text[|speaker]]`, no quoting.

    A first line that is nothing but names of columns, id and text among them, is a header.
    """
    try:
        lines = table.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 ({error}); convert it with iconv") from error
    header: tuple[str, ...] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("|")]
        if number == 1 and (header := _header(cells)) is not None:
            continue
        known = (len(header), len(header)) if header else (2, len(CSV_COLUMNS))
        if not known[0] <= len(cells) <= known[1]:
            expected = "|".join(header or CSV_COLUMNS)
            raise UserError(
                f"{table} line {number} has {len(cells)} columns, but {_span(*known)} are known: "
                f"{expected}"
            )
        row = dict(zip(header or CSV_COLUMNS, cells, strict=False))
        text = row.get("normalised text") or row["text"]
        audio = Audio(f"wavs/{row['id']}")
        yield Recording(row["id"], text, row.get("speaker"), audio, "speaker" in row)


def _header(cells: Sequence[str]) -> tuple[str, ...] | None:
    """Columns that a header names, by the names used here; None where the cells are a row."""
    columns = tuple(HEADERS.get(cell.lower(), "") for cell in cells)
    whole = "" not in columns and {"id", "text"} <= set(columns)
    return columns if whole and len(set(columns)) == len(columns) else None


def _span(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


def _parquet_rows(table: Path) -> Iterator[Recording]:
    """Columns clip_id, text, audio and, if there, speaker and duration_s.

    Audio is a path, or a struct of bytes and path.
    """
    file = _open_parquet(table)
    present = [name for name in (*COLUMNS, *OPTIONAL_COLUMNS) if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=64, columns=present):
        for row in batch.to_pylist():
            yield Recording(
                sample_id=row["clip_id"] or "",
                text=row["text"],
                speaker=row.get("speaker"),
                audio=_audio(row["audio"]),
                has_speaker_column="speaker" in present,
                declared_s=row.get("duration_s"),
            )


def _manifest_rows(table: Path, root: Path) -> Iterator[Recording]:
    """NeMo's form: one JSON object a line."""
    spoken = names_speakers(table)
    for sample_id, row, fault in manifest_rows(table, root):
        speaker = None if row.speaker is None else str(row.speaker)
        text = row.normalized_text or row.text
        audio, context = _clip(row), _context(row)
        yield Recording(sample_id, text, speaker, audio, spoken, context, fault, row.duration)


def _clip(row: ManifestRow) -> Audio | None:
    if not row.audio_filepath:
        return None
    if row.offset is None:
        return Audio(row.audio_filepath)
    return Audio(row.audio_filepath, row.offset, row.duration)


def _context(row: ManifestRow) -> Audio | None:
    if not row.context_audio_filepath:
        return None
    return Audio(row.context_audio_filepath, length_s=row.context_audio_duration)


def _open_parquet(table: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(table)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{table} cannot be read as parquet: {error}") from error
    schema = file.schema_arrow
    lacking = [name for name in COLUMNS if name not in schema.names]
    if lacking:
        raise UserError(f"{table} lacks the columns {lacking}; it has {schema.names}")
    for name in {"clip_id", "text", "speaker"} & set(schema.names):
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{table} has {name} of type {kind}; make it a string column")
    if "duration_s" in schema.names:
        kind = schema.field("duration_s").type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise UserError(f"{table} has duration_s of type {kind}; make it a number of seconds")
    return file


def _audio(cell: Any) -> Audio | None:
    file: str | bytes | None = cell
    if isinstance(cell, dict):
        file = cell["path"] if cell.get("bytes") is None else cell["bytes"]
    return None if file is None else Audio(file)
