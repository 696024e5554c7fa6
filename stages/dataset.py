"""The dataset folder: samples with their codes, what was rejected, and the audio codec."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import JsonValue
from torch import Tensor

from stages.audio import read_audio
from stages.audio_codec import AudioCodec, load_audio_codec
from stages.config import DatasetFacts
from stages.dataset_folder import of_split, read_dataset_header, read_rows
from stages.errors import UserError
from store.schema import Record

DATASET_VERSION = 1

CODES = pa.list_(pa.uint16())
SAMPLES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("text", pa.string()),
        ("speaker", pa.string()),
        ("split", pa.string()),
        ("duration_s", pa.float64()),
        ("n_frames", pa.int32()),
        ("codes", CODES),
        ("context_codes", CODES),
    ]
)
"""Columns of samples.parquet. Codes are laid out frame by frame: frame 0's C codes come first."""

REJECTED = pa.schema([("sample_id", pa.string()), ("reason", pa.string())])
"""Columns of rejected.parquet. A reason is its kind, a colon, and what was found."""

REFERENCE = pa.schema([("sample_id", pa.string()), ("audio", pa.binary())])
"""Columns of reference.parquet: what the dev and test samples sound like, as WAV files."""


class DatasetHeader(Record):
    """dataset.json: what a model must know of a dataset, and how it was made."""

    version: int
    """Version of the folder's format."""
    fingerprint: str
    """Hexadecimal sha256 of the samples, their order and the audio codec."""
    facts: DatasetFacts
    """What a model must know of it."""
    sample_rate_hz: int
    """Rate of the audio codec's waveforms."""
    samples: dict[str, int]
    """Samples of each split."""
    duration_s: dict[str, float]
    """Seconds of audio of each split."""
    rejected: dict[str, int]
    """Rejected samples by kind of reason."""
    source_sha256: str
    """Hexadecimal sha256 of the source's table of clips."""
    config: dict[str, JsonValue]
    """The settings that prepared it, without paths and process counts."""


class Dataset:
    """A prepared dataset, opened for reading; nothing of it changes once it is there."""

    def __init__(self, path: Path, header: DatasetHeader, table: pa.Table):
        """Use `open`, which checks what it reads."""
        self.path, self.header, self.table = path, header, table

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Read a dataset folder.

        Raises UserError when it is unfinished, damaged or of an unknown version.
        """
        header = read_header(path)
        table = read_rows(
            path,
            SAMPLES,
            header.fingerprint,
            lambda rows: fingerprint(rows, header.facts.audio_codec),
        )
        return cls(path, header, table)

    @property
    def facts(self) -> DatasetFacts:
        """What a model must know before it can be built."""
        return self.header.facts

    def samples(self, split: str) -> list[dict[str, Any]]:
        """Rows of a split, in order; codes and context_codes are flat uint16 arrays.

        Raises UserError when the split is unknown.
        """
        table = of_split(self.table, split)
        rows: list[dict[str, Any]] = table.drop_columns(["codes", "context_codes"]).to_pylist()
        for name in ("codes", "context_codes"):
            for row, codes in zip(rows, table.column(name), strict=True):
                row[name] = codes.values.to_numpy().copy()
        return rows

    def codes(self, sample: dict[str, Any]) -> np.ndarray:
        """Codes [F, C] uint16 of a sample."""
        return np.asarray(sample["codes"], dtype=np.uint16).reshape(-1, self.facts.codebooks)

    def reference(self, sample_id: str) -> tuple[Tensor, int]:
        """Recorded waveform [samples] of a dev or test sample as it was encoded, and its rate.

        Raises KeyError for a sample of another split.
        """
        return read_audio(self._references[sample_id])

    @cached_property
    def _references(self) -> dict[str, bytes]:
        table = pq.read_table(self.path / "reference.parquet")
        ids, audio = table.column("sample_id"), table.column("audio")
        return dict(zip(ids.to_pylist(), audio.to_pylist(), strict=True))

    def rejected(self) -> list[dict[str, str]]:
        """What was rejected: rows of sample_id and reason, check by check."""
        rows: list[dict[str, str]] = pq.read_table(self.path / "rejected.parquet").to_pylist()
        return rows

    def audio_codec(self) -> AudioCodec:
        """The audio codec that made the codes; raises UserError when it is not that one."""
        audio_codec = load_audio_codec(self.path / "audio_codec")
        if audio_codec.fingerprint() != self.facts.audio_codec:
            raise UserError(
                f"{self.path}/audio_codec has fingerprint {audio_codec.fingerprint()}, but the "
                f"codes were made by {self.facts.audio_codec}; prepare the dataset again"
            )
        return audio_codec


def read_header(path: Path) -> DatasetHeader:
    """Read dataset.json alone.

    Raises UserError when it is missing, unreadable, of an unknown version, or of images.
    """
    return read_dataset_header(path, DatasetHeader, DATASET_VERSION, "speech")


def fingerprint(samples: pa.Table, audio_codec: str) -> str:
    """Hexadecimal sha256 of a table's rows in order, and of the audio codec's fingerprint."""
    digest = hashlib.sha256(audio_codec.encode())
    for column in samples.drop_columns(["codes", "context_codes"]).columns:
        digest.update(json.dumps(column.to_pylist()).encode())
    for name in ("codes", "context_codes"):
        column = samples.column(name)
        digest.update(json.dumps(pc.list_value_length(column).to_pylist()).encode())
        digest.update(pc.list_flatten(column).to_numpy().astype("<u2").tobytes())
    return digest.hexdigest()
