"""Selective prediction: what a model is worth when it may decline to answer where its confidence is low.

A record is answered iff its confidence ≥ a threshold, so records of equal confidence are answered together or not at
all. Every function takes `confidence` and `outcome`, both of shape (n,) with values in [0, 1]; an outcome is 1 for
right, 0 for wrong, or between for a soft target (VQA accuracy, IoU), and risk is the mean of 1 − outcome over answered
records. All raise ValueError if the two differ in length, are empty, are not one-dimensional, or hold NaN or a value
outside [0, 1].

Definitions follow the standalone evaluator of Whitehead et al., "Reliable Visual Question Answering", ECCV 2022
(facebookresearch/reliable_vqa), in fractions instead of percent; differences are stated where there are any.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics import ranked
from lmms_plugin.metrics._inputs import ROUNDING, Floats, one_fraction, paired
from lmms_plugin.metrics.bins import ties
from lmms_plugin.metrics.bootstrap import Clusters
from lmms_plugin.metrics.sums import Sums, plain

COSTS: tuple[float, ...] = (1, 10, 100)
"""Costs of a wrong answer for which effective reliability is reported."""

HELD_OUT, REPORTED = "val", "test"
"""Parts of a task that brings its own split: thresholds are chosen on the first and results reported on the second."""


class RiskCoverage(NamedTuple):
    """Every operating point that a threshold can reach, from most to least selective. All arrays have shape (points,).

    Attributes:
        threshold: The distinct confidences, descending.
        coverage: Share of records answered, (0, 1], ascending; the last is 1.
        risk: Mean of 1 − outcome over the answered records.
    """

    threshold: Floats
    coverage: Floats
    risk: Floats


class OperatingPoint(NamedTuple):
    """What a given threshold does on given records.

    Attributes:
        coverage: Share of records answered, [0, 1].
        risk: Mean of 1 − outcome over the answered records; NaN if none is answered.
    """

    coverage: float
    risk: float


def risk_coverage(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> RiskCoverage:
    """Risk–coverage curve (El-Yaniv & Wiener, JMLR 2010), one point per distinct confidence."""
    c, y = paired(confidence, outcome)
    return RiskCoverage(*ranked.everywhere(c, y))


def aurc(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Area under the risk–coverage curve: the mean over k = 1…n of the risk of the k most confident records.

    Geifman et al., ICLR 2019. In [0, 1], lower is better. Among equal confidences the expectation over a random order
    is taken, so a constant confidence gets the overall risk. (reliable_vqa integrates by trapezoids from coverage 1/n
    instead and takes tied records in file order.)
    """
    return ranked.plain(ranked.aurc, confidence, outcome)


def e_aurc(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Excess AURC: AURC − that of the best possible ranking of the same outcomes, ≥ 0 (Geifman et al., ICLR 2019).

    The best ranking's area is computed for these n records, not by its limit r + (1 − r)·ln(1 − r), so a perfect
    ranking gets 0.
    """
    return ranked.plain(ranked.e_aurc, confidence, outcome)


def coverage_at_risk(confidence: npt.ArrayLike, outcome: npt.ArrayLike, risk: float) -> float:
    """Coverage at risk, C@r: the largest share of records that some threshold answers with a risk of at most r.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        risk: The bound r, in [0, 1].

    Returns:
        A fraction in [0, 1]; 0 if even the most confident records exceed the risk.
    """
    return ranked.plain(partial(ranked.coverage, risk=one_fraction("risk", risk)), confidence, outcome)


def threshold_at_risk(confidence: npt.ArrayLike, outcome: npt.ArrayLike, risk: float) -> float:
    """Lowest threshold whose risk on these records is at most `risk` (in [0, 1]); ∞, which answers nothing, if none is.

    Choose it on held-out records and read what it achieves elsewhere with `at_threshold`.
    """
    curve = risk_coverage(confidence, outcome)
    within = np.flatnonzero(curve.risk <= one_fraction("risk", risk) + ROUNDING)
    return float(curve.threshold[within[-1]]) if within.size else float("inf")


def at_threshold(confidence: npt.ArrayLike, outcome: npt.ArrayLike, threshold: float) -> OperatingPoint:
    """Coverage and risk reached by a threshold chosen elsewhere.

    Raises:
        ValueError: Also if the threshold is NaN.
    """
    c, y = paired(confidence, outcome)
    found = plain(Gains(c, y, Clusters.one(c.size), {0.0: _threshold(threshold)}, {}))
    return OperatingPoint(*found.values())


def effective_reliability(confidence: npt.ArrayLike, outcome: npt.ArrayLike, cost: float, threshold: float) -> float:
    """Effective reliability Φ_c: the mean over all records of what answering or declining earned.

    An answered record earns its outcome if that is above 0 and −cost if it is 0; a declined one earns 0
    (Whitehead et al., ECCV 2022). A threshold of 0 is the value without abstention; the mean outcome is the best
    possible.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        cost: Penalty c ≥ 0 of a wrong answer; 1, 10 and 100 are usual.
        threshold: A record is answered iff its confidence ≥ threshold; ∞ answers nothing. Choose it on held-out
            records with `threshold_at_cost`.

    Returns:
        A value in [−cost, 1].

    Raises:
        ValueError: Also if the cost is negative, infinite or NaN, or the threshold is NaN.
    """
    c, y = paired(confidence, outcome)
    (earned,) = plain(Gains(c, y, Clusters.one(c.size), {}, {_cost(cost): _threshold(threshold)})).values()
    return earned


def threshold_at_cost(
    confidence: npt.ArrayLike, outcome: npt.ArrayLike, cost: float, *, may_decline_all: bool = False
) -> float:
    """Threshold with the largest Φ_cost on these (held-out) records; among equals the lowest, which answers most.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        cost: Penalty c ≥ 0 of a wrong answer.
        may_decline_all: False as in reliable_vqa, where the most confident records are always answered. True also
            considers ∞, and returns it if every other threshold has Φ < 0.

    Raises:
        ValueError: Also if the cost is negative, infinite or NaN.
    """
    c, y = paired(confidence, outcome)
    blocks = ties(c, np.where(y > 0.0, y, -_cost(cost)))
    earned = np.cumsum(blocks.outcome[::-1])
    best = earned.max()
    if may_decline_all and best < 0.0:
        return float("inf")
    # Sums of soft outcomes that should be equal may differ in the last digits.
    last = np.flatnonzero(earned >= best - ROUNDING * max(1.0, abs(best)))[-1]
    return float(blocks.confidence[::-1][last])


def auroc(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Probability that a right answer has a higher confidence than a wrong one, equal confidences counting one half.

    A soft outcome counts as that fraction of a right answer and the rest of a wrong one. In [0, 1], 0.5 is chance;
    NaN if all outcomes are right or all are wrong, where it is undefined.
    """
    return ranked.plain(ranked.auroc, confidence, outcome)


def aupr_error(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Average precision of finding errors by low confidence: Σ (recall step) · precision, without interpolation.

    A soft outcome counts as that fraction of a right answer and the rest of an error. In [0, 1]; a constant confidence
    gets the error rate. NaN if all outcomes are right or all are wrong.
    """
    return ranked.plain(ranked.aupr_error, confidence, outcome)


def fpr_at_tpr(confidence: npt.ArrayLike, outcome: npt.ArrayLike, tpr: float = 0.95) -> float:
    """Smallest share of wrong answers accepted by a threshold that accepts at least `tpr` of the right ones.

    A soft outcome counts as that fraction of a right answer and the rest of a wrong one. In [0, 1], lower is better;
    NaN if all outcomes are right or all are wrong.

    Raises:
        ValueError: Also if `tpr` is not in [0, 1].
    """
    return ranked.plain(partial(ranked.fpr_at_tpr, tpr=one_fraction("tpr", tpr)), confidence, outcome)


class Gains:
    """What a threshold chosen elsewhere does here: coverage and risk, and effective reliability for each cost.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        clusters: Of the n records.
        at_risk: Risk r → the threshold chosen for it; gives `achieved_coverage@<r>` and `achieved_risk@<r>`,
            the latter NaN if nothing is answered.
        at_cost: Cost c → the threshold chosen for it; gives `phi@<c>`.
    """

    def __init__(
        self,
        confidence: npt.ArrayLike,
        outcome: npt.ArrayLike,
        clusters: Clusters,
        at_risk: Mapping[float, float],
        at_cost: Mapping[float, float],
    ) -> None:
        c, y = paired(confidence, outcome)
        coverage = tuple(f"achieved_coverage@{risk:g}" for risk in at_risk)
        achieved = tuple(f"achieved_risk@{risk:g}" for risk in at_risk)
        self.names = (*coverage, *achieved, *(f"phi@{cost:g}" for cost in at_cost))
        answered = [(c >= threshold).astype(np.float64) for threshold in at_risk.values()]
        earned = [np.where(c >= threshold, np.where(y > 0, y, -cost), 0.0) for cost, threshold in at_cost.items()]
        rows = [np.ones_like(c), *answered, *(mask * (1.0 - y) for mask in answered), *earned]
        self._sums, self._risks = Sums.stacked(rows, clusters), len(answered)

    def __call__(self, counts: Floats) -> Floats:
        """Values of `names`, shape (resamples, names)."""
        sums, k = self._sums(counts), self._risks
        total, answered, lost, earned = np.split(sums, (1, k + 1, 2 * k + 1), axis=1)
        with np.errstate(invalid="ignore"):
            return np.concatenate((answered / total, lost / answered, earned / total), axis=1)


def _threshold(value: float) -> float:
    if np.isnan(value):
        raise ValueError("expected a threshold, got NaN")
    return value


def _cost(value: float) -> float:
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"expected a finite cost of at least 0, got {value}")
    return value
