"""Distances between samples: closed forms, invariants, and loops that spell the definitions out."""

import numpy as np
import pytest

from lmms_plugin.metrics.distance import frechet, mmd

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 5)), RNG.normal(1.0, 2.0, size=(30, 5))


def test_mmd_is_its_definition():
    def kernel(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * 1.7**2))

    within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (X, Y)]
    across = np.mean([kernel(a, b) for a in X for b in Y])
    assert mmd(X, Y, 1.7) == pytest.approx(sum(within) - 2 * across, abs=1e-12)


def test_mmd_is_unbiased_for_equal_distributions():
    draws = [mmd(*np.random.default_rng(seed).normal(size=(2, 25, 3)), 1.5) for seed in range(400)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / 20
    assert min(draws) < 0


def test_mmd_of_pairs_is_unbiased_though_they_are_alike():
    draws = []
    for seed in range(400):
        x, noise = np.random.default_rng(seed).normal(size=(2, 25, 3))
        # The same distribution, and strongly correlated row by row.
        draws.append(mmd(x, 0.8 * x + 0.6 * noise, 1.5, paired=True))
    assert abs(np.mean(draws)) < 3 * np.std(draws) / 20


def test_pairs_need_a_partner():
    with pytest.raises(ValueError, match="40 and 30"):
        mmd(X, Y, paired=True)


def test_mmd_of_far_points_is_two():
    near = np.array([[0.0], [1e-9]])
    assert mmd(near, near + 100, 1.0) == pytest.approx(2.0)


@pytest.mark.parametrize("distance", [mmd, frechet])
def test_distances_grow_with_the_shift(distance):
    found = [distance(X, X + step) for step in (0.0, 0.5, 1.0, 2.0)]
    assert found == sorted(found)


@pytest.mark.parametrize("distance", [mmd, frechet])
def test_distances_do_not_depend_on_order_or_rotation(distance):
    rotation, _ = np.linalg.qr(RNG.normal(size=(5, 5)))
    expected = distance(X, Y)
    assert distance(X[::-1], Y) == pytest.approx(expected)
    assert distance(X @ rotation, Y @ rotation) == pytest.approx(expected)


def test_frechet_of_a_translation_is_its_square():
    assert frechet(X, X + np.array([3.0, 4.0, 0.0, 0.0, 0.0])) == pytest.approx(25.0)


def test_frechet_of_one_dimension_is_the_difference_of_moments():
    x, y = X[:, :1], Y[:, :1]
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert frechet(x, y) == pytest.approx(expected)


def test_frechet_with_fewer_vectors_than_dimensions_is_finite_and_zero_for_itself():
    few = RNG.normal(size=(4, 9))
    assert frechet(few, few) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("distance", [mmd, frechet])
@pytest.mark.parametrize(
    ("first", "second"),
    [(X[:1], Y), (X, Y[:, :2]), (X[:, 0], Y), (np.where(X > 1, np.nan, X), Y)],
    ids=["one vector", "other width", "no vectors", "NaN"],
)
def test_what_is_no_pair_of_samples_is_refused(distance, first, second):
    with pytest.raises(ValueError, match="expected"):
        distance(first, second)


def test_equal_vectors_have_no_scale():
    with pytest.raises(ValueError, match="do not differ"):
        mmd(np.ones((3, 2)), Y[:, :2])
