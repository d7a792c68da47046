"""Confidence estimators of an answer.

An estimator takes the `Evidence` of one answer and returns a value in [0, 1], or NaN where there is nothing to estimate
from (no tokens; for an estimator of selected tokens, none selected; for one of digits, no digits; a statement without a
number): a missing confidence, to be left out of calibration and counted, never 0.

Which estimators apply depends on the kind of answer: `ESTIMATORS` are those of boxes, `TEXT_ESTIMATORS` those of free
text. Names without a prefix use every token, the end-of-sequence token included. Some need evidence that is gathered
only on request: `NEEDS` says which, and `HOW_TO_OBTAIN` how to request it.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.confidence.agreement import Agreement
from lmms_plugin.confidence.digits import AnsweredBox
from lmms_plugin.confidence.digits import expected_iou as _expected_iou

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_LOGPROB_SLACK = 1e-4
"""How far above 0 a log-softmax in float32 may land by rounding."""


class Evidence(NamedTuple):
    """Evidence for the confidence of one answer of n tokens.

    Attributes:
        logprobs: Natural log-probability of each generated token, shape (n,); −∞ is a probability of 0.
        selected: Mask, shape (n,), boolean, True at the tokens of the requested content (`coordinate_mask`): the
            numbers of a box, the words of an answer.
        place_value: Change of a token's number when its leading digit changes by one, shape (n,), 0 for tokens without
            a digit (`place_values`); () where nothing is a number.
        leading: Mask, shape (n,), boolean, True at the tokens that begin a number (`leading_mask`); () where nothing is
            a number.
        digits: Answered box with the model's distribution over each of its numbers; None if it was not recorded.
        agreement: Agreement of the answer with others sampled for the same question; None if none were.
        stated: Confidence in [0, 1] that the model states; NaN where it named no number, None if it was not asked.
    """

    logprobs: npt.ArrayLike
    selected: npt.ArrayLike
    place_value: npt.ArrayLike = ()
    leading: npt.ArrayLike = ()
    digits: AnsweredBox | None = None
    agreement: Agreement | None = None
    stated: float | None = None


Estimator = Callable[[Evidence], float]


def joint(evidence: Evidence) -> float:
    """Return the probability of the whole answer, exp(Σ log p): MaxProb of arXiv 2602.13289."""
    values, _ = _checked(evidence)
    return _exp(values.sum()) if values.size else float("nan")


def mean(evidence: Evidence) -> float:
    """Return the length-normalised probability, exp(mean log p): the geometric mean over tokens."""
    values, _ = _checked(evidence)
    return _exp(values.mean()) if values.size else float("nan")


def minimum(evidence: Evidence) -> float:
    """Return the probability of the least likely token."""
    values, _ = _checked(evidence)
    return _exp(values.min()) if values.size else float("nan")


def first(evidence: Evidence) -> float:
    """Return the probability of the first token, where short answers are decided: "yes" or "no"."""
    values, _ = _checked(evidence)
    return _exp(values[0]) if values.size else float("nan")


def place_weighted(evidence: Evidence) -> float:
    """Return the mean of the selected tokens' log-probabilities weighted by place value, exp(Σ w·log p / Σ w).

    The units of a number in thousandths are nearly a guess and hardly move the box; here a digit is weighted by its
    effect on an edge, hundreds a hundred times as much as units. Where one token writes a whole number and all numbers
    have as many digits, this is `coordinate_mean`.

    Raises:
        ValueError: Also if place values differ in number from the tokens, or one is negative or not finite.
    """
    values, mask = _checked(evidence)
    weights = np.asarray(evidence.place_value, dtype=np.float64)
    if weights.shape != values.shape:
        raise ValueError(f"expected one place value per token, got shapes {weights.shape} and {values.shape}")
    if not np.all(np.isfinite(weights) & (weights >= 0.0)):
        raise ValueError(f"expected finite place values of at least 0, got {weights}")
    used = mask & (weights > 0.0)
    return _exp(np.average(values[used], weights=weights[used])) if used.any() else float("nan")


def of_selected(estimator: Estimator) -> Estimator:
    """Return an estimator over the selected tokens alone: brackets and commas of probability 1 do not dilute it."""

    def estimate(evidence: Evidence) -> float:
        values, mask = _checked(evidence)
        return estimator(Evidence(values[mask], mask[mask]))

    return estimate


def leading(evidence: Evidence) -> float:
    """Return the geometric mean probability of the tokens that begin a number: hundreds place a box, units hardly.

    Raises:
        ValueError: Also if `leading` differs in number from the tokens.
    """
    values, _ = _checked(evidence)
    begins = np.asarray(evidence.leading, dtype=np.bool_)
    if begins.shape != values.shape:
        raise ValueError(f"expected one mark per token of those that begin a number, got shape {begins.shape}")
    return _exp(values[begins].mean()) if begins.any() else float("nan")


def expected_iou(evidence: Evidence) -> float:
    """Return the expected IoU of the answered box with one drawn from the model's distribution over its digits.

    Σ_b p(b)·IoU(b, answered), where the numbers of b are assumed independent, each as `lmms_plugin.confidence.digits`
    describes; anything that is no box counts 0. NaN where the answer holds no box.
    """
    return float("nan") if evidence.digits is None else _expected_iou(evidence.digits)


def agreement(evidence: Evidence) -> float:
    """Return the mean agreement of k sampled answers with the answer, (1/k)·Σ_i a(y_i, y).

    For boxes a is the IoU, for free text 1 where both are the same answer; a sample without a box agrees with nothing.
    After self-consistency (arXiv 2203.11171) and, for boxes, the spread of samples in SafeGround (arXiv 2602.02419).
    NaN where the answer holds no box.
    """
    found = evidence.agreement
    return float("nan") if found is None or not found.with_answer else float(np.mean(found.with_answer))


def pairwise_agreement(evidence: Evidence) -> float:
    """Return the mean agreement of k sampled answers with each other, 2/(k(k−1))·Σ_{i<j} a(y_i, y_j); NaN for k = 1."""
    found = evidence.agreement
    return float("nan") if found is None or not found.among_samples else float(np.mean(found.among_samples))


def verbalised(evidence: Evidence) -> float:
    """Return the confidence that the model states in a second turn (arXiv 2305.14975, 2306.13063)."""
    return float("nan") if evidence.stated is None else evidence.stated


_OF_ALL_TOKENS: Mapping[str, Estimator] = {"joint": joint, "mean": mean, "min": minimum, "first": first}

_ON_REQUEST: Mapping[str, Estimator] = {
    "agreement": agreement,
    "agreement_pairwise": pairwise_agreement,
    "verbalised": verbalised,
}

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        **_OF_ALL_TOKENS,
        **{f"coordinate_{name}": of_selected(estimator) for name, estimator in _OF_ALL_TOKENS.items()},
        "coordinate_place": place_weighted,
        "coordinate_leading": leading,
        "expected_iou": expected_iou,
        **_ON_REQUEST,
    }
)
"""Every estimator of a box's confidence by the name under which it is logged and chosen."""

TEXT_ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        **_OF_ALL_TOKENS,
        **{f"word_{name}": of_selected(estimator) for name, estimator in _OF_ALL_TOKENS.items()},
        **_ON_REQUEST,
    }
)
"""Every estimator of a free answer's confidence; those named `word_` leave out the end of the sequence."""

NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "expected_iou": "digits",
        "agreement": "agreement",
        "agreement_pairwise": "agreement",
        "verbalised": "stated",
    }
)
"""Estimator → the part of the evidence that must have been gathered for it."""

HOW_TO_OBTAIN: Mapping[str, str] = MappingProxyType(
    {
        "digits": "the run's own models record it for tasks that ask for boxes; a log without it is older",
        "agreement": "run with --model_args samples=8",
        "stated": "run with --model_args verbalised=True",
    }
)
"""Part of the evidence → how to have it gathered."""


def obtaining(estimator: str) -> str:
    """Return how to obtain an estimator that a log lacks, as a clause that follows its name; "" for other names."""
    if estimator in LEARNED:
        return " (run with --model_args selector=FILE)"
    return f" ({HOW_TO_OBTAIN[NEEDS[estimator]]})" if estimator in NEEDS else ""


LEARNED = ("selector", "selector_transferred")
"""Names of a learned confidence, which comes with the answer; the second where the selector was trained for another
model or another quantization."""


ALL_ESTIMATORS = tuple(dict.fromkeys((*ESTIMATORS, *TEXT_ESTIMATORS, *LEARNED)))
"""Names of all estimators of boxes and texts."""


def estimate_all(evidence: Evidence, estimators: Mapping[str, Estimator] = ESTIMATORS) -> dict[str, float]:
    """Apply several estimators to one answer.

    Args:
        evidence: Evidence of the answer.
        estimators: Estimators by name, `ESTIMATORS` or `TEXT_ESTIMATORS`.

    Returns:
        Estimator name → confidence in [0, 1], or NaN where there is nothing to estimate from. Estimators whose evidence
        was not gathered at all (`NEEDS`) are left out.

    Raises:
        ValueError: The arrays are not one-dimensional or differ in length, a log-probability is NaN or above 0, the
            mask is not boolean, or a place value is negative or not finite.
    """
    return {
        name: estimator(evidence)
        for name, estimator in estimators.items()
        if name not in NEEDS or getattr(evidence, NEEDS[name]) is not None
    }


def coordinate_mask(token_texts: Sequence[str], spans: Sequence[tuple[int, int]]) -> Mask:
    """Return which tokens overlap any of the given character spans.

    Args:
        token_texts: The n texts whose concatenation is the answer. A token with an empty text (end of sequence)
            overlaps nothing.
        spans: Half-open (start, end) character spans of that concatenation; an empty span covers nothing.

    Returns:
        Shape (n,), boolean. A token across the edge of a span counts.

    Raises:
        ValueError: A span is reversed or reaches outside the concatenated text.
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
    """Return the place value of the leading digit that each token writes of any of the given numbers.

    In "0.57" the digits have the values 1, 0.1 and 0.01; in "<loc0123>", written by one token, the leading one has
    1000. A sign, a point and text outside of the spans have none.

    Args:
        token_texts: The n texts whose concatenation is the answer.
        spans: Spans as in `coordinate_mask`, of one decimal number each.

    Returns:
        Shape (n,), in units of the numbers; 0 for a token that writes no digit.

    Raises:
        ValueError: A span is reversed or reaches outside the concatenated text.
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


def leading_mask(token_texts: Sequence[str], spans: Sequence[tuple[int, int]]) -> Mask:
    """Return which tokens write the first digit of any of the given numbers.

    Args:
        token_texts: The n texts whose concatenation is the answer.
        spans: Spans as in `coordinate_mask`, of one decimal number each; one without a digit has no first.

    Returns:
        Shape (n,), boolean.

    Raises:
        ValueError: A span is reversed or reaches outside the concatenated text.
    """
    whole = "".join(token_texts)
    firsts = (next((p for p in range(*span) if whole[p : p + 1].isdecimal()), None) for span in spans)
    begins = coordinate_mask(token_texts, [(first, first + 1) for first in firsts if first is not None])
    coordinate_mask(token_texts, spans)
    return begins


def _exp(logprob: np.float64) -> float:
    return float(np.exp(logprob))


def _checked(evidence: Evidence) -> tuple[Floats, Mask]:
    values = np.asarray(evidence.logprobs, dtype=np.float64)
    mask = np.asarray(evidence.selected)
    if values.ndim != 1 or mask.shape != values.shape:
        raise ValueError(f"expected two arrays of shape (n,), got shapes {values.shape} and {mask.shape}")
    if mask.size and mask.dtype != np.bool_:
        raise ValueError(f"expected a boolean mask, got dtype {mask.dtype}")
    if not np.all(values <= _LOGPROB_SLACK):
        bad = np.flatnonzero(~(values <= _LOGPROB_SLACK))[0]
        raise ValueError(f"expected log-probabilities of at most 0, got {values[bad]} at index {bad}")
    return np.minimum(values, 0.0), mask.astype(np.bool_)
