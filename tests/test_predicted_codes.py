"""A family that predicts only some of its codes is taught, judged and counted by these alone."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.causal_lm_config import SlotLayoutConfig
from stages.config import FitConfig, RolloutConfig
from stages.data import StoreBatches, rollout_batches
from stages.distributed import Place
from stages.errors import UserError
from stages.families.codec_lm import CodecLM
from stages.fit import CodeLearner
from stages.host_batches import Span, host_batch, restored_batch
from stages.host_memory import HostMemory
from stages.interruption import StopRequest
from stages.measure import _compare
from stages.paired import Axes
from stages.rollout_plan import create_store, lay_out
from stages.sampling import mask_forbidden
from stages.slot_layout import SlotLayout
from stages.train import TargetLearner, train
from store import PredictionStore
from store.schema import Full, TopK
from store.synthetic import (
    synthetic_arrays,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)
from tests.test_data import config_of as reading
from tests.test_train import FACTS, HERE, SAMPLES, SCALE, config_of, family_of, learned, store_of

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def partly(codes: Tensor) -> Tensor:
    """Hide the second stream of a timestep whose first code is odd."""
    marks = torch.ones_like(codes, dtype=torch.bool)
    marks[..., 1] = codes[..., 0] % 2 == 0
    return marks


def nothing(codes: Tensor) -> Tensor:
    return torch.zeros_like(codes, dtype=torch.bool)


class Partly(CodecLM):
    predicted = staticmethod(partly)


class Nothing(CodecLM):
    predicted = staticmethod(nothing)


Values = dict[str, list[tuple[Tensor, Tensor]]]


def by_definition(student: CodecLM, teacher: CodecLM) -> Values:
    """Per sample (value, mark) of every prediction [T, C], by term: kl, ce, agreement."""
    found: Values = {"kl": [], "ce": [], "hits": [], "agreed": []}
    for sample in SAMPLES:
        codes = teacher.reference_codes(sample)
        marks = torch.tensor([[True, int(first) % 2 == 0] for first, _ in codes])
        batch = [sample], codes[None], torch.tensor([len(codes)])
        with torch.no_grad():
            teacher.module.eval()
            theirs = teacher.score(*batch, cfg_scale=SCALE).logits[0]
        ours = student.score(*batch).logits[0]
        p, q = (
            mask_forbidden(x.double(), student.forbidden).log_softmax(-1) for x in (theirs, ours)
        )
        kl = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
        found["kl"].append((kl, marks))
        found["ce"].append((-q.gather(-1, codes.unsqueeze(-1)).squeeze(-1), marks))
        found["hits"].append((q.argmax(-1) == codes, marks))
        found["agreed"].append((q.argmax(-1) == p.argmax(-1), marks))
    assert any(not marks.all() for _, marks in found["kl"])
    return found


def gradients(family: CodecLM) -> dict[str, Tensor]:
    return {n: p.grad for n, p in family.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mean", ["predictions", "rollouts"])
@pytest.mark.parametrize("kind", ["full", "hidden"])
def test_a_student_learns_from_predicted_codes_and_their_mean_is_over_these(tmp_path, kind, mean):
    loss = {"kl": 0.7, "ce": 0.3, "mean": mean}
    objective, gradient, batch = learned(store_of(tmp_path / "store", kind), loss, kind=Partly)
    reference = family_of(1)
    found = by_definition(reference, family_of(0))
    each = [
        (0.7 * kl + 0.3 * ce)[marks]
        for (kl, marks), (ce, _) in zip(found["kl"], found["ce"], strict=True)
    ]
    means = {"predictions": torch.cat(each), "rollouts": torch.stack([x.mean() for x in each])}
    expected = means[mean].mean() * batch.weight
    expected.backward()
    found_total = float(objective.total.detach())
    assert found_total == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, value in gradients(reference).items():
        torch.testing.assert_close(gradient[name], value, atol=1e-3, rtol=1e-3)


def test_nothing_is_read_of_what_is_not_predicted(tmp_path):
    store, found = store_of(tmp_path / "store", "full"), []
    for dirty in (False, True):
        student = family_of(1, kind=Partly)
        with closing(TargetLearner(student, store, config_of({}), 0, HERE)) as learner:
            (batch,) = learner.batches(0)
            hidden = batch.arrays["predicted"] == 0
            assert hidden[:, :3].any()
            if dirty:
                batch.arrays["full.logits"][hidden] = float("nan")
            objective = learner.objective(0, batch)
        objective.total.backward()
        found.append((objective.total.detach(), gradients(student)))
    (clean, expected), (total, gradient) = found
    assert torch.equal(total, clean)
    for name in expected:
        assert torch.equal(gradient[name], expected[name])


def test_a_teacher_is_fitted_to_predicted_codes_and_judged_by_them():
    family = family_of(1, kind=Partly)
    config = FitConfig.model_validate(
        {
            "optimizer": {"steps": 1, "batch_size": 6},
            "condition_dropout": 0.0, "dev_batches": 1, "codebook_weights": [3.0, 1.0],
        }
    )  # fmt: skip
    learner = CodeLearner(family, SAMPLES, SAMPLES, config, 0, HERE)
    (batch,) = learner.batches(0)
    objective = learner.objective(0, batch)
    objective.total.backward()

    reference = family_of(1)
    found = by_definition(reference, family_of(0))
    weights = torch.tensor([1.5, 0.5])
    expected = sum(((ce * weights)[marks]).sum() for ce, marks in found["ce"])
    expected.backward()
    assert float(objective.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(family)[name], gradient, atol=1e-4, rtol=1e-3)
    predicted = sum(int(marks.sum()) for _, marks in found["ce"])
    assert batch.weight == predicted

    hits = sum(int(right[marks].sum()) for right, marks in found["hits"])
    surprise = sum(float(ce.detach()[marks].sum()) for ce, marks in found["ce"])
    values = learner.validate()
    assert values["dev_accuracy"] == pytest.approx(hits / predicted)
    assert values["dev_ce"] == pytest.approx(surprise / predicted, rel=1e-5)


def test_a_student_is_compared_in_predicted_codes(tmp_path):
    store, student = store_of(tmp_path / "store", "full"), family_of(1, kind=Partly)
    keys = [(sample["sample_id"], 0) for sample in SAMPLES]
    student.module.eval()
    with torch.no_grad():
        (batch,) = rollout_batches(store, keys, 6, CPU, {"backbone"}, student.predicted)
        rows = list(_compare(student, 1.0, store, Axes.of(store), batch))
        found = by_definition(student, family_of(0))
    for row, (values, marks), (same, _) in zip(rows, found["kl"], found["agreed"], strict=True):
        assert row.kl == pytest.approx(float(values[marks].sum()), rel=1e-4)
        assert row.agreed == int(same[marks].sum())
        assert row.predictions == int(marks.sum())


# What a batch weighs.


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PredictionStore:
    path = tmp_path_factory.mktemp("predicted") / "store"
    made = synthetic_store(path, synthetic_manifest(TopK(k=4), streams=3), 8, 1, 4)
    for shard in range(2):
        write_synthetic_shard(made, shard, 9)
    return PredictionStore.open(path)


@pytest.mark.parametrize("mean", ["predictions", "rollouts"])
@pytest.mark.parametrize("weights", [(1.0, 0.1, 0.0, 0.5), (1.0, 1.0, 1.0, 1.0)])
def test_the_weight_of_a_rollout_is_that_of_its_predicted_codes(store, mean, weights):
    keys = [key for key, _ in zip(store.keys(), weights, strict=False)]
    spans = [Span.of(store[k])._replace(weight=w) for k, w in zip(keys, weights, strict=True)]
    host = host_batch(
        store.manifest, spans, [{}] * 4, [0] * 4, HostMemory(), mean, predicted=partly
    )
    batch = restored_batch(host, store.manifest, None, CPU, None)
    total = 0.0
    for row, (key, weight) in enumerate(zip(keys, weights, strict=True)):
        codes = store[key].codes
        marks = np.ones(codes.shape, bool)
        marks[:, 1] = codes[:, 0] % 2 == 0
        each = weight / marks.sum() if mean == "rollouts" else weight
        expected = np.zeros(batch.codes.shape[1:])
        expected[: len(codes)] = marks * each
        np.testing.assert_allclose(batch.element_weights[row], expected, rtol=1e-6)
        assert np.array_equal(batch.predicted[row, : len(codes)], marks)
        assert not batch.predicted[row, len(codes) :].any()
        total += weight * marks.sum()
    assert host.weight == pytest.approx(4 if mean == "rollouts" else total, rel=1e-6)


STARTS = [
    pytest.param(s, marks=[pytest.mark.slow] if s != "fork" else []) for s in ("fork", "spawn")
]


@pytest.mark.parametrize("start", STARTS)
def test_processes_that_read_mark_the_same_codes(store, start):
    found = []
    for workers in (0, 2):
        config = reading(3, workers, start)
        with closing(StoreBatches(store, config, 5, HERE, predicted=partly)) as batches:
            host = [batch for position in (0, 3, 6) for batch in batches.batches(position)]
            found.append([(b.weight, b.keys, batches.restored(b)) for b in host])
    for (weight, keys, ours), (other_weight, other_keys, theirs) in zip(*found, strict=True):
        assert (weight, keys) == (other_weight, other_keys)
        assert torch.equal(ours.element_weights, theirs.element_weights)
        assert not ours.predicted.all()


def test_slots_mark_codes_and_travel_without_a_model():
    config = {"slots": [[0, 0], [1, 0], [1, 1]], "codes_per_slot": 5, "audio_base_id": 9}
    layout = SlotLayout(SlotLayoutConfig.model_validate(config | {"end_id": 3}))
    content = pickle.dumps(layout.predicted)
    assert len(content) < 2000
    codes = torch.tensor([[[1, 2, 3], [4, 5, 5], [0, 0, 0]], [[1, 2, 3], [4, 4, 4], [5, 5, 5]]])
    marks = pickle.loads(content)(codes)
    assert marks.flatten(1).long().tolist() == [[1] * 5 + [0] * 4, [1] * 7 + [0] * 2]


# Nothing to learn from.


def test_a_sample_of_which_nothing_is_predicted_is_named_before_a_teacher_is_fitted():
    config = FitConfig.model_validate({"optimizer": {"steps": 1}})
    with pytest.raises(UserError, match=r"'clip 0'.*of its 4 timesteps.*predicts no code.*leave"):
        CodeLearner(family_of(0, kind=Nothing), SAMPLES, [], config, 0, HERE)


def test_a_recording_without_a_timestep_is_named(monkeypatch):
    family = family_of(0)
    empty = torch.empty(0, 2, dtype=torch.int64)
    plain = family.reference_codes

    def codes(sample):
        return empty if sample["sample_id"] == "clip 2" else plain(sample)

    monkeypatch.setattr(family, "reference_codes", codes)
    config = FitConfig.model_validate({"optimizer": {"steps": 1}})
    with pytest.raises(UserError, match=r"'clip 2': nothing to learn from: .*no timestep"):
        CodeLearner(family, SAMPLES, [], config, 0, HERE)


def test_a_recording_of_which_nothing_is_predicted_is_named_before_it_is_scored(tmp_path):
    config = RolloutConfig.model_validate({"source": "dataset", "sampler": {"max_timesteps": 30}})
    teacher, path = family_of(0, kind=Nothing), tmp_path / "store"
    with pytest.raises(UserError, match=r"'clip 0': nothing to learn from"):
        create_store(
            path,
            teacher,
            lay_out(config, teacher, SAMPLES, facts=FACTS, dataset_fingerprint="d", seed=0),
        )
    assert not path.exists()


def test_a_stored_rollout_of_which_nothing_is_predicted_is_named(store):
    with (
        closing(StoreBatches(store, reading(), 5, HERE, predicted=nothing)) as batches,
        pytest.raises(UserError, match=r"'sample-\d' variation 0 .*timesteps hold no code"),
    ):
        batches.batches(0)


def weighted_store(path: Path, weight: Callable[[str], float]) -> PredictionStore:
    """A store of eight rollouts of the given weights, which ended for want of time."""
    manifest = synthetic_manifest(Full(), vocabulary=16)
    made = synthetic_store(path, manifest, 8, 1, 4)
    for shard in range(2):
        with made.writer(shard) as writer:
            for key in made.plan[shard]:
                arrays = synthetic_arrays(manifest, key, 5)
                writer.append(*key, arrays, stop_reason="limit", weight=weight(key[0]), seed=1)
            writer.commit()
    return PredictionStore.open(path)


@pytest.mark.parametrize("mean", ["predictions", "rollouts"])
def test_a_batch_whose_rollouts_all_weigh_nothing_is_refused_by_every_process(tmp_path, mean):
    store = weighted_store(tmp_path / "store", lambda name: float(name == "sample-3"))
    config, refused = reading(2, loss={"mean": mean}), {0: set(), 1: set()}
    for rank, position in itertools.product((0, 1), range(0, 8, 2)):
        with closing(StoreBatches(store, config, 5, Place(rank, 2, CPU))) as batches:
            try:
                (batch,) = batches.batches(position)
            except UserError as error:
                refused[rank].add(str(error))
            else:
                assert len(batch.keys) == 1, "of which one rank's share may weigh nothing"
    assert refused[0] == refused[1]
    assert len(refused[0]) == 3
    for message in refused[0]:
        assert re.search(r"2 rollouts has nothing .*'sample-\d' variation 0, .*'limit'", message)


def test_a_store_that_weighs_nothing_is_refused_before_the_first_step(tmp_path):
    store = weighted_store(tmp_path / "store", lambda _: 0.0)
    student = family_of(1)
    with pytest.raises(UserError, match=r"nothing to learn from.*weigh 0.*'sample-\d' variation 0"):
        train(
            student, matched(store, student), config_of({}), tmp_path / "student", seed=0,
            identity="", place=HERE, stop=StopRequest(),
        )  # fmt: skip


def matched(store: PredictionStore, student: CodecLM) -> PredictionStore:
    """The store, as if its rollouts were of the student's alphabet and audio codec."""
    prints = {"tokenizer": student.tokenizer_fingerprint(), "audio_codec": "ab"}
    fingerprints = store.manifest.fingerprints.model_copy(update=prints)
    streams = {"streams": student.streams, "forbidden": student.forbidden}
    store.manifest = store.manifest.model_copy(
        update={"fingerprints": fingerprints, "end_id": student.end_id} | streams
    )
    return store


def test_a_loss_in_which_codes_compete_needs_all_of_them(tmp_path):
    store = store_of(tmp_path / "store", "full_levels")
    with pytest.raises(UserError, match=r"loss\.joint=True: .*predicts only some of them"):
        train(
            family_of(1, kind=Partly), store, config_of({"joint": True}), tmp_path / "student",
            seed=0, identity="", place=HERE, stop=StopRequest(),
        )  # fmt: skip
