"""Confidence of an answer from the log-probabilities of its tokens.

An estimator takes three arrays of shape (n,): `logprobs`, the natural log-probability of each generated token;
`selected`, which of them write what was asked for (the numbers of a box, the words of an answer); and `place_value`, by
how much a change of the token's leading digit by one would move its number, 0 for tokens without a digit. It returns a
value in [0, 1], or NaN where there is nothing to estimate from (no tokens; for an estimator of selected tokens, none
selected; for one of digits, no digits): a missing confidence, to be left out of calibration and counted, never 0.

Which estimators apply depends on what an answer is: `ESTIMATORS` are those of boxes, `TEXT_ESTIMATORS` those of free
text. Names without a prefix use every token, the end-of-sequence token included.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Estimator = Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], float]

_LOGPROB_SLACK = 1e-4
"""How far above 0 a log-softmax in float32 may land by rounding."""


def joint(logprobs: npt.ArrayLike, selected: npt.ArrayLike, place_value: npt.ArrayLike = ()) -> float:
    """Probability of the whole answer, exp(Σ log p): MaxProb of arXiv 2602.13289."""
    values, _ = _checked(logprobs, selected)
    return _exp(values.sum()) if values.size else float("nan")


def mean(logprobs: npt.ArrayLike, selected: npt.ArrayLike, place_value: npt.ArrayLike = ()) -> float:
    """Length-normalised probability, exp(mean log p): the geometric mean over tokens."""
    values, _ = _checked(logprobs, selected)
    return _exp(values.mean()) if values.size else float("nan")


def minimum(logprobs: npt.ArrayLike, selected: npt.ArrayLike, place_value: npt.ArrayLike = ()) -> float:
    """Probability of the least likely token."""
    values, _ = _checked(logprobs, selected)
    return _exp(values.min()) if values.size else float("nan")


def first(logprobs: npt.ArrayLike, selected: npt.ArrayLike, place_value: npt.ArrayLike = ()) -> float:
    """Probability of the first token, where short answers are decided: "yes" or "no"."""
    values, _ = _checked(logprobs, selected)
    return _exp(values[0]) if values.size else float("nan")


def place_weighted(logprobs: npt.ArrayLike, selected: npt.ArrayLike, place_value: npt.ArrayLike = ()) -> float:
    """Mean of the selected tokens' log-probabilities weighted by place value, exp(Σ w·log p / Σ w).

    The units of a number in thousandths are nearly a guess and hardly move the box; here a digit counts by as much as
    it moves an edge, hundreds a hundred times as much as units. Where one token writes a whole number and all numbers
    have as many digits, this is `coordinate_mean`.

    Raises:
        ValueError: Also if place values differ in number from the tokens, or one is negative or not finite.
    """
    values, mask = _checked(logprobs, selected)
    weights = np.asarray(place_value, dtype=np.float64)
    if weights.shape != values.shape:
        raise ValueError(f"expected one place value per token, got shapes {weights.shape} and {values.shape}")
    if not np.all(np.isfinite(weights) & (weights >= 0.0)):
        raise ValueError(f"expected finite place values of at least 0, got {weights}")
    used = mask & (weights > 0.0)
    return _exp(np.average(values[used], weights=weights[used])) if used.any() else float("nan")


def of_selected(estimator: Estimator) -> Estimator:
    """The same estimator over the selected tokens alone: brackets and commas of probability 1 do not dilute it."""

    def estimate(logprobs: npt.ArrayLike, selected: npt.ArrayLike, place_value: npt.ArrayLike = ()) -> float:
        values, mask = _checked(logprobs, selected)
        return estimator(values[mask], mask[mask], ())

    return estimate


_OF_ALL_TOKENS: Mapping[str, Estimator] = {"joint": joint, "mean": mean, "min": minimum, "first": first}

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        **_OF_ALL_TOKENS,
        **{f"coordinate_{name}": of_selected(estimator) for name, estimator in _OF_ALL_TOKENS.items()},
        "coordinate_place": place_weighted,
    }
)
"""Every estimator of a box's confidence by the name under which it is logged and chosen."""

TEXT_ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        **_OF_ALL_TOKENS,
        **{f"word_{name}": of_selected(estimator) for name, estimator in _OF_ALL_TOKENS.items()},
    }
)
"""Every estimator of a free answer's confidence; those named `word_` leave out the end of the sequence."""


def estimate_all(
    logprobs: npt.ArrayLike,
    mask: npt.ArrayLike,
    place_value: npt.ArrayLike | None = None,
    estimators: Mapping[str, Estimator] = ESTIMATORS,
) -> dict[str, float]:
    """Several estimators on one answer.

    Args:
        logprobs: Shape (n,), natural log-probabilities of the generated tokens; −∞ is a probability of 0.
        mask: Shape (n,), boolean, True at the tokens that write what was asked for (`coordinate_mask`).
        place_value: Shape (n,), at least 0 (`place_values`); None where the answer has no digits that count.
        estimators: By name, `ESTIMATORS` or `TEXT_ESTIMATORS`.

    Returns:
        Estimator name → confidence in [0, 1], or NaN where there is nothing to estimate from.

    Raises:
        ValueError: If the arrays are not one-dimensional or differ in length, a log-probability is NaN or above 0, the
            mask is not boolean, or a place value is negative or not finite.
    """
    places = np.zeros(np.shape(logprobs)) if place_value is None else place_value
    return {name: estimator(logprobs, mask, places) for name, estimator in estimators.items()}


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


def place_values(token_texts: Sequence[str], spans: Sequence[tuple[int, int]]) -> Floats:
    """The place value of the leading digit that each token writes of any of the given numbers.

    In "0.57" the digits have the values 1, 0.1 and 0.01; in "<loc0123>", written by one token, the leading one has
    1000. A sign, a point and what is outside of the spans have none.

    Args:
        token_texts: The n texts whose concatenation is the answer.
        spans: As in `coordinate_mask`, of one decimal number each.

    Returns:
        Shape (n,), in units of the numbers; 0 for a token that writes no digit.

    Raises:
        ValueError: If a span is reversed or reaches outside the concatenated text.
    """
    coordinate_mask(token_texts, spans)
    whole = "".join(token_texts)
    values = np.zeros(len(whole))
    for start, end in spans:
        digits = [position for position in range(start, end) if whole[position].isdecimal()]
        point = whole.find(".", start, end)
        units = sum(position < point for position in digits) if point >= 0 else len(digits)
        values[digits] = 10.0 ** (units - 1 - np.arange(len(digits)))
    edges = np.cumsum([0, *map(len, token_texts)])
    return np.array([values[start:end].max(initial=0.0) for start, end in pairwise(edges)], dtype=np.float64)


def _exp(logprob: np.float64) -> float:
    return float(np.exp(logprob))


def _checked(logprobs: npt.ArrayLike, selected: npt.ArrayLike) -> tuple[Floats, Mask]:
    values = np.asarray(logprobs, dtype=np.float64)
    mask = np.asarray(selected)
    if values.ndim != 1 or mask.shape != values.shape:
        raise ValueError(f"expected two arrays of shape (n,), got shapes {values.shape} and {mask.shape}")
    if mask.size and mask.dtype != np.bool_:
        raise ValueError(f"expected a boolean mask, got dtype {mask.dtype}")
    if not np.all(values <= _LOGPROB_SLACK):
        bad = np.flatnonzero(~(values <= _LOGPROB_SLACK))[0]
        raise ValueError(f"expected log-probabilities of at most 0, got {values[bad]} at index {bad}")
    return np.minimum(values, 0.0), mask.astype(np.bool_)
