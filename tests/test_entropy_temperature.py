"""A temperature for each prediction, by the teacher's entropy: exact where the store knows it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from stages.errors import UserError
from stages.loss_config import ByEntropy, GuideLossConfig, LossConfig
from stages.losses import entropy
from stages.support import require_supported
from stages.targets import SparseTarget
from store.schema import Full, Hidden, Sampled, TopK
from store.synthetic import synthetic_manifest
from tests.stored_targets import TARGETS, B, C, Scene, T, scene
from tests.test_losses import (
    DISTRIBUTIONS,
    DIVERGENCES,
    LENGTHS,
    categories,
    computed,
    config_of,
    log_student,
    reference_divergence,
    reference_draws,
    student_of,
    weights_of,
)

KINDS = [kind for kind in DISTRIBUTIONS if kind != "top_k_tail"]
FALLING = {"by_entropy": [[0, 3.0], [1.3, 1.0], [1.7, 0.5]]}
RISING = {"by_entropy": [[0, 0.5], [1.7, 3.0]]}
"""Of temperatures that the scene `top_k` lists."""


def teacher_of(made: Scene, temperature: float) -> torch.Tensor:
    """[B, T, C, M] fp64 over the categories."""
    return torch.einsum(
        "...mv,...v->...m", categories(made), torch.tensor(made.probabilities(temperature))
    )


def nats_of(made: Scene) -> torch.Tensor:
    p = teacher_of(made, 1.0)
    return -torch.where(p > 0, p * p.clamp_min(1e-300).log(), 0.0).sum(-1)


def temperatures_of(made: Scene, rule: dict) -> torch.Tensor:
    chosen = torch.zeros(B, T, C, dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, (B, T, C))).tolist():
        nats = float(nats_of(made)[tuple(index)])
        chosen[tuple(index)] = [t for threshold, t in rule["by_entropy"] if nats >= threshold][-1]
    return chosen


@pytest.mark.parametrize("rule", [FALLING, RISING], ids=["falling", "rising"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_is_compared_at_its_own_temperature(kind, rule):
    made, student = scene(kind), student_of(kind)
    weights = {"kl": 0.7, "reverse_kl": 0.2, "jsd": 0.3, "skew_kl": 0.1, "tvd": 0.4, "ce": 0.3}
    config = config_of(**weights, temperature=rule)
    loss, terms, gradient = computed(made, student, config)

    leaf = student.double().requires_grad_()
    each = temperatures_of(made, rule)
    valid = torch.arange(T) < LENGTHS.unsqueeze(1)
    assert len(each[valid].unique()) == len(rule["by_entropy"]), "else a temperature is not tried"
    total = torch.zeros((), dtype=torch.float64)
    for name, weight in weights.items():
        value = reference_draws(name, made, log_student(leaf, 1.0)) if name == "ce" else 0.0
        for temperature in each.unique().tolist() if name in DIVERGENCES else ():
            p = teacher_of(made, temperature)
            q = torch.einsum(
                "...mv,...v->...m", categories(made), log_student(leaf, temperature).exp()
            )
            at = temperature**2 * reference_divergence(name, p, q, config)
            value = value + torch.where(each == temperature, at, 0.0)
        summed = (value * weights_of()).sum()
        assert float(terms[name]) == pytest.approx(float(summed.detach()), rel=1e-4), name
        total = total + weight * summed
    total.backward()
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-4)
    torch.testing.assert_close(gradient.double(), leaf.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_single_temperature_by_entropy_is_that_temperature(kind, temperature):
    made, student = scene(kind), student_of(kind)
    terms = {"kl": 0.7, "ce": 0.3, "nrmse": 0.5}
    plain = computed(made, student, config_of(**terms, temperature=temperature))
    rule = {"by_entropy": [[0, temperature]]}
    chosen = computed(made, student, config_of(**terms, temperature=rule))
    torch.testing.assert_close(chosen[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(chosen[2], plain[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["full", "hidden"])
def test_the_reverse_kl_at_the_students_own_ids_follows_the_rule(kind):
    made, student = scene(kind), student_of(kind)
    each, found = temperatures_of(made, RISING), []
    for temperature in (RISING, 0.5, 3.0):
        config = config_of(reverse_kl=1.0, reverse_kl_top_k=5, temperature=temperature)
        found.append(computed(made, student, config)[2])
    chosen, low, high = found
    expected = torch.where((each == 0.5).unsqueeze(-1), low, high)
    torch.testing.assert_close(chosen, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_entropy_of_a_whole_distribution_is_exact_and_of_kept_ids_a_lower_bound(kind):
    made = scene(kind)
    rows = torch.arange(B * T)
    found = entropy(made.target().rows(rows)).view(B, T, C).double()
    p = torch.tensor(made.probabilities())
    whole = -torch.where(p > 0, p * p.clamp_min(1e-300).log(), 0.0).sum(-1)
    torch.testing.assert_close(found, nats_of(made), atol=1e-5, rtol=1e-5)
    if isinstance(made.target(), SparseTarget):
        kept = torch.from_numpy(made.arrays["ids"].astype("int64"))
        outside = p.scatter(-1, kept, 0.0)
        mass = outside.sum(-1, keepdim=True)
        within = outside / mass
        missing = mass.squeeze(-1) * -torch.where(
            within > 0, within * within.clamp_min(1e-300).log(), 0.0
        ).sum(-1)
        torch.testing.assert_close(found + missing, whole, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_temperatures_that_float32_cannot_hold_exactly_find_their_tail():
    rule = ByEntropy.model_validate({"by_entropy": [[0, 0.7], [1.5, 0.1]]})
    logmass = torch.tensor([[[-1.0, -2.0, -3.0]]])
    ids, logits = torch.tensor([[[0, 1]]]), torch.tensor([[[0.0, -1.0]]])
    target = SparseTarget(ids, logits, logmass, (0.1, 0.7, 1.0))
    for place, temperature in enumerate((0.1, 0.7)):
        assert temperature in rule.temperatures
        found = target.logprobs(torch.full((1, 1, 1), temperature))
        assert float(found[..., -1]) == float(logmass[..., place])
        torch.testing.assert_close(found, target.logprobs(temperature))


@pytest.mark.parametrize(
    ("target", "terms", "message"),
    [
        (
            TopK(k=5, temperatures=(1.0, 2.0)), {"kl": 1.0},
            r"loss\.temperature=\{by_entropy: \[\[0\.0, 3\.0\].*: .*\[1\.0, 2\.0\] only.*; "
            r"\[0\.5, 3\.0\] are missing",
        ),
        (
            TopK(k=5, temperatures=(0.5, 3.0)), {"kl": 1.0},
            r"\[1\.0\] are missing, and 1\.0 is that of the entropy",
        ),
        (Sampled(), {"kl": 0.0, "soft_ce": 1.0}, r"loss\.temperature=\{by_entropy.*drawn at temp"),
        (
            TopK(k=5, temperatures=(0.5, 1.0, 3.0), tail_samples=2), {"kl": 1.0, "tail_share": 0.5},
            r"loss\.tail_share=0\.5: the tail was drawn at temperature 1, and .*by_entropy",
        ),
    ],
)  # fmt: skip
def test_a_store_that_cannot_tell_is_refused(target, terms, message):
    loss = LossConfig.model_validate(terms | {"temperature": FALLING})
    with pytest.raises(UserError, match=message):
        require_supported(loss, synthetic_manifest(target))


@pytest.mark.parametrize("target", [TARGETS["top_k"], Full(), Hidden()])
def test_a_store_that_can_is_not(target):
    for form in (
        LossConfig.model_validate({"temperature": FALLING}),
        GuideLossConfig.model_validate({"recipe": "guide", "temperature": FALLING}),
    ):
        require_supported(form, synthetic_manifest(target))


def test_the_recipe_passes_its_rule_on_and_it_goes_through_json():
    form = GuideLossConfig.model_validate({"recipe": "guide", "temperature": FALLING})
    assert form.terms_config == LossConfig.model_validate(
        {"kl": 0.7, "ce": 0.3, "temperature": FALLING}
    )
    assert GuideLossConfig.model_validate_json(form.model_dump_json()) == form


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ([], "must be pairs of nats"),
        ([[0.5, 2.0]], "from 0 on"),
        ([[0, 2.0], [0, 1.0]], "rising"),
        ([[0, 2.0], [1.0, 0.0]], "above 0"),
        ([[0, 2.0], [1.0, 1.0], [2.0, 3.0]], "only rise or only fall"),
    ],
)
def test_rules_that_say_nothing_clear_are_refused(rule, message):
    with pytest.raises(ValidationError, match=message):
        LossConfig.model_validate({"temperature": {"by_entropy": rule}})


def test_codes_that_compete_have_one_temperature():
    with pytest.raises(ValidationError, match=r"joint=True has one temperature for all codes"):
        LossConfig.model_validate({"joint": True, "temperature": FALLING})


def test_a_mistake_is_told_in_the_words_of_the_form_that_was_meant():
    with pytest.raises(ValidationError) as error:
        LossConfig.model_validate({"temperature": -1.0})
    assert [problem["msg"] for problem in error.value.errors()] == [
        "Input should be greater than 0"
    ]
    with pytest.raises(ValidationError, match=r"by_entropi\n"):
        LossConfig.model_validate({"temperature": {"by_entropi": [[0, 1]]}})
