"""Paired comparison, corrections, equivalence and robustness: closed forms and independent implementations."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from lmms_plugin.metrics.bootstrap import ClusterParts, Clusters, Interval, bootstrap
from lmms_plugin.metrics.calibration import Binned
from lmms_plugin.metrics.paired import (
    benjamini_hochberg,
    difference,
    equivalent,
    flips,
    holm,
    interaction,
    mcnemar,
)
from lmms_plugin.metrics.ranked import Ranked
from lmms_plugin.metrics.robustness import (
    added_per_severity,
    corruption_errors,
    lost_per_severity,
    mean_corruption_error,
    mean_under_corruption,
    relative_mean_corruption_error,
    retained,
)
from lmms_plugin.metrics.sums import Means

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@pytest.mark.parametrize(("lost", "won"), [(0, 5), (3, 9), (10, 10), (40, 22), (1, 0)])
def test_mcnemar_is_twice_the_binomial_tail(lost, won):
    n, k = lost + won, min(lost, won)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(lost, won) == mcnemar(won, lost)


def test_mcnemar_without_changes_shows_nothing():
    assert mcnemar(0, 0) == 1.0


def test_flips_go_both_ways():
    assert flips([1, 1, 1, 0, 0], [0, 0, 1, 1, 0]) == (2, 1)
    assert flips([True, False], [False, False]) == (1, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flips([1, 0], [1]), "same documents"),
        (lambda: flips([0.5], [1]), "0 or 1"),
        (lambda: mcnemar(-1, 2), "counts"),
        (lambda: equivalent(Interval(0, 0), 0), "margin"),
        (lambda: holm([1.5]), "p-value"),
        (lambda: corruption_errors([[0.1]], [[0.1, 0.2]]), "same cells"),
        (lambda: mean_under_corruption([0.1]), "shape"),
    ],
    ids=["lengths", "soft", "negative", "no margin", "p above 1", "other cells", "no table"],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_holm_and_benjamini_hochberg_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])


@given(P_VALUES)
def test_adjusted_p_values(p):
    bonferroni, adjusted, discovered = np.minimum(np.array(p) * len(p), 1), holm(p), benjamini_hochberg(p)
    assert np.all(np.array(p) <= discovered + 1e-15)
    assert np.all(discovered <= adjusted + 1e-15)
    assert np.all(adjusted <= bonferroni + 1e-15)
    np.testing.assert_allclose(discovered, false_discovery_control(p))
    # Holm by its definition: the k-th smallest is compared with α / (m − k + 1), stopping at the first that fails.
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for k, index in enumerate(np.argsort(p, kind="stable")):
            if p[index] * (len(p) - k) > alpha:
                break
            rejected.add(index)
        assert {i for i in range(len(p)) if adjusted[i] <= alpha} >= rejected
        assert all(p[i] in {p[j] for j in rejected} for i in range(len(p)) if adjusted[i] <= alpha)


@given(P_VALUES, st.integers(0, 12))
def test_tests_that_were_not_made_do_not_count(p, place):
    place = min(place, len(p))
    with_gap = [*p[:place], math.nan, *p[place:]]
    for adjust in (holm, benjamini_hochberg):
        adjusted = adjust(with_gap)
        assert np.isnan(adjusted[place])
        np.testing.assert_array_equal(np.delete(adjusted, place), adjust(p))


def test_all_missing_stays_missing():
    assert np.isnan(holm([math.nan, math.nan])).all()


def test_equivalence_needs_the_whole_interval_inside():
    assert equivalent(Interval(-0.009, 0.005), 0.01)
    assert not equivalent(Interval(-0.011, 0.005), 0.01)
    assert not equivalent(Interval(-0.01, 0.005), 0.01)
    assert not equivalent(Interval(math.nan, math.nan), 0.01)


def run(rng, images=400, skill=0.0, per_image=3):
    sizes = np.full(images, per_image)
    clusters = Clusters(np.repeat(np.arange(images), sizes), images)
    confidence = np.clip(np.repeat(rng.beta(4, 2, images), sizes), 0.05, 0.95)
    luck = rng.random(confidence.size)
    return confidence, luck, (luck < confidence + skill).astype(float), clusters


def test_a_run_does_not_differ_from_itself():
    confidence, _, outcome, clusters = run(np.random.default_rng(0))
    statistics = [Binned(confidence, outcome, clusters), Binned(confidence, outcome, clusters)]
    first, second = bootstrap(statistics, clusters.count, resamples=100)
    assert difference(first, second, "ece", margin=1e-6) == (0.0, 0.0, 0.0, 1.0, True)


def test_pairing_finds_what_unpaired_intervals_hide():
    """A quantizer that loses 2 points on documents the model otherwise answers alike."""
    confidence, luck, outcome, clusters = run(np.random.default_rng(1))
    worse = (luck < confidence - 0.02).astype(float)
    first, second = bootstrap([Means({"acc": o}, clusters) for o in (outcome, worse)], clusters.count, resamples=500)
    found = difference(first, second, "acc", margin=0.05)
    assert found.value == pytest.approx(worse.mean() - outcome.mean())
    assert found.high < 0 < found.p < 0.01
    assert found.equivalent
    unpaired = np.hypot(first.resampled.std(), second.resampled.std())
    assert found.high - found.low < 0.5 * 3.92 * unpaired


def test_equivalence_and_difference_can_both_fail_to_show():
    """Two drawings of outcomes from the same few confidences."""
    rng = np.random.default_rng(2)
    c, _, _, clusters = run(rng, images=20)
    both = [Ranked(c, (rng.random(c.size) < c).astype(float), clusters, ["aurc"]) for _ in range(2)]
    first, second = bootstrap(both, 20, resamples=200)
    found = difference(first, second, "aurc", margin=0.01)
    assert found.low < 0 < found.high
    assert found.p > 0.05
    assert found.equivalent is False


def test_paired_p_values_are_uniform_under_no_difference():
    rng, small, trials = np.random.default_rng(3), 0, 150
    for _ in range(trials):
        confidence, _, _, clusters = run(rng, images=120)
        both = [(rng.random(confidence.size) < confidence).astype(float) for _ in range(2)]
        first, second = bootstrap([Means({"acc": o}, clusters) for o in both], 120, resamples=150)
        small += difference(first, second, "acc").p < 0.1
    # 0.1 with three standard errors, and the resamples' own noise.
    assert 0.03 < small / trials < 0.19


def losing(images, differing, per_image=2):
    """Two runs of which the second loses all documents of some images and is otherwise the same."""
    index = np.repeat(np.arange(images), per_image)
    outcomes = np.ones(index.size), (index >= differing).astype(float)
    clusters = Clusters(index, images)
    return bootstrap([Means({"acc": outcome}, clusters) for outcome in outcomes], images, resamples=1000)


@pytest.mark.parametrize(("images", "differing"), [(3, 3), (5, 5), (130, 1), (130, 3), (130, 5), (130, 8)])
def test_p_is_at_least_that_of_the_exact_sign_flip_test_of_images_that_differ(images, differing):
    first, second = losing(images, differing)
    found = difference(first, second, "acc")
    # All signs of the images that differ: two of 2ⁿ assignments are as extreme as the one seen.
    exact = np.mean([abs(sum(signs)) >= differing for signs in product((-1, 1), repeat=differing)])
    assert exact == 2 ** (1 - differing)
    assert found.p >= exact
    # One document for each image: McNemar's test is the same.
    assert difference(*losing(images, differing, 1), "acc").p >= mcnemar(differing, 0) == pytest.approx(exact)
    if images == differing:
        assert found.p == exact
    again = interaction(first, first, first, second, "acc")
    assert again.p >= exact


@pytest.mark.parametrize(("lost", "won"), [(7, 1), (8, 0), (9, 2), (12, 2), (3, 3), (0, 0)])
def test_p_is_at_least_the_exact_one_of_images_that_do_not_agree(lost, won):
    """Of one document an image, the sign-flip test is McNemar's; the resamples alone claim more."""
    images = 200
    first, second = np.ones(images), np.ones(images)
    second[:lost], first[lost : lost + won] = 0.0, 0.0
    clusters = Clusters(np.arange(images), images)
    draws = bootstrap([Means({"acc": one}, clusters) for one in (first, second)], images, resamples=2000)
    assert difference(*draws, "acc").p >= mcnemar(lost, won) * (1 - 1e-12)


def test_signs_of_unequal_differences_are_all_tried():
    added = np.array([0.3, -0.2, 0.25, 0.05, 0.0, 0.4])
    parts = ClusterParts(added, np.ones(6, np.bool_))
    exact = np.mean([abs(np.dot(signs, added)) >= added.sum() - 1e-9 for signs in product((-1, 1), repeat=6)])
    assert parts.least_p() == pytest.approx(exact)
    assert ClusterParts(added, added > 0).least_p() == 2**-3
    many = ClusterParts(np.where(np.arange(20) < 10, 0.1, -0.1), np.ones(20, np.bool_))
    assert many.least_p() == 2**-19


def test_images_without_a_record_of_the_metric_do_not_count():
    """A task with records of 6 images only, compared together with one of 130."""
    index, rng = np.repeat(np.arange(6), 2), np.random.default_rng(6)
    clusters, outcome = Clusters(index, 130), np.tile([0.0, 1.0], 6)
    same = bootstrap([Means({"acc": outcome}, clusters) for _ in range(2)], 130, resamples=300)
    assert [difference(*same, "acc", margin=0.01, level=level).equivalent for level in (0.95, 0.99)] == [True, False]
    for made, name in ((Binned, "ece"), (Ranked, "aurc")):
        both = [made(confidence, outcome, clusters) for confidence in (rng.random(12), np.clip(outcome, 0.1, 0.9))]
        found = difference(*bootstrap(both, 130, resamples=300), name)
        assert found.p >= 2**-5


def test_with_many_images_the_resamples_decide():
    found = difference(*losing(130, 60), "acc")
    assert found.p == pytest.approx(2 / 1001)


def test_numbers_that_are_no_sums_count_all_images():
    rng = np.random.default_rng(5)
    for images, least in ((3, 0.25), (6, 2**-5)):
        confidence, outcome = rng.random(2 * images), np.tile([0.0, 1.0], images)
        clusters = Clusters(np.arange(2 * images) // 2, images)
        both = [Binned(told, outcome, clusters) for told in (confidence, np.tile([0.0, 1.0], images))]
        assert difference(*bootstrap(both, images, resamples=500), "ece").p >= least


def test_too_few_images_show_no_equivalence():
    for images, shown in ((3, False), (4, False), (5, True)):
        found = difference(*losing(images, 0), "acc", margin=0.01)
        assert (found.p, found.equivalent) == (1.0, shown)


def test_interaction_is_the_difference_in_differences():
    rng = np.random.default_rng(4)
    confidence, luck, _, clusters = run(rng, images=600)
    accuracies = {"a clean": 0.0, "a shifted": -0.1, "b clean": -0.02, "b shifted": -0.3}
    outcomes = {name: (luck < confidence + skill).astype(float) for name, skill in accuracies.items()}
    draws = bootstrap([Means({"acc": outcome}, clusters) for outcome in outcomes.values()], 600, resamples=300)
    found = interaction(*draws, "acc")
    mean = {name: outcome.mean() for name, outcome in outcomes.items()}
    expected = (mean["b shifted"] - mean["b clean"]) - (mean["a shifted"] - mean["a clean"])
    assert found.value == pytest.approx(expected)
    assert found.high < 0
    additive = interaction(draws[0], draws[1], draws[0], draws[1], "acc")
    assert additive[:4] == (0.0, 0.0, 0.0, 1.0)


def test_corruption_errors_by_hand():
    error, reference = [[0.2, 0.4], [0.3, 0.3]], [[0.1, 0.2], [0.3, 0.3]]
    assert corruption_errors(error, reference) == pytest.approx([2, 1])
    assert mean_corruption_error(error, reference) == pytest.approx(1.5)
    assert mean_corruption_error(reference, reference) == 1.0
    relative = relative_mean_corruption_error(error, 0.1, reference, 0.05)
    assert relative == pytest.approx(((0.4 / 0.2) + (0.4 / 0.5)) / 2)
    # Worse everywhere by the same amount: hurt by shifts exactly as much as the reference.
    shifted = np.array(reference) + 0.1
    assert relative_mean_corruption_error(shifted, 0.15, reference, 0.05) == pytest.approx(1.0)
    assert np.isnan(corruption_errors([[0.0]], [[0.0]])[0])


def test_what_is_left_under_shift_by_hand():
    coverage = [[0.4, 0.2], [0.2, 0.0]]
    assert mean_under_corruption(coverage) == pytest.approx(0.2)
    assert retained(coverage, 0.5) == pytest.approx(0.4)
    assert lost_per_severity(coverage, 0.5) == pytest.approx([0.4, 0.8])
    assert added_per_severity([[0.1, 0.2], [0.3, 0.2]], 0.05) == pytest.approx([0.15, 0.15])
    assert np.isnan(retained([[0.0]], 0.0))
