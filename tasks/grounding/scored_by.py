"""Scoring functions by confidence estimator, for a task's YAML to name.

`process_results: !function lmms_plugin.tasks.grounding.scored_by.coordinate_mean` scores grounding answers and takes
the calibration metrics from the estimator `coordinate_mean`. There is one for every name in
`lmms_plugin.confidence.estimators.ESTIMATORS`.
"""

from functools import partial

from lmms_plugin.tasks.grounding.comprehension import process_results

joint = partial(process_results, estimator="joint")
mean = partial(process_results, estimator="mean")
min = partial(process_results, estimator="min")
first = partial(process_results, estimator="first")
coordinate_joint = partial(process_results, estimator="coordinate_joint")
coordinate_mean = partial(process_results, estimator="coordinate_mean")
coordinate_min = partial(process_results, estimator="coordinate_min")
coordinate_first = partial(process_results, estimator="coordinate_first")
coordinate_place = partial(process_results, estimator="coordinate_place")
coordinate_leading = partial(process_results, estimator="coordinate_leading")
expected_iou = partial(process_results, estimator="expected_iou")
agreement = partial(process_results, estimator="agreement")
agreement_pairwise = partial(process_results, estimator="agreement_pairwise")
verbalised = partial(process_results, estimator="verbalised")
