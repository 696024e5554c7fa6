"""Targets: what is kept of a teacher's distribution, against an independent formula in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.errors import UserError
from stages.reduction import reduce
from stages.targets import DenseTarget, SparseTarget, restore
from store.schema import Full, TopK

VOCABULARY, FORBIDDEN, END = 40, (5, 38), 39
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)


def teacher_logits(
    rows: int = 30, scale: float = 3.0, vocabulary: int = VOCABULARY
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(rows, vocabulary, generator=generator)


def allowed_codes(rows: int = 30) -> torch.Tensor:
    return torch.tensor([(7 * i) % 38 if (7 * i) % 38 not in FORBIDDEN else 0 for i in range(rows)])


def reference(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    """Probabilities [rows, V] in fp64, 0 at forbidden ids."""
    weights = np.exp((logits.numpy().astype(np.float64) - logits.numpy().max()) / temperature)
    weights[:, list(FORBIDDEN)] = 0
    return weights / weights.sum(-1, keepdims=True)


def reduced(logits, codes, **target) -> dict[str, torch.Tensor]:
    return reduce(logits, codes, TopK(**target), FORBIDDEN, END)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [3, 8, 32])
def test_ids_and_tail_restore_every_probability_at_every_listed_temperature(k, temperature):
    logits, codes = teacher_logits(), allowed_codes()
    target = TopK(k=k, temperatures=TEMPERATURES, dtype="float32")
    arrays = reduce(logits, codes, target, FORBIDDEN, END)
    restored = restore(arrays, target, "cpu")
    assert isinstance(restored, SparseTarget)
    kept, tail = (x.double().exp().numpy() for x in restored.logprobs(temperature))
    probabilities = reference(logits, temperature)
    expected = np.take_along_axis(probabilities, arrays["ids"].numpy(), -1)
    np.testing.assert_allclose(kept, expected, rtol=2e-5, atol=5e-8)
    np.testing.assert_allclose(tail, 1 - expected.sum(-1), rtol=2e-4, atol=1e-12)


def test_a_kept_mass_far_below_one_is_restored_though_the_tail_is_nearly_everything():
    vocabulary = 5000
    logits = teacher_logits(8, 0.01, vocabulary)
    target = TopK(k=2, dtype="float32")
    arrays = reduce(logits, torch.zeros(8, dtype=torch.int64), target, (), 1)
    kept, _ = restore(arrays, target, "cpu").logprobs(1.0)
    exact = logits.double().log_softmax(-1).gather(-1, arrays["ids"])
    torch.testing.assert_close(kept.double(), exact, atol=5e-3, rtol=0)


def test_a_log_mass_above_zero_by_rounding_gives_no_nan():
    # The store lets a log mass exceed 0 by 1e-5, the rounding of two logsumexp in fp32.
    target = SparseTarget(
        torch.tensor([[0, 1]]), torch.tensor([[0.0, -1.0]]), torch.tensor([[5e-6]]), (1.0,), None
    )
    kept, tail = target.logprobs(1.0)
    assert not kept.isnan().any()
    assert tail.item() == pytest.approx(0, abs=1e-5)


def test_a_temperature_that_was_not_stored_is_refused_with_those_that_were():
    target = TopK(k=4, temperatures=(1.0, 2.0))
    restored = restore(
        reduce(teacher_logits(), allowed_codes(), target, FORBIDDEN, END), target, "cpu"
    )
    with pytest.raises(UserError, match=r"temperature 1\.5 .*\[1\.0, 2\.0\].*roll out again"):
        restored.logprobs(1.5)


def test_a_dense_target_restores_the_whole_distribution():
    logits, codes = teacher_logits(), allowed_codes()
    target = Full(dtype="float32")
    restored = restore(reduce(logits, codes, target, FORBIDDEN, END), target, "cpu")
    assert isinstance(restored, DenseTarget)
    np.testing.assert_allclose(restored.logits.double().softmax(-1), reference(logits), atol=1e-6)
