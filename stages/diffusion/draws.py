"""What a planned variation stands for: which image, which caption, and where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.diffusion.image_config import TargetSource
from store.plan import Key

Sample = Mapping[str, Any]
"""One row of the samples.parquet of a dataset of images."""

DRAWN = ("image_variation", "text_variation", "latent", "condition")
"""What rollouts.parquet says of a variation beside its key."""
UNCONDITIONAL_ROW = 0
"""Row of the table `conditions` that stands for no condition."""


@dataclass(frozen=True)
class Draw:
    """One variation of a sample, number image_variation · text_variations + text_variation."""

    key: Key
    image_variation: int
    text_variation: int
    latent: int
    """Row of the table `latents`."""
    condition: int
    """Row of the table `conditions`; -1 of a dataset without conditions."""
    target: TargetSource
    weight: float
    bucket: int
    """Place of the latent's shape among the dataset's buckets."""

    @property
    def drawn(self) -> dict[str, int]:
        """What rollouts.parquet keeps of it."""
        return {name: getattr(self, name) for name in DRAWN}


def draws_of(sample: Sample) -> list[Draw]:
    """Return the variations of a sample in the order of their numbers."""
    latents, conditions = list(sample["latents"]), list(sample["conditions"])
    return [
        # Plain integers: noise is keyed by how they are written.
        Draw(
            key=(sample["sample_id"], image * len(conditions) + text),
            image_variation=image,
            text_variation=text,
            latent=int(latent),
            condition=int(condition),
            target=sample["target"],
            weight=float(sample["weight"]),
            bucket=int(sample["bucket"]),
        )
        for image, latent in enumerate(latents)
        for text, condition in enumerate(conditions)
    ]


def draws_by_key(samples: Iterable[Sample]) -> dict[Key, Draw]:
    """Return every variation of some samples by its key."""
    return {draw.key: draw for sample in samples for draw in draws_of(sample)}
