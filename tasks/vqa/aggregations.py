"""The reliability metrics of a VQA task as lmms-eval's aggregations, by the name in the results table.

A name with dots cannot stand after lmms-eval's `!function`, so `coverage@0.01` is called `coverage_at_0_01` there. Each
takes the records of all processes and is NaN where nothing can be computed from them (no held-out question answered
yet), so that a group's mean says that a part of it is missing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin import metrics
from lmms_plugin.metrics.ranked import RISKS
from lmms_plugin.metrics.selective import COSTS, HELD_OUT, REPORTED
from lmms_plugin.tasks.grounding.aggregations import OF_OUTCOME


class VqaOutcome(NamedTuple):
    """What metrics need of an answer; short, because the log of samples repeats it for each of them.

    Attributes:
        part: of the photographs, `val` or `test`.
        confidence: in [0, 1].
        accuracy: VQA accuracy, in [0, 1].
    """

    part: str
    confidence: float
    accuracy: float


class Columns(NamedTuple):
    """Records as arrays of shape (n,), in an order that does not depend on how processes shared the work."""

    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]


Metric = Callable[..., float]
Aggregation = Callable[[Sequence[VqaOutcome]], float]


def _columns(records: Sequence[VqaOutcome], part: str) -> Columns:
    pairs = sorted((confidence, accuracy) for owner, confidence, accuracy in records if owner == part)
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return Columns(array[:, 0], array[:, 1])


def _on_test(metric: Metric, records: Sequence[VqaOutcome]) -> float:
    test = _columns(records, REPORTED)
    return metric(*test) if test.confidence.size else math.nan


def _with_held_out(metric: Callable[[Columns, Columns], float], records: Sequence[VqaOutcome]) -> float:
    held_out, test = _columns(records, HELD_OUT), _columns(records, REPORTED)
    return metric(held_out, test) if held_out.confidence.size and test.confidence.size else math.nan


def _effective_reliability(cost: float, held_out: Columns, test: Columns) -> float:
    threshold = metrics.threshold_at_cost(*held_out, cost)
    return metrics.effective_reliability(*test, cost, threshold)


def _answered(cost: float, held_out: Columns, test: Columns) -> float:
    return metrics.at_threshold(*test, metrics.threshold_at_cost(*held_out, cost)).coverage


def _achieved_risk(risk: float, held_out: Columns, test: Columns) -> float:
    return metrics.at_threshold(*test, metrics.threshold_at_risk(*held_out, risk)).risk


def _held_out_aggregations() -> Iterator[tuple[str, Aggregation]]:
    for cost in COSTS:
        yield f"phi@{cost}", partial(_with_held_out, partial(_effective_reliability, cost))
        yield f"phi_coverage@{cost}", partial(_with_held_out, partial(_answered, cost))
    for risk in RISKS:
        yield f"achieved_risk@{risk:g}", partial(_with_held_out, partial(_achieved_risk, risk))


ON_TEST: Mapping[str, Aggregation] = MappingProxyType(
    {name: partial(_on_test, metric) for name, metric in OF_OUTCOME.items()}
)
"""Metrics of the part `test` alone."""

BESIDE = ("ece", "auroc", "aurc", "coverage@0.01", "coverage@0.05")
"""Those of them that estimators in need of more than log-probabilities get, beside the task's own: `ece_selector`."""

NEEDS_HELD_OUT: Mapping[str, Aggregation] = MappingProxyType(dict(_held_out_aggregations()))
"""Metrics at a threshold chosen on the part `val`: effective reliability Φ_c and the share of questions it answers, and
the risk where the threshold was to keep one."""


def accuracy(records: Sequence[Mapping[str, Any]]) -> float:
    """Mean VQA accuracy of the records that are not held out."""
    return mean([record for record in records if "score" in record])


def mean(records: Sequence[Mapping[str, Any]]) -> float:
    """Mean score, exactly rounded; NaN without records."""
    return math.fsum(record["score"] for record in records) / len(records) if records else math.nan


# For a task's YAML to name.
ece = ON_TEST["ece"]
ece_floor = ON_TEST["ece_floor"]
ace = ON_TEST["ace"]
mce = ON_TEST["mce"]
smooth_ece = ON_TEST["smooth_ece"]
brier = ON_TEST["brier"]
nll = ON_TEST["nll"]
auroc = ON_TEST["auroc"]
aupr_error = ON_TEST["aupr_error"]
fpr_at_0_95 = ON_TEST["fpr@0.95"]
aurc = ON_TEST["aurc"]
e_aurc = ON_TEST["e_aurc"]
coverage_at_0_005 = ON_TEST["coverage@0.005"]
coverage_at_0_01 = ON_TEST["coverage@0.01"]
coverage_at_0_05 = ON_TEST["coverage@0.05"]
coverage_at_0_1 = ON_TEST["coverage@0.1"]
coverage_at_0_2 = ON_TEST["coverage@0.2"]
phi_at_1 = NEEDS_HELD_OUT["phi@1"]
phi_coverage_at_1 = NEEDS_HELD_OUT["phi_coverage@1"]
phi_at_10 = NEEDS_HELD_OUT["phi@10"]
phi_coverage_at_10 = NEEDS_HELD_OUT["phi_coverage@10"]
phi_at_100 = NEEDS_HELD_OUT["phi@100"]
phi_coverage_at_100 = NEEDS_HELD_OUT["phi_coverage@100"]
achieved_risk_at_0_005 = NEEDS_HELD_OUT["achieved_risk@0.005"]
achieved_risk_at_0_01 = NEEDS_HELD_OUT["achieved_risk@0.01"]
achieved_risk_at_0_05 = NEEDS_HELD_OUT["achieved_risk@0.05"]
achieved_risk_at_0_1 = NEEDS_HELD_OUT["achieved_risk@0.1"]
achieved_risk_at_0_2 = NEEDS_HELD_OUT["achieved_risk@0.2"]
