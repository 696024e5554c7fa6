"""The loss of a batch of MagpieTTS rollouts equals what NeMo's online distillation computes.

Stage one writes a store, stage two reads it; NeMo's own `_process_batch_distillation` is given the
stored rollouts in place of those that it would draw: first with our masks, then as NeMo's own
teacher returns them for the same codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.config import RolloutConfig, TrainConfig
from stages.distributed import Place
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.replay import open_replay
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out
from stages.train import TargetLearner, require_match
from store import PredictionStore
from tests.magpie_models import VOCABULARY, Models, batch_of, frames_of, quiet, samples_of, training

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "stacked by 2": {"frame_stacking": 2},
    "experts": {"experts": 4},
    "experts, stacked by 2": {"experts": 3, "frame_stacking": 2},
    "no local transformer": {"local_transformer": False},
}
LEVELS = {"kind": "full", "dtype": "float32", "levels": True}
SAMPLES = samples_of(4, equal=True)
PLACE = Place(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def models(require, tmp_path_factory) -> Models:
    require("nemo", "pip install 'foretell[magpie]'")
    return Models(tmp_path_factory.mktemp("magpie_loss"))


def drawn(limit: int, least: int, target: dict[str, Any]) -> dict[str, Any]:
    """The section `rollout` of these stores."""
    return {
        "guidance": {"scale": 2.5},
        "sampler": {
            "temperature": 0.7, "top_k": 40, "min_timesteps": least, "max_timesteps": limit,
            "reference_multiple": 1.25, "truncated_weight": 0.1, "max_timesteps_weight": 1.0,
        },
        "target": target,
        "batch_size": 4,
    }  # fmt: skip


def store_of(models: Models, teacher: Any, path: Path, target: dict[str, Any]) -> PredictionStore:
    """Rollouts of which some are truncated and so weigh less, and some reach the limit."""
    least, limit = (6, 8) if teacher.layout.frames_per_step == 1 else (4, 5)
    config = RolloutConfig.model_validate(drawn(limit, least, target))
    store = create_store(
        path,
        teacher,
        lay_out(config, teacher, SAMPLES, facts=models.facts(), dataset_fingerprint="", seed=3),
    )
    by_id = {sample["sample_id"]: sample for sample in SAMPLES}
    assert rollout(teacher, store, by_id, store.missing(), batch_size=4, stop=StopRequest())
    return PredictionStore.open(path)


def learner_of(student: Any, store: PredictionStore, loss: dict[str, Any]) -> TargetLearner:
    config = TrainConfig.model_validate(
        {
            "model": {"family": "magpie", "nemo": "unused.yaml"},
            "loss": {"recipe": "nemo", "local_start_step": 0, "local_ramp_steps": 0} | loss,
            "optimizer": {"steps": 10, "batch_size": 4},
        }
    )
    return TargetLearner(student, store, config, 0, PLACE)


@contextmanager
def first_batch(student: Any, store: PredictionStore, **loss: Any) -> Iterator[tuple[Any, Any]]:
    learner = learner_of(student, store, loss)
    try:
        (batch,) = learner.batches(0)
        yield learner, batch
    finally:
        learner.close()


def online(models: Models, student: Any, teacher: Path, shape: dict[str, Any], **more: Any) -> Any:
    """NeMo's student with our student's weights, and a teacher that is never asked."""
    from nemo.collections.tts.models.magpietts_cfg_distillation import OnlineCFGDistillation
    from omegaconf import OmegaConf

    settings = {
        "teacher_model_path": str(teacher),
        "distill_local_transformer": student.module.local,
        "lt_distillation_start_step": 0,
        "lt_distillation_ramp_len": 0,
    }
    with quiet():
        model = OnlineCFGDistillation(OmegaConf.create(models.config(**shape) | settings | more))
        model.load_state_dict(student.module.model.state_dict())
    return model


def injected(monkeypatch: Any, output: Any) -> None:
    """Let NeMo's distillation take these rollouts for its teacher's."""
    from nemo.collections.tts.models import magpietts_cfg_distillation as distillation

    monkeypatch.setattr(distillation, "_infer_batch_teacher", lambda **_: output)


def teacher_output(store: PredictionStore, batch: Any, stacking: int) -> Any:
    """The rollouts of a batch as NeMo holds them: frames, absolute logits, lengths, weights."""
    from nemo.collections.tts.models.magpietts_cfg_distillation import _TeacherOutput

    rollouts = [store[key] for key in batch.keys]
    steps = max(len(found) for found in rollouts)
    codes = torch.zeros(len(rollouts), steps, len(store.manifest.streams), dtype=torch.int64)
    logits = torch.zeros(*codes.shape, VOCABULARY)
    for row, found in enumerate(rollouts):
        relative = torch.from_numpy(np.array(found.arrays["full.logits"]))
        levels = torch.from_numpy(np.array(found.arrays["full.levels"]))
        codes[row, : len(found)] = torch.from_numpy(np.array(found.codes).astype(np.int64))
        logits[row, : len(found)] = relative + levels.unsqueeze(-1)
    streams = 4 * stacking
    local = codes.shape[-1] > streams
    return _TeacherOutput(
        codes=frames_of(codes[..., :streams]),
        logits=logits[:, :, :streams].flatten(2),
        lens=torch.tensor([len(found) * stacking for found in rollouts]),
        sample_weights=torch.tensor([found.weight for found in rollouts]),
        codes_lt=frames_of(codes[..., streams:]) if local else None,
        logits_lt=logits[:, :, streams:].flatten(2) if local else None,
    )


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_the_joint_loss_of_a_batch_and_its_gradient_equal_nemos(
    models, tmp_path, monkeypatch, case, temperature
):
    shape = CASES[case] | {"dropout": 0.0}
    path, stacking = models.archive(**shape), shape.get("frame_stacking", 1)
    student = models.student(path, seed=5)
    store = store_of(models, models.teacher(path), tmp_path / "store", LEVELS)
    settings = {"kl": "joint", "temperature": temperature}
    with first_batch(student, store, **settings) as (learner, batch), training(student.module):
        assert len({store[key].weight for key in batch.keys}) > 1, "weights must differ"
        assert len(set(batch.lengths)) > 1, "lengths must differ"
        ours = learner.objective(0, batch)
        (ours.total / batch.weight).backward()
        injected(monkeypatch, teacher_output(store, batch, stacking))
        nemo = online(models, student, path, shape, distillation_temperature=temperature)
        samples = {sample["sample_id"]: sample for sample in SAMPLES}
        chosen = batch_of(nemo, [samples[sample_id] for sample_id, _ in batch.keys])
        chosen |= {"audio_codes": torch.zeros(4, 4, 3, dtype=torch.int64)}
        chosen |= {"audio_codes_lens": torch.full((4,), 3)}
        with training(nemo), quiet():
            theirs = nemo._process_batch_distillation(chosen)
            theirs["loss"].backward()
    torch.testing.assert_close(ours.total / batch.weight, theirs["loss"], atol=1e-5, rtol=1e-5)
    found, expected = gradients(student.module.model), gradients(nemo)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("target", [LEVELS, {"kind": "hidden", "dtype": "float32"}])
def test_a_student_of_the_decoders_streams_learns_as_from_a_store_of_these_alone(
    models, tmp_path, target
):
    path = models.archive(dropout=0.0)
    both = store_of(models, models.teacher(path), tmp_path / "both", target)
    teacher = models.teacher(path, local_streams=False)
    replay = open_replay(tmp_path / "both", teacher, "", tmp_path / "alone")
    source = {"source": "replay", "replay": tmp_path / "both"}
    config = RolloutConfig.model_validate(drawn(8, 6, target) | source)
    alone = create_store(
        tmp_path / "alone",
        teacher,
        lay_out(
            config,
            teacher,
            SAMPLES,
            facts=models.facts(),
            dataset_fingerprint="",
            seed=3,
            replay=replay,
        ),
    )
    by_id = {sample["sample_id"]: sample for sample in SAMPLES}
    assert rollout(
        teacher, alone, by_id, alone.missing(), batch_size=4, stop=StopRequest(), draws=replay
    )
    found = []
    for store in (both, PredictionStore.open(tmp_path / "alone")):
        student = models.student(path, seed=5, local_streams=False)
        require_match(student, store.manifest)
        with first_batch(student, store, kl="joint") as (learner, batch):
            loss = learner.objective(0, batch).total / batch.weight
            loss.backward()
        found.append((loss.detach(), gradients(student.module)))
    (ours, gradient), (theirs, expected) = found
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert gradient.keys() == expected.keys()
    for name, reference in expected.items():
        torch.testing.assert_close(gradient[name], reference, atol=1e-6, rtol=1e-4, msg=name)
    with pytest.raises(UserError, match=r"streams \(.*local\.0:72"):
        require_match(models.student(path), PredictionStore.open(tmp_path / "alone").manifest)


@pytest.mark.parametrize("case", ["dense", "experts, stacked by 2"])
def test_before_its_start_no_gradient_reaches_the_local_transformer_and_nothing_else_lacks_one(
    models, tmp_path, case
):
    path = models.archive(**CASES[case])
    student = models.student(path, like=path)
    store = store_of(models, models.teacher(path), tmp_path / "store", LEVELS)
    with first_batch(student, store, local_start_step=2) as (learner, batch):
        for step in (1, 2):
            student.module.zero_grad(set_to_none=True)
            learner.objective(step, batch).total.backward()
            named = dict(student.module.named_parameters())
            alone = {name for name, parameter in named.items() if parameter.grad is None}
            local = {name for name in named if "local_transformer" in name}
            assert alone == (local if step == 1 else set())


def forced(monkeypatch: Any, codes: Tensor, streams: int) -> None:
    """Let whatever draws get these codes [B, T, C]; NeMo draws one stream of the batch at a time.

    At every step it draws all streams of the decoder, the likeliest of each, which stay, and then
    those of the local transformer, with a second row for each without conditions.
    """
    calls, local = itertools.count(), codes.shape[-1] > streams
    multinomial = torch.multinomial

    def drawn_codes(probabilities: Tensor, count: int, **named: Any) -> Tensor:
        step, place = divmod(next(calls), streams * (3 if local else 2))
        if streams <= place < 2 * streams:
            return multinomial(probabilities, count, **named)
        stream = place if place < streams else place - streams
        given = codes[:, step, stream].unsqueeze(-1)
        return given.repeat(len(probabilities) // len(given), 1)

    monkeypatch.setattr(torch, "multinomial", drawn_codes)


def nemo_teacher(stock: Any, chosen: Any, output: Any, least: int, **settings: Any) -> Any:
    """What NeMo's teacher returns when it draws the codes of `output`, of these lengths.

    `least` frames have no end: NeMo's is 4.
    """
    from nemo.collections.tts.models import magpietts_cfg_distillation as distillation

    stacking, local = stock.frame_stacking_factor, output.codes_lt is not None
    parts = [output.codes, output.codes_lt] if local else [output.codes]
    codes = torch.cat([part.mT.reshape(len(part), -1, 4 * stacking) for part in parts], -1)
    with pytest.MonkeyPatch.context() as monkeypatch, quiet():
        forced(monkeypatch, codes, 4 * stacking)
        monkeypatch.setattr(stock, "detect_eos", lambda **_: float("inf"))
        found = distillation._infer_batch_teacher(
            model=stock, batch=chosen, use_lt=local, cfg_scale=2.5, topk=40,
            max_decoder_steps=codes.shape[1] * stacking, min_generated_frames=least,
        )  # fmt: skip
    assert torch.equal(found.codes, output.codes)
    assert not local or torch.equal(found.codes_lt, output.codes_lt)
    return replace(output, logits=found.logits, logits_lt=found.logits_lt)


def masked(output: Any, forbidden: tuple[int, ...]) -> Any:
    """The same with the ids that nobody may draw masked for the local transformer too."""
    if output.logits_lt is None:
        return output
    by_stream = output.logits_lt.unflatten(-1, (-1, VOCABULARY)).clone()
    by_stream[..., list(forbidden)] = float("-inf")
    return replace(output, logits_lt=by_stream.flatten(2))


@pytest.mark.parametrize("case", CASES)
def test_what_nemos_own_teacher_returns_differs_by_its_masks_alone(
    models, tmp_path, monkeypatch, case
):
    """NeMo keeps the local transformer's forbidden ids and masks the end in its first frames."""
    shape = CASES[case] | {"dropout": 0.0}
    path, stacking = models.archive(**shape), shape.get("frame_stacking", 1)
    student, stock = models.student(path, seed=5), models.stock(path)
    store = store_of(models, models.teacher(path), tmp_path / "store", LEVELS)
    samples = {sample["sample_id"]: sample for sample in SAMPLES}
    with first_batch(student, store, kl="joint") as (learner, batch), training(student.module):
        ours = float(learner.objective(0, batch).total.detach() / batch.weight)
        output = teacher_output(store, batch, stacking)

        def batch_for(model: Any) -> dict[str, Any]:
            given = batch_of(model, [samples[sample_id] for sample_id, _ in batch.keys])
            given |= {"audio_codes": torch.zeros(4, 4, 3, dtype=torch.int64)}
            return given | {"audio_codes_lens": torch.full((4,), 3)}

        stock_batch = batch_for(stock)
        early, plain = (nemo_teacher(stock, stock_batch, output, least) for least in (4, 0))
        nemo = online(models, student, path, shape)
        losses = []
        for given in (early, masked(early, student.forbidden), masked(plain, student.forbidden)):
            injected(monkeypatch, given)
            with training(nemo), quiet(), torch.no_grad():
                losses.append(float(nemo._process_batch_distillation(batch_for(nemo))["loss"]))
    assert losses[2] == pytest.approx(ours, rel=1e-5)
    assert losses[0] == pytest.approx(ours, rel=2e-3)
    assert abs(losses[1] / ours - 1) > 2e-5, "the end in the first frames is part of the gap"
    if student.module.local:
        assert abs(losses[0] / losses[1] - 1) > 2e-5, "so are the ids of the local transformer"


def test_a_student_that_equals_its_teacher_has_no_loss_per_codebook_and_one_with_joint(
    models, tmp_path, monkeypatch
):
    path = models.archive(dropout=0.0)
    teacher, student = models.teacher(path), models.student(path, like=path)
    store = store_of(models, teacher, tmp_path / "store", LEVELS)

    def guided(samples: Any, codes: Tensor, lengths: Tensor, **_: Any) -> Any:
        """What a student says that has learned all there is to learn."""
        return teacher.score(samples, codes, lengths, cfg_scale=2.5, linear=True)

    monkeypatch.setattr(student, "score", guided)
    losses = {}
    for kl in ("per_codebook", "joint"):
        with first_batch(student, store, kl=kl, alpha=0.0) as (learner, batch), torch.no_grad():
            losses[kl] = float(learner.objective(0, batch).total / batch.weight)
    assert losses["per_codebook"] == pytest.approx(0.0, abs=1e-4)
    assert losses["joint"] > 1e-3, "ids that nobody may draw take part in 3.0.0"
