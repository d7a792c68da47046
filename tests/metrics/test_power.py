"""Power of paired comparisons on clusters: closed forms, and how often simulated studies find what is there."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from lmms_plugin.metrics.power import (
    design_effect,
    expected_variance,
    images_needed,
    measured_variance,
    power_of_difference,
    power_of_equivalence,
    seed_variance,
    smallest_difference,
)

VARIANCE, CORRELATION = 0.16, 0.05
STUDIES = 4000
"""Simulated studies: the error of a share of 0.8 is 0.6 points."""


def simulated(random, sizes, difference, studies=STUDIES):
    """Sums of differences of every image in many studies; two documents of an image correlate by CORRELATION."""
    shape = (studies, sizes.size)
    shared = np.sqrt(VARIANCE * CORRELATION) * sizes * random.standard_normal(shape)
    own = np.sqrt(VARIANCE * (1.0 - CORRELATION) * sizes) * random.standard_normal(shape)
    return difference * sizes + shared + own


def estimated(sums, sizes):
    """Differences and their errors, study by study."""
    ratios = sums.sum(axis=1) / sizes.sum()
    residual = sums - ratios[:, None] * sizes
    return ratios, np.sqrt((residual**2).sum(axis=1) * sizes.size / (sizes.size - 1)) / sizes.sum()


def test_clusters_without_correlation_are_independent_documents():
    sizes = np.array([1.0, 3.0, 8.0])
    assert design_effect(sizes, 0.0) == 1.0
    assert design_effect(7.0, 0.05) == pytest.approx(1.3)
    # Documents that are copies of each other count as much as their images: the error of a ratio of weights.
    assert expected_variance(0.5, sizes, 1.0) / 3 == pytest.approx(0.5 * (sizes**2).sum() / sizes.sum() ** 2)
    assert expected_variance(0.5, sizes, 0.0) / 3 == pytest.approx(0.5 / 12)


def test_the_expected_variance_is_what_simulated_images_have():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 15, size=400)
    sums = simulated(random, sizes, 0.03, studies=200)
    found = np.mean([measured_variance(one, sizes) for one in sums])
    assert found == pytest.approx(expected_variance(VARIANCE, sizes, CORRELATION), rel=0.02)
    assert sums.sum(axis=1).var() / sizes.sum() ** 2 * 400 == pytest.approx(found, rel=0.25)
    assert measured_variance(2.0 * sums[0], sizes) == pytest.approx(4.0 * measured_variance(sums[0], sizes))


@pytest.mark.parametrize("images", [30, 200])
@pytest.mark.parametrize("level", [0.95, 0.995])
def test_simulated_studies_find_differences_as_often_as_stated(images, level):
    random = np.random.default_rng(images)
    sizes = random.integers(4, 11, size=images)
    error = math.sqrt(expected_variance(VARIANCE, sizes, CORRELATION) / images)
    difference = smallest_difference(error, level=level, images=images)
    limit = {(30, 0.95): 2.0452, (30, 0.995): 3.0380, (200, 0.95): 1.9720, (200, 0.995): 2.8388}[images, level]
    ratios, errors = estimated(simulated(random, sizes, difference), sizes)
    assert np.mean(np.abs(ratios / errors) > limit) == pytest.approx(0.8, abs=0.02)
    assert power_of_difference(difference, error, level=level, images=images) == pytest.approx(0.8)


@pytest.mark.parametrize("truth", [0.0, 0.01])
def test_simulated_studies_show_equivalence_as_often_as_stated(truth):
    random = np.random.default_rng(7)
    sizes = random.integers(4, 11, size=120)
    error = math.sqrt(expected_variance(VARIANCE, sizes, CORRELATION) / 120)
    ratios, errors = estimated(simulated(random, sizes, truth), sizes)
    margin, limit = 0.05, 1.6578
    shown = np.mean((ratios - limit * errors > -margin) & (ratios + limit * errors < margin))
    assert 0.3 < shown < 0.97
    stated = power_of_equivalence(margin, error, difference=truth, images=120)
    assert stated == pytest.approx(shown, abs=0.02)


def test_a_z_test_has_the_power_of_the_textbook():
    """Smallest difference (z of 1 − α/2 + z of the power) × error; power α at no difference."""
    assert smallest_difference(0.01) == pytest.approx(0.01 * (norm.ppf(0.975) + norm.ppf(0.8)), rel=1e-4)
    assert power_of_difference(0.0, 0.01, level=0.9) == pytest.approx(0.1)
    assert power_of_difference(-0.02, 0.01) == pytest.approx(power_of_difference(0.02, 0.01))
    assert power_of_difference(0.02, 0.01, images=10**6) == pytest.approx(power_of_difference(0.02, 0.01), abs=1e-4)
    assert power_of_difference(0.02, 0.01, images=5) < power_of_difference(0.02, 0.01)
    assert power_of_equivalence(0.02, 0.01) == pytest.approx(2.0 * norm.cdf(2.0 - norm.ppf(0.95)) - 1.0)
    assert power_of_equivalence(0.02, 0.01, images=10**6) == pytest.approx(power_of_equivalence(0.02, 0.01), abs=1e-4)
    assert power_of_equivalence(0.01, 0.01) == 0.0


def test_the_fewest_images_are_enough_and_one_less_is_not():
    needed = images_needed(0.02, 0.03, constant=1e-6)
    for images, enough in ((needed, True), (needed - 1, False)):
        error = math.sqrt(0.03 / images + 1e-6)
        assert (power_of_difference(0.02, error, images=images) >= 0.8) == enough
    assert needed == pytest.approx(0.03 / ((0.02 / 2.8016) ** 2 - 1e-6), abs=4)
    assert images_needed(0.02, 0.0) == 2
    assert images_needed(0.02, 0.03, constant=0.02**2) == math.inf


@pytest.mark.parametrize("images", [2, 3, 6, 31, 400])
def test_power_rises_with_the_difference(images):
    """Far tails of the noncentral t are NaN in scipy, which once looked like no power."""
    shifts = np.arange(0.0, 60.0, 0.5)
    for power in (power_of_difference, power_of_equivalence):
        found = np.array([power(shift, 1.0, level=0.975, images=images) for shift in shifts])
        assert np.all(np.diff(found) > -1e-9)
        assert images == 2 or found[-1] == pytest.approx(1.0)
    assert math.isfinite(smallest_difference(1.0, images=images))


def test_seeds_that_differ_are_told_from_chance():
    random = np.random.default_rng(3)
    sizes = random.integers(4, 11, size=80)
    found = {0.0: [], 0.02: []}
    for deviation, kept in found.items():
        for _ in range(200):
            means = deviation * random.standard_normal(4)
            image = 0.5 * sizes * random.standard_normal(80)
            noise = 0.4 * np.sqrt(sizes) * random.standard_normal((4, 80))
            kept.append(seed_variance(means[:, None] * sizes + image + noise, sizes))
    assert np.mean(found[0.02]) == pytest.approx(0.02**2, rel=0.15)
    # Truncation at 0 leaves a little of what chance adds: 0.4² ÷ 560 documents.
    assert np.mean(found[0.0]) < 0.4**2 / 560 / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: design_effect([], 0.1), "number of documents for each image"),
        (lambda: measured_variance([1.0], [2.0]), "two images or more"),
        (lambda: seed_variance([[1.0, 2.0]], [2.0, 2.0]), "two seeds and images or more"),
        (lambda: power_of_difference(0.1, 0.0), "standard error above 0"),
        (lambda: power_of_difference(0.1, 0.1, images=1), "two images or more, got 1"),
        (lambda: smallest_difference(0.1, power=0.04), "power between 0.05 and 1"),
    ],
)
def test_what_cannot_be_planned_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
