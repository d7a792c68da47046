"""Calibration and localisation metrics: closed forms, invariants, and agreement with independent implementations."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from netcal.metrics import ECE as NetcalECE
from netcal.metrics import MCE as NetcalMCE
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import binary_calibration_error

from lmms_plugin import metrics
from lmms_plugin.metrics import (
    IOU_THRESHOLDS,
    acc_at,
    adaptive_ece,
    brier,
    brier_parts,
    ece,
    ece_floor,
    laace_0,
    laece_0,
    mce,
    mean_ece_over_iou,
    mean_iou,
    nll,
    reliability_bins,
    smooth_ece,
    squared_ce,
)
from lmms_plugin.metrics.bins import equal_mass_index

PAIRED = [adaptive_ece, brier, brier_parts, ece, laace_0, laece_0, mce, mean_ece_over_iou, nll, smooth_ece, squared_ce]
ERRORS = [adaptive_ece, ece, mce, smooth_ece]
"""Calibration errors: each the absolute gap when all records agree, and 0 when calibrated."""


def records(n=2000, seed=0, power=1.5, soft=False):
    """Right with probability confidence^power, so overconfident above 1; with gaps of both signs if None."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(3, 1.2, n)
    chance = 0.7 - 0.4 * (confidence < 0.75) if power is None else confidence**power
    outcome = rng.beta(8 * chance + 1e-3, 8 * (1 - chance) + 1e-3) if soft else (rng.random(n) < chance).astype(float)
    return confidence, outcome


def brute_ece(confidence, outcome, n_bins):
    """The definition, one record at a time, in exact rational bin edges."""
    total = 0.0
    for k in range(n_bins):
        inside = [i for i, c in enumerate(confidence) if k / n_bins < c <= (k + 1) / n_bins or (k == 0 and c == 0)]
        if inside:
            total += abs(sum(confidence[i] - outcome[i] for i in inside))
    return total / len(confidence)


def image_sum_smooth_error(confidence, outcome, sigma, points=1001):
    """smECE at a fixed bandwidth by quadrature over the mirror images of every record."""
    t = (np.arange(points) + 0.5) / points
    shifts = 2 * np.arange(-2, 3)
    sources = np.concatenate([confidence[:, None] + shifts, -confidence[:, None] + shifts], axis=1)
    kernel = np.exp(-0.5 * ((t[:, None, None] - sources) / sigma) ** 2).sum(axis=2) / (sigma * np.sqrt(2 * np.pi))
    return float(np.abs(kernel @ (confidence - outcome)).mean() / confidence.size)


def test_all_names_exactly_what_the_package_imports():
    public = {name for name, value in vars(metrics).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == set(metrics.__all__)


# Closed forms


def test_ece_and_mce_of_two_bins_by_hand():
    confidence, outcome = [0.9, 0.8, 0.3, 0.2], [1, 0, 0, 1]
    # (0.5, 1]: mean confidence 0.85, half right; (0, 0.5]: mean confidence 0.25, half right.
    assert ece(confidence, outcome, n_bins=2) == pytest.approx(0.5 * 0.35 + 0.5 * 0.25)
    assert mce(confidence, outcome, n_bins=2) == pytest.approx(0.35)


def test_adaptive_ece_by_hand():
    confidence, outcome = [0.1, 0.2, 0.3, 0.9], [0, 0, 1, 1]
    # Halves by rank: {0.1, 0.2} and {0.3, 0.9}; equal width would put 0.3 with the first two.
    assert adaptive_ece(confidence, outcome, n_bins=2) == pytest.approx(0.5 * 0.15 + 0.5 * 0.4)


@pytest.mark.parametrize("error", ERRORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("value", "right"), [(0.7, 70), (0.7, 40), (1.0, 90), (0.0, 10), (0.2, 0), (0.25, 100)])
def test_constant_confidence_gives_its_gap(error, value, right):
    outcome = np.arange(100) < right
    assert error(np.full(100, value), outcome) == pytest.approx(abs(value - right / 100), abs=1e-9)


@pytest.mark.parametrize("error", ERRORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("outcome", [0.0, 1.0, 0.4], ids=["wrong", "right", "soft"])
def test_single_record(error, outcome):
    assert error([0.9], [outcome]) == pytest.approx(abs(0.9 - outcome), abs=1e-9)


@pytest.mark.parametrize("error", [ece, adaptive_ece, smooth_ece], ids=lambda f: f.__name__)
@pytest.mark.parametrize("right", [False, True], ids=["all wrong", "all right"])
def test_one_sided_outcomes_give_the_mean_gap(error, right):
    confidence, _ = records(500)
    expected = np.mean(1 - confidence if right else confidence)
    # Residuals of one sign cannot cancel, whatever is pooled.
    assert error(confidence, np.full(500, right)) == pytest.approx(expected, abs=1e-6)


def test_certain_and_right_or_hopeless_and_wrong_is_perfect():
    confidence = np.array([1.0, 1.0, 0.0, 0.0])
    for error in ERRORS:
        assert error(confidence, confidence) == pytest.approx(0, abs=1e-12)
    assert brier(confidence, confidence) == 0
    assert nll(confidence, confidence) == pytest.approx(0, abs=2e-6)


# Bins by definition


@pytest.mark.parametrize("n_bins", [1, 2, 3, 7, 10, 15, 20, 49, 100])
def test_edges_belong_to_the_bin_below_them(n_bins):
    edges = np.arange(n_bins + 1) / n_bins
    bins = reliability_bins(edges, np.zeros(n_bins + 1), n_bins)
    # 0 shares the first bin with 1/n; every other edge is alone as the top of its bin.
    assert bins.records.tolist() == [2.0] + [1.0] * (n_bins - 1)
    just_above = reliability_bins(np.nextafter(edges[:-1], 1), np.zeros(n_bins), n_bins)
    assert just_above.records.tolist() == [1.0] * n_bins


def test_decimal_confidences_on_edges_match_the_definition():
    confidence = np.round(np.arange(0, 101) / 100, 2)
    outcome = np.arange(101) % 3 == 0
    for n_bins in (5, 10, 15, 20, 25):
        assert ece(confidence, outcome, n_bins) == pytest.approx(brute_ece(confidence, outcome, n_bins), abs=1e-12)


def test_confidence_zero_is_counted():
    # The evaluator of reliable_vqa drops exact zeros from every bin but keeps them in n: it would report 0.45.
    assert ece([0.0, 0.9], [1, 0]) == pytest.approx((1.0 + 0.9) / 2)


@pytest.mark.parametrize("n_bins", [1, 2, 7, 15, 40])
def test_equal_mass_bins_are_equal_without_ties(n_bins):
    confidence, outcome = records(1000)
    sizes = reliability_bins(confidence, outcome, n_bins, equal_mass=True).records
    assert sizes.size == n_bins
    assert sizes.max() - sizes.min() <= 1


def test_equal_mass_never_separates_ties():
    confidence = np.array([0.5] * 10 + [0.9] * 2)
    outcome = np.array([0] * 5 + [1] * 5 + [1, 1])
    bins = reliability_bins(confidence, outcome, n_bins=4, equal_mass=True)
    assert bins.records.tolist() == [10, 2]
    assert adaptive_ece(confidence, outcome, n_bins=4) == pytest.approx(2 / 12 * 0.1)


@pytest.mark.parametrize(("low", "high", "sizes"), [(2, 1, [2, 8]), (1, 2, [8, 2])], ids=["late", "early"])
def test_ties_go_to_the_bin_of_their_middle_rank(low, high, sizes):
    confidence = [0.2] * low + [0.5] * 7 + [0.9] * high
    assert reliability_bins(confidence, [1] * 10, n_bins=2, equal_mass=True).records.tolist() == sizes


@pytest.mark.parametrize("seed", range(20))
def test_a_block_of_ties_is_in_the_bin_of_its_middle_rank(seed):
    rng = np.random.default_rng(seed)
    records, n_bins = rng.integers(1, 30, rng.integers(1, 40)), int(rng.integers(1, 50))
    ends = records.cumsum().tolist()
    # From 0 the ranks of a block that ends before e are e − r to e − 1, and twice their middle is 2·e − r − 1.
    bins = [(2 * e - r - 1) * n_bins // (2 * ends[-1]) for e, r in zip(ends, records.tolist(), strict=True)]
    assert equal_mass_index(records.astype(np.float64), n_bins).tolist() == bins


@pytest.mark.parametrize("metric", PAIRED, ids=lambda f: f.__name__)
def test_order_of_records_does_not_matter(metric):
    confidence, outcome = records(700)
    confidence = np.round(confidence, 2)
    shuffle = np.random.default_rng(1).permutation(700)
    assert metric(confidence[shuffle], outcome[shuffle]) == pytest.approx(metric(confidence, outcome), abs=1e-10)


@pytest.mark.parametrize("metric", [brier, ece, adaptive_ece, mce, smooth_ece, nll], ids=lambda f: f.__name__)
def test_repeating_the_records_changes_nothing(metric):
    confidence, outcome = records(300)
    repeated = metric(np.tile(confidence, 3), np.tile(outcome, 3))
    assert repeated == pytest.approx(metric(confidence, outcome), abs=1e-10)


# Perfect calibration


def test_calibrated_stream_is_near_zero_and_under_its_floor():
    confidence, outcome = records(200_000, power=1.0)
    floor = ece_floor(confidence)
    assert ece(confidence, outcome) < 1.5 * floor.p95
    assert smooth_ece(confidence, outcome) < 0.01
    assert abs(squared_ce(confidence, outcome)) < 1e-4


def test_miscalibrated_stream_is_above_its_floor():
    confidence, outcome = records(5000)
    assert ece(confidence, outcome) > 3 * ece_floor(confidence).p95
    # Overconfidence of one sign everywhere: no pooling hides it.
    gap = np.mean(confidence - confidence**1.5)
    assert ece(confidence, outcome) == pytest.approx(gap, abs=0.02)
    assert smooth_ece(confidence, outcome) == pytest.approx(gap, abs=0.02)


@pytest.mark.parametrize("equal_mass", [False, True], ids=["equal width", "equal mass"])
@pytest.mark.parametrize("n", [1, 40, 700])
def test_floor_matches_simulation_record_by_record(n, equal_mass):
    rng = np.random.default_rng(3)
    confidence = rng.beta(6, 1.2, n)
    error = adaptive_ece if equal_mass else ece
    simulated = [error(confidence, rng.random(n) < confidence) for _ in range(1000)]
    floor = ece_floor(confidence, equal_mass=equal_mass, simulations=4000)
    standard_error = np.std(simulated) * math.sqrt(1 / 1000 + 1 / 4000)
    assert floor.mean == pytest.approx(np.mean(simulated), abs=5 * standard_error + 1e-12)
    if n > 1:  # with one record the error takes two values and a quantile may fall on either
        assert floor.p95 == pytest.approx(np.quantile(simulated, 0.95), rel=0.08)


def test_floor_reproduces_the_reference_study():
    # Beta(6, 1.2) confidences, 15 bins: mean 0.046 with p95 0.065 at n = 300, 0.027 with 0.039 at n = 1000.
    for n, mean, p95 in [(300, 0.046, 0.065), (1000, 0.027, 0.039)]:
        floors = [ece_floor(np.random.default_rng(seed).beta(6, 1.2, n)) for seed in range(5)]
        assert np.mean([floor.mean for floor in floors]) == pytest.approx(mean, abs=0.002)
        assert np.mean([floor.p95 for floor in floors]) == pytest.approx(p95, abs=0.003)


def test_floor_is_zero_where_nothing_is_uncertain():
    assert ece_floor([0.0, 1.0, 1.0]) == (0.0, 0.0)


def test_floor_repeats_with_its_seed():
    confidence, _ = records(300)
    assert ece_floor(confidence, seed=4) == ece_floor(confidence, seed=4)
    assert ece_floor(confidence, seed=4) != ece_floor(confidence, seed=5)


def test_squared_ce_is_unbiased_where_the_plain_one_is_not():
    rng = np.random.default_rng(5)
    confidence = np.repeat([0.3, 0.5, 0.85], 20)
    truth = confidence - np.array([0.1, 0.0, 0.05]).repeat(20)
    draws = [(rng.random(60) < truth).astype(float) for _ in range(4000)]
    expected = (0.1**2 + 0.05**2) / 3
    estimates = [squared_ce(confidence, outcome) for outcome in draws]
    plain = [brier_parts(confidence, outcome).reliability for outcome in draws]
    assert np.mean(estimates) == pytest.approx(expected, abs=4 * np.std(estimates) / math.sqrt(4000))
    assert np.mean(plain) > expected + 0.005


def test_squared_ce_needs_two_records_in_a_bin():
    assert math.isnan(squared_ce([0.1, 0.9], [0, 1]))


def test_mce_ignores_small_bins_when_asked():
    confidence, outcome = [0.1, 0.9, 0.9], [1, 1, 1]
    assert mce(confidence, outcome) == pytest.approx(0.9)
    assert mce(confidence, outcome, min_count=2) == pytest.approx(0.1)
    assert math.isnan(mce(confidence, outcome, min_count=3))


# Smooth ECE


@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
@pytest.mark.parametrize("power", [None, 1.0, 1.5])
def test_smooth_ece_is_its_own_bandwidth(power, soft):
    confidence, outcome = records(100, power=power, soft=soft)
    confidence[:3], outcome[:3] = [0.0, 1.0, 1.0], [1, 0, 1]
    value = smooth_ece(confidence, outcome)
    assert image_sum_smooth_error(confidence, outcome, value) == pytest.approx(value, rel=1e-3)


def test_smooth_ece_treats_both_ends_alike():
    confidence, outcome = records(400, power=None)
    mirrored = smooth_ece(1 - confidence, 1 - outcome)
    assert smooth_ece(confidence, outcome) == pytest.approx(mirrored, abs=1e-10)


@pytest.mark.parametrize("power", [0.6, 1.0, 1.5, 4.0, None])
def test_smooth_ece_agrees_with_its_authors_package(power):
    relplot = pytest.importorskip("relplot")
    confidence, outcome = records(4000, power=power)
    # relplot finds the bandwidth to 2⁻¹⁰ and evaluates on 200 points.
    assert smooth_ece(confidence, outcome) == pytest.approx(relplot.smECE(confidence, outcome), abs=2e-3)


# Proper scores


@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
@pytest.mark.parametrize("n_bins", [1, 15, 1000])
def test_brier_parts_add_up(n_bins, soft):
    confidence, outcome = records(soft=soft)
    parts = brier_parts(confidence, outcome, n_bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
    assert total == pytest.approx(brier(confidence, outcome), abs=1e-12)
    assert min(parts.reliability, parts.resolution, parts.uncertainty) >= 0


def test_within_bin_term_is_what_stephenson_defines():
    confidence, outcome = records(500)
    index = np.clip(np.ceil(confidence * 10).astype(int) - 1, 0, 9)
    c_mean = np.array([confidence[index == b].mean() if (index == b).any() else 0 for b in range(10)])[index]
    y_mean = np.array([outcome[index == b].mean() if (index == b).any() else 0 for b in range(10)])[index]
    expected = np.mean((confidence - c_mean) ** 2) - 2 * np.mean((confidence - c_mean) * (outcome - y_mean))
    assert brier_parts(confidence, outcome, 10).within_bin == pytest.approx(expected, abs=1e-12)


def test_brier_parts_of_forecasts_constant_in_their_bins():
    parts = brier_parts([0.2] * 5 + [0.8] * 5, [0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    assert parts == pytest.approx((0.5 * 0.2**2, 0.4**2, 0.6 * 0.4, 0.0), abs=1e-12)


def test_agrees_with_sklearn_scores():
    confidence, outcome = records()
    assert brier(confidence, outcome) == pytest.approx(brier_score_loss(outcome, confidence), abs=1e-12)
    assert nll(confidence, outcome) == pytest.approx(log_loss(outcome, confidence), abs=1e-9)


def test_nll_of_a_certain_error_is_the_clip():
    assert nll([1.0], [0], clip=1e-4) == pytest.approx(-math.log(1e-4))
    assert nll([0.0], [1]) == pytest.approx(-math.log(1e-6))


def test_nll_of_soft_outcomes_is_least_at_the_outcome():
    assert nll([0.3], [0.3]) == pytest.approx(-0.3 * math.log(0.3) - 0.7 * math.log(0.7))
    assert nll([0.3], [0.3]) < min(nll([0.25], [0.3]), nll([0.35], [0.3]))


# Agreement with independent implementations of the binned errors


@pytest.mark.parametrize("n_bins", [1, 10, 15, 20])
@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
def test_ece_agrees_with_the_definition(n_bins, soft):
    confidence, outcome = records(400, soft=soft)
    confidence[:4] = [0.0, 1.0, 0.2, 1 / n_bins]
    assert ece(confidence, outcome, n_bins) == pytest.approx(brute_ece(confidence, outcome, n_bins), abs=1e-12)


@pytest.mark.parametrize("n_bins", [10, 15, 20])
def test_agrees_with_torchmetrics(n_bins):
    confidence, outcome = records(5000)
    preds, target = torch.tensor(confidence), torch.tensor(outcome).long()
    assert ece(confidence, outcome, n_bins) == pytest.approx(
        binary_calibration_error(preds, target, n_bins=n_bins, norm="l1").item(), abs=1e-9
    )
    assert mce(confidence, outcome, n_bins) == pytest.approx(
        binary_calibration_error(preds, target, n_bins=n_bins, norm="max").item(), abs=1e-9
    )
    assert brier_parts(confidence, outcome, n_bins).reliability == pytest.approx(
        binary_calibration_error(preds, target, n_bins=n_bins, norm="l2").item() ** 2, abs=1e-9
    )


def test_torchmetrics_gives_confidence_one_a_bin_of_its_own():
    # Its bins are [lower, upper), so 1.0 falls past the last of them. [0.9, 1] holds both records and is off by
    # 0.975 − 0.5; torchmetrics adds |1 − 0| and |0.95 − 1| separately. Half precision rounds many confidences to 1.0.
    confidence, outcome = [1.0, 0.95], [0, 1]
    theirs = binary_calibration_error(torch.tensor(confidence), torch.tensor(outcome), n_bins=10)
    assert theirs.item() == pytest.approx(0.525)
    assert ece(confidence, outcome, n_bins=10) == pytest.approx(0.475)


@pytest.mark.parametrize("n_bins", [10, 15, 20])
def test_agrees_with_netcal(n_bins):
    confidence, outcome = records(3000, seed=2)
    labels = outcome.astype(int)
    assert ece(confidence, outcome, n_bins) == pytest.approx(NetcalECE(bins=n_bins).measure(confidence, labels))
    assert mce(confidence, outcome, n_bins) == pytest.approx(NetcalMCE(bins=n_bins).measure(confidence, labels))
    assert adaptive_ece(confidence, outcome, n_bins) == pytest.approx(
        NetcalECE(bins=n_bins, equal_intervals=False).measure(confidence, labels), abs=2e-3
    )


# Input


@pytest.mark.parametrize("metric", PAIRED, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("confidence", "outcome", "message"),
    [
        ([0.5, math.nan], [1, 0], "nan at index 1"),
        ([0.5, 0.5], [1, math.nan], "nan at index 1"),
        ([0.5, math.inf], [1, 0], "inf at index 1"),
        ([1.0000001], [1], "got 1.0000001"),
        ([-0.1], [1], "got -0.1"),
        ([0.5], [2], "got 2.0"),
        ([], [], "empty"),
        ([0.5, 0.5], [1], "2 confidences and 1 outcomes"),
        ([[0.5]], [[1]], r"shape \(1, 1\)"),
        (0.5, 1, r"shape \(\)"),
    ],
    ids=["nan", "nan outcome", "inf", "above one", "negative", "outcome two", "empty", "lengths", "2-D", "scalar"],
)
def test_bad_input_is_named(metric, confidence, outcome, message):
    with pytest.raises(ValueError, match=message):
        metric(confidence, outcome)


@pytest.mark.parametrize("n_bins", [0, -1, 2.5, True, "15"])
def test_bad_bin_counts(n_bins):
    with pytest.raises(ValueError, match="n_bins"):
        ece([0.5], [1], n_bins)


@pytest.mark.parametrize("clip", [0.0, 0.5, -1.0, math.nan])
def test_bad_clip(clip):
    with pytest.raises(ValueError, match="clip"):
        nll([0.5], [1], clip=clip)


def test_bad_confidence_of_the_floor():
    with pytest.raises(ValueError, match="nan"):
        ece_floor([math.nan])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_low_precision_input_is_summed_in_double(dtype):
    confidence = np.full(300_000, 0.75, dtype=dtype)
    assert brier(confidence, np.ones(300_000, dtype=bool)) == pytest.approx(0.0625, abs=1e-12)


# Localisation


def test_accuracy_at_a_threshold_includes_the_threshold():
    iou = [0.5, 0.4999, 0.9, 0.0]
    assert acc_at(iou, 0.5) == 0.5
    assert acc_at(iou, 0.9) == 0.25
    assert acc_at(iou, 0.0) == 1.0
    assert mean_iou(iou) == pytest.approx(1.8999 / 4)


def test_iou_thresholds_are_the_decimals():
    assert IOU_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def test_laece_is_the_published_sum():
    """The loop of fiveai/detection_calibration for τ = 0 with one box per record: precision · mean IoU = Σ IoU / n."""
    confidence, iou = records(600, soft=True)
    edges = np.linspace(0, 1, 26)
    expected = 0.0
    for lower, upper in itertools.pairwise(edges):
        inside = (confidence > lower) & (confidence <= upper)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - iou[inside].sum() / inside.sum())
    assert laece_0(confidence, iou) == pytest.approx(expected, abs=1e-12)


def test_laace_by_hand_and_bounds_laece():
    assert laace_0([0.9, 0.1], [0.5, 0.3]) == pytest.approx(0.3)
    confidence, iou = records(600, soft=True)
    assert laece_0(confidence, iou) <= laace_0(confidence, iou)


def test_confidence_equal_to_iou_is_perfect():
    _, iou = records(600, soft=True)
    assert laece_0(iou, iou) == pytest.approx(0, abs=1e-12)
    assert laace_0(iou, iou) == 0


def test_mean_ece_over_iou_averages_the_thresholds():
    # IoU 0.72 passes 0.50 … 0.70 and fails 0.75 … 0.95: five gaps of 0.4 and five of 0.6.
    assert mean_ece_over_iou([0.6], [0.72]) == pytest.approx(0.5)
    confidence, iou = records(400, soft=True)
    assert mean_ece_over_iou(confidence, iou, (0.75,)) == ece(confidence, iou >= 0.75)


def test_bad_thresholds():
    with pytest.raises(ValueError, match="threshold"):
        acc_at([0.5], 1.5)
    with pytest.raises(ValueError, match="thresholds"):
        mean_ece_over_iou([0.5], [0.5], ())
