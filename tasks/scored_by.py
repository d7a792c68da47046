"""Scoring functions by confidence estimator, for a task's YAML to name.

`process_results: !function lmms_plugin.tasks.scored_by.coordinate_mean` scores grounding answers and takes the
calibration metrics from the estimator `coordinate_mean`; every name in `lmms_plugin.confidence.ESTIMATORS` works.
"""

from functools import partial
from typing import Any

from lmms_plugin.confidence import ESTIMATORS
from lmms_plugin.tasks.grounding import process_results


def __getattr__(name: str) -> Any:
    if name not in ESTIMATORS:
        raise AttributeError(f"{name!r} is no confidence estimator; known: {', '.join(ESTIMATORS)}")
    return partial(process_results, estimator=name)
