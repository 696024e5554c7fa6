"""Frame stacking can be inverted, for any number of frames."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.layout import FrameStacking

END = 11


@settings(max_examples=60)
@given(st.integers(0, 23), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_decode_inverts_encode(frames, codebooks, frames_per_step, seed):
    layout = FrameStacking(codebooks, frames_per_step, END)
    generator = torch.Generator().manual_seed(seed)
    original = torch.randint(0, 10, (frames, codebooks), generator=generator)
    codes = layout.encode(original)
    assert codes.shape == (layout.timesteps(frames), codebooks * frames_per_step)
    assert (codes[-1] == END).all()
    assert torch.equal(layout.decode(codes), original)


def test_streams_are_frame_major():
    frames = torch.tensor([[1, 2], [3, 4], [5, 6]])
    codes = FrameStacking(2, 2, END).encode(frames)
    assert codes.tolist() == [[1, 2, 3, 4], [5, 6, END, END], [END] * 4]


def test_audio_ends_at_any_end_id_of_the_last_timestep():
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, END, 8]])
    assert FrameStacking(2, 2, END).decode(codes).tolist() == [[1, 2], [3, 4], [5, 6]]


def test_audio_of_a_truncated_rollout_is_kept_whole():
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert FrameStacking(2, 2, END).decode(codes).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


def test_a_lone_end_id_repeats_the_code_before_it():
    codes = torch.tensor([[1, END, 3], [4, 5, END], [END, 6, END], [7, 8, 9]])
    decoded = FrameStacking(3, 1, END).decode(codes[[0, 1, 3]])
    assert decoded.tolist() == [[1, 0, 3], [4, 5, 3], [7, 8, 9]]
    assert FrameStacking(3, 1, END).decode(codes).tolist() == [[1, 0, 3], [4, 5, 3]]
