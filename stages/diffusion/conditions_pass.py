"""First pass of `prepare`: what the table `conditions` holds, and captions that are encoded for it.

Captions are encoded before the images, while the text encoders alone are loaded; the table is
written after them, of the captions that are still needed then.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stages.diffusion.denoiser import ImageEncoder
from stages.diffusion.image_config import ImagesConfig
from stages.diffusion.kept_batches import KeptBatches, Tensors, batches_of
from stages.diffusion.screened_images import ScreenedImages
from stages.diffusion.table_parts import table_writer
from stages.errors import UserError
from store.schema import TableFacts

Rows = dict[str, list[int]]
"""Rows of a table by sample_id and variation."""


class CaptionsPass:
    """Encodes distinct captions once, and writes them as a table."""

    def __init__(self, config: ImagesConfig, encoder: ImageEncoder, kept: KeptBatches) -> None:
        """Take who encodes, and where encoded batches wait for the table."""
        self._config, self._encoder, self._kept = config, encoder, kept
        asked = config.unconditional
        self._unconditional = {"zeros": None, "empty": "", "negative": asked.text}[asked.kind]
        """The text whose encoding stands for no condition; None for zeros."""
        self._asked: list[str] = []
        """All texts that were encoded; in their batches they are found again."""

    def encode(self, screened: ScreenedImages) -> None:
        """Encode all captions, let go of the text encoders, and reject what is not finite.

        Raises UserError where what stands for no condition is not.
        """
        self._asked, lost = self._texts(screened), set()
        for text, tensors in self._encoded():
            if not all(np.isfinite(each).all() for each in tensors.values()):
                lost.add(text)
        self._encoder.free()
        if self._unconditional in lost:
            raise UserError(
                f"the text encoders give no finite float16 values for {self._unconditional!r}, "
                "which stands for no condition: try prepare.encoder.precision=fp32"
            )
        screened.drop(
            {
                image.sample_id: f"condition not finite: that of {text!r}"
                for image in screened.images
                for text in image.captions
                if text in lost
            }
        )

    def write(self, screened: ScreenedImages, folder: Path) -> tuple[Rows, TableFacts]:
        """Write what stands for no condition as row 0, and then every caption that is used.

        They were given to `encode`; those of images that were dropped since are left out.
        """
        used = set(self._texts(screened))
        writer = table_writer(
            folder,
            {n: (np.dtype(f.dtype), f.shape) for n, f in self._encoder.conditions.items()},
        )
        if self._unconditional is None:
            writer.append(self._encoder.zeros())
        rows = {text: writer.append(each) for text, each in self._encoded() if text in used}
        self._encoder.free()
        of_images = {i.sample_id: [rows[text] for text in i.captions] for i in screened.images}
        return of_images, writer.finish()

    def _texts(self, screened: ScreenedImages) -> list[str]:
        """Texts to encode, each once, the one that stands for no condition first."""
        texts = [] if self._unconditional is None else [self._unconditional]
        texts += [text for image in screened.images for text in image.captions]
        return list(dict.fromkeys(texts))

    def _encoded(self) -> Iterator[tuple[str, Tensors]]:
        """Texts in order with their tensors, read where they are known."""
        batches = list(batches_of(iter(self._asked), self._config.batch_size))
        for batch in tqdm(batches, desc="encoding captions", unit="batch", disable=None):
            content = [b"texts", *(text.encode() for text in batch)]
            rows = self._kept.get(content, partial(self._encoder.encode_texts, batch))
            yield from zip(batch, rows, strict=True)


def write_labels(
    screened: ScreenedImages, text_variations: int, folder: Path
) -> tuple[Rows, TableFacts]:
    """Write the label that is none as row 0, and then every label."""
    writer = table_writer(folder, {"class_labels": (np.dtype(np.int64), ())})
    count = len(screened.classes)
    for label in (count, *range(count)):
        writer.append({"class_labels": np.array(label, np.int64)})
    rows = {image.sample_id: [image.label + 1] * text_variations for image in screened.images}
    return rows, writer.finish()
