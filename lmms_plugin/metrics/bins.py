"""Records in groups: by the bin of a calibration error, or by equal confidence, the least that thresholds tell apart.

Bins of equal width are half-open, (lower, upper], with edges k / n_bins; a confidence of exactly 0 belongs to the first
bin and one of exactly 1 to the last. Bins of equal mass hold equal numbers of records, but never separate records of
equal confidence: each block of them goes to the bin of its middle rank. Every record is in exactly one bin.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics._inputs import Floats

DEFAULT_BINS = 15
"""Bins of a calibration error unless told otherwise (Guo et al., ICML 2017)."""


def equal_width_index(confidence: Floats, n_bins: int) -> npt.NDArray[np.intp]:
    """Index of the equal-width bin of each checked confidence, shape (n,)."""
    # k / n_bins is the double nearest to the edge, as a confidence written in decimals is; linspace can miss it by one.
    edges = np.arange(n_bins + 1) / n_bins
    edges[0] = -1.0
    index = np.clip(np.ceil(confidence * n_bins).astype(np.intp) - 1, 0, n_bins - 1)
    # The product above rounds and may carry a value over an edge: compare with the edges themselves.
    index -= confidence <= edges[index]
    index += confidence > edges[index + 1]
    return index


class Ties(NamedTuple):
    """Blocks of records with equal confidence, in ascending order of confidence. All arrays have shape (blocks,).

    Attributes:
        confidence: The distinct confidences.
        records: How many records each block holds, as float64.
        outcome: Sum of the outcomes of each block.
    """

    confidence: Floats
    records: Floats
    outcome: Floats


def ties(confidence: Floats, outcome: Floats) -> Ties:
    """Group checked records, both of shape (n,), by equal confidence; O(n log n)."""
    confidence, outcome = _sorted(confidence, outcome)
    starts = np.flatnonzero(np.concatenate(([True], confidence[1:] != confidence[:-1])))
    records = np.diff(starts, append=confidence.size).astype(np.float64)
    return Ties(confidence[starts], records, np.add.reduceat(outcome, starts))


def _sorted(confidence: Floats, outcome: Floats) -> tuple[Floats, Floats]:
    if np.any((outcome != 0.0) & (outcome != 1.0)):
        order = np.argsort(confidence)
        return confidence[order], outcome[order]
    # Doubles in [0, 1] are ordered as their bits and leave the highest two unused: with the outcome in a bit of its
    # own, one sort of integers does the work of an argsort and two gathers in a third of the time.
    keys = (confidence.view(np.uint64) << np.uint64(1)) | outcome.astype(np.uint64)
    keys.sort()
    return (keys >> np.uint64(1)).view(np.float64), (keys & np.uint64(1)).astype(np.float64)


def equal_mass_cuts(upto: npt.NDArray[np.number], n_bins: int) -> npt.NDArray[np.intp]:
    """Where the second and every further bin of equal mass begins, among blocks of equal confidence.

    Args:
        upto: Shape (blocks,), whole numbers: records of this or a higher confidence, from the highest confidence down.
        n_bins: How many bins, at least 1.

    Returns:
        Numbers of blocks, ascending, shape (n_bins − 1,); equal where a bin is empty.
    """
    total = int(upto[-1])
    # A block's middle rank from below, times 2, is 2·total − 1 − (records above it + records above the next).
    sought = ((2 * total - 1) * n_bins - 2 * total * np.arange(n_bins - 1, 0, -1)) / n_bins
    first = np.minimum(np.searchsorted(upto, sought / 2, side="right"), upto.size - 1)
    cuts: npt.NDArray[np.intp] = first + (
        upto[first].astype(np.float64) + np.where(first > 0, upto[first - 1], 0) <= sought
    )
    return cuts


def equal_mass_index(records: Floats, n_bins: int) -> npt.NDArray[np.intp]:
    """Index of the equal-mass bin of each block of equal confidence, from the lowest confidence up, shape (blocks,).

    Args:
        records: Shape (blocks,), how many records each block holds.
        n_bins: How many bins, at least 1.
    """
    cuts = equal_mass_cuts(np.cumsum(records[::-1]), n_bins)
    from_above = np.searchsorted(cuts, np.arange(records.size), side="right")
    return (n_bins - 1 - from_above[::-1]).astype(np.intp)
