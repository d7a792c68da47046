"""Departure of a model from a reference whose answer was forced through it: one answer, without labels."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.confidence.digits import NumberDistribution, numbers_of
from lmms_plugin.confidence.estimators import coordinate_mask
from lmms_plugin.metrics.divergence import kl_bounds, mean_shift
from lmms_plugin.protocol.response import Alternatives, Response, Token

Floats = npt.NDArray[np.float64]
Read = Callable[[Floats], Floats]
_STEPS = (1e-3, -1e-3)
"""Steps, relative to a number, by which its effect on a box is found; one may lead out of the image."""
_LOGGED, _LOGGED_LOGPROB = 5e-6, 1e-6
"""Largest errors of a logged alternative, of five decimals, and of a probability from a log-probability of six."""
_NUMBER = re.compile("[0-9]+")

MEASURES = MappingProxyType(
    {
        "kl": "mean KL divergence from the reference over the tokens of its answer, in nats",
        "kl_coordinates": "the same over the tokens of the box's numbers",
        "token_agreement": "share of the tokens at which both have the same likeliest token",
        "answer_agreement": "whether they have at all of them, so that greedy decoding writes the same answer",
        "answer_probability_change": "probability of the reference's answer, less that in the reference",
        "box_shift": "mean shift of a side of the box between the distributions over its digits, in sides of the image",
    }
)
"""Name → meaning of each measure of one answer; a result is the mean over answers that have it."""


def departure(
    response: Response,
    spans: Sequence[tuple[int, int]] = (),
    read: Read | None = None,
    largest: float = math.inf,
) -> dict[str, float]:
    """Measure how far a model departs from the reference at the reference's answer.

    Args:
        response: Response with a forced answer.
        spans: Half-open character spans of the numbers of the reference's box in its text; () without a box.
        read: Function from numbers, shape (n, len(spans)), to boxes as xyxy fractions of the image, shape (n, 4); NaN
            where they make none. None without a box.
        largest: Largest possible number, for tokens that write a whole one.

    Returns:
        Name → value of `MEASURES`; those that the answer does not have are left out: of coordinates and of the box
        without a box, of the answer where its reasoning does not end.

    Raises:
        ValueError: The response has no forced answer.
    """
    reference, model = response.of_reference
    forced = response.forced
    assert forced is not None
    if not forced.reference:
        return {}
    divergences = np.array(forced.divergences)
    agreed = np.array(forced.agreed, dtype=np.float64)
    selected = coordinate_mask([token.text for token in forced.reference], spans)
    found = {
        "kl": float(divergences.mean()),
        "kl_coordinates": float(divergences[selected].mean()) if selected.any() else math.nan,
        "token_agreement": float(agreed.mean()),
        "answer_agreement": float(agreed.min()),
        "answer_probability_change": _probability(model) - _probability(reference),
        "box_shift": math.nan if read is None else box_shift(reference, model, spans, read, largest),
    }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def box_shift(
    first: Response, second: Response, spans: Sequence[tuple[int, int]], read: Read, largest: float = math.inf
) -> float:
    """Return the mean shift of a side of a box between two distributions over the digits of its numbers.

    Of each number it is the Wasserstein distance of `lmms_plugin.metrics.divergence.mean_shift`, between the
    distributions of `lmms_plugin.confidence.digits` in both, carried over to the sides of the box that the number
    moves; the mean is over the four sides.

    Args:
        first: Answer with the probabilities of one model.
        second: The same text with the probabilities of the other.
        spans: Spans of the numbers, as in `departure`.
        read: Function from numbers to boxes, as in `departure`.
        largest: Largest possible number.

    Returns:
        Fraction of the image's width or height; NaN where digits were not recorded, or numbers move no side evenly.
    """
    both = [numbers_of(one.tokens, spans, largest) for one in (first, second)]
    return math.nan if both[0] is None or both[1] is None else _shift(both[0], both[1], read)


def _shift(first: Sequence[NumberDistribution], second: Sequence[NumberDistribution], read: Read) -> float:
    if not first or len(first) != len(second):
        return math.nan
    pairs = zip(first, second, _sides_per_unit(first, read), strict=True)
    shifts = [
        sides * mean_shift(one.values, one.probabilities, other.values, other.probabilities)
        for one, other, sides in pairs
    ]
    return float(sum(shifts)) / 4


def _sides_per_unit(numbers: Sequence[NumberDistribution], read: Read) -> list[float]:
    """Return by how much the four sides of a box move together with each number; NaN where no step gives a box."""
    centre = np.array([[number.answered for number in numbers]])
    box = read(centre)[0]
    found = []
    for k, number in enumerate(numbers):
        steps = np.array(_STEPS) * max(abs(number.answered), 1e-3)
        moved = np.repeat(centre, len(steps), axis=0)
        moved[:, k] += steps
        # A step out of the image moves nothing, so the larger effect counts.
        effects = np.abs(read(moved) - box).sum(axis=1) / np.abs(steps)
        effects = effects[~np.isnan(effects)]
        found.append(float(effects.max()) if effects.size and effects.max() > 0.0 else math.nan)
    return found


def _probability(answer: Response) -> float:
    """Return the probability of an answer without its reasoning; NaN where that does not end."""
    tokens = answer.spoken.tokens
    return math.exp(math.fsum(token.logprob for token in tokens)) if tokens else math.nan


class Bounds(NamedTuple):
    """Bounds of a measure of one answer."""

    low: float
    high: float


class KeptDeparture(NamedTuple):
    """Departure of a model from another as far as the answers that each wrote for itself tell it.

    Attributes:
        measures: Name → bounds of those of `MEASURES` that are known; equal ends where a measure is exact.
        compared: Number of tokens whose distributions are compared: those up to the first different one, and that one
            where both wrote digits.
        tokens: Number of tokens of the first answer.
    """

    measures: Mapping[str, Bounds]
    compared: int
    tokens: int


def kept_departure(
    first: Response,
    second: Response,
    spans: tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]] = ((), ()),
    read: Read | None = None,
    largest: float = math.inf,
) -> KeptDeparture:
    """Bound how far a model departs from another, from the answers that both wrote, without running either again.

    As long as both wrote the same tokens, their distributions are conditional on the same text. Logs keep of them the
    probability of the chosen token and, of digits, those of the alternatives; the remaining mass makes bounds
    (`lmms_plugin.metrics.divergence.kl_bounds`). Agreement supposes greedy decoding. The shift of a box is between
    distributions over digits that are each conditional on the model's own earlier digits.

    Args:
        first: Answer of the reference.
        second: Answer of the model in question, to the same question.
        spans: Spans of the numbers of both boxes in their texts; () without a box.
        read: Function from numbers to boxes, as in `departure`; None without a box in both.
        largest: Largest possible number.
    """
    texts = [[token.text for token in one.tokens] for one in (first, second)]
    if not all(texts):
        return KeptDeparture({}, 0, len(texts[0]))
    pairs = enumerate(zip(*texts, strict=False))
    equal = next((k for k, (one, other) in pairs if one != other), min(map(len, texts)))
    same = texts[0] == texts[1]
    compared = enumerate(zip(first.tokens[: equal + 1], second.tokens[: equal + 1], strict=False))
    known = {k: one for k, pair in compared if (one := _token_bounds(*pair)) is not None}
    selected = coordinate_mask(texts[0], spans[0])
    found = {
        "kl": _mean_bounds(list(known.values())),
        "kl_coordinates": _mean_bounds([one for k, one in known.items() if selected[k]]),
        "token_agreement": Bounds(*[equal / (equal if same else equal + 1)] * 2) if equal or not same else None,
        "answer_agreement": Bounds(float(same), float(same)),
        "box_shift": None if read is None else _kept_shift((first, second), spans, read, largest),
    }
    measures = {name: bounds for name, bounds in found.items() if bounds is not None}
    return KeptDeparture(measures, len(known), len(texts[0]))


def _mean_bounds(found: Sequence[Bounds]) -> Bounds | None:
    return Bounds(*np.mean(found, axis=0).tolist()) if found else None


def _token_bounds(first: Token, second: Token) -> Bounds | None:
    """Return bounds of the KL divergence at one token; None where nothing is told of both distributions."""
    if first.alternatives is not None and second.alternatives is not None:
        if _NUMBER.sub("#", first.text) != _NUMBER.sub("#", second.text):
            return None
        return _digit_bounds(first.alternatives, second.alternatives)
    if first.text != second.text:
        return None
    p, q = math.exp(first.logprob), math.exp(second.logprob)
    return Bounds(*kl_bounds([p], [q], [1 - p], [1 - q], rounding=_LOGGED_LOGPROB, group_rounding=_LOGGED_LOGPROB))


def _digit_bounds(first: Alternatives, second: Alternatives) -> Bounds:
    both = sorted(first.probabilities.keys() & second.probabilities.keys())
    told = [[one.probabilities[digits] for digits in both] for one in (first, second)]
    groups = []
    for one, mine in zip((first, second), told, strict=True):
        listed = math.fsum(one.probabilities.values())
        numbers = max(0.0, listed - math.fsum(mine)) + one.unlisted
        groups.append([min(numbers, 1.0), max(0.0, 1.0 - listed - one.unlisted)])
    most = max(len(first.probabilities), len(second.probabilities)) + 1
    return Bounds(*kl_bounds(*told, *groups, rounding=_LOGGED, group_rounding=most * _LOGGED))


def _kept_shift(
    answers: tuple[Response, Response],
    spans: tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]],
    read: Read,
    largest: float,
) -> Bounds | None:
    both = [numbers_of(one.tokens, its, largest) for one, its in zip(answers, spans, strict=True)]
    if both[0] is None or both[1] is None:
        return None
    shift = _shift(both[0], both[1], read)
    return None if math.isnan(shift) else Bounds(shift, shift)
