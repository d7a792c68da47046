"""How far the answers of two engines are apart: prompts, tokens, log-probabilities and boxes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lmms_plugin.analysis.parity.pairs import AnswerPair
from lmms_plugin.protocol.boxes import Box, iou
from lmms_plugin.protocol.response import Response


class Counted(NamedTuple):
    """Agreement of one property over documents.

    Attributes:
        known: Number of documents for which both runs tell it.
        different: Number of those for which it differs.
        example: First difference in words; "" if none.
    """

    known: int
    different: int
    example: str = ""

    @property
    def same(self) -> bool:
        """Return whether it is known everywhere it could be seen, and equal."""
        return self.known > 0 and not self.different


class ReadGap(NamedTuple):
    """What both engines read.

    Attributes:
        image_sizes: Sizes of images as the models saw them.
        image_tokens: Numbers of image tokens in prompts.
        prompt_lengths: Numbers of tokens in prompts.
        prompts: Ids of prompts, by their digests.
    """

    image_sizes: Counted
    image_tokens: Counted
    prompt_lengths: Counted
    prompts: Counted


class WrittenGap(NamedTuple):
    """What both engines wrote.

    Attributes:
        documents: Number of documents.
        texts: Answers as texts.
        tokens: Answers token by token, where both have tokens.
        first_different: For each answer that differs, the number of equal tokens before the first difference.
        at_coordinates: Number of those differences at a token of digits.
    """

    documents: int
    texts: Counted
    tokens: Counted
    first_different: tuple[int, ...]
    at_coordinates: int


class LogprobGap(NamedTuple):
    """Differences of log-probabilities in nats, over equal tokens with equal tokens before them.

    Attributes:
        tokens: Number of tokens compared.
        mean: Mean absolute difference; NaN without tokens.
        largest: Largest absolute difference.
        coordinates: Number of these tokens that hold digits.
        coordinate_mean: Mean absolute difference at those.
        coordinate_largest: Largest absolute difference at those.
    """

    tokens: int
    mean: float
    largest: float
    coordinates: int
    coordinate_mean: float
    coordinate_largest: float


class BoxGap(NamedTuple):
    """Differences between predicted boxes.

    Attributes:
        both: Number of documents with a box in both runs.
        first_only: Number with a box in the first run alone.
        second_only: Number with a box in the second run alone.
        moved: Number of documents whose boxes differ.
        mean_shift: Mean over documents of the largest shift of a side, in pixels of the original image; NaN if unknown.
        largest_shift: Largest of them.
        mean_iou: Mean IoU of the two boxes.
        least_iou: Smallest of them.
    """

    both: int
    first_only: int
    second_only: int
    moved: int
    mean_shift: float
    largest_shift: float
    mean_iou: float
    least_iou: float


def read_gap(pairs: Sequence[AnswerPair]) -> ReadGap:
    """Compare what both engines read."""
    sizes = [(pair.id, pair.first.model_size, pair.second.model_size) for pair in pairs]
    traces = [(pair.id, pair.first.trace, pair.second.trace) for pair in pairs]
    told = [(name, one, other) for name, one, other in traces if one is not None and other is not None]
    return ReadGap(
        _counted(sizes),
        _counted((name, one.image_tokens, other.image_tokens) for name, one, other in told),
        _counted((name, one.tokens, other.tokens) for name, one, other in told),
        _counted((name, one.digest or None, other.digest or None) for name, one, other in told),
    )


def written_gap(pairs: Sequence[AnswerPair]) -> WrittenGap:
    """Compare what both engines wrote."""
    texts = _counted((pair.id, pair.first.text.strip(), pair.second.text.strip()) for pair in pairs)
    judged = [pair for pair in pairs if pair.first.tokens and pair.second.tokens]
    tokens = _counted((pair.id, _listed(pair.first), _listed(pair.second)) for pair in judged)
    first, coordinates = [], 0
    for pair in judged:
        one, other = _said(pair.first), _said(pair.second)
        if one != other:
            first.append(equal_tokens(pair))
            coordinates += any(has_digits(texts[first[-1]]) for texts in (one, other) if first[-1] < len(texts))
    return WrittenGap(len(pairs), texts, tokens, tuple(first), coordinates)


def logprob_gap(pairs: Sequence[AnswerPair]) -> LogprobGap:
    """Compare log-probabilities up to the first token that differs."""
    every, coordinates = [], []
    for pair in pairs:
        for k in range(equal_tokens(pair)):
            one, other = pair.first.tokens[k], pair.second.tokens[k]
            every.append(abs(one.logprob - other.logprob))
            if has_digits(one.text):
                coordinates.append(every[-1])
    at_all, at_coordinates = ((len(part), _mean(part), max(part, default=math.nan)) for part in (every, coordinates))
    return LogprobGap(*at_all, *at_coordinates)


def box_gap(pairs: Sequence[AnswerPair]) -> BoxGap:
    """Compare predicted boxes."""
    both = [(pair, *pair.boxes) for pair in pairs if None not in pair.boxes]
    shifts, overlaps = [], []
    for pair, one, other in both:
        assert one is not None
        assert other is not None
        overlaps.append(1.0 if one == other else iou(one, other))
        if size := pair.first.original_size or pair.second.original_size:
            shifts.append(_shift(one, other, size))
    alone = [sum(pair.boxes[k] is not None and pair.boxes[1 - k] is None for pair in pairs) for k in (0, 1)]
    moved = sum(one != other for _, one, other in both)
    return BoxGap(
        len(both),
        alone[0],
        alone[1],
        moved,
        _mean(shifts),
        max(shifts, default=math.nan),
        _mean(overlaps),
        min(overlaps, default=math.nan),
    )


def _shift(one: Box, other: Box, size: tuple[int, int]) -> float:
    """Return the largest shift of a side, in pixels of an image of this (width, height)."""
    return max(abs(a - b) * side for a, b, side in zip(one, other, (*size, *size), strict=True))


def equal_tokens(pair: AnswerPair) -> int:
    """Return the number of tokens before the first one that differs."""
    both = zip(_texts(pair.first), _texts(pair.second), strict=False)
    shortest = min(len(pair.first.tokens), len(pair.second.tokens))
    return next((k for k, (one, other) in enumerate(both) if one != other), shortest)


def has_digits(text: str) -> bool:
    """Return whether a token is part of a number."""
    return any(letter.isdecimal() for letter in text)


def _listed(response: Response) -> str:
    return " ".join(map(repr, _said(response)))


def _said(response: Response) -> tuple[str, ...]:
    """Return the texts of tokens without the end of the sequence, which some servers do not list."""
    texts = _texts(response)
    return texts[:-1] if texts and not texts[-1] else texts


def _texts(response: Response) -> tuple[str, ...]:
    return tuple(token.text for token in response.tokens)


def _counted(values: Iterable[tuple[str, object, object]]) -> Counted:
    known = [(name, one, other) for name, one, other in values if one is not None and other is not None]
    different = [(name, one, other) for name, one, other in known if one != other]
    example = "" if not different else _shown(*different[0])
    return Counted(len(known), len(different), example)


def _shown(name: str, one: object, other: object) -> str:
    said = [f"{value[0]} x {value[1]}" if isinstance(value, tuple) else str(value) for value in (one, other)]
    return f"{name}: {said[0]:.200} and {said[1]:.200}"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
