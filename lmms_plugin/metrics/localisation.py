"""Localisation: how well one predicted box per record overlaps the true one, and whether confidence says so.

`iou` has shape (n,) with values in [0, 1]; an answer without a box has IoU 0, so it counts as wrong. `confidence` has
the same shape and range. All functions raise ValueError if arrays differ in length, are empty, are not
one-dimensional, or hold NaN or a value outside [0, 1].
"""

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics._inputs import fractions, one_fraction, paired
from lmms_plugin.metrics.calibration import DEFAULT_BINS, ece

IOU_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
"""0.50, 0.55, … 0.95: the thresholds of COCO's mean average precision."""

LAECE_BINS = 25
"""Bins of LaECE (Oksuz et al., CVPR 2023)."""


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
    return ece(confidence, iou, n_bins)


def laace_0(confidence: npt.ArrayLike, iou: npt.ArrayLike) -> float:
    """LaACE₀: mean of |confidence − IoU|, LaECE₀ with every record its own bin; in [0, 1] (Kuzucu et al. 2024)."""
    c, u = paired(confidence, iou)
    return float(np.mean(np.abs(c - u)))


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
    c, u = paired(confidence, iou)
    levels = fractions("thresholds", thresholds)
    return float(np.mean([ece(c, u >= level, n_bins) for level in levels]))
