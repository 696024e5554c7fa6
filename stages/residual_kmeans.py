"""Residual vector quantisation: k-means on what the codebooks before left over."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import trange

from stages.prepare_config import FitAudioCodecConfig

SEED_POINTS = 16384
"""Points that the first centroids are chosen from."""


def fit_codebooks(features: Tensor, config: FitAudioCodecConfig) -> Tensor:
    """Fit codebooks [C, V, D] on features [N, D] of mean zero, one after the other."""
    generator = torch.Generator().manual_seed(config.seed)
    left, codebooks = features, []
    for _ in trange(config.codebooks, desc="audio codec", unit="codebook", disable=None):
        centroids = _kmeans(left, config.codes_per_codebook, config.iterations, generator)
        left = left - centroids[nearest(left, centroids)]
        codebooks.append(centroids)
    return torch.stack(codebooks)


def quantise(features: Tensor, codebooks: Tensor) -> Tensor:
    """Features [N, D] → codes [N, C] int64: in each codebook the entry nearest to the rest."""
    left, codes = features, []
    for centroids in codebooks:
        codes.append(nearest(left, centroids))
        left = left - centroids[codes[-1]]
    return torch.stack(codes, dim=1)


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Index [N] of the centroid [V, D] nearest to each point [N, D]."""
    return (centroids.square().sum(dim=1) - 2 * points @ centroids.T).argmin(dim=1)


def _kmeans(points: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's rounds from k-means++ centroids; a centroid without points moves to a random one."""
    centroids = _spread(points, count, generator)
    for _ in range(iterations):
        index = nearest(points, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, index, points)
        sizes = torch.bincount(index, minlength=count)[:, None]
        strays = points[torch.randint(len(points), (count,), generator=generator)]
        centroids = torch.where(sizes == 0, strays, sums / sizes.clamp(min=1))
    return centroids


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """First centroids [count, D], drawn with chances as the squared distance to those before.

    Source: Arthur and Vassilvitskii, k-means++, SODA 2007.
    """
    points = points[torch.randperm(len(points), generator=generator)[:SEED_POINTS]]
    chosen = points[:1]
    distance = (points - chosen).square().sum(dim=1)
    for _ in range(count - 1):
        chances = distance if distance.sum() > 0 else torch.ones_like(distance)
        pick = torch.multinomial(chances, 1, generator=generator)
        chosen = torch.cat([chosen, points[pick]])
        distance = torch.minimum(distance, (points - points[pick]).square().sum(dim=1))
    return chosen
