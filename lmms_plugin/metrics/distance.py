"""Distances between two samples of feature vectors: the strength of a shift, without labels or answers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist, pdist

Floats = npt.NDArray[np.float64]


def mmd(first: npt.ArrayLike, second: npt.ArrayLike, bandwidth: float | None = None, *, paired: bool = False) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel exp(−|x − y|² / 2h²), the unbiased estimate.

    Around 0 for samples of one distribution (and then negative about half of the time), at most 2. It makes no
    assumption about the distributions, and few vectors of many dimensions are enough.

    Source: Gretton et al., A Kernel Two-Sample Test (JMLR 2012), equation 3, and 4 where paired; h by their median
    heuristic.

    Args:
        first: First sample, shape (n, d), n ≥ 2.
        second: Second sample, shape (m, d), m ≥ 2.
        bandwidth: h; the median distance within `first` if None, so that distances to one clean sample share a scale.
        paired: Whether row k of both samples is the same item. Such pairs are closer than by chance, and are left out.

    Raises:
        ValueError: Shapes do not fit, paired samples differ in length, a value is not finite, or h is not positive (all
            rows of `first` are equal).
    """
    x, y = _pair(first, second)
    h = float(np.median(pdist(x))) if bandwidth is None else bandwidth
    if not h > 0.0:
        raise ValueError(f"expected a positive bandwidth, got {h}: the vectors do not differ")
    within = [np.exp(-pdist(sample, "sqeuclidean") / (2 * h * h)).mean() for sample in (x, y)]
    across = np.exp(-cdist(x, y, "sqeuclidean") / (2 * h * h))
    if not paired:
        return float(within[0] + within[1] - 2 * across.mean())
    if len(x) != len(y):
        raise ValueError(f"expected as many vectors in both of a pair of samples, got {len(x)} and {len(y)}")
    return float(within[0] + within[1] - 2 * across[~np.eye(len(x), dtype=bool)].mean())


def frechet(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Fréchet distance |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of the normal distributions with the samples' moments.

    In squared units of the features. Biased upwards unless there are many more vectors than dimensions.

    Source: Dowson & Landau (1982); Heusel et al. (arXiv 1706.08500), equation 6.

    Args:
        first: First sample, shape (n, d), n ≥ 2.
        second: Second sample, shape (m, d), m ≥ 2.

    Raises:
        ValueError: Shapes do not fit or a value is not finite.
    """
    x, y = _pair(first, second)
    covariances = [np.atleast_2d(np.cov(sample, rowvar=False)) for sample in (x, y)]
    # The square root of a product of covariances is real except for rounding.
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    apart = float(np.sum((x.mean(0) - y.mean(0)) ** 2))
    return max(0.0, apart + float(np.trace(covariances[0] + covariances[1] - 2 * root)))


def _pair(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[Floats, Floats]:
    x, y = (np.asarray(sample, dtype=np.float64) for sample in (first, second))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"expected (n, d) and (m, d) with n, m of 2 or more, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("expected finite features")
    return x, y
