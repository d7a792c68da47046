"""Calibration metrics of a grounding task as lmms-eval aggregations, by their names in the results table.

lmms-eval's `!function` does not accept a name with dots, so `coverage@0.01` is called `coverage_at_0_01` there. Each
metric is NaN where it cannot be computed from the records, so that a group's mean shows that a part of it is missing.
Metrics at a threshold chosen on held-out images are left to `lmms-plugin metrics`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin import metrics
from lmms_plugin.metrics.bootstrap import Clusters
from lmms_plugin.metrics.divergence import FlipsPredicted
from lmms_plugin.metrics.ranked import RISKS
from lmms_plugin.metrics.sums import plain


class GroundingOutcome(NamedTuple):
    """Values of an answer that metrics need; short, because the log of samples repeats it for each metric.

    Attributes:
        id: Id of the expression.
        confidence: Confidence in [0, 1]; None where the estimator has no value.
        correct: 1 for an IoU of at least 0.5, else 0.
        iou: IoU in [0, 1].
    """

    id: str
    confidence: float | None
    correct: float
    iou: float


class FlipOutcome(NamedTuple):
    """Distance of an answer from the reference, and whether it flipped between right and wrong.

    Attributes:
        id: Id of the document.
        distance: Measure of distance; larger where a flip is expected.
        flipped: 1 where one of both models is right and the other wrong, else 0.
    """

    id: str
    distance: float
    flipped: float


Metric = Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64]], float]
Aggregation = Callable[[Sequence[GroundingOutcome]], float]


def _over(target: str, metric: Metric, records: Sequence[GroundingOutcome]) -> float:
    # Processes deliver records in varying order; sums of floats must not depend on it.
    ordered = sorted((record for record in records if record.confidence is not None), key=lambda record: record.id)
    if not ordered:
        return math.nan
    return metric(np.array([r.confidence for r in ordered]), np.array([getattr(r, target) for r in ordered]))


OF_OUTCOME: Mapping[str, Metric] = MappingProxyType(
    {
        "ece": metrics.ece,
        "ece_floor": lambda confidence, _: metrics.ece_floor(confidence).mean,
        "ace": metrics.adaptive_ece,
        "mce": metrics.mce,
        "smooth_ece": metrics.smooth_ece,
        "brier": metrics.brier,
        "nll": metrics.nll,
        "auroc": metrics.auroc,
        "aupr_error": metrics.aupr_error,
        "fpr@0.95": metrics.fpr_at_tpr,
        "aurc": metrics.aurc,
        "e_aurc": metrics.e_aurc,
        **{f"coverage@{risk:g}": partial(metrics.coverage_at_risk, risk=risk) for risk in RISKS},
    }
)
"""Metrics of confidence against outcomes: boxes at an IoU of 0.5, or questions by their VQA accuracy."""

OF_IOU: Mapping[str, Metric] = MappingProxyType(
    {"laece_0": metrics.laece_0, "laace_0": metrics.laace_0, "mean_ece_over_iou": metrics.mean_ece_over_iou}
)
"""Metrics of confidence against IoU."""

CALIBRATION: Mapping[str, Aggregation] = MappingProxyType(
    {name: partial(_over, "correct", metric) for name, metric in OF_OUTCOME.items()}
    | {name: partial(_over, "iou", metric) for name, metric in OF_IOU.items()}
)
"""Every calibration metric of a grounding task."""

BESIDE = ("ece", "auroc", "aurc")
"""Metrics of estimators that need more than log-probabilities, beside the task's own: `ece_expected_iou`."""


def flips_predicted(records: Sequence[FlipOutcome]) -> float:
    """Return the share of flipped answers among as many of the largest distance; NaN where nothing flipped."""
    ordered = sorted(records)
    if not ordered:
        return math.nan
    distance, flipped = [record.distance for record in ordered], [record.flipped for record in ordered]
    return plain(FlipsPredicted(distance, flipped, Clusters.one(len(ordered))))["flips_predicted"]


# Names for a task's YAML.
ece = CALIBRATION["ece"]
ece_floor = CALIBRATION["ece_floor"]
ace = CALIBRATION["ace"]
mce = CALIBRATION["mce"]
smooth_ece = CALIBRATION["smooth_ece"]
brier = CALIBRATION["brier"]
nll = CALIBRATION["nll"]
auroc = CALIBRATION["auroc"]
aupr_error = CALIBRATION["aupr_error"]
fpr_at_0_95 = CALIBRATION["fpr@0.95"]
aurc = CALIBRATION["aurc"]
e_aurc = CALIBRATION["e_aurc"]
coverage_at_0_005 = CALIBRATION["coverage@0.005"]
coverage_at_0_01 = CALIBRATION["coverage@0.01"]
coverage_at_0_05 = CALIBRATION["coverage@0.05"]
coverage_at_0_1 = CALIBRATION["coverage@0.1"]
coverage_at_0_2 = CALIBRATION["coverage@0.2"]
laece_0 = CALIBRATION["laece_0"]
laace_0 = CALIBRATION["laace_0"]
mean_ece_over_iou = CALIBRATION["mean_ece_over_iou"]
