"""Stage two end to end: every kind of store teaches the distribution that its teacher predicted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.checkpoint import load_latest
from stages.config import DatasetFacts, FitConfig, RolloutConfig, TrainConfig
from stages.data import rollout_batches
from stages.distributed import Place
from stages.errors import UserError
from stages.families.codec_lm import CodecLM
from stages.fit import CodeLearner
from stages.interruption import StopRequest
from stages.losses import stream_weights
from stages.measure import _compare
from stages.model_config import CodecLMConfig
from stages.paired import Axes
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out
from stages.sampling import mask_forbidden
from stages.train import TargetLearner, require_match, train
from store import PredictionStore
from store.schema import Dense, Latent
from store.synthetic import synthetic_manifest
from tests.stopping import StopAfter

HERE = Place(0, 1, torch.device("cpu"))
SCALE = 2.5
FACTS = DatasetFacts(
    alphabet=" abcdefg",
    speakers=("low", "high"),
    codebooks=2,
    codes_per_codebook=14,
    frame_rate_hz=25.0,
    audio_codec="ab",
)
MODEL = {
    "family": "codec_lm", "d_model": 16, "heads": 2, "text_layers": 1, "decoder_layers": 1,
    "feed_forward": 24, "dropout": 0.0, "max_timesteps": 40, "max_characters": 20,
}  # fmt: skip
LOCAL = MODEL | {"local_transformer": {"d_model": 16, "layers": 1, "heads": 2}}
BOTH = {"branches": "both", "dtype": "float32"}
STORES = {
    "full": {"kind": "full", "dtype": "float32"},
    "full_both": {"kind": "full"} | BOTH,
    "full_levels": {"kind": "full", "dtype": "float32", "levels": True},
    "hidden": {"kind": "hidden", "dtype": "float32"},
    "hidden_both": {"kind": "hidden"} | BOTH,
    "top_k": {"kind": "top_k", "k": 5, "tail_samples": 4, "moments": True, "dtype": "float32"},
    "sampled": {"kind": "sampled", "draws": 20},
}
SAMPLES = [
    {
        "sample_id": f"clip {number}",
        "text": "".join(np.random.default_rng(number).choice(list(" abcdefg"), size=4)),
        "speaker": ("low", "high")[number % 2],
        "codes": np.random.default_rng(number).integers(0, 14, size=2 * (3 + number)),
    }
    for number in range(6)
]


def family_of(seed: int, model: dict = MODEL, kind: type[CodecLM] = CodecLM) -> CodecLM:
    """A model whose branches disagree."""
    family = kind.build(
        CodecLMConfig.model_validate(model), FACTS.model_dump(mode="json"), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in family.module.named_parameters():
            if "norm" not in name and "position" not in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    family.condition_dropout = 0.1
    return family


def store_of(path: Path, kind: str, model: dict = MODEL, profile: str = "fast") -> PredictionStore:
    config = RolloutConfig.model_validate(
        {
            "source": "dataset", "guidance": {"scale": SCALE}, "target": STORES[kind],
            "sampler": {"max_timesteps": 30}, "profile": {"kind": profile},
            "rollouts_per_shard": 3, "batch_size": 3,
        }
    )  # fmt: skip
    teacher = family_of(0, model)
    store = create_store(
        path,
        teacher,
        lay_out(config, teacher, SAMPLES, facts=FACTS, dataset_fingerprint="d", seed=0),
    )
    by_id = {sample["sample_id"]: sample for sample in SAMPLES}
    assert rollout(teacher, store, by_id, store.missing(), batch_size=3, stop=StopRequest())
    return PredictionStore.open(path)


def config_of(loss: dict, model: dict = MODEL, **optimizer) -> TrainConfig:
    plain = {"steps": 12, "batch_size": 6, "learning_rate": 0.02, "warmup_steps": 1, "log_every": 1}
    return TrainConfig.model_validate(
        {"model": model, "loss": loss, "optimizer": plain | optimizer}
    )


def learned(
    store: PredictionStore, loss: dict, model: dict = MODEL, step: int = 0, network=lambda x: x,
    kind: type[CodecLM] = CodecLM,
):  # fmt: skip
    """Terms, loss and gradients of the first batch, of a student that is not the teacher."""
    student = family_of(1, model, kind)
    student.network = network(student.module)
    learner = TargetLearner(student, store, config_of(loss, model), 0, HERE)
    (batch,) = learner.batches(0)
    objective = learner.objective(step, batch)
    objective.total.backward()
    learner.close()
    gradient = {n: p.grad for n, p in student.module.named_parameters() if p.grad is not None}
    return objective, gradient, batch


def teacher_kl(scale: float, model: dict = MODEL) -> tuple[float, dict]:
    """Summed KL(guided teacher ‖ student) of all samples, and gradients, by its definition."""
    student = family_of(1, model)
    total = teacher_kl_by_stream(scale, model, student).sum()
    total.backward()
    found = {n: p.grad for n, p in student.module.named_parameters() if p.grad is not None}
    return float(total.detach()), found


def teacher_kl_by_stream(
    scale: float, model: dict, student: CodecLM | None = None, samples: list[dict] = SAMPLES
) -> torch.Tensor:
    """That sum for every stream, [C]."""
    teacher, student = family_of(0, model), student or family_of(1, model)
    total = torch.zeros(len(teacher.streams), dtype=torch.float64)
    for sample in samples:
        codes = teacher.reference_codes(sample)[None]
        lengths = torch.tensor([codes.shape[1]])
        with torch.no_grad():
            teacher.module.eval()
            guided = teacher.score([sample], codes, lengths, cfg_scale=scale).logits
        ours = student.score([sample], codes, lengths).logits
        p, q = (
            mask_forbidden(x.double(), student.forbidden).log_softmax(-1) for x in (guided, ours)
        )
        allowed = [i for i in range(p.shape[-1]) if i not in student.forbidden]
        p, q = p[..., allowed], q[..., allowed]
        total = total + (p.exp() * (p - q)).sum((0, 1, 3))
    return total


@pytest.mark.parametrize("model", [MODEL, LOCAL], ids=["parallel", "local"])
@pytest.mark.parametrize("kind", ["full", "full_both", "hidden", "hidden_both"])
def test_a_store_of_whole_distributions_teaches_the_divergence_from_the_guided_teacher(
    tmp_path, kind, model
):
    store = store_of(tmp_path / "store", kind, model)
    scale = {"guidance_scale": SCALE} if kind.endswith("both") else {}
    objective, gradient, _ = learned(store, {"kl": 1.0} | scale, model)
    expected, reference = teacher_kl(SCALE, model)
    assert float(objective.terms["kl"]) == pytest.approx(expected, rel=1e-4)
    assert gradient.keys() == reference.keys()
    assert max(float(x.abs().max()) for x in reference.values()) > 1
    for name, expected_gradient in reference.items():
        torch.testing.assert_close(
            gradient[name], expected_gradient, atol=1e-3, rtol=1e-3, msg=name
        )


WEIGHTED = {
    "codebooks": (MODEL, {"codebook_weights": [3.0, 1.0]}, 0, [1.5, 0.5]),
    "local": (LOCAL, {"local_share": 1 / 3}, 0, [4 / 3, 4 / 3, 2 / 3, 2 / 3]),
    "both": (
        LOCAL, {"local_share": 0.3, "codebook_weights": [3.0, 1.0]}, 0, [2.1, 0.7, 0.9, 0.3],
    ),
    "local alone": (LOCAL, {"local_share": 1.0}, 0, [0, 0, 2, 2]),
    "no local": (MODEL, {"local_share": 1.0, "local_start_step": 9}, 0, [1, 1]),
    "before the start": (LOCAL, {"local_start_step": 3, "local_ramp_steps": 4}, 2, [2, 2, 0, 0]),
    "at the start": (LOCAL, {"local_start_step": 3, "local_ramp_steps": 4}, 3, [2, 2, 0, 0]),
    "on the ramp": (
        LOCAL, {"local_start_step": 3, "local_ramp_steps": 4}, 4, [1.75, 1.75, 0.25, 0.25],
    ),
    "after the ramp": (LOCAL, {"local_start_step": 3, "local_ramp_steps": 4}, 7, [1, 1, 1, 1]),
    "without a ramp": (LOCAL, {"local_start_step": 3}, 3, [1, 1, 1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_stream_counts_by_its_weight_and_the_mean_weight_is_1(tmp_path, name):
    model, loss, step, weights = WEIGHTED[name]
    store = store_of(tmp_path / "store", "full", model)
    objective, _, _ = learned(store, loss, model, step)
    by_stream = teacher_kl_by_stream(SCALE, model).detach()
    assert (by_stream.max() / by_stream.min()) > 1.01, "else no weight would show"
    expected = float(by_stream @ torch.tensor(weights, dtype=torch.float64))
    assert float(objective.terms["kl"]) == pytest.approx(expected, rel=1e-4)


def test_streams_that_are_all_of_a_group_without_weight_weigh_nothing():
    streams = [SimpleNamespace(group="local")] * 4
    family = SimpleNamespace(streams=streams)
    assert stream_weights((3.0, 1.0), family, local_share=0.0).tolist() == [0.0] * 4
    assert stream_weights((3.0, 1.0), family, local_share=0.25).tolist() == [1.5, 0.5] * 2


def test_a_share_is_of_the_loss_however_many_streams_have_it():
    family = SimpleNamespace(streams=[SimpleNamespace(group=g) for g in ["a", "b", "c", "local"]])
    weights = stream_weights((), family, local_share=0.4)
    assert weights.tolist() == pytest.approx([0.8, 0.8, 0.8, 1.6])


def test_a_mean_over_rollouts_is_over_their_own_means(tmp_path):
    store = store_of(tmp_path / "store", "full", LOCAL)
    loss = {"kl": 1.0, "mean": "rollouts", "local_share": 0.3, "codebook_weights": [3.0, 1.0]}
    objective, _, batch = learned(store, loss, LOCAL)
    assert batch.weight == len(SAMPLES)
    expected = 0.0
    for sample in SAMPLES:
        by_stream = teacher_kl_by_stream(SCALE, LOCAL, samples=[sample]).detach()
        means = by_stream / (len(sample["codes"]) // 2 + 1)
        backbone, local = (means[i] * 0.75 + means[i + 1] * 0.25 for i in (0, 2))
        expected += (0.7 * backbone + 0.3 * local) / len(SAMPLES)
    found = float(objective.total.detach()) / batch.weight
    assert found == pytest.approx(float(expected), rel=2e-5)
    plain, _, whole = learned(store, loss | {"mean": "predictions"}, LOCAL)
    assert abs(float(plain.total.detach()) / whole.weight - found) > 2e-4 * found


class Penalised(CodecLM):
    """A family with a loss of its own: the same for every batch, whatever it weighs."""

    def penalty(self) -> torch.Tensor:
        return 0.1 * sum(parameter.square().sum() for parameter in self.module.parameters())

    def score(self, *arguments, **named):
        return replace(super().score(*arguments, **named), losses={"penalty": self.penalty()})


@pytest.mark.parametrize("mean", ["predictions", "rollouts"])
def test_a_loss_of_the_model_itself_counts_as_often_as_the_batch(tmp_path, mean):
    store, loss = store_of(tmp_path / "store", "full"), {"kl": 1.0, "mean": mean}
    plain, gradient, batch = learned(store, loss)
    own, found, _ = learned(store, loss | {"auxiliary": 0.3}, kind=Penalised)
    alone = family_of(1, kind=Penalised)
    penalty = batch.weight * alone.penalty()
    penalty.backward()
    assert float(own.terms["penalty"].detach()) == pytest.approx(float(penalty.detach()))
    torch.testing.assert_close(own.total, plain.total + 0.3 * penalty)
    for name, parameter in alone.module.named_parameters():
        expected = gradient.get(name, 0.0) + 0.3 * parameter.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", ["predictions", "rollouts"])
def test_micro_batches_share_the_loss_of_the_model_without_changing_the_gradient(tmp_path, mean):
    store, moments, logged = store_of(tmp_path / "store", "full"), {}, {}
    for size in (None, 1, 4):
        folder = tmp_path / f"{size}"
        loss = {"kl": 1.0, "mean": mean}
        config = config_of(loss, steps=1, clip_norm=1e9, micro_batch_size=size)
        student = family_of(1, kind=Penalised)
        logged["expected"] = float(student.penalty().detach())
        assert train(
            student, store, config, folder, seed=0, identity="", place=HERE, stop=StopRequest()
        )
        moments[size] = {
            name: x for name, x in load_latest(folder / "checkpoints").tensors.items()
            if name.startswith("optimizer.exp_avg.")
        }  # fmt: skip
        logged[size] = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["penalty"]
    for size in (1, 4):
        assert logged[size] == pytest.approx(logged["expected"], rel=1e-5)
        for name, whole in moments[None].items():
            torch.testing.assert_close(moments[size][name], whole, atol=1e-6, rtol=1e-4, msg=name)


ROUTED = MODEL | {"decoder_layers": 2, "experts": {"experts": 4, "active": 2}}


def test_how_experts_are_used_is_logged_and_not_learned(tmp_path):
    store = store_of(tmp_path / "store", "full", ROUTED)
    student = family_of(1, ROUTED)
    config = config_of({"kl": 1.0, "auxiliary": 0.5}, ROUTED, steps=1, micro_batch_size=4)
    scores = student.score(
        SAMPLES, *(torch.zeros(6, 9, 2, dtype=torch.int64), torch.full((6,), 9)), linear=True
    )
    assert set(scores.metrics) == {"expert_usage_min", "expert_usage_max", "router_entropy"}
    learner = TargetLearner(student, store, config, 0, HERE)
    batches = learner.batches(0)
    objectives = [learner.objective(0, batch) for batch in batches]
    learner.close()
    codes = CodeLearner(student, SAMPLES, [], FitConfig(optimizer=config.optimizer), 0, HERE)
    fitted = [codes.objective(0, batch) for batch in codes.batches(0)]
    for objective, weights in (
        *((objective, {"kl": 1.0, "experts": 0.5}) for objective in objectives),
        *((objective, {"ce": 1.0, "experts": 1.0}) for objective in fitted),
    ):
        terms = {name: float(x.detach()) for name, x in objective.terms.items()}
        assert terms.keys() > scores.metrics.keys()
        total = sum(weight * terms[name] for name, weight in weights.items())
        assert float(objective.total.detach()) == pytest.approx(total, rel=1e-5)
    folder = tmp_path / "student"
    assert train(
        family_of(1, ROUTED), store, config, folder, seed=0, identity="", place=HERE,
        stop=StopRequest(),
    )  # fmt: skip
    logged = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    weight = sum(batch.weight for batch in batches)
    for name in scores.metrics:
        expected = sum(float(objective.terms[name]) for objective in objectives) / weight
        assert logged[name] == pytest.approx(expected, rel=1e-5)
    assert 0 <= logged["expert_usage_min"] <= 0.25 <= logged["expert_usage_max"] <= 0.5
    assert 0 < logged["router_entropy"] <= np.log(4) + 1e-6


@pytest.mark.parametrize("kind", ["full_both", "hidden_both"])
def test_one_store_of_both_branches_teaches_at_any_scale(tmp_path, kind):
    store = store_of(tmp_path / "store", kind)
    for scale in (1.0, 4.0):
        objective, _, _ = learned(store, {"guidance_scale": scale})
        assert float(objective.terms["kl"]) == pytest.approx(teacher_kl(scale)[0], rel=1e-4)
    low, high = (teacher_kl(scale)[0] for scale in (1.0, 4.0))
    drawn, _, _ = learned(store, {"guidance_scale": [1.0, 4.0]})
    assert min(low, high) < float(drawn.terms["kl"]) < max(low, high)


def test_logits_at_their_absolute_height_teach_alike_whether_stored_or_computed(tmp_path):
    loss = {"kl": 0.7, "ce": 0.3, "nrmse": 2.0, "joint": True, "mean": "rollouts"}
    (stored, gradient, _), (made, expected, _) = (
        learned(store_of(tmp_path / kind, kind, LOCAL), loss, LOCAL)
        for kind in ("full_levels", "hidden")
    )
    assert set(stored.terms) == {"kl", "ce", "nrmse"}
    torch.testing.assert_close(stored.total, made.total, rtol=1e-5, atol=0)
    for name, reference in expected.items():
        torch.testing.assert_close(gradient[name], reference, atol=1e-4, rtol=1e-3, msg=name)
    plain, _, _ = learned(
        store_of(tmp_path / "plain", "hidden", LOCAL), loss | {"joint": False}, LOCAL
    )
    assert abs(float(plain.terms["kl"]) / float(stored.terms["kl"]) - 1) > 0.1


def test_a_compact_store_teaches_the_same_within_its_stated_loss(tmp_path):
    loss = {"kl": 1.0, "tail_share": 0.2}
    fast, _, batch = learned(store_of(tmp_path / "fast", "top_k"), loss)
    compact, _, _ = learned(store_of(tmp_path / "compact", "top_k", profile="compact"), loss)
    for name in ("kl", "kl_tail"):
        mean = float(compact.terms[name]) / batch.weight
        assert mean == pytest.approx(float(fast.terms[name]) / batch.weight, abs=0.02)


def test_the_total_is_the_weighted_sum_of_the_terms_that_are_logged(tmp_path):
    loss = {
        "kl": 1.0, "tail_share": 0.5, "reverse_kl": 0.1, "jsd": 0.2, "skew_kl": 0.3,
        "skew_reverse_kl": 0.4, "tvd": 0.5, "ce": 0.6, "nrmse": 0.7, "logit_mse": 0.8,
    }  # fmt: skip
    objective, _, _ = learned(store_of(tmp_path / "store", "top_k"), loss)
    weights = loss | {"kl_tail": 0.5}
    del weights["tail_share"]
    assert set(objective.terms) == set(weights)
    expected = sum(weights[name] * float(term) for name, term in objective.terms.items())
    assert float(objective.total.detach()) == pytest.approx(expected, rel=1e-5)


def test_streams_of_the_local_transformer_learn_from_the_step_that_is_set(tmp_path):
    store = store_of(tmp_path / "store", "hidden", LOCAL)
    loss = {"kl": 1.0, "local_start_step": 3}
    _, before, _ = learned(store, loss, LOCAL, step=2)
    _, after, _ = learned(store, loss, LOCAL, step=3)
    heads = {name for name in after if name.startswith("local.")}
    assert heads
    assert after.keys() - before.keys() == heads
    assert all((after[name] != 0).any() for name in heads)


LATE = {"kl": 1.0, "local_start_step": 3, "local_ramp_steps": 4}


def trained(store, folder: Path, stop=None, **optimizer) -> tuple[dict, dict]:
    """Weights of a student and its newest checkpoint, after decaying steps."""
    student = family_of(1, LOCAL)
    config = config_of(LATE, LOCAL, weight_decay=0.5, **optimizer)
    stop = stop or StopRequest()
    train(student, store, config, folder, seed=0, identity="", place=HERE, stop=stop)
    weights = {name: p.detach().clone() for name, p in student.module.named_parameters()}
    return weights, load_latest(folder / "checkpoints").tensors


def test_before_its_start_the_local_transformer_is_left_alone_by_decay_and_moments(tmp_path):
    store = store_of(tmp_path / "store", "hidden", LOCAL)
    fresh = dict(family_of(1, LOCAL).module.named_parameters())
    weights, early = trained(store, tmp_path / "early", steps=3)
    local = {name for name in weights if name.startswith("local.")}
    assert local
    for name, weight in weights.items():
        assert torch.equal(weight, fresh[name]) or name not in local, name
        assert (f"optimizer.step.{name}" in early) == (name not in local), name
    weights, late = trained(store, tmp_path / "late", steps=5)
    for name in local:
        assert not torch.equal(weights[name], fresh[name]), name
        assert late[f"optimizer.step.{name}"] == 2
    assert late["optimizer.step.head.weight"] == 5


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_run_resumed_around_the_start_of_the_local_transformer_ends_the_same(tmp_path, steps):
    store = store_of(tmp_path / "store", "hidden", LOCAL)
    whole, expected = trained(store, tmp_path / "whole", steps=9)
    trained(store, tmp_path / "cut", StopAfter(steps), steps=9)
    resumed, found = trained(store, tmp_path / "cut", steps=9)
    for one, other in ((resumed, whole), (found, expected)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


SHARED = {
    "full": {"kl": 0.7, "ce": 0.3, "nrmse": 2.0, "mean": "rollouts", "local_start_step": 3},
    "full_both": {"kl": 1.0, "guidance_scale": 2.0, "codebook_weights": [3.0, 1.0]},
    "full_levels": {"kl": 1.0, "joint": True},
    "hidden": {"kl": 1.0, "reverse_kl": 1.0, "local_share": 1.0},
    "hidden_both": {"kl": 1.0, "guidance_scale": [1.0, 4.0]},
    "top_k": {"kl": 1.0, "tail_share": 0.5, "ce": 0.1, "nrmse": 1.0},
    "sampled": {"kl": 0.0, "soft_ce": 1.0},
}


@pytest.mark.parametrize("kind", STORES)
def test_a_student_without_a_local_transformer_reads_the_other_streams_of_a_store(tmp_path, kind):
    both = store_of(tmp_path / "both", kind, LOCAL)
    alone = store_of(tmp_path / "alone", kind)
    (ours, gradient, batch), (theirs, expected, other) = (
        learned(store, SHARED[kind]) for store in (both, alone)
    )
    assert batch.weight == other.weight
    assert ours.terms.keys() == theirs.terms.keys()
    assert gradient.keys() == expected.keys()
    for name, term in theirs.terms.items():
        torch.testing.assert_close(ours.terms[name], term, rtol=1e-6, atol=0, msg=name)
    for name, reference in expected.items():
        torch.testing.assert_close(gradient[name], reference, rtol=1e-5, atol=1e-5, msg=name)


def test_a_student_with_a_local_transformer_is_refused_by_a_store_without(tmp_path):
    manifest = store_of(tmp_path / "store", "full", MODEL).manifest
    words = r"streams \(.*local\.0:16.*\) differ from the store's \(backbone\.0:16, backbone\.1:16,"
    with pytest.raises(UserError, match=words):
        require_match(family_of(0, LOCAL), manifest)
    require_match(family_of(0), store_of(tmp_path / "both", "full", LOCAL).manifest)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_for_the_loss_lies_outside_of_it(tmp_path):
    store, loss = store_of(tmp_path / "store", "top_k"), {"kl": 1.0, "ce": 0.5}
    plain, expected, _ = learned(store, loss)
    compiled, gradient, _ = learned(
        store, loss, network=lambda x: torch.compile(x, backend="eager", fullgraph=True)
    )
    torch.testing.assert_close(compiled.total, plain.total)
    for name, reference in expected.items():
        torch.testing.assert_close(gradient[name], reference, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["top_k", "hidden"])
def test_under_autocast_only_the_network_is_less_precise(tmp_path, kind):
    store = store_of(tmp_path / "store", kind)
    plain, expected, batch = learned(store, {"kl": 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        lower, gradient, _ = learned(store, {"kl": 1.0})
    assert lower.total.dtype == torch.float32
    mean = float(plain.terms["kl"]) / batch.weight
    assert float(lower.terms["kl"]) / batch.weight == pytest.approx(mean, rel=0.02)
    size = max(float(x.abs().max()) for x in expected.values())
    for name, reference in expected.items():
        torch.testing.assert_close(gradient[name], reference, atol=0.03 * size, rtol=0, msg=name)


TAUGHT = {
    "full": {"reverse_kl": 1.0, "kl": 0.0},
    "full_both": {"kl": 1.0, "guidance_scale": [1.0, 3.0]},
    "hidden": {"jsd": 1.0, "kl": 0.0},
    "hidden_both": {"kl": 1.0, "guidance_scale": 2.0},
    "top_k": {"kl": 1.0, "tail_share": 0.3, "ce": 0.1},
    "sampled": {"soft_ce": 1.0, "kl": 0.0},
}


@pytest.mark.parametrize("kind", TAUGHT)
def test_training_on_every_kind_of_store_lowers_each_of_its_terms(tmp_path, kind):
    store, config = store_of(tmp_path / "store", kind), config_of(TAUGHT[kind])
    folder = tmp_path / "student"
    assert train(
        family_of(1), store, config, folder, seed=0, identity="", place=HERE, stop=StopRequest()
    )
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = [name for name in config.loss.terms if name != "ce"]
    for name in names:
        assert lines[-1][name] < 0.9 * lines[0][name] or name in ("soft_ce", "kl_tail"), name
    assert all(np.isfinite(line[name]) for line in lines for name in config.loss.terms)
    if kind == "sampled":
        assert lines[-1]["soft_ce"] < lines[0]["soft_ce"] - 0.1


def test_what_the_store_cannot_teach_is_refused_before_anything_is_read(tmp_path):
    store = store_of(tmp_path / "store", "sampled")
    with pytest.raises(UserError, match=r"loss\.kl=1\.0: .*loss\.soft_ce"):
        train(
            family_of(1), store, config_of({}), tmp_path / "student",
            seed=0, identity="", place=HERE, stop=StopRequest(),
        )  # fmt: skip
    assert not (tmp_path / "student").exists()


def test_codebook_weights_that_fit_no_stream_are_refused_before_anything_is_written(tmp_path):
    store = store_of(tmp_path / "store", "full")
    with pytest.raises(UserError, match=r"3 codebook_weights do not fit 2 streams"):
        train(
            family_of(1), store, config_of({"codebook_weights": [1.0, 1.0, 1.0]}),
            tmp_path / "student", seed=0, identity="", place=HERE, stop=StopRequest(),
        )  # fmt: skip
    assert not (tmp_path / "student").exists()


def continuous_student(shape: tuple[int, ...]) -> SimpleNamespace:
    manifest = synthetic_manifest(Dense(), 2)
    streams = [Latent(name=s.name, group=s.group, shape=shape) for s in manifest.streams]
    return SimpleNamespace(
        streams=streams, forbidden=(), end_id=None, tokenizer_fingerprint=lambda: "k",
        facts=SimpleNamespace(audio_codec="a"),
    )  # fmt: skip


def test_a_student_of_continuous_streams_must_have_their_shape():
    manifest = synthetic_manifest(Dense(), 2)
    require_match(continuous_student((4, 3)), manifest)
    with pytest.raises(UserError, match=r"streams \(backbone\.0:\(4, 2\).*\(backbone\.0:\(4, 3\)"):
        require_match(continuous_student((4, 2)), manifest)


def test_a_student_of_ids_cannot_learn_continuous_streams():
    with pytest.raises(UserError, match=r"backbone\.0:16.*backbone\.0:\(4, 3\)"):
        require_match(family_of(0), synthetic_manifest(Dense(), 2))


def test_a_student_without_a_local_transformer_is_compared_in_the_streams_that_it_has(tmp_path):
    student, found = family_of(1), []
    student.module.eval()
    for name, model in (("both", LOCAL), ("alone", MODEL)):
        reference = store_of(tmp_path / name, "full", model)
        batches = rollout_batches(reference, list(reference), 6, HERE.device, {"backbone"})
        with torch.no_grad():
            axes = Axes.of(reference)
            rows = [list(_compare(student, 1.0, reference, axes, batch)) for batch in batches]
            found += [[(row.kl, row.agreed, row.predictions) for row in batch] for batch in rows]
    assert found[0] == found[1]
