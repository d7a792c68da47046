"""Confidence sequences of differences: intervals that hold at every look, so that a study may stop when it knows.

An ordinary interval is right with its probability once, at a sample size chosen before; looked at again and again
until it excludes 0, it is wrong far more often. A confidence sequence covers the truth at *all* sample sizes together
with its probability, for whatever reason one stops (Waudby-Smith and Ramdas, "Estimating means of bounded random
variables by betting", JRSS B 2024). It assumes nothing of the data but their bounds: images are exchangeable draws,
documents of an image may depend on each other in any way.

The difference between two arms is a ratio, Σ over images of (what the first is right more often) ÷ Σ of documents. That
it is m means that `sum - m * size` has mean 0 over images. Against each m a gambler bets that the mean is above: a bet
λ multiplies its capital by 1 + λ (sum − m size) at every image, and λ is small enough for it never to be negative. If m
is the truth its capital is expected to stay 1, and by Ville's inequality it exceeds 1 ÷ α at any time with probability
at most α. The m against which no capital is that large are the interval. Constant bets are spread over a grid: the
capital is their mean. It does not depend on the order of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import logsumexp

from lmms_plugin.metrics._inputs import Floats
from lmms_plugin.metrics.bootstrap import Interval

BETS: Floats = 0.99 * 1.5 ** -np.arange(12.0)
"""Bets as shares of the largest one: from effects that a few images show to those that need tens of thousands."""


def log_capital(
    sums: npt.ArrayLike, sizes: npt.ArrayLike, mean: float, *, bound: float, largest: int, above: bool
) -> float:
    """Return the logarithm of what a bettor against a mean has gained, from a capital of 1.

    Args:
        sums: Sum of the documents' differences of each image, shape (images,).
        sizes: Number of documents of each image, shape (images,).
        mean: Difference that is bet against, within (−bound, bound).
        bound: Largest absolute difference of one document: 1 for accuracies, 2 for a difference of two differences.
        largest: Largest number of documents that an image can have, known beforehand.
        above: Whether the bet is that the true difference is above `mean`, or that it is below.

    Raises:
        ValueError: A sum or a size is impossible, or the mean is not inside the bounds.
    """
    values, counts = _checked(sums, sizes, bound, largest)
    if not -bound < mean < bound:
        raise ValueError(f"expected a difference inside ±{bound:g}, got {mean}")
    sign = 1.0 if above else -1.0
    # The worst image for the bettor has `largest` documents that all differ by the bound, in the other direction.
    worst = (bound + sign * mean) * largest
    gained = sign * (values - mean * counts) / worst
    return float(log_mean_capital(gained, BETS))


def log_mean_capital(gained: Floats, bets: Floats) -> Floats:
    """Return the logarithm of the mean capital of constant bets.

    Args:
        gained: What the largest bet gains at every image, at least -1, shape (..., images).
        bets: Bets as shares of the largest one, shape (bets,), in [0, 1).

    Returns:
        Logarithms, shape (...).
    """
    capitals = np.stack([np.log1p(bet * gained).sum(axis=-1) for bet in bets])
    found: Floats = logsumexp(capitals, axis=0) - math.log(bets.size)
    return found


def confidence_sequence(
    sums: npt.ArrayLike, sizes: npt.ArrayLike, *, bound: float, largest: int, level: float = 0.95
) -> Interval:
    """Return the interval of a difference per document that may be looked at after any number of images.

    Args:
        sums: Sum of the documents' differences of each image, shape (images,).
        sizes: Number of documents of each image, shape (images,).
        bound: Largest absolute difference of one document: 1 for accuracies, 2 for a difference of two differences.
        largest: Largest number of documents that an image can have, known beforehand: of the whole dataset, not of
            the images seen so far.
        level: Probability that all intervals of all looks contain the truth.

    Returns:
        The interval, within ±bound; all of it without images. The two sides have half of 1 − level each.

    Raises:
        ValueError: A sum or a size is impossible.
    """
    values, counts = _checked(sums, sizes, bound, largest)
    if not 0.0 < level < 1.0:
        raise ValueError(f"expected a level in (0, 1), got {level}")
    needed = math.log(2.0 / (1.0 - level))

    def beyond(above: bool) -> Callable[[float], float]:
        return lambda mean: log_capital(values, counts, mean, bound=bound, largest=largest, above=above) - needed

    if counts.sum() == 0:
        return Interval(-bound, bound)
    edge = bound * (1.0 - 1e-9)
    centre = float(np.clip(values.sum() / counts.sum(), -edge, edge))
    # Against the estimate nobody gains (capital falls as the mean that is bet against rises), so it lies between.
    low = -bound if beyond(True)(-edge) <= 0.0 else float(brentq(beyond(True), -edge, centre, xtol=1e-9))
    high = bound if beyond(False)(edge) <= 0.0 else float(brentq(beyond(False), centre, edge, xtol=1e-9))
    return Interval(low, high)


def _checked(sums: npt.ArrayLike, sizes: npt.ArrayLike, bound: float, largest: int) -> tuple[Floats, Floats]:
    values, counts = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if values.ndim != 1 or values.shape != counts.shape:
        raise ValueError(f"expected a sum and a size for each image, got {values.shape} and {counts.shape}")
    if np.any(~np.isfinite(values)) or np.any(np.abs(values) > bound * counts * (1.0 + 1e-12)):
        raise ValueError(f"expected sums of differences of at most {bound:g} a document, got more")
    if np.any(counts > largest) or np.any(counts < 0.0):
        raise ValueError(f"expected images of 0 to {largest} documents, got {counts.min():g} to {counts.max():g}")
    return values, counts
