"""Which caption a text variation has, and in which order its tags stand."""

from __future__ import annotations

from collections.abc import Sequence

from stages.diffusion.image_config import ImagesConfig
from stages.sampling import keyed_seed


def draw_captions(texts: Sequence[str], sample_id: str, config: ImagesConfig) -> tuple[str, ...]:
    """Draw the caption of every text variation, by its key.

    A sample's captions are taken in a keyed order, one after the other, so none comes twice before
    each has come once.
    """
    order = sorted(
        range(len(texts)), key=lambda i: keyed_seed(config.seed, "caption", sample_id, i)
    )
    drawn = [texts[order[v % len(order)]] for v in range(config.text_variations)]
    if not config.shuffle_tags:
        return tuple(drawn)
    return tuple(_shuffled(text, sample_id, v, config) for v, text in enumerate(drawn))


def _shuffled(caption: str, sample_id: str, variation: int, config: ImagesConfig) -> str:
    """Shuffle the comma-separated tags of a caption behind the first `keep_tags`."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, rest = tags[: config.keep_tags], range(config.keep_tags, len(tags))
    key = (config.seed, "tags", sample_id, variation)
    return ", ".join(kept + [tags[i] for i in sorted(rest, key=lambda i: keyed_seed(*key, i))])
