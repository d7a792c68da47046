"""Scoring functions by confidence estimator, for a task's YAML to name.

`process_results: !function lmms_plugin.tasks.grounding.scored_by.coordinate_mean` scores grounding answers and takes the
calibration metrics from the estimator `coordinate_mean`; every name in `lmms_plugin.confidence.estimators.ESTIMATORS` works.
"""

from functools import partial
from typing import Any

from lmms_plugin.confidence.estimators import ESTIMATORS
from lmms_plugin.tasks.grounding.comprehension import process_results


def __getattr__(name: str) -> Any:
    if name not in ESTIMATORS:
        raise AttributeError(f"{name!r} is no confidence estimator; known: {', '.join(ESTIMATORS)}")
    return partial(process_results, estimator=name)
