"""Thresholds of confidence that keep a risk with a stated probability, for any number of images.

Three kinds of promise:

* `selective_threshold`: with probability `level`, at most a share `risk` of what the threshold accepts is wrong. This
  risk need not fall as the threshold rises, so thresholds are tested one after the other, each at the full level, and
  the first that fails ends it ("Learn then test", Angelopoulos et al. 2021: fixed sequence testing; the bound of
  Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017, is the case of one document
  per image). Which thresholds, where to begin and how to bet is learned from pilot images that are not tested on.
* `monotone_threshold`: with probability `level`, the mean loss of what is accepted, over all documents, is at most
  `risk`. It falls as the threshold rises, so no pilot and no grid is needed (Bates et al., JACM 2021).
* `expected_threshold`: the same on average over draws of the images instead of with a probability (conformal risk
  control, Angelopoulos et al. 2022).

A document is accepted iff its confidence is at least the threshold; one without a confidence (NaN) never is.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics._inputs import ROUNDING, Floats, fractions, one_fraction
from lmms_plugin.metrics.guarantees.risk_bounds import Bound, ImageLosses, image_losses

Bools = npt.NDArray[np.bool_]
NOTHING = float("inf")
"""Threshold that accepts nothing: no other was shown to keep its risk."""
CANDIDATES = 40
"""Thresholds that are tested at most: as many coverages of the pilot images, evenly spaced."""


class ScoredDocuments(NamedTuple):
    """Documents that a threshold is chosen on. All arrays have shape (n,).

    Attributes:
        confidence: Confidences in [0, 1]; NaN where there is none.
        loss: Losses in [0, 1].
        image: Index of each document's image.
    """

    confidence: Floats
    loss: Floats
    image: npt.NDArray[np.intp]

    def of(self, keep: Bools) -> ScoredDocuments:
        """Return some of the documents, their images numbered anew."""
        index = np.unique(self.image[keep], return_inverse=True)[1].astype(np.intp)
        return ScoredDocuments(self.confidence[keep], self.loss[keep], index)

    def accepted(self, threshold: float) -> Bools:
        """Return what a threshold accepts, shape (n,)."""
        with np.errstate(invalid="ignore"):
            found: Bools = self.confidence >= threshold
        return found


@dataclass(frozen=True)
class Promise:
    """What is promised, and how it is shown.

    Attributes:
        risk: Largest risk, in (0, 1).
        level: Probability with which the promise is kept, over draws of the images that it is chosen on.
        largest: Largest number of documents of an image, known beforehand.
        binary: Whether losses are 0 or 1.
        per_image: Whether images count alike, see `risk_bounds.image_losses`.
        bound: Bound of the risk; None for the strongest that holds.

    Raises:
        ValueError: On construction, if risk or level is not in (0, 1).
    """

    risk: float = 0.05
    level: float = 0.95
    largest: float = 1.0
    binary: bool = True
    per_image: bool = False
    bound: Bound | None = None

    def __post_init__(self) -> None:
        for name, value in (("risk", self.risk), ("level", self.level)):
            if not 0.0 < one_fraction(name, value) < 1.0:
                raise ValueError(f"expected a {name} between 0 and 1, got {value:g}")


@dataclass(frozen=True)
class ChosenThreshold:
    """A threshold with what it was chosen on.

    Attributes:
        threshold: Threshold; infinite where none was shown to keep the risk.
        promise: What is promised of it.
        observed: Risk on the images that it was tested on; NaN if nothing is accepted.
        upper: Upper bound of the risk of this one threshold; at most the promised risk.
        coverage: Share of the tested documents that it accepts.
        images: Number of images it was tested on.
        documents: Number of their documents.
        pilot_images: Number of images from which the thresholds to test were learned.
        bet: Bet of `risk_bounds` that these images recommend for others; None where nothing is accepted.
    """

    threshold: float
    promise: Promise
    observed: float
    upper: float
    coverage: float
    images: int
    documents: int
    pilot_images: int = 0
    bet: float | None = None


def selective_threshold(
    documents: ScoredDocuments, pilot: Bools, promise: Promise, *, weights: Floats | None = None, heaviest: float = 1.0
) -> ChosenThreshold:
    """Choose the lowest threshold of which the risk among accepted documents is shown to be at most the promised one.

    Args:
        documents: Documents to choose on.
        pilot: Mask of documents of pilot images, shape (n,); an image is pilot with all of its documents.
        promise: What is promised.
        weights: Weight of each image, shape (images,), with which the promise is of other images than these (see
            `covariate_shift`); they must not depend on the images that are not pilot.
        heaviest: Largest weight that an image can have.

    Raises:
        ValueError: Documents of an image are on both sides, or losses or confidences are no fractions.
    """
    _expect(documents)
    if np.intersect1d(documents.image[pilot], documents.image[~pilot]).size:
        raise ValueError("expected every image to be pilot with all of its documents, got some on both sides")
    tested = documents.of(~pilot)
    sides = [None if weights is None else weights[np.unique(documents.image[mask])] for mask in (pilot, ~pilot)]
    images = int(np.unique(documents.image[pilot]).size)
    thresholds = candidates(documents.confidence[pilot])
    if not thresholds.size or not tested.loss.size:
        return _chosen(NOTHING, None, tested, promise, images, sides[1], heaviest)
    of_pilot = losses_at(documents.of(pilot), thresholds, promise, sides[0], heaviest)
    bets = of_pilot.best_bet(promise.risk)
    p = replace(losses_at(tested, thresholds, promise, sides[1], heaviest), bet=bets).p_below(
        promise.risk, promise.bound
    )
    start = int(np.argmin(of_pilot.p_below(promise.risk, promise.bound)))
    last = fixed_sequence(p, start, 1.0 - promise.level)
    threshold = NOTHING if last is None else float(thresholds[last])
    bet = None if last is None else bets[last : last + 1]
    return _chosen(threshold, bet, tested, promise, images, sides[1], heaviest)


def candidates(confidence: Floats, most: int = CANDIDATES) -> Floats:
    """Return thresholds by the coverages that they have among these confidences, descending; the last accepts all."""
    known = np.sort(confidence[~np.isnan(confidence)])[::-1]
    if not known.size:
        return known
    places = np.ceil(known.size * np.arange(1, most) / most).astype(np.intp) - 1
    return np.unique(np.append(known[np.maximum(places, 0)], 0.0))[::-1]


def fixed_sequence(p: Floats, start: int, alpha: float) -> int | None:
    """Return the last of the hypotheses from `start` on that are rejected without a break; None if the first is not.

    That any true one is rejected has probability α at most, whatever their dependence: the first true one would have
    to be.
    """
    failed = np.flatnonzero(p[start:] > alpha)
    count = int(failed[0]) if failed.size else p.size - start
    return start + count - 1 if count else None


def monotone_threshold(documents: ScoredDocuments, promise: Promise) -> ChosenThreshold:
    """Choose the lowest threshold with a mean loss of what is accepted, over all documents, of at most the risk.

    The risk of a threshold is that of this and of all higher ones: `p_below` is at most 1 - level for all of them.

    Args:
        documents: All documents that count: for false positives those of absent objects alone, with a loss of 1.
        promise: What is promised.
    """
    _expect(documents)
    known = np.unique(documents.confidence[~np.isnan(documents.confidence)])
    # The more is lost the higher is p: those that are at most 1 - level come first from above.
    shown = bisect_left(
        known[::-1],
        1.0 - promise.level + ROUNDING,
        key=lambda one: float(_all_counted(documents, one, promise).p_below(promise.risk, promise.bound)[0]),
    )
    threshold = float(known[-shown]) if shown else NOTHING
    sums = _all_counted(documents, threshold, promise)
    upper = sums.upper(promise.level, promise.bound)
    accepted = documents.accepted(threshold)
    images = int(np.unique(documents.image).size)
    coverage = float(accepted.mean()) if accepted.size else float("nan")
    return ChosenThreshold(threshold, promise, float(sums.observed[0]), upper, coverage, images, accepted.size)


def expected_threshold(documents: ScoredDocuments, risk: float) -> float:
    """Return the lowest threshold with an expected loss of what a new image's documents are accepted of at most `risk`.

    The loss of an image is the mean over its documents of what is lost where one is accepted. Conformal risk control:
    (Σ losses of n images + 1) ÷ (n + 1) ≤ risk. Expected means over draws of these images as well as of the new one;
    on given images the loss may be larger.
    """
    _expect(documents)
    images = np.unique(documents.image, return_counts=True)[1]
    share = documents.loss / images[np.unique(documents.image, return_inverse=True)[1]]
    known = ~np.isnan(documents.confidence)
    levels, block = np.unique(documents.confidence[known], return_inverse=True)
    lost = np.cumsum(np.bincount(block, share[known], minlength=levels.size)[::-1])
    kept = np.flatnonzero((lost + 1.0) / (images.size + 1.0) <= one_fraction("risk", risk) + ROUNDING)
    return float(levels[::-1][kept[-1]]) if kept.size else NOTHING


def losses_at(
    documents: ScoredDocuments,
    thresholds: Floats,
    promise: Promise,
    weights: Floats | None = None,
    heaviest: float = 1.0,
) -> ImageLosses:
    """Return what thresholds, descending, accept and lose of every image, shape (thresholds, images)."""
    # A comparison with NaN is never true: such a document comes after the last threshold.
    known = np.where(np.isnan(documents.confidence), -1.0, documents.confidence)
    first = np.where(known < 0.0, thresholds.size, np.searchsorted(-thresholds, -known))
    return _losses(documents, documents.loss, first, promise, weights, heaviest, thresholds.size)


def _all_counted(documents: ScoredDocuments, threshold: float, promise: Promise) -> ImageLosses:
    lost = np.where(documents.accepted(threshold), documents.loss, 0.0)
    return _losses(documents, lost, np.zeros(lost.size), promise)


def _losses(
    documents: ScoredDocuments,
    loss: Floats,
    first: npt.ArrayLike,
    promise: Promise,
    weights: Floats | None = None,
    heaviest: float = 1.0,
    thresholds: int = 1,
) -> ImageLosses:
    return image_losses(
        loss,
        first,
        documents.image,
        thresholds=thresholds,
        largest=promise.largest,
        weights=weights,
        heaviest=heaviest,
        per_image=promise.per_image,
        binary=promise.binary,
    )


def _chosen(
    threshold: float,
    bet: Floats | None,
    tested: ScoredDocuments,
    promise: Promise,
    pilot: int,
    weights: Floats | None,
    heaviest: float,
) -> ChosenThreshold:
    accepted = tested.accepted(threshold)
    images = int(np.unique(tested.image).size)
    coverage = float(accepted.mean()) if accepted.size else float("nan")
    if not accepted.any():
        return ChosenThreshold(threshold, promise, float("nan"), 1.0, coverage, images, accepted.size, pilot)
    sums = replace(losses_at(tested, np.array([threshold]), promise, weights, heaviest), bet=bet)
    upper = sums.upper(promise.level, promise.bound)
    best = float(sums.best_bet(promise.risk)[0])
    observed = float(sums.observed[0])
    return ChosenThreshold(threshold, promise, observed, upper, coverage, images, accepted.size, pilot, best)


def _expect(documents: ScoredDocuments) -> None:
    known = ~np.isnan(documents.confidence)
    if known.any():
        fractions("confidence", documents.confidence[known])
    if documents.loss.size:
        fractions("loss", documents.loss)
    if not documents.confidence.shape == documents.loss.shape == documents.image.shape:
        raise ValueError("expected a confidence, a loss and an image of every document, got different numbers of them")
