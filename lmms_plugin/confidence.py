"""Confidence of an answer from the log-probabilities of its tokens.

An estimator takes `logprobs`, shape (n,), the natural log-probability of each generated token, and `is_coordinate`,
shape (n,), which of them write the box's numbers. It returns a value in [0, 1], or NaN where there is nothing to
estimate from (no tokens; for the `coordinate_` family, no coordinate tokens): a missing confidence, to be left out of
calibration and counted, never 0.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Estimator = Callable[[npt.ArrayLike, npt.ArrayLike], float]

_LOGPROB_SLACK = 1e-4
"""How far above 0 a log-softmax in float32 may land by rounding."""


def joint(logprobs: npt.ArrayLike, is_coordinate: npt.ArrayLike) -> float:
    """Probability of the whole answer, exp(Σ log p): MaxProb of arXiv 2602.13289."""
    values, _ = _checked(logprobs, is_coordinate)
    return _exp(values.sum()) if values.size else float("nan")


def mean(logprobs: npt.ArrayLike, is_coordinate: npt.ArrayLike) -> float:
    """Length-normalised probability, exp(mean log p): the geometric mean over tokens."""
    values, _ = _checked(logprobs, is_coordinate)
    return _exp(values.mean()) if values.size else float("nan")


def minimum(logprobs: npt.ArrayLike, is_coordinate: npt.ArrayLike) -> float:
    """Probability of the least likely token."""
    values, _ = _checked(logprobs, is_coordinate)
    return _exp(values.min()) if values.size else float("nan")


def coordinate_joint(logprobs: npt.ArrayLike, is_coordinate: npt.ArrayLike) -> float:
    """As `joint`, over the coordinate tokens alone."""
    return joint(*_coordinates(logprobs, is_coordinate))


def coordinate_mean(logprobs: npt.ArrayLike, is_coordinate: npt.ArrayLike) -> float:
    """As `mean`, over the coordinate tokens alone: brackets and commas of probability 1 do not dilute it."""
    return mean(*_coordinates(logprobs, is_coordinate))


def coordinate_min(logprobs: npt.ArrayLike, is_coordinate: npt.ArrayLike) -> float:
    """As `minimum`, over the coordinate tokens alone."""
    return minimum(*_coordinates(logprobs, is_coordinate))


ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "joint": joint,
        "mean": mean,
        "min": minimum,
        "coordinate_joint": coordinate_joint,
        "coordinate_mean": coordinate_mean,
        "coordinate_min": coordinate_min,
    }
)
"""Every estimator by the name under which it is logged and chosen."""


def estimate_all(logprobs: npt.ArrayLike, mask: npt.ArrayLike) -> dict[str, float]:
    """Every estimator of `ESTIMATORS` on one answer.

    Args:
        logprobs: Shape (n,), natural log-probabilities of the generated tokens; −∞ is a probability of 0.
        mask: Shape (n,), boolean, True at coordinate tokens (`coordinate_mask`).

    Returns:
        Estimator name → confidence in [0, 1], or NaN where there is nothing to estimate from.

    Raises:
        ValueError: If the arrays are not one-dimensional or differ in length, a log-probability is NaN or above 0, or
            the mask is not boolean.
    """
    return {name: estimator(logprobs, mask) for name, estimator in ESTIMATORS.items()}


def coordinate_mask(token_texts: Sequence[str], spans: Sequence[tuple[int, int]]) -> Mask:
    """Which tokens overlap any of the given character spans.

    Args:
        token_texts: The n texts whose concatenation is the answer. A token with an empty text (end of sequence)
            overlaps nothing.
        spans: Half-open (start, end) character spans of that concatenation; an empty span covers nothing.

    Returns:
        Shape (n,), boolean. A token that straddles the edge of a span counts.

    Raises:
        ValueError: If a span is reversed or reaches outside the concatenated text.
    """
    lengths = np.fromiter((len(text) for text in token_texts), dtype=np.intp, count=len(token_texts))
    ends = np.cumsum(lengths)
    total = int(lengths.sum())
    mask = np.zeros(lengths.size, dtype=np.bool_)
    for start, end in spans:
        if not 0 <= start <= end <= total:
            raise ValueError(f"expected spans inside the {total} characters of the tokens, got ({start}, {end})")
        overlap = np.minimum(ends, end) - np.maximum(ends - lengths, start)
        mask |= overlap > 0
    return mask


def _exp(logprob: np.float64) -> float:
    return float(np.exp(logprob))


def _coordinates(logprobs: npt.ArrayLike, is_coordinate: npt.ArrayLike) -> tuple[Floats, Mask]:
    values, mask = _checked(logprobs, is_coordinate)
    return values[mask], mask[mask]


def _checked(logprobs: npt.ArrayLike, is_coordinate: npt.ArrayLike) -> tuple[Floats, Mask]:
    values = np.asarray(logprobs, dtype=np.float64)
    mask = np.asarray(is_coordinate)
    if values.ndim != 1 or mask.shape != values.shape:
        raise ValueError(f"expected two arrays of shape (n,), got shapes {values.shape} and {mask.shape}")
    if mask.size and mask.dtype != np.bool_:
        raise ValueError(f"expected a boolean coordinate mask, got dtype {mask.dtype}")
    if not np.all(values <= _LOGPROB_SLACK):
        bad = np.flatnonzero(~(values <= _LOGPROB_SLACK))[0]
        raise ValueError(f"expected log-probabilities of at most 0, got {values[bad]} at index {bad}")
    return np.minimum(values, 0.0), mask.astype(np.bool_)
