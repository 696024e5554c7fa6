"""The folder of a dataset of images: samples, side tables of latents and conditions, a decoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue
from torch import Tensor

from stages.dataset_folder import of_split, read_dataset_header, read_rows
from stages.diffusion.facts import ImageFacts
from stages.diffusion.images import read_image, to_uint8
from stages.diffusion.pixels import PIXELS, PixelsEncoder
from stages.distributed import choose_device
from stages.errors import UserError
from stages.family import load_image_encoder
from stages.rejections import Rejection
from store.schema import FileSum, Record, TableFacts
from store.side_tables import TABLES, SideTable, table_files
from store.sums import read_summed

__all__ = ["ImageDataset", "ImageDecoder", "ImageHeader", "to_uint8"]

IMAGES_VERSION = 1
DECODER, REFERENCES = "decoder", "references"

ROWS = pa.list_(pa.int32())
SAMPLES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("file", pa.string()),
        ("split", pa.string()),
        ("text", pa.string()),
        ("label", pa.int32()),
        ("target", pa.string()),
        ("weight", pa.float64()),
        ("bucket", pa.int16()),
        ("latents", ROWS),
        ("conditions", ROWS),
    ]
)
"""Columns of samples.parquet. `latents` and `conditions` are rows of the tables of these names, one
for each variation; -1 of a dataset without conditions."""

REJECTED = pa.schema([("sample_id", pa.string()), ("file", pa.string()), ("reason", pa.string())])
"""Columns of rejected.parquet. A reason is its kind, a colon, and what was found."""


class ImageDecoder(Protocol):
    """What makes images of latents again."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the model's latents [b, c, h, w] to images [b, C, H, W] in [−1, 1] float32."""
        ...

    def free(self) -> None:
        """Let go of what is loaded."""
        ...


class ImageHeader(Record):
    """dataset.json: what a model must know of a dataset of images, and how it was made."""

    version: int
    """Version of the folder's format."""
    kind: Literal["images"] = "images"
    """What it holds."""
    fingerprint: str
    """Hexadecimal sha256 of facts, samples, their order, and the tables."""
    facts: ImageFacts
    """What a model must know of it."""
    samples: dict[str, int]
    """Samples of each split."""
    rejected: dict[str, int]
    """Rejected rows by kind of reason."""
    tables: dict[str, TableFacts]
    """Side tables by name: `latents`, and `conditions` where there are any."""
    files: dict[str, FileSum]
    """Size and hash of the files of the tables."""
    decoder: dict[str, FileSum]
    """Size and hash of the files of the copied autoencoder; none of pixels."""
    source_sha256: str
    """Hexadecimal sha256 of the source's table."""
    config: dict[str, JsonValue]
    """The settings that prepared it, without paths and devices."""


class ImageDataset:
    """A prepared dataset of images, opened for reading; nothing of it changes once it is there."""

    def __init__(self, path: Path, header: ImageHeader, rows: pa.Table) -> None:
        """Use `open`, which checks what it reads."""
        self.path, self.header, self.rows = path, header, rows

    @classmethod
    def open(cls, path: Path) -> ImageDataset:
        """Read a dataset folder.

        Raises UserError when it is unfinished, damaged, of an unknown version, or of speech. Files
        of the tables are checked when they are first read.
        """
        header = read_header(path)
        rows = read_rows(
            path,
            SAMPLES,
            header.fingerprint,
            lambda rows: fingerprint(rows, header.facts, header.files),
        )
        return cls(path, header, rows)

    @property
    def facts(self) -> ImageFacts:
        """What a model must know before it can be built."""
        return self.header.facts

    def samples(self, split: str) -> list[dict[str, Any]]:
        """Rows of a split, in order, as samples.parquet has them.

        Raises UserError when the split is unknown.
        """
        rows: list[dict[str, Any]] = of_split(self.rows, split).to_pylist()
        return rows

    def table(self, name: str) -> SideTable:
        """Open the table `latents` or `conditions`; raises KeyError for one that is not there."""
        facts = self.header.tables[name]
        sums = {Path(file).name: self.header.files[file] for file in table_files(name, facts)}
        return SideTable(self.path / TABLES / name, facts, sums)

    def reference(self, sample_id: str) -> np.ndarray:
        """Image [H, W, C] uint8 of a dev or test sample, as its first variation shows it.

        Raises KeyError for a sample of another split, UserError where the file is damaged.
        """
        path = self.path / REFERENCES / f"{sample_id}.png"
        if not path.is_file():
            raise KeyError(sample_id)
        pixels = self.facts.encoder == PIXELS
        mode: Literal["L", "RGB"] = "L" if pixels and self.facts.latent_channels == 1 else "RGB"
        try:
            with path.open("rb") as file:
                image = np.array(read_image(file, mode))
        except Rejection as error:
            raise UserError(f"{path}: {error}; prepare the dataset again") from error
        return image[:, :, None] if image.ndim == 2 else image

    def rejected(self) -> list[dict[str, str]]:
        """What was rejected: rows of sample_id, file and reason, check by check."""
        rows: list[dict[str, str]] = pq.read_table(self.path / "rejected.parquet").to_pylist()
        return rows

    def decoder(self, device: str = "auto") -> ImageDecoder:
        """What turns latents of this dataset, and of models that learned from it, into images.

        It is the dataset's own copy of the autoencoder. Raises StoreError when a file of it was
        altered or is missing.
        """
        if self.facts.encoder == PIXELS:
            return PixelsEncoder(self.facts.latent_channels)
        for file, expected in self.header.decoder.items():
            read_summed(self.path / file, expected, f"{self.path / file}")
        return load_image_encoder().open(self.path / DECODER, device=choose_device(device))


def read_header(path: Path) -> ImageHeader:
    """Read dataset.json alone.

    Raises UserError when it is missing, unreadable, of an unknown version, or of speech.
    """
    return read_dataset_header(path, ImageHeader, IMAGES_VERSION, "images")


def fingerprint(rows: pa.Table, facts: ImageFacts, files: Mapping[str, FileSum]) -> str:
    """Hexadecimal sha256 of facts, samples in order, and hashes of the tables' files.

    It leaves out what the files of the images were called, and the copy of the autoencoder, whose
    own fingerprint is among the facts.
    """
    digest = hashlib.sha256(facts.model_dump_json().encode())
    for column in rows.drop_columns(["file"]).columns:
        digest.update(json.dumps(column.to_pylist()).encode())
    for file, found in sorted(files.items()):
        digest.update(f"{file} {found.bytes} {found.xxh3}\n".encode())
    return digest.hexdigest()
