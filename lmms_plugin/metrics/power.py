"""Power of paired comparisons on clustered data: how small a difference a number of images shows, and the reverse.

The difference of two arms is a ratio, Σ over images of the sum of their documents' differences ÷ Σ of documents. Its
variance over m images is v ÷ m, with v of the linearized ratio (Cochran 1977, *Sampling Techniques*, 6.4). Where only
the variance σ² of one document and the correlation ρ within an image are known, v is σ² Σ n (1 + (n − 1) ρ) ÷ (m n̄²),
which is the variance of independent documents times the design effect 1 + (Σ n² ÷ Σ n − 1) ρ (Kish 1965, *Survey
Sampling*, 5.4).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import nct, norm
from scipy.stats import t as student

from lmms_plugin.metrics._inputs import Floats

POWER = 0.8
"""Probability of finding what is there, by which studies are planned."""


def design_effect(sizes: npt.ArrayLike, correlation: float) -> float:
    """Return how many times the variance of independent documents a mean over clusters has.

    Args:
        sizes: Number of documents of each image, shape (images,); a mean number stands for equal sizes.
        correlation: Correlation of two documents' differences within an image.

    Raises:
        ValueError: There is no document.
    """
    counts = _counts(sizes)
    return 1.0 + (float((counts**2).sum() / counts.sum()) - 1.0) * correlation


def expected_variance(variance: float, sizes: npt.ArrayLike, correlation: float) -> float:
    """Return the variance of one image's contribution, from that of one document; divided by images it is the error².

    Args:
        variance: Variance of a document's difference.
        sizes: As of `design_effect`.
        correlation: As of `design_effect`.
    """
    return variance * design_effect(sizes, correlation) / float(_counts(sizes).mean())


def measured_variance(sums: npt.ArrayLike, sizes: npt.ArrayLike) -> float:
    """Return the variance of one image's contribution to a difference, from images that were answered.

    Args:
        sums: Sum of the documents' differences of each image, shape (images,).
        sizes: Number of documents of each image, shape (images,).

    Returns:
        v of the module's docstring: (error of the difference)² times the number of images.

    Raises:
        ValueError: There are fewer than two images, or shapes differ.
    """
    values, counts = np.asarray(sums, dtype=np.float64), _counts(sizes)
    if values.shape != counts.shape or values.size < 2:
        raise ValueError(f"expected sums and sizes of two images or more, got {values.shape} and {counts.shape}")
    residual = values - values.sum() / counts.sum() * counts
    return float((residual**2).sum() / (values.size - 1) / counts.mean() ** 2)


def seed_variance(sums: npt.ArrayLike, sizes: npt.ArrayLike) -> float:
    """Return the variance of a difference between calibration seeds, without what chance in the images adds to it.

    Seeds and images are crossed and random: the mean square between seeds exceeds that of the interaction by images
    times the variance of seeds.

    Args:
        sums: Sum of the documents' differences of each image with each seed, shape (seeds, images).
        sizes: Number of documents of each image, shape (images,).

    Returns:
        Variance of one seed, at least 0.

    Raises:
        ValueError: There are fewer than two seeds or images, or shapes differ.
    """
    values, counts = np.asarray(sums, dtype=np.float64), _counts(sizes)
    if values.ndim != 2 or values.shape[1:] != counts.shape or min(values.shape) < 2:
        raise ValueError(f"expected sums of two seeds and images or more, got {values.shape} for {counts.shape} sizes")
    seeds, images = values.shape
    means = values.sum(axis=1) / counts.sum()
    residual = values - means[:, None] * counts
    residual = residual - residual.mean(axis=0)
    chance = (residual**2).sum() / ((seeds - 1) * (images - 1)) / counts.mean() ** 2 / images
    return max(0.0, float(means.var(ddof=1) - chance))


def power_of_difference(difference: float, error: float, *, level: float = 0.95, images: float = math.inf) -> float:
    """Return the probability that a two-sided test finds a true difference.

    Args:
        difference: True difference.
        error: Standard error of its estimate.
        level: 1 − error rate of the test.
        images: Number of images that the error is estimated from: a t test with one degree of freedom less; infinite
            for a z test.

    Raises:
        ValueError: The error is not above 0, or there are fewer than two images.
    """
    limit, shift = _limit((1.0 + level) / 2.0, images), abs(difference / _positive(error))
    if math.isinf(images):
        return float(norm.sf(limit - shift) + norm.cdf(-limit - shift))
    return _beyond(limit, images - 1.0, shift) + _beyond(limit, images - 1.0, -shift)


def power_of_equivalence(
    margin: float, error: float, *, difference: float = 0.0, level: float = 0.95, images: float = math.inf
) -> float:
    """Return the probability that two one-sided tests at 1 − level show a difference to lie within ±margin.

    With a finite number of images it is the approximation by two noncentral t distributions (Phillips 1990, J.
    Pharmacokinet. Biopharm. 18), exact for infinitely many.

    Args:
        margin: Largest absolute difference that counts as none.
        error: Standard error of the estimated difference.
        difference: True difference.
        level: 1 − error rate of each test.
        images: As of `power_of_difference`.

    Raises:
        ValueError: As of `power_of_difference`.
    """
    limit, scale = _limit(level, images), _positive(error)
    below, above = (margin - difference) / scale, (margin + difference) / scale
    if math.isinf(images):
        return max(0.0, float(norm.cdf(below - limit) - norm.cdf(limit - above)))
    return max(0.0, _beyond(limit, images - 1.0, below) + _beyond(limit, images - 1.0, above) - 1.0)


def smallest_difference(error: float, *, power: float = POWER, level: float = 0.95, images: float = math.inf) -> float:
    """Return the smallest true difference that a two-sided test finds with a probability.

    Args:
        error: Standard error of the estimated difference.
        power: Probability of finding it.
        level: As of `power_of_difference`.
        images: As of `power_of_difference`.

    Raises:
        ValueError: As of `power_of_difference`, or the power does not lie between 1 − level and 1.
    """
    if not 1.0 - level < power < 1.0:
        raise ValueError(f"expected a power between {1.0 - level:g} and 1, got {power}")
    most = 1.0
    while power_of_difference(most, 1.0, level=level, images=images) < power:
        most *= 2.0
    found = brentq(lambda one: power_of_difference(one, 1.0, level=level, images=images) - power, 0.0, most)
    return float(found) * _positive(error)


def images_needed(
    difference: float, variance: float, *, constant: float = 0.0, power: float = POWER, level: float = 0.95
) -> float:
    """Return the fewest images at which a two-sided t test finds a difference with a probability.

    Args:
        difference: True difference, above 0.
        variance: Variance of one image's contribution, as of `measured_variance`.
        constant: Part of the squared error that more images do not make less, such as that of seeds.
        power: Probability of finding it.
        level: As of `power_of_difference`.

    Returns:
        Number of images, at least 2; infinite where no number is enough.
    """

    def enough(images: int) -> bool:
        error = math.sqrt(variance / images + constant)
        return error == 0.0 or power_of_difference(difference, error, level=level, images=images) >= power

    if constant and power_of_difference(difference, math.sqrt(constant), level=level) < power:
        return math.inf
    most = 2
    while not enough(most):
        most *= 2
        if most > 2**40:
            return math.inf
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return max(2, most)


def _beyond(limit: float, freedom: float, shift: float) -> float:
    """Return the probability that a noncentral t is above a limit; scipy gives NaN for many tails below 1e-8."""
    found = float(nct.sf(limit, freedom, shift))
    return float(shift > limit) if math.isnan(found) else found


def _counts(sizes: npt.ArrayLike) -> Floats:
    counts = np.atleast_1d(np.asarray(sizes, dtype=np.float64))
    if counts.ndim != 1 or not np.all(counts >= 0.0) or not counts.sum() > 0.0:
        raise ValueError(f"expected a number of documents for each image, got {sizes!r:.80}")
    return counts


def _positive(error: float) -> float:
    if not error > 0.0:
        raise ValueError(f"expected a standard error above 0, got {error}")
    return error


def _limit(probability: float, images: float) -> float:
    """Return the quantile that a test statistic has to exceed."""
    if not images >= 2.0:
        raise ValueError(f"expected two images or more, got {images}")
    return float(norm.ppf(probability) if math.isinf(images) else student.ppf(probability, images - 1.0))
