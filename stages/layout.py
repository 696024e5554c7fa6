"""Frame stacking: how codec frames become decoding steps, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrameStacking:
    """Lay several codec frames into one timestep, frame-major, and end with a block of end ids.

    Stream `frame * codebooks + codebook` of a timestep holds that codebook of that frame. Frames
    missing from the last block are end ids, and one whole block of end ids follows, so any number
    of frames can be told from the codes.
    """

    codebooks: int
    """Codebooks of the audio codec."""
    frames_per_step: int
    """Frames of one timestep."""
    end_id: int
    """Id that stands where there is no frame."""

    @property
    def streams(self) -> int:
        """Streams per timestep."""
        return self.codebooks * self.frames_per_step

    def timesteps(self, frames: int) -> int:
        """Timesteps of a recording of `frames` frames, end block included."""
        return -(-frames // self.frames_per_step) + 1

    def encode(self, frames: Tensor) -> Tensor:
        """Lay frames [F, codebooks] into codes [T, streams] int64, end block included."""
        rows = self.timesteps(frames.shape[0]) * self.frames_per_step
        padded = torch.full(
            (rows, self.codebooks), self.end_id, dtype=torch.int64, device=frames.device
        )
        padded[: frames.shape[0]] = frames
        return padded.reshape(-1, self.streams)

    def decode(self, codes: Tensor) -> Tensor:
        """Recover the frames [F, codebooks] of `codes` [T, streams]; inverts `encode`.

        Codes that were drawn may hold end ids anywhere. The audio ends at the first frame with end
        ids in more than half of its codebooks, or with any in the last timestep. A lone end id
        before that repeats the codebook's previous code, because the audio codec has no such code.
        """
        frames = codes.reshape(-1, self.codebooks)
        ends = frames == self.end_id
        finished = ends.sum(-1) * 2 > self.codebooks
        finished[-self.frames_per_step :] |= ends[-self.frames_per_step :].any(-1)
        count = int((finished.cumsum(0) == 0).sum())
        return self._repeat_previous(frames[:count])

    def _repeat_previous(self, frames: Tensor) -> Tensor:
        """Replace each end id by the last code before it in its codebook, or 0 at the start."""
        index = torch.arange(1, frames.shape[0] + 1, device=frames.device).unsqueeze(-1)
        source = torch.where(frames == self.end_id, 0, index).cummax(0).values
        silent = torch.zeros_like(frames[:1])
        return torch.cat([silent, frames]).gather(0, source)
