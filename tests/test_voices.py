"""The demo corpus: which sentences, spoken by whom, and always to the same bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from stages import voices
from stages.audio import read_audio
from stages.errors import UserError
from stages.prepare_config import VoiceConfig, VoicesConfig
from stages.voices import PATTERNS, SLOTS, make_corpus, sentences

HIBARI = ("hibari", "pip install 'foretell[voices]'")
CONFIG = VoicesConfig(sentences=3, processes=1)


def checksums(corpus: Path) -> dict[str, str]:
    return {
        str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in corpus.rglob("*")
        if path.is_file()
    }


def test_sentences_are_different_and_a_longer_list_begins_with_the_shorter():
    many = sentences(1300, seed=0)
    assert len(set(many)) == 1300
    assert sentences(50, seed=0) == many[:50]
    assert sentences(50, seed=1) != many[:50]


def test_sentences_use_every_word_and_pattern_often_enough_to_be_learned():
    words = [word for sentence in sentences(1300, seed=0) for word in sentence.split()]
    counts = {word: words.count(word) for word in set(words)}
    every = {word for fills in SLOTS.values() for fill in fills for word in fill.split()}
    assert every <= set(counts)
    assert min(counts.values()) >= 30
    assert 50 <= len(counts) <= 120
    assert {len(sentence.split()) for sentence in sentences(1300, seed=0)} <= set(range(3, 11))
    assert len(PATTERNS) == len(set(PATTERNS))


def test_asking_for_more_sentences_than_the_grammar_has_is_an_error(monkeypatch):
    monkeypatch.setattr(voices, "PATTERNS", ("{verb} the {object}",))
    with pytest.raises(UserError, match="sentences=200 is more than the demo grammar"):
        sentences(200, seed=0)


def test_the_same_seed_gives_the_same_bytes_whatever_the_processes(require, tmp_path):
    require(*HIBARI)
    first = make_corpus(CONFIG, tmp_path / "first")
    second = make_corpus(CONFIG, tmp_path / "second")
    assert checksums(first) == checksums(second)
    other = make_corpus(CONFIG.model_copy(update={"seed": 1}), tmp_path / "other")
    assert not set(checksums(first).values()) & set(checksums(other).values())


@pytest.mark.slow
def test_two_processes_speak_what_one_speaks(require, tmp_path):
    require(*HIBARI)
    one = make_corpus(CONFIG, tmp_path / "one")
    two = make_corpus(CONFIG.model_copy(update={"processes": 2}), tmp_path / "two")
    assert checksums(one) == checksums(two)


def test_a_half_made_corpus_is_finished_and_its_broken_clips_are_made_again(require, tmp_path):
    require(*HIBARI)
    corpus = make_corpus(CONFIG, tmp_path / "corpus")
    whole = checksums(corpus)
    (corpus / "metadata.csv").unlink()
    (corpus / "wavs" / "00001-deep.wav").unlink()
    (corpus / "wavs" / "00002-heart.wav").write_bytes(b"RIFF")
    make_corpus(CONFIG, corpus)
    assert checksums(corpus) == whole


def test_a_corpus_of_other_settings_is_refused(tmp_path):
    (tmp_path / "voices.json").write_text(CONFIG.model_dump_json())
    with pytest.raises(UserError, match="holds a corpus of other settings"):
        make_corpus(CONFIG.model_copy(update={"seed": 5}), tmp_path)


def test_a_corpus_of_another_grammar_is_refused(require, monkeypatch, tmp_path):
    require(*HIBARI)
    make_corpus(CONFIG, tmp_path)
    monkeypatch.setattr(voices, "PATTERNS", (*PATTERNS, "the {object}"))
    with pytest.raises(UserError, match="or another grammar"):
        make_corpus(CONFIG, tmp_path)


def test_the_table_names_every_clip_with_its_text_and_speaker(require, tmp_path):
    require(*HIBARI)
    corpus = make_corpus(CONFIG, tmp_path / "corpus")
    rows = [line.split("|") for line in (corpus / "metadata.csv").read_text().splitlines()]
    assert [row[3] for row in rows] == ["heart", "deep"] * 3
    assert [row[1] for row in rows[::2]] == sentences(3, seed=0)
    assert all((corpus / "wavs" / f"{row[0]}.wav").is_file() for row in rows)


def pitch_hz(path: Path) -> float:
    """Frequency of the strongest autocorrelation peak between 80 and 400 Hz."""
    waveform, rate_hz = read_audio(path)
    spectrum = np.abs(np.fft.rfft(waveform.numpy(), 2 * len(waveform))) ** 2
    correlation = np.fft.irfft(spectrum)
    low, high = rate_hz // 400, rate_hz // 80
    return rate_hz / (low + int(np.argmax(correlation[low:high])))


def test_a_lower_pitch_makes_a_lower_voice_of_the_same_pace(require, tmp_path):
    require(*HIBARI)
    corpus = make_corpus(CONFIG, tmp_path / "corpus")
    for number in range(3):
        heart, deep = (corpus / "wavs" / f"{number:05d}-{name}.wav" for name in ("heart", "deep"))
        assert pitch_hz(deep) / pitch_hz(heart) == pytest.approx(0.8, abs=0.1)
        lengths = [len(read_audio(path)[0]) for path in (heart, deep)]
        assert lengths[1] / lengths[0] == pytest.approx(1.0, abs=0.12)


def test_an_absent_engine_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    flite = VoicesConfig(voices=(VoiceConfig(speaker="rms", engine="flite", voice="rms"),))
    with pytest.raises(
        UserError, match=r"speaker 'rms' needs the program `flite`.*apt-get install"
    ):
        make_corpus(flite, tmp_path / "corpus")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="speaker 'heart' needs the package hibari-tts"):
        make_corpus(CONFIG, tmp_path / "corpus")


def test_a_voice_that_an_engine_lacks_is_named_with_those_it_has(require, monkeypatch, tmp_path):
    program = tmp_path / "flite"
    program.write_text("#!/bin/sh\necho 'Voices available: kal rms slt '\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    flite = VoicesConfig(voices=(VoiceConfig(speaker="a", engine="flite", voice="rsm"),))
    with pytest.raises(UserError, match="'rsm', but flite has kal, rms, slt"):
        make_corpus(flite, tmp_path / "corpus")
    require(*HIBARI)
    hibari = VoicesConfig(voices=(VoiceConfig(speaker="a", voice="hart"),))
    with pytest.raises(UserError, match="'hart', but hibari has heart, "):
        make_corpus(hibari, tmp_path / "corpus")


def test_two_voices_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names a speaker twice"):
        VoicesConfig(voices=(VoiceConfig(speaker="a"), VoiceConfig(speaker="a", pitch=0.8)))
