"""Conversion of predictions: affine, exact where something can be said, finite everywhere."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.diffusion.model_config import ScheduleConfig
from stages.diffusion.predictions import convert, factor, of_pair
from stages.diffusion.schedule import Schedule, facts_of
from stages.guidance import guide

TYPES = ("epsilon", "v_prediction", "sample", "flow")
PAIRS = list(product(TYPES, TYPES))
SHAPE = (3, 4, 5)


def pair_of(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, rows, *SHAPE, generator=generator)
    return x0, noise


def wide(factors: torch.Tensor) -> torch.Tensor:
    return factors.reshape(-1, 1, 1, 1)


def noised(x0, noise, alpha, sigma) -> torch.Tensor:
    return (wide(alpha) * x0.double() + wide(sigma) * noise.double()).float()


def levels(kind: str, rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Alpha and sigma [rows] float64, ends left out: on the circle, on the line, or anywhere."""
    share = torch.linspace(0.02, 0.98, rows, dtype=torch.float64)
    if kind == "flow":
        return 1 - share, share
    if kind == "ddpm":
        return (share * torch.pi / 2).cos(), (share * torch.pi / 2).sin()
    return 3 * share.flip(0), 0.5 + share


def by_formula(name: str, x0, noise, alpha, sigma) -> torch.Tensor:
    match name:
        case "epsilon":
            return noise
        case "sample":
            return x0
        case "v_prediction":
            return wide(alpha) * noise - wide(sigma) * x0
    return noise - x0


@pytest.mark.parametrize(("source", "wanted"), PAIRS)
@pytest.mark.parametrize("kind", ["ddpm", "flow", "general"])
def test_every_type_becomes_every_other(source, wanted, kind):
    alpha, sigma = levels(kind)
    x0, noise = pair_of(len(alpha))
    value = by_formula(source, x0.double(), noise.double(), alpha, sigma)
    expected = by_formula(wanted, x0.double(), noise.double(), alpha, sigma)
    x_t = noised(x0, noise, alpha, sigma)
    got = convert(value.float(), x_t, alpha, sigma, source, wanted)
    assert got.dtype == torch.float32
    # What rounding of the value and of x_t to float32 becomes on the way.
    scale = 1 + factor(alpha, sigma, source, wanted) * (1 + value.abs().amax((1, 2, 3)))
    error = (got - expected).abs().amax((1, 2, 3)) / scale
    assert error.max() < 8 * 2**-24


@pytest.mark.parametrize("name", TYPES)
def test_a_perfect_prediction_is_made_of_x0_and_noise(name):
    alpha, sigma = levels("ddpm")
    x0, noise = pair_of(len(alpha))
    got = of_pair(x0.half(), noise, alpha.float(), sigma.float(), name)
    assert got.dtype == torch.float32
    expected = by_formula(name, x0.half().double(), noise.double(), alpha, sigma)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_x0_and_noise_that_a_prediction_implies_give_x_t_again():
    alpha, sigma = levels("flow")
    x_t, value = pair_of(len(alpha), seed=1)  # a prediction that belongs to no image
    for source in TYPES:
        x0 = convert(value, x_t, alpha, sigma, source, "sample")
        noise = convert(value, x_t, alpha, sigma, source, "epsilon")
        back = noised(x0, noise, alpha, sigma)
        torch.testing.assert_close(back, x_t, rtol=1e-4, atol=3e-5)
        made = of_pair(x0, noise, alpha, sigma, source)
        torch.testing.assert_close(made, value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("source", "wanted"), PAIRS)
def test_guidance_before_conversion_is_guidance_after_it(source, wanted):
    alpha, sigma = levels("ddpm")
    kept = factor(alpha, sigma, source, wanted) < 8
    alpha, sigma = alpha[kept], sigma[kept]
    x_t, cond = pair_of(len(alpha), seed=2)
    uncond = cond + 0.2 * pair_of(len(alpha), seed=3)[0]
    before = convert(guide(cond, uncond, 7.5), x_t, alpha, sigma, source, wanted)
    parts = [convert(each, x_t, alpha, sigma, source, wanted) for each in (cond, uncond)]
    torch.testing.assert_close(before, guide(*parts, 7.5), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("source", "wanted"), PAIRS)
@pytest.mark.parametrize("kind", ["ddpm", "flow", "general"])
def test_the_factor_is_by_how_much_an_error_grows(source, wanted, kind):
    alpha, sigma = levels(kind)
    x_t, value = pair_of(len(alpha), seed=4)
    error = torch.full_like(value, 1.0)
    off, right = (
        convert(each, x_t, alpha, sigma, source, wanted) for each in (value + error, value)
    )
    grown = (off - right).abs().mean((1, 2, 3)).double()
    expected = factor(alpha, sigma, source, wanted)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(grown, expected, rtol=1e-4, atol=1e-4)
    back = factor(alpha, sigma, wanted, source)
    torch.testing.assert_close(expected * back, torch.ones_like(expected))


def test_at_the_ends_nothing_is_infinite_and_the_factor_says_what_to_leave_out():
    alpha = torch.tensor([0.0, 1.0], dtype=torch.float64)
    sigma = 1 - alpha
    x_t, value = pair_of(2, seed=5)
    lost = {("epsilon", "sample"), ("epsilon", "v_prediction"), ("epsilon", "flow")}
    gone = {("sample", "epsilon"), ("sample", "v_prediction"), ("sample", "flow")}
    for source, wanted in PAIRS:
        got = convert(value, x_t, alpha, sigma, source, wanted)
        assert got.isfinite().all(), (source, wanted)
        infinite = factor(alpha, sigma, source, wanted).isinf().tolist()
        assert infinite == [(source, wanted) in lost, (source, wanted) in gone], (source, wanted)
        for row, none in enumerate(infinite):
            assert not none or not got[row].any()
    # At pure noise x_t is the noise and at no noise it is the image, whatever was predicted.
    for source in ("v_prediction", "flow"):
        torch.testing.assert_close(convert(value, x_t, alpha, sigma, source, "epsilon")[0], x_t[0])
        torch.testing.assert_close(convert(value, x_t, alpha, sigma, source, "sample")[1], x_t[1])
    torch.testing.assert_close(
        convert(value, x_t, alpha, sigma, "v_prediction", "sample")[0], -value[0]
    )


def test_where_float32_would_be_amplified_to_noise_a_value_says_nothing():
    for source, wanted, at in (("epsilon", "sample", 0), ("sample", "epsilon", 1)):
        levels = torch.ones(2, 2, dtype=torch.float64)
        levels[at] = torch.tensor([1e-13, 1e-9], dtype=torch.float64)
        x_t, value = pair_of(2, seed=10)
        got = convert(value, x_t, *levels, source, wanted)
        assert [bool(row.any()) for row in got] == [False, True]
        amplified = factor(*levels, source, wanted)
        assert amplified[0] == torch.inf
        assert amplified[1] == pytest.approx(1e9)


def test_the_same_type_is_left_bit_for_bit_even_where_it_says_nothing():
    alpha, sigma = torch.tensor([0.0]), torch.tensor([1.0])
    x_t, value = pair_of(1, seed=6)
    for name in TYPES:
        got = convert(value.half(), x_t, alpha, sigma, name, name)
        assert got.dtype == torch.float32
        assert torch.equal(got, value.half().float())
        assert factor(alpha, sigma, name, name).tolist() == [1.0]


def test_half_precision_inputs_are_computed_in_float32():
    alpha, sigma = levels("ddpm")
    x0, noise = pair_of(len(alpha), seed=7)
    x_t, value = noised(x0, noise, alpha, sigma).half(), noise.half()
    half = convert(value, x_t, alpha, sigma, "epsilon", "v_prediction")
    single = convert(value.float(), x_t.float(), alpha, sigma, "epsilon", "v_prediction")
    assert torch.equal(half, single)


def test_gradients_flow_through_a_conversion():
    alpha, sigma = levels("flow", 4)
    x_t, value = pair_of(4, seed=8)
    value.requires_grad_()
    convert(value, x_t, alpha, sigma, "flow", "sample").sum().backward()
    expected = wide(-sigma).float().expand_as(value)
    torch.testing.assert_close(value.grad, expected)


@pytest.mark.parametrize("source", TYPES)
def test_a_row_placed_in_another_schedule_keeps_its_image_and_noise(source):
    # x_t is multiplied by scale, and so is a v_prediction; all other types stay.
    there = Schedule(facts_of(ScheduleConfig(kind="flow", prediction="flow")))
    alpha, sigma = levels("ddpm")
    x0, noise = pair_of(len(alpha), seed=9)
    value = of_pair(x0, noise, alpha, sigma, source)
    placed = there.place(alpha.numpy(), sigma.numpy())
    scale, alpha2, sigma2, _ = (torch.from_numpy(each) for each in placed)
    moved = value * wide(scale).float() if source == "v_prediction" else value
    torch.testing.assert_close(of_pair(x0, noise, alpha2, sigma2, source), moved)
    x_t = wide(scale).float() * noised(x0, noise, alpha, sigma)
    torch.testing.assert_close(x_t, noised(x0, noise, alpha2, sigma2))
    got = convert(moved, x_t, alpha2, sigma2, source, "flow")
    torch.testing.assert_close(got, noise - x0, rtol=1e-4, atol=2e-3)


shares = st.floats(0, 1, allow_nan=False)


@given(shares, st.sampled_from(TYPES), st.sampled_from(TYPES), st.booleans(), st.integers(0, 9))
def test_there_and_back_is_where_it_was(share, source, wanted, line, seed):
    angle = share * np.pi / 2
    pair = (1 - share, share) if line else (np.cos(angle), np.sin(angle))
    alpha, sigma = (torch.tensor([each], dtype=torch.float64) for each in pair)
    x_t, value = pair_of(1, seed=seed)
    there, back = (
        factor(alpha, sigma, a, b).item() for a, b in ((source, wanted), (wanted, source))
    )
    converted = convert(value, x_t, alpha, sigma, source, wanted)
    assert converted.isfinite().all()
    if max(there, back) > 64:
        return
    again = convert(converted, x_t, alpha, sigma, wanted, source)
    torch.testing.assert_close(again, value, rtol=1e-4, atol=1e-5 * (1 + max(there, back)) ** 2)


@given(shares, st.sampled_from(TYPES), st.sampled_from(TYPES), st.sampled_from(TYPES))
def test_a_way_around_is_the_direct_way(share, source, between, wanted):
    angle = share * np.pi / 2
    alpha = torch.tensor([np.cos(angle)], dtype=torch.float64)
    sigma = torch.tensor([np.sin(angle)], dtype=torch.float64)
    ways = [(source, between), (between, wanted), (source, wanted), (wanted, source)]
    if max(factor(alpha, sigma, *way).item() for way in ways) > 64:
        return
    x_t, value = pair_of(1)
    first = convert(value, x_t, alpha, sigma, source, between)
    around = convert(first, x_t, alpha, sigma, between, wanted)
    direct = convert(value, x_t, alpha, sigma, source, wanted)
    torch.testing.assert_close(around, direct, rtol=1e-3, atol=5e-3)
