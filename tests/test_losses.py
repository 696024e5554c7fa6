"""Losses against independent formulas in fp64, their gradients, and what they must not read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.config import LossConfig
from stages.errors import UserError
from stages.losses import (
    cross_entropy,
    distillation_terms,
    element_weights,
    kl_divergence,
    nrmse,
)
from stages.reduction import reduce
from stages.sampling import mask_forbidden
from stages.targets import DenseTarget, SparseTarget, restore
from store.schema import Full, TopK

VOCABULARY, FORBIDDEN, END = 40, (5, 38), 39
ALLOWED = [i for i in range(VOCABULARY) if i not in FORBIDDEN]
TEMPERATURES = (0.5, 1.0, 3.0)


def logits_of(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, VOCABULARY, generator=generator)


def target_of(teacher: torch.Tensor, codes: torch.Tensor, spec=None):
    spec = spec or TopK(k=8, temperatures=TEMPERATURES, moments=True, dtype="float32")
    return restore(reduce(teacher, codes, spec, FORBIDDEN, END), spec, "cpu")


def distribution(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    """Probabilities in fp64 by the definition; 0 at forbidden ids."""
    scaled = logits.detach().double().numpy() / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    weights[..., list(FORBIDDEN)] = 0
    return weights / weights.sum(-1, keepdims=True)


def full_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) over the allowed ids."""
    return (p[..., ALLOWED] * (np.log(p[..., ALLOWED]) - np.log(q[..., ALLOWED]))).sum(-1)


def bucketed(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The K kept probabilities and, last, that of everything else."""
    kept = np.take_along_axis(p, ids, -1)
    rest = p.copy()
    np.put_along_axis(rest, ids, 0.0, -1)
    return np.concatenate([kept, rest.sum(-1, keepdims=True)], -1)


def pair(rows: int = 25):
    """Teacher and student logits [rows, V], the drawn codes [rows]."""
    return logits_of(rows, seed=1), logits_of(rows, seed=2), torch.arange(rows) % 5


def masked(student: torch.Tensor) -> torch.Tensor:
    return mask_forbidden(student, FORBIDDEN)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_dense_target_gives_the_full_divergence(temperature):
    teacher, student, codes = pair()
    target = target_of(teacher, codes, Full(dtype="float32"))
    found = kl_divergence(masked(student), target, temperature)
    p, q = (distribution(x, temperature) for x in (teacher, student))
    np.testing.assert_allclose(found, temperature**2 * full_kl(p, q), rtol=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_sparse_target_gives_the_divergence_over_the_kept_ids_and_one_for_the_rest(temperature):
    teacher, student, codes = pair()
    target = target_of(teacher, codes)
    found = kl_divergence(masked(student), target, temperature)
    p, q = (bucketed(distribution(x, temperature), target.ids.numpy()) for x in (teacher, student))
    np.testing.assert_allclose(found, temperature**2 * (p * np.log(p / q)).sum(-1), rtol=2e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_full_divergence_is_the_sparse_one_and_what_happens_within_the_tail(temperature):
    # Chain rule: KL(p‖q) = L + p_o KL(p(.|tail) ‖ q(.|tail)), so L never exceeds it.
    teacher, student, codes = pair()
    target = target_of(teacher, codes)
    sparse = kl_divergence(masked(student), target, temperature).double().numpy()
    p, q = (distribution(x, temperature) for x in (teacher, student))
    within = np.zeros(len(p))
    for row, ids in enumerate(target.ids.tolist()):
        tail = [i for i in ALLOWED if i not in ids]
        p_tail, q_tail = p[row, tail] / p[row, tail].sum(), q[row, tail] / q[row, tail].sum()
        within[row] = p[row, tail].sum() * (p_tail * np.log(p_tail / q_tail)).sum()
    full = temperature**2 * full_kl(p, q)
    np.testing.assert_allclose(sparse + temperature**2 * within, full, rtol=2e-5)
    assert (sparse >= 0).all()
    assert (sparse <= full).all()


def test_keeping_every_allowed_id_equals_the_dense_loss_and_gradient():
    teacher, student, codes = pair()
    gradients, values = [], []
    for spec in (TopK(k=len(ALLOWED), dtype="float32"), Full(dtype="float32")):
        leaf = student.clone().requires_grad_()
        loss = kl_divergence(masked(leaf), target_of(teacher, codes, spec))
        loss.sum().backward()
        values.append(loss.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(*values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradient_is_q_minus_p_on_kept_ids_and_the_students_own_shape_in_the_tail(temperature):
    teacher, student, codes = pair()
    target = target_of(teacher, codes)
    student.requires_grad_()
    kl_divergence(masked(student), target, temperature).sum().backward()
    found = student.grad.double().numpy() / temperature  # T^2 of the loss over 1/T of the chain
    p, q = (distribution(x, temperature) for x in (teacher, student))
    ids = target.ids.numpy()
    np.testing.assert_allclose(
        np.take_along_axis(found, ids, -1), np.take_along_axis(q - p, ids, -1), atol=2e-6
    )
    p_tail, q_tail = bucketed(p, ids)[:, -1:], bucketed(q, ids)[:, -1:]
    expected = q * (q_tail - p_tail) / q_tail
    np.put_along_axis(expected, ids, np.take_along_axis(q - p, ids, -1), -1)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_student_that_agrees_has_no_loss_and_no_gradient_though_it_differs_by_a_constant():
    teacher, _, codes = pair()
    student = (teacher + 5.0).requires_grad_()
    loss = kl_divergence(masked(student), target_of(teacher, codes))
    loss.sum().backward()
    assert loss.abs().max() < 2e-6
    assert student.grad.abs().max() < 2e-6


def test_a_student_sharper_than_its_teacher_is_not_rewarded_for_leaving_the_tail_out():
    # Truncated without a tail, this loss is negative on half of such rows.
    teacher, _, codes = pair()
    assert (kl_divergence(masked(1.5 * teacher), target_of(teacher, codes)) > 1e-4).all()


@pytest.mark.parametrize("spec", [TopK(k=6, dtype="float32"), Full(dtype="float32")])
def test_forbidden_ids_of_the_student_take_no_mass_and_no_gradient(spec):
    teacher, student, codes = pair()
    target = target_of(teacher, codes, spec)
    quiet = kl_divergence(masked(student), target)
    loud = student.index_fill(-1, torch.tensor(FORBIDDEN), 80.0).requires_grad_()
    loss = kl_divergence(masked(loud), target)
    loss.sum().backward()
    assert torch.equal(quiet, loss)
    assert (loud.grad[:, list(FORBIDDEN)] == 0).all()
    assert loud.grad.isfinite().all()


def test_a_tail_lost_to_subtraction_still_teaches():
    # The tail's mass is e^-20, below the resolution of 1 - P in fp32.
    teacher = torch.full((1, VOCABULARY), -20.0)
    teacher[0, 0] = 0.0
    student = teacher.clone()
    student[0, 1:] = -3.0
    target = target_of(teacher, torch.tensor([0]), TopK(k=3, dtype="float32"))
    p, q = (bucketed(distribution(x), target.ids.numpy()) for x in (teacher, student))
    found = kl_divergence(masked(student), target)
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(-1), rtol=1e-6)


def test_an_extreme_student_gives_finite_losses_and_gradients():
    teacher, student, codes = pair()
    student = (1e4 * student).requires_grad_()
    loss = kl_divergence(masked(student), target_of(teacher, codes))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


def test_cross_entropy_is_minus_the_log_probability_of_the_drawn_code():
    _, student, codes = pair()
    found = cross_entropy(masked(student).reshape(5, 5, -1), codes.reshape(5, 5))
    expected = -np.log(distribution(student)[np.arange(25), codes.numpy()]).reshape(5, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_error_of_the_logits_is_centred_and_divided_by_the_teachers_spread():
    teacher, student, codes = pair()
    target = target_of(teacher, codes, Full(dtype="float32"))
    found = nrmse(masked(student), target, FORBIDDEN)
    t, s = (x.double().numpy()[:, ALLOWED] for x in (teacher, student))
    t, s = t - t.mean(-1, keepdims=True), s - s.mean(-1, keepdims=True)
    np.testing.assert_allclose(found, np.sqrt(((s - t) ** 2).mean(-1)) / t.std(-1), rtol=1e-5)


def test_the_error_of_the_logits_from_a_sparse_target_takes_the_tail_at_its_mean():
    teacher, student, codes = pair()
    target = target_of(teacher, codes)
    t, s = (x.double().numpy() for x in (teacher, student))
    expected = []
    for row, ids in enumerate(target.ids.tolist()):
        tail = [i for i in ALLOWED if i not in ids]
        flat = t[row].copy()
        flat[tail] = t[row, tail].mean()
        ours, theirs = s[row, ALLOWED], flat[ALLOWED]
        error = (ours - ours.mean()) - (theirs - t[row, ALLOWED].mean())
        expected.append(np.sqrt((error**2).mean()) / t[row, ALLOWED].std())
    np.testing.assert_allclose(nrmse(masked(student), target, FORBIDDEN), expected, rtol=1e-4)


def test_the_error_of_the_logits_needs_moments_and_says_how_to_get_them():
    teacher, student, codes = pair()
    target = target_of(teacher, codes, TopK(k=8))
    with pytest.raises(UserError, match=r"target\.moments: true"):
        nrmse(masked(student), target, FORBIDDEN)


LENGTHS = torch.tensor([6, 2, 4])
EVERYTHING = LossConfig(kl=1.0, ce=0.5, nrmse=0.25)


def batch_of(spec=None):
    """Teacher, student [B, T, C, V], codes [B, T, C] and the restored target of a padded batch."""
    teacher, student = logits_of(3, 6, 2, seed=3), logits_of(3, 6, 2, seed=4)
    codes = torch.arange(36).reshape(3, 6, 2) % 5
    return student, codes, target_of(teacher, codes, spec)


def poisoned(target, lengths):
    """The same target with NaN and impossible ids beyond the end of every rollout."""
    beyond = torch.arange(6) >= lengths.unsqueeze(1)

    def poison(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[beyond] = torch.nan if x.is_floating_point() else 0
        return x

    if isinstance(target, DenseTarget):
        return DenseTarget(poison(target.logits))
    moments = None if target.moments is None else poison(target.moments)
    return SparseTarget(
        poison(target.ids), poison(target.logits), poison(target.tail_logmass),
        target.temperatures, moments,
    )  # fmt: skip


def total(student, target, codes, weights, config=EVERYTHING) -> torch.Tensor:
    terms = distillation_terms(student, target, codes, weights, FORBIDDEN, config)
    return sum(getattr(config, name) * term for name, term in terms.items())


def weights_of(lengths, rollout=(1.0, 0.1, 0.5), streams=(1.0, 0.3)) -> torch.Tensor:
    return element_weights(lengths, torch.tensor(rollout), torch.tensor(streams), 6)


@pytest.mark.parametrize("spec", [None, Full(dtype="float32")], ids=["top_k", "full"])
def test_nan_beyond_the_end_reaches_neither_loss_nor_gradient_and_without_the_mask_it_does(spec):
    student, codes, target = batch_of(spec)
    beyond = torch.arange(6) >= LENGTHS.unsqueeze(1)
    clean = student.clone().requires_grad_()
    expected = total(clean, target, codes, weights_of(LENGTHS))
    expected.backward()
    dirty = student.clone()
    dirty[beyond] = torch.nan
    dirty.requires_grad_()
    found = total(dirty, poisoned(target, LENGTHS), codes, weights_of(LENGTHS))
    found.backward()
    assert torch.equal(found, expected)
    assert torch.equal(dirty.grad, clean.grad)
    unmasked = weights_of(torch.full((3,), 6))
    assert total(dirty, poisoned(target, LENGTHS), codes, unmasked).isnan()


def test_every_term_is_the_weighted_sum_over_the_elements_that_count():
    student, codes, target = batch_of()
    weights = weights_of(LENGTHS)
    terms = distillation_terms(student, target, codes, weights, FORBIDDEN, EVERYTHING)
    by_hand = dict.fromkeys(("kl", "ce", "nrmse"), 0.0)
    losses = {
        "kl": kl_divergence(masked(student), target),
        "ce": cross_entropy(masked(student), codes),
        "nrmse": nrmse(masked(student), target, FORBIDDEN),
    }
    for row, (length, rollout) in enumerate(zip(LENGTHS.tolist(), (1.0, 0.1, 0.5), strict=True)):
        for timestep in range(length):
            for stream, weight in enumerate((1.0, 0.3)):
                for name, loss in losses.items():
                    by_hand[name] += rollout * weight * float(loss[row, timestep, stream])
    assert {name: pytest.approx(value, rel=1e-5) for name, value in by_hand.items()} == {
        name: float(term) for name, term in terms.items()
    }


def test_a_weight_of_zero_leaves_a_term_out():
    student, codes, target = batch_of(TopK(k=8))  # has no moments, so nrmse would raise
    terms = distillation_terms(
        student, target, codes, weights_of(LENGTHS), FORBIDDEN, LossConfig(kl=0, ce=1)
    )
    assert set(terms) == {"ce"}


def test_rollouts_one_by_one_give_the_gradient_of_the_whole_batch():
    # A mean per rollout, or over padded positions, would weigh short rollouts differently.
    student, codes, target = batch_of()
    weights = weights_of(LENGTHS)
    whole = student.clone().requires_grad_()
    (total(whole, target, codes, weights) / weights.sum()).backward()
    parts = student.clone().requires_grad_()
    for row, length in enumerate(LENGTHS.tolist()):
        cut = (slice(row, row + 1), slice(length))
        part = SparseTarget(
            target.ids[cut], target.logits[cut], target.tail_logmass[cut],
            target.temperatures, target.moments[cut],
        )  # fmt: skip
        (total(parts[cut], part, codes[cut], weights[cut]) / weights.sum()).backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-8, rtol=1e-5)


def test_a_batch_whose_rollouts_all_weigh_nothing_has_no_loss_and_no_gradient():
    student, codes, target = batch_of()
    student.requires_grad_()
    loss = total(student, target, codes, weights_of(LENGTHS, rollout=(0.0, 0.0, 0.0)))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_half_precision_logits_of_a_student_are_lifted_before_anything_is_summed():
    student, codes, target = batch_of()
    half = student.bfloat16()
    weights = weights_of(LENGTHS)
    assert total(half, target, codes, weights) == total(half.float(), target, codes, weights)
