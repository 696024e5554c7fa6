"""The Fréchet distance against its closed forms, and what it is taken over."""

from __future__ import annotations

import numpy as np
import pytest

from stages.diffusion.frechet import (
    class_spread,
    frechet_distance,
    image_features,
    uses_pixels,
)


def exactly(mean, root, count=4):
    """Rows whose sample mean and covariance are exactly `mean` and rootᵀ·root (D = 3)."""
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float)
    unit = np.tile(signs, (count // 4, 1)) * np.sqrt((count - 1) / count)
    return np.asarray(mean, float) + unit @ np.asarray(root, float)


def by_definition(ours, theirs):
    """The formula with the square root of a symmetric matrix by its eigenvalues."""

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    a, b = (np.cov(features, rowvar=False) for features in (ours, theirs))
    half = root(a)
    shift = ((ours.mean(0) - theirs.mean(0)) ** 2).sum()
    return shift + np.trace(a) + np.trace(b) - 2 * np.trace(root(half @ b @ half))


def test_of_commuting_covariances_it_is_the_difference_of_standard_deviations():
    # Σ₁ = diag(1, 4, 9), Σ₂ = diag(4, 4, 1): 3² + (1−2)² + 0 + (3−1)².
    ours = exactly([0, 0, 0], np.diag([1, 2, 3]))
    theirs = exactly([3, 0, 0], np.diag([2, 2, 1]), count=8)
    assert frechet_distance(ours, theirs) == pytest.approx(9 + 1 + 4, abs=1e-12)


def test_it_is_the_formula_for_any_covariances_and_the_same_both_ways():
    random = np.random.default_rng(1)
    mix = random.normal(size=(5, 5))
    ours = random.normal(size=(40, 5)) @ mix
    theirs = random.normal(size=(60, 5)) + 0.5
    found = frechet_distance(ours, theirs)
    assert found == pytest.approx(by_definition(ours, theirs), rel=1e-9)
    assert found == pytest.approx(frechet_distance(theirs, ours), rel=1e-12)


def test_covariances_without_full_rank_need_no_regularisation():
    random = np.random.default_rng(2)
    ours = random.normal(size=(5, 30))
    assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-11)
    # Two sets that vary in directions at right angles overlap nowhere: the traces add up.
    first, second = np.zeros((4, 8)), np.zeros((4, 8))
    first[:, :4], second[:, 4:] = np.eye(4), 3 * np.eye(4)
    shift = 4 * (1 / 16) + 4 * (9 / 16)
    assert frechet_distance(first, second) == pytest.approx(shift + 1 + 9, rel=1e-12)


def test_more_images_of_one_distribution_come_nearer_to_it():
    """The bias of small samples, of which the report warns."""
    random = np.random.default_rng(3)
    reference = random.normal(size=(4000, 16))
    few, many = (frechet_distance(random.normal(size=(n, 16)), reference) for n in (40, 2000))
    assert few > 5 * many > 0


@pytest.mark.parametrize(("ours", "theirs"), [((1, 3), (5, 3)), ((5, 3), (5, 4))])
def test_too_few_images_and_other_features_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(np.zeros(ours), np.zeros(theirs))


def test_small_images_of_one_shape_are_compared_by_their_values():
    assert uses_pixels([(8, 8, 1), (8, 8, 1)])
    assert not uses_pixels([(8, 8, 1), (8, 4, 1)])
    assert not uses_pixels([(16, 16, 3)])
    image = np.array([[[0], [255]], [[51], [204]]], np.uint8)
    np.testing.assert_allclose(image_features([image], pixels=True), [[-1, 1, -0.6, 0.6]])


def test_larger_images_are_compared_by_the_means_of_areas_channel_by_channel():
    image = np.zeros((32, 16, 3), np.uint8)
    image[4:8, 2:4, 1] = 255  # exactly the second area down and across, in green
    features = image_features([image], pixels=False).reshape(3, 8, 8)
    expected = np.full((3, 8, 8), -1.0)
    expected[1, 1, 1] = 1
    np.testing.assert_array_equal(features, expected)


def test_spread_is_within_classes_and_leaves_out_classes_of_one():
    features = np.array([[0.0, 0], [2, 0], [100, 7], [5, 5]])
    # One class of two: squares 1 + 1 over (2 − 1) × 2 values.
    assert class_spread(features, np.array([0, 0, 1, 2])) == pytest.approx(1.0)
    assert class_spread(features, np.array([0, 1, 2, 3])) is None
    together = class_spread(features, np.zeros(4, int))
    assert together == pytest.approx(np.sqrt(features.var(0, ddof=1).mean()))
