"""Bounds of a risk that hold for any number of images, and p-values of "the risk is at least r".

Images are exchangeable draws; documents of an image may depend on each other in any way. A risk is a ratio over images,
E[Σ loss of what counts] ÷ E[Σ of what counts], where what counts are accepted documents (the risk of selective
prediction) or all documents (the share that is accepted and wrong). It is r exactly where `lost - r * counted` of an
image has mean 0, so that a ratio is tested as a mean, and images of which nothing counts say nothing.

Three bounds, of which the first that applies is the strongest:

* Clopper and Pearson's, exact, where every image has at most one document and losses are 0 or 1;
* by betting (Waudby-Smith and Ramdas, JRSS B 2024), which learns the variance: the mean capital of constant bets, of
  which the order of images changes nothing, see `lmms_plugin.metrics.confidence_sequences`; half of the capital may go
  to one bet that other images recommend;
* Hoeffding's and Bentkus' (Bates et al., "Distribution-free, risk-controlling prediction sets", JACM 2021; Angelopoulos
  et al., "Learn then test", 2021), which knows the mean alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import beta, binom

from lmms_plugin.metrics._inputs import Floats
from lmms_plugin.metrics.confidence_sequences import log_mean_capital

Bound = Literal["exact", "betting", "hoeffding-bentkus"]
BETS: Floats = np.array([0.99, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.12, 0.06, 0.03])
"""Bets as shares of the largest one. With errors in p of the documents the best against r is 1 - p / r of it."""
_CHOICES: Floats = np.arange(1, 19) / 20
_EDGE = 1e-9
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class ImageLosses:
    """Losses of images, for one threshold or for several.

    Attributes:
        lost: Sum of the losses of what counts, shape (..., images).
        counted: What counts of each image, shape (..., images): a number of documents, or a weight.
        largest: Largest value of `counted` that an image can have, known beforehand.
        binary: Whether the losses are 0 or 1.
        bet: Bet that half of the capital goes to where a risk is shown to be below, of each threshold, shape (...);
            it must not depend on these images. None for none.

    Raises:
        ValueError: On construction, if more is lost than counts, or more counts than the largest.
    """

    lost: Floats
    counted: Floats
    largest: float = 1.0
    binary: bool = False
    bet: Floats | None = None

    def __post_init__(self) -> None:
        if self.lost.shape != self.counted.shape or not self.lost.ndim:
            raise ValueError(f"expected losses and counts of images, got {self.lost.shape} and {self.counted.shape}")
        slack = _ROUNDING * max(1.0, self.largest)
        if not np.all((self.lost >= -slack) & (self.lost <= self.counted + slack)):
            raise ValueError("expected every image to lose between nothing and all that counts, got more or less")
        if not np.all(self.counted <= self.largest + slack):
            raise ValueError(f"expected at most {self.largest:g} of an image to count, got {self.counted.max():g}")

    @property
    def best_bound(self) -> Bound:
        """The bound that is the strongest of those that hold for such losses."""
        return "exact" if self.binary and self.largest == 1.0 else "betting"

    @property
    def observed(self) -> Floats:
        """Risk on these images, shape (...); NaN where nothing counts."""
        with np.errstate(invalid="ignore"):
            found: Floats = self.lost.sum(axis=-1) / self.counted.sum(axis=-1)
        return found

    def p_below(self, risk: float, bound: Bound | None = None) -> Floats:
        """Return p-values of "the risk is at least `risk`", shape (...): low ones show that it is below.

        Args:
            risk: Risk, in (0, 1).
            bound: Which to use; None for the strongest. It must not be chosen by its result.
        """
        how = self._checked(risk, bound)
        if how == "exact":
            found: Floats = binom.cdf(self.lost.sum(axis=-1).round(), self.counted.sum(axis=-1).round(), risk)
            return found
        if how == "hoeffding-bentkus":
            return self._hoeffding_bentkus(risk)
        gained = self._gained(risk)
        capital = log_mean_capital(gained, BETS)
        if self.bet is not None:
            own = np.log1p(self.bet[..., None] * gained).sum(axis=-1)
            capital = np.logaddexp(capital, own) - math.log(2.0)
        return _p(capital)

    def best_bet(self, risk: float) -> Floats:
        """Return the bet that gains most on these images, for others, shape (...)."""
        gained = self._gained(risk)
        found: Floats = _CHOICES[np.argmax([np.log1p(bet * gained).sum(axis=-1) for bet in _CHOICES], axis=0)]
        return found

    def p_above(self, risk: float, bound: Bound | None = None) -> Floats:
        """Return p-values of "the risk is at most `risk`", shape (...): low ones show that it is above."""
        how = self._checked(risk, bound)
        if how == "exact":
            found: Floats = binom.sf(self.lost.sum(axis=-1).round() - 1.0, self.counted.sum(axis=-1).round(), risk)
            return found
        if how == "hoeffding-bentkus":
            return ImageLosses(self.counted - self.lost, self.counted, self.largest)._hoeffding_bentkus(1.0 - risk)
        return _p(log_mean_capital((self.lost - risk * self.counted) / (risk * self.largest), BETS))

    def upper(self, level: float, bound: Bound | None = None) -> float:
        """Return the upper bound of the risk of one threshold, which holds with probability `level`."""
        lost, counted, how = float(self.lost.sum()), float(self.counted.sum()), bound or self.best_bound
        if how == "exact" and lost < counted:
            return float(beta.ppf(level, round(lost) + 1.0, round(counted) - round(lost)))
        return self._root(lambda risk: float(self.p_below(risk, how).item()) - (1.0 - level), 1.0)

    def lower(self, level: float, bound: Bound | None = None) -> float:
        """Return the lower bound of the risk of one threshold, which holds with probability `level`."""
        lost, counted, how = float(self.lost.sum()), float(self.counted.sum()), bound or self.best_bound
        if how == "exact" and lost > 0.0:
            return float(beta.ppf(1.0 - level, round(lost), round(counted) - round(lost) + 1.0))
        return self._root(lambda risk: float(self.p_above(risk, how).item()) - (1.0 - level), 0.0)

    def _gained(self, risk: float) -> Floats:
        """Return what the largest bet that the risk is below gains at every image."""
        return (risk * self.counted - self.lost) / ((1.0 - risk) * self.largest)

    def _root(self, beyond: Callable[[float], float], end: float) -> float:
        """Return where a p-value falls to its limit on the way from the observed risk to an end; else the end."""
        if not self.counted.sum() > 0.0 or beyond(abs(end - _EDGE)) > 0.0:
            return end
        start = float(np.clip(self.observed, _EDGE, 1.0 - _EDGE).item())
        return float(brentq(beyond, *sorted((start, abs(end - _EDGE))), xtol=1e-9)) if beyond(start) > 0.0 else start

    def _checked(self, risk: float, bound: Bound | None) -> Bound:
        if not 0.0 < risk < 1.0:
            raise ValueError(f"expected a risk in (0, 1), got {risk}")
        if bound == "exact" and self.best_bound != "exact":
            raise ValueError("expected one document per image and losses of 0 or 1 for the exact bound, got others")
        return bound or self.best_bound

    def _hoeffding_bentkus(self, risk: float) -> Floats:
        there = self.counted > 0.0
        images = there.sum(axis=-1)
        # In [0, 1], with mean `risk` where the risk is `risk`.
        moved = (self.lost - risk * self.counted) / self.largest + risk
        mean = np.where(there, moved, 0.0).sum(axis=-1) / np.maximum(images, 1)
        below = np.clip(mean, 0.0, risk)
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.where(below > 0.0, below * np.log(below / risk), 0.0)
        hoeffding = np.exp(-images * (left + (1.0 - below) * np.log((1.0 - below) / (1.0 - risk))))
        bentkus = np.e * binom.cdf(np.ceil(images * mean - _ROUNDING), images, risk)
        found: Floats = np.minimum(np.minimum(hoeffding, bentkus), 1.0)
        return found


def image_losses(
    loss: npt.ArrayLike,
    first: npt.ArrayLike,
    image: npt.NDArray[np.intp],
    *,
    thresholds: int = 1,
    largest: float,
    weights: Floats | None = None,
    heaviest: float = 1.0,
    per_image: bool = False,
    binary: bool = False,
) -> ImageLosses:
    """Add up the losses of documents by image, for one threshold or for several, of which each counts more documents.

    Args:
        loss: Loss of each document, in [0, 1], shape (n,).
        first: Index of the first threshold at which each document counts, shape (n,); `thresholds` or more for none.
        image: Index of each document's image, shape (n,).
        thresholds: Number of thresholds.
        largest: Largest number of documents of an image, known beforehand.
        weights: Weight of each image, shape (images,); None for 1.
        heaviest: Largest weight that an image can have.
        per_image: Whether every image counts once, with the mean loss of its documents that count, however many these
            are. No largest number of documents is then needed, and risk is that of a random document of a random image.
        binary: Whether losses are 0 or 1.

    Returns:
        Losses of shape (thresholds, images).
    """
    values, step = np.asarray(loss, np.float64), np.asarray(first, np.intp)
    images = int(image.max()) + 1 if image.size else 0
    there = step < thresholds
    cells = (step * images + image)[there]
    counted, lost = (
        np.bincount(cells, of, minlength=thresholds * images).reshape(thresholds, images).cumsum(axis=0)
        for of in (np.ones(cells.size), values[there])
    )
    most = float(largest)
    if per_image:
        lost, counted = lost / np.maximum(counted, 1.0), (counted > 0.0).astype(np.float64)
        most, binary = 1.0, binary and largest == 1
    if weights is not None:
        lost, counted, most, binary = lost * weights, counted * weights, most * heaviest, False
    return ImageLosses(lost, counted, most, binary)


def images_needed(risk: float, level: float) -> int:
    """Return how many images without any error it takes at least to show that a risk is below `risk`."""
    return int(np.ceil(np.log(1.0 - level) / np.log1p(-risk)))


def _p(capital: Floats) -> Floats:
    found: Floats = np.exp(-np.maximum(capital, 0.0))
    return found
