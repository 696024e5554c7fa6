"""Manifests as NeMo writes them: what is read of a line, and where its audio may lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from stages.dataset import Dataset
from stages.errors import UserError
from stages.prepare import prepare
from stages.prepare_config import FitAudioCodecConfig, PrepareConfig
from stages.recordings import Audio, read_ids, read_recordings

RATE_HZ = 8000
AUDIO_CODEC = FitAudioCodecConfig(
    sample_rate_hz=RATE_HZ, hop=64, mels=16, codebooks=2, codes_per_codebook=8, iterations=2,
    decoder=None,
)  # fmt: skip
FRAME_SAMPLES = 128


def tone(hz: float, seconds: float = 0.5) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE_HZ)) / RATE_HZ)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def recordings(table: Path, single_speaker: str | None = None) -> list[Any]:
    return list(read_recordings(table, table.parent, single_speaker))


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    """Write ten clips by two speakers and a manifest that names them, with rows changed."""
    folder = tmp_path / "source"
    (folder / "audio").mkdir(parents=True)
    rows = []
    for number, letter in enumerate("abcdefghij"):
        soundfile.write(folder / "audio" / f"{letter}.wav", tone(150 + 40 * number), RATE_HZ)
        rows.append(
            {
                "audio_filepath": f"audio/{letter}.wav",
                "text": f"Text {letter}",
                "speaker": number % 2,
                "duration": 0.5,
            }
        )

    def write(**changes: dict[str, Any]) -> Path:
        for letter, change in changes.items():
            rows["abcdefghij".index(letter)] |= change
        return write_lines(folder / "manifest.json", rows)

    return write


def settings(source: Path, **changes: Any) -> PrepareConfig:
    given: dict[str, Any] = {"source": source, "audio_codec": AUDIO_CODEC, "trim": None}
    given |= {"alphabet": "abcdefghijtx "}
    return PrepareConfig(
        **(given | {"dev_texts": 1, "test_texts": 2, "level_dbfs": None} | changes)
    )


def row_of(dataset: Dataset, sample_id: str) -> dict[str, Any]:
    rows = [row for split in ("train", "dev", "test") for row in dataset.samples(split)]
    (found,) = [row for row in rows if row["sample_id"] == sample_id]
    return found


def encoded(dataset: Dataset, samples: np.ndarray) -> np.ndarray:
    import torch

    (codes,) = dataset.audio_codec().encode([torch.from_numpy(samples.astype(np.float32))])
    return codes


def test_a_manifest_is_a_source(manifest, tmp_path):
    numbers = "abcdefghijtx 0123456789"
    changes = {"a": {"normalized_text": "text j x"}, "b": {"normalized_text": ""}}
    dataset = prepare(settings(manifest(**changes), alphabet=numbers), tmp_path / "dataset")
    assert dataset.facts.speakers == ("0", "1")
    assert sorted(row["sample_id"] for row in dataset.table.to_pylist()) == [
        f"audio/{letter}" for letter in "abcdefghij"
    ]
    assert row_of(dataset, "audio/a")["text"] == "text j x"
    assert row_of(dataset, "audio/b")["text"] == "text b"


def test_capitals_stay_where_they_are_wanted(manifest, tmp_path):
    dataset = prepare(
        settings(manifest(), lower_case=False, alphabet="Tabcdefghijtx e"), tmp_path / "d"
    )
    assert row_of(dataset, "audio/c")["text"] == "Text c"


def test_an_offset_cuts_the_clip_out_of_its_file(manifest, tmp_path):
    long = np.concatenate([tone(300), tone(900), tone(500)])
    table = manifest(d={"offset": 0.5, "duration": 0.5})
    soundfile.write(table.parent / "audio" / "d.wav", long, RATE_HZ)
    dataset = prepare(settings(table), tmp_path / "dataset")
    row = row_of(dataset, "audio/d@0.5")
    assert row["duration_s"] == 0.5
    np.testing.assert_array_equal(dataset.codes(row), encoded(dataset, tone(900)))


def test_a_duration_without_an_offset_cuts_nothing(manifest, tmp_path):
    dataset = prepare(settings(manifest(e={"duration": 0.31})), tmp_path / "dataset")
    assert row_of(dataset, "audio/e")["duration_s"] == 0.5


@pytest.mark.parametrize("key", ["speaker", "speaker_id", "speaker_index"])
@pytest.mark.parametrize("value", [3, "3"])
def test_a_speaker_is_a_number_or_a_name_under_any_of_nemos_keys(tmp_path, key, value):
    row = {"audio_filepath": "a.wav", "text": "a", key: value}
    assert recordings(write_lines(tmp_path / "m.json", [row]))[0].speaker == "3"


def test_a_manifest_without_speakers_needs_the_name_of_the_only_one(tmp_path):
    rows: list[Any] = [{"audio_filepath": "a.wav", "text": "a"}, {"audio_filepath": "b.wav"}]
    table = write_lines(tmp_path / "m.json", rows)
    with pytest.raises(UserError, match=r"no speaker column; .* prepare\.single_speaker"):
        recordings(table)
    assert [row.speaker for row in recordings(table, "alba")] == ["alba", "alba"]
    write_lines(table, [*rows, {"audio_filepath": "c.wav", "speaker": "x"}])
    assert [row.speaker for row in recordings(table)] == [None, None, "x"]


def test_ids_are_paths_below_the_root_and_the_same_clip_again_is_numbered(tmp_path):
    paths = ["x/a.b.wav", str(tmp_path / "x" / "c.flac"), "x/a.b.wav", "/elsewhere/d.wav"]
    rows: list[Any] = [{"audio_filepath": path} for path in paths]
    rows += [{"audio_filepath": "x/a.b.wav", "offset": 1.5}, {"text": "nothing"}]
    table = write_lines(tmp_path / "m.jsonl", rows)
    assert read_ids(table, tmp_path) == [
        "x/a.b", "x/c", "x/a.b#2", "/elsewhere/d", "x/a.b@1.5", "line 6",
    ]  # fmt: skip


def test_absolute_paths_are_read_below_the_audio_root_and_nowhere_else(manifest, tmp_path):
    table = manifest()
    audio = (table.parent / "audio").rename(tmp_path / "elsewhere")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows = [row | {"audio_filepath": str(tmp_path / "elsewhere" / f"{name}.wav")}
            for row, name in zip(rows, "abcdefghij", strict=True)]  # fmt: skip
    write_lines(table, rows)
    with pytest.raises(UserError, match="rejected audio outside the folder: 10"):
        prepare(settings(table), tmp_path / "dataset")
    dataset = prepare(settings(table, audio_root=audio), tmp_path / "dataset")
    assert {row["sample_id"] for row in dataset.table.to_pylist()} == set("abcdefghij")
    (audio / "a.wav").unlink()
    (audio / "a.wav").symlink_to(tmp_path / "secret.wav")
    soundfile.write(tmp_path / "secret.wav", tone(200), RATE_HZ)
    again = prepare(settings(table, audio_root=audio), tmp_path / "again")
    (rejected,) = again.rejected()
    assert "audio outside the folder" in rejected["reason"]
    assert "prepare.audio_root" in rejected["reason"]


def test_a_context_that_is_named_takes_the_place_of_another_clip(manifest, tmp_path):
    voice = np.concatenate([tone(1200, 0.2), tone(2400, 0.4)])
    table = manifest(
        a={"context_audio_filepath": "audio/voice.wav", "context_audio_duration": 0.6},
        b={"context_audio_filepath": "audio/voice.wav", "context_audio_duration": 0.1},
    )
    soundfile.write(table.parent / "audio" / "voice.wav", voice, RATE_HZ)
    dataset = prepare(settings(table, context_s=0.2), tmp_path / "dataset")
    frames = dataset.facts.context_frames
    start = soundfile.read(table.parent / "audio" / "voice.wav")[0]
    for sample_id, samples, count in (
        ("audio/a", start[:1600], frames),
        ("audio/b", start[:800], -(-800 // FRAME_SAMPLES)),
    ):
        context = np.asarray(row_of(dataset, sample_id)["context_codes"]).reshape(-1, 2)
        np.testing.assert_array_equal(context, encoded(dataset, samples)[:frames])
        assert len(context) == count
    others = {
        dataset.codes(row)[:frames].tobytes()
        for row in dataset.samples("train")
        if row["speaker"] == "0"
    }
    unnamed = np.asarray(row_of(dataset, "audio/c")["context_codes"]).reshape(-1, 2)
    assert unnamed.tobytes() in others


def test_a_context_that_cannot_be_used_rejects_its_row_alone(manifest, tmp_path):
    table = manifest(
        a={"context_audio_filepath": "audio/absent.wav"},
        b={"context_audio_filepath": "../../secret.wav"},
        c={"context_audio_filepath": "audio/silence.wav"},
    )
    soundfile.write(table.parent / "audio" / "silence.wav", np.zeros(4000), RATE_HZ)
    dataset = prepare(
        settings(table, context_s=0.2, dev_texts=0, test_texts=0), tmp_path / "dataset"
    )
    found = {row["sample_id"]: row["reason"] for row in dataset.rejected()}
    assert found.keys() == {"audio/a", "audio/b", "audio/c"}
    assert found["audio/a"] == "context: missing audio: audio/absent.wav"
    assert found["audio/b"].startswith("context: audio outside the folder: ../../secret.wav")
    assert found["audio/c"].startswith("context: silent audio: -inf")
    # Without contexts, nothing of them is read.
    assert prepare(settings(table), tmp_path / "other").rejected() == []


def test_a_speaker_of_one_clip_is_kept_where_it_names_its_context(manifest, tmp_path):
    all_train = {"context_s": 0.2, "dev_texts": 0, "test_texts": 0}
    dataset = prepare(settings(manifest(a={"speaker": "lone"}), **all_train), tmp_path / "without")
    assert dataset.header.rejected == {"speaker without train clips": 1}
    table = manifest(a={"context_audio_filepath": "audio/b.wav"})
    dataset = prepare(settings(table, **all_train), tmp_path / "with")
    assert dataset.facts.speakers == ("0", "1", "lone")


def test_rows_without_audio_or_text_are_rejected_and_stop_nothing(manifest, tmp_path):
    table = manifest(a={"audio_filepath": None}, b={"text": None}, c={"offset": 9.0, "duration": 1})
    dataset = prepare(settings(table), tmp_path / "dataset")
    assert {row["sample_id"]: row["reason"].split(":")[0] for row in dataset.rejected()} == {
        "line 1": "missing audio", "audio/b": "empty text", "audio/c@9.0": "empty audio",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2 is no row of a manifest: Invalid JSON"),
        ("[]", "line 2 is no row of a manifest"),
    ],
)
def test_a_line_that_is_no_row_is_an_error_with_its_number(manifest, tmp_path, line, message):
    table = manifest()
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(UserError, match=message):
        prepare(settings(table), tmp_path / "dataset")


@pytest.mark.parametrize(
    ("change", "sample_id", "reason"),
    [
        ({"duration": 0.0}, "audio/b", "duration: Input should be greater than 0"),
        ({"text": 5}, "audio/b", "text: Input should be a valid string"),
        ({"audio_filepath": 3}, "line 2", "audio_filepath: Input should be a valid string"),
        ({"speaker": True}, "audio/b", "speaker: Input should be a valid string"),
        ({"speaker": None, "speaker_id": []}, "audio/b", None),
        ({"offset": -1}, "audio/b", "offset: Input should be greater than or equal to 0"),
        ({"offset": 0.1, "duration": "x"}, "audio/b@0.1", "duration: Input should be a valid"),
        ({"context_audio_duration": float("nan")}, "audio/b", "context_audio_duration: Input"),
    ],
)
def test_a_row_with_an_odd_value_is_rejected_and_stops_nothing(
    manifest, tmp_path, change, sample_id, reason
):
    dataset = prepare(settings(manifest(b=change)), tmp_path / "dataset")
    assert sum(dataset.header.samples.values()) == 9
    (row,) = dataset.rejected()
    assert row["sample_id"] == sample_id
    assert row["reason"].startswith("unreadable row: line 2: " + reason if reason else "no speaker")


def test_blank_lines_and_separators_inside_of_texts_are_no_lines(tmp_path):
    text = "one\N{LINE SEPARATOR}two"
    row = json.dumps({"audio_filepath": "a.wav", "text": text, "speaker": 1}, ensure_ascii=False)
    (tmp_path / "m.json").write_text(f"\ufeff{row}\n\n{row}\r\n", encoding="utf-8")
    first, second = recordings(tmp_path / "m.json")
    assert (first.text, first.audio, second.sample_id) == (text, Audio("a.wav"), "a#2")


def test_a_manifest_in_another_encoding_is_an_error(tmp_path):
    (tmp_path / "m.json").write_bytes('{"text": "été"}'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        recordings(tmp_path / "m.json")


def test_an_empty_manifest_and_a_missing_one_are_errors(tmp_path):
    (tmp_path / "m.json").write_text("\n")
    with pytest.raises(UserError, match="has no rows"):
        prepare(settings(tmp_path / "m.json"), tmp_path / "dataset")
    with pytest.raises(UserError, match="does not exist"):
        prepare(settings(tmp_path / "absent.json"), tmp_path / "dataset")


def test_an_audio_root_without_a_source_is_refused():
    with pytest.raises(ValueError, match="goes with a source"):
        PrepareConfig.model_validate({"voices": {}, "audio_root": "/data"})
