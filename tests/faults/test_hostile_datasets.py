"""Recordings that nobody meant well: each is rejected with its reason, in little memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.audio import AudioError, read_audio
from stages.dataset import Dataset
from stages.errors import UserError
from stages.prepare import prepare
from stages.prepare_config import PrepareConfig
from store import StoreError
from tests.faults.machine import little_memory
from tests.faults.test_hostile_stores import values

pytestmark = pytest.mark.slow

RATE_HZ = 8000
SAMPLES = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound recordings, and what is to be kept from them beside their folder."""
    folder = tmp_path_factory.mktemp("recordings") / "source"
    (folder / "wavs").mkdir(parents=True)
    noise = np.random.default_rng(0).normal(0, 0.1, (9, SAMPLES))
    for number, wave in enumerate(noise):
        soundfile.write(folder / f"wavs/{number}.wav", wave, RATE_HZ)
    soundfile.write(folder.parent / "outside.wav", noise[0], RATE_HZ)
    return folder


def a_long_silence(path: Path, hours: int) -> Path:
    with soundfile.SoundFile(path, "w", 48000, 1, format="FLAC") as file:
        minute = np.zeros(48000 * 60, np.int16)
        for _ in range(60 * hours):
            file.write(minute)
    return path


@pytest.mark.slow
def test_a_small_file_that_lasts_for_hours_is_not_read(tmp_path: Path) -> None:
    path = a_long_silence(tmp_path / "hours.flac", 2)
    assert path.stat().st_size < 2**21
    with little_memory(), pytest.raises(AudioError, match="too long to be read: 7200 s of 1 chan"):
        read_audio(path)
    with little_memory():
        assert read_audio(path, 7190.0, 1e300)[0].shape == (10 * 48000,)


@given(start_s=st.floats(0, allow_infinity=False), length_s=st.none() | st.floats(0, 1e308))
def test_any_stretch_of_a_file_is_what_there_is_of_it(
    folder: Path, start_s: float, length_s: float | None
) -> None:
    whole, _ = read_audio(folder / "wavs/0.wav")
    start = min(round(min(start_s, 1e9) * RATE_HZ), SAMPLES)
    count = SAMPLES if length_s is None else round(min(length_s, 1e9) * RATE_HZ)
    if not len(whole[start : start + count]):
        with pytest.raises(AudioError, match="empty audio"):
            read_audio(folder / "wavs/0.wav", start_s, length_s)
        return
    found, rate_hz = read_audio(folder / "wavs/0.wav", start_s, length_s)
    assert rate_hz == RATE_HZ
    assert found.equal(whole[start : start + count])


def prepared(table: Path, out: Path) -> Dataset:
    config = {
        "source": str(table), "single_speaker": "one", "dev_texts": 1, "test_texts": 1,
        "min_duration_s": 0.1, "trim": None,
        "audio_codec": {
            "kind": "fit", "sample_rate_hz": RATE_HZ, "hop": 128, "mels": 20, "codebooks": 1,
            "codes_per_codebook": 4, "iterations": 1, "decoder": None,
        },
    }  # fmt: skip
    return prepare(PrepareConfig.model_validate(config), out)


def row(number: int) -> dict[str, Any]:
    return {"audio_filepath": f"wavs/{number}.wav", "text": f"text {chr(97 + number)}"}


PATHS = (
    "x" * 5000,
    "../outside.wav",
    "/etc/passwd",
    "wavs/../../outside.wav",
    "wavs",
    "a\0b",
    "~/x",
    "日本",
)
KEYS = ("audio_filepath", "text", "offset", "duration", "speaker", "context_audio_filepath")


@given(
    key=st.sampled_from(KEYS),
    value=values | st.sampled_from([*PATHS, 1e308, 5e-324, 1e18]),
    twice=st.booleans(),
)
@settings(max_examples=30)
def test_a_row_of_any_values_is_rejected_or_taken_and_the_others_are_kept(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    key: str,
    value: Any,
    twice: bool,
) -> None:
    out = tmp_path_factory.mktemp("fuzz", numbered=True) / "dataset"
    rows = [row(number) for number in range(8)] + [row(8) | {key: value}]
    text = "".join(json.dumps(each) + "\n" for each in rows)
    if twice:
        text = text.replace('"text": "text a"', '"text": "text b", "text": "text a"', 1)
    table = folder / "manifest.jsonl"
    table.write_text(text, encoding="utf-8")
    said, dataset = "", None
    try:
        with little_memory():
            dataset = prepared(table, out)
    except (UserError, StoreError) as error:
        said = str(error)
    if dataset is None:
        assert str(table) in said
        return
    found = dataset.table.column("sample_id").to_pylist()
    told = [each["sample_id"] for each in dataset.rejected()]
    assert len(found) + len(told) == len(rows), "nothing is lost without a word"
    assert {f"wavs/{number}" for number in range(8)} <= {*found, *told}
    assert not any("outside" in name for name in found)
