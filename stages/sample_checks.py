"""What every family refuses of a sample: nothing to say or to learn, codes of another shape."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from stages.config import DatasetFacts
from stages.errors import Refused
from stages.family import Family, Sample

AGAIN = "prepare the dataset again, or leave the sample out"


def require_taught(family: Family, sample: Sample, codes: Tensor) -> None:
    """Refuse a recording, as its codes [T, C], that would teach nothing; raises `Refused`."""
    if not len(codes):
        reason = "its recording has no timestep"
    elif family.predicted is not None and not bool(family.predicted(codes).any()):
        reason = f"of its {len(codes)} timesteps family {family.name!r} predicts no code"
    else:
        return
    raise Refused(
        sample["sample_id"], "nothing to learn from", f"{reason}; leave it out of the dataset"
    )


def require_text(sample: Sample) -> None:
    """Refuse a sample that has nothing to say, or no text where one must be; raises `Refused`."""
    text = sample["text"]
    if text is not None and not isinstance(text, str):
        raise Refused(sample["sample_id"], "no text", f"text is {text!r:.200}; {AGAIN}")
    if not (text or "").strip():
        raise Refused(sample["sample_id"], "empty text", "there is nothing to say; leave it out")


def require_frames(sample: Sample, column: str, facts: DatasetFacts) -> None:
    """Refuse codes in `column` of another shape than the audio codec's; raises `Refused`.

    They are whole frames, one after the other, and each code is an entry of its codebook.
    """
    codes = np.asarray(sample[column])
    if codes.ndim != 1 or (len(codes) and codes.dtype.kind not in "iu"):
        found = f"{column} are {sample[column]!r:.200}, no list of integers; {AGAIN}"
        raise Refused(sample["sample_id"], "no codes", found)
    rest = len(codes) % facts.codebooks
    if rest:
        raise Refused(
            sample["sample_id"],
            "truncated frame",
            f"{column} are {len(codes)}, so the last frame has {rest} of {facts.codebooks}; "
            + AGAIN,
        )
    strange = np.flatnonzero((codes < 0) | (codes >= facts.codes_per_codebook))
    if len(strange):
        frame, place = divmod(int(strange[0]), facts.codebooks)
        raise Refused(
            sample["sample_id"],
            "code outside its codebook",
            f"{column} have {codes[strange[0]]} at place {place} of frame {frame}, but codebooks "
            f"have 0 to {facts.codes_per_codebook - 1}; {AGAIN}",
        )


def speaker_place(sample: Sample, speakers: Mapping[str, int], advice: str) -> int:
    """Return which of a model's speakers a sample's is; raises `Refused`."""
    speaker = sample["speaker"]
    place = speakers.get(speaker) if isinstance(speaker, str) else None
    if place is None:
        raise Refused(
            sample["sample_id"],
            "unknown speaker",
            f"{speaker!r} is not one of the model's speakers {list(speakers)}; {advice}",
        )
    return place
