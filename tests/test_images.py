"""Files of images of every kind, sound and damaged, and which bucket an image goes to."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stages.diffusion.image_config import ImageBucketsConfig
from stages.diffusion.images import place, read_image, to_tensor, to_uint8
from stages.rejections import Rejection
from tests.fake_images import gradient


def saved(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


RED = Image.new("RGB", (2, 1), (255, 0, 0))


def test_every_kind_of_pixel_becomes_8_bits():
    values = np.array([[0, 200, 32896, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        found = np.asarray(read_image(saved(Image.fromarray(values), kind), "L"))
        assert found.tolist() == [[0, 1, 128, 255]]
    deep = Image.fromarray(values.astype(np.int32))
    assert np.asarray(read_image(saved(deep, "TIFF"), "L")).tolist() == [[0, 1, 128, 255]]
    assert np.asarray(read_image(saved(RED.quantize(4), "PNG"), "RGB")).tolist() == [
        [[255, 0, 0]] * 2
    ]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    near = np.asarray(read_image(saved(cmyk, "JPEG"), "RGB")).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(near, [255, 0, 0], atol=4)
    assert np.asarray(read_image(saved(Image.new("1", (1, 1), 1), "PNG"), "RGB")).tolist() == [
        [[255] * 3]
    ]


def test_what_is_transparent_shows_white():
    half = Image.fromarray(np.array([[[255, 0, 0, 255], [9, 9, 9, 0], [0, 0, 0, 128]]], np.uint8))
    found = np.asarray(read_image(saved(half, "PNG"), "RGB")).tolist()
    assert found == [[[255, 0, 0], [255] * 3, [127] * 3]]
    grey = Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8))
    assert np.asarray(read_image(saved(grey, "PNG"), "L")).tolist() == [[7, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    found = np.asarray(read_image(saved(palette, "PNG", transparency=1), "RGB")).tolist()
    assert found == [[[10, 20, 30], [255] * 3]]


def test_an_image_is_turned_upright():
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter to the right when it is shown
    found = np.asarray(read_image(saved(Image.fromarray(pixels), "PNG", exif=exif), "L"))
    np.testing.assert_array_equal(found, np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("image", "kind", "reason"),
    [
        (Image.new("F", (2, 2), 0.5), "TIFF", "floating-point values"),
        (Image.new("I", (2, 2), 70000), "TIFF", "more than 16 bits"),
        (Image.new("RGB", (2, 2)), "ICO", "none of JPEG"),
        (Image.new("RGB", (2, 2)), "EPS", "none of JPEG"),
    ],
)
def test_what_has_no_known_range_or_format_is_rejected(image, kind, reason):
    with pytest.raises(Rejection, match=f"unreadable image: .*{reason}"):
        read_image(saved(image, kind), "RGB")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_damaged_file_is_an_image_or_a_rejection(kind):
    whole = saved(Image.fromarray(gradient(24, 16)), kind).getvalue()
    drawn = random.Random(kind)
    outcomes = set()
    for _ in range(120):
        damaged = bytearray(whole[: drawn.choice([len(whole), drawn.randrange(len(whole))])])
        for place_ in (drawn.randrange(len(damaged) or 1) for _ in range(3)):
            damaged[place_ : place_ + 1] = bytes([drawn.randrange(256)])
        try:
            outcomes.add(read_image(io.BytesIO(damaged), "RGB").mode)
        except Rejection as error:
            outcomes.add(str(error).split(":")[0])
    assert "unreadable image" in outcomes
    assert outcomes <= {"RGB", "unreadable image", "image too large"}


def test_a_small_file_that_claims_a_vast_image_is_not_decoded():
    with pytest.raises(Rejection, match="image too large: 12000×12000 has more than"):
        read_image(io.BytesIO(b"P6 12000 12000 255 "), "RGB")
    with pytest.raises(Rejection, match="image too large: it has more than"):
        read_image(io.BytesIO(b"P6 40000 40000 255 "), "RGB")


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((40, 40), 0), ((80, 80), 2), ((64, 64), 2), ((60, 60), 2), ((50, 50), 0), ((30, 60), 1)],
)
def test_of_buckets_of_one_shape_the_largest_is_taken_that_the_image_fills(size, bucket):
    buckets = ImageBucketsConfig(sizes=((32, 32), (24, 48), (64, 64)))
    assert place(size, buckets).bucket == bucket


def test_all_levels_survive_the_way_to_float16_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(to_uint8(to_tensor(levels).half()), levels)
    odd = torch.tensor([float("nan"), float("inf"), -3.0]).view(1, 1, 1, 3)
    assert to_uint8(odd).ravel().tolist() == [128, 255, 0]
