"""Which bin of a calibration error a confidence belongs to.

Bins are half-open, (lower, upper], with edges k / n_bins; a confidence of exactly 0 belongs to the first bin and one of
exactly 1 to the last, so every record is in exactly one bin.
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
