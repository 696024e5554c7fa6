"""A store's codes as frames of the audio codec, by its manifest alone: listening needs no model."""

from __future__ import annotations

from torch import Tensor

from stages.causal_lm_config import SlotLayoutConfig
from stages.config import DatasetFacts
from stages.errors import UserError
from stages.layout import FrameStacking
from stages.slot_layout import SlotLayout
from store.schema import Manifest, Stream

LAYOUT = "layout"
"""Where in a manifest's `recording` it is said which ids of a whole vocabulary are audio."""


def stored_frames(
    manifest: Manifest, codes: Tensor, layout: SlotLayoutConfig | None = None
) -> Tensor:
    """Return the audio codec's frames [F, codebooks] int64 of stored `codes` [T, C] int64.

    They are those that `Family.frames` gives. Where codes are ids of a language model's whole
    vocabulary, `layout` says which of them are audio if the manifest does not. Raises `UserError`
    where neither does, and for an id that is not audio of its slot.
    """
    facts = DatasetFacts.model_validate(manifest.conditioning)
    group = manifest.streams[0].group
    streams = sum(stream.group == group for stream in manifest.streams)
    # Other groups (a local transformer) speak the same codes.
    codes = codes[:, :streams]
    if holds_vocabulary_ids(manifest):
        slots = SlotLayout(_required(recorded_layout(manifest) or layout))
        return slots.frames(slots.from_timesteps(slots.from_vocabulary(codes)))
    assert manifest.end_id is not None
    if manifest.family == "causal_lm":
        slots = _slots_from_zero(streams, manifest.end_id)
        return slots.frames(slots.from_timesteps(codes))
    return FrameStacking(facts.codebooks, streams // facts.codebooks, manifest.end_id).decode(codes)


def holds_vocabulary_ids(manifest: Manifest) -> bool:
    """Whether codes are ids of a language model's whole vocabulary, not counted from 0 by slot."""
    if manifest.family != "causal_lm":
        return False
    facts = DatasetFacts.model_validate(manifest.conditioning)
    first, end = manifest.streams[0], manifest.end_id
    allowed = end is not None and end - len(manifest.forbidden) == facts.codes_per_codebook
    return not (allowed and isinstance(first, Stream) and first.vocabulary - 1 == end)


def recorded_layout(manifest: Manifest) -> SlotLayoutConfig | None:
    """Return which ids are audio, as the manifest says it; None in stores of earlier releases."""
    found = manifest.recording.get(LAYOUT)
    return None if found is None else SlotLayoutConfig.model_validate(found)


def fits(layout: SlotLayoutConfig, manifest: Manifest) -> bool:
    """Whether the ids of a store can be those of a layout."""
    slots = len(layout.slots) == len(manifest.streams)
    return (
        slots and layout.end_id == manifest.end_id and layout.audio_ids.stop <= manifest.vocabulary
    )


def _required(layout: SlotLayoutConfig | None) -> SlotLayoutConfig:
    if layout is None:
        raise UserError(
            "the store holds ids of the language model's whole vocabulary (its family's "
            "vocabulary: full), and nothing says which of them are audio: its manifest does not "
            "(recording.layout), for an earlier release wrote it"
        )
    return layout


def _slots_from_zero(slots: int, end: int) -> SlotLayout:
    """Return slots whose codes count from 0, the last one being the end."""
    places = tuple((0, place) for place in range(slots))
    return SlotLayout(
        SlotLayoutConfig(slots=places, codes_per_slot=end, audio_base_id=0, end_id=slots * end)
    )
