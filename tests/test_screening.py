"""What recordings are measured by before they enter a dataset, and what is said of the others."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from torch import Tensor

from stages.audio import clipped_share, estimate_snr_db
from stages.errors import UserError
from stages.prepare import prepare
from stages.prepare_config import FitAudioCodecConfig, PrepareConfig
from stages.rejections import rejection_table

RATE_HZ = 8000
AUDIO_CODEC = FitAudioCodecConfig(
    sample_rate_hz=RATE_HZ, hop=64, mels=16, codebooks=2, codes_per_codebook=8, iterations=2,
    decoder=None,
)  # fmt: skip


def speech(seed: int, snr_db: float, rate_hz: int = RATE_HZ) -> Tensor:
    """Two seconds of voiced syllables with pauses of 0.15 s, under white noise."""
    random = np.random.default_rng(seed)
    syllables = [
        part
        for hz in random.uniform(100, 250, 8)
        for part in (
            random.uniform(0.5, 1.5)
            * np.hanning(round(0.1 * rate_hz))
            * np.sin(2 * np.pi * hz * np.arange(round(0.1 * rate_hz)) / rate_hz),
            np.zeros(round(0.15 * rate_hz)),
        )
    ]
    clean = 0.2 * np.concatenate(syllables)
    noise = random.standard_normal(len(clean))
    noise *= np.sqrt(np.mean(clean**2) / np.mean(noise**2)) * 10 ** (-snr_db / 20)
    return torch.from_numpy((clean + noise).astype(np.float32))


@pytest.mark.parametrize("rate_hz", [8000, 24000])
@pytest.mark.parametrize("snr_db", [5.0, 15.0, 30.0, 45.0])
def test_the_estimate_is_the_ratio_that_was_mixed(snr_db, rate_hz):
    estimates = [estimate_snr_db(speech(seed, snr_db, rate_hz), rate_hz) for seed in range(5)]
    assert np.abs(np.array(estimates) - snr_db).max() < 1.5


def test_the_estimate_knows_neither_gain_nor_digital_silence():
    clip = speech(0, 12.0)
    padded = torch.cat([torch.zeros(8000), clip, torch.zeros(8000)])
    for other in (0.1 * clip, padded):
        assert estimate_snr_db(other, RATE_HZ) == pytest.approx(estimate_snr_db(clip, RATE_HZ))


@pytest.mark.parametrize("samples", [0, 1, 79, 4000])
def test_silence_has_no_ratio(samples):
    assert estimate_snr_db(torch.zeros(samples), RATE_HZ) == -math.inf


def test_clipped_samples_are_counted_on_either_side():
    loud = 2 * torch.sin(2 * torch.pi * torch.arange(8000) / 80)
    assert clipped_share(loud.clamp(-1, 1)) == pytest.approx(2 / 3, abs=0.02)  # |sin| >= 0.5
    assert clipped_share(0.99 * loud.clamp(-1, 1)) == 0
    assert clipped_share(loud) == pytest.approx(2 / 3, abs=0.02)  # of a lossy file


def wav_bytes(samples: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples), RATE_HZ, format="WAV")
    return file.getvalue()


def row(clip_id: str, samples: Any, letter: str = "a", **changes: Any) -> dict[str, Any]:
    audio = {"bytes": wav_bytes(samples), "path": None}
    given = {"clip_id": clip_id, "speaker": "x", "text": f"text {letter}", "audio": audio}
    return given | {"duration_s": len(samples) / RATE_HZ} | changes


@pytest.fixture
def dataset_of(tmp_path: Path) -> Callable[..., Any]:
    """Prepare rows like the guide's parquet, beside ten good ones."""
    good = [row(f"good{n}", speech(n, 40.0), letter) for n, letter in enumerate("abcdefghij")]

    def make(*rows: dict[str, Any], **settings: Any) -> Any:
        pq.write_table(pa.Table.from_pylist([*good, *rows]), tmp_path / "clips.parquet")
        small = {"audio_codec": AUDIO_CODEC, "dev_texts": 1, "test_texts": 1}
        config = PrepareConfig(
            source=tmp_path / "clips.parquet", alphabet="abcdefghijtx ", **(small | settings)
        )
        return prepare(config, tmp_path / "dataset")

    return make


def reasons(dataset: Any) -> dict[str, str]:
    return {each["sample_id"]: each["reason"] for each in dataset.rejected()}


LOUD = (3 * speech(1, 40.0) / speech(1, 40.0).abs().max()).clamp(-1, 1)


def test_each_check_rejects_with_what_was_found_and_its_limit(dataset_of):
    rows = [
        row("noisy", speech(1, 6.0)),
        row("clipped", LOUD),
        row("cut", speech(1, 40.0)[:8000], duration_s=2.0),
        row("nan", speech(1, 40.0), duration_s=math.nan),
        row("unknown", speech(1, 40.0), duration_s=None),
        row("near", speech(1, 40.0), duration_s=2.09),
        row("silent", torch.zeros(8000)),
    ]
    dataset = dataset_of(*rows, duration_tolerance_s=0.1, max_clipped_share=0.01, min_snr_db=15.0)
    found = reasons(dataset)
    expected = {
        "noisy": "noisy audio: estimated SNR ",
        "clipped": "clipped audio: ",
        "cut": "wrong duration: 2.00 s are declared, the audio has 1.00 s, the tolerance is 0.1",
        "nan": "wrong duration: nan s are declared, the audio has 2.00 s",
        "silent": "silent audio: -inf dBFS",
    }
    assert found.keys() == expected.keys()
    for name, start in expected.items():
        assert found[name].startswith(start)
    assert found["noisy"].endswith("dB, the limit is 15")
    assert found["clipped"].endswith("are at full scale, the limit is 1.00%")
    assert dataset.header.rejected == {
        "clipped audio": 1, "noisy audio": 1, "silent audio": 1, "wrong duration": 2,
    }  # fmt: skip


def test_checks_that_are_not_asked_for_reject_nothing(dataset_of):
    rows = [row("noisy", speech(1, 3.0)), row("clipped", LOUD), row("cut", LOUD, duration_s=9.0)]
    assert reasons(dataset_of(*rows)) == {}


def test_clipping_is_found_before_the_level_is_set_and_noise_before_silence_is_trimmed(dataset_of):
    """Both would be hidden by what is done to every clip."""
    noise = torch.randn(32000, generator=torch.Generator().manual_seed(0))
    steady = torch.cat([0.0003 * noise[:8000], 0.1 * noise[8000:24000], 0.0003 * noise[24000:]])
    rows = [row("clipped", LOUD), row("steady", steady)]
    dataset = dataset_of(*rows, max_clipped_share=0.01, min_snr_db=20.0)
    assert reasons(dataset).keys() == {"clipped"}


def test_a_duration_that_is_no_number_is_an_error_with_its_type(dataset_of, tmp_path):
    rows = [row("a", speech(1, 40.0), duration_s="2 s")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="has duration_s of type string; make it a number"):
        prepare(PrepareConfig(source=tmp_path / "other.parquet"), tmp_path / "out")


def test_a_manifest_declares_durations_too(tmp_path):
    lines = []
    for number, letter in enumerate("abcdefgh"):
        soundfile.write(tmp_path / f"{letter}.wav", speech(number, 40.0).numpy(), RATE_HZ)
        lines.append({"audio_filepath": f"{letter}.wav", "text": letter, "duration": 2.0})
    lines[0]["duration"] = 3.0
    lines[1] |= {"offset": 1.0, "duration": 1.0}
    lines[2] |= {"offset": 1.5, "duration": 1.0}  # the file ends before that
    (tmp_path / "m.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config = PrepareConfig(
        source=tmp_path / "m.json", audio_codec=AUDIO_CODEC, dev_texts=1, test_texts=1,
        single_speaker="x", alphabet="abcdefgh", duration_tolerance_s=0.2,
    )  # fmt: skip
    assert reasons(prepare(config, tmp_path / "dataset")) == {
        "a": "wrong duration: 3.00 s are declared, the audio has 2.00 s, the tolerance is 0.2",
        "c@1.5": "wrong duration: 1.00 s are declared, the audio has 0.50 s, the tolerance is 0.2",
    }


def test_a_noisy_context_is_named_as_such(tmp_path):
    lines: list[dict[str, Any]] = []
    soundfile.write(tmp_path / "noisy.wav", speech(0, 3.0).numpy(), RATE_HZ)
    for number, letter in enumerate("abcdefgh"):
        soundfile.write(tmp_path / f"{letter}.wav", speech(number, 40.0).numpy(), RATE_HZ)
        lines.append({"audio_filepath": f"{letter}.wav", "text": letter, "speaker": "x"})
    lines[0]["context_audio_filepath"] = "noisy.wav"
    (tmp_path / "m.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config = PrepareConfig(
        source=tmp_path / "m.json", audio_codec=AUDIO_CODEC, dev_texts=1, test_texts=1,
        context_s=0.5, alphabet="abcdefgh", min_snr_db=15.0,
    )  # fmt: skip
    found = reasons(prepare(config, tmp_path / "dataset"))
    assert found.keys() == {"a"}
    assert found["a"].startswith("context: noisy audio: ")


def test_what_was_left_out_is_told_with_counts_and_examples(dataset_of, caplog):
    rows = [row(f"n{n}", speech(n, 3.0)) for n in range(4)]
    rows += [row("twice", speech(1, 40.0)), row("twice", speech(2, 40.0)), row("", speech(1, 40.0))]
    rows += [row("blank", speech(1, 40.0), text="  "), row("l" * 60, LOUD[:800])]
    with caplog.at_level(logging.INFO, logger="stages.prepare"):
        dataset_of(*rows, min_snr_db=15.0)
    counts, table = (record.getMessage() for record in caplog.records)
    assert "10 of 19 recordings accepted: train 8 (0.3 min), dev 1" in counts
    assert table.splitlines() == [
        "9 rejected, each with its reason in rejected.parquet:",
        "noisy audio                4  'n0', 'n1', 'n2', …",
        "duplicate sample_id        2  'twice', 'twice'",
        "empty text                 1  'blank'",
        "no sample_id               1  ''",
        f"too short                  1  '{'l' * 39}…'",
    ]


def test_control_characters_of_an_id_do_not_reach_the_terminal():
    table = rejection_table([{"sample_id": "a\x1b[2Jb", "reason": "too short: 0.1 s"}])
    assert table == "too short        1  'a\\x1b[2Jb'"
