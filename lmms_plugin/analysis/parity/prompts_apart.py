"""Where two prompts differ: in front of the image, in the image, or elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from enum import Enum
from itertools import groupby
from typing import NamedTuple

from lmms_plugin.protocol.traces import Trace

_LONG_RUN = 4
"""Equal ids in a row that are taken for an image, where its token is not known."""


class Place(Enum):
    """Place of a difference between two prompts."""

    NOWHERE = "nowhere"
    IMAGE = "in the number of image tokens alone"
    HEAD = "in one piece in front of the image"
    ELSEWHERE = "in several places, or behind the image"


class PromptDifference(NamedTuple):
    """Difference between two prompts.

    Attributes:
        place: Place of the difference.
        at: Number of equal tokens before it.
        first: Ids that only the first prompt has, in order.
        second: Ids that only the second prompt has, in order.
    """

    place: Place
    at: int
    first: tuple[int, ...]
    second: tuple[int, ...]


def difference_of(one: Trace, other: Trace) -> PromptDifference | None:
    """Locate the difference between two prompts; None where their ids are not kept."""
    if not (one.ids and other.ids):
        return None
    if one.ids == other.ids:
        return PromptDifference(Place.NOWHERE, len(one.ids), (), ())
    short = _collapsed(one.ids), _collapsed(other.ids)
    if short[0] == short[1]:
        at = next(k for k, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)) if a != b)
        return PromptDifference(Place.IMAGE, at, (), ())
    matcher = SequenceMatcher(None, *short, autojunk=False)
    blocks = [block for block in matcher.get_opcodes() if block[0] != "equal"]
    images = [_first_image(ids, given) for ids, given in zip(short, (one, other), strict=True)]
    ahead = all(i1 <= images[0] and j1 <= images[1] for _, _, i1, _, j1 in blocks)
    first = tuple(index for _, i0, i1, _, _ in blocks for index in short[0][i0:i1])
    second = tuple(index for _, _, _, j0, j1 in blocks for index in short[1][j0:j1])
    place = Place.HEAD if len(blocks) == 1 and ahead else Place.ELSEWHERE
    return PromptDifference(place, blocks[0][1], first, second)


def _collapsed(ids: Sequence[int]) -> list[int]:
    """Return ids with every long run of one id, which an image is, as a single one."""
    found: list[int] = []
    for index, run in groupby(ids):
        length = len(list(run))
        found += [index] if length >= _LONG_RUN else [index] * length
    return found


def _first_image(ids: Sequence[int], trace: Trace) -> int:
    """Return the place of the image among collapsed ids; the end where there is none."""
    longest = max(groupby(trace.ids), key=lambda run: len(list(run[1])), default=None)
    return ids.index(longest[0]) if longest is not None and trace.image_tokens != 0 else len(ids)
