"""Interval method of each metric."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from lmms_plugin.metrics._inputs import Floats
from lmms_plugin.metrics.bootstrap import Interval, Method, interval

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "squared_ce": "centred",
        **dict.fromkeys(
            ("ece", "adaptive_ece", "mce", "smooth_ece", "laece_0", "brier_reliability"),
            "basic",
        ),
    }
)
"""Interval method of each metric that does not use percentiles.

On simulated data of 150 and 1,000 images a nominal 90 % interval of an ECE of 0.05 to 0.12 covers it in 78 to 85 % of
cases (by percentiles: 29 to 90 %). Near 0 no interval is reliable: compare with `ece_floor`. The interval of MCE is
always rough.
"""


def between(metric: str, value: float, resampled: Floats, level: float) -> Interval:
    """Return the interval of a metric of one run, within the metric's range.

    Args:
        metric: Name of the metric.
        value: Value on the data themselves.
        resampled: Values on the resamples, shape (resamples,).
        level: Confidence level.
    """
    method = METHODS.get(metric, "percentile")
    low, high = interval(value, resampled, level=level, method=method)
    # Quantiles of a metric are values of it; other interval ends may lie outside its range.
    lowest = {"basic": 0.0, "centred": -1.0}.get(method)
    if lowest is not None:
        low, high = np.clip((low, high), lowest, 1.0).tolist()
    return Interval(low, high)
