"""A store's codes as frames of the audio codec, by its manifest alone: listening needs no model."""

from __future__ import annotations

from torch import Tensor

from stages.causal_lm_config import SlotLayoutConfig
from stages.config import DatasetFacts
from stages.errors import UserError
from stages.layout import FrameStacking
from stages.slot_layout import SlotLayout
from store.schema import Manifest, Stream


def stored_frames(manifest: Manifest, codes: Tensor) -> Tensor:
    """Return the audio codec's frames [F, codebooks] int64 of stored `codes` [T, C] int64.

    They are those that `Family.frames` gives. Raises `UserError` for codes that are ids of a
    language model's whole vocabulary, whose place there a manifest does not tell.
    """
    facts = DatasetFacts.model_validate(manifest.conditioning)
    group = manifest.streams[0].group
    streams = sum(stream.group == group for stream in manifest.streams)
    # Other groups (a local transformer) speak the same codes.
    codes = codes[:, :streams]
    if manifest.family == "causal_lm":
        slots = _slots(manifest, facts)
        return slots.frames(slots.from_timesteps(codes))
    assert manifest.end_id is not None
    return FrameStacking(facts.codebooks, streams // facts.codebooks, manifest.end_id).decode(codes)


def _slots(manifest: Manifest, facts: DatasetFacts) -> SlotLayout:
    """Return slots whose codes count from 0, the last one being the end."""
    first, end = manifest.streams[0], manifest.end_id
    allowed = end is not None and end - len(manifest.forbidden) == facts.codes_per_codebook
    if not (allowed and isinstance(first, Stream) and first.vocabulary - 1 == end):
        raise UserError(
            "the store holds ids of the language model's whole vocabulary (its family's "
            "vocabulary: full), and its manifest does not say which of them are audio: listen to a "
            "store of vocabulary: slots"
        )
    slots = tuple((0, place) for place in range(len(manifest.streams)))
    return SlotLayout(
        SlotLayoutConfig(slots=slots, codes_per_slot=end, audio_base_id=0, end_id=len(slots) * end)
    )
