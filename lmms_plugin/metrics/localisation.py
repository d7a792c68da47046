"""Localisation: overlap of one predicted box per record with the true one, and its relation to confidence.

`iou` has shape (n,) with values in [0, 1]; an answer without a box has IoU 0, so it counts as wrong. `confidence` has
the same shape and range. All functions raise ValueError if arrays differ in length, are empty, are not
one-dimensional, or hold NaN or a value outside [0, 1].
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics._inputs import Floats, fractions, one_fraction, paired, positive_int
from lmms_plugin.metrics.bins import DEFAULT_BINS, equal_width_index
from lmms_plugin.metrics.bootstrap import Clusters
from lmms_plugin.metrics.sums import Sums, plain

IOU_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
"""0.50, 0.55, … 0.95: the thresholds of COCO's mean average precision."""

LAECE_BINS = 25
"""Number of bins of LaECE (Oksuz et al., CVPR 2023)."""


def acc_at(iou: npt.ArrayLike, threshold: float = 0.5) -> float:
    """Share of records whose IoU is at least `threshold` (in [0, 1]): Acc@0.5 and its kin."""
    return float(np.mean(fractions("iou", iou) >= one_fraction("threshold", threshold)))


def mean_iou(iou: npt.ArrayLike) -> float:
    """Mean IoU, in [0, 1]."""
    return float(np.mean(fractions("iou", iou)))


def laece_0(confidence: npt.ArrayLike, iou: npt.ArrayLike, n_bins: int = LAECE_BINS) -> float:
    """LaECE₀: calibration error of confidence read as the expected IoU, Σ_b (n_b / n) · |mean confidence − mean IoU|.

    Kuzucu et al., ECCV 2024. With one box per record nothing is matched and every box counts, so it is the ECE against
    IoU.
    """
    return _localised(confidence, iou, laece_bins=n_bins)["laece_0"]


def laace_0(confidence: npt.ArrayLike, iou: npt.ArrayLike) -> float:
    """LaACE₀: mean of |confidence − IoU|, LaECE₀ with every record its own bin; in [0, 1] (Kuzucu et al. 2024)."""
    return _localised(confidence, iou)["laace_0"]


def mean_ece_over_iou(
    confidence: npt.ArrayLike,
    iou: npt.ArrayLike,
    thresholds: tuple[float, ...] = IOU_THRESHOLDS,
    n_bins: int = DEFAULT_BINS,
) -> float:
    """Mean of the ECE of IoU ≥ t over IoU thresholds t, in [0, 1].

    No single confidence can be calibrated at every threshold, so it has a floor above 0; compare models by it, not
    with 0.

    Raises:
        ValueError: Also if there are no thresholds or one is outside [0, 1].
    """
    return _localised(confidence, iou, thresholds=thresholds, n_bins=n_bins)["mean_ece_over_iou"]


class Localised:
    """Metrics of confidence against IoU as a `Statistic`: LaECE₀, LaACE₀ and the mean ECE over IoU thresholds.

    Args:
        confidence: Shape (n,), in [0, 1].
        iou: Shape (n,), in [0, 1].
        clusters: Clusters of the n records.
        thresholds: IoU thresholds of the mean ECE, in [0, 1], at least one.
        n_bins: Number of bins of the mean ECE.
        laece_bins: Number of bins of LaECE₀.

    Raises:
        ValueError: An array or number is invalid.
    """

    names = ("laece_0", "laace_0", "mean_ece_over_iou")

    def __init__(
        self,
        confidence: npt.ArrayLike,
        iou: npt.ArrayLike,
        clusters: Clusters,
        *,
        thresholds: npt.ArrayLike = IOU_THRESHOLDS,
        n_bins: int = DEFAULT_BINS,
        laece_bins: int = LAECE_BINS,
    ) -> None:
        c, u = paired(confidence, iou)
        levels = np.sort(fractions("thresholds", thresholds))
        self._n_bins, self._levels = positive_int("n_bins", n_bins), levels.size + 1
        reached = np.searchsorted(levels, u, side="right")
        cells = equal_width_index(c, n_bins)
        self._reached = Sums(cells * self._levels + reached, np.ones_like(c), clusters, n_bins * self._levels)
        self._confidence = Sums(cells, c, clusters, n_bins)
        self._gaps = Sums(equal_width_index(c, positive_int("laece_bins", laece_bins)), c - u, clusters, laece_bins)
        self._distance = Sums.stacked([np.abs(c - u)], clusters)

    def __call__(self, counts: Floats) -> Floats:
        """Return the values of `names`, shape (resamples, names)."""
        reached = self._reached(counts).reshape(len(counts), self._n_bins, self._levels).swapaxes(1, 2)
        records = reached.sum(axis=1)
        total = records.sum(axis=1)
        # Right at threshold k are records that reached level k + 1 or a higher one.
        right = np.cumsum(reached[:, ::-1], axis=1)[:, ::-1][:, 1:]
        with np.errstate(invalid="ignore"):
            share = records / total[:, None]
            gaps = np.abs((self._confidence(counts)[:, None] - right) / np.maximum(records, 1)[:, None])
            over_thresholds = np.ascontiguousarray(share[:, None] * gaps).sum(axis=2).mean(axis=1)
            errors = np.abs(self._gaps(counts)).sum(axis=1), self._distance(counts)[:, 0]
            return np.stack((*(error / total for error in errors), over_thresholds), axis=1)


def _localised(confidence: npt.ArrayLike, iou: npt.ArrayLike, **options: Any) -> dict[str, float]:
    c, u = paired(confidence, iou)
    return plain(Localised(c, u, Clusters.one(c.size), **options))
