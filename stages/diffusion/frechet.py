"""How far apart two sets of images are, as Gaussians of what they look like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import adaptive_avg_pool2d

PIXEL_VALUES = 256
"""Images of at most so many values are compared value by value, larger ones by area means."""
GRID = 8
"""Area means per side and channel of a larger image."""

Array = NDArray[np.float64]


def uses_pixels(shapes: Sequence[tuple[int, int, int]]) -> bool:
    """Whether images of these shapes [height, width, channels] are compared value by value."""
    return len(set(shapes)) == 1 and int(np.prod(shapes[0])) <= PIXEL_VALUES


def image_features(images: Sequence[NDArray[np.uint8]], *, pixels: bool) -> Array:
    """Return [N, D] float64 of images [H, W, C] uint8, in [−1, 1].

    With `pixels` they are the values themselves, of images of one shape; else the means over an
    8×8 grid of areas of every channel, which images of any shape have alike.
    """
    return np.stack([_flat(image, pixels) for image in images])


def _flat(image: NDArray[np.uint8], pixels: bool) -> Array:
    values = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).double() / 127.5 - 1
    flat: Array = (values if pixels else adaptive_avg_pool2d(values, GRID)).flatten().numpy()
    return flat


def frechet_distance(ours: Array, theirs: Array) -> float:
    """Squared Fréchet distance between the Gaussians fitted to features [N, D] and [M, D] float64.

    That is |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½). With the centred features Aᵀ·A = Σ₁ and
    Bᵀ·B = Σ₂, the eigenvalues of Σ₁Σ₂ are the squared singular values of A·Bᵀ, so the trace of the
    root is their sum: exact for singular covariances too (N ≤ D), without a root of a matrix and
    without regularisation. The estimate is biased upwards by a term that falls as 1/N and 1/M:
    compare only sets of the same size with the same other set. Raises ValueError for sets of fewer
    than two images or of different features.

    Source: Dowson & Landau 1982; as a distance of images Heusel et al. 2017 (1706.08500).
    """
    if ours.shape[1:] != theirs.shape[1:] or min(len(ours), len(theirs)) < 2:
        raise ValueError(
            f"features {list(ours.shape)} and {list(theirs.shape)} must be [N, D] and [M, D] with "
            "at least 2 rows each"
        )
    a, b = _root(ours), _root(theirs)
    shift = float(((ours.mean(0) - theirs.mean(0)) ** 2).sum())
    spread = float((a**2).sum() + (b**2).sum())
    overlap = float(np.linalg.svd(a @ b.T, compute_uv=False).sum())
    return max(shift + spread - 2 * overlap, 0.0)


def _root(features: Array) -> Array:
    """Return R [min(N, D), D] with Rᵀ·R the covariance of features [N, D]."""
    root: Array = np.linalg.qr(features - features.mean(0), mode="r") / np.sqrt(len(features) - 1)
    return root


def class_spread(features: Array, labels: NDArray[np.int64]) -> float | None:
    """Root mean square deviation of features [N, D] from the mean of their class.

    `labels` [N]; a class of one image does not count, and None stands for no class of two. It falls
    where guidance makes the images of a class alike.
    """
    squares = values = 0.0
    for label in np.unique(labels):
        images = features[labels == label]
        if len(images) > 1:
            squares += float(((images - images.mean(0)) ** 2).sum())
            values += (len(images) - 1) * images.shape[1]
    return float(np.sqrt(squares / values)) if values else None
