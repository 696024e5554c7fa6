"""What enters a dataset, what is kept out of it and why, and that its bytes are settled."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from stages.audio import level_dbfs
from stages.config import DatasetFacts
from stages.dataset import Dataset
from stages.errors import UserError
from stages.prepare import prepare
from stages.prepare_config import (
    FitAudioCodecConfig,
    LoadAudioCodecConfig,
    PrepareConfig,
    VoicesConfig,
)
from stages.screening import choose_splits, normalise

AUDIO_CODEC = FitAudioCodecConfig(
    sample_rate_hz=8000, hop=64, mels=16, codebooks=2, codes_per_codebook=8, iterations=2,
    decoder=None,
)  # fmt: skip
RATE_HZ = 8000


def tone(seconds: float = 0.5, level: float = 0.3, hz: float = 200.0) -> np.ndarray:
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE_HZ)) / RATE_HZ)


def write_source(folder: Path, rows: list[str], clips: dict[str, np.ndarray]) -> Path:
    (folder / "wavs").mkdir(parents=True)
    for name, samples in clips.items():
        soundfile.write(folder / "wavs" / f"{name}.wav", samples, RATE_HZ)
    (folder / "metadata.csv").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten texts by two speakers."""
    rows = [f"{s}{n}|Text {t}|text {t}|{s}" for n, t in enumerate("abcdefghij") for s in "xy"]
    clips = {row.split("|")[0]: tone(0.4 + 0.01 * n, hz=150 + 9 * n) for n, row in enumerate(rows)}
    return write_source(tmp_path / "source", rows, clips)


@pytest.fixture
def config(source: Path) -> Callable[..., PrepareConfig]:
    def make(**changes: Any) -> PrepareConfig:
        small = {"source": source, "audio_codec": AUDIO_CODEC, "dev_texts": 1, "test_texts": 2}
        alphabet = {"alphabet": "abcdefghijtx é"}
        return PrepareConfig(**(small | alphabet | changes))

    return make


def reasons(dataset: Dataset) -> dict[str, str]:
    return {row["sample_id"]: row["reason"] for row in dataset.rejected()}


def test_a_recorded_folder_becomes_samples_with_their_codes(config, tmp_path):
    dataset = prepare(config(), tmp_path / "dataset")
    sample = dataset.samples("train")[0]
    assert dataset.header.samples == {"train": 14, "dev": 2, "test": 4}
    assert (sample["text"], sample["speaker"]) == (
        normalise(sample["text"]),
        sample["sample_id"][0],
    )
    assert dataset.codes(sample).shape == (sample["n_frames"], 2)
    assert np.isclose(
        sample["duration_s"] * dataset.facts.frame_rate_hz, sample["n_frames"], atol=1
    )
    assert dataset.audio_codec().decode(dataset.codes(sample)).shape == (128 * sample["n_frames"],)


def test_all_clips_of_a_text_share_its_split(config, tmp_path):
    dataset = prepare(config(), tmp_path / "dataset")
    texts = [{row["text"] for row in dataset.samples(split)} for split in ("train", "dev", "test")]
    assert [len(each) for each in texts] == [7, 1, 2]
    assert len(set.union(*texts)) == 10


def test_splits_do_not_depend_on_the_order_of_the_texts(config):
    texts = [f"text {n}" for n in range(20)]
    assert choose_splits(texts, config()) == choose_splits(texts[::-1] * 2, config())
    assert choose_splits(texts, config()) != choose_splits(texts, config(seed=1))


def test_every_defect_is_rejected_with_its_reason_and_stops_nothing(config, source, tmp_path):
    (source / "wavs" / "broken.wav").write_bytes(b"RIFF but no audio")
    soundfile.write(source / "wavs" / "empty.wav", np.zeros(0), RATE_HZ)
    soundfile.write(source / "wavs" / "nan.wav", tone() * np.nan, RATE_HZ, subtype="FLOAT")
    for name, samples in {
        "silent": tone(level=1e-4), "short": tone(0.1), "long": tone(2.0), "accent": tone(),
        "twice": tone(), "blank": tone(), "mute": tone(),
    }.items():  # fmt: skip
        soundfile.write(source / "wavs" / f"{name}.wav", samples, RATE_HZ)
    soundfile.write(tmp_path / "secret.wav", tone(), RATE_HZ)
    names = [
        "broken",
        "empty",
        "nan",
        "silent",
        "short",
        "long",
        "twice",
        "twice",
        "../../secret",
        "absent",
    ]
    rows = [f"{name}|text a|text a|x" for name in names]
    rows += ["accent|täxt|täxt|x", "blank|  |  |x", "mute|text a|text a|", "|text a|text a|x"]
    with (source / "metadata.csv").open("a", encoding="utf-8") as table:
        table.writelines(f"{row}\n" for row in rows)
    dataset = prepare(config(max_duration_s=1.5), tmp_path / "dataset")
    assert len(dataset.table) == 20
    found = reasons(dataset)
    expected = {
        "broken": "unreadable audio: ", "empty": "empty audio: 0 samples", "nan": "audio holds NaN",
        "silent": "silent audio: -8", "short": "too short: 0.10 s", "long": "too long: 2.0",
        "twice": "duplicate sample_id: 2 rows", "../../secret": "audio outside the folder: ",
        "absent": "missing audio: wavs/absent", "accent": "text outside the alphabet: ['ä']",
        "blank": "empty text: ", "mute": "no speaker: ", "": "no sample_id: ",
    }  # fmt: skip
    assert {name: found[name][: len(text)] for name, text in expected.items()} == expected
    assert dataset.header.rejected["duplicate sample_id"] == 2
    assert sum(dataset.header.rejected.values()) == len(rows)


def test_the_alphabet_is_that_of_the_train_texts_where_none_is_given(config, source, tmp_path):
    splits = choose_splits([f"text {t}" for t in "abcdefghij"], config())
    dataset = prepare(config(alphabet=None), tmp_path / "dataset")
    train = {text for text, split in splits.items() if split == "train"}
    assert set(dataset.facts.alphabet) == set("".join(train))
    held_out = {text for text, split in splits.items() if set(text) - set("".join(train))}
    assert {row["text"] for row in dataset.table.to_pylist()} == set(splits) - held_out
    assert held_out
    assert dataset.header.rejected == {"text outside the alphabet": 2 * len(held_out)}


def test_texts_are_composed_lower_cased_and_collapsed():
    assert normalise("  Une  E\N{COMBINING ACUTE ACCENT}TOILE\tÀ\n midi ") == "une étoile à midi"


def test_the_same_source_gives_the_same_bytes_anywhere_and_at_any_time(config, source, tmp_path):
    first = prepare(config(context_s=0.2), tmp_path / "first")
    moved = source.rename(tmp_path / "moved")
    second = prepare(config(source=moved, context_s=0.2), tmp_path / "second")
    names = sorted(p.relative_to(first.path) for p in first.path.rglob("*") if p.is_file())
    assert len(names) == 6
    for name in names:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name


def test_a_finished_dataset_is_opened_and_not_made_again(config, source, tmp_path):
    made = prepare(config(), tmp_path / "dataset")
    (source / "wavs" / "x0.wav").unlink()
    assert prepare(config(), tmp_path / "dataset").header == made.header


def test_a_dataset_of_other_settings_is_not_overwritten(config, source, tmp_path):
    prepare(config(), tmp_path / "dataset")
    with pytest.raises(UserError, match="prepared with another test_texts, seed"):
        prepare(config(test_texts=3, seed=4), tmp_path / "dataset")
    with (source / "metadata.csv").open("a") as table:
        table.write("x9z|text a|text a|x\n")
    with pytest.raises(UserError, match="prepared with another source"):
        prepare(config(), tmp_path / "dataset")


def test_a_dataset_that_is_older_than_a_setting_had_its_default(config, tmp_path):
    made = prepare(config(), tmp_path / "dataset")
    header = json.loads((made.path / "dataset.json").read_text())
    del header["config"]["lower_case"]
    (made.path / "dataset.json").write_text(json.dumps(header))
    prepare(config(), made.path)
    with pytest.raises(UserError, match="prepared with another lower_case"):
        prepare(config(lower_case=False), made.path)


def test_a_failed_run_leaves_nothing_behind(config, source, tmp_path):
    with pytest.raises(UserError, match=r"no recording .* rejected too short: 20"):
        prepare(config(min_duration_s=5.0), tmp_path / "out" / "dataset")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_context_is_the_start_of_another_train_clip_of_the_speaker(config, tmp_path):
    dataset = prepare(config(context_s=0.1), tmp_path / "dataset")
    frames = dataset.facts.context_frames
    assert frames == round(0.1 * dataset.facts.frame_rate_hz)
    starts = {
        (row["speaker"], row["codes"][: 2 * frames].tobytes()): row["sample_id"]
        for row in dataset.samples("train")
    }
    for split in ("train", "dev", "test"):
        for row in dataset.samples(split):
            context = starts[row["speaker"], row["context_codes"].tobytes()]
            assert context != row["sample_id"]


def test_short_contexts_are_repeated_on_request_and_else_stay_short(config, tmp_path):
    plain = prepare(config(context_s=5.0), tmp_path / "plain")
    filled = prepare(config(context_s=5.0, context_repeat=True), tmp_path / "filled")
    size = filled.facts.context_frames * filled.facts.codebooks
    for short, long in zip(plain.samples("train"), filled.samples("train"), strict=True):
        codes = short["context_codes"]
        assert 0 < len(codes) < size == len(long["context_codes"])
        assert np.array_equal(long["context_codes"], np.resize(codes, size))


def test_speakers_without_train_clips_are_left_out(config, source, tmp_path):
    held_out = next(
        t
        for t, s in choose_splits([f"text {t}" for t in "abcdefghij"], config()).items()
        if s == "test"
    )
    soundfile.write(source / "wavs" / "z.wav", tone(), RATE_HZ)
    with (source / "metadata.csv").open("a") as table:
        table.write(f"z|{held_out}|{held_out}|z\n")
    dataset = prepare(config(), tmp_path / "dataset")
    assert dataset.facts.speakers == ("x", "y")
    assert reasons(dataset)["z"].startswith("speaker without train clips: 'z' has 0")


def test_silence_is_trimmed_and_levels_are_evened(config, source, tmp_path):
    quiet = np.concatenate([np.zeros(4000), tone(0.5, level=0.02), np.zeros(8000)])
    for name in ("x0", "x1", "x2"):
        soundfile.write(source / "wavs" / f"{name}.wav", quiet, RATE_HZ)
    dataset = prepare(config(dev_texts=4, test_texts=5), tmp_path / "dataset")
    row = next(row for row in dataset.table.to_pylist() if row["sample_id"] in ("x0", "x1", "x2"))
    assert row["duration_s"] == pytest.approx(0.5 + 2 * 0.05, abs=0.011)
    held_out = [row["sample_id"] for split in ("dev", "test") for row in dataset.samples(split)]
    for sample_id in held_out:
        waveform, rate_hz = dataset.reference(sample_id)
        speech = waveform[round(0.06 * rate_hz) : -round(0.06 * rate_hz)]
        assert level_dbfs(speech) == pytest.approx(-23, abs=1.2)


def test_the_reference_is_what_was_encoded(config, tmp_path):
    dataset = prepare(config(), tmp_path / "dataset")
    for row in dataset.samples("test"):
        (codes,) = dataset.audio_codec().encode([dataset.reference(row["sample_id"])[0]])
        np.testing.assert_array_equal(codes, dataset.codes(row))


def wav_bytes(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE_HZ, format="WAV")
    return file.getvalue()


def test_a_parquet_file_with_audio_inside_or_beside_it_is_a_source(config, source, tmp_path):
    rows = [
        {
            "clip_id": f"c{n}",
            "text": f"text {t}",
            "speaker": "x",
            "audio": {"bytes": wav_bytes(tone()), "path": None},
        }
        for n, t in enumerate("abcdefgh")
    ]
    rows.append(
        {
            "clip_id": "c8",
            "text": "text i",
            "speaker": "x",
            "audio": {"bytes": None, "path": "wavs/x3.wav"},
        }
    )
    rows.append(
        {"clip_id": "c9", "text": None, "speaker": "x", "audio": {"bytes": None, "path": None}}
    )
    pq.write_table(pa.Table.from_pylist(rows), source / "clips.parquet")
    dataset = prepare(config(source=source / "clips.parquet"), tmp_path / "dataset")
    assert len(dataset.table) == 9
    assert reasons(dataset) == {"c9": "empty text: nothing is left after normalisation"}


def test_a_source_without_speakers_needs_the_name_of_the_only_one(config, source, tmp_path):
    table = source / "metadata.csv"
    table.write_text(
        "".join(f"{line.rsplit('|', 1)[0]}\n" for line in table.read_text().splitlines())
    )
    with pytest.raises(UserError, match=r"no speaker column; .* prepare\.single_speaker"):
        prepare(config(), tmp_path / "dataset")
    dataset = prepare(config(single_speaker="alba"), tmp_path / "dataset")
    assert dataset.facts.speakers == ("alba",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("only-an-id\n", "line 1 has 1 columns"),
        ("a|b|c|d|e\n", "line 1 has 5 columns"),
    ],
)
def test_a_table_that_is_none_is_an_error_with_its_line(config, source, tmp_path, content, message):
    (source / "metadata.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        prepare(config(), tmp_path / "dataset")


@pytest.mark.parametrize(
    ("header", "order"),
    [
        ("id|text|normalised text|speaker", (0, 1, 2, 3)),
        ("Speaker|file_name|normalized_transcription|transcription", (3, 0, 2, 1)),
        ("clip_id|text|speaker_id", (0, 2, 3)),
    ],
)
def test_a_header_says_in_which_order_the_cells_stand(config, source, tmp_path, header, order):
    plain = prepare(config(), tmp_path / "plain")
    rows = [row.split("|") for row in (source / "metadata.csv").read_text().splitlines()]
    lines = [header, *("|".join(row[place] for place in order) for row in rows)]
    (source / "metadata.csv").write_text("".join(f"{line}\n" for line in lines))
    named = prepare(config(), tmp_path / "named")
    assert named.table.equals(plain.table)
    assert named.rejected() == []


def test_words_that_could_be_a_header_are_a_row_unless_all_of_them_are(config, source, tmp_path):
    soundfile.write(source / "wavs" / "id.wav", tone(), RATE_HZ)
    table = source / "metadata.csv"
    table.write_text(f"id|text a|text a|x\n{table.read_text()}")
    assert "id" in prepare(config(), tmp_path / "dataset").table.column("sample_id").to_pylist()


def test_a_row_with_other_cells_than_its_header_is_an_error_with_its_line(config, source, tmp_path):
    (source / "metadata.csv").write_text("id|text|speaker\na0|text a|x\nb0|text b\n")
    with pytest.raises(UserError, match=r"line 3 has 2 columns, but 3 are known: id\|text\|speak"):
        prepare(config(), tmp_path / "dataset")


def test_facts_of_one_rate_are_written_as_before_there_were_slots(config, tmp_path):
    dataset = prepare(config(), tmp_path / "dataset")
    facts = json.loads((dataset.path / "dataset.json").read_text())["facts"]
    assert sorted(facts) == [
        "alphabet", "audio_codec", "codebooks", "codes_per_codebook", "context_frames",
        "frame_rate_hz", "speakers",
    ]  # fmt: skip
    assert dataset.facts.slots == ()
    assert DatasetFacts.model_validate(dataset.facts.model_dump(mode="json")) == dataset.facts
    slotted = dataset.facts.model_copy(update={"slots": ((0, 0), (1, 0), (1, 1))})
    assert DatasetFacts.model_validate_json(slotted.model_dump_json()) == slotted != dataset.facts


def test_a_parquet_file_without_the_columns_names_those_it_has(config, tmp_path):
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "metadata.parquet")
    with pytest.raises(UserError, match=r"lacks the columns \['clip_id', 'audio'\]"):
        prepare(config(source=tmp_path), tmp_path / "dataset")


def test_a_folder_without_a_table_is_an_error(config, tmp_path):
    with pytest.raises(UserError, match="holds 0 tables"):
        prepare(config(source=tmp_path), tmp_path / "dataset")


def test_a_fitted_audio_codec_serves_another_dataset(config, tmp_path):
    first = prepare(config(), tmp_path / "first")
    load = LoadAudioCodecConfig(kind="load", path=first.path / "audio_codec")
    second = prepare(config(audio_codec=load), tmp_path / "second")
    assert second.header.fingerprint == first.header.fingerprint


def test_altered_samples_are_found(config, tmp_path):
    dataset = prepare(config(), tmp_path / "dataset")
    table = pq.read_table(dataset.path / "samples.parquet")
    speakers = pa.array(["y", *table.column("speaker").to_pylist()[1:]])
    altered = table.set_column(2, table.schema.field("speaker"), speakers)
    pq.write_table(altered, dataset.path / "samples.parquet")
    with pytest.raises(UserError, match="a file was altered"):
        Dataset.open(dataset.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "version 7"),
        ({"facts": {}}, "is damaged"),
        (None, "dataset.json is missing"),
    ],
)
def test_an_unfinished_or_foreign_dataset_is_refused(config, tmp_path, change, message):
    dataset = prepare(config(), tmp_path / "dataset")
    header = dataset.path / "dataset.json"
    content = json.loads(header.read_text())
    header.unlink() if change is None else header.write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=message):
        Dataset.open(dataset.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "exactly one of source"),
        ({"voices": VoicesConfig()}, "exactly one of source"),
        ({"max_duration_s": 0.1}, "max_duration_s=0.1 must be above min_duration_s=0.3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
