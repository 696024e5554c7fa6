"""An evaluation never mixes models, and reports what each of them costs and how it speaks."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import soundfile
import torch

from stages import judges
from stages.architecture import Architecture
from stages.config import EvaluateConfig
from stages.errors import UserError
from stages.judges import JUDGES
from stages.measure import Measure, Spoken, _write_clip
from stages.metrics import Bootstrap, comparisons
from stages.publish import claim
from stages.verdict import PAIRED, ratios, system_numbers


def clip(audio_s=2.0, **changes):
    facts = {"sounds": True, "longest_run": 1, "repeated_pairs": 0, "repeated_fours": 0}
    return Spoken.model_validate({"audio_s": audio_s, "ends_in_loop": False} | facts | changes)


def system(name, clips, **changes):
    facts = {"architecture": None, "passes": 1, "decode_s": 3.0, "spoken": clips}
    return Measure.model_validate({"name": name} | facts | changes)


def numbers(measure, copy, bounds=(0.5, 2.0)):
    """What the report says of a system of one sentence per clip."""
    samples = [{"text": str(i), "speaker": "a"} for i in range(len(copy.spoken))]
    bootstrap = Bootstrap.over([sample["text"] for sample in samples], draws=100, seed=0)
    return system_numbers(measure, copy, ratios(measure, copy, samples, {}, bounds), bootstrap)


def test_parts_of_an_evaluation_of_other_models_are_refused_and_kept(tmp_path):
    claim(tmp_path / "identity", "first")
    claim(tmp_path / "identity", "first")
    with pytest.raises(UserError, match="other models or settings"):
        claim(tmp_path / "identity", "second")
    assert (tmp_path / "identity").read_text() == "first"


def test_a_report_says_what_a_model_costs_and_nothing_of_a_copy():
    counted = Architecture(
        parameters=1000, parts={"decoder": 1000}, active_parameters=400,
        flops_per_timestep=1500, dense_flops_per_timestep=2500, experts=8, active_experts=2,
    )  # fmt: skip
    bootstrap = Bootstrap.over(["a", "b"], draws=100, seed=0)
    student, copy = (
        system_numbers(measure, measure, {}, bootstrap)
        for measure in (
            system("x", (clip(), clip()), architecture=counted),
            system("codec_copy", (clip(), clip()), passes=0),
        )
    )
    assert student.parameters.value == 1000
    assert student.active_parameters.value == 400
    assert student.flops_per_timestep.value == 1500
    assert student.dense_flops_per_timestep.value == 2500
    assert copy.parameters is copy.flops_per_timestep is None


def test_a_success_ended_by_itself_is_heard_and_is_about_as_long_as_the_recording():
    copy = system("codec_copy", [clip(2.0)] * 7, passes=0)
    spoken = [
        clip(2.0), clip(1.0), clip(4.0), clip(0.99), clip(4.01), clip(2.0, sounds=False), clip(2.0),
    ]  # fmt: skip
    student = system("student", spoken, ended=(True,) * 6 + (False,))
    found = numbers(student, copy)
    assert found.success.value == 3 / 7
    assert found.success.low <= found.success.value <= found.success.high
    assert found.ended.value == 6 / 7
    assert found.silent.value == 1 / 7
    assert numbers(student, copy, bounds=(0.1, 10)).success.value == 5 / 7
    assert numbers(copy, copy).success is numbers(copy, copy).ended is None


def test_durations_are_described_by_mean_and_quantiles_in_seconds_and_against_the_recording():
    seconds, recorded = np.linspace(1, 3, 21), np.linspace(2, 1, 21)
    copy = system("codec_copy", [clip(s) for s in recorded], passes=0)
    found = numbers(system("student", [clip(s) for s in seconds]), copy)
    assert found.duration_s.value == pytest.approx(2.0)
    assert found.duration_s.low < 2.0 < found.duration_s.high
    assert found.duration_median_s.value == pytest.approx(2.0)
    assert found.duration_p5_s.value == pytest.approx(1.1)
    assert found.duration_p95_s.value == pytest.approx(2.9)
    assert found.duration_p5_s.low is None
    each = seconds / recorded
    assert found.duration_ratio.value == pytest.approx(seconds.sum() / recorded.sum())
    assert found.duration_ratio_mean.value == pytest.approx(each.mean())
    assert found.duration_ratio_median.value == pytest.approx(sorted(each)[10])
    assert found.duration_ratio_p5.value == pytest.approx(sorted(each)[1])
    assert found.duration_ratio_p95.value == pytest.approx(sorted(each)[19])


def test_real_time_factors_are_seconds_of_generation_per_second_of_audio():
    copy = system("codec_copy", [clip(1.0)] * 3, passes=0, decode_s=9.0)
    student = system("student", [clip(1.0), clip(2.0), clip(3.0)], decode_s=3.0, single_s=(0.8, 1))
    found = numbers(student, copy)
    assert found.rtf.value == 3.0 / 6.0
    assert found.rtf_single.value == pytest.approx(1.8 / 3.0), "of the first two alone"
    assert 0.5 - 1e-9 <= found.rtf_single.low <= found.rtf_single.high <= 0.8 + 1e-9
    assert numbers(copy, copy).rtf is numbers(copy, copy).rtf_single is None


def test_a_system_that_says_nothing_has_no_real_time_factor():
    copy = system("codec_copy", [clip(1.0)] * 2, passes=0)
    mute = system("student", [clip(0.0, sounds=False)] * 2, ended=(True, True), single_s=(0.1,))
    found = numbers(mute, copy)
    assert found.rtf is found.rtf_single is None
    assert found.success.value == found.duration_s.value == 0
    assert found.silent.value == 1


def test_repetition_is_averaged_over_clips():
    spoken = [
        clip(longest_run=3, repeated_pairs=0.5, repeated_fours=0.25, ends_in_loop=True),
        clip(longest_run=1),
    ]
    found = numbers(system("student", spoken), system("codec_copy", spoken, passes=0))
    assert found.longest_run_frames.value == 2
    assert found.repeated_pairs.value == 0.25
    assert found.repeated_fours.value == 0.125
    assert found.looped.value == 0.5


def test_successes_of_systems_are_compared_in_pairs():
    bootstrap = Bootstrap.over(["a", "b"], draws=100, seed=0)
    copy = system("codec_copy", [clip()] * 2, passes=0)
    samples = [{"text": text, "speaker": "a"} for text in "ab"]
    found = {
        name: ratios(system(name, [clip()] * 2, ended=ended), copy, samples, {}, (0.5, 2))
        for name, ended in (("teacher_guided", (1, 1)), ("student", (1, 0)))
    }
    (pair,) = [c for c in comparisons(found, bootstrap, PAIRED) if c.metric == "success"]
    assert (pair.system, pair.against, pair.difference.value) == ("student", "teacher_guided", -0.5)


class Decoder:
    """An audio codec of two codes per frame and ten samples each, as loud as the first says."""

    frame_rate_hz, codebooks, output_sample_rate_hz = 4.0, 2, 40

    def decode(self, codes):
        assert len(codes), "no audio codec is asked for nothing"
        level = torch.tensor([0.5, 1.1e-3, 0.9e-3, float("nan")])
        return level[torch.from_numpy(codes[:, 0])].repeat_interleave(10)


@pytest.mark.parametrize(
    ("first", "sounds"),
    [([0, 0], True), ([1, 1], True), ([2, 2], False), ([0, 3], False), ([], False)],
    ids=["loud", "above -60 dBFS", "below", "not finite", "empty"],
)
def test_a_clip_sounds_when_it_is_finite_and_not_silent(tmp_path, first, sounds):
    frames = np.array([[code, 0] for code in first], np.int64).reshape(-1, 2)
    spoken = _write_clip(tmp_path / "clip.wav", frames, Decoder())
    assert spoken.sounds is sounds
    assert spoken.audio_s == len(first) / 4
    waveform, rate_hz = soundfile.read(tmp_path / "clip.wav")
    assert (len(waveform), rate_hz) == (10 * len(first), 40)
    assert np.isfinite(waveform).all()


@pytest.mark.parametrize("bounds", [(0, 2), (1.1, 2), (0.5, 0.9)])
def test_a_plausible_duration_holds_that_of_the_recording(bounds):
    with pytest.raises(ValueError, match="recording's own duration"):
        EvaluateConfig(plausible_duration=bounds)


WITH_INTERVALS = (
    "success", "ended", "silent", "duration_s", "duration_ratio", "duration_ratio_mean", "looped",
    "longest_run_frames", "repeated_pairs", "repeated_fours", "rtf_single",
)  # fmt: skip


@pytest.fixture
def evaluated(run_of, tiny_run, monkeypatch):
    """A run that is evaluated with judges of which no package is installed, and its report."""
    for name in JUDGES:
        absent = dataclasses.replace(JUDGES[name], modules=(f"{name}_of_tomorrow",))
        monkeypatch.setitem(judges.JUDGES, name, absent)
    settings = {"samples": 3, "audio_samples": 2, "batch_size": 2, "single_samples": 2}
    run = run_of(fitted=True, students={}, evaluate=settings)
    run.do("evaluate")
    return run, json.loads((run.root / "report" / "report.json").read_text())


def test_without_any_judge_an_evaluation_says_so_and_measures_the_rest(evaluated):
    run, report = evaluated
    assert [use["name"] for use in report["judges"]] == list(JUDGES)
    for use in report["judges"]:
        assert "of_tomorrow missing" in use["reason"]
        assert any(use["reason"] in warning for warning in report["warnings"])
    for name in ("teacher_guided", "teacher_unguided"):
        found = report[name]
        assert all(found[m] is None for m in ("wer", "cer", "mos", "speaker_similarity"))
        for metric in WITH_INTERVALS:
            assert found[metric]["low"] <= found[metric]["value"] <= found[metric]["high"]
        assert found["rtf"]["value"] > 0
    assert report["codec_copy"]["success"] is None
    assert report["codec_copy"]["duration_ratio_median"]["value"] == 1
    page = (run.root / "report" / "report.html").read_text()
    assert "in batches of 2" in page
    assert "Looped tail" in page
