"""A model's own distribution over the numbers of a box, and how far boxes drawn from it overlap the answer.

A box is written as a few numbers, a number as one or several tokens. At each of them the model has a distribution over
the tokens that differ from the chosen one in their digits alone (`Alternatives`): ten of them where every digit is a
token, thousands where a token writes a location. Decoding follows one branch only, and so do these distributions. Of a
number with the tokens t = 1 … T, chosen as g_1 … g_T:

- it is the answered one with probability Π_t p_t(g_t);
- it first differs at t, by writing a instead, with probability p_t(a)·Π_{s<t} p_s(g_s); what the model would write then
  was never computed, and every ending of the answered length is taken as equally likely;
- whatever is left (an answer that stops, words, another count of digits) is no box.

Numbers are taken for independent, each conditional on the answered ones before it. Both are approximations: after a
large step of x1 the model would move x2 along, and expected IoU then comes out too low.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.protocol.boxes import Box
from lmms_plugin.protocol.response import Token

Floats = npt.NDArray[np.float64]
Read = Callable[[Floats], Floats]
POINTS = 4096
EXACT = 20_000
_ENDINGS = 1000
"""How many endings of a number are told apart; more are stood for by as many evenly spaced ones."""


class NumberDistribution(NamedTuple):
    """A model's distribution over one number.

    Attributes:
        answered: The number it wrote.
        values: Shape (m,), what it might have written.
        probabilities: Shape (m,), summing to at most 1; the rest is no number.
    """

    answered: float
    values: Floats
    probabilities: Floats


class AnsweredBox(NamedTuple):
    """A box and the model's distribution over its numbers.

    Attributes:
        numbers: In the order of the answer; () where it holds no box.
        read: Turns numbers, shape (n, len(numbers)), into boxes as xyxy fractions of the image, shape (n, 4); NaN where
            they make none (`Dialect.boxes`).
    """

    numbers: tuple[NumberDistribution, ...]
    read: Read


def numbers_of(
    tokens: Sequence[Token], spans: Sequence[tuple[int, int]], largest: float = math.inf
) -> tuple[NumberDistribution, ...] | None:
    """Distributions over the numbers of an answer.

    Args:
        tokens: Whose concatenated texts are the answer.
        spans: Half-open character spans of that, of one decimal number each, perhaps with text around it.
        largest: The largest number there is, for tokens that write a whole one.

    Returns:
        One per span, in order; None where alternatives were not recorded for one of the tokens.
    """
    whole = "".join(token.text for token in tokens)
    edges = list(pairwise(accumulate((len(token.text) for token in tokens), initial=0)))
    found = []
    for span in spans:
        places = [p for p in range(*span) if whole[p].isdecimal()]
        parts = [(token, sum(a <= p < b for p in places)) for token, (a, b) in zip(tokens, edges, strict=True)]
        written = [(token, count) for token, count in parts if count]
        if not written or any(token.alternatives is None for token, _ in written):
            return None
        text = whole[slice(*span)]
        decimals = sum(whole[p].isdecimal() for p in range(span[0] + text.find("."), span[1])) if "." in text else 0
        unit = (-1.0 if "-" in text else 1.0) / 10.0**decimals
        found.append(_number("".join(whole[p] for p in places), written, unit, largest))
    return tuple(found)


def _number(digits: str, written: Sequence[tuple[Token, int]], unit: float, largest: float) -> NumberDistribution:
    blocks: list[tuple[Floats, float]] = []
    reached, start = 1.0, 0
    for token, count in written:
        end = start + count
        chosen = digits[start:end]
        listed, unlisted = _complete(token, chosen)
        whole = count == len(digits)
        for other, probability in listed.items():
            # A token that writes a whole number may do so with more or fewer digits; a part of one may not.
            if other != chosen and (whole or len(other) == count):
                blocks.append((_endings(int(digits[:start] + other), len(digits) - end), reached * probability))
        if unlisted > 0.0:
            rest = np.array([n for n in range(10**count) if f"{n:0{count}d}" not in listed and n <= largest])
            heads = int(digits[:start] or 0) * 10**count + rest
            endings = _endings(0, len(digits) - end)
            values = (heads[:, None] * 10.0 ** (len(digits) - end) + endings).ravel()
            blocks.append((values, reached * unlisted))
        reached *= listed[chosen]
        start = end
    answered = float(int(digits))
    blocks.append((np.array([answered]), reached))
    kept = [(values, probability) for values, probability in blocks if probability > 0.0 and values.size]
    values = np.concatenate([values for values, _ in kept]) if kept else np.zeros(0)
    probabilities = np.concatenate([np.full(v.size, p / v.size) for v, p in kept]) if kept else np.zeros(0)
    return NumberDistribution(answered * unit, values * unit, probabilities)


def _complete(token: Token, chosen: str) -> tuple[dict[str, float], float]:
    """Probabilities with that of the chosen digits, which a sampled answer may have taken from the unlisted."""
    assert token.alternatives is not None
    listed, unlisted = dict(token.alternatives.probabilities), token.alternatives.unlisted
    if chosen not in listed:
        listed[chosen] = math.exp(token.logprob)
        unlisted = max(0.0, unlisted - listed[chosen])
    return listed, unlisted


def _endings(head: int, count: int) -> Floats:
    """Return numbers that begin with `head` and go on with `count` more digits, evenly spaced."""
    number = 10**count
    shown = min(number, _ENDINGS)
    endings: Floats = (np.arange(shown) + 0.5) * (number / shown) - 0.5
    return endings + head * float(number)


def expected_iou(answered: AnsweredBox, *, points: int = POINTS, exact: int = EXACT) -> float:
    """Σ_b p(b)·IoU(b, answered box) over the boxes b that independent numbers make.

    Exact up to `exact` boxes. Beyond that, a fixed Latin hypercube of draws (McKay et al. 1979; the same for every
    answer, so that the value is a function of the distribution) with the effects of single numbers as control variate:
    with f_i(x_i) = 1 − IoU(answered with x_i in place of its i-th number), 1 − Σ_i E f_i is exact, and only the mean of
    IoU − (1 − Σ_i f_i) is estimated.

    Args:
        answered: The box and its distribution.
        points: Draws.
        exact: Up to how many boxes are counted one by one.

    Returns:
        In [0, 1]: 1 where the model is certain. NaN where the answer holds no box.
    """
    numbers, read = answered.numbers, answered.read
    centre = np.array([[number.answered for number in numbers]])
    box = read(centre)[0] if numbers else np.full(4, np.nan)
    if np.isnan(box).any():
        return math.nan
    target = Box(*box.tolist())
    if math.prod(number.values.size for number in numbers) <= exact:
        grids = np.meshgrid(*(number.values for number in numbers), indexing="ij")
        weights = np.meshgrid(*(number.probabilities for number in numbers), indexing="ij")
        boxes = read(np.stack([grid.ravel() for grid in grids], axis=1))
        return _fraction(ious(target, boxes) @ np.prod([weight.ravel() for weight in weights], axis=0))
    lost = list(_losses(target, numbers, read, centre))
    uniform = _hypercube(points, len(numbers))
    index = [np.searchsorted(np.cumsum(n.probabilities), u) for n, u in zip(numbers, uniform, strict=True)]
    is_box = np.all([k < n.values.size for k, n in zip(index, numbers, strict=True)], axis=0)
    drawn = [n.values[np.minimum(k, n.values.size - 1)] for k, n in zip(index, numbers, strict=True)]
    overlaps = np.where(is_box, ious(target, read(np.stack(drawn, axis=1))), 0.0)
    # What is no number loses all there is.
    effects = sum(np.append(loss, 1.0)[k] for k, loss in zip(index, lost, strict=True))
    means = sum(loss @ n.probabilities + (1.0 - n.probabilities.sum()) for n, loss in zip(numbers, lost, strict=True))
    return _fraction(1.0 - means + float(np.mean(overlaps - (1.0 - effects))))


def _losses(target: Box, numbers: Sequence[NumberDistribution], read: Read, centre: Floats) -> Iterator[Floats]:
    for k, number in enumerate(numbers):
        moved = np.repeat(centre, number.values.size, axis=0)
        moved[:, k] = number.values
        yield 1.0 - ious(target, read(moved))


@cache
def _hypercube(points: int, dimensions: int) -> Floats:
    """Return a fixed Latin hypercube, shape (dimensions, points), in (0, 1)."""
    generator = np.random.default_rng(0)
    return (np.stack([generator.permutation(points) for _ in range(dimensions)]) + 0.5) / points


def ious(box: Box, boxes: Floats) -> Floats:
    """IoU of one box with many, shape (n,), of boxes as xyxy, shape (n, 4); 0 for those that are NaN."""
    x1, y1, x2, y2 = boxes.T
    width = np.minimum(x2, box.x2) - np.maximum(x1, box.x1)
    height = np.minimum(y2, box.y2) - np.maximum(y1, box.y1)
    shared = np.where((width > 0.0) & (height > 0.0), width * height, 0.0)
    union = (x2 - x1) * (y2 - y1) + (box.x2 - box.x1) * (box.y2 - box.y1) - shared
    return np.where(np.isnan(union) | (shared == 0.0), 0.0, shared / np.where(union > 0.0, union, 1.0))


def _fraction(value: float) -> float:
    return float(min(max(value, 0.0), 1.0))
