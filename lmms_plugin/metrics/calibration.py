"""Calibration: does a confidence of 0.8 mean right in 80 % of cases?

Every function takes `confidence` and `outcome`, both of shape (n,) with values in [0, 1]. An outcome is 1 for right
and 0 for wrong, or anything between for a soft target (VQA accuracy, IoU). All raise ValueError if the two differ in
length, are empty, are not one-dimensional, or hold NaN or a value outside [0, 1].

Bins are half-open, (lower, upper], with edges k / n_bins; a confidence of exactly 0 belongs to the first bin and one of
exactly 1 to the last, so every record is in exactly one bin.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.fft import dct, idct

from lmms_plugin.metrics._inputs import Floats, fractions, paired, positive_int
from lmms_plugin.metrics._ties import Ties, ties

DEFAULT_BINS = 15
"""Bins of a calibration error unless told otherwise (Guo et al., ICML 2017)."""

SMOOTHING_CELLS = 8192
"""Cells of the grid on [0, 1] on which `smooth_ece` smooths residuals."""

_SMOOTHING_TOLERANCE = 2.0**-40
"""How close `smooth_ece` comes to the bandwidth that equals its error."""

_INAUDIBLE = 10.0
"""Product of bandwidth and frequency from which smoothing leaves less than exp(-50) of a cosine."""

_FLOOR_CELL = 1e-3
"""Confidences of one bin closer together than this are simulated with their mean by `ece_floor`."""


class Bins(NamedTuple):
    """The non-empty bins of a reliability diagram, in ascending order of confidence. All arrays have shape (bins,).

    Attributes:
        records: How many records each bin holds, as float64.
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
        """Share of the records that each bin holds."""
        return self.records / float(self.records.sum())


class BrierParts(NamedTuple):
    """Terms of the Brier score: brier = reliability − resolution + uncertainty + within_bin, exactly.

    Attributes:
        reliability: Mean squared gap between confidence and outcome of a bin; 0 is calibrated.
        resolution: Variance of the mean outcome over bins; larger tells right from wrong better.
        uncertainty: Variance of the outcome: the score of always answering with the overall mean.
        within_bin: What binning hides: variance of confidence inside bins − 2 × its covariance with the outcome there;
            negative where confidence still ranks the answers of one bin.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float


class EceFloor(NamedTuple):
    """ECE that a perfectly calibrated model with the same confidences gets by chance.

    Attributes:
        mean: Its expectation.
        p95: Its 95th percentile; a measured ECE below this does not show miscalibration.
    """

    mean: float
    p95: float


def reliability_bins(
    confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS, *, equal_mass: bool = False
) -> Bins:
    """Non-empty bins of a reliability diagram.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        n_bins: How many bins, at least 1.
        equal_mass: False for bins of equal width. True for bins of equal numbers of records, in which records of equal
            confidence are never separated: each block of them goes to the bin of its middle rank, so bins are as equal
            as the ties allow, some may be empty, and the order of the records does not matter.
    """
    c, y = paired(confidence, outcome)
    n_bins = positive_int("n_bins", n_bins)
    if not equal_mass:
        return _bin_means(equal_width_index(c, n_bins), np.ones_like(c), c, y)
    blocks = ties(c, y)
    return _bin_means(_equal_mass(blocks, n_bins), blocks.records, blocks.confidence * blocks.records, blocks.outcome)


def ece(confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS) -> float:
    """Expected calibration error with bins of equal width: Σ_b (n_b / n) · |mean confidence − mean outcome|.

    Naeini et al., AAAI 2015; Guo et al., ICML 2017. In [0, 1], 0 is calibrated. Biased upwards: print `ece_floor`
    beside it.
    """
    bins = reliability_bins(confidence, outcome, n_bins)
    return float(bins.weight @ np.abs(bins.gap))


def adaptive_ece(confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS) -> float:
    """Expected calibration error with bins of equal mass, in [0, 1].

    Nguyen & O'Connor, EMNLP 2015. Equal confidences are never split between bins (see `reliability_bins`).
    """
    bins = reliability_bins(confidence, outcome, n_bins, equal_mass=True)
    return float(bins.weight @ np.abs(bins.gap))


def mce(confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS, *, min_count: int = 1) -> float:
    """Maximum calibration error: the largest gap of any equal-width bin that holds at least `min_count` records.

    Naeini et al., AAAI 2015. In [0, 1]; NaN if no bin holds that many.
    """
    bins = reliability_bins(confidence, outcome, n_bins)
    counted = np.abs(bins.gap)[bins.records >= positive_int("min_count", min_count)]
    return float(counted.max()) if counted.size else float("nan")


def squared_ce(confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS) -> float:
    """Debiased squared calibration error: an estimate of Σ_b (n_b / n) · gap_b² that does not grow as n shrinks.

    From each squared gap its own sampling variance is subtracted (Kumar et al., NeurIPS 2019, there for confidences
    constant within a bin). Equal-width bins; the variance of a bin with a single record is unknown, so such bins are
    left out of the sum.

    Returns:
        A value in [−1, 1], about 0 for a calibrated model and then negative about half of the time; NaN if no bin holds
        two records.
    """
    c, y = paired(confidence, outcome)
    index = equal_width_index(c, positive_int("n_bins", n_bins))
    count = np.bincount(index).astype(np.float64)
    mean = np.bincount(index, weights=c - y) / np.maximum(count, 1)
    squares = np.bincount(index, weights=(c - y - mean[index]) ** 2)
    enough = count >= 2
    if not enough.any():
        return float("nan")
    count, mean, squares = count[enough], mean[enough], squares[enough]
    return float(count @ (mean**2 - squares / (count - 1) / count) / c.size)


def brier(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Brier score, the mean of (confidence − outcome)², in [0, 1]; lower is better (Brier 1950)."""
    c, y = paired(confidence, outcome)
    residual = c - y
    return float(residual @ residual / c.size)


def brier_parts(confidence: npt.ArrayLike, outcome: npt.ArrayLike, n_bins: int = DEFAULT_BINS) -> BrierParts:
    """Reliability, resolution and uncertainty of the Brier score over equal-width bins.

    Murphy 1973, with the within-bin term of Stephenson et al. 2008 that makes the sum exact for any confidences; it is
    0 when the confidences of each bin are equal.
    """
    c, y = paired(confidence, outcome)
    bins = reliability_bins(c, y, n_bins)
    reliability = float(bins.weight @ bins.gap**2)
    resolution = float(bins.weight @ (bins.outcome - y.mean()) ** 2)
    uncertainty = float(y.var())
    return BrierParts(reliability, resolution, uncertainty, brier(c, y) - reliability + resolution - uncertainty)


def nll(confidence: npt.ArrayLike, outcome: npt.ArrayLike, *, clip: float = 1e-6) -> float:
    """Negative log-likelihood in nats: the mean of −outcome·ln(confidence) − (1 − outcome)·ln(1 − confidence).

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1]; a soft outcome gives the cross-entropy.
        clip: Confidences are moved into [clip, 1 − clip] first, so that one certain and wrong answer costs −ln(clip),
            not ∞.

    Raises:
        ValueError: Also if `clip` is not in (0, 0.5).
    """
    if not 0.0 < clip < 0.5:
        raise ValueError(f"expected clip in (0, 0.5), got {clip}")
    c, y = paired(confidence, outcome)
    c = np.clip(c, clip, 1.0 - clip)
    return float(-np.mean(y * np.log(c) + (1.0 - y) * np.log1p(-c)))


def smooth_ece(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Smooth ECE, the calibration error without bins, in [0, 1] (Błasiok & Nakkiran, ICLR 2024).

    smECE_σ = ∫₀¹ |mean_i (c_i − y_i) · K_σ(c_i, t)| dt with K_σ a Gaussian reflected at 0 and 1; it falls as σ grows,
    and the result is the one σ with smECE_σ = σ. Reflected Gaussian smoothing is diffusion between closed walls, so it
    is exact in the cosine basis: residuals are put on a grid of 8,192 cells once and each σ costs one Fourier
    transform.
    """
    c, y = paired(confidence, outcome)
    cells, shares = smoothing_cells(c)
    mass = np.bincount(cells.ravel(), weights=(shares * (c - y)).ravel(), minlength=SMOOTHING_CELLS)
    return smooth_error(mass / c.size)


def smooth_error(mass: Floats) -> float:
    """The σ at which smECE_σ = σ, for residuals already summed onto the grid.

    Args:
        mass: Shape (SMOOTHING_CELLS,): Σ (confidence − outcome) / n of what each cell holds (`smoothing_cells`).
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
    """ECE of a perfectly calibrated model with these confidences: what the finite number of records alone produces.

    Outcomes are drawn as Bernoulli(confidence) `simulations` times. Records of one bin whose confidences fall into the
    same thousandth are drawn together as a binomial with their mean, which changes the spread by less than 0.1 % and
    makes the cost independent of n after sorting.

    Args:
        confidence: Shape (n,), in [0, 1].
        n_bins: How many bins, at least 1.
        equal_mass: False for the floor of `ece`, True for that of `adaptive_ece`.
        simulations: How many sets of outcomes are drawn.
        seed: Seed of the draws; equal seeds give equal results.
    """
    c = fractions("confidence", confidence)
    n_bins = positive_int("n_bins", n_bins)
    blocks = ties(c, np.zeros_like(c))
    bins = _equal_mass(blocks, n_bins) if equal_mass else equal_width_index(blocks.confidence, n_bins)
    starts = _change_points(bins, (blocks.confidence / _FLOOR_CELL).astype(np.int64))
    count = np.add.reduceat(blocks.records, starts)
    mean = np.minimum(np.add.reduceat(blocks.records * blocks.confidence, starts) / count, 1.0)

    rng = np.random.default_rng(seed)
    draws = (count.size, positive_int("simulations", simulations))
    right = rng.binomial(count.astype(np.int64)[:, None], mean[:, None], size=draws)
    excess = np.add.reduceat(right - (count * mean)[:, None], _change_points(bins[starts]), axis=0)
    errors = np.abs(excess).sum(axis=0) / c.size
    return EceFloor(float(errors.mean()), float(np.quantile(errors, 0.95)))


def equal_width_index(confidence: Floats, n_bins: int) -> npt.NDArray[np.intp]:
    """Index of the equal-width bin of each checked confidence, shape (n,)."""
    # k / n_bins is the double nearest to the edge, as a confidence written in decimals is; linspace can miss it by one.
    edges = np.arange(n_bins + 1) / n_bins
    edges[0] = -1.0
    index = np.clip(np.ceil(confidence * n_bins).astype(np.intp) - 1, 0, n_bins - 1)
    # The product above rounds and may carry a value over an edge: compare with the edges themselves.
    index -= confidence <= edges[index]
    index += confidence > edges[index + 1]
    return index


def _equal_mass(blocks: Ties, n_bins: int) -> npt.NDArray[np.intp]:
    last = np.cumsum(blocks.records) - 1
    twice_middle_rank = (2 * last - blocks.records + 1).astype(np.int64)
    return (twice_middle_rank * n_bins // int(2 * blocks.records.sum())).astype(np.intp)


def _bin_means(index: npt.NDArray[np.intp], records: Floats, confidence: Floats, outcome: Floats) -> Bins:
    totals = np.bincount(index, weights=records).astype(np.float64)
    used = totals > 0
    means = (np.bincount(index, weights=values)[used] / totals[used] for values in (confidence, outcome))
    return Bins(totals[used], *means)


def _change_points(*keys: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    changed = np.logical_or.reduce([np.diff(key) != 0 for key in keys])
    return np.flatnonzero(np.concatenate(([True], changed)))


def smoothing_cells(confidence: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    """The two grid cells that share each record's residual, and their shares; both of shape (2, n)."""
    position = np.clip(confidence * SMOOTHING_CELLS - 0.5, 0.0, SMOOTHING_CELLS - 1.0)
    left = np.minimum(position.astype(np.intp), SMOOTHING_CELLS - 2)
    share = position - left
    return np.stack((left, left + 1)), np.stack((1.0 - share, share))
