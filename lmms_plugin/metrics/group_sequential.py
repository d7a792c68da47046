"""Boundaries of a test that is made at a few looks, planned beforehand, at ever more images.

A test that is repeated as data come in rejects too often. A group-sequential design spends its error over the looks:
after a share t of the images, 2 − 2Φ(z ÷ √t) of it with z = Φ⁻¹(1 − error ÷ 2), nearly nothing early and nearly all at
the end, which is why the last look is hardly stricter than the only look of a design without stages (Lan and DeMets,
"Discrete sequential boundaries for clinical trials", Biometrika 1983, their version of O'Brien and Fleming's).

The statistics of the looks are taken as a Brownian motion seen at the shares t, which is right for sums over images
drawn at random. What all looks have in common, such as the calibration seeds, ties them closer together, so that the
error that is spent is less than planned. Unlike `lmms_plugin.metrics.confidence_sequences` this rests on the central
limit theorem, as every interval of a study of fixed size does, and the looks have to be the planned ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import binom, norm
from scipy.stats import t as student

from lmms_plugin.metrics._inputs import ROUNDING, Floats
from lmms_plugin.metrics.bootstrap import MOST_FLIPPED, ClusterParts, Interval
from lmms_plugin.metrics.power import measured_variance

_NODES, _FARTHEST, _MOST = 512, 8.5, 60.0
"""Nodes of the quadrature at each look, how many standard deviations below 0 it begins, and the largest boundary."""


def spent(share: float, error: float) -> float:
    """Return the error that is spent after a share of the images, in (0, 1].

    Args:
        share: Share of all images, in (0, 1].
        error: One-sided error of all looks together.
    """
    return float(2.0 * norm.sf(norm.isf(error / 2.0) / math.sqrt(share)))


@cache
def boundaries(shares: tuple[float, ...], error: float) -> tuple[float, ...]:
    """Return what a standard normal statistic has to exceed at each look for one-sided tests.

    Args:
        shares: Share of all images after each look, increasing, in (0, 1]; 1 at the last one for all of the error.
        error: Probability of exceeding any of them where there is no difference, in (0, 1).

    Raises:
        ValueError: Shares do not increase, or lie outside (0, 1]; the error lies outside (0, 1).
    """
    if not shares or any(b <= a for a, b in zip((0.0, *shares), shares, strict=False)) or shares[-1] > 1.0:
        raise ValueError(f"expected increasing shares of the images in (0, 1], got {shares}")
    if not 0.0 < error < 1.0:
        raise ValueError(f"expected an error in (0, 1), got {error}")
    found: list[float] = []
    paths, before = _Paths(np.zeros(1), np.ones(1)), 0.0
    for share in shares:
        to_spend = spent(share, error) - (spent(before, error) if before else 0.0)
        limit = paths.limit(to_spend, share - before)
        found.append(limit / math.sqrt(share))
        paths, before = paths.below(limit, share, share - before), share
    return tuple(found)


class _Paths(NamedTuple):
    """Those paths of a Brownian motion that have exceeded no boundary so far.

    Attributes:
        places: Where they are, shape (nodes,).
        weights: Probability of each place, as weights of a quadrature, shape (nodes,).
    """

    places: Floats
    weights: Floats

    def limit(self, error: float, time: float) -> float:
        """Return the place beyond which a share `error` of all paths is after some more time."""

        def beyond(limit: float) -> float:
            return float(self.weights @ norm.sf((limit - self.places) / math.sqrt(time))) - error

        return float(brentq(beyond, -_MOST, _MOST, xtol=1e-12))

    def below(self, limit: float, share: float, time: float) -> _Paths:
        """Return the paths that are below a limit after some more time."""
        nodes, areas = np.polynomial.legendre.leggauss(_NODES)
        start, step = -_FARTHEST * math.sqrt(share), math.sqrt(time)
        half = (min(limit, _FARTHEST * math.sqrt(share)) - start) / 2.0
        reached = start + half * (nodes + 1.0)
        density = norm.pdf((reached[:, None] - self.places) / step) / step @ self.weights
        return _Paths(reached, density * areas * half)


class DifferenceEstimate(NamedTuple):
    """Difference of two arms on the images so far.

    Attributes:
        value: First − second, per document.
        error: Its standard error.
        freedom: Degrees of freedom of the error.
        skewness: Skewness of the value's distribution: answers that flip mostly one way are far from symmetric.
        least: p-value below which that of no difference cannot be, by the exact sign-flip test of the images.
        images: Number of images with documents.
        differing: Number of images that differ.
        typical: How much one of them differs, as a share of the documents of an image.
    """

    value: float
    error: float
    freedom: float
    skewness: float
    least: float
    images: int
    differing: int
    typical: float

    @classmethod
    def of(cls, sums: npt.ArrayLike, sizes: npt.ArrayLike, by_seed: Sequence[Floats] = ()) -> DifferenceEstimate:
        """Return a difference of two arms and its error, over images and over calibration seeds.

        A tie on every image so far does not mean that there is no difference. So the variance is that of the data and
        one more document that flipped, as Agresti and Min (Statistics in Medicine 2005) add to matched pairs.

        Args:
            sums: Sum of the documents' differences of each image, shape (images,).
            sizes: Number of documents of each image, shape (images,).
            by_seed: What each source of calibration data adds to the sums with each of its seeds, each of shape (seeds,
                images). Sources vary apart from each other; with one seed of each nothing is said about others.

        Returns:
            The estimate; of a single image, one with an infinite error.

        Raises:
            ValueError: There are no documents, or shapes differ.
        """
        values, counts = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
        documents = counts.sum()
        if values.shape == counts.shape == (1,) and documents > 0.0:
            return cls(float(values[0] / documents), math.inf, 1.0, 0.0, 1.0, 1, 1, 1.0)
        of_images = measured_variance(values, counts) / values.size + 1.0 / documents**2
        parts = [(of_images, values.size - 1)]
        for drawn in by_seed:
            # What chance in the images adds to it counts twice, as where images and seeds are resampled: subtracting it
            # leaves too little where there are two or three seeds.
            means = drawn.sum(axis=1) / documents
            parts.append((float(means.var(ddof=1)) / means.size, means.size - 1))
        variance = sum(part for part, _ in parts)
        # Welch and Satterthwaite: degrees of freedom of a sum of variances.
        freedom = variance**2 / sum(part**2 / own for part, own in parts)
        residual = values - values.sum() / documents * counts
        images, apart = int((counts > 0.0).sum()), np.abs(values)[np.abs(values) > ROUNDING]
        return cls(
            float(values.sum() / documents),
            math.sqrt(variance),
            freedom,
            float((residual**3).sum() / documents**3 / variance**1.5),
            ClusterParts(values, counts > 0.0).least_p(),
            images,
            apart.size,
            # With one more image that differs, in half of its documents.
            float((apart.sum() * images / documents + 0.5) / (apart.size + 1.0)),
        )

    def p_difference(self) -> float:
        """Return the two-sided p-value of no difference, at a look of its own."""
        return min(1.0, max(self.least, 2.0 * min(self._p_at_most(0.0), self._p_at_least(0.0))))

    def p_equivalence(self, margin: float) -> float:
        """Return the p-value of two one-sided tests that the difference is `margin` or more to either side.

        A few images that differ are no normal distribution. If they differ as much as they do, a difference of `margin`
        takes a share of all images; p is at least the binomial probability that so few differ.
        """
        p = max(self._p_at_least(margin), self._p_at_most(-margin), 0.5**self.images)
        if self.differing > MOST_FLIPPED:
            return p
        return max(p, float(binom.cdf(self.differing, self.images, min(1.0, margin / self.typical))))

    def interval(self, level: float) -> Interval:
        """Return the interval of a look of its own with this level."""
        limit = float(student.isf((1.0 - level) / 2.0, self.freedom))
        above, below = max(limit, self._skewed(limit)), min(-limit, self._skewed(-limit))
        return Interval(self.value - self.error * above, self.value - self.error * below)

    def _p_at_least(self, difference: float) -> float:
        """Return the p-value of a true difference of at least this."""
        return float(student.cdf(max(self._statistics(difference)), self.freedom))

    def _p_at_most(self, difference: float) -> float:
        """Return the p-value of a true difference of at most this."""
        return float(student.sf(min(self._statistics(difference)), self.freedom))

    def _statistics(self, difference: float) -> tuple[float, float]:
        """Return the statistic against a difference, as it is and without its skewness.

        The second one is the cubic transformation of Hall ("On the removal of skewness by transformation", JRSS B
        1992). A skewness that is only of this sample would make it too bold, so a p-value takes the milder of both.
        """
        t, g = (self.value - difference) / self.error, self.skewness
        return t, t + g * t**2 / 3.0 + g**2 * t**3 / 27.0 + g / 6.0

    def _skewed(self, limit: float) -> float:
        """Return the statistic that is `limit` without its skewness."""
        g = self.skewness
        return limit if abs(g) < ROUNDING else float(3.0 / g * (np.cbrt(1.0 + g * (limit - g / 6.0)) - 1.0))
