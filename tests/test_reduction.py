"""What is kept of a teacher's predictions, against an independent formula in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.guidance import guide
from stages.philox import uniforms
from stages.reduction import (
    all_finite,
    reduce,
    reduce_branches,
    reduce_dense,
    reduce_hidden,
)
from stages.targets import Forbidden, SparseTarget
from store.schema import Full, Hidden, Sampled, TopK

VOCABULARY, FORBIDDEN, END = 40, (5, 38), 39
MASK = Forbidden(torch.tensor(FORBIDDEN), None)
NOTHING = Forbidden(torch.empty(0, dtype=torch.int64), None)
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
    return reduce(logits, codes, TopK(**target), MASK, END)


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


def tied_logits(rows: int = 400, vocabulary: int = 256) -> torch.Tensor:
    """Logits of few different values, as bfloat16 and smaller types have them."""
    return teacher_logits(rows, 3.0, vocabulary).mul(4).round().div(4)


@pytest.mark.parametrize("k", [3, 4, 16, 64, 255, 256])
def test_of_equal_logits_at_the_border_the_lower_ids_are_kept(k):
    logits = tied_logits()
    codes = torch.arange(400) % 256
    ids = reduce(logits, codes, TopK(k=k), NOTHING, 255)["ids"].numpy()
    values = logits.numpy().copy()
    values[np.arange(400), codes] = values[:, 255] = np.inf
    ranked = np.lexsort((np.broadcast_to(np.arange(256), values.shape), -values), axis=-1)
    np.testing.assert_array_equal(ids, np.sort(ranked[:, :k], -1))
    if k == 16:
        border = np.take_along_axis(values, ranked[:, k - 1 : k + 1], -1)
        assert (border[:, 0] == border[:, 1]).mean() > 0.5, "such rows must be among them"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [256, 2048, 152_064])
@pytest.mark.parametrize("k", [16, 64, 128])
def test_an_accelerator_keeps_the_same_of_equal_logits(k, vocabulary):
    for rows in (1, 40, 400):
        logits = tied_logits(rows, vocabulary)
        codes = torch.arange(rows) % vocabulary
        expected = reduce(logits, codes, TopK(k=k), NOTHING, 255)["ids"]
        nothing = Forbidden(NOTHING.ids.cuda(), None)
        found = reduce(logits.cuda(), codes.cuda(), TopK(k=k), nothing, 255)["ids"]
        assert torch.equal(found.cpu(), expected)


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
    arrays = reduce(logits, codes, target, MASK, END)
    assert (arrays["tail_logmass"] == -torch.inf).all()
    restored = SparseTarget(arrays["ids"], arrays["logits"], arrays["tail_logmass"], (1.0,))
    kept = restored.logprobs(1.0)[..., :-1]
    dense = reduce(logits, codes, Full(dtype="float32"), MASK, END)["logits"]
    expected = dense.double().log_softmax(-1).gather(-1, arrays["ids"])
    torch.testing.assert_close(kept.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("k", [3, 8, 32])
def test_the_mass_of_the_tail_is_exact_at_every_temperature(k):
    logits, codes = teacher_logits(), allowed_codes()
    arrays = reduced(logits, codes, k=k, temperatures=TEMPERATURES)
    for place, temperature in enumerate(TEMPERATURES):
        tail = reference(logits, temperature)
        np.put_along_axis(tail, arrays["ids"].numpy(), 0.0, -1)
        np.testing.assert_allclose(
            arrays["tail_logmass"][:, place], np.log(tail.sum(-1)), rtol=1e-5, atol=1e-6
        )


def test_the_temperatures_of_the_tail_are_not_powers_of_one_another():
    # A tail mass to the power 1/T, renormalised, is not the tail at T (N equal ids have
    # N^(1 - 1/T) times as much): the stored value must be the exact one.
    logits = torch.zeros(1, 1002)
    logits[0, :2] = 12.0
    target = TopK(k=2, temperatures=(1.0, 2.0), dtype="float32")
    arrays = reduce(logits, torch.tensor([0]), target, NOTHING, 1)
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


def test_levels_give_the_logits_back_that_were_there():
    logits, codes = teacher_logits() + 7.0, allowed_codes()
    arrays = reduce(logits, codes, Full(dtype="float32", levels=True), MASK, END)
    assert arrays["levels"].shape == codes.shape
    assert arrays["levels"].dtype == torch.float32
    known = arrays["logits"] + arrays["levels"].unsqueeze(-1)
    expected = logits.index_fill(-1, torch.tensor(FORBIDDEN), -torch.inf)
    torch.testing.assert_close(known, expected, atol=2e-6, rtol=1e-6)
    assert set(reduce(logits, codes, Full(), MASK, END)) == {"logits"}


def test_forbidden_ids_take_no_mass_however_likely():
    logits, codes = teacher_logits(), allowed_codes()
    loud = logits.index_fill(-1, torch.tensor(FORBIDDEN), 60.0)
    for target in (TopK(k=4, moments=True), Full()):
        quiet_arrays, loud_arrays = (reduce(x, codes, target, MASK, END) for x in (logits, loud))
        assert all(torch.equal(quiet_arrays[name], loud_arrays[name]) for name in quiet_arrays)
    assert (loud_arrays["logits"][:, list(FORBIDDEN)] == -torch.inf).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_that_is_not_finite_is_noticed(bad, dtype):
    logits = teacher_logits().to(dtype)
    assert all_finite({"logits": logits}, MASK)
    for place in ((7, 20), (29, 39)):
        spoiled = logits.clone()
        spoiled[place] = bad
        assert not all_finite({"cond": logits, "uncond": spoiled}, MASK)
        assert not all_finite({"cond.backbone": spoiled}, MASK)


def test_the_least_numbers_there_are_are_finite_though_their_sum_is_not():
    logits = teacher_logits()
    logits[:, :20] = torch.finfo(torch.float32).min
    assert all_finite({"logits": logits}, MASK)


@pytest.mark.parametrize("anything", [torch.nan, torch.inf, -torch.inf])
def test_only_logits_have_forbidden_ids_that_may_hold_anything(anything):
    logits = teacher_logits()
    logits[:, FORBIDDEN[0]] = anything
    assert all_finite({"logits": logits}, MASK)
    assert not all_finite({"cond.backbone": logits}, MASK), "a state has no ids"
    assert not all_finite({"logits": logits}, NOTHING)


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


def grid(rows: int, count: int) -> torch.Tensor:
    """Uniform numbers [rows, count] that cover the unit interval evenly, in no order."""
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return numbers[torch.randperm(count, generator=torch.Generator().manual_seed(0))].expand(
        rows, -1
    )


def counts(ids: torch.Tensor, vocabulary: int) -> np.ndarray:
    """How often every id was drawn, [rows, V]."""
    return np.stack([np.bincount(row, minlength=vocabulary) for row in ids.numpy()])


def test_every_id_is_sampled_for_exactly_its_share_of_the_unit_interval():
    logits, draws = teacher_logits(6), 20_000
    arrays = reduce(logits, allowed_codes(6), Sampled(draws=1), MASK, END, grid(6, draws))
    ids = arrays["ids"]
    assert (ids[:, 1:] >= ids[:, :-1]).all(), "draws are stored in order"
    np.testing.assert_allclose(counts(ids, VOCABULARY), draws * reference(logits), atol=1.01)


def test_in_a_large_vocabulary_every_id_still_has_an_interval_of_its_own():
    # A cumulative sum in float32 has steps of 6e-8 near 1, as wide as the ids it should tell apart.
    vocabulary = 151_936
    logits = teacher_logits(1, 2.0, vocabulary)
    ends = np.cumsum(logits.double().softmax(-1).numpy())
    middles = torch.from_numpy(ends - np.diff(ends, prepend=0) / 2)[None]
    ids = reduce(logits, torch.tensor([0]), Sampled(draws=1), NOTHING, None, middles)["ids"]
    assert (ids[0] != torch.arange(vocabulary)).float().mean() < 1e-3


def test_keyed_draws_follow_the_distribution_by_the_chi_square_test():
    rows, draws = 4, 20_000
    logits = teacher_logits(1, 2.0).expand(rows, -1)
    numbers = uniforms(torch.arange(rows), torch.tensor([0, 7, 7, 9]), 1, draws)[:, 0]
    ids = reduce(logits, allowed_codes(rows), Sampled(draws=1), MASK, END, numbers)["ids"]
    expected = rows * draws * reference(logits[:1])[0]
    observed = counts(ids, VOCABULARY).sum(0)
    likely = expected > 5
    assert likely.sum() > 25
    difference = observed[likely] - expected[likely]
    # The 99.9 % quantile for 40 degrees of freedom is 73.4; a biased draw gives hundreds.
    assert (difference**2 / expected[likely]).sum() < 73.4
    assert observed[list(FORBIDDEN)].sum() == 0


def test_ids_of_the_tail_are_drawn_from_the_teacher_s_own_tail():
    logits, codes, draws = teacher_logits(6), allowed_codes(6), 20_000
    target = TopK(k=8, tail_samples=1)
    arrays = reduce(logits, codes, target, MASK, END, grid(6, draws))
    tail = reference(logits)
    np.put_along_axis(tail, arrays["ids"].numpy(), 0.0, -1)
    tail /= tail.sum(-1, keepdims=True)
    np.testing.assert_allclose(counts(arrays["tail_ids"], VOCABULARY), draws * tail, atol=1.01)
    assert (arrays["tail_ids"].diff(dim=-1) >= 0).all()


def test_a_tail_without_any_mass_in_float32_still_has_a_shape():
    logits = torch.full((1, VOCABULARY), -300.0)
    logits[0, [0, 1, END]] = torch.tensor([0.0, -1.0, -2.0])
    logits[0, 10], logits[0, 11] = -250.0, -250.0 + np.log(3)
    target = TopK(k=3, tail_samples=1)
    arrays = reduce(logits, torch.tensor([0]), target, MASK, END, grid(1, 1000))
    assert logits.softmax(-1)[0, 10] == 0
    drawn = counts(arrays["tail_ids"], VOCABULARY)[0]
    assert drawn[10] == pytest.approx(250, abs=1)
    assert drawn[11] == pytest.approx(750, abs=1)
    exact = -250 + np.log(4) - np.log(1 + np.exp(-1) + np.exp(-2))
    assert arrays["tail_logmass"].item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 30])
def test_draws_do_not_depend_on_how_many_rows_are_drawn_at_once(rows, monkeypatch):
    logits, codes = teacher_logits(), allowed_codes()
    numbers = uniforms(torch.arange(30), torch.arange(30), 1, 50)[:, 0]
    target = TopK(k=4, tail_samples=1)
    together = reduce(logits, codes, target, MASK, END, numbers)
    monkeypatch.setattr("stages.reduction.DRAW_VALUES", (0, rows * VOCABULARY))
    parted = reduce(logits, codes, target, MASK, END, numbers)
    alone = [
        reduce(logits[i : i + 1], codes[i : i + 1], target, MASK, END, numbers[i : i + 1])
        for i in range(30)
    ]
    for name in together:
        assert torch.equal(together[name], parted[name])
        assert torch.equal(together[name], torch.cat([arrays[name] for arrays in alone]))


@pytest.mark.parametrize("target", [Sampled(), TopK(k=4, tail_samples=2)], ids=lambda t: t.kind)
def test_targets_that_draw_say_so_when_they_get_no_numbers(target):
    with pytest.raises(ValueError, match="uniform numbers"):
        reduce(teacher_logits(), allowed_codes(), target, MASK, END)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 7.0])
def test_branches_mixed_later_are_the_guided_distribution(scale):
    cond, uncond = teacher_logits(), teacher_logits().flip(0) + 5.0
    stored = reduce_branches({"cond": cond.bfloat16(), "uncond": uncond.bfloat16()}, MASK)
    for logits in stored.values():
        assert logits.dtype == torch.float32
        assert (logits.max(-1).values == 0).all()
        assert (logits[:, list(FORBIDDEN)] == -torch.inf).all()
    finite = {name: x.masked_fill(x.isinf(), 0.0) for name, x in stored.items()}
    mixed = guide(finite["cond"], finite["uncond"], scale)
    exact = guide(cond.bfloat16().double(), uncond.bfloat16().double(), scale)
    np.testing.assert_allclose(reference(mixed), reference(exact), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [0.5, 2.5])
def test_states_are_mixed_in_float32_as_the_logits_of_a_linear_head_would_be(scale):
    generator = torch.Generator().manual_seed(2)
    cond, uncond = (torch.randn(30, 1, 16, generator=generator).bfloat16() for _ in range(2))
    weight, bias = torch.randn(40, 16, generator=generator), torch.randn(40, generator=generator)
    states = {"cond.a": cond, "uncond.a": uncond}
    (mixed,) = reduce_hidden(states, Hidden(), scale).values()
    head_of_mixed = mixed.double() @ weight.double().T + bias
    by_branch = [x.double() @ weight.double().T + bias for x in (cond, uncond)]
    expected = scale * by_branch[0] + (1 - scale) * by_branch[1]
    torch.testing.assert_close(head_of_mixed, expected, atol=1e-5, rtol=1e-5)
    both = reduce_hidden(states, Hidden(branches="both"), scale)
    assert torch.equal(both["cond.a"], cond.float())
    assert torch.equal(both["uncond.a"], uncond.float())


def test_without_an_unconditional_branch_the_conditional_state_is_what_is_taught():
    state = teacher_logits()
    assert torch.equal(reduce_hidden({"cond.a": state}, Hidden(), 1.0)["a"], state)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_continuous_predictions_are_kept_as_branch_and_difference(scale):
    cond, uncond = (x.bfloat16().view(30, 2, 4, 5) for x in (teacher_logits(), -teacher_logits()))
    expected = scale * cond.double() + (1 - scale) * uncond.double()
    both = reduce_dense(cond, uncond)
    mixed = both["cond"].double() + (scale - 1) * both["delta"].double()
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="unconditional"):
        reduce_dense(cond, None)
