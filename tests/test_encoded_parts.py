"""An interrupted `prepare` goes on where it stopped, and never with codes of something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from stages import prepare as module
from stages.audio_codec import ResidualMel
from stages.encoded_parts import EncodedParts, parts_folder
from stages.errors import UserError
from stages.prepare import prepare
from stages.prepare_config import FitAudioCodecConfig, PrepareConfig

RATE_HZ = 8000
AUDIO_CODEC = FitAudioCodecConfig(
    sample_rate_hz=RATE_HZ, hop=64, mels=16, codebooks=2, codes_per_codebook=8, iterations=2,
    decoder=None,
)  # fmt: skip


class Counting:
    """Stands for an audio codec of two codebooks, and remembers what it encoded."""

    codebooks = 2

    def __init__(self, name: str = "a"):
        self.name = name
        self.batches: list[int] = []

    def fingerprint(self) -> str:
        return self.name

    def encode(self, waveforms: Sequence[Tensor]) -> list[np.ndarray]:
        self.batches.append(len(waveforms))
        return [np.full((len(clip) // 10, 2), 60000, np.uint16) for clip in waveforms]


def clips(*lengths: int) -> list[Tensor]:
    return [torch.arange(length, dtype=torch.float32) for length in lengths]


def parts(folder: Path, audio_codec: Any) -> EncodedParts:
    return EncodedParts(folder, audio_codec)


def test_what_was_encoded_is_read_and_not_encoded_again(tmp_path):
    first, second = Counting(), Counting()
    given = clips(100, 5, 250)
    made = parts(tmp_path / "parts", first).encode(given)
    read = parts(tmp_path / "parts", second).encode(given)
    assert (first.batches, second.batches) == ([3], [])
    for one, other in zip(made, read, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "lengths", "change"),
    [("b", (100, 50), 0.0), ("a", (50, 100), 0.0), ("a", (100, 50), 1e-6), ("a", (75, 75), 0.0)],
)
def test_codes_of_another_audio_codec_or_of_other_samples_are_not_taken(
    tmp_path, name, lengths, change
):
    parts(tmp_path, Counting()).encode(clips(100, 50))
    audio_codec = Counting(name)
    other = clips(*lengths)
    other[0][7] += change
    parts(tmp_path, audio_codec).encode(other)
    assert audio_codec.batches == [2]


def test_a_damaged_part_is_named(tmp_path):
    parts(tmp_path, Counting()).encode(clips(100))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{path.name}.* remove it and run"):
        parts(tmp_path, Counting()).encode(clips(100))


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    """Twelve recordings, which are encoded in batches of four."""
    wavs = tmp_path / "source" / "wavs"
    wavs.mkdir(parents=True)
    rows = []
    for number, letter in enumerate("abcdefghijkl"):
        wave = np.sin(2 * np.pi * (150 + 40 * number) * np.arange(4000) / RATE_HZ)
        soundfile.write(wavs / f"{letter}.wav", 0.3 * wave, RATE_HZ)
        rows.append(f"{letter}|text {letter}||x\n")
    (tmp_path / "source" / "metadata.csv").write_text("".join(rows))
    return PrepareConfig(
        source=tmp_path / "source", audio_codec=AUDIO_CODEC, dev_texts=1, test_texts=1,
        alphabet="abcdefghijkltx ",
    )  # fmt: skip


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Clips of every batch that is encoded; the third is interrupted, once, and counts 0."""
    batches: list[int] = []
    whole = ResidualMel.encode

    def encode(self: ResidualMel, waveforms: Sequence[Tensor]) -> list[np.ndarray]:
        if len(batches) == 2:
            batches.append(0)
            raise KeyboardInterrupt
        batches.append(len(waveforms))
        return whole(self, waveforms)

    monkeypatch.setattr(ResidualMel, "encode", encode)
    monkeypatch.setattr(module, "BATCH_CLIPS", 4)
    return batches


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(config, encoded, tmp_path):
    out = tmp_path / "runs" / "dataset"
    with pytest.raises(KeyboardInterrupt):
        prepare(config, out)
    assert not out.exists()
    assert len(list(parts_folder(out).iterdir())) == 2
    prepare(config, out)
    assert encoded == [4, 4, 0, 4]
    assert [path.name for path in out.parent.iterdir()] == ["dataset"]
    prepare(config, tmp_path / "whole")
    assert encoded == [4, 4, 0, 4, 4, 4, 4]
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_other_settings_take_nothing_from_an_interrupted_run(config, encoded, tmp_path):
    out = tmp_path / "runs" / "dataset"
    with pytest.raises(KeyboardInterrupt):
        prepare(config, out)
    louder = config.model_copy(update={"level_dbfs": -20.0})
    prepare(louder, out)
    assert encoded == [4, 4, 0, 4, 4, 4]
    assert bytes_of(out) == bytes_of(prepare(louder, tmp_path / "whole").path)
    assert [path.name for path in out.parent.iterdir()] == ["dataset"]


def test_parts_that_outlived_their_dataset_are_removed_with_the_next_run(config, tmp_path):
    out = tmp_path / "runs" / "dataset"
    prepare(config, out)
    parts_folder(out).mkdir()
    prepare(config, out)
    assert [path.name for path in out.parent.iterdir()] == ["dataset"]
