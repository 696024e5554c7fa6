"""KL by timestep, share and codebook, and calibration, against formulas written down apart."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.teachers import load_model
from stages.dataset import Dataset
from stages.metrics import Bootstrap
from stages.paired import Axes, RolloutSums
from stages.profiles import calibration, calibration_error, divergences
from stages.targets import DenseTarget, SparseTarget
from store import PredictionStore
from tests.conftest import write_run

SETTINGS = {
    "samples": 6, "judges": [], "audio_samples": 1, "batch_size": 4, "single_samples": 0,
    "bootstrap_draws": 200,
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory):
    """A run with the teacher of `tiny_run` that is evaluated without students and judges."""
    folder = tmp_path_factory.mktemp("paired")
    document = {k: v for k, v in tiny_run.document.items() if k not in ("prepare", "fit")}
    document |= {"name": "own", "runs": str(folder), "dataset": str(tiny_run.root / "dataset")}
    document |= {"teacher": {"checkpoint": str(tiny_run.root / "teacher")}, "students": {}}
    run = write_run(document | {"evaluate": SETTINGS}, folder)
    run.do("evaluate")
    return run


def report_of(run):
    return json.loads((run.root / "report" / "report.json").read_text())


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def pairs(evaluated, tiny_run):
    """Guided and unguided probabilities [T, C, V] of every rollout, scored one by one."""
    reference = PredictionStore.open(evaluated.root / "report" / "reference")
    dataset = Dataset.open(tiny_run.root / "dataset")
    samples = {sample["sample_id"]: sample for sample in dataset.samples("test")}
    teacher = load_model(tiny_run.root / "teacher", torch.device("cpu"), "fp32")
    teacher.module.eval()
    found = []
    for sample_id, variation in reference.keys():  # noqa: SIM118
        rollout = reference[sample_id, variation]
        codes = torch.from_numpy(rollout.codes.astype(np.int64))[None]
        with torch.inference_mode():
            scores = teacher.score(
                [samples[sample_id]], codes, torch.tensor([len(rollout)]), cfg_scale=1.0
            )
            logits = scores.logits_at(0, torch.arange(len(rollout))).double().numpy()
        logits[..., list(reference.manifest.forbidden)] = -np.inf
        guided = rollout.arrays["full.logits"].astype(np.float64)
        found.append((softmax(guided), softmax(logits)))
    return found


def kl(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0).sum(-1)


def means(report, axis):
    (found,) = [d for d in report["divergences"] if d["axis"] == axis]
    values = [v and v["value"] for v in found["systems"]["teacher_unguided"]["values"]]
    return found["bins"], values, found["systems"]["teacher_unguided"]["predictions"]


def test_kl_by_timestep_share_and_codebook_is_that_of_another_formula(evaluated, pairs):
    report = report_of(evaluated)
    expected = [kl(p, q) for p, q in pairs]
    longest = max(map(len, expected))
    bins, values, counts = means(report, "timestep")
    assert bins == [str(t) for t in range(longest)], "short rollouts have one timestep per bin"
    for timestep in range(longest):
        there = [x[timestep] for x in expected if len(x) > timestep]
        assert values[timestep] == pytest.approx(np.mean(there), rel=1e-3)
        assert counts[timestep] == np.size(there)
    bins, values, _ = means(report, "share")
    assert bins[0] == "0–10\N{NO-BREAK SPACE}%"
    for part in range(10):
        there = [x[t] for x in expected for t in range(len(x)) if t * 10 // len(x) == part]
        assert (values[part] is None) == (not there)
        if there:
            assert values[part] == pytest.approx(np.mean(there), rel=1e-3)
    bins, values, _ = means(report, "codebook")
    assert len(bins) == expected[0].shape[1] > 1
    assert values == pytest.approx(np.concatenate(expected).mean(0), rel=1e-3)


@pytest.mark.parametrize("axis", ["timestep", "share", "codebook"])
@pytest.mark.parametrize("system", ["teacher_guided", "teacher_unguided"])
def test_the_mean_over_all_bins_is_paired_kl(evaluated, axis, system):
    report = report_of(evaluated)
    (found,) = [d for d in report["divergences"] if d["axis"] == axis]
    bins = found["systems"][system]
    above = sum(
        v["value"] * n for v, n in zip(bins["values"], bins["predictions"], strict=True) if n
    )
    assert above / sum(bins["predictions"]) == pytest.approx(
        report[system]["paired_kl"]["value"], rel=1e-9, abs=1e-12
    )
    for value in bins["values"]:
        assert value is None or value["low"] <= value["value"] <= value["high"]


def test_calibration_is_that_of_another_formula(evaluated, pairs):
    report = report_of(evaluated)
    found = report["calibration"]["teacher_unguided"]
    p, q = (
        np.concatenate([x.reshape(-1, x.shape[-1]) for x in xs]) for xs in zip(*pairs, strict=True)
    )
    chosen = q.argmax(-1)
    ours, theirs = (x[np.arange(len(x)), chosen] for x in (q, p))
    error = 0.0
    assert found["edges"][:5] == [0, 0.01, 0.02, 0.05, 0.1]
    assert found["edges"][5:] == pytest.approx(np.arange(2, 11) / 10)
    for place, (low, high) in enumerate(pairwise(found["edges"])):
        inside = (ours >= low) & ((ours < high) | (high == 1))
        assert found["reference"]["predictions"][place] == inside.sum()
        if inside.any():
            assert found["confidence"][place] == pytest.approx(ours[inside].mean(), rel=1e-3)
            value = found["reference"]["values"][place]["value"]
            assert value == pytest.approx(theirs[inside].mean(), rel=1e-3)
            error += inside.mean() * abs(ours[inside].mean() - theirs[inside].mean())
        else:
            assert found["confidence"][place] is found["reference"]["values"][place] is None
    assert error > 0.001
    assert report["teacher_unguided"]["calibration_error"]["value"] == pytest.approx(
        error, rel=1e-2
    )
    assert report["teacher_guided"]["calibration_error"]["value"] < 1e-6, "it is its own reference"
    assert report["codec_copy"]["calibration_error"] is None


@pytest.mark.parametrize("version", ["sums alone", "other bins"])
def test_parts_of_another_version_are_measured_again_and_the_rest_is_kept(evaluated, version):
    before, systems = report_of(evaluated), evaluated.root / "report" / "systems"
    old = {"name": "teacher_unguided", "kl_sum": [0.1], "agreed": [1], "predictions": [2]}
    if version == "other bins":
        old = json.loads((systems / "teacher_unguided.json").read_text())
        for rollout in old["paired"]:
            rollout["confidence"] = {k: v[1:] for k, v in rollout["confidence"].items()}
    (systems / "teacher_unguided.json").write_text(json.dumps(old))
    kept = (systems / "teacher_guided.json").stat().st_mtime_ns
    evaluated.do("evaluate")
    after = report_of(evaluated)
    assert (systems / "teacher_guided.json").stat().st_mtime_ns == kept
    assert after["divergences"] == before["divergences"]
    assert after["teacher_unguided"]["paired_kl"] == before["teacher_unguided"]["paired_kl"]


AXES = Axes(timesteps=50, codebooks=("a", "b", "c"))


def summed(axes, streams, logits, target, predicted):
    """The sums of one rollout whose timesteps come in two blocks."""
    sums = RolloutSums(axes, len(logits), streams)
    for timesteps in torch.arange(len(logits)).split(3):
        sums.add(timesteps, logits[timesteps], target.rows(timesteps), predicted[timesteps])
    return sums.paired()


def test_bins_hold_what_is_predicted_and_streams_stay_at_their_places():
    random = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(5, 2, 8, generator=random) for _ in range(2))
    predicted = torch.ones(5, 2, dtype=torch.bool)
    predicted[0, 1] = predicted[4, 0] = False
    found = summed(AXES, [0, 2], logits, DenseTarget(teacher[None]), predicted)
    assert AXES.timesteps_per_bin == 3
    assert AXES.timestep_bins == 17
    assert found.timesteps.predictions[:3] == (5, 3, 0)
    assert found.shares.predictions == (1, 0, 2, 0, 2, 0, 2, 0, 1, 0)
    assert found.codebooks.predictions == (4, 0, 4)
    assert found.predictions == 8
    assert sum(found.confidence.predictions) == 8
    expected = kl(softmax(teacher.double().numpy()), softmax(logits.double().numpy()))
    expected *= predicted.numpy()
    assert found.codebooks.kl == pytest.approx(
        (expected[:, 0].sum(), 0, expected[:, 1].sum()), rel=1e-5
    )
    assert found.timesteps.kl[:2] == pytest.approx(
        (expected[:3].sum(), expected[3:].sum()), rel=1e-5
    )
    assert found.kl == pytest.approx(expected.sum(), rel=1e-5)
    same = teacher.argmax(-1) == logits.argmax(-1)
    assert found.agreed == int(same[predicted].sum())


def test_confidence_is_not_told_where_the_reference_lacks_probabilities():
    ids = torch.tensor([0, 1]).expand(1, 4, 1, 2)
    target = SparseTarget(ids, torch.zeros(1, 4, 1, 2), torch.full((1, 4, 1, 1), -3.0), (1.0,))
    axes = Axes(timesteps=4, codebooks=("a",))
    found = summed(axes, [0], torch.randn(4, 1, 8), target, torch.ones(4, 1, dtype=torch.bool))
    bootstrap = Bootstrap.over(["a"], draws=100, seed=0)
    assert found.confidence is None
    assert calibration({"student": [found]}, bootstrap) == {}
    assert calibration_error([found], bootstrap) is None
    assert found.kl > 0


def test_a_student_that_is_too_sure_has_the_error_of_its_excess():
    """Teacher 0.5 and student 0.9 on the same id: confident by 0.4 too much, everywhere."""
    axes = Axes(timesteps=4, codebooks=("a",))
    logits, teacher = (torch.tensor([p, 1 - p]).log().expand(4, 1, 2) for p in (0.95, 0.55))
    found = summed(
        axes, [0], logits, DenseTarget(teacher[None]), torch.ones(4, 1, dtype=torch.bool)
    )
    bootstrap = Bootstrap.over(["a", "b"], draws=100, seed=0)
    error = calibration_error([found, found], bootstrap)
    assert (error.value, error.low, error.high) == pytest.approx((0.4, 0.4, 0.4), abs=1e-6)
    told = calibration({"student": [found, found]}, bootstrap)["student"]
    assert told.confidence[-1] == pytest.approx(0.95)
    assert told.reference.values[-1].value == pytest.approx(0.55)
    assert told.reference.predictions == (0,) * 12 + (8,)


def test_intervals_of_calibration_errors_draw_sentences_and_not_bins():
    """One sentence is too sure by 0.2 and one too unsure, in one bin: on average they cancel."""
    ours = np.array([[0.8], [0.8]])
    theirs = np.array([[0.6], [1.0]])
    bootstrap = Bootstrap.over(["a", "b"], draws=2000, seed=0)
    error = bootstrap.error_of_bins(ours, theirs, np.ones((2, 1), np.int64))
    assert error.value == pytest.approx(0)
    assert error.high == pytest.approx(0.2)


def test_no_system_gives_no_divergences():
    bootstrap = Bootstrap.over(["a"], draws=100, seed=0)
    assert divergences({}, AXES, bootstrap) == ()
    assert calibration({}, bootstrap) == {}
