"""Guarantees under a known truth: how often they are kept, and that they promise something."""

import math

import numpy as np
import pytest
from scipy.stats import beta, binom

from bench.guarantee_simulations import LARGEST, Truth, contained, drawn, losses_at_risk
from lmms_plugin import metrics
from lmms_plugin.metrics.guarantees import box_margins, covariate_shift, risk_bounds, thresholds
from lmms_plugin.metrics.guarantees.risk_bounds import ImageLosses, image_losses
from lmms_plugin.metrics.guarantees.thresholds import NOTHING, Promise, ScoredDocuments

REPEATS = 1000
TOO_OFTEN = binom.ppf(0.999, REPEATS, 0.05) / REPEATS
"""Share of broken promises that is not seen by chance where one in twenty may be broken."""


@pytest.mark.parametrize(("images", "tied"), [(30, True), (150, False), (600, True)])
def test_selective_thresholds_keep_their_risk(images, tied):
    truth, random, covered = Truth(tied=tied), np.random.default_rng(images), []
    promise, broken, estimated = Promise(0.1, largest=LARGEST), 0, 0
    for _ in range(REPEATS):
        documents, *_ = drawn(random, images, tied=tied)
        found = thresholds.selective_threshold(documents, documents.image % 4 == 0, promise)
        covered.append(0.0 if found.threshold == NOTHING else found.coverage)
        broken += truth.accepted(found.threshold)[0] > promise.risk
        naive = metrics.threshold_at_risk(documents.confidence, 1.0 - documents.loss, promise.risk)
        estimated += truth.accepted(naive)[0] > promise.risk
    assert broken / REPEATS <= TOO_OFTEN
    if not tied:
        assert estimated / REPEATS > 0.25, "the threshold that has this risk on the images it is chosen on"
    if images == 30:
        assert max(covered) == 0.0, "30 images are too few to show it"
    if images == 600:
        assert np.mean(covered) > 0.2


@pytest.mark.parametrize("images", [150, 600])
def test_monotone_and_expected_thresholds_keep_their_risk(images):
    truth, random, broken, expected, covered = Truth(), np.random.default_rng(images), 0, [], []
    promise = Promise(0.05, largest=LARGEST)
    for _ in range(REPEATS):
        documents, *_ = drawn(random, images)
        found = thresholds.monotone_threshold(documents, promise)
        broken += truth.accepted(found.threshold)[1] > promise.risk
        covered.append(found.coverage)
        expected.append(truth.accepted(thresholds.expected_threshold(documents, 0.05))[1])
    assert broken / REPEATS <= TOO_OFTEN
    assert images == 150 or np.mean(covered) > 0.3
    # Sizes of images and errors are independent here, so that means over images and over documents agree.
    assert np.mean(expected) <= 0.05 + 3 * np.std(expected) / math.sqrt(REPEATS)
    assert np.mean(expected) > 0.03


@pytest.mark.parametrize("bound", ["betting", "hoeffding-bentkus"])
@pytest.mark.parametrize("images", [30, 150, 600])
def test_p_values_are_those_of_no_effect_where_there_is_none(images, bound):
    losses = losses_at_risk(np.random.default_rng(images), images, REPEATS)
    for p in (losses.p_below(0.1, bound), losses.p_above(0.1, bound)):
        for level in (0.05, 0.2):
            assert (p <= level).mean() <= binom.ppf(0.999, REPEATS, level) / REPEATS
    better = losses.p_below(0.3, bound)
    assert (better <= 0.05).mean() > {30: 0.05, 150: 0.9, 600: 0.99}[images] or (bound, images) == (
        "hoeffding-bentkus",
        30,
    )


def test_one_document_per_image_has_the_exact_bound():
    losses = ImageLosses(np.repeat([1.0, 0.0], [3, 97]), np.ones(100), 1.0, binary=True)
    assert losses.best_bound == "exact"
    assert losses.upper(0.95) == pytest.approx(beta.ppf(0.95, 4, 97))
    assert losses.lower(0.95) == pytest.approx(beta.ppf(0.05, 3, 98))
    assert losses.p_below(0.1) == pytest.approx(binom.cdf(3, 100, 0.1))
    assert losses.p_above(0.01) == pytest.approx(1 - binom.cdf(2, 100, 0.01))
    assert ImageLosses(np.ones(5), np.ones(5), 1.0, binary=True).upper(0.95) == 1.0
    assert ImageLosses(np.zeros(5), np.ones(5), 1.0, binary=True).lower(0.95) == 0.0
    assert risk_bounds.images_needed(0.05, 0.95) == 59
    right = ImageLosses(np.zeros(59), np.ones(59), 1.0, binary=True)
    assert right.p_below(0.05) <= 0.05 < ImageLosses(np.zeros(58), np.ones(58), 1.0, binary=True).p_below(0.05)
    with pytest.raises(ValueError, match="one document per image"):
        ImageLosses(np.zeros(5), np.full(5, 2.0), 2.0, binary=True).p_below(0.1, "exact")


@pytest.mark.parametrize("bound", ["betting", "hoeffding-bentkus"])
def test_bounds_are_where_the_p_value_reaches_its_limit(bound):
    random = np.random.default_rng(0)
    sizes = random.integers(1, LARGEST + 1, 400).astype(float)
    losses = ImageLosses(random.binomial(sizes.astype(int), 0.1).astype(float), sizes, LARGEST)
    upper, lower = losses.upper(0.9, bound), losses.lower(0.9, bound)
    assert 0.0 < lower < losses.observed < upper < 1.0
    assert losses.p_below(upper, bound) == pytest.approx(0.1, abs=1e-3)
    assert losses.p_above(lower, bound) == pytest.approx(0.1, abs=1e-3)
    assert losses.upper(0.99, bound) > upper
    assert losses.upper(0.9, "betting") < losses.upper(0.9, "hoeffding-bentkus") or bound == "hoeffding-bentkus"


def test_nothing_that_counts_says_nothing():
    nothing = ImageLosses(np.zeros(9), np.zeros(9), 3.0)
    assert (nothing.upper(0.95), nothing.lower(0.95)) == (1.0, 0.0)
    assert nothing.p_below(0.05) == nothing.p_above(0.05) == 1.0
    assert math.isnan(nothing.observed)


@pytest.mark.parametrize(
    ("lost", "counted", "message"),
    [([2.0], [1.0], "between nothing and all"), ([0.0], [9.0], "at most 3"), ([0.0, 0.0], [1.0], "losses and counts")],
)
def test_impossible_losses_are_refused(lost, counted, message):
    with pytest.raises(ValueError, match=message):
        ImageLosses(np.array(lost), np.array(counted), 3.0)


def test_losses_of_images_for_documents_and_for_images():
    loss, first, image = [1.0, 0.0, 0.5, 1.0], [0, 1, 0, 5], np.array([0, 0, 1, 1])
    found = image_losses(loss, first, image, thresholds=2, largest=2)
    assert found.lost.tolist() == [[1.0, 0.5], [1.0, 0.5]]
    assert found.counted.tolist() == [[1.0, 1.0], [2.0, 1.0]]
    per_image = image_losses(loss, first, image, thresholds=2, largest=2, per_image=True)
    assert per_image.lost.tolist() == [[1.0, 0.5], [0.5, 0.5]]
    assert per_image.counted.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    weighted = image_losses(loss, first, image, thresholds=2, largest=2, weights=np.array([2.0, 0.5]), heaviest=2.0)
    assert (weighted.counted[1].tolist(), weighted.largest) == ([4.0, 0.5], 4.0)


def test_a_fixed_sequence_ends_at_its_first_failure():
    p = np.array([0.9, 0.01, 0.04, 0.2, 0.001])
    assert thresholds.fixed_sequence(p, 1, 0.05) == 2
    assert thresholds.fixed_sequence(p, 0, 0.05) is None
    assert thresholds.fixed_sequence(p, 4, 0.05) == 4


def test_candidates_are_coverages_of_the_pilot_and_end_with_all():
    found = thresholds.candidates(np.array([0.1, 0.4, 0.4, 0.8, np.nan]), 4)
    assert found.tolist() == [0.8, 0.4, 0.0]
    assert not thresholds.candidates(np.array([np.nan])).size


def test_documents_without_a_confidence_are_never_accepted():
    confidence = np.tile([0.9, np.nan], 400)
    documents = ScoredDocuments(confidence, np.isnan(confidence).astype(float), np.arange(800) // 2)
    found = thresholds.selective_threshold(documents, documents.image % 4 == 0, Promise(0.05, largest=2))
    assert (found.threshold, found.coverage, found.observed) == (0.0, 0.5, 0.0)
    assert (found.images, found.pilot_images, found.documents) == (300, 100, 600)
    with pytest.raises(ValueError, match="both sides"):
        thresholds.selective_threshold(documents, np.arange(800) == 0, Promise(0.05, largest=2))


@pytest.mark.parametrize("images", [30, 150, 600])
def test_grown_boxes_contain_the_true_ones_as_often_as_stated(images):
    random = np.random.default_rng(images)
    kept = [contained(random, images, 0.9) for _ in range(REPEATS)]
    error = 3 * np.std(kept) / math.sqrt(REPEATS)
    assert np.mean(kept) >= 0.9 - error
    assert np.mean(kept) <= 0.9 + 2 / images + 0.03 + error, "no more than ties and the new image ask for"


def test_margins_of_boxes():
    predicted = [[0.2, 0.2, 0.4, 0.6], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]]
    true = [[0.1, 0.3, 0.4, 0.7], [0.2, 0.2, 0.3, 0.3], [0.5, 0.5, 0.6, 0.5]]
    needed = box_margins.growth_needed(predicted, true)
    assert needed.tolist() == [pytest.approx(0.5), 0.0, math.inf]
    assert box_margins.grown(predicted[:1], 0.5).tolist() == [pytest.approx([0.1, 0.0, 0.5, 0.8])]
    random = np.random.default_rng(1)
    first, second = (np.sort(random.random((50, 2, 2)), axis=1).reshape(50, 4) for _ in range(2))
    margin = box_margins.growth_needed(first, second)
    for share, inside in ((1.0 + 1e-9, True), (1.0 - 1e-6, False)):
        bigger = np.stack([box_margins.grown(a[None], share * m)[0] for a, m in zip(first, margin, strict=True)])
        contains = np.all(bigger[:, :2] <= second[:, :2], axis=1) & np.all(bigger[:, 2:] >= second[:, 2:], axis=1)
        assert (contains[margin > 0] == inside).all()
    assert box_margins.box_margin([0.3] * 8, np.arange(8), 0.9).margin == math.inf, "9 images are needed"
    assert box_margins.box_margin([0.3] * 9, np.arange(9), 0.9).margin == 0.3
    with pytest.raises(ValueError, match="ends before"):
        box_margins.growth_needed([[1, 0, 0, 1]], [[0, 0, 1, 1]])


def test_known_weights_move_a_promise_to_other_images():
    shift, heaviest = -0.5, 2.5

    def ratio(covariate):
        return np.minimum(np.exp(shift * covariate - shift**2 / 2), heaviest)

    moved, weighted = Truth(shift=shift, harder=0.15, most=1), Truth(ratio, harder=0.15, most=1)
    random, promise = np.random.default_rng(4), Promise(0.2)
    broken = dict.fromkeys(("of the weighted images", "of the others", "without weights"), 0)
    covered, margins, plain = [], [], []
    for _ in range(REPEATS):
        documents, covariate, _ = drawn(random, 600, harder=0.15, most=1)
        weights, pilot = ratio(covariate), documents.image % 4 == 0
        found = thresholds.selective_threshold(documents, pilot, promise, weights=weights, heaviest=heaviest)
        unweighted = thresholds.selective_threshold(documents, pilot, promise)
        covered.append(found.threshold < NOTHING)
        broken["of the weighted images"] += weighted.accepted(found.threshold)[0] > promise.risk
        broken["of the others"] += moved.accepted(found.threshold)[0] > promise.risk
        broken["without weights"] += moved.accepted(unweighted.threshold)[0] > promise.risk
        margins.append(
            box_margins.box_margin(
                1 - documents.confidence, documents.image, 0.8, weights=weights, heaviest=heaviest
            ).margin
        )
        plain.append(box_margins.box_margin(1 - documents.confidence, documents.image, 0.8).margin)
    assert broken["of the weighted images"] / REPEATS <= TOO_OFTEN
    assert broken["of the others"] / REPEATS <= TOO_OFTEN
    assert broken["without weights"] / REPEATS > 0.3
    assert np.mean(covered) > 0.3
    others, *_ = drawn(np.random.default_rng(5), 20_000, shift=shift, most=1)
    kept, without = ([(1 - others.confidence <= one).mean() for one in found[:200]] for found in (margins, plain))
    assert np.mean(without) < 0.73
    assert np.mean(kept) == pytest.approx(0.8, abs=0.01)


def test_an_estimated_ratio_is_near_the_true_one_and_clipped():
    random = np.random.default_rng(6)
    source, target = random.normal(0, 1, (2000, 3)), random.normal([0.7, 0, 0], 1, (1500, 3))
    found = covariate_shift.density_ratio(source, target)
    assert np.corrcoef(np.log(found.weights), 0.7 * source[:, 0])[0, 1] > 0.95
    assert found.weights.mean() == pytest.approx(1.0, abs=0.05)
    assert found.weights.max() == pytest.approx(found.heaviest)
    assert (found.weights == found.heaviest).mean() == pytest.approx(1 - covariate_shift.QUANTILE, abs=2e-3)
    assert 0.6 < found.auroc < 0.75
    assert covariate_shift.effective_images(np.full(7, 3.0)) == pytest.approx(7.0)
    apart = covariate_shift.density_ratio(source, target + np.array([20.0, 0.0, 0.0]))
    assert apart.auroc > 0.999
    assert not apart.overlaps
    assert found.overlaps
    with pytest.raises(ValueError, match="2 images or more"):
        covariate_shift.density_ratio(source[:1], target)


@pytest.mark.parametrize("features", [3, 385])
def test_images_of_one_kind_are_not_told_apart_however_many_features_there_are(features):
    random = np.random.default_rng(features)
    same = covariate_shift.density_ratio(*(random.normal(size=(count, features)) for count in (300, 100)))
    assert same.auroc == pytest.approx(0.5, abs=0.15), "of images that a regression was not fitted to"
    assert covariate_shift.effective_images(same.weights) > 270


def test_a_weight_does_not_depend_on_the_fit_to_its_own_image():
    random = np.random.default_rng(7)
    source, target = random.normal(0, 1, (40, 2)), random.normal(0.5, 1, (40, 2))
    found = covariate_shift.density_ratio(source, target)
    mates = np.random.default_rng(0).permutation(40) % covariate_shift.FOLDS
    fold = mates == mates[0]
    swapped = source.copy()
    # Images of one fold change places: statistics of all features stay, and so do the fits of the other folds' images.
    swapped[fold] = np.roll(source[fold], 1, axis=0)
    again = covariate_shift.density_ratio(swapped, target)
    assert again.ridge == found.ridge
    assert again.weights[~fold] == pytest.approx(found.weights[~fold])
    assert again.weights[fold] == pytest.approx(np.roll(found.weights[fold], 1))


@pytest.mark.parametrize(("images", "features"), [(200, 150), (40, 400)])
def test_principal_components_are_those_of_a_singular_value_decomposition(images, features):
    standard = np.random.default_rng(8).normal(size=(images, features)) * np.linspace(1, 3, features)
    found = covariate_shift.principal_components(standard, 30)
    left, values, _ = np.linalg.svd(standard, full_matrices=False)
    assert np.abs(found) == pytest.approx(np.abs(left[:, :30] * values[:30]), abs=1e-6)
    assert covariate_shift.principal_components(standard, features) is standard


def test_a_bet_on_weighted_images_is_exact_given_their_features():
    # Images with other weights and other risks, whose weighted risk is just the promised one: p-values are valid
    # although no two images are alike, since the mean gain of a bet of constant size is at most that of equal images.
    random = np.random.default_rng(9)
    weights = random.gamma(2.0, 0.5, 300)
    risks = np.clip(random.beta(0.5, 4.5, 300) * np.where(weights > 1.0, 1.6, 0.5), 0.0, 1.0)
    promised = float(weights @ risks / weights.sum())
    lost = (random.random((REPEATS, 300)) < risks) * weights
    losses = ImageLosses(lost, np.tile(weights, (REPEATS, 1)), weights.max())
    for p in (losses.p_below(promised), losses.p_above(promised)):
        assert (p <= 0.05).mean() <= TOO_OFTEN
