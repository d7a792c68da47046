"""Calibration: whether a confidence of 0.8 means right in 80 % of cases.

Every function takes `confidence` and `outcome`, both of shape (n,) with values in [0, 1]. An outcome is 1 for right
and 0 for wrong, or anything between for a soft target (VQA accuracy, IoU). All raise ValueError if the two differ in
length, are empty, are not one-dimensional, or hold NaN or a value outside [0, 1].

Bins are those of `lmms_plugin.metrics.bins`. `Binned` and `Smooth` are the metrics as functions of how often each
cluster of records counts; the others are the same metrics on the plain records.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.fft import dct, idct

from lmms_plugin.metrics import ranked
from lmms_plugin.metrics._inputs import Floats, fractions, paired, positive_int
from lmms_plugin.metrics.bins import DEFAULT_BINS, equal_mass_index, equal_width_index, ties
from lmms_plugin.metrics.bootstrap import Clusters
from lmms_plugin.metrics.sums import Sums, plain

SMOOTHING_CELLS = 8192
"""Number of cells of the grid on [0, 1] on which `smooth_ece` smooths residuals."""

_CLIP = 1e-6
"""Default distance from 0 and 1 at which `nll` clips confidences."""

_SMOOTHING_TOLERANCE = 2.0**-40
"""Tolerance of `smooth_ece` for the bandwidth that equals its error."""

_INAUDIBLE = 10.0
"""Product of bandwidth and frequency from which smoothing leaves less than exp(-50) of a cosine."""

_FLOOR_CELL = 1e-3
"""Distance below which `ece_floor` simulates confidences of one bin with their mean."""


class Bins(NamedTuple):
    """The non-empty bins of a reliability diagram, in ascending order of confidence. All arrays have shape (bins,).

    Attributes:
        records: Number of records of each bin, as float64.
        confidence: Mean confidence of the bin.
        outcome: Mean outcome of the bin.
    """

    records: Floats
    confidence: Floats
    outcome: Floats

    @property
    def gap(self) -> Floats:
        """Mean confidence − mean outcome; positive where the model is overconfident."""
        return self.confidence - self.outcome

    @property
    def weight(self) -> Floats:
        """Share of the records in each bin."""
        return self.records / float(self.records.sum())


class BrierParts(NamedTuple):
    """Terms of the Brier score: brier = reliability − resolution + uncertainty + within_bin, exactly.

    Attributes:
        reliability: Mean squared gap between confidence and outcome of a bin; 0 is calibrated.
        resolution: Variance of the mean outcome over bins; larger separates right from wrong better.
        uncertainty: Variance of the outcome: the score of always answering with the overall mean.
        within_bin: Effect of binning: variance of confidence inside bins − 2 × its covariance with the outcome there;
            negative where confidence still ranks the answers of one bin.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float


class EceFloor(NamedTuple):
    """ECE that a perfectly calibrated model with the same confidences gets by chance.

    Attributes:
        mean: Expectation.
        p95: 95th percentile; a measured ECE below this does not show miscalibration.
    """

    mean: float
    p95: float


def reliability_bins(
    confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS, *, equal_mass: bool = False
) -> Bins:
    """Return the non-empty bins of a reliability diagram.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        n_bins: Number of bins, at least 1.
        equal_mass: False for bins of equal width. True for bins of equal numbers of records, in which records of equal
            confidence are never separated: each block of them goes to the bin of its middle rank, so bins are as equal
            as the ties allow, some may be empty, and the order of the records does not matter.
    """
    c, y = paired(confidence, outcome)
    n_bins = positive_int("n_bins", n_bins)
    if not equal_mass:
        binned = Binned(c, y, Clusters.one(c.size), n_bins)
        return _filled(*binned.sums(np.ones((1, 1)))[:3, 0])
    blocks = ties(c, y)
    index = equal_mass_index(blocks.records, n_bins)
    values = blocks.records, blocks.confidence * blocks.records, blocks.outcome
    return _filled(*(np.bincount(index, weights=value).astype(np.float64) for value in values))


def ece(confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS) -> float:
    """Expected calibration error with bins of equal width: Σ_b (n_b / n) · |mean confidence − mean outcome|.

    Naeini et al., AAAI 2015; Guo et al., ICML 2017. In [0, 1], 0 is calibrated. Biased upwards: print `ece_floor`
    beside it.
    """
    return _binned(confidence, outcome, n_bins)["ece"]


def adaptive_ece(confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS) -> float:
    """Expected calibration error with bins of equal mass, in [0, 1].

    Nguyen & O'Connor, EMNLP 2015. Equal confidences are never split between bins (see `reliability_bins`).
    """
    return ranked.plain(partial(ranked.adaptive_ece, n_bins=positive_int("n_bins", n_bins)), confidence, outcome)


def mce(confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS, *, min_count: int = 1) -> float:
    """Maximum calibration error: the largest gap of any equal-width bin that holds at least `min_count` records.

    Naeini et al., AAAI 2015. In [0, 1]; NaN if no bin holds that many.
    """
    return _binned(confidence, outcome, n_bins, min_count=min_count)["mce"]


def squared_ce(confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS) -> float:
    """Debiased squared calibration error: an estimate of Σ_b (n_b / n) · gap_b² that does not grow as n shrinks.

    From each squared gap its own sampling variance is subtracted (Kumar et al., NeurIPS 2019, there for confidences
    constant within a bin). Equal-width bins; the variance of a bin with a single record is unknown, so such bins are
    left out of the sum.

    Returns:
        A value in [−1, 1], about 0 for a calibrated model and then negative about half of the time; NaN if no bin holds
        two records.
    """
    return _binned(confidence, outcome, n_bins)["squared_ce"]


def brier(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Brier score, the mean of (confidence − outcome)², in [0, 1]; lower is better (Brier 1950)."""
    return _binned(confidence, outcome)["brier"]


def brier_parts(confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS) -> BrierParts:
    """Reliability, resolution and uncertainty of the Brier score over equal-width bins.

    Murphy 1973, with the within-bin term of Stephenson et al. 2008 that makes the sum exact for any confidences; it is
    0 when the confidences of each bin are equal.
    """
    found = _binned(confidence, outcome, n_bins)
    return BrierParts(*(found[f"brier_{name}"] for name in BrierParts._fields))


def nll(confidence: npt.ArrayLike, outcome: npt.ArrayLike, *, clip: float = _CLIP) -> float:
    """Negative log-likelihood in nats: the mean of −outcome·ln(confidence) − (1 − outcome)·ln(1 − confidence).

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1]; a soft outcome gives the cross-entropy.
        clip: Confidences are moved into [clip, 1 − clip] first, so that one certain and wrong answer costs −ln(clip),
            not ∞.

    Raises:
        ValueError: Also if `clip` is not in (0, 0.5).
    """
    return _binned(confidence, outcome, clip=clip)["nll"]


def smooth_ece(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Smooth ECE, the calibration error without bins, in [0, 1] (Błasiok & Nakkiran, ICLR 2024).

    smECE_σ = ∫₀¹ |mean_i (c_i − y_i) · K_σ(c_i, t)| dt with K_σ a Gaussian reflected at 0 and 1; it falls as σ grows,
    and the result is the one σ with smECE_σ = σ. Reflected Gaussian smoothing is diffusion between closed walls, so it
    is exact in the cosine basis: residuals are put on a grid of 8,192 cells once and each σ costs one Fourier
    transform.
    """
    c, y = paired(confidence, outcome)
    return plain(Smooth(c, y, Clusters.one(c.size)))["smooth_ece"]


def _smooth_error(mass: Floats) -> float:
    """Return the σ at which smECE_σ = σ, for residuals already summed onto the grid.

    Args:
        mass: Σ (confidence − outcome) / n over each cell of the grid (`_smoothing_cells`), shape (SMOOTHING_CELLS,).
    """
    spectrum = dct(mass * SMOOTHING_CELLS)
    squared_frequency = (np.pi * np.arange(spectrum.size)) ** 2

    def smoothed_error(sigma: float) -> float:
        heard = int(_INAUDIBLE / (np.pi * sigma)) + 1
        density = idct(spectrum[:heard] * np.exp(-0.5 * sigma**2 * squared_frequency[:heard]), n=spectrum.size)
        return float(np.abs(density).mean())

    # Smoothing never makes the error larger, so error − σ falls at least as fast as σ rises: where it is within a
    # tolerance of 0, σ is within that tolerance of the solution. False position with the Illinois weights.
    low, high = 0.0, 1.0
    above, below = float(np.abs(mass).sum()), smoothed_error(high) - high
    sigma, excess = low, above
    while abs(excess) > _SMOOTHING_TOLERANCE:
        sigma = (low * below - high * above) / (below - above)
        last, excess = excess, smoothed_error(sigma) - sigma
        if excess > 0.0:
            low, above = sigma, excess
            below = below / 2 if last > 0.0 else below
        else:
            high, below = sigma, excess
            above = above / 2 if last <= 0.0 else above
    return sigma


def ece_floor(
    confidence: npt.ArrayLike,
    n_bins: int = DEFAULT_BINS,
    *,
    equal_mass: bool = False,
    simulations: int = 1000,
    seed: int = 0,
) -> EceFloor:
    """Simulate the ECE of a perfectly calibrated model with these confidences, the effect of finite data alone.

    Outcomes are drawn as Bernoulli(confidence) `simulations` times. Records of one bin whose confidences fall into the
    same thousandth are drawn together as a binomial with their mean, which changes the spread by less than 0.1 % and
    makes the cost independent of n after sorting.

    Args:
        confidence: Shape (n,), in [0, 1].
        n_bins: Number of bins, at least 1.
        equal_mass: False for the floor of `ece`, True for that of `adaptive_ece`.
        simulations: Number of sets of outcomes that are drawn.
        seed: Seed of the draws; equal seeds give equal results.
    """
    c = fractions("confidence", confidence)
    n_bins = positive_int("n_bins", n_bins)
    blocks = ties(c, np.zeros_like(c))
    bins = equal_mass_index(blocks.records, n_bins) if equal_mass else equal_width_index(blocks.confidence, n_bins)
    starts = _change_points(bins, (blocks.confidence / _FLOOR_CELL).astype(np.int64))
    count = np.add.reduceat(blocks.records, starts)
    mean = np.minimum(np.add.reduceat(blocks.records * blocks.confidence, starts) / count, 1.0)

    rng = np.random.default_rng(seed)
    draws = (count.size, positive_int("simulations", simulations))
    right = rng.binomial(count.astype(np.int64)[:, None], mean[:, None], size=draws)
    excess = np.add.reduceat(right - (count * mean)[:, None], _change_points(bins[starts]), axis=0)
    errors = np.abs(excess).sum(axis=0) / c.size
    return EceFloor(float(errors.mean()), float(np.quantile(errors, 0.95)))


class BinSums:
    """Records of some resamples by bin; arrays have shape (resamples, bins) unless stated otherwise.

    Attributes:
        records: Number of records.
        confidence: Sum of confidences.
        outcome: Sum of outcomes.
        square: Sum of (confidence − outcome)².
        scores: Sums of outcome² and of negative log-likelihoods over all records, shape (resamples, 2); empty where
            they are not needed.
        min_count: Minimum number of records of a bin that counts for MCE.
    """

    def __init__(self, sums: Floats, scores: Floats, min_count: int) -> None:
        self.records: Floats = sums[0]
        self.confidence: Floats = sums[1]
        self.outcome: Floats = sums[2]
        self.square: Floats = sums[3]
        self.scores, self.min_count = scores, min_count

    @cached_property
    def total(self) -> Floats:
        """Number of records, shape (resamples,)."""
        total: Floats = self.records.sum(axis=1)
        return total

    @cached_property
    def share(self) -> Floats:
        """Share of the records."""
        return self.records / self.total[:, None]

    @cached_property
    def filled(self) -> Floats:
        """Number of records, 1 where there are none."""
        return np.maximum(self.records, 1)

    @cached_property
    def gap(self) -> Floats:
        """Mean confidence − mean outcome."""
        return (self.confidence - self.outcome) / self.filled

    @cached_property
    def mean_outcome(self) -> Floats:
        """Mean outcome of all records, shape (resamples,)."""
        mean: Floats = self.outcome.sum(axis=1) / self.total
        return mean

    @cached_property
    def brier(self) -> Floats:
        """Brier score, shape (resamples,)."""
        score: Floats = self.square.sum(axis=1) / self.total
        return score

    @cached_property
    def reliability(self) -> Floats:
        """Mean squared gap, shape (resamples,)."""
        reliability: Floats = np.sum(self.share * self.gap**2, axis=1)
        return reliability

    @cached_property
    def resolution(self) -> Floats:
        """Variance of the mean outcome over bins, shape (resamples,)."""
        apart = self.outcome / self.filled - self.mean_outcome[:, None]
        resolution: Floats = np.sum(self.share * apart**2, axis=1)
        return resolution

    @cached_property
    def uncertainty(self) -> Floats:
        """Variance of the outcome, shape (resamples,)."""
        return self.scores[:, 0] / self.total - self.mean_outcome**2

    @property
    def within_bin(self) -> Floats:
        """Effect of binning on the Brier score, shape (resamples,)."""
        return self.brier - self.reliability + self.resolution - self.uncertainty

    @property
    def ece(self) -> Floats:
        """Mean absolute gap, shape (resamples,)."""
        error: Floats = np.sum(self.share * np.abs(self.gap), axis=1)
        return error

    @property
    def mce(self) -> Floats:
        """Largest gap of a bin with enough records, shape (resamples,)."""
        counted = self.records >= self.min_count
        largest = np.where(counted, np.abs(self.gap), 0.0).max(axis=1)
        return np.where(counted.any(axis=1), largest, np.nan)

    @property
    def squared_ce(self) -> Floats:
        """Debiased mean squared gap, shape (resamples,)."""
        variance = (self.square - self.records * self.gap**2) / np.maximum(self.records - 1, 1) / self.filled
        several = np.where(self.records >= 2, self.records, 0.0)
        found = np.sum(several * (self.gap**2 - variance), axis=1) / self.total
        return np.where(several.any(axis=1), found, np.nan)

    @property
    def nll(self) -> Floats:
        """Mean negative log-likelihood, shape (resamples,)."""
        return self.scores[:, 1] / self.total


OF_BINS: Mapping[str, Callable[[BinSums], Floats]] = MappingProxyType(
    {
        "ece": attrgetter("ece"),
        "mce": attrgetter("mce"),
        "squared_ce": attrgetter("squared_ce"),
        "brier": attrgetter("brier"),
        "brier_reliability": attrgetter("reliability"),
        "brier_resolution": attrgetter("resolution"),
        "brier_uncertainty": attrgetter("uncertainty"),
        "brier_within_bin": attrgetter("within_bin"),
        "nll": attrgetter("nll"),
    }
)
"""Name → metric over equal-width bins, or score that is a mean over records, one value for each resample."""
_OF_SCORES = frozenset(("brier_uncertainty", "brier_within_bin", "nll"))


class Binned:
    """Calibration metrics over equal-width bins, and scores that are means over records, as a `Statistic`.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        clusters: Clusters of the n records.
        n_bins: Number of bins of ECE, MCE and the parts of the Brier score, at least 1.
        min_count: Minimum number of records of a bin that counts for MCE, at least 1.
        clip: Confidences are moved into [clip, 1 − clip] for the log-likelihood; in (0, 0.5).
        names: Names of the metrics, of `OF_BINS`; all by default.

    Raises:
        ValueError: An array or number is invalid.
    """

    def __init__(
        self,
        confidence: npt.ArrayLike,
        outcome: npt.ArrayLike,
        clusters: Clusters,
        n_bins: int = DEFAULT_BINS,
        *,
        min_count: int = 1,
        clip: float = _CLIP,
        names: Sequence[str] = tuple(OF_BINS),
    ) -> None:
        if not 0.0 < clip < 0.5:
            raise ValueError(f"expected clip in (0, 0.5), got {clip}")
        self.names, self.present = tuple(names), clusters.present
        self._n_bins, self._min_count = positive_int("n_bins", n_bins), positive_int("min_count", min_count)
        c, y = paired(confidence, outcome)
        cells, one = equal_width_index(c, n_bins), np.ones_like(c)
        rows = (one, c, y, (c - y) ** 2)
        index = np.concatenate([cells + k * n_bins for k in range(len(rows))])
        self._bins = Sums(index, np.concatenate(rows), clusters.repeated(len(rows)), len(rows) * n_bins)
        self._scores: Sums | None = None
        if _OF_SCORES.intersection(names):
            p = np.clip(c, clip, 1.0 - clip)
            self._scores = Sums.stacked([y**2, -(y * np.log(p) + (1.0 - y) * np.log1p(-p))], clusters)

    def sums(self, counts: Floats) -> Floats:
        """Return records, and sums of confidence, outcome and squared residual, by bin; shape (4, resamples, bins)."""
        return np.moveaxis(self._bins(counts).reshape(len(counts), 4, self._n_bins), 1, 0)

    def __call__(self, counts: Floats) -> Floats:
        """Return the values of `names`, shape (resamples, names)."""
        scores = np.empty((len(counts), 0)) if self._scores is None else self._scores(counts)
        of = BinSums(self.sums(counts), scores, self._min_count)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.stack([OF_BINS[name](of) for name in self.names], axis=1)
            return np.where(of.total[:, None] > 0, values, np.nan)


class Smooth:
    """Smooth ECE as a `Statistic`.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        clusters: Clusters of the n records.
    """

    names = ("smooth_ece",)

    def __init__(self, confidence: npt.ArrayLike, outcome: npt.ArrayLike, clusters: Clusters) -> None:
        c, y = paired(confidence, outcome)
        cells, shares = _smoothing_cells(c)
        self._mass = Sums(cells.ravel(), (shares * (c - y)).ravel(), clusters.repeated(2), SMOOTHING_CELLS)
        self._records = Sums.stacked([np.ones_like(c)], clusters)

    def __call__(self, counts: Floats) -> Floats:
        """Return smooth ECE, shape (resamples, 1); NaN for a resample without records."""
        totals = self._records(counts)[:, 0]
        pairs = zip(self._mass(counts), totals, strict=True)
        return np.array([[_smooth_error(mass / total) if total else np.nan] for mass, total in pairs])


def _binned(
    confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS, **options: Any
) -> dict[str, float]:
    c, y = paired(confidence, outcome)
    return plain(Binned(c, y, Clusters.one(c.size), n_bins, **options))


def _filled(records: Floats, confidence: Floats, outcome: Floats) -> Bins:
    used = records > 0
    return Bins(records[used], confidence[used] / records[used], outcome[used] / records[used])


def _change_points(*keys: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    changed = np.logical_or.reduce([np.diff(key) != 0 for key in keys])
    return np.flatnonzero(np.concatenate(([True], changed)))


def _smoothing_cells(confidence: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    """Return the two grid cells that share each record's residual, and their shares; both of shape (2, n)."""
    position = np.clip(confidence * SMOOTHING_CELLS - 0.5, 0.0, SMOOTHING_CELLS - 1.0)
    left = np.minimum(position.astype(np.intp), SMOOTHING_CELLS - 2)
    share = position - left
    return np.stack((left, left + 1)), np.stack((1.0 - share, share))
