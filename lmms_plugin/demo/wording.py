"""Expressions that identify one object of a scene by its attributes, never by its place.

RefCOCO+ forbids location words, and so does the demo. An expression names a subset of an object's attributes, and only
subsets that no other object of the scene shares are used, so that every expression has exactly one referent.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from lmms_plugin.shifts.language.lexicon import find


class Attributes(NamedTuple):
    """Attributes of an object that an expression may name."""

    shape: str
    colour: str
    size: str
    fill: str


SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
FILLS = ("plain", "hollow")

_SUBSETS = tuple(subset for n in range(1, 5) for subset in combinations(Attributes._fields, n))

NOUNS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "cross": ("cross", "cross", "plus sign"),
}
SHAPED = {
    "circle": "round",
    "square": "square",
    "triangle": "triangular",
    "cross": "cross-shaped",
}
ADJECTIVES = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "big", "big"),
    "plain": ("plain", "solid"),
    "hollow": ("hollow", "outlined", "empty"),
}
WITH = {"hollow": "with a hole", "plain": "without a hole"}
ANY = ("one", "one", "thing", "object", "shape")


_SAYS = {
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("size", size) for size in SIZES for word in ADJECTIVES[size]},
    **{word: ("fill", fill) for fill in FILLS for word in (*ADJECTIVES[fill], WITH[fill])},
    **{word: ("shape", shape) for shape in SHAPES for word in (*NOUNS[shape], SHAPED[shape])},
}
_SAYS_NOTHING = frozenset(("the", "that", "is", "and", *ANY))


def meaning(expression: str) -> dict[str, str]:
    """Return the meaning of an expression: attribute name → value, fields of `Attributes`.

    Raises:
        ValueError: A word does not occur in the demo's expressions.
    """
    said, rest = {}, expression
    for span in reversed(find(expression, _SAYS)):
        attribute, value = _SAYS[span.phrase]
        said[attribute] = value
        rest = rest[: span.start] + rest[span.stop :]
    unknown = set(rest.split()) - _SAYS_NOTHING
    if unknown:
        raise ValueError(f"expected words of the demo's expressions, got {sorted(unknown)} in {expression!r}")
    return said


def identifying(target: Attributes, others: Sequence[Attributes]) -> list[tuple[str, ...]]:
    """Return every set of attribute names that `target` shares with none of `others`.

    Args:
        target: Target object.
        others: Other objects of its scene.

    Returns:
        Tuples of field names of `Attributes`, shortest first; empty when another object is exactly alike.
    """
    return [s for s in _SUBSETS if all(any(getattr(o, a) != getattr(target, a) for a in s) for o in others)]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def phrase(target: Attributes, named: Sequence[str], rng: np.random.Generator) -> str:
    """Put the named attributes of an object into words.

    Args:
        target: Target object.
        named: Attributes to mention, field names of `Attributes`.
        rng: Source of randomness for synonyms and word orders.

    Returns:
        For instance `"small red circle"`, `"the red round one"`, `"disc that is red and small"`.
    """
    before, after, adjectives = [], "", []
    if "size" in named:
        adjectives.append(_pick(rng, ADJECTIVES[target.size]))
    if "fill" in named:
        if rng.random() < 0.3:
            after = " " + WITH[target.fill]
        else:
            adjectives.append(_pick(rng, ADJECTIVES[target.fill]))
    if "colour" in named:
        adjectives.append(target.colour)
    if "shape" not in named:
        noun = _pick(rng, ANY)
    elif rng.random() < 0.75:
        noun = _pick(rng, NOUNS[target.shape])
    else:
        noun = f"{SHAPED[target.shape]} {_pick(rng, ANY)}"
    if adjectives and not after and rng.random() < 0.15:
        after = " that is " + " and ".join(reversed(adjectives))
    else:
        before = adjectives
    article = "the " if rng.random() < 0.4 else ""
    return article + " ".join([*before, noun]) + after


def expressions(target: Attributes, others: Sequence[Attributes], rng: np.random.Generator) -> tuple[str, ...]:
    """Write one to three different expressions that refer to `target` and nothing else in its scene.

    Args:
        target: Target object.
        others: Other objects of its scene, none exactly like `target`.
        rng: Source of randomness for attributes and wording.

    Raises:
        ValueError: Another object has the same attributes.
    """
    subsets = identifying(target, others)
    if not subsets:
        raise ValueError(f"expected a scene with one object like {target}, found another one")
    # Short expressions are more likely, as among people, but superfluous attributes stay common.
    weights = np.cumsum([1.0 / len(s) for s in subsets])
    found: dict[str, None] = {}
    for _ in range(int(rng.integers(1, 4))):
        subset = subsets[int(np.searchsorted(weights, rng.random() * weights[-1]))]
        found[phrase(target, subset, rng)] = None
    return tuple(found)
