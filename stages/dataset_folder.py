"""What the folders of datasets have in common, be they of speech or of images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from stages.errors import UserError
from store.schema import Record

SPLITS = ("train", "dev", "test")
MADE_BY = {"speech": "prepare", "images": "prepare with kind: diffusion"}
"""What a dataset may hold → what makes it."""

Header = TypeVar("Header", bound=Record)


def read_dataset_header(path: Path, header: type[Header], version: int, holds: str) -> Header:
    """Read dataset.json alone, of a dataset that `holds` speech or images.

    Raises UserError when it is missing, unreadable, of an unknown version, or holds the other.
    """
    try:
        content = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is no dataset: dataset.json is missing; run `foretell prepare` first"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/dataset.json cannot be read: {error}") from error
    found = content if isinstance(content, dict) else {}
    # Datasets of speech are older than those of images, and do not say what they hold.
    if found.get("kind", "speech") != holds:
        raise UserError(
            f"{path} is no dataset of {holds}; name one that `{MADE_BY[holds]}` has made"
        )
    if found.get("version") != version:
        raise UserError(
            f"{path}/dataset.json has version {found.get('version')!r}, but this release reads "
            f"{version}; prepare the dataset again"
        )
    try:
        return header.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}/dataset.json is damaged: {error}") from error


def read_rows(
    path: Path, schema: pa.Schema, told: str, fingerprint: Callable[[pa.Table], str]
) -> pa.Table:
    """Read samples.parquet, whose `fingerprint` must be the one that dataset.json has `told`.

    Raises UserError when it cannot be read, has other columns, or was altered.
    """
    try:
        rows = pq.read_table(path / "samples.parquet", memory_map=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{path}/samples.parquet cannot be read: {error}; prepare it again"
        ) from error
    if rows.schema != schema:
        raise UserError(
            f"{path}/samples.parquet has the columns {rows.schema.names}, but this release "
            f"writes {schema.names}; prepare the dataset again"
        )
    found = fingerprint(rows)
    if found != told:
        raise UserError(
            f"the samples in {path} have fingerprint {found}, but dataset.json says {told}: a file "
            "was altered; prepare the dataset again"
        )
    return rows


def of_split(rows: pa.Table, split: str) -> pa.Table:
    """Return the rows of a split, in order; raises UserError when the split is unknown."""
    if split not in SPLITS:
        raise UserError(f"split={split!r} is none of {', '.join(SPLITS)}")
    return rows.filter(pc.field("split") == split)


def refuse_other_settings(path: Path, different: Sequence[str]) -> None:
    """Refuse a finished dataset that was made with another setting or source."""
    if different:
        raise UserError(
            f"{path} was prepared with another {', '.join(different)}; prepare into another "
            "folder, or remove that one"
        )
