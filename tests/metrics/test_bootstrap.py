"""Bootstrap over clusters: counted metrics against repeated records, coverage of intervals, closed forms."""

from functools import partial

import numpy as np
import pytest
from helpers.resampled_metric import ResampledMetric
from hypothesis import given
from hypothesis import strategies as st

from lmms_plugin import metrics
from lmms_plugin.analysis import component_importance, measure
from lmms_plugin.metrics import ranked
from lmms_plugin.metrics.bootstrap import Clusters, bootstrap, draw, interval, p_value
from lmms_plugin.metrics.calibration import OF_BINS, Binned, Smooth
from lmms_plugin.metrics.localisation import Localised
from lmms_plugin.metrics.ranked import RISKS, Ranked
from lmms_plugin.metrics.selective import Gains
from lmms_plugin.metrics.sums import ClusterMean, Means
from lmms_plugin.study.file import analyses

THRESHOLDS = {0.05: 0.7, 0.2: 0.4}
GAINS = {1.0: 0.5, 10.0: 0.8}

PLAIN = {
    "ece": metrics.ece,
    "mce": metrics.mce,
    "squared_ce": metrics.squared_ce,
    "brier": metrics.brier,
    "brier_reliability": lambda c, y: metrics.brier_parts(c, y).reliability,
    "brier_resolution": lambda c, y: metrics.brier_parts(c, y).resolution,
    "brier_uncertainty": lambda c, y: metrics.brier_parts(c, y).uncertainty,
    "brier_within_bin": lambda c, y: metrics.brier_parts(c, y).within_bin,
    "nll": metrics.nll,
    "smooth_ece": metrics.smooth_ece,
    "laece_0": metrics.laece_0,
    "laace_0": metrics.laace_0,
    "mean_ece_over_iou": metrics.mean_ece_over_iou,
    "aurc": metrics.aurc,
    "e_aurc": metrics.e_aurc,
    "auroc": metrics.auroc,
    "aupr_error": metrics.aupr_error,
    "fpr_at_tpr": metrics.fpr_at_tpr,
    "adaptive_ece": metrics.adaptive_ece,
    **{f"coverage@{r:g}": partial(metrics.coverage_at_risk, risk=r) for r in RISKS},
    **{
        f"achieved_coverage@{r:g}": lambda c, y, t=t: metrics.at_threshold(c, y, t).coverage
        for r, t in THRESHOLDS.items()
    },
    **{f"achieved_risk@{r:g}": lambda c, y, t=t: metrics.at_threshold(c, y, t).risk for r, t in THRESHOLDS.items()},
    **{f"phi@{k:g}": partial(metrics.effective_reliability, cost=k, threshold=t) for k, t in GAINS.items()},
}


def records(n=400, clusters=80, seed=0, decimals=None, soft=False):
    rng = np.random.default_rng(seed)
    confidence = rng.beta(3, 1.2, n)
    if decimals is not None:
        confidence = np.round(confidence, decimals)
    outcome = rng.random(n) if soft else (rng.random(n) < confidence**1.5).astype(float)
    return confidence, outcome, Clusters(rng.integers(0, clusters, n), clusters)


def statistics(confidence, outcome, clusters):
    arrays = confidence, outcome, clusters
    gains = Gains(*arrays, at_risk=THRESHOLDS, at_cost=GAINS)
    return [Binned(*arrays), Smooth(*arrays), Localised(*arrays), Ranked(*arrays), gains]


def counted(arrays, counts):
    """Every metric by name, from counts."""
    found = {}
    for statistic in statistics(*arrays):
        found |= dict(zip(statistic.names, statistic(counts[None].astype(float))[0], strict=True))
    return found


def repeated(arrays, counts):
    """Every metric by name, from records repeated as often as their cluster counts."""
    confidence, outcome, clusters = arrays
    times = counts[clusters.index]
    c, y = np.repeat(confidence, times), np.repeat(outcome, times)
    return {name: metric(c, y) for name, metric in PLAIN.items()}


@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
@pytest.mark.parametrize("decimals", [None, 1, 0], ids=["distinct", "ties", "zeros and ones"])
@pytest.mark.parametrize("drawn", ["once", "resampled", "few clusters"])
def test_counted_metrics_are_those_of_repeated_records(drawn, decimals, soft):
    arrays = records(decimals=decimals, soft=soft)
    rng = np.random.default_rng(1)
    counts = {
        "once": np.ones(80, dtype=int),
        "resampled": np.bincount(rng.integers(0, 80, 80), minlength=80),
        "few clusters": np.where(rng.random(80) < 0.05, 3, 0),
    }[drawn]
    assert counted(arrays, counts) == pytest.approx(repeated(arrays, counts), abs=1e-9, nan_ok=True)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.51, 1.0]), st.sampled_from([0.0, 0.3, 1.0])), min_size=1),
    st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any),
)
def test_counted_metrics_on_degenerate_records(pairs, counts):
    confidence, outcome = map(np.array, zip(*pairs, strict=True))
    arrays = confidence, outcome, Clusters(np.arange(len(pairs)) % 3, 3)
    counts = np.array(counts)
    if not counts[arrays[2].index].any():
        assert all(np.isnan(value) for value in counted(arrays, counts).values())
        return
    assert counted(arrays, counts) == pytest.approx(repeated(arrays, counts), abs=1e-9, nan_ok=True)


def test_means_are_weighted_means():
    _, outcome, clusters = records()
    counts = np.random.default_rng(0).integers(0, 4, (5, 80)).astype(float)
    statistic = Means({"accuracy": outcome, "half": np.full(400, 0.5)}, clusters)
    for row, (accuracy, half) in zip(counts, statistic(counts), strict=True):
        assert accuracy == pytest.approx(np.average(outcome, weights=row[clusters.index]))
        assert half == pytest.approx(0.5)
    assert np.isnan(statistic(np.zeros((1, 80)))).all()


def test_counts_beyond_a_byte():
    arrays = records(decimals=1)
    for often in (300, 70_000):
        counts = np.zeros(80, dtype=int)
        counts[:2] = often, 1
        assert counted(arrays, counts) == pytest.approx(repeated(arrays, counts), abs=1e-9, nan_ok=True)


def test_ranked_metrics_take_whole_counts_only():
    arrays = records()
    for counts in (np.full((1, 80), 0.5), np.full((1, 80), -1.0), np.full((1, 80), np.nan)):
        with pytest.raises(ValueError, match="whole counts"):
            Ranked(*arrays)(counts)


@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
def test_result_is_the_same_whatever_the_number_of_threads(soft):
    arrays = records(soft=soft, decimals=2)
    one, several = (bootstrap(statistics(*arrays), 80, resamples=100, workers=workers) for workers in (1, 5))
    for first, second in zip(one, several, strict=True):
        np.testing.assert_array_equal(first.resampled, second.resampled)


@pytest.mark.parametrize("names", [("ece", "brier"), ("nll", "mce"), ("brier_within_bin",), tuple(OF_BINS)[::-1]])
def test_some_of_the_metrics_over_bins_are_as_among_all(names):
    arrays = records(soft=True)
    (whole,), (some,) = (bootstrap([one], 80, resamples=40) for one in (Binned(*arrays), Binned(*arrays, names=names)))
    assert some.names == names
    for name in names:
        (value, resampled), (same, others) = some.of(name), whole.of(name)
        assert value == same
        np.testing.assert_array_equal(resampled, others)


@pytest.mark.parametrize("at_once", [1, 3000])
@pytest.mark.parametrize("names", [("auroc",), ("coverage@0.05", "aurc"), ("adaptive_ece", "e_aurc")])
@pytest.mark.parametrize("soft", [False, True])
def test_some_of_the_ranked_metrics_are_as_among_all(soft, names, at_once, monkeypatch):
    arrays = records(soft=soft, decimals=2)
    (whole,) = bootstrap([Ranked(*arrays)], 80, resamples=40)
    # However many resamples are evaluated together.
    monkeypatch.setattr(ranked, "NUMBERS_AT_ONCE", at_once)
    (some,) = bootstrap([Ranked(*arrays, names)], 80, resamples=40)
    for name in names:
        (value, resampled), (same, others) = some.of(name), whole.of(name)
        assert value == same
        np.testing.assert_array_equal(resampled, others)


def test_result_depends_on_the_seed_alone():
    arrays = records()
    alone = bootstrap([Ranked(*arrays)], 80, resamples=70)[0]
    among, other = bootstrap([Ranked(*arrays), Binned(*arrays)], 80, resamples=70, workers=3)
    np.testing.assert_array_equal(alone.resampled, among.resampled)
    assert not np.array_equal(alone.resampled, bootstrap([Ranked(*arrays)], 80, resamples=70, seed=1)[0].resampled)
    # The first resamples do not depend on how many follow.
    np.testing.assert_allclose(bootstrap([Binned(*arrays)], 80, resamples=9)[0].resampled, other.resampled[:9])


def test_counted_and_repeated_resamples_agree():
    confidence, outcome, clusters = records(decimals=2)
    exact = ResampledMetric(metrics.aurc, (confidence, outcome), clusters)
    fast, slow = bootstrap([Ranked(confidence, outcome, clusters, ["aurc"]), exact], 80, resamples=30)
    np.testing.assert_allclose(fast.resampled, slow.resampled, atol=1e-12)
    assert fast.value == pytest.approx(slow.value)


@pytest.mark.parametrize("size", [2, 7, 41, 5000, 6001])
def test_the_mean_of_scores_of_any_range_is_that_of_the_drawn_clusters(size):
    scores = np.random.default_rng(size).normal(3.0, 5.0, size)
    (drawn,) = bootstrap([ClusterMean(scores)], size, resamples=40, seed=4)
    expected = [draw(size, 4, number) @ scores / size for number in range(40)]
    # Equal to the last digit, however many resamples are evaluated at once.
    assert drawn.resampled[:, 0].tolist() == expected
    assert drawn.of("mean")[0] == pytest.approx(scores.mean())


def test_spread_of_a_mean_is_its_clustered_standard_error():
    """The bootstrap variance of a ratio is its delta-method (sandwich) variance, up to 1/G."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 300)
    clusters = Clusters(np.repeat(np.arange(300), sizes), 300)
    outcome = np.clip(np.repeat(rng.random(300), sizes) + 0.1 * rng.standard_normal(sizes.sum()), 0, 1)
    draws = bootstrap([Means({"mean": outcome}, clusters)], 300, resamples=2000)[0]
    residuals = np.bincount(clusters.index, weights=outcome - outcome.mean())
    sandwich = np.sqrt(np.sum(residuals**2)) / outcome.size
    assert draws.resampled.std() == pytest.approx(sandwich, rel=0.06)
    # Taking records for independent would understate it about by half.
    assert outcome.std() / np.sqrt(outcome.size) < 0.6 * sandwich


def simulated(rng, images=150, gap=0.12):
    """Overconfident records in images that are easy or hard as a whole, so that records of one are dependent."""
    sizes = rng.integers(1, 8, images)
    clusters = Clusters(np.repeat(np.arange(images), sizes), images)
    confidence = np.clip(np.repeat(rng.beta(4, 2, images), sizes) + rng.uniform(-0.1, 0.1, sizes.sum()), 0.15, 0.98)
    easy = np.repeat(np.where(rng.random(images) < 0.5, 0.12, -0.12), sizes)
    outcome = (rng.random(sizes.sum()) < np.clip(confidence - gap + easy, 0, 1)).astype(float)
    return confidence, outcome, clusters


def coverage(statistic, name, gap, methods, trials=120):
    """Share of 90 % intervals that hold the value on very many images, by method."""
    truth_of = simulated(np.random.default_rng(123), images=60_000, gap=gap)
    truth = statistic(*truth_of)(np.ones((1, 60_000)))[0][statistic(*truth_of).names.index(name)]
    rng, held = np.random.default_rng(5), dict.fromkeys(methods, 0)
    for _ in range(trials):
        arrays = simulated(rng, gap=gap)
        value, resampled = bootstrap([statistic(*arrays)], arrays[2].count, resamples=150)[0].of(name)
        for method in methods:
            low, high = interval(value, resampled, level=0.9, method=method)
            held[method] += low <= truth <= high
    return {method: count / trials for method, count in held.items()}


@pytest.mark.parametrize(
    ("statistic", "name"),
    [
        (lambda c, y, g: Means({"accuracy": y}, g), "accuracy"),
        (Binned, "brier"),
        (lambda c, y, g: Ranked(c, y, g, ["aurc"]), "aurc"),
    ],
    ids=["accuracy", "brier", "aurc"],
)
def test_intervals_cover_the_truth_about_as_often_as_they_say(statistic, name):
    # Three standard errors of a share of 0.9 in 120 trials are 0.08.
    assert 0.82 <= coverage(statistic, name, 0.12, ["percentile"])["percentile"] <= 0.98


def test_basic_interval_repairs_what_resampling_does_to_calibration_errors():
    found = coverage(Binned, "ece", 0.05, ["percentile", "basic"])
    assert found["percentile"] < 0.5
    assert found["basic"] > 0.7


def test_interval_and_p_value_of_known_resamples():
    resampled = np.arange(1, 1001) / 1000
    low, high = interval(0.5, resampled, level=0.9)
    assert (low, high) == pytest.approx((0.05095, 0.95005))
    assert interval(0.5, resampled, level=0.9, method="basic") == pytest.approx((1 - high, 1 - low))
    assert interval(0.6, resampled, level=0.9, method="centred") == pytest.approx((low + 0.0995, high + 0.0995))
    assert p_value(0.5, resampled) == pytest.approx(2 / 1001)
    assert p_value(0.5, resampled - 0.5) == pytest.approx(1.0)
    assert p_value(0.5, resampled - 0.1) == pytest.approx(2 * 101 / 1001)
    assert p_value(0.5, resampled, least=0.25) == 0.25
    assert p_value(0.5, resampled, least=1e-9) == pytest.approx(2 / 1001)


@pytest.mark.parametrize("size", [1, 2, 7, 200])
@pytest.mark.parametrize("level", [0.0, 0.5, 0.95, 1.0])
def test_ends_of_intervals_are_quantiles(size, level):
    resampled = np.random.default_rng(size).normal(size=size).astype(np.float32)
    expected = np.quantile(resampled.astype(np.float64), [(1 - level) / 2, (1 + level) / 2])
    assert interval(0.5, resampled, level=level) == pytest.approx(tuple(expected), abs=1e-7)


def test_undefined_resamples_are_left_out_up_to_one_percent():
    resampled = np.linspace(0, 1, 1000)
    few, many = resampled.copy(), resampled.copy()
    few[:10], many[:11] = np.nan, np.nan
    assert not np.isnan(interval(0.5, few)).any()
    assert np.isnan(interval(0.5, many)).all()
    assert np.isnan(p_value(0.5, many))
    assert np.isnan(interval(np.nan, resampled)).all()


@pytest.mark.parametrize("method", ["percentile", "basic", "centred"])
def test_without_resamples_nothing_is_known_of_the_spread(method):
    assert np.isnan(interval(0.5, np.empty(0), method=method)).all()
    assert np.isnan(p_value(0.5, np.empty(0), method=method))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap([], 1), "at least 2 clusters"),
        (lambda: bootstrap([], 5, resamples=0), "resamples"),
        (lambda: bootstrap([], 5, workers=0), "workers"),
        (lambda: interval(0.5, np.ones(10), level=95), "level"),
        (lambda: ClusterMean([1.0, np.inf]), "finite"),
        (lambda: ClusterMean([[1.0, 2.0]]), "finite"),
        (lambda: Ranked([0.5, np.nan], [1, 1], Clusters.of(["a", "b"])), "confidence"),
    ],
    ids=["one cluster", "no resamples", "no workers", "percent", "infinite", "two dimensions", "nan"],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_clusters_of_labels():
    clusters = Clusters.of(["b", "a", "b"])
    assert clusters.index.tolist() == [1, 0, 1]
    assert clusters.count == 2


def test_more_resamples_than_anyone_can_wait_for_are_refused():
    made = (
        lambda count: bootstrap([], 6, resamples=count),
        lambda count: measure.MeasurementSettings(resamples=count),
        lambda count: component_importance.analyse(None, resamples=count),
        lambda count: analyses.question(
            {"kind": "against_reference", "question": "q", "metrics": ["ece"], "resamples": count}
        ),
    )
    for make in made:
        for count in (10**14, 1_000_001, 0, -1):
            with pytest.raises(ValueError, match="resamples"):
                make(count)
