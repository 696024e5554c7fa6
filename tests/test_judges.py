"""Judges: what they hear in a clip that a package speaks, and what happens without a package."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stages import judges
from stages.config import EvaluateConfig
from stages.judges import JUDGES, Clip, judge
from stages.metrics import cosine, word_errors

TEXT = "bring the yellow book to the garden"


@pytest.fixture(scope="module")
def spoken(require):
    require("hibari", "pip install 'foretell[voices]'")
    import hibari

    engine = hibari.Hibari(threads=1)
    return Clip(np.asarray(engine(TEXT, seed=0), np.float32), engine.sample_rate)


def noise_clip(seconds, rate_hz=22050, seed=0):
    samples = np.random.default_rng(seed).normal(0, 0.05, round(seconds * rate_hz))
    return Clip(samples.astype(np.float32), rate_hz)


def require_judge(require, name):
    for module in JUDGES[name].modules:
        require(module, JUDGES[name].install)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whisper", "pocketsphinx"])
def test_a_recogniser_hears_every_clip_alike_in_any_company(require, spoken, name):
    require_judge(require, name)
    alone = judge(name, [spoken]).values
    company = [noise_clip(0.7), spoken, Clip(np.zeros(0, np.float32), 24000), spoken]
    heard = judge(name, company, processes=2).values
    assert word_errors([TEXT], alone).numerator[0] <= 1
    assert heard[1] == heard[3] == alone[0]
    assert [type(text) for text in heard] == [str] * 4


@pytest.mark.slow
def test_quality_falls_when_noise_is_added(require, spoken):
    require_judge(require, "distillmos")
    noise = np.random.default_rng(0).normal(0, 0.05, len(spoken.waveform)).astype(np.float32)
    clean, noisy = judge("distillmos", [spoken, Clip(spoken.waveform + noise, 24000)]).values
    assert 1 <= noisy < clean - 0.5 < clean <= 5.5


@pytest.mark.slow
def test_speaker_embedding_tells_a_shifted_voice_from_a_cut_one(require, spoken):
    require_judge(require, "resemblyzer")
    half = len(spoken.waveform) // 2
    clips = [
        Clip(spoken.waveform[:half], spoken.rate_hz),
        Clip(spoken.waveform[half:], spoken.rate_hz),
        Clip(spoken.waveform, round(spoken.rate_hz * 0.7)),
        Clip(np.zeros(16000, np.float32), 16000),
    ]
    values = judge("resemblyzer", clips).values
    same, shifted, silent = (cosine(values[:1], values[i : i + 1])[0] for i in (1, 2, 3))
    assert same > shifted > silent == 0


def test_a_missing_package_gives_a_reason_and_the_command_that_helps(monkeypatch):
    absent = dataclasses.replace(JUDGES["whisper"], modules=("jiwer_of_tomorrow",))
    monkeypatch.setitem(judges.JUDGES, "whisper", absent)
    verdict = judge("whisper", [noise_clip(0.1)])
    assert verdict.values is None
    assert "jiwer_of_tomorrow" in verdict.reason
    assert "pip install 'foretell[report]'" in verdict.reason


def test_a_package_that_cannot_be_imported_gives_a_reason_from_the_worker(monkeypatch, tmp_path):
    # A worker is a fresh process that inherits the path, and there finds a broken package.
    (tmp_path / "pocketsphinx.py").write_text("raise ImportError('built for another machine')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        judges.JUDGES, "pocketsphinx", dataclasses.replace(JUDGES["pocketsphinx"], modules=())
    )
    verdict = judge("pocketsphinx", [noise_clip(0.1)])
    assert verdict.values is None
    assert "built for another machine" in verdict.reason


@pytest.mark.parametrize(
    "waveform",
    [np.zeros((2, 10), np.float32), np.zeros(10), np.array([0, np.nan], np.float32)],
    ids=["two channels", "float64", "nan"],
)
def test_waveforms_that_no_judge_can_take_are_refused(waveform):
    with pytest.raises(ValueError, match="waveform"):
        Clip(waveform, 16000)


def test_every_judge_of_the_configuration_exists():
    assert set(EvaluateConfig().judges) == set(JUDGES)
    with pytest.raises(ValueError, match="names a judge twice"):
        EvaluateConfig(judges=("whisper", "whisper"))
