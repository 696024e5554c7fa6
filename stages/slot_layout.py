"""Slots: how codes of several rates become one flat stream of tokens, and back.

An audio codec such as SNAC quantises at several levels, each twice as fast as the one before. What
one code of the slowest level spans is a frame, and a frame is a fixed row of slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from stages.causal_lm_config import SlotLayoutConfig
from stages.errors import UserError


@dataclass(frozen=True)
class FrameSlots:
    """The order in which a frame lists the codes of all levels."""

    slots: tuple[tuple[int, int], ...]
    """Per slot (level, place): which of the level's codes of the frame stands there, from 0."""

    @classmethod
    def by_time(cls, strides: Sequence[int]) -> Self:
        """List codes by when they begin, those that begin together from coarse to fine.

        `strides` are the finest steps that a code of each level spans; the first is the longest,
        and a multiple of the others. Strides 4, 2, 1 give the order that Orpheus speaks in.
        """
        starts = [
            (place * stride, level, place)
            for level, stride in enumerate(strides)
            for place in range(strides[0] // stride)
        ]
        return cls(tuple((level, place) for _, level, place in sorted(starts)))

    @cached_property
    def codes_per_level(self) -> tuple[int, ...]:
        """Codes that a frame holds of each level."""
        counts = Counter(level for level, _ in self.slots)
        return tuple(counts[level] for level in range(len(counts)))

    def interleave(self, levels: Sequence[Tensor]) -> Tensor:
        """Lay the codes [F · n] of each level into frames [F, S].

        Raises ValueError when the levels are not of the same number of whole frames.
        """
        counts = self.codes_per_level
        sizes = [len(level) for level in levels]
        frames = sizes[0] // counts[0] if sizes else 0
        if sizes != [frames * count for count in counts]:
            raise ValueError(f"levels of {sizes} codes are no whole frames of {list(counts)}")
        rows = [level.reshape(frames, count) for level, count in zip(levels, counts, strict=True)]
        return torch.stack([rows[level][:, place] for level, place in self.slots], dim=-1)

    def separate(self, frames: Tensor) -> list[Tensor]:
        """Codes [F · n] of each level of frames [F, S]; inverts `interleave`."""
        slot_of = {slot: number for number, slot in enumerate(self.slots)}
        return [
            frames[:, [slot_of[level, place] for place in range(count)]].reshape(-1)
            for level, count in enumerate(self.codes_per_level)
        ]


@dataclass(frozen=True)
class Decoded:
    """What a stream of tokens holds."""

    levels: list[Tensor]
    """Codes [F · n] int64 of each level."""
    ended: bool
    """Whether the stream says where the audio ends."""
    dropped: int
    """Codes of a last frame that is not whole, which are left out."""


@dataclass(frozen=True)
class SlotLayout:
    """Audio as a flat stream of tokens: frame by frame, slot by slot, and an end.

    Codes are relative to their slot: 0 … V−2, and V−1 for the end, V being `codes_per_slot` + 1.
    Ids are those of the language model's vocabulary. Position t of a stream is slot t mod S.
    """

    config: SlotLayoutConfig

    @cached_property
    def order(self) -> FrameSlots:
        """The order of a frame's codes."""
        return FrameSlots(self.config.slots)

    @property
    def slots(self) -> int:
        """S: slots per frame."""
        return len(self.config.slots)

    @property
    def end_code(self) -> int:
        """Code that ends the audio, in any slot."""
        return self.config.codes_per_slot

    @property
    def end_id(self) -> int:
        """Id that ends the audio."""
        return self.config.end_id

    @property
    def least_vocabulary(self) -> int:
        """Ids that a model must at least have; one may be padded to more."""
        return max(self._first_id(self.slots), self.end_id + 1)

    def encode(self, levels: Sequence[Tensor]) -> Tensor:
        """Lay the codes [F · n] of each level into a stream [F · S + 1] int64 with its end.

        Raises ValueError when the levels are not of the same number of whole frames, or when a code
        is no entry of its codebook: its id would be one of the next slot.
        """
        flat = self.order.interleave(levels).reshape(-1).long()
        strange = flat[(flat < 0) | (flat >= self.config.codes_per_slot)]
        if len(strange):
            raise ValueError(
                f"code {int(strange[0])} is no entry of a codebook of {self.config.codes_per_slot}"
            )
        return torch.cat([flat, flat.new_tensor([self.end_code])])

    def decode(self, codes: Tensor) -> Decoded:
        """Read a stream [T]; inverts `encode`.

        Codes that were drawn may hold an end in any slot: the audio stops at the first, and a frame
        that is not whole there is dropped. A stream that was cut short has no end.
        """
        length, frames = self._length(codes), self.frames(codes)
        return Decoded(self.order.separate(frames), length < len(codes), length - frames.numel())

    def frames(self, codes: Tensor) -> Tensor:
        """Whole frames [F, S] of a stream [T] before its end, in the order of the slots."""
        whole = self._length(codes) // self.slots
        return codes[: whole * self.slots].view(-1, self.slots)

    def to_timesteps(self, codes: Tensor) -> Tensor:
        """Lay a stream [T] into timesteps [N, S] of a frame each, with ends after its own.

        The last timestep of a recording is nothing but ends; `predicted` marks the one that counts.
        """
        missing = -len(codes) % self.slots
        return torch.cat([codes, codes.new_full((missing,), self.end_code)]).view(-1, self.slots)

    def from_timesteps(self, timesteps: Tensor) -> Tensor:
        """Stream [T] of timesteps [N, S], up to its end; inverts `to_timesteps`."""
        return timesteps[self.predicted(timesteps)]

    def predicted(self, timesteps: Tensor) -> Tensor:
        """Mark [..., N, S] bool what a model predicts of timesteps [..., N, S], its end included.

        What stands after the first end is there to fill the frame, and nobody may learn from it.
        """
        return up_to_end(timesteps, end=self.end_code)

    def to_vocabulary(self, codes: Tensor) -> Tensor:
        """Ids [..., T] of codes [..., T] int64 that begin with slot 0."""
        first = self._first_ids(codes.shape[-1], codes.device)
        return torch.where(codes == self.end_code, self.end_id, codes + first)

    def from_vocabulary(self, ids: Tensor) -> Tensor:
        """Codes [..., T] int64 of ids [..., T] that begin with slot 0; inverts `to_vocabulary`.

        An end may stand anywhere, as in ids that were drawn. Raises UserError for the first id that
        its slot does not have.
        """
        codes = ids - self._first_ids(ids.shape[-1], ids.device)
        ends = ids == self.end_id
        strange = torch.nonzero(~ends & ((codes < 0) | (codes >= self.config.codes_per_slot)))
        if len(strange):
            self._refuse(ids, strange[0].tolist())
        return torch.where(ends, self.end_code, codes)

    def columns(self, slot: int) -> Tensor:
        """Ids [V] int64 that are possible in a slot, in the order of its codes; the end is last."""
        first = self._first_id(slot)
        audio = torch.arange(first, first + self.config.codes_per_slot)
        return torch.cat([audio, audio.new_tensor([self.end_id])])

    def validate(self, ids: Tensor) -> None:
        """Check the ids [T] of a recording: whole frames, and nothing after the end.

        Raises UserError naming the first id that its slot does not have, or what is cut off.
        """
        length = self._length(self.from_vocabulary(ids))
        rest = length % self.slots
        if rest:
            raise UserError(
                f"the frame at position {length - rest} has {rest} of {self.slots} codes: the "
                "recording was cut within a frame; leave it out, or encode it again"
            )
        if length + 1 < len(ids):
            raise UserError(
                f"the audio ends at position {length}, but {len(ids) - length - 1} ids follow: "
                "give each recording a stream of its own"
            )

    def _length(self, codes: Tensor) -> int:
        """Codes of a stream [T] before its end."""
        ends = torch.nonzero(codes == self.end_code).flatten()
        return int(ends[0]) if len(ends) else len(codes)

    def _refuse(self, ids: Tensor, place: list[int]) -> None:
        """Raise the UserError for the id at an index of `ids`, whose last part is its position."""
        *row, position = place
        slot = position % self.slots
        first = self._first_id(slot)
        where = f"row {row[0]}, " if row else ""
        raise UserError(
            f"id {int(ids[tuple(place)])} at {where}position {position} is no code of slot {slot}: "
            f"that has {first} to {self._first_id(slot + 1) - 1}, and {self.end_id} ends the "
            "audio; check audio_base_id, codes_per_slot and the order of slots"
        )

    def _first_id(self, slot: int) -> int:
        return self.config.audio_base_id + slot * self.config.codes_per_slot

    def _first_ids(self, length: int, device: torch.device) -> Tensor:
        """First id [T] of the slot of each position."""
        slots = torch.arange(length, device=device) % self.slots
        return self.config.audio_base_id + slots * self.config.codes_per_slot


def up_to_end(timesteps: Tensor, *, end: int) -> Tensor:
    """Mark [..., N, S] bool all places of timesteps [..., N, S] up to their first end, and that."""
    ends = (timesteps == end).flatten(-2)
    return (ends.cumsum(-1) <= ends.long()).view(timesteps.shape)
