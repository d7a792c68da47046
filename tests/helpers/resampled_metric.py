"""Exact reference for statistics of resamples."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics.bootstrap import Clusters

Floats = npt.NDArray[np.float64]


class ResampledMetric:
    """Any metric of records as a `Statistic`, by repeating the records of each cluster as often as it was drawn.

    Exact for every metric and as slow as calling it once per resample.

    Args:
        metric: Function of the arrays, each of shape (m,), that returns a float.
        arrays: Arrays, each of shape (n,).
        clusters: Clusters of the n records.
        name: Name of the number.
    """

    def __init__(
        self, metric: Callable[..., float], arrays: Sequence[npt.ArrayLike], clusters: Clusters, name: str = "metric"
    ) -> None:
        self.names: tuple[str, ...] = (name,)
        self._metric, self._clusters = metric, clusters
        self._arrays = [np.asarray(array) for array in arrays]
        for array in self._arrays:
            if array.shape != clusters.index.shape:
                raise ValueError(f"expected arrays of shape {clusters.index.shape}, got {array.shape}")

    def __call__(self, counts: Floats) -> Floats:
        """Return values, shape (resamples, 1); NaN for a resample without records."""
        return np.array([[self._one(row)] for row in counts])

    def _one(self, counts: Floats) -> float:
        times = counts[self._clusters.index].astype(np.intp)
        if not times.any():
            return float("nan")
        return self._metric(*(np.repeat(array, times) for array in self._arrays))
