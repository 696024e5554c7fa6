"""Second pass of `prepare`: images are cut out and encoded, and the table `latents` is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from stages.diffusion.conditions_pass import Rows
from stages.diffusion.denoiser import ImageEncoder
from stages.diffusion.image_config import ImagesConfig, PipelineEncoderConfig
from stages.diffusion.image_source import ImageSource
from stages.diffusion.images import Crop, Mode, cut, cut_mask, resize, resize_mask, to_tensor
from stages.diffusion.kept_batches import KeptBatches, Tensors, batches_of
from stages.diffusion.noise import normal
from stages.diffusion.pixels import PixelsEncoder
from stages.diffusion.screened_images import AcceptedImage, ScreenedImages
from stages.diffusion.table_parts import table_writer
from stages.errors import UserError
from stages.rejections import Rejection
from store.schema import TableFacts

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class _Piece:
    """An image as it is encoded: one draw of crop and flip."""

    image: AcceptedImage
    crop: Crop
    pixels: np.ndarray
    """[H, W, C] uint8."""
    mask: np.ndarray | None
    """[1, h, w] float16."""

    @property
    def noise_key(self) -> tuple[object, ...]:
        """What the posterior draw depends on: equal draws of crop and flip have equal latents."""
        crop = self.crop
        return ("posterior", self.image.sample_id, crop.top, crop.left, int(crop.flip))


class ImagesPass:
    """Encodes every distinct draw of every image once."""

    def __init__(
        self,
        config: ImagesConfig,
        source: ImageSource,
        encoder: ImageEncoder | PixelsEncoder,
        kept: KeptBatches,
        mode: Mode,
        shapes: Sequence[Shape],
    ) -> None:
        """Take who encodes, and `shapes`, [c, h, w] of the latents of every bucket."""
        self._config, self._source, self._encoder = config, source, encoder
        self._kept, self._mode, self._shapes = kept, mode, shapes
        self._lost: dict[str, str] = {}
        """Reasons by sample_id."""

    def write(
        self, screened: ScreenedImages, folder: Path, references: Path
    ) -> tuple[Rows, TableFacts]:
        """Write the table bucket by bucket, and what dev and test images look like as PNG.

        Rejects images whose latents are not finite, and those that cannot be read any more.
        """
        largest = max(self._shapes, key=np.prod)
        writer = table_writer(folder, {"latent": (np.dtype(np.float16), largest)})
        references.mkdir()
        of_images: Rows = {}
        for image, group in groupby(self._encoded(screened.images), lambda pair: pair[0].image):
            made = list(group)
            if not all(np.isfinite(latent).all() for _, latent in made):
                self._lost[image.sample_id] = (
                    "latent not finite: the autoencoder gives NaN, or more than float16 holds"
                )
                continue
            rows = {piece.crop: writer.append(self._row(piece, latent)) for piece, latent in made}
            of_images[image.sample_id] = [rows[crop] for crop in image.crops]
            if image.split != "train":
                _write_png(made[0][0].pixels, references / f"{image.sample_id}.png")
        self._encoder.free()
        screened.drop(self._lost)
        return of_images, writer.finish()

    def _row(self, piece: _Piece, latent: np.ndarray) -> dict[str, np.ndarray]:
        placement, crop = piece.image.placement, piece.crop
        original, target = placement.original[::-1], placement.target[::-1]
        row = {"latent": latent, **self._encoder.sizes(original, (crop.top, crop.left), target)}
        row["crop"] = np.array([crop.top, crop.left, crop.flip, *original], np.int32)
        return row if piece.mask is None else row | {"mask": piece.mask}

    def _encoded(self, images: Sequence[AcceptedImage]) -> Iterator[tuple[_Piece, np.ndarray]]:
        """Pieces with their latents [c, h, w] float16, bucket by bucket, an image's together."""
        ordered = sorted(images, key=lambda image: image.placement.bucket)
        progress = tqdm(ordered, desc="encoding images", unit="image", disable=None)
        pieces = self._pieces(progress)
        for bucket, group in groupby(pieces, lambda piece: piece.image.placement.bucket):
            for batch in batches_of(group, self._config.batch_size):
                yield from zip(batch, self._encode(batch, self._shapes[bucket]), strict=True)

    def _pieces(self, images: Iterable[AcceptedImage]) -> Iterator[_Piece]:
        for image in images:
            try:
                pieces = self._cut_out(image)
            except Rejection as error:
                self._lost[image.sample_id] = str(error)
            else:
                yield from pieces

    def _cut_out(self, image: AcceptedImage) -> list[_Piece]:
        """Every distinct draw of an image; raises Rejection where a file was changed meanwhile."""
        placement, row = image.placement, image.row
        upright = self._source.image(row.file_name, self._mode)
        if upright.size != placement.original:
            raise Rejection(f"changed file: {row.file_name} was another image when it was checked")
        resized = resize(upright, placement)
        mask = resize_mask(self._source.image(row.mask, "L"), placement) if row.mask else None
        return [
            _Piece(
                image,
                crop,
                cut(resized, placement, crop),
                None if mask is None else cut_mask(mask, placement, crop, self._encoder.downsample),
            )
            for crop in dict.fromkeys(image.crops)
        ]

    def _encode(self, batch: Sequence[_Piece], shape: Shape) -> list[np.ndarray]:
        """Latents [c, h, w] float16 of pieces of one bucket, read where they are known."""
        pixels = np.stack([piece.pixels for piece in batch])
        keys = [(self._config.seed, *piece.noise_key) for piece in batch]
        asked = self._config.encoder
        drawn = isinstance(asked, PipelineEncoderConfig) and asked.posterior == "sample"

        def make() -> list[Tensors]:
            noise = torch.from_numpy(np.stack([normal(shape, *k) for k in keys])) if drawn else None
            with torch.inference_mode():
                latents = self._encoder.encode_images(to_tensor(pixels), noise)
            if latents.shape[1:] != shape:
                raise UserError(
                    f"the autoencoder makes latents {list(latents.shape[1:])} of images "
                    f"{list(pixels.shape[1:3])}, but its configuration promises {list(shape)}"
                )
            # What overflows becomes infinite, and is rejected.
            return [{"latent": each} for each in latents.half().cpu().numpy()]

        content = [b"images", repr((pixels.shape, keys)).encode(), pixels.tobytes()]
        return [row["latent"] for row in self._kept.get(content, make)]


def _write_png(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path, "PNG")
