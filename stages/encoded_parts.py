"""Codes that an interrupted `prepare` had encoded, so that it goes on where it stopped."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from stages.audio_codec import AudioCodec
from stages.errors import UserError
from stages.publish import publish_file

CODES = "codes"


class EncodedParts:
    """Batches of codes in a folder, each in a file of its own that is whole or not there.

    A file is named after all that its codes depend on: the audio codec and the samples. So other
    settings or another recording never meet codes that are not theirs, and nothing need be said
    about the source. What is in the folder is garbage once the dataset is there.
    """

    def __init__(self, folder: Path, audio_codec: AudioCodec) -> None:
        """Take the folder, which is made with the first part, and who encodes."""
        self.folder, self.audio_codec = folder, audio_codec
        self._fingerprint = audio_codec.fingerprint().encode()

    def encode(self, waveforms: Sequence[Tensor]) -> list[np.ndarray]:
        """Waveforms [samples] float32 → codes [F, C] uint16, read where they are known.

        Raises UserError when a part cannot be read.
        """
        path = self.folder / f"{self._key(waveforms)}.parquet"
        if path.exists():
            return self._read(path)
        codes = self.audio_codec.encode(waveforms)
        rows = pa.array([each.reshape(-1) for each in codes], pa.list_(pa.uint16()))
        with publish_file(path) as draft:
            pq.write_table(pa.table({CODES: rows}), draft, write_page_checksum=True)
        return codes

    def _read(self, path: Path) -> list[np.ndarray]:
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{path}, which an interrupted run left, cannot be read: {error}; remove it and "
                "run the same command again"
            ) from error
        width = self.audio_codec.codebooks
        return [row.values.to_numpy().reshape(-1, width) for row in table.column(CODES)]

    def _key(self, waveforms: Sequence[Tensor]) -> str:
        digest = hashlib.sha256(self._fingerprint)
        for waveform in waveforms:
            digest.update(f" {len(waveform)} ".encode())
            digest.update(waveform.contiguous().numpy().data)
        return digest.hexdigest()


def parts_folder(dataset: Path) -> Path:
    """Where the parts of a dataset folder lie until it is there."""
    return dataset.with_name(f".{dataset.name}.encoded")


def remove_parts(dataset: Path) -> None:
    """Remove the parts of a dataset that is there."""
    shutil.rmtree(parts_folder(dataset), ignore_errors=True)
