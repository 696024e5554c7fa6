"""Losses: one value per row, the same with masks as without, and weights finite at every end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.diffusion.losses import error_of, row_losses, weighting
from stages.diffusion.predictions import convert, factor, of_pair
from stages.diffusion.train_config import DiffusionLossConfig, MaskConfig

ERRORS = ["mse", "l1", "huber", "log_cosh"]
WEIGHTINGS = ["constant", "min_snr", "soft_min_snr", "debiased", "p2"]
TYPES = ["epsilon", "v_prediction", "sample", "flow"]
SHAPE = (5, 3, 6, 4)


def config_of(**settings) -> DiffusionLossConfig:
    return DiffusionLossConfig.model_validate(settings)


def random(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masks(seed: int = 9) -> torch.Tensor:
    """Random, hard, whole, empty and mostly outside."""
    mask = torch.rand((5, 1, 6, 4), generator=torch.Generator().manual_seed(seed))
    mask[1] = (mask[1] > 0.5).float()
    mask[2], mask[3] = 1.0, 0.0
    mask[4] = 0.0
    mask[4, 0, 0, 0] = 1.0
    return mask


def by_formula(name: str, difference: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(difference)
    match name:
        case "mse":
            return size**2
        case "l1":
            return size
        case "huber":
            return np.where(size <= delta, size**2, delta * (2 * size - delta))
    # ln cosh, by a series where the difference of logarithms would cancel.
    ratio = size / delta
    exact = np.logaddexp(ratio, -ratio) - math.log(2)
    series = ratio**2 / 2 - ratio**4 / 12 + ratio**6 / 45
    return 2 * delta**2 * np.where(ratio < 0.05, series, exact)


# --------------------------------------------------------------------------------- the errors


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("delta", [0.1, 1.0, 5.0])
def test_errors_follow_their_formulas_from_the_smallest_to_the_largest(name, delta):
    sizes = np.concatenate([10.0 ** np.arange(-12, 5.0), np.linspace(0.1, 9, 400)])
    difference = np.concatenate([-sizes, [0.0], sizes])
    values = torch.tensor(difference, dtype=torch.float32, requires_grad=True)
    errors = error_of(name, delta)(values)
    expected = by_formula(name, values.detach().double().numpy(), delta)
    np.testing.assert_allclose(errors.detach().numpy(), expected, rtol=5e-6, atol=1e-37)
    errors.sum().backward()
    slope = {
        "mse": 2 * difference,
        "l1": np.sign(difference),
        "huber": 2 * np.clip(difference, -delta, delta),
        "log_cosh": 2 * delta * np.tanh(difference / delta),
    }[name]
    np.testing.assert_allclose(values.grad.numpy(), slope, rtol=2e-5, atol=1e-30)


def test_small_errors_are_squared_whatever_the_error_so_that_the_learning_rate_holds():
    difference = torch.tensor([1e-3, -2e-3])
    for name in ("huber", "log_cosh"):
        torch.testing.assert_close(
            error_of(name, 1.0)(difference), difference**2, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("name", ERRORS)
def test_rows_are_means_and_do_not_know_of_each_other(name):
    prediction, target = random(0), random(1)
    losses = row_losses(prediction, target, config_of(error=name, delta=0.7))
    assert losses.shape == (5,)
    assert losses.dtype == torch.float32
    difference = (prediction - target).double().numpy()
    expected = by_formula(name, difference, 0.7).mean((1, 2, 3))
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)
    one = row_losses(prediction[2:3], target[2:3], config_of(error=name, delta=0.7))
    torch.testing.assert_close(one, losses[2:3])


def test_predictions_of_half_precision_are_compared_in_float32():
    prediction, target = random(0).bfloat16(), random(1).bfloat16()
    losses = row_losses(prediction, target, config_of())
    assert losses.dtype == torch.float32
    assert torch.equal(losses, row_losses(prediction.float(), target.float(), config_of()))


def test_one_row_that_is_not_finite_leaves_the_others_alone():
    prediction = random(0)
    prediction[1, 0, 0, 0] = torch.inf
    for name in ERRORS:
        losses = row_losses(prediction, random(1), config_of(error=name))
        assert losses.isfinite().tolist() == [True, False, True, True, True]


# ---------------------------------------------------------------------------------- the masks


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_mask_of_ones_no_mask_and_masks_switched_off_are_the_same_bits(name, normalize):
    prediction, target = random(0), random(1)
    on = {"unmasked_weight": 0.1, "normalize_area": normalize}
    ones = torch.ones(5, 1, 6, 4)
    losses = [
        row_losses(prediction, target, config_of(error=name, mask=on), ones),
        row_losses(prediction, target, config_of(error=name, mask=on), None),
        row_losses(prediction, target, config_of(error=name, mask=None), masks()),
        row_losses(prediction, target, config_of(error=name, mask=None), None),
    ]
    for each in losses[1:]:
        assert torch.equal(each, losses[0])


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("unmasked", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_elements_count_by_their_mask_and_no_less_than_unmasked(name, unmasked, normalize):
    prediction, target, mask = random(0), random(1), masks()
    settings = MaskConfig(unmasked_weight=unmasked, normalize_area=normalize)
    losses = row_losses(prediction, target, config_of(error=name, mask=settings), mask)
    weights = np.clip(mask.double().numpy(), unmasked, 1)
    errors = by_formula(name, (prediction - target).double().numpy(), 1.0)
    expected = (errors * weights).mean((1, 2, 3))
    if normalize:
        area = weights.mean((1, 2, 3))
        expected = np.divide(expected, area, out=np.zeros(5), where=area > 0)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_what_lies_outside_a_hard_mask_has_no_gradient():
    prediction, mask = random(0).requires_grad_(), masks()
    settings = MaskConfig(unmasked_weight=0.0, normalize_area=True)
    row_losses(prediction, random(1), config_of(mask=settings), mask).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    outside = (mask == 0).expand(SHAPE)
    assert not prediction.grad[outside].any()
    assert prediction.grad[~outside].all()


def test_with_normalised_area_a_small_mask_weighs_as_much_as_a_large_one():
    difference = torch.ones(2, 3, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :1, :1], mask[1, :, :, :4] = 1.0, 1.0
    for normalize, expected in ((True, [1.0, 1.0]), (False, [1 / 64, 0.5])):
        settings = MaskConfig(unmasked_weight=0.0, normalize_area=normalize)
        losses = row_losses(difference, 0 * difference, config_of(mask=settings), mask)
        torch.testing.assert_close(losses, torch.tensor(expected))


def test_a_stored_mask_of_float16_is_as_good():
    settings = config_of(mask=MaskConfig())
    mask = masks().half()
    losses = row_losses(random(0), random(1), settings, mask)
    assert torch.equal(losses, row_losses(random(0), random(1), settings, mask.float()))


def test_nothing_counts_more_than_whole():
    settings = config_of(mask=MaskConfig())
    losses = row_losses(random(0), random(1), settings, torch.full((5, 1, 6, 4), 3.0))
    assert torch.equal(losses, row_losses(random(0), random(1), settings))


@pytest.mark.parametrize("shape", [(5, 3, 6, 4), (5, 1, 6, 1), (1, 1, 6, 4), (5, 6, 4)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"mask .* for predictions \(5, 3, 6, 4\)"):
        row_losses(random(0), random(1), config_of(mask=MaskConfig()), torch.ones(shape))


# -------------------------------------------------------------------------------- the weighting


def circle(count: int = 41) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.linspace(0.05, 1.5, count, dtype=torch.float64)
    return angle.cos(), angle.sin()


def line(count: int = 41) -> tuple[torch.Tensor, torch.Tensor]:
    sigma = torch.linspace(0.05, 0.95, count, dtype=torch.float64)
    return 1 - sigma, sigma


def test_weights_are_those_of_their_papers():
    alpha, sigma = circle()
    snr = (alpha / sigma) ** 2
    expected = {
        ("min_snr", "epsilon"): snr.clamp(max=5) / snr,
        ("min_snr", "v_prediction"): snr.clamp(max=5) / (snr + 1),
        ("min_snr", "sample"): snr.clamp(max=5),
        ("soft_min_snr", "sample"): 1 / (1 / snr + 1 / 5),
        ("soft_min_snr", "epsilon"): 5 / (5 + snr),
        ("debiased", "epsilon"): 1 / snr.sqrt(),
        ("p2", "epsilon"): 1 / (1 + snr) ** 5,
    }
    for (name, prediction), weight in expected.items():
        got = weighting(alpha, sigma, prediction, name, 5.0)
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), weight, rtol=1e-6, atol=0, msg=f"{name} {prediction}"
        )
    alpha, sigma = line()
    snr = (alpha / sigma) ** 2
    got = weighting(alpha, sigma, "flow", "min_snr", 5.0)
    torch.testing.assert_close(got.double(), snr.clamp(max=5) * sigma**2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["min_snr", "soft_min_snr", "debiased", "p2"])
@pytest.mark.parametrize("kind", ["circle", "line"])
def test_the_loss_of_a_student_does_not_depend_on_what_it_predicts(name, kind):
    # One guess at the image, said in each type: the weighted squared errors are equal.
    alpha, sigma = circle(7) if kind == "circle" else line(7)
    own = ["epsilon", "sample", "v_prediction" if kind == "circle" else "flow"]
    shape = (7, 2, 3, 3)
    x0, noise, guess = random(0, shape), random(1, shape), random(2, shape)
    wide = [each.reshape(-1, 1, 1, 1).float() for each in (alpha, sigma)]
    x_t = wide[0] * x0 + wide[1] * noise
    losses = []
    for prediction in own:
        guessed = convert(guess, x_t, alpha, sigma, "sample", prediction)
        target = of_pair(x0, noise, alpha, sigma, prediction)
        weight = weighting(alpha, sigma, prediction, name, 3.0)
        losses.append(weight * row_losses(guessed, target, config_of()))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("prediction", TYPES)
def test_a_constant_weight_is_one(prediction):
    alpha, sigma = line()
    weight = weighting(alpha, sigma, prediction, "constant", 5.0)
    assert torch.equal(weight, torch.ones(len(alpha)))


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("prediction", TYPES)
def test_weights_are_finite_at_both_ends_and_have_come_to_their_limits(name, prediction):
    least = torch.tensor([0.0, 1e-300, 1e-30, 1e-8], dtype=torch.float64)
    for alpha, sigma in ((least, 1 - least), (1 - least, least)):
        weight = weighting(alpha, sigma, prediction, name, 5.0)
        assert weight.isfinite().all()
        assert (weight >= 0).all()
        torch.testing.assert_close(weight, weight[:1].expand(4), rtol=1e-3, atol=1e-6)
    noise, clean = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    limits = {
        ("min_snr", "epsilon"): [1, 0], ("min_snr", "sample"): [0, 5],
        ("min_snr", "v_prediction"): [0, 0], ("min_snr", "flow"): [0, 0],
        ("soft_min_snr", "epsilon"): [1, 0], ("soft_min_snr", "sample"): [0, 5],
    }  # fmt: skip
    if (name, prediction) in limits:
        expected = torch.tensor(limits[name, prediction], dtype=torch.float32)
        torch.testing.assert_close(
            weighting(noise, clean, prediction, name, 5.0), expected, rtol=1e-6, atol=1e-6
        )


def test_a_weight_without_a_limit_stays_what_it_is_at_a_thousand():
    for ratio, held in ((1e-9, 1e-3), (1e9, 1e3)):
        sigma = torch.tensor([1 / (1 + ratio)], dtype=torch.float64).sqrt()
        alpha = (1 - sigma.square()).sqrt()
        debiased = weighting(alpha, sigma, "sample", "debiased", 5.0)
        assert debiased.item() == pytest.approx(held**0.5)
        p2 = weighting(alpha, sigma, "sample", "p2", 1.0)
        assert p2.item() == pytest.approx(held / (1 + held))


@given(
    st.floats(0, 1), st.sampled_from(TYPES), st.sampled_from(WEIGHTINGS), st.floats(0.01, 100)
)  # fmt: skip
def test_a_weight_is_finite_whatever_the_level(share, prediction, name, gamma):
    angle = torch.tensor([share * math.pi / 2], dtype=torch.float64)
    for pair in ((angle.cos(), angle.sin()), (angle.cos().float(), angle.sin().float())):
        weight = weighting(*pair, prediction, name, gamma)
        assert weight.isfinite().all()
        assert (weight >= 0).all()


def test_min_snr_bounds_the_weight_of_an_image_and_its_soft_form_lies_below():
    alpha, sigma = circle()
    hard = weighting(alpha, sigma, "sample", "min_snr", 5.0)
    soft = weighting(alpha, sigma, "sample", "soft_min_snr", 5.0)
    assert hard.max() == 5
    assert (soft < hard).all()
    assert (soft >= hard / 2 * (1 - 1e-6)).all()
    scale = factor(alpha, sigma, "epsilon", "sample") ** 2  # squared x0 error per epsilon's
    torch.testing.assert_close(
        weighting(alpha, sigma, "epsilon", "min_snr", 5.0).double(), hard.double() * scale
    )
