"""Selective-prediction metrics: golden cases, invariants, and agreement with independent implementations."""

import math

import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, roc_auc_score, roc_curve

from lmms_plugin.metrics import (
    at_threshold,
    aupr_error,
    aurc,
    auroc,
    coverage_at_risk,
    e_aurc,
    effective_reliability,
    fpr_at_tpr,
    risk_coverage,
    threshold_at_cost,
    threshold_at_risk,
)
from lmms_plugin.metrics.ranked import RISKS
from lmms_plugin.metrics.selective import COSTS

RANKING = [auroc, aupr_error, fpr_at_tpr]
PAIRED = [
    at_threshold,
    aupr_error,
    aurc,
    auroc,
    coverage_at_risk,
    e_aurc,
    effective_reliability,
    fpr_at_tpr,
    risk_coverage,
    threshold_at_cost,
    threshold_at_risk,
]
EXTRA = {
    at_threshold: (0.5,),
    coverage_at_risk: (0.1,),
    threshold_at_risk: (0.1,),
    threshold_at_cost: (10,),
    effective_reliability: (10, 0.5),
}


def records(n=1500, seed=0, decimals=None, soft=False):
    rng = np.random.default_rng(seed)
    confidence = rng.beta(3, 1.2, n)
    outcome = (rng.random(n) < confidence**1.5).astype(float)
    if soft:  # VQA accuracy takes the values 0, 0.3, 0.6, 0.9 and 1
        outcome = outcome * rng.choice([0.3, 0.6, 0.9, 1.0], n)
    return (confidence if decimals is None else np.round(confidence, decimals)), outcome


def every_threshold(confidence, outcome):
    """Coverage and risk of each threshold, straight from the definition."""
    for threshold in np.unique(confidence)[::-1]:
        answered = confidence >= threshold
        yield threshold, answered.mean(), (1 - outcome[answered]).mean()


def reliable_vqa_coverage(confidence, outcome, risk):
    """`computeCatR` of facebookresearch/reliable_vqa: walk back from full coverage, over ties too."""
    order = np.argsort(-confidence, kind="stable")
    confidence, losses = confidence[order], 1 - outcome[order]
    n = confidence.size
    risks = np.cumsum(losses) / np.arange(1, n + 1)
    k = n - 1
    while k >= 0 and (risks[k] > risk or (k + 1 < n and confidence[k] == confidence[k + 1])):
        k -= 1
    return (k + 1) / n


def reliable_vqa_threshold(confidence, outcome, cost):
    """Its choice of threshold: the last maximum of Σ Φ-terms in confidence order."""
    order = np.argsort(-confidence, kind="stable")
    earned = np.cumsum(np.where(outcome > 0, outcome, -cost)[order])
    return confidence[order][np.flatnonzero(earned == earned.max())[-1]]


# Golden cases


@pytest.mark.parametrize(
    ("risk", "coverage"), [(0.0, 0.25), (0.05, 0.25), (0.2499, 0.25), (0.25, 1.0), (1.0, 1.0)], ids=str
)
def test_coverage_at_risk_does_not_split_ties(risk, coverage):
    confidence, outcome = [0.9, 0.8, 0.8, 0.7], [1, 1, 0, 1]
    assert coverage_at_risk(confidence, outcome, risk) == coverage
    # The order of tied records must not matter.
    assert coverage_at_risk(confidence, [1, 0, 1, 1], risk) == coverage


def test_coverage_at_risk_takes_the_largest_not_the_first_crossing():
    # Risks by coverage: 1, 1/2, 1/3, 1/4: over 0.3 at first, under it at the end.
    assert coverage_at_risk([0.9, 0.8, 0.7, 0.6], [0, 1, 1, 1], 0.3) == 1.0


def test_effective_reliability_golden():
    confidence = np.r_[np.full(80, 0.9), np.full(20, 0.1)]
    outcome = np.r_[np.ones(76), np.zeros(4), np.zeros(20)]
    assert effective_reliability(confidence, outcome, cost=10, threshold=0.5) == pytest.approx(0.36)


def test_soft_outcomes_earn_themselves_and_only_zero_is_penalised():
    assert effective_reliability([0.9], [0.3], cost=100, threshold=0.5) == pytest.approx(0.3)
    assert effective_reliability([0.9, 0.9], [0.3, 0.0], cost=100, threshold=0.5) == pytest.approx((0.3 - 100) / 2)


def test_answered_means_confidence_at_least_the_threshold():
    assert effective_reliability([0.5], [1], cost=1, threshold=0.5) == 1
    assert effective_reliability([0.5], [1], cost=1, threshold=np.nextafter(0.5, 1)) == 0
    assert at_threshold([0.5, 0.4], [1, 1], 0.5) == (0.5, 0.0)


def test_threshold_at_cost_prefers_the_lowest_of_equal_maxima():
    # Earned in order: 1, 0, 1, 0: the maximum is reached at 0.9 and again at 0.7.
    assert threshold_at_cost([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], cost=1) == 0.7


def test_threshold_at_cost_does_not_split_ties():
    # In file order the first of the tied records looks free of risk, yet a threshold answers both.
    assert threshold_at_cost([0.9, 0.8, 0.8], [1, 1, 0], cost=10) == 0.9
    assert reliable_vqa_threshold(np.array([0.9, 0.8, 0.8]), np.array([1, 1, 0]), 10) == 0.8


def test_threshold_when_everything_is_wrong():
    assert threshold_at_cost([0.9, 0.8], [0, 0], cost=1) == 0.9
    assert threshold_at_cost([0.9, 0.8], [0, 0], cost=1, may_decline_all=True) == math.inf
    assert effective_reliability([0.9, 0.8], [0, 0], cost=1, threshold=math.inf) == 0


def test_aurc_by_hand():
    # Risks at k = 1, 2, 3: 0, 1/2, 1/3.
    assert aurc([0.9, 0.8, 0.7], [1, 0, 1]) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    # The best order puts the error last: 0, 0, 1/3.
    assert e_aurc([0.9, 0.8, 0.7], [1, 0, 1]) == pytest.approx(1 / 6)


# Risk and coverage


@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
@pytest.mark.parametrize("decimals", [None, 1], ids=["no ties", "ties"])
def test_curve_is_every_threshold(decimals, soft):
    confidence, outcome = records(300, decimals=decimals, soft=soft)
    curve = risk_coverage(confidence, outcome)
    np.testing.assert_allclose(np.transpose(curve), list(every_threshold(confidence, outcome)), atol=1e-12)
    assert curve.coverage[-1] == 1.0


@pytest.mark.parametrize("risk", RISKS)
@pytest.mark.parametrize("decimals", [None, 2, 1], ids=["no ties", "ties", "many ties"])
def test_coverage_at_risk_agrees_with_reliable_vqa(decimals, risk):
    for seed in range(5):
        confidence, outcome = records(400, seed, decimals)
        expected = reliable_vqa_coverage(confidence, outcome, risk)
        assert coverage_at_risk(confidence, outcome, risk) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("risk", RISKS)
def test_threshold_at_risk_reaches_that_coverage_and_risk(risk):
    confidence, outcome = records(decimals=2, soft=True)
    coverage, achieved = at_threshold(confidence, outcome, threshold_at_risk(confidence, outcome, risk))
    assert coverage == coverage_at_risk(confidence, outcome, risk)
    assert coverage == 0 or achieved <= risk + 1e-12


def test_no_threshold_is_good_enough():
    assert coverage_at_risk([0.9, 0.8], [0, 1], 0.1) == 0.0
    threshold = threshold_at_risk([0.9, 0.8], [0, 1], 0.1)
    assert threshold == math.inf
    coverage, risk = at_threshold([0.9, 0.8], [0, 1], threshold)
    assert coverage == 0
    assert math.isnan(risk)


def test_coverage_grows_with_the_risk_allowed():
    confidence, outcome = records(soft=True)
    coverages = [coverage_at_risk(confidence, outcome, risk) for risk in np.linspace(0, 1, 50)]
    assert np.all(np.diff(coverages) >= 0)
    assert coverages[-1] == 1.0


@pytest.mark.parametrize("accuracy", [0.7, 0.9, 0.95, 0.99])
def test_a_bound_met_exactly_is_met_in_floating_point(accuracy):
    assert coverage_at_risk(np.full(7, 0.5), np.full(7, accuracy), 1 - accuracy) == 1.0
    assert coverage_at_risk(np.full(7, 0.5), np.full(7, accuracy), float(f"{1 - accuracy:.2f}")) == 1.0


# Areas


def test_aurc_is_the_mean_over_random_orders_of_ties():
    confidence, outcome = records(60, decimals=1, soft=True)
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(4000):
        order = np.lexsort((rng.random(60), -confidence))
        areas.append(np.mean(np.cumsum(1 - outcome[order]) / np.arange(1, 61)))
    assert aurc(confidence, outcome) == pytest.approx(np.mean(areas), abs=4 * np.std(areas) / math.sqrt(4000))


def test_aurc_against_trapezoids_without_ties():
    """reliable_vqa's area runs from coverage 1/n to 1; the mean over k adds half of the two ends."""
    confidence, outcome = records(1000)
    curve = risk_coverage(confidence, outcome)
    trapezoids = auc(curve.coverage, curve.risk)
    assert aurc(confidence, outcome) == pytest.approx(trapezoids + (curve.risk[0] + curve.risk[-1]) / 2000, abs=1e-12)


def test_perfect_ranking_has_no_excess():
    _, outcome = records(soft=True)
    assert e_aurc(outcome, outcome) == 0
    assert e_aurc(outcome / 2, outcome) == pytest.approx(0, abs=1e-15)


def test_best_area_tends_to_its_limit():
    outcome = np.arange(100_000) < 70_000
    assert aurc(outcome, outcome) == pytest.approx(0.3 + 0.7 * math.log(0.7), abs=1e-5)


def test_reversed_ranking_is_worst_and_constant_is_the_error_rate():
    confidence, outcome = records()
    assert aurc(np.full(1500, 0.4), outcome) == pytest.approx(1 - outcome.mean())
    assert aurc(outcome, outcome) < aurc(confidence, outcome) < aurc(1 - outcome, outcome)


@pytest.mark.parametrize("right", [0, 1], ids=["all wrong", "all right"])
def test_one_sided_outcomes(right):
    confidence, _ = records(100)
    outcome = np.full(100, right)
    assert aurc(confidence, outcome) == 1 - right
    assert e_aurc(confidence, outcome) == 0
    assert coverage_at_risk(confidence, outcome, 0.01) == right
    for ranking in RANKING:
        assert math.isnan(ranking(confidence, outcome))


def test_single_record():
    assert aurc([0.3], [1]) == 0
    assert coverage_at_risk([0.3], [1], 0.0) == 1
    assert threshold_at_cost([0.3], [1], 10) == 0.3
    assert math.isnan(auroc([0.3], [1]))


# Effective reliability


@pytest.mark.parametrize("cost", COSTS)
def test_threshold_at_cost_agrees_with_reliable_vqa_without_ties(cost):
    for seed in range(5):
        confidence, outcome = records(500, seed)
        assert threshold_at_cost(confidence, outcome, cost) == reliable_vqa_threshold(confidence, outcome, cost)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
def test_threshold_at_cost_beats_every_other(cost, soft):
    confidence, outcome = records(400, decimals=2, soft=soft)
    best = threshold_at_cost(confidence, outcome, cost)
    values = {t: effective_reliability(confidence, outcome, cost, t) for t in np.unique(confidence)}
    assert values[best] == pytest.approx(max(values.values()))
    assert best == min(t for t, value in values.items() if value == pytest.approx(values[best], abs=1e-12))


def test_equal_sums_of_soft_outcomes_count_as_equal():
    # Answering three more records costs 0.3 and earns 0.2 + 0.1: the lower threshold is chosen, although in floating
    # point 0.1 + 0.9 − 0.3 + 0.2 + 0.1 falls short of 0.1 + 0.9.
    outcome = [0.1, 0.9, 0.0, 0.2, 0.1]
    earned = np.cumsum([0.1, 0.9, -0.3, 0.2, 0.1])
    assert earned[-1] < earned[1]
    assert threshold_at_cost([0.9, 0.8, 0.7, 0.6, 0.5], outcome, cost=0.3) == 0.5


def test_effective_reliability_at_its_ends():
    confidence, outcome = records(soft=True)
    everything = effective_reliability(confidence, outcome, 10, 0.0)
    assert everything == pytest.approx(outcome.mean() - 10 * np.mean(outcome == 0))
    oracle = effective_reliability(outcome > 0, outcome, 10, 1.0)
    assert oracle == pytest.approx(outcome.mean())
    assert effective_reliability(confidence, outcome, 10, math.inf) == 0


# Ranking


@pytest.mark.parametrize("decimals", [None, 2, 1, 0], ids=["no ties", "ties", "many ties", "two levels"])
def test_ranking_agrees_with_sklearn(decimals):
    confidence, outcome = records(decimals=decimals)
    assert auroc(confidence, outcome) == pytest.approx(roc_auc_score(outcome, confidence), abs=1e-12)
    assert aupr_error(confidence, outcome) == pytest.approx(
        average_precision_score(1 - outcome, -confidence), abs=1e-12
    )
    fpr, tpr, _ = roc_curve(outcome, confidence, drop_intermediate=False)
    assert fpr_at_tpr(confidence, outcome) == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-12)


def test_soft_outcomes_are_split_records():
    confidence, outcome = records(decimals=1, soft=True)
    twice, label = np.tile(confidence, 2), np.repeat([1, 0], confidence.size)
    weight = np.concatenate([outcome, 1 - outcome])
    assert auroc(confidence, outcome) == pytest.approx(roc_auc_score(label, twice, sample_weight=weight), abs=1e-12)
    assert aupr_error(confidence, outcome) == pytest.approx(
        average_precision_score(1 - label, -twice, sample_weight=weight), abs=1e-12
    )
    fpr, tpr, _ = roc_curve(label, twice, sample_weight=weight, drop_intermediate=False)
    assert fpr_at_tpr(confidence, outcome) == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-12)


def test_ranking_sees_order_alone():
    confidence, outcome = records()
    for ranking in RANKING:
        assert ranking(confidence**3, outcome) == ranking(confidence, outcome)
    assert aurc(confidence**3, outcome) == aurc(confidence, outcome)


def test_auroc_of_a_reversed_ranking_mirrors():
    confidence, outcome = records(decimals=1)
    assert auroc(1 - confidence, outcome) == pytest.approx(1 - auroc(confidence, outcome))


def test_perfect_and_constant_rankings():
    outcome = np.array([1, 0, 1, 1, 0])
    assert (auroc(outcome, outcome), aupr_error(outcome, outcome), fpr_at_tpr(outcome, outcome)) == (1, 1, 0)
    constant = np.full(5, 0.5)
    assert (auroc(constant, outcome), aupr_error(constant, outcome), fpr_at_tpr(constant, outcome)) == (0.5, 0.4, 1)


def test_fpr_at_tpr_counts_exactly_nineteen_of_twenty():
    confidence = np.r_[np.linspace(0.9, 0.5, 20), 0.51, 0.1]
    outcome = np.r_[np.ones(20), 0, 0]
    # 19 of 20 right answers lie above 0.52; the wrong ones below it.
    assert fpr_at_tpr(confidence, outcome) == 0
    assert fpr_at_tpr(confidence, outcome, tpr=1.0) == 0.5
    assert fpr_at_tpr(confidence, outcome, tpr=0.0) == 0


# Input


@pytest.mark.parametrize("metric", PAIRED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("decimals", [None, 1], ids=["no ties", "ties"])
def test_order_of_records_does_not_matter(metric, decimals):
    confidence, outcome = records(700, decimals=decimals)
    shuffle = np.random.default_rng(1).permutation(700)
    extra = EXTRA.get(metric, ())
    shuffled, plain = metric(confidence[shuffle], outcome[shuffle], *extra), metric(confidence, outcome, *extra)
    np.testing.assert_allclose(shuffled, plain, atol=1e-12)


@pytest.mark.parametrize("metric", PAIRED, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("confidence", "outcome", "message"),
    [
        ([0.5, math.nan], [1, 0], "nan at index 1"),
        ([0.5, 0.5], [math.nan, 1], "nan at index 0"),
        ([1.5], [1], "got 1.5"),
        ([0.5], [-1], "got -1.0"),
        ([], [], "empty"),
        ([0.5], [1, 0], "1 confidences and 2 outcomes"),
        ([[0.5, 0.5]], [[1, 0]], r"shape \(1, 2\)"),
    ],
    ids=["nan", "nan outcome", "above one", "negative", "empty", "lengths", "2-D"],
)
def test_bad_input_is_named(metric, confidence, outcome, message):
    with pytest.raises(ValueError, match=message):
        metric(confidence, outcome, *EXTRA.get(metric, ()))


@pytest.mark.parametrize("risk", [-0.1, 1.1, 5, math.nan])
@pytest.mark.parametrize("metric", [coverage_at_risk, threshold_at_risk], ids=lambda f: f.__name__)
def test_bad_risk(metric, risk):
    with pytest.raises(ValueError, match="risk in"):
        metric([0.5], [1], risk)


@pytest.mark.parametrize("cost", [-1, math.nan, math.inf])
def test_bad_cost(cost):
    with pytest.raises(ValueError, match="cost"):
        effective_reliability([0.5], [1], cost, 0.5)
    with pytest.raises(ValueError, match="cost"):
        threshold_at_cost([0.5], [1], cost)


def test_bad_threshold():
    with pytest.raises(ValueError, match="threshold"):
        at_threshold([0.5], [1], math.nan)
    with pytest.raises(ValueError, match="threshold"):
        effective_reliability([0.5], [1], 1, math.nan)


@pytest.mark.parametrize("n", [1, 2, 11, 488, 5000])
@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_where_every_ranking_is_as_good_nothing_is_in_excess_not_even_by_rounding(n, outcome):
    confidence = np.random.default_rng(n).random(n)
    assert e_aurc(confidence, np.full(n, outcome)) >= 0.0
    assert e_aurc(confidence, np.full(n, outcome)) == pytest.approx(0.0, abs=1e-12)
