"""Continuous streams end to end: a teacher's predictions are stored, read at any scale, learned."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages import capture
from stages.architecture import Architecture
from stages.config import DatasetFacts, RolloutConfig, TrainConfig
from stages.distributed import Place
from stages.family import Branch, Branches, Scores, Step
from stages.guidance import guide
from stages.interruption import StopRequest
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out
from stages.train import TargetLearner, train
from store import PredictionStore, verify
from store.schema import Latent
from tests.test_train import FACTS

HERE = Place(0, 1, torch.device("cpu"))
STREAMS, SHAPE, SCALE = 2, (4, 3), 2.5
SAMPLES = [{"sample_id": f"clip {n}", "text": "ab", "timesteps": 2 + n % 4} for n in range(6)]


class Field:
    """The smallest family of continuous streams: a vector field over noise levels, no codes.

    What it predicts is a function of the sample, the level and whether the condition is given.
    """

    name, heads, forbidden, end_id, predicted = "codec_lm", (), (), None, None
    timestep_s, conditions, condition_dropout = 0.1, ("text", "timesteps"), 0.1
    facts: DatasetFacts = FACTS
    config = SimpleNamespace()
    streams = tuple(Latent(name=f"noise.{i}", group="noise", shape=SHAPE) for i in range(STREAMS))

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.module = self.network = torch.nn.Linear(3, STREAMS * 12)

    def fingerprint(self) -> str:
        return "t"

    def tokenizer_fingerprint(self) -> str:
        return "k"

    def architecture(self) -> Architecture:
        return Architecture(
            parameters=96, parts={"field": 96}, active_parameters=96,
            flops_per_timestep=144, dense_flops_per_timestep=144,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def check(self, sampler) -> None:
        pass

    def check_sample(self, sample, timesteps) -> None:
        pass

    def timesteps(self, sample) -> int:
        return sample["timesteps"]

    def reference_codes(self, sample) -> torch.Tensor:
        return torch.zeros(sample["timesteps"], STREAMS, dtype=torch.int64)

    def predict(self, samples, timesteps: torch.Tensor, given: float) -> torch.Tensor:
        """Predictions [b, C, *shape] of one level each."""
        place = torch.tensor([float(sample["sample_id"][-1]) for sample in samples])
        conditions = torch.stack([place * given, timesteps.float(), torch.full_like(place, given)])
        return self.network(conditions.T).view(-1, STREAMS, *SHAPE)

    def branches(self, samples, timesteps, scale: float, both: bool):
        """Guided predictions, and both branches in parts of one stream."""
        cond = self.predict(samples, timesteps, 1.0)
        if scale == 1 and not both:
            return cond, Branches(Branch(cond.split(1, 1)), None)
        uncond = self.predict(samples, timesteps, 0.0)
        parts = Branches(Branch(cond.split(1, 1)), Branch(uncond.split(1, 1)))
        return guide(cond, uncond, scale), parts

    def rollout(self, samples, policy, cfg_scale, *, both_branches=False):
        lengths = torch.tensor([sample["timesteps"] for sample in samples])
        for timestep in range(int(lengths.max())):
            rows = (lengths > timestep).nonzero()[:, 0]
            running, level = [samples[row] for row in rows], torch.full((len(rows),), timestep)
            guided, branches = self.branches(running, level, cfg_scale, both_branches)
            policy.finish(rows[lengths[rows] == timestep + 1])
            codes = torch.zeros(len(rows), STREAMS, dtype=torch.int64)
            yield Step(rows, timestep, codes, guided, branches)

    def score(self, samples, codes, lengths, *, cfg_scale=1.0, both_branches=False, linear=False,
              local=True):  # fmt: skip
        frame = codes.shape[:2]
        each = [sample for sample in samples for _ in range(frame[1])]
        levels = torch.arange(frame[1]).repeat(frame[0])
        guided, branches = self.branches(each, levels, cfg_scale, both_branches)

        def padded(branch: Branch | None) -> Branch | None:
            return branch and Branch(tuple(x.unflatten(0, frame) for x in branch.logits))

        parts = Branches(padded(branches.cond), padded(branches.uncond))
        return Scores(guided.unflatten(0, frame), branches=parts)


def store_of(
    path: Path, branches: str = "both", source: str = "teacher", **more
) -> PredictionStore:
    config = RolloutConfig.model_validate(
        {
            "source": source, "guidance": {"scale": SCALE}, "sampler": {"max_timesteps": 9},
            "target": {"kind": "dense", "branches": branches, "dtype": "float32"},
            "variations": 1, "rollouts_per_shard": 4, "batch_size": 3,
        } | more
    )  # fmt: skip
    teacher = Field(0)
    store = create_store(
        path,
        teacher,
        lay_out(config, teacher, SAMPLES, facts=FACTS, dataset_fingerprint="d", seed=0),
    )
    by_id = {sample["sample_id"]: sample for sample in SAMPLES}
    size = config.batch_size
    assert rollout(teacher, store, by_id, store.missing(), batch_size=size, stop=StopRequest())
    return PredictionStore.open(path)


def exact(sample, given: float, seed: int = 0) -> np.ndarray:
    """What a field predicts of all levels of one sample, [T, C, *shape]."""
    levels = torch.arange(sample["timesteps"])
    with torch.no_grad():
        return Field(seed).predict([sample] * len(levels), levels, given).numpy()


@pytest.mark.parametrize("blocks", [1, 10**9], ids=["each step", "all"])
@pytest.mark.parametrize("source", ["teacher", "dataset"])
@pytest.mark.parametrize("branches", ["guided", "both"])
def test_stage_one_stores_what_a_teacher_of_continuous_streams_predicts(
    tmp_path, monkeypatch, branches, source, blocks
):
    monkeypatch.setattr("stages.capture.CPU_BLOCK_VALUES", blocks)
    store = store_of(tmp_path / "store", branches, source)
    assert verify(store.path).ok
    for sample in SAMPLES:
        one = store[sample["sample_id"], 0]
        cond, uncond = exact(sample, 1.0), exact(sample, 0.0)
        expected = {"dense.guided": uncond + SCALE * (cond - uncond)}
        if branches == "both":
            expected = {"dense.cond": cond, "dense.delta": cond - uncond}
        assert one.arrays.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(one.arrays[name], values, atol=2e-6)
        assert (one.stop_reason, one.weight, len(one)) == ("end", 1.0, sample["timesteps"])


def test_predictions_of_a_teacher_without_guidance_are_stored_as_they_are(tmp_path):
    store = store_of(tmp_path / "store", "guided", guidance={"scale": 1.0})
    for sample in SAMPLES:
        (values,) = store[sample["sample_id"], 0].arrays.values()
        np.testing.assert_allclose(values, exact(sample, 1.0), atol=1e-6)


def test_a_teacher_that_predicts_nan_is_named_and_nothing_is_stored(tmp_path, monkeypatch):
    predict = Field.predict
    monkeypatch.setattr(Field, "predict", lambda *a: predict(*a) / (a[3] > 0))
    with pytest.raises(FloatingPointError, match=r"NaN or infinity while scoring 'clip \d'"):
        store_of(tmp_path / "store")
    assert PredictionStore.open(tmp_path / "store").committed == []


def test_of_two_batches_the_one_whose_predictions_are_nan_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("stages.capture.CPU_BLOCK_VALUES", 1)
    predict, cut, refused = Field.predict, capture._cut, threading.Event()

    def spoil_the_first_batch(family, samples, timesteps, given):
        if not refused.is_set() and seen and seen[0] != samples[0]["sample_id"]:
            assert refused.wait(20)
            time.sleep(0.05)  # until the thread has noted its failure
        seen.append(samples[0]["sample_id"])
        return predict(family, samples, timesteps, given) / (samples[0]["sample_id"] != seen[0])

    def refuse(blocks):
        try:
            return cut(blocks)
        finally:
            refused.set()

    seen = []
    monkeypatch.setattr(Field, "predict", spoil_the_first_batch)
    monkeypatch.setattr(capture, "_cut", refuse)
    with pytest.raises(FloatingPointError) as caught:
        store_of(tmp_path / "store", "guided", batch_size=1)
    assert str(caught.value).count("while scoring") == 1
    assert f"while scoring {seen[0]!r}" in str(caught.value)
    assert not caplog.records, "one failure is told once"


def config_of(**loss) -> TrainConfig:
    optimizer = {
        "steps": 30, "batch_size": 6, "learning_rate": 0.1, "warmup_steps": 1, "log_every": 1,
        "weight_decay": 0.0,
    }  # fmt: skip
    model = {"family": "codec_lm", "d_model": 8, "heads": 1}
    loss = {"kl": 0.0, "mse": 1.0} | loss
    return TrainConfig.model_validate({"model": model, "loss": loss, "optimizer": optimizer})


def learned(store: PredictionStore, **loss) -> float:
    """Mean square error of a fresh student on the first batch, and that it has a gradient."""
    student = Field(1)
    learner = TargetLearner(student, store, config_of(**loss), 0, HERE)
    (batch,) = learner.batches(0)
    objective = learner.objective(0, batch)
    objective.total.backward()
    learner.close()
    assert student.module.weight.grad.abs().max() > 1e-3
    return float(objective.terms["mse"]) / batch.weight


def error_at(scale: float) -> float:
    """That error by its definition."""
    squares = [
        (exact(s, 1.0, seed=1) - (1 - scale) * exact(s, 0.0) - scale * exact(s, 1.0)) ** 2
        for s in SAMPLES
    ]
    return float(np.concatenate(squares).mean())


def test_stage_two_reads_both_branches_at_a_scale_and_at_a_random_one(tmp_path):
    store = store_of(tmp_path / "store")
    for scale in (0.0, 1.0, 4.0):
        assert learned(store, guidance_scale=scale) == pytest.approx(error_at(scale), rel=1e-4)
    drawn = learned(store, guidance_scale=[1.0, 4.0])
    assert error_at(1.0) < drawn < error_at(4.0)
    guided = learned(store_of(tmp_path / "guided", "guided"))
    assert guided == pytest.approx(error_at(SCALE), rel=1e-4)


@pytest.mark.parametrize(
    ("branches", "loss"),
    [("guided", {}), ("both", {"guidance_scale": 2.0}), ("both", {"guidance_scale": [1.0, 3.0]})],
    ids=["guided", "a scale", "a random scale"],
)
def test_a_student_of_continuous_streams_learns_from_the_store(tmp_path, branches, loss):
    store, student = store_of(tmp_path / "store", branches), Field(1)
    folder = tmp_path / "student"
    assert train(
        student, store, config_of(**loss), folder,
        seed=0, identity="", place=HERE, stop=StopRequest(),
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["mse"] < 0.3 * lines[0]["mse"]
