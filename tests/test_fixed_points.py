"""Where a loss leads: free logits trained on stored targets end at the teacher's distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.loss_config import LossConfig
from stages.losses import distillation_loss
from stages.targets import Forbidden, RestoredTarget, SampledTarget, restore
from store.schema import Full, Sampled, Target, TopK
from store.synthetic import synthetic_manifest
from tests.stored_targets import ALLOWED, FORBIDDEN, V, softmax, stored

Tensor = torch.Tensor
K = 6


def teacher() -> np.ndarray:
    """[V] float32 logits; the K likeliest ids hold about half of the mass, tail ids differ."""
    logits = np.random.default_rng(3).normal(scale=1.2, size=V).astype(np.float32)
    logits[list(FORBIDDEN)] = -np.inf
    return logits - logits.max()


def target_of(spec: Target, timesteps: int = 1) -> RestoredTarget:
    """The stored target of `timesteps` timesteps at which the teacher predicts the same."""
    logits = np.tile(teacher(), (1, timesteps, 1, 1))
    arrays = stored(spec, logits, np.random.default_rng(0))
    return restore(arrays, synthetic_manifest(spec, 1, V), None, "cpu")


def trained(target: RestoredTarget, timesteps: int = 1, rounds: int = 60, **terms) -> np.ndarray:
    """[V] probabilities of free logits, one row for all timesteps, at the end of training."""
    config = LossConfig.model_validate({"kl": 0.0} | terms)
    free = torch.zeros(V, requires_grad=True)
    forbidden = Forbidden(torch.tensor(FORBIDDEN), None)
    codes = torch.zeros(1, timesteps, 1, dtype=torch.int64)

    def loss() -> Tensor:
        logits = free.expand(1, timesteps, 1, V)
        weights = torch.ones(1, timesteps, 1)
        return distillation_loss(logits, target, codes, weights, forbidden, config)[0] / timesteps

    minimise(free, loss, rounds)
    return softmax(forbidden.fill_(free.detach().double().clone()).numpy())


def minimise(free: Tensor, loss, rounds: int) -> None:
    optimizer = torch.optim.LBFGS(
        [free], max_iter=40, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(rounds // 20):
        optimizer.step(closure)


def kept_and_rest() -> tuple[np.ndarray, np.ndarray, list[int]]:
    p = softmax(teacher().astype(np.float64))
    ids = np.sort(np.argsort(-p)[:K])
    return p, ids, [i for i in ALLOWED if i not in ids]


@pytest.mark.parametrize("term", ["kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"])
def test_every_divergence_leads_from_the_whole_distribution_to_the_teacher(term):
    p, _, _ = kept_and_rest()
    q = trained(target_of(Full(dtype="float32")), **{term: 1.0})
    np.testing.assert_allclose(q, p, atol=2e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("term", ["kl", "reverse_kl", "jsd"])
def test_kept_ids_and_tail_lead_to_the_teachers_probabilities_of_both(term, temperature):
    p, ids, rest = kept_and_rest()
    spec = TopK(k=K, temperatures=(0.5, 1.0, 2.0), dtype="float32")
    q = trained(target_of(spec), temperature=temperature, **{term: 1.0})
    # The shape of the tail is the student's own: equal, as it began.
    assert np.ptp(np.log(q[rest])) < 1e-3
    tempered = softmax(teacher().astype(np.float64) / temperature)
    again = softmax(np.log(q, where=q > 0, out=np.full(V, -np.inf)) / temperature)
    np.testing.assert_allclose(again[ids], tempered[ids], atol=2e-4)
    np.testing.assert_allclose(again[rest].sum(), tempered[rest].sum(), atol=2e-4)
    if temperature == 1.0:
        np.testing.assert_allclose(q[ids], p[ids], atol=2e-4)


def test_the_renormalising_shortcut_leads_to_an_overconfident_student():
    # What several libraries do: teacher renormalised over the kept ids, student over all of them.
    p, ids, rest = kept_and_rest()
    kept = torch.from_numpy(p[ids] / p[ids].sum()).float()
    free = torch.zeros(V, requires_grad=True)
    forbidden = Forbidden(torch.tensor(FORBIDDEN), None)

    def shortcut() -> Tensor:
        log_q = forbidden.fill_(free.clone()).log_softmax(-1)[torch.from_numpy(ids)]
        return (kept * (kept.log() - log_q)).sum()

    minimise(free, shortcut, 60)
    q = softmax(forbidden.fill_(free.detach().double().clone()).numpy())
    assert p[rest].sum() > 0.2
    assert q[rest].sum() < 0.01
    assert (q[ids] > 1.2 * p[ids]).all()


def test_draws_from_the_tail_lead_to_the_teachers_own_shape_there():
    p, ids, rest = kept_and_rest()
    timesteps = 2000
    target = target_of(TopK(k=K, tail_samples=8, dtype="float32"), timesteps)
    q = trained(target, timesteps, kl=1.0, tail_share=0.3)
    np.testing.assert_allclose(q[ids], p[ids], atol=2e-4)
    np.testing.assert_allclose(q[rest].sum(), p[rest].sum(), atol=2e-4)
    # 16,000 draws: a share of x is known to about sqrt(x / 16,000).
    expected, found = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(expected.max() / 16_000))
    assert abs(found - expected).max() < 0.1 * np.abs(1 / len(rest) - expected).max()


def test_without_their_share_of_the_loss_the_draws_are_not_read():
    target = target_of(TopK(k=K, tail_samples=8, dtype="float32"))
    _, _, rest = kept_and_rest()
    assert np.ptp(np.log(trained(target, kl=1.0)[rest])) < 1e-3


def test_stored_draws_lead_to_their_frequencies_and_those_are_the_teachers():
    timesteps = 500
    target = target_of(Sampled(draws=40), timesteps)
    assert isinstance(target, SampledTarget)
    q = trained(target, timesteps, soft_ce=1.0)
    frequencies = np.bincount(target.ids.long().flatten(), minlength=V) / target.ids.numel()
    np.testing.assert_allclose(q, frequencies, atol=2e-4)
    p, _, _ = kept_and_rest()
    np.testing.assert_allclose(q, p, atol=5 * np.sqrt(p.max() / (40 * timesteps)))
