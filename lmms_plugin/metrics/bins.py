"""Which bin of a calibration error a confidence belongs to.

Bins of equal width are half-open, (lower, upper], with edges k / n_bins; a confidence of exactly 0 belongs to the first
bin and one of exactly 1 to the last. Bins of equal mass hold equal numbers of records, but never separate records of
equal confidence: each block of them goes to the bin of its middle rank. Every record is in exactly one bin.
"""

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
