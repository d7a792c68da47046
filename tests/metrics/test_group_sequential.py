"""Group-sequential tests: published boundaries, the error of all looks together, estimates by hand."""

import math

import numpy as np
import pytest
from scipy.stats import binom, norm
from scipy.stats import t as student

from lmms_plugin.metrics.group_sequential import DifferenceEstimate, boundaries, spent
from lmms_plugin.metrics.power import measured_variance


@pytest.mark.parametrize(
    ("looks", "published"),
    [
        (1, (1.9600,)),
        (2, (2.9626, 1.9686)),
        (3, (3.7103, 2.5114, 1.9930)),
        (5, (4.8769, 3.3570, 2.6803, 2.2898, 2.0310)),
    ],
)
def test_boundaries_are_the_published_ones(looks, published):
    """Lan and DeMets's version of O'Brien and Fleming's at equal looks, as gsDesign and rpact print them."""
    assert boundaries(tuple((k + 1) / looks for k in range(looks)), 0.025) == pytest.approx(published, abs=1e-4)


@pytest.mark.parametrize("shares", [(0.23, 0.46, 1.0), (0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0), (0.5, 0.999, 1.0)])
def test_a_brownian_motion_exceeds_them_with_the_error_that_is_spent(shares):
    random, paths, error = np.random.default_rng(0), 200_000, 0.05
    steps = np.diff((0.0, *shares))
    places = np.cumsum(random.normal(size=(paths, len(shares))) * np.sqrt(steps), axis=1) / np.sqrt(shares)
    beyond = np.maximum.accumulate(places >= boundaries(shares, error), axis=1).mean(axis=0)
    chance = 4 * math.sqrt(error / paths)
    assert beyond == pytest.approx([spent(share, error) for share in shares], abs=chance)
    assert spent(1.0, error) == pytest.approx(error)


def test_a_common_part_of_all_looks_makes_them_safer():
    """Calibration seeds are the same at all looks; in this motion they are half of the variance at the last one."""
    random, shares = np.random.default_rng(1), (0.25, 0.5, 1.0)
    steps = random.normal(size=(200_000, 3)) * np.sqrt(np.diff((0.0, *shares)))
    images, seeds = np.cumsum(steps, axis=1) / shares, random.normal(size=(200_000, 1))
    statistics = (images + seeds) / np.sqrt(1.0 / np.array(shares) + 1.0)
    assert 0.03 < (statistics >= boundaries(shares, 0.05)).any(axis=1).mean() < 0.05


@pytest.mark.parametrize(
    ("shares", "error", "message"),
    [
        ((), 0.05, "expected increasing shares"),
        ((0.5, 0.5, 1.0), 0.05, "expected increasing shares"),
        ((0.0, 1.0), 0.05, "expected increasing shares"),
        ((0.5, 1.1), 0.05, "expected increasing shares"),
        ((1.0,), 0.0, "expected an error"),
    ],
)
def test_impossible_designs_are_refused(shares, error, message):
    with pytest.raises(ValueError, match=message):
        boundaries(shares, error)


def test_an_estimate_adds_a_flipped_document_to_the_variance_of_the_images():
    """Each image has a mirror image, so that nothing is skewed."""
    sizes = np.tile(np.arange(1.0, 6.0), 16)
    sums = np.where(np.arange(80) < 40, 1.0, -1.0) * np.minimum(sizes, 2.0)
    found = DifferenceEstimate.of(sums, sizes)
    error = math.sqrt(measured_variance(sums, sizes) / 80 + 1.0 / sizes.sum() ** 2)
    assert (found.value, found.error, found.freedom, found.skewness) == pytest.approx((0.0, error, 79, 0.0))
    assert found.p_difference() == 1.0
    assert found.p_equivalence(0.15) == pytest.approx(student.sf(0.15 / error, 79))
    assert found.interval(0.9) == pytest.approx((-student.ppf(0.95, 79) * error, student.ppf(0.95, 79) * error))


def skewed(random, images):
    """One image in thirty differs by three documents, always the same way: a mean of 0.1 of them."""
    return np.where(random.random(images) < 1 / 30, 3.0, 0.0), np.ones(images) * 3.0


def test_p_values_of_skewed_data_hold_on_either_side():
    """Without the transformation the lower end is passed in 1 % and the upper one in 9 % of samples."""
    random, images = np.random.default_rng(4), 600
    above, below, plain = 0, 0, 0
    for _ in range(2000):
        found = DifferenceEstimate.of(*skewed(random, images))
        low, high = found.interval(0.9)
        above, below = above + (low > 1 / 30), below + (high < 1 / 30)
        plain += found.value + student.isf(0.05, found.freedom) * found.error < 1 / 30
    assert above <= 100 + 3 * 9.7
    assert below <= 100 + 3 * 9.7
    assert plain > below


def test_ends_of_an_interval_are_where_its_p_values_are():
    found = DifferenceEstimate.of(*skewed(np.random.default_rng(5), 900))
    low, high = found.interval(0.9)
    assert found._replace(value=found.value - low).p_difference() == pytest.approx(0.1)
    assert found._replace(value=found.value - high).p_difference() == pytest.approx(0.1)
    assert found.p_equivalence(high) == pytest.approx(0.05)
    assert high - found.value > found.value - low


def test_calibration_seeds_add_their_variance_and_their_degrees_of_freedom():
    random = np.random.default_rng(3)
    sizes = np.full(100, 4.0)
    by_seed = random.integers(-1, 2, size=(3, 100)) + np.array([[0.0], [0.6], [1.2]])
    found, without = (
        DifferenceEstimate.of(by_seed.mean(axis=0), sizes, [by_seed]),
        DifferenceEstimate.of(by_seed.mean(axis=0), sizes),
    )
    seeds = (by_seed.sum(axis=1) / 400).var(ddof=1) / 3
    assert found.error == pytest.approx(math.sqrt(without.error**2 + seeds))
    total = without.error**2 + seeds
    assert found.freedom == pytest.approx(total**2 / (without.error**4 / 99 + seeds**2 / 2))
    assert found.freedom < 4
    assert found.p_difference() > without.p_difference()


def test_sources_of_calibration_data_vary_apart_from_each_other():
    """Two sources whose seeds deviate in opposite directions do not cancel."""
    random, sizes = np.random.default_rng(8), np.full(50, 4.0)
    first = random.integers(0, 3, size=(3, 50)) * 1.0
    second = -first[::-1]
    both = DifferenceEstimate.of(np.zeros(50), sizes, [first, second])
    none = DifferenceEstimate.of(np.zeros(50), sizes)
    each = (first.sum(axis=1) / 200).var(ddof=1) / 3
    assert both.error**2 - none.error**2 == pytest.approx(2 * each)


def test_ties_on_few_images_show_no_equality():
    """Without any difference among 30 images a whole image of a hundred may still differ: 0.96^30 is no proof."""
    sizes = np.full(30, 5.0)
    none = DifferenceEstimate.of(np.zeros(30), sizes)
    assert (none.differing, none.typical) == (0, 0.5)
    assert none.p_equivalence(0.02) == pytest.approx(binom.cdf(0, 30, 0.04))
    assert none.p_difference() == 1.0
    assert DifferenceEstimate.of(np.zeros(600), np.full(600, 5.0)).p_equivalence(0.02) < 1e-8


def test_few_images_that_differ_are_tested_by_all_of_their_signs():
    """Three images that all agree have a p of 2 ÷ 2³ at least, however small the error of their difference."""
    sums = np.zeros(50)
    sums[:3] = 2.0
    assert DifferenceEstimate.of(sums, np.full(50, 2.0)).p_difference() == 0.25


def test_a_first_look_at_hardly_any_image_rejects_nothing_and_costs_nothing():
    early, last = boundaries((1e-5, 1.0), 0.05)
    assert early > 1000
    assert last == pytest.approx(norm.isf(0.05))


@pytest.mark.parametrize("value", [0.0, 0.01, -0.01])
def test_p_values_are_probabilities(value):
    estimate = DifferenceEstimate(value, 0.1, 20.0, 1.5, 0.0, 50, 20, 0.1)
    assert 0.0 <= estimate.p_difference() <= 1.0
    assert estimate._replace(skewness=-1.5).p_difference() <= 1.0


def test_one_look_is_an_ordinary_test():
    assert boundaries((1.0,), 0.01)[0] == pytest.approx(norm.isf(0.01))
