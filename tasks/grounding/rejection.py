"""Rejection: whether a model's confidence separates expressions that match nothing from true ones.

Each true expression is asked beside a changed one that matches nothing in the picture
(`lmms_plugin.tasks.grounding.reworded`). A model should be less confident of the second, or give no box at all: an
answer without a box counts as confidence 0, because it is the plainest way to reject. Positions of boxes are not
scored.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lmms_plugin import metrics
from lmms_plugin.tasks.grounding import comprehension

mean, unfinished = comprehension.mean, comprehension.unfinished


class RejectionOutcome(NamedTuple):
    """Values of an answer that metrics need; short, because the log of samples repeats it for each metric.

    Attributes:
        pair: Id of the true expression.
        matches: 1 for the true expression, 0 for the changed one.
        confidence: Confidence in [0, 1].
    """

    pair: str
    matches: float
    confidence: float


def process_results(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """Record one answer's confidence.

    Args:
        doc: Document of `reworded.asked_both_ways`.
        results: Model's answer, with or without the trailer of `lmms_plugin.protocol.response`.
        estimator: Confidence estimator whose value the metrics use.

    Returns:
        One entry per metric. The entry of `box_rate` is the whole record, which thereby reaches the log of samples.
        Without a trailer (a model of another package) there is no confidence, and only the rates of boxes are present.
        An answer with a box for which the estimator has no value is left out and counts in `confidence_rate`, and so is
        one that ends inside its reasoning, which rejects nothing.
    """
    scored = comprehension.process_results(doc, results, estimator)
    found, unfinished_rate = scored["mean_iou"], scored["unfinished_rate"]
    matches, has_box = float(doc["matches"]), found["box"] is not None
    identity = {"image": found["image"], "id": found["id"]}
    record: dict[str, Any] = {
        **identity,
        "score": float(has_box),
        "pair": doc["pair"],
        "matches": matches,
        "expression": doc["expression"],
        "original_expression": doc["original_expression"],
        "change": doc.get("change"),
        "answer": found["answer"],
        "box": found["box"],
        **{name: found[name] for name in ("reasoning",) if name in found},
    }
    output: dict[str, Any] = {"box_rate": record, "shifted_rate": {"score": doc["shifted_rate"], **identity}}
    output["unfinished_rate"] = unfinished_rate
    if "reference" in found:
        # Positions are not scored, so nothing flips.
        record["reference"] = {name: value for name, value in found["reference"].items() if name != "score"}
        output |= {name: {"score": value, **identity} for name, value in record["reference"].items()}
    output["box_rate_true" if matches else "box_rate_changed"] = {"score": float(has_box), **identity}
    if "confidence" in found:
        # Probabilities of a refusal's words are not a confidence in a box; without an answer there is none.
        is_refusal = not has_box and not unfinished_rate["score"]
        record["confidence"] = dict.fromkeys(found["confidence"], 0.0) if is_refusal else found["confidence"]
        confidence = record["confidence"][estimator]
        output["confidence_rate"] = {"score": float(confidence is not None), **identity}
        if confidence is not None:
            output |= dict.fromkeys(REJECTION, RejectionOutcome(doc["pair"], matches, confidence))
    return output


def auroc(records: Sequence[RejectionOutcome]) -> float:
    """Return the probability that a true expression gets more confidence than one without a match; ties count half.

    NaN unless there are records of both kinds.
    """
    return _ranked(metrics.auroc, records)


def fpr_at_0_95(records: Sequence[RejectionOutcome]) -> float:
    """Return the accepted share of expressions without a match, at a threshold that accepts 95 % of the true ones.

    NaN unless there are records of both kinds.
    """
    return _ranked(metrics.fpr_at_tpr, records)


def _ranked(metric: Callable[..., float], records: Sequence[RejectionOutcome]) -> float:
    ordered = sorted(records)
    confidence = np.array([record.confidence for record in ordered])
    matches = np.array([record.matches for record in ordered])
    return metric(confidence, matches) if records else math.nan


def confidence_falls(records: Sequence[RejectionOutcome]) -> float:
    """Return the share of pairs whose changed expression got less confidence than the true one; ties count half.

    Pairs with a missing answer do not count; NaN without pairs.
    """
    pairs: defaultdict[str, dict[float, float]] = defaultdict(dict)
    for pair, matches, confidence in records:
        pairs[pair][matches] = confidence
    complete = [(sides[1.0], sides[0.0]) for sides in pairs.values() if len(sides) == 2]
    falls = [float(true > changed) + 0.5 * float(true == changed) for true, changed in complete]
    return math.fsum(falls) / len(falls) if falls else math.nan


REJECTION = ("rejection_auroc", "rejection_fpr@0.95", "confidence_falls")
"""Metrics of `RejectionOutcome`, by their names in the results table."""


# Functions for a task's YAML.
scored_by_coordinate_mean = partial(process_results, estimator="coordinate_mean")
