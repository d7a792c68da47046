"""Divergence of a model from another: closed forms, bounds that bracket the truth, and coverage of its intervals."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import entropy

from bench.guarantee_simulations import divergence_coverage
from lmms_plugin.metrics.bootstrap import Clusters
from lmms_plugin.metrics.divergence import FlipsPredicted, kl_bounds, kl_divergence, mean_shift
from lmms_plugin.metrics.sums import KnownMeans, plain


def geometric(share, tokens=4000):
    """Distribution of a geometric number of failures; what is beyond the vocabulary is below the last bit of 1."""
    return share * (1 - share) ** np.arange(tokens)


def test_kl_of_geometric_distributions_is_its_closed_form():
    for a, b in ((0.3, 0.2), (0.1, 0.5), (0.02, 0.03)):
        expected = np.log(a / b) + (1 - a) / a * np.log((1 - a) / (1 - b))
        with np.errstate(divide="ignore"):
            logs = np.log(geometric(a)), np.log(geometric(b))
        both = [np.where(np.isinf(log), -745.0, log) for log in logs]
        assert kl_divergence(*both) == pytest.approx(expected, rel=1e-9)


def test_kl_of_many_rows_is_scipy_s_relative_entropy():
    p, q = np.random.default_rng(0).dirichlet(np.full(50, 0.3), (2, 6, 4))
    assert kl_divergence(np.log(p), np.log(q)) == pytest.approx(entropy(p, q, axis=-1))


def test_kl_of_impossible_tokens():
    half, certain = np.log([0.5, 0.5]), np.array([0.0, -np.inf])
    assert kl_divergence(certain, half) == pytest.approx(np.log(2))
    assert kl_divergence(half, certain) == np.inf
    assert kl_divergence(certain, certain) == 0.0


@pytest.mark.parametrize("wrong", [([0.5], [0.5]), ([np.nan, 0.0], [0.0, 0.0]), ([0.0], [0.0, 0.0])])
def test_what_are_no_log_probabilities_is_refused(wrong):
    with pytest.raises(ValueError, match="log-probabilities"):
        kl_divergence(*wrong)


def cut(p, q, told, groups):
    """What is told of two distributions: the likeliest tokens of the first, and masses of groups of the others."""
    order = np.argsort(-p)
    parts = np.array_split(order[told:], groups)
    masses = [[values[part].sum() for part in parts] for values in (p, q)]
    return p[order[:told]], q[order[:told]], *masses


@pytest.mark.parametrize("rounding", [0.0, 5e-6, 1e-3])
def test_bounds_bracket_the_exact_divergence(rounding):
    rng = np.random.default_rng(1)
    wide = 0
    for trial in range(300):
        p, q = (rng.dirichlet(np.full(40, concentration)) for concentration in rng.uniform(0.05, 2.0, 2))
        p, q = ((values + 1e-12) / (1 + 40e-12) for values in (p, q))
        exact = float(entropy(p, q))
        told, groups = trial % 41, 1 + trial % 3
        noise = [rng.uniform(-rounding, rounding, told) for _ in range(2)]
        one, other, *masses = cut(p, q, told, groups)
        seen = (np.clip(values + error, 0, 1) for values, error in zip((one, other), noise, strict=True))
        low, high = kl_bounds(*seen, *masses, rounding=rounding, floor=1e-13)
        assert 0 <= low <= exact + 1e-12
        assert exact <= high + 1e-12
        wide += high - low > 0.1
    # Else nothing would be shown; of a thousandth rounded off, most is lost.
    assert 0 < wide < 300 or rounding == 1e-3


def test_bounds_meet_where_everything_is_told():
    p, q = np.random.default_rng(2).dirichlet(np.ones(9), 2)
    assert kl_bounds(p, q) == pytest.approx((entropy(p, q),) * 2)


def test_bounds_of_one_known_probability_are_those_of_a_coin_and_a_floor():
    p, q = 0.9, 0.7
    low, high = kl_bounds([p], [q], [1 - p], [1 - q], floor=1e-8)
    assert low == pytest.approx(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert high == pytest.approx(p * np.log(p / q) + (1 - p) * np.log((1 - p) / 1e-8))
    assert kl_bounds([p], [q], [1 - p], [1 - q], floor=0.0).high == np.inf
    assert kl_bounds([1.0], [1.0], [0.0], [0.0], floor=0.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (([0.5], [0.5]), "add up to 1"),
        (([0.5, 0.5], [1.0]), "as many"),
        (([1.2], [1.0]), r"in \[0, 1\]"),
        (([0.5], [0.5], [0.5], [0.1, 0.4]), "as many"),
    ],
)
def test_what_is_no_pair_of_distributions_is_refused(given, told):
    with pytest.raises(ValueError, match=told):
        kl_bounds(*given)


def test_mean_shift_of_certain_numbers_and_of_a_translation():
    values, p = np.array([1.0, 5.0, 6.0]), np.array([0.2, 0.3, 0.5])
    assert mean_shift([3.0], [1.0], [10.0], [0.4]) == pytest.approx(7.0)
    assert mean_shift(values, p, values + 2.5, p) == pytest.approx(2.5)
    assert mean_shift(values, p, values[::-1], p[::-1]) == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(mean_shift([], [], values, p))


def test_mean_shift_is_that_of_sorted_draws():
    rng = np.random.default_rng(3)
    first, second = rng.normal(0, 1, 500), rng.normal(0.3, 2, 500)
    even = np.full(500, 1 / 500)
    assert mean_shift(first, even, second, even) == pytest.approx(np.abs(np.sort(first) - np.sort(second)).mean())


def repeated(counts, clusters):
    return np.repeat(np.arange(clusters.index.size), counts[clusters.index].astype(int))


def by_hand(score, flipped):
    """Mean over all orders of equal scores of the share of flipped answers among as many of the highest score."""
    total = int(flipped.sum())
    shares = []
    for order in permutations(range(len(score))):
        ranked = sorted(order, key=lambda k: -score[k])
        shares.append(flipped[ranked[:total]].sum() / total)
    return np.mean(shares)


def test_predicted_flips_are_the_expected_share_over_all_orders_of_ties():
    rng = np.random.default_rng(4)
    for _ in range(8):
        score, flipped = rng.integers(0, 3, 6).astype(float), rng.integers(0, 2, 6).astype(float)
        flipped[0] = 1.0
        found = plain(FlipsPredicted(score, flipped, Clusters.one(6)))["flips_predicted"]
        assert found == pytest.approx(by_hand(score, flipped))


def test_predicted_flips_on_a_resample_are_those_of_records_repeated():
    rng = np.random.default_rng(5)
    score, flipped = rng.integers(0, 20, 90).astype(float), (rng.random(90) < 0.2).astype(float)
    clusters = Clusters(rng.integers(0, 30, 90), 30)
    counts = rng.multinomial(30, np.full(30, 1 / 30), 5).astype(float)
    found = FlipsPredicted(score, flipped, clusters)(counts)[:, 0]
    for row, value in zip(counts, found, strict=True):
        rows = repeated(row, clusters)
        again = plain(FlipsPredicted(score[rows], flipped[rows], Clusters.one(rows.size)))
        assert value == pytest.approx(again["flips_predicted"])


def test_a_perfect_score_predicts_all_flips_and_a_constant_one_as_chance():
    flipped = np.array([1.0, 0, 0, 1, 0, 0, 0, 0])
    assert plain(FlipsPredicted(flipped, flipped, Clusters.one(8))) == {"flips_predicted": 1.0}
    assert plain(FlipsPredicted(np.zeros(8), flipped, Clusters.one(8))) == {"flips_predicted": 0.25}
    assert np.isnan(plain(FlipsPredicted(np.zeros(8), np.zeros(8), Clusters.one(8)))["flips_predicted"])


def test_known_means_are_those_of_records_repeated_without_the_missing():
    rng = np.random.default_rng(6)
    values = rng.lognormal(size=60)
    values[::7] = np.nan
    clusters = Clusters(rng.integers(0, 15, 60), 15)
    counts = rng.multinomial(15, np.full(15, 1 / 15), 6).astype(float)
    found = KnownMeans({"kl": values, "none": np.full(60, np.nan)}, clusters)(counts)
    assert found[:, 0] == pytest.approx([np.nanmean(values[repeated(row, clusters)]) for row in counts])
    assert np.isnan(found[:, 1]).all()
    with pytest.raises(ValueError, match="finite"):
        KnownMeans({"kl": [np.inf]}, Clusters.one(1))


@pytest.mark.parametrize(("images", "least"), [(30, 0.85), (150, 0.9), (600, 0.91)])
def test_intervals_over_images_cover_the_true_mean(images, least):
    assert least <= divergence_coverage(images, 250) <= 0.985
