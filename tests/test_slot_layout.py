"""The slots of a flat stream: any hierarchy can be inverted, and no misplaced id passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.causal_lm_config import SlotLayoutConfig
from stages.errors import UserError
from stages.slot_layout import FrameSlots, SlotLayout

SLOTS = ((0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (2, 2), (2, 3))
ORPHEUS: dict[str, Any] = {
    "slots": SLOTS, "codes_per_slot": 4096, "audio_base_id": 128266, "end_id": 128258,
}  # fmt: skip


def layout(**changes: Any) -> SlotLayout:
    return SlotLayout(SlotLayoutConfig(**(ORPHEUS | changes)))


def drawn(counts: tuple[int, ...], frames: int, entries: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(entries, (frames * n,), generator=generator) for n in counts]


@st.composite
def hierarchies(draw: st.DrawFn) -> SlotLayout:
    """Codecs of 1 to 4 levels: rates such as 1:2:4 and 1:2:4:8, in the order of time or any."""
    shortest = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=0, max_size=3))
    strides = [1]
    for factor in shortest:
        strides.insert(0, strides[0] * factor)
    slots: Any = FrameSlots.by_time(strides).slots
    if draw(st.booleans()):
        slots = tuple(draw(st.permutations(slots)))
    base, entries = draw(st.integers(4, 300)), draw(st.integers(1, 40))
    return layout(slots=slots, codes_per_slot=entries, audio_base_id=base, end_id=3)


def stream(made: SlotLayout, frames: int, seed: int) -> Tensor:
    counts = made.order.codes_per_level
    return made.encode(drawn(counts, frames, made.config.codes_per_slot, seed))


def test_the_order_of_time_is_that_of_orpheus():
    assert FrameSlots.by_time([4, 2, 1]).slots == SLOTS
    assert FrameSlots.by_time([8, 4, 2, 1]).slots[:5] == ((0, 0), (1, 0), (2, 0), (3, 0), (3, 1))


def test_two_frames_of_orpheus_are_these_ids():
    levels = [torch.arange(2), torch.arange(10, 14), torch.arange(100, 108)]
    made = layout()
    codes = made.encode(levels)
    assert codes.tolist() == [0, 10, 100, 101, 11, 102, 103, 1, 12, 104, 105, 13, 106, 107, 4096]
    ids = made.to_vocabulary(codes)
    relative = [i - 128266 for i in ids[:7].tolist()]
    assert relative == [0, 4106, 8292, 12389, 16395, 20582, 24679]
    assert ids[7].item() == 128267
    assert ids[14].item() == 128258
    assert made.least_vocabulary == 156938


@settings(max_examples=80)
@given(hierarchies(), st.integers(0, 9), st.integers(0, 2**31))
def test_every_step_can_be_inverted(made, frames, seed):
    levels = drawn(made.order.codes_per_level, frames, made.config.codes_per_slot, seed)
    codes = made.encode(levels)
    assert codes.shape == (frames * made.slots + 1,)
    ids = made.to_vocabulary(codes)
    assert torch.equal(made.from_vocabulary(ids), codes)
    made.validate(ids)
    found = made.decode(codes)
    assert (found.ended, found.dropped) == (True, 0)
    assert all(map(torch.equal, found.levels, levels))
    assert len(found.levels) == len(levels)


@settings(max_examples=80)
@given(hierarchies(), st.integers(1, 6), st.integers(0, 2**31), st.data())
def test_an_end_anywhere_keeps_the_whole_frames_before_it(made, frames, seed, data):
    codes = stream(made, frames, seed)
    whole = made.decode(codes)
    place = data.draw(st.integers(0, len(codes) - 1))
    stopped, cut = codes.clone(), codes[:place]
    stopped[place] = made.end_code
    for found, ended in ((made.decode(stopped), True), (made.decode(cut), False)):
        assert (found.ended, found.dropped) == (ended, place % made.slots)
        kept = [place // made.slots * count for count in made.order.codes_per_level]
        for level, expected, size in zip(found.levels, whole.levels, kept, strict=True):
            assert torch.equal(level, expected[:size])


@settings(max_examples=80)
@given(hierarchies(), st.integers(1, 6), st.integers(0, 2**31), st.data())
def test_timesteps_of_a_frame_hold_the_stream_and_tell_what_fills_them(made, frames, seed, data):
    codes = stream(made, frames, seed)
    stopped = codes[: data.draw(st.integers(1, len(codes)))].clone()
    stopped[-1] = made.end_code
    whole = codes[:-1]  # cut between two frames, without an end
    for flat in (codes, stopped, whole):
        timesteps = made.to_timesteps(flat)
        assert timesteps.shape == (-(-len(flat) // made.slots), made.slots)
        assert torch.equal(made.from_timesteps(timesteps), flat)
        predicted = made.predicted(timesteps)
        assert predicted.flatten().tolist() == [n < len(flat) for n in range(timesteps.numel())]
        assert (timesteps[~predicted] == made.end_code).all()
    batch = torch.stack([made.to_timesteps(codes), made.to_timesteps(codes) * 0])
    marked = made.predicted(batch)
    assert torch.equal(marked[0], made.predicted(batch[0]))
    assert marked[1].all()


@settings(max_examples=60)
@given(hierarchies(), st.integers(1, 4), st.integers(0, 2**31))
def test_columns_are_the_ids_of_a_slots_codes(made, frames, seed):
    codes = stream(made, frames, seed)
    ids = made.to_vocabulary(codes)
    columns = [made.columns(slot) for slot in range(made.slots)]
    assert all(len(each) == made.config.codes_per_slot + 1 for each in columns)
    for position, (code, identity) in enumerate(zip(codes, ids, strict=True)):
        assert columns[position % made.slots][code] == identity
    assert len(set(torch.cat(columns).tolist())) == made.slots * made.config.codes_per_slot + 1


@settings(max_examples=150)
@given(hierarchies(), st.integers(1, 5), st.integers(0, 2**31), st.data())
def test_an_id_of_another_slot_is_found_where_it_stands(made, frames, seed, data):
    ids = made.to_vocabulary(stream(made, frames, seed))
    place = data.draw(st.integers(0, len(ids) - 1))
    slot = place % made.slots
    wrong = data.draw(st.integers(0, made.least_vocabulary + 5))
    assume(wrong not in made.columns(slot).tolist())
    later = data.draw(st.integers(place, len(ids) - 1))
    ids[later] = 0  # the first one is named, not this one
    ids[place] = wrong
    first = made.columns(slot)[0].item()
    message = f"id {wrong} at position {place} is no code of slot {slot}: that has {first} to"
    with pytest.raises(UserError, match=message):
        made.validate(ids)


@settings(max_examples=80)
@given(hierarchies(), st.integers(1, 5), st.integers(0, 2**31), st.data())
def test_lost_added_and_early_ended_ids_are_found(made, frames, seed, data):
    ids = made.to_vocabulary(stream(made, frames, seed))
    place = data.draw(st.integers(0, len(ids) - 2))
    if made.slots > 1:
        for changed in (
            torch.cat([ids[:place], ids[place + 1 :]]),
            torch.cat([ids[: place + 1], ids[place:]]),
        ):
            with pytest.raises(UserError, match=r"is no code of slot|was cut within a frame"):
                made.validate(changed)
    ids[place] = made.end_id
    with pytest.raises(UserError, match=r"was cut within a frame|ids follow"):
        made.validate(ids)


def test_a_recording_without_its_end_is_whole_too():
    made = layout()
    made.validate(made.to_vocabulary(stream(made, 3, 0))[:-1])
    made.validate(torch.zeros(0, dtype=torch.int64))


def test_a_batch_of_ids_names_its_row():
    made = layout()
    ids = made.to_vocabulary(stream(made, 2, 0)).repeat(3, 1)
    assert torch.equal(made.from_vocabulary(ids)[2], made.from_vocabulary(ids[2]))
    ids[1, 8] = 128266
    with pytest.raises(UserError, match="id 128266 at row 1, position 8 is no code of slot 1"):
        made.from_vocabulary(ids)


def test_a_code_beyond_its_codebook_is_not_taken_for_one_of_the_next_slot():
    levels = [torch.zeros(1), torch.tensor([0, 4096]), torch.zeros(4)]
    with pytest.raises(ValueError, match="code 4096 is no entry of a codebook of 4096"):
        layout().encode(levels)


def test_levels_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"levels of \[2, 4, 7\] codes are no whole frames"):
        layout().encode([torch.zeros(2), torch.zeros(4), torch.zeros(7)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": ((0, 0), (1, 0), (1, 2))}, "every place of every level once"),
        ({"slots": ((0, 0), (2, 0))}, "every place of every level once"),
        ({"slots": ((0, 0), (0, 0))}, "every place of every level once"),
        ({"end_id": 128266}, "end_id=128266 lies among the audio's, 128266 to 156937"),
    ],
)
def test_layouts_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        layout(**changes)


def test_nothing_behind_an_end_is_predicted_whatever_stands_there():
    timesteps = torch.tensor(
        [[5, 6, 7, 8, 9, 1, 2], [3, 4096, 5, 5, 4096, 5, 5], [1, 2, 3, 4, 5, 6, 7]]
    )
    expected = torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 0], [0] * 7]).bool()
    assert torch.equal(layout().predicted(timesteps), expected)
    both = torch.stack([timesteps, timesteps[[0, 2, 2]]])
    assert torch.equal(layout().predicted(both), torch.stack([expected, torch.ones(3, 7).bool()]))
