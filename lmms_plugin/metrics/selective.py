"""Selective prediction: what a model is worth when it may decline to answer where its confidence is low.

A record is answered iff its confidence ≥ a threshold, so records of equal confidence are answered together or not at
all. Every function takes `confidence` and `outcome`, both of shape (n,) with values in [0, 1]; an outcome is 1 for
right, 0 for wrong, or between for a soft target (VQA accuracy, IoU), and risk is the mean of 1 − outcome over answered
records. All raise ValueError if the two differ in length, are empty, are not one-dimensional, or hold NaN or a value
outside [0, 1].

Definitions follow the standalone evaluator of Whitehead et al., "Reliable Visual Question Answering", ECCV 2022
(facebookresearch/reliable_vqa), in fractions instead of percent; differences are stated where there are any.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics._inputs import Floats, one_fraction, paired
from lmms_plugin.metrics._ties import ties

RISKS: tuple[float, ...] = (0.005, 0.01, 0.05, 0.1, 0.2)
"""Tolerated risks at which coverage is reported."""

COSTS: tuple[float, ...] = (1, 10, 100)
"""Costs of a wrong answer for which effective reliability is reported."""

HELD_OUT, REPORTED = "val", "test"
"""Parts of a task that brings its own split: thresholds are chosen on the first and results reported on the second."""

_ROUNDING = 1e-12
"""Slack on a bound that sums of soft outcomes should meet exactly: in floating point 1 - 0.7 exceeds 0.3."""


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
    blocks = ties(c, 1.0 - y)
    answered = np.cumsum(blocks.records[::-1])
    return RiskCoverage(blocks.confidence[::-1], answered / c.size, np.cumsum(blocks.outcome[::-1]) / answered)


def aurc(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Area under the risk–coverage curve: the mean over k = 1…n of the risk of the k most confident records.

    Geifman et al., ICLR 2019. In [0, 1], lower is better. Among equal confidences the expectation over a random order
    is taken, so a constant confidence gets the overall risk. (reliable_vqa integrates by trapezoids from coverage 1/n
    instead and takes tied records in file order.)
    """
    c, y = paired(confidence, outcome)
    blocks = ties(c, 1.0 - y)
    losses = np.repeat(blocks.outcome / blocks.records, blocks.records.astype(np.intp))[::-1]
    return float(np.mean(np.cumsum(losses) / np.arange(1, c.size + 1)))


def e_aurc(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Excess AURC: AURC − that of the best possible ranking of the same outcomes, ≥ 0 (Geifman et al., ICLR 2019).

    The best ranking's area is computed for these n records, not by its limit r + (1 − r)·ln(1 − r), so a perfect
    ranking gets 0.
    """
    return aurc(confidence, outcome) - aurc(outcome, outcome)


def coverage_at_risk(confidence: npt.ArrayLike, outcome: npt.ArrayLike, risk: float) -> float:
    """Coverage at risk, C@r: the largest share of records that some threshold answers with a risk of at most r.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        risk: The bound r, in [0, 1].

    Returns:
        A fraction in [0, 1]; 0 if even the most confident records exceed the risk.
    """
    curve = risk_coverage(confidence, outcome)
    within = np.flatnonzero(curve.risk <= one_fraction("risk", risk) + _ROUNDING)
    return float(curve.coverage[within[-1]]) if within.size else 0.0


def threshold_at_risk(confidence: npt.ArrayLike, outcome: npt.ArrayLike, risk: float) -> float:
    """Lowest threshold whose risk on these records is at most `risk` (in [0, 1]); ∞, which answers nothing, if none is.

    Choose it on held-out records and read what it achieves elsewhere with `at_threshold`.
    """
    curve = risk_coverage(confidence, outcome)
    within = np.flatnonzero(curve.risk <= one_fraction("risk", risk) + _ROUNDING)
    return float(curve.threshold[within[-1]]) if within.size else float("inf")


def at_threshold(confidence: npt.ArrayLike, outcome: npt.ArrayLike, threshold: float) -> OperatingPoint:
    """Coverage and risk reached by a threshold chosen elsewhere.

    Raises:
        ValueError: Also if the threshold is NaN.
    """
    c, y = paired(confidence, outcome)
    answered = c >= _threshold(threshold)
    risk = 1.0 - float(y[answered].mean()) if answered.any() else float("nan")
    return OperatingPoint(float(answered.mean()), risk)


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
    earned = np.where(y > 0.0, y, -_cost(cost))
    return float(np.sum(earned, where=c >= _threshold(threshold)) / c.size)


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
    last = np.flatnonzero(earned >= best - _ROUNDING * max(1.0, abs(best)))[-1]
    return float(blocks.confidence[::-1][last])


def auroc(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Probability that a right answer has a higher confidence than a wrong one, equal confidences counting one half.

    A soft outcome counts as that fraction of a right answer and the rest of a wrong one. In [0, 1], 0.5 is chance;
    NaN if all outcomes are right or all are wrong, where it is undefined.
    """
    blocks = ties(*paired(confidence, outcome))
    right, wrong = blocks.outcome, blocks.records - blocks.outcome
    if right.sum() == 0.0 or wrong.sum() == 0.0:
        return float("nan")
    wrong_below = np.cumsum(wrong) - wrong / 2
    return float(right @ wrong_below / (right.sum() * wrong.sum()))


def aupr_error(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Average precision of finding errors by low confidence: Σ (recall step) · precision, without interpolation.

    A soft outcome counts as that fraction of a right answer and the rest of an error. In [0, 1]; a constant confidence
    gets the error rate. NaN if all outcomes are right or all are wrong.
    """
    blocks = ties(*paired(confidence, outcome))
    errors = blocks.records - blocks.outcome
    if errors.sum() == 0.0 or blocks.outcome.sum() == 0.0:
        return float("nan")
    precision = np.cumsum(errors) / np.cumsum(blocks.records)
    return float(errors @ precision / errors.sum())


def fpr_at_tpr(confidence: npt.ArrayLike, outcome: npt.ArrayLike, tpr: float = 0.95) -> float:
    """Smallest share of wrong answers accepted by a threshold that accepts at least `tpr` of the right ones.

    A soft outcome counts as that fraction of a right answer and the rest of a wrong one. In [0, 1], lower is better;
    NaN if all outcomes are right or all are wrong.

    Raises:
        ValueError: Also if `tpr` is not in [0, 1].
    """
    tpr = one_fraction("tpr", tpr)
    blocks = ties(*paired(confidence, outcome))
    right = np.cumsum(blocks.outcome[::-1])
    wrong = np.cumsum((blocks.records - blocks.outcome)[::-1])
    if right[-1] == 0.0 or wrong[-1] == 0.0:
        return float("nan")
    if tpr == 0.0:
        return 0.0
    first = np.flatnonzero(right / right[-1] >= tpr - _ROUNDING)[0]
    return float(wrong[first] / wrong[-1])


def _threshold(value: float) -> float:
    if np.isnan(value):
        raise ValueError("expected a threshold, got NaN")
    return value


def _cost(value: float) -> float:
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"expected a finite cost of at least 0, got {value}")
    return value
