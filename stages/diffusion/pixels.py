"""No autoencoder: images that are their own latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

PIXELS = "pixels"
"""What stands for the fingerprint of an encoder where there is none."""


@dataclass(frozen=True)
class PixelsEncoder:
    """Does for datasets of pixels what an `ImageEncoder` does for latents, as far as it goes."""

    latent_channels: int
    """1 of grey images, 3 of RGB."""
    downsample: int = 1
    scaling: float = 1.0
    shift: float = 0.0

    def fingerprint(self) -> str:
        """Return the same for all: nothing is learned."""
        return PIXELS

    def encode_images(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Return images [b, c, H, W] in [−1, 1] as they are; there is no posterior to draw from."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Return latents [b, c, H, W] as images float32."""
        return latents.float()

    def sizes(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Return nothing: no network of pixels is told of sizes."""
        return {}

    def free(self) -> None:
        """Let go of nothing."""
