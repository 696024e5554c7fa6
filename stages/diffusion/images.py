"""Images: read from files that anyone may have written, brought to a bucket's size, cut out."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stages.diffusion.image_config import ImageBucketsConfig, ImagesConfig
from stages.rejections import Rejection
from stages.sampling import keyed_seed

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "PPM", "TIFF")
"""Formats that are read. Pillow knows more, of which some start other programs."""

MAX_PIXELS = 2**27
"""Pixels of an image that is read, more than its sides of 11,500: a small file may claim more."""

DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError,
    OverflowError, EOFError, MemoryError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises where a file is cut short or altered."""

Mode = Literal["L", "RGB"]


@dataclass(frozen=True)
class Placement:
    """Which bucket an image goes to, and how it gets there; sizes are (width, height)."""

    bucket: int
    target: tuple[int, int]
    """Size of the bucket in pixels."""
    original: tuple[int, int]
    """Size of the image, turned upright."""
    resized: tuple[int, int]
    """Size at which it just covers the bucket."""


@dataclass(frozen=True)
class Crop:
    """Where an image of the resized size is cut, after it was mirrored if it is."""

    top: int
    left: int
    flip: bool


def read_image(file: BinaryIO, mode: Mode) -> Image.Image:
    """Read the first image of a file, upright, as 8-bit grey or RGB.

    What is transparent shows white; 16 bits are rounded to 8; colour profiles are not applied.
    Raises Rejection for what is no image, cut short, too large, or of a format that is not known.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that nobody reads, and of sizes: see below
        try:
            with Image.open(file, formats=_formats()) as image:
                if math.prod(image.size) > MAX_PIXELS:
                    raise Rejection(_too_large("{}×{}".format(*image.size)))
                return _flattened(ImageOps.exif_transpose(image), mode)
        except UnidentifiedImageError as error:
            raise Rejection(f"unreadable image: none of {', '.join(_formats())}") from error
        except Image.DecompressionBombError as error:
            raise Rejection(_too_large("it")) from error
        except DAMAGED as error:
            raise Rejection(f"unreadable image: {_said(error)}") from error


def _too_large(found: str) -> str:
    return f"image too large: {found} has more than {MAX_PIXELS} pixels"


def _said(error: BaseException) -> str:
    """What went wrong, without a path, which another machine would not have."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}" or type(error).__name__


@cache
def _formats() -> list[str]:
    """Those of the formats that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _flattened(image: Image.Image, mode: Mode) -> Image.Image:
    if image.mode.startswith("I"):
        image = _rounded(image)
    if image.mode == "F":
        raise Rejection("unreadable image: floating-point values, of a range that nobody knows")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _rounded(image: Image.Image) -> Image.Image:
    """Return an image of 16 bits, which Pillow may hold in 32, with 8; Pillow itself would clip."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise Rejection("unreadable image: values of more than 16 bits, of an unknown range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def place(size: tuple[int, int], buckets: ImageBucketsConfig) -> Placement:
    """Choose the bucket that is nearest in aspect ratio to an image of `size` (width, height).

    Of buckets that are equally near the largest is taken which the image fills. Raises Rejection
    for an image that is too small or whose aspect ratio is too far from all.
    """

    def distance(target: tuple[int, int]) -> float:
        return abs(math.log(size[0] * target[1]) - math.log(size[1] * target[0]))

    def preference(index: int) -> tuple[float, int]:
        target = buckets.sizes[index]
        fills, area = _scale(size, target) <= buckets.largest_upscale, math.prod(target)
        return round(distance(target), 9), -area if fills else area

    bucket = min(range(len(buckets.sizes)), key=preference)
    target = buckets.sizes[bucket]
    off, scale = math.exp(distance(target)), _scale(size, target)
    is_, of = "{}×{}".format(*size), "{}×{}".format(*target)
    if off > buckets.aspect_tolerance:
        raise Rejection(
            f"aspect ratio outside the buckets: {is_} is a factor {off:.2f} from the nearest, "
            f"{of}; the limit is {buckets.aspect_tolerance:g}"
        )
    if scale > buckets.largest_upscale:
        raise Rejection(
            f"image too small: {is_} would be enlarged {scale:.2f} times to fill {of}; the limit "
            f"is {buckets.largest_upscale:g}"
        )
    width, height = (max(t, round(s * scale)) for s, t in zip(size, target, strict=True))
    return Placement(bucket, target, size, (width, height))


def _scale(size: tuple[int, int], target: tuple[int, int]) -> float:
    return max(target[0] / size[0], target[1] / size[1])


def draw_crop(
    placement: Placement, sample_id: str, image_variation: int, config: ImagesConfig
) -> Crop:
    """Draw where an image variation is cut and whether it is mirrored, by its key."""

    def drawn(use: str, count: int) -> int:
        return keyed_seed(config.seed, use, sample_id, image_variation) % count

    room = [r - t for r, t in zip(placement.resized, placement.target, strict=True)]
    if config.crop == "center":
        left, top = (free // 2 for free in room)
    else:
        left, top = drawn("crop left", room[0] + 1), drawn("crop top", room[1] + 1)
    return Crop(top, left, drawn("flip", 2**53) < config.flip * 2**53)


def resize(image: Image.Image, placement: Placement) -> Image.Image:
    """Resize an image, antialiased, so that it just covers its bucket."""
    if image.size == placement.resized:
        return image
    return image.resize(placement.resized, Image.Resampling.LANCZOS)


def cut(resized: Image.Image, placement: Placement, crop: Crop) -> np.ndarray:
    """Mirror and cut out a resized image: [height, width, channels] uint8."""
    pixels = np.asarray(_cut(resized, placement, crop))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _cut(resized: Image.Image, placement: Placement, crop: Crop) -> Image.Image:
    (width, height), (top, left) = placement.target, (crop.top, crop.left)
    if crop.flip:
        resized = ImageOps.mirror(resized)
    return resized.crop((left, top, left + width, top + height))


def resize_mask(mask: Image.Image, placement: Placement) -> Image.Image:
    """Resize a grey mask as its image was, without rounding to 8 bits.

    Raises Rejection for a mask of another size than the image.
    """
    if mask.size != placement.original:
        raise Rejection(
            "mask of another size: {}×{}, but the image has {}×{}".format(
                *mask.size, *placement.original
            )
        )
    return mask.convert("F").resize(placement.resized, Image.Resampling.BILINEAR)


def cut_mask(resized: Image.Image, placement: Placement, crop: Crop, downsample: int) -> np.ndarray:
    """Cut out a resized mask: [1, h, w] float16 in [0, 1], the mean of what each latent covers."""
    pixels = np.asarray(_cut(resized, placement, crop)) / np.float32(255)
    height, width = (side // downsample for side in pixels.shape)
    blocks = pixels.reshape(height, downsample, width, downsample)
    mask: np.ndarray = blocks.mean(axis=(1, 3))[None].astype(np.float16)
    return mask


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Scale images [b, H, W, C] uint8 to [b, C, H, W] float32 in [−1, 1]."""
    return torch.from_numpy(pixels).movedim(-1, 1).float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> np.ndarray:
    """Round images [b, C, H, W] in [−1, 1] to [b, H, W, C] uint8; what is not a number is grey."""
    shares = (images.detach().float().nan_to_num(nan=0.0).clamp(-1, 1) + 1.0) * 127.5
    rounded: np.ndarray = shares.round().to(torch.uint8).movedim(1, -1).contiguous().cpu().numpy()
    return rounded
