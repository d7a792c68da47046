"""The metrics as functions of how often each cluster of records counts, for `lmms_plugin.metrics.bootstrap`.

Those here are made of sums over records or bins, which are linear in the counts: all resamples are one product with a
sparse matrix. `lmms_plugin.metrics.ranked` has those that depend on the order of confidences. With whole counts each
equals the metric of the same name on the records repeated that often.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array

from lmms_plugin.metrics._inputs import Floats, fractions, paired
from lmms_plugin.metrics.bootstrap import Clusters, Method
from lmms_plugin.metrics.calibration import (
    DEFAULT_BINS,
    SMOOTHING_CELLS,
    equal_width_index,
    smooth_error,
    smoothing_cells,
)
from lmms_plugin.metrics.localisation import IOU_THRESHOLDS, LAECE_BINS

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "squared_ce": "centred",
        **dict.fromkeys(("ece", "adaptive_ece", "mce", "smooth_ece", "laece_0", "brier_reliability"), "basic"),
    }
)
"""How the interval of a metric is made where it is not by percentiles.

On simulated data of 150 and 1,000 images a nominal 90 % interval of an ECE of 0.05 to 0.12 holds it in 78 to 85 % of
cases (by percentiles: 29 to 90 %). Near 0 no interval is to be trusted: compare with `ece_floor`. That of MCE is rough
always.
"""

_NLL_CLIP = 1e-6


class _Sums:
    """Sums of values over cells as a function of cluster counts: (resamples, clusters) → (resamples, cells)."""

    def __init__(self, cells: npt.NDArray[np.intp], values: Floats, clusters: Clusters, count: int) -> None:
        # By columns, so that counts are read once, in order, and the few sums stay in cache.
        self._matrix = csc_array((values, (cells, clusters.index)), shape=(count, clusters.count))

    def __call__(self, counts: Floats) -> Floats:
        sums: Floats = (self._matrix @ np.ascontiguousarray(counts.T)).T
        return sums


class Means:
    """Means of values per record, such as accuracy and mean IoU.

    Args:
        values: Name → shape (n,), in [0, 1].
        clusters: Of the n records.
    """

    def __init__(self, values: Mapping[str, npt.ArrayLike], clusters: Clusters) -> None:
        self.names = tuple(values)
        rows = [fractions(name, value) for name, value in values.items()] + [np.ones(clusters.index.size)]
        self._sums = _stacked(rows, clusters)

    def __call__(self, counts: Floats) -> Floats:
        """Means, shape (resamples, names); NaN for a resample without records."""
        sums = self._sums(counts)
        with np.errstate(invalid="ignore"):
            means: Floats = sums[:, :-1] / sums[:, -1:]
        return means


class Binned:
    """Calibration metrics over equal-width bins, and scores that are means over records.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        clusters: Of the n records.
        n_bins: Bins of ECE, MCE and the parts of the Brier score.
    """

    names = (
        "ece",
        "mce",
        "squared_ce",
        "brier",
        "brier_reliability",
        "brier_resolution",
        "brier_uncertainty",
        "brier_within_bin",
        "nll",
    )

    def __init__(
        self, confidence: npt.ArrayLike, outcome: npt.ArrayLike, clusters: Clusters, n_bins: int = DEFAULT_BINS
    ) -> None:
        c, y = paired(confidence, outcome)
        cells, one = equal_width_index(c, n_bins), np.ones_like(c)
        rows = (one, c, y, (c - y) ** 2)
        index = np.concatenate([cells + k * n_bins for k in range(len(rows))])
        repeated = Clusters(np.tile(clusters.index, len(rows)), clusters.count)
        self._bins = _Sums(index, np.concatenate(rows), repeated, len(rows) * n_bins)
        p = np.clip(c, _NLL_CLIP, 1.0 - _NLL_CLIP)
        self._scores = _stacked([y**2, -(y * np.log(p) + (1.0 - y) * np.log1p(-p))], clusters)
        self._n_bins = n_bins

    def __call__(self, counts: Floats) -> Floats:
        """Values of `names`, shape (resamples, names)."""
        n, c, y, square = np.moveaxis(self._bins(counts).reshape(len(counts), 4, self._n_bins), 1, 0)
        y_square, nll = self._scores(counts).T
        with np.errstate(invalid="ignore", divide="ignore"):
            total, filled = n.sum(axis=1), np.maximum(n, 1)
            share, mean_y = n / total[:, None], y.sum(axis=1) / total
            gap = (c - y) / filled
            reliability = np.sum(share * gap**2, axis=1)
            resolution = np.sum(share * (y / filled - mean_y[:, None]) ** 2, axis=1)
            uncertainty = y_square / total - mean_y**2
            brier = square.sum(axis=1) / total
            variance = (square - n * gap**2) / np.maximum(n - 1, 1) / filled
            several = np.where(n >= 2, n, 0.0)
            values = (
                np.sum(share * np.abs(gap), axis=1),
                np.abs(gap).max(axis=1),
                np.where(several.any(axis=1), np.sum(several * (gap**2 - variance), axis=1) / total, np.nan),
                brier,
                reliability,
                resolution,
                uncertainty,
                brier - reliability + resolution - uncertainty,
                nll / total,
            )
            return np.where(total[:, None] > 0, np.stack(values, axis=1), np.nan)


class Localised:
    """Metrics of confidence against IoU: LaECE₀, LaACE₀ and the mean ECE over IoU thresholds.

    Args:
        confidence: Shape (n,), in [0, 1].
        iou: Shape (n,), in [0, 1].
        clusters: Of the n records.
    """

    names = ("laece_0", "laace_0", "mean_ece_over_iou")

    def __init__(self, confidence: npt.ArrayLike, iou: npt.ArrayLike, clusters: Clusters) -> None:
        c, u = paired(confidence, iou)
        self._levels = len(IOU_THRESHOLDS) + 1
        reached = np.searchsorted(IOU_THRESHOLDS, u, side="right")
        cells = equal_width_index(c, DEFAULT_BINS)
        self._reached = _Sums(cells * self._levels + reached, np.ones_like(c), clusters, DEFAULT_BINS * self._levels)
        self._confidence = _Sums(cells, c, clusters, DEFAULT_BINS)
        self._gaps = _Sums(equal_width_index(c, LAECE_BINS), c - u, clusters, LAECE_BINS)
        self._distance = _stacked([np.abs(c - u)], clusters)

    def __call__(self, counts: Floats) -> Floats:
        """Values of `names`, shape (resamples, names)."""
        reached = self._reached(counts).reshape(len(counts), DEFAULT_BINS, self._levels)
        total = reached.sum(axis=(1, 2))
        # At threshold k those are right that reached level k + 1 or a higher one.
        right = np.cumsum(reached[..., ::-1], axis=2)[..., ::-1][..., 1:]
        over_thresholds = np.abs(self._confidence(counts)[..., None] - right).sum(axis=1).mean(axis=1)
        errors = np.abs(self._gaps(counts)).sum(axis=1), self._distance(counts)[:, 0], over_thresholds
        with np.errstate(invalid="ignore"):
            values: Floats = np.stack(errors, axis=1) / total[:, None]
        return values


class Smooth:
    """Smooth ECE.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        clusters: Of the n records.
    """

    names = ("smooth_ece",)

    def __init__(self, confidence: npt.ArrayLike, outcome: npt.ArrayLike, clusters: Clusters) -> None:
        c, y = paired(confidence, outcome)
        cells, shares = smoothing_cells(c)
        twice = Clusters(np.tile(clusters.index, 2), clusters.count)
        self._mass = _Sums(cells.ravel(), (shares * (c - y)).ravel(), twice, SMOOTHING_CELLS)
        self._records = _stacked([np.ones_like(c)], clusters)

    def __call__(self, counts: Floats) -> Floats:
        """Smooth ECE, shape (resamples, 1); NaN for a resample without records."""
        totals = self._records(counts)[:, 0]
        pairs = zip(self._mass(counts), totals, strict=True)
        return np.array([[smooth_error(mass / total) if total else np.nan] for mass, total in pairs])


class Gains:
    """What a threshold chosen elsewhere does here: coverage and risk, and effective reliability for each cost.

    Args:
        confidence: Shape (n,), in [0, 1].
        outcome: Shape (n,), in [0, 1].
        clusters: Of the n records.
        at_risk: Risk r → the threshold chosen for it; gives `achieved_coverage@<r>` and `achieved_risk@<r>`,
            the latter NaN if nothing is answered.
        at_cost: Cost c → the threshold chosen for it; gives `phi@<c>`.
    """

    def __init__(
        self,
        confidence: npt.ArrayLike,
        outcome: npt.ArrayLike,
        clusters: Clusters,
        at_risk: Mapping[float, float],
        at_cost: Mapping[float, float],
    ) -> None:
        c, y = paired(confidence, outcome)
        coverage = tuple(f"achieved_coverage@{risk:g}" for risk in at_risk)
        achieved = tuple(f"achieved_risk@{risk:g}" for risk in at_risk)
        self.names = (*coverage, *achieved, *(f"phi@{cost:g}" for cost in at_cost))
        answered = [(c >= threshold).astype(np.float64) for threshold in at_risk.values()]
        earned = [np.where(c >= threshold, np.where(y > 0, y, -cost), 0.0) for cost, threshold in at_cost.items()]
        rows = [np.ones_like(c), *answered, *(mask * (1.0 - y) for mask in answered), *earned]
        self._sums, self._risks = _stacked(rows, clusters), len(answered)

    def __call__(self, counts: Floats) -> Floats:
        """Values of `names`, shape (resamples, names)."""
        sums, k = self._sums(counts), self._risks
        total, answered, lost, earned = np.split(sums, (1, k + 1, 2 * k + 1), axis=1)
        with np.errstate(invalid="ignore"):
            return np.concatenate((answered / total, lost / answered, earned / total), axis=1)


def _stacked(rows: Sequence[Floats], clusters: Clusters) -> _Sums:
    cells = np.repeat(np.arange(len(rows)), clusters.index.size)
    repeated = Clusters(np.tile(clusters.index, len(rows)), clusters.count)
    return _Sums(cells, np.concatenate(rows), repeated, len(rows))
