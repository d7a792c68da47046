"""Sums and means over records as functions of how often each cluster counts.

Metrics that consist of sums over records or bins are linear in the counts: all resamples are one product with a sparse
matrix. The metrics themselves are in `lmms_plugin.metrics.calibration`, `localisation` and `selective`;
`lmms_plugin.metrics.ranked` has those that depend on the order of confidences. With integer counts each equals the
metric on the records repeated that often, and the metric of plain records is that of one cluster that counts once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array

from lmms_plugin.metrics._inputs import Floats, fractions
from lmms_plugin.metrics.bootstrap import Clusters, Statistic


class Sums:
    """Sums of values over cells as a function of cluster counts: (resamples, clusters) → (resamples, cells).

    Args:
        cells: Cell of each value, in [0, count), shape (n,).
        values: Values, shape (n,).
        clusters: Clusters of the n values.
        count: Number of cells.
    """

    def __init__(self, cells: npt.NDArray[np.intp], values: Floats, clusters: Clusters, count: int) -> None:
        # In the order of the records, so that sums on the data themselves do not depend on the clusters.
        self._whole: Floats = np.bincount(cells, values, minlength=count).astype(np.float64)
        # By columns, so that counts are read once, in order, and the few sums stay in cache. With one cluster scipy
        # would sort what only needs to be summed.
        several = clusters.count > 1
        self._matrix: Any = (
            csc_array((values, (cells, clusters.index)), shape=(count, clusters.count))
            if several
            else self._whole[:, None]
        )

    @classmethod
    def stacked(cls, rows: Sequence[Floats], clusters: Clusters) -> "Sums":
        """Return sums of several values of each record, one cell for each."""
        cells = np.repeat(np.arange(len(rows)), clusters.index.size)
        sums = cls(cells, np.concatenate(rows), clusters.repeated(len(rows)), len(rows))
        # Exactly rounded, like the means of the table of results.
        sums._whole = np.array([_exact(row) for row in rows])
        return sums

    def by_cluster(self) -> Floats:
        """Return the sums of each cluster, shape (clusters, cells)."""
        matrix = self._matrix if isinstance(self._matrix, np.ndarray) else self._matrix.toarray()
        return np.asarray(matrix.T)

    def __call__(self, counts: Floats) -> Floats:
        """Return sums, shape (resamples, cells)."""
        if len(counts) == 1 and np.all(counts == 1.0):
            return self._whole[None]
        sums: Floats = (self._matrix @ np.ascontiguousarray(counts.T)).T
        return sums


def _exact(values: Floats) -> float:
    # Sums of whole numbers are exact in any order, and most rows are of zeros and ones.
    whole = np.array_equal(values, np.rint(values)) and np.abs(values).sum() < 2.0**53
    return float(values.sum()) if whole else math.fsum(values.tolist())


class Means:
    """Means of values per record, such as accuracy and mean IoU.

    Args:
        values: Name → values in [0, 1], shape (n,).
        clusters: Clusters of the n records.
    """

    def __init__(self, values: Mapping[str, npt.ArrayLike], clusters: Clusters) -> None:
        self.names = tuple(values)
        rows = [fractions(name, value) for name, value in values.items()] + [np.ones(clusters.index.size)]
        self._sums = Sums.stacked(rows, clusters)
        self.present = clusters.present

    def __call__(self, counts: Floats) -> Floats:
        """Return means, shape (resamples, names); NaN for a resample without records."""
        sums = self._sums(counts)
        with np.errstate(invalid="ignore"):
            means: Floats = sums[:, :-1] / sums[:, -1:]
        return means

    def parts(self) -> Floats:
        """Return what each cluster adds to the means, shape (clusters, names)."""
        sums = self._sums.by_cluster()
        return np.asarray(sums[:, :-1] / max(sums[:, -1].sum(), 1.0))


class KnownMeans:
    """Means of numbers of any range over the records that have them, such as divergences in nats.

    Args:
        values: Name → numbers, NaN for a record without one, shape (n,).
        clusters: Clusters of the n records.

    Raises:
        ValueError: A number is infinite.
    """

    def __init__(self, values: Mapping[str, npt.ArrayLike], clusters: Clusters) -> None:
        self.names = tuple(values)
        rows = [np.asarray(value, np.float64) for value in values.values()]
        if infinite := next((name for name, row in zip(self.names, rows, strict=True) if np.isinf(row).any()), None):
            raise ValueError(f"expected finite numbers as {infinite}, got an infinite one")
        known = [(~np.isnan(row)).astype(np.float64) for row in rows]
        self._sums = Sums.stacked([*(np.nan_to_num(row, nan=0.0) for row in rows), *known], clusters)

    def __call__(self, counts: Floats) -> Floats:
        """Return means, shape (resamples, names); NaN for a resample in which no record has the number."""
        sums = self._sums(counts)
        with np.errstate(invalid="ignore"):
            means: Floats = sums[:, : len(self.names)] / sums[:, len(self.names) :]
        return means


class ClusterMean:
    """Mean of one score for each cluster, of any range: CIDEr ends at 10.

    Args:
        scores: Score of each cluster, finite, shape (clusters,).

    Raises:
        ValueError: The scores have another shape, or one is not finite.
    """

    names = ("mean",)

    def __init__(self, scores: npt.ArrayLike) -> None:
        self._scores = np.asarray(scores, np.float64)
        if self._scores.ndim != 1 or not np.isfinite(self._scores).all():
            raise ValueError(f"expected finite scores of shape (n,), got shape {self._scores.shape}")

    def __call__(self, counts: Floats) -> Floats:
        """Return means, shape (resamples, 1)."""
        # Row by row: a product of matrices sums in an order that depends on the number of resamples.
        rows = np.ascontiguousarray(counts)
        return np.array([[row @ self._scores / row.sum()] for row in rows])


def plain(statistic: Statistic) -> dict[str, float]:
    """Return the values of a statistic of one cluster by name: those of the plain records."""
    return dict(zip(statistic.names, statistic(np.ones((1, 1)))[0].tolist(), strict=True))
