"""What is kept of a teacher's predictions, against an independent formula in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.reduction import reduce
from stages.targets import restore
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


@pytest.mark.parametrize("k", [3, 4, 16, 38])
def test_the_likeliest_ids_are_kept_with_the_drawn_code_and_the_end(k):
    logits, codes = teacher_logits(), allowed_codes()
    arrays = reduced(logits, codes, k=k)
    probabilities = reference(logits)
    for row in range(len(logits)):
        ids = arrays["ids"][row].tolist()
        forced = {int(codes[row]), END}
        ranked = [i for i in np.argsort(-probabilities[row]) if i not in forced | set(FORBIDDEN)]
        assert set(ids) == forced | set(ranked[: k - len(forced)])
        assert not set(ids) & set(FORBIDDEN)
        assert ids == sorted(ids)
        assert arrays["logits"][row].max() == 0


def test_a_tail_far_below_fp32_resolution_keeps_its_mass_where_subtraction_loses_it():
    logits = torch.full((1, VOCABULARY), -30.0)
    logits[0, 0] = 0.0
    arrays = reduced(logits, torch.tensor([0]), k=2)
    # 40 ids less 2 forbidden ones and 2 kept ones, each e^-30 of the whole (1 + 37 e^-30).
    exact = np.log(36) - 30 - np.log1p(37 * np.exp(-30.0))
    assert arrays["tail_logmass"].item() == pytest.approx(exact, rel=1e-6)
    kept = logits.log_softmax(-1)[0, arrays["ids"][0]].exp().sum()
    assert (1 - kept).item() == 0, "by subtraction nothing would be left of it"


def test_when_every_allowed_id_is_kept_the_tail_is_empty_and_dense_and_sparse_agree():
    logits, codes = teacher_logits(), allowed_codes()
    k = VOCABULARY - len(FORBIDDEN)
    target = TopK(k=k, dtype="float32")
    arrays = reduce(logits, codes, target, FORBIDDEN, END)
    assert (arrays["tail_logmass"] == -torch.inf).all()
    kept, _ = restore(arrays, target, "cpu").logprobs(1.0)
    dense = reduce(logits, codes, Full(dtype="float32"), FORBIDDEN, END)["logits"]
    expected = dense.double().log_softmax(-1).gather(-1, arrays["ids"])
    torch.testing.assert_close(kept.double(), expected, atol=1e-6, rtol=1e-6)


def test_the_temperatures_of_the_tail_are_not_powers_of_one_another():
    # A tail mass to the power 1/T, renormalised, is not the tail at T (N equal ids have
    # N^(1 - 1/T) times as much): the stored value must be the exact one.
    logits = torch.zeros(1, 1002)
    logits[0, :2] = 12.0
    target = TopK(k=2, temperatures=(1.0, 2.0), dtype="float32")
    arrays = reduce(logits, torch.tensor([0]), target, (), 1)
    at_one, at_two = arrays["tail_logmass"][0].double().exp().tolist()
    assert at_one == pytest.approx(1000 / (1000 + 2 * np.exp(12.0)), rel=1e-5)
    assert at_two == pytest.approx(1000 / (1000 + 2 * np.exp(6.0)), rel=1e-5)
    powers = at_one**0.5, (1 - at_one) ** 0.5
    assert at_two > 10 * powers[0] / sum(powers)


def test_moments_are_those_of_the_allowed_logits_relative_to_the_row_maximum():
    logits, codes = teacher_logits(), allowed_codes()
    arrays = reduced(logits, codes, k=4, moments=True)
    allowed = np.delete(logits.double().numpy(), FORBIDDEN, axis=-1)
    relative = allowed - allowed.max(-1, keepdims=True)
    np.testing.assert_allclose(arrays["moments"][:, 0], relative.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(arrays["moments"][:, 1], relative.std(-1), rtol=1e-5)


def test_a_constant_added_to_a_row_changes_nothing_that_is_stored():
    logits, codes = teacher_logits(), allowed_codes()
    plain = reduced(logits, codes, k=8, moments=True)
    moved = reduced(logits + 64.0, codes, k=8, moments=True)
    assert torch.equal(plain["ids"], moved["ids"])
    for name in ("logits", "tail_logmass", "moments"):
        torch.testing.assert_close(plain[name], moved[name], atol=2e-5, rtol=1e-5)


def test_forbidden_ids_take_no_mass_however_likely():
    logits, codes = teacher_logits(), allowed_codes()
    loud = logits.index_fill(-1, torch.tensor(FORBIDDEN), 60.0)
    for target in (TopK(k=4, moments=True), Full()):
        quiet_arrays, loud_arrays = (
            reduce(x, codes, target, FORBIDDEN, END) for x in (logits, loud)
        )
        assert all(torch.equal(quiet_arrays[name], loud_arrays[name]) for name in quiet_arrays)
    assert (loud_arrays["logits"][:, list(FORBIDDEN)] == -torch.inf).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("target", [TopK(k=4), Full()], ids=["top_k", "full"])
def test_a_logit_that_is_not_finite_is_refused(bad, target):
    logits = teacher_logits()
    logits[7, 20] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        reduce(logits, allowed_codes(), target, FORBIDDEN, END)


def test_what_stands_at_forbidden_ids_may_be_anything():
    logits = teacher_logits()
    logits[:, FORBIDDEN[0]] = torch.nan
    logits[:, FORBIDDEN[1]] = -torch.inf
    arrays = reduced(logits, allowed_codes(), k=4)
    assert arrays["logits"].isfinite().all()
    assert arrays["tail_logmass"].isfinite().all()


def test_bfloat16_logits_are_reduced_in_float32():
    logits, codes = teacher_logits().bfloat16(), allowed_codes()
    arrays = reduced(logits, codes, k=8)
    expected = reduced(logits.float(), codes, k=8)
    assert all(torch.equal(arrays[name], expected[name]) for name in arrays)
