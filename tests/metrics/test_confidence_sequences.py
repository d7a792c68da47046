"""Confidence sequences: an independent implementation, error rates under a known truth, and what decides."""

import math

import numpy as np
import pytest

from lmms_plugin.metrics.confidence_sequences import BETS, confidence_sequence, log_capital

LOOKS = (5, 10, 20, 30, 50, 75, 100, 150, 225, 340, 450, 600)
LARGEST = 12


def images(random, count, difference, flipped=0.12, together=0.5):
    """Draw images of 1 to 12 documents: answers of an image flip together, most differences are ties at 0."""
    sizes = random.integers(1, LARGEST + 1, size=count)
    share = random.beta(flipped / together, (1.0 - flipped) / together, size=count)
    changed = random.binomial(sizes, share)
    better = random.binomial(changed, 0.5 + difference / flipped / 2.0)
    return 2.0 * better - changed, sizes


def test_capital_is_the_mean_of_products_of_bets():
    sums, sizes = images(np.random.default_rng(0), 40, 0.03)
    for mean, above in [(0.0, True), (0.0, False), (0.25, True), (-0.4, False)]:
        capitals = []
        for share in BETS:
            capital, sign = 1.0, 1.0 if above else -1.0
            for total, size in zip(sums, sizes, strict=True):
                capital *= 1.0 + share / ((1.0 + sign * mean) * LARGEST) * sign * (total - mean * size)
            capitals.append(capital)
        got = log_capital(sums, sizes, mean, bound=1.0, largest=LARGEST, above=above)
        assert got == pytest.approx(math.log(np.mean(capitals)), abs=1e-10)


def test_ends_are_where_the_capital_reaches_its_limit():
    sums, sizes = images(np.random.default_rng(1), 300, 0.05)
    low, high = confidence_sequence(sums, sizes, bound=1.0, largest=LARGEST, level=0.9)
    assert -1.0 < low < sums.sum() / sizes.sum() < high < 1.0
    for end, above in ((low, True), (high, False)):
        capital = log_capital(sums, sizes, end, bound=1.0, largest=LARGEST, above=above)
        assert capital == pytest.approx(math.log(20.0), abs=1e-5)


def test_order_of_images_does_not_matter_and_mirrored_data_mirror_the_interval():
    random = np.random.default_rng(2)
    sums, sizes = images(random, 200, 0.04)
    order = random.permutation(200)
    found = confidence_sequence(sums, sizes, bound=1.0, largest=LARGEST)
    assert confidence_sequence(sums[order], sizes[order], bound=1.0, largest=LARGEST) == pytest.approx(found, abs=1e-8)
    mirrored = confidence_sequence(-sums, sizes, bound=1.0, largest=LARGEST)
    assert mirrored == pytest.approx((-found.high, -found.low), abs=1e-7)


def test_a_wider_bound_of_the_data_gives_a_wider_interval():
    sums, sizes = images(np.random.default_rng(3), 400, 0.1)
    ends = [confidence_sequence(sums, sizes, bound=1.0, largest=largest) for largest in (12, 24, 48)]
    assert ends[0].low > ends[1].low > ends[2].low


def test_extremes():
    assert confidence_sequence([], [], bound=1.0, largest=5) == (-1.0, 1.0)
    assert confidence_sequence([0.0], [0.0], bound=1.0, largest=5) == (-1.0, 1.0)
    low, high = confidence_sequence(np.full(500, 3.0), np.full(500, 3.0), bound=1.0, largest=3)
    assert 0.9 < low < 1.0
    assert high == 1.0


@pytest.mark.parametrize(
    ("sums", "sizes", "message"),
    [
        ([2.0], [1.0], "at most 1 a document"),
        ([math.nan], [1.0], "at most 1 a document"),
        ([1.0], [9.0], "0 to 5 documents"),
        ([1.0, 1.0], [1.0], "each image"),
    ],
)
def test_impossible_data_are_refused(sums, sizes, message):
    with pytest.raises(ValueError, match=message):
        confidence_sequence(sums, sizes, bound=1.0, largest=5)


@pytest.mark.slow
@pytest.mark.parametrize("last", [30, 150, 600])
@pytest.mark.parametrize("difference", [0.0, 0.06])
def test_truth_is_left_out_at_any_look_in_at_most_one_run_of_ten(last, difference):
    random = np.random.default_rng(4)
    missed = 0
    for _ in range(1000):
        sums, sizes = images(random, last, difference)
        missed += any(
            log_capital(sums[:look], sizes[:look], difference, bound=1.0, largest=LARGEST, above=above) > math.log(20.0)
            for look in LOOKS
            if look <= last
            for above in (True, False)
        )
    assert missed <= 100


def test_ordinary_intervals_at_every_look_miss_more_often_than_they_say():
    """What the confidence sequence is for: the data of the test above tell that the looks do matter."""
    random = np.random.default_rng(5)
    missed = 0
    for _ in range(500):
        sums, _ = images(random, 600, 0.0)
        seen = [sums[:look] for look in LOOKS if look >= 30]
        missed += any(abs(one.mean()) > 1.645 * one.std(ddof=1) / math.sqrt(one.size) for one in seen)
    assert missed > 100
