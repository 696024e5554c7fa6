"""A folder of images, and an encoder of them that is cheap, visible, and remembers its work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from stages.diffusion.facts import ConditionFacts

NAN_COLOUR, HUGE_COLOUR = (255, 0, 255), (0, 255, 255)
"""Of images whose latents are not a number, or more than float16 holds."""


class FakeEncoder:
    """Means of 4×4 pixels and their grey; captions as numbers of their letters."""

    downsample, latent_channels, scaling, shift = 4, 4, 0.5, 0.25
    events: list[Any]
    """Texts that were encoded, sizes of batches of images, and `free`."""
    stop_after: int | None
    """Batches of images after which the process is interrupted."""

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self.path, self.options = path, options

    @classmethod
    def reset(cls, stop_after: int | None = None) -> None:
        cls.events, cls.stop_after = [], stop_after

    @classmethod
    def open(cls, path: Path, **options: Any) -> Self:
        return cls(path, options)

    def fingerprint(self) -> str:
        return f"fake {self.path.name}"

    @property
    def conditions(self) -> Mapping[str, ConditionFacts]:
        if self.path.name == "no_text":
            return {}
        return {
            "prompt_embeds": ConditionFacts(dtype="float16", shape=(3, 2)),
            "pooled": ConditionFacts(dtype="float16", shape=(4,)),
        }

    def encode_texts(self, texts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        self.events += texts
        return [encoded_text(text) for text in texts]

    def zeros(self) -> dict[str, np.ndarray]:
        return {n: np.zeros(f.shape, f.dtype) for n, f in self.conditions.items()}

    def sizes(self, original: Any, crop: Any, target: Any) -> dict[str, np.ndarray]:
        if self.path.name != "sizes":
            return {}
        return {"time_ids": np.array([*original, *crop, *target], np.float32)}

    def encode_images(self, images: Tensor, noise: Tensor | None) -> Tensor:
        if self.stop_after is not None and self.batches == self.stop_after:
            raise KeyboardInterrupt
        type(self).events.append(len(images))
        return (encoded_images(images) + (0 if noise is None else 0.125 * noise) - 0.25) * 0.5

    @property
    def batches(self) -> int:
        return sum(isinstance(event, int) for event in self.events)

    def decode(self, latents: Tensor) -> Tensor:
        return interpolate((latents / 0.5 + 0.25)[:, :3], scale_factor=4)

    def keep_decoder(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    def free(self) -> None:
        self.events.append("free")


def encoded_text(text: str) -> dict[str, np.ndarray]:
    if text == "infinite":
        return {
            n: np.full(s, np.inf, np.float16)
            for n, s in (("prompt_embeds", (3, 2)), ("pooled", (4,)))
        }
    values = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8).astype(np.float16)
    return {"prompt_embeds": values[:6].reshape(3, 2), "pooled": values[6:10]}


def encoded_images(images: Tensor) -> Tensor:
    """The autoencoder's own latents [b, 4, h, w] of images [b, 3, H, W]."""
    means = avg_pool2d(images, 4)
    for index, image in enumerate(images):
        colour = tuple(((image.amin((1, 2)) + 1) * 127.5).round().int().tolist())
        flat = bool((image.amin((1, 2)) == image.amax((1, 2))).all())
        if flat and colour == NAN_COLOUR:
            means[index] = float("nan")
        if flat and colour == HUGE_COLOUR:
            means[index] = 1e6
    return torch.cat([means, means.mean(1, keepdim=True)], 1)


def gradient(width: int, height: int, seed: int = 0) -> np.ndarray:
    """An image [height, width, 3] uint8 of smooth colours that no mirror and no shift leaves be."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    phases, rates = random.uniform(0, 6, 3), random.uniform(0.05, 0.15, (2, 3))
    waves = np.sin(y[..., None] * rates[0] + x[..., None] * rates[1] + phases)
    return np.rint(127.5 + 100 * waves + 20 * (x / width)[..., None]).clip(0, 255).astype(np.uint8)


def write_images(
    folder: Path, images: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, Any]]
) -> Path:
    """Write images and metadata.jsonl; a row without a file_name takes the image at its place."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / name)
    lines = [json.dumps({"file_name": name, **row}) for name, row in zip(images, rows, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder
