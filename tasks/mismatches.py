"""Expressions that match nothing: one word of a true expression changed to what the picture does not hold.

Two ways, each a function that lists all it could say instead; `one_of` chooses by key. What the picture does hold is
for the caller to know: exactly where scenes are drawn, from the other expressions about it where they are photographed
(`lmms_plugin.tasks.mentions`).
"""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from lmms_plugin.tasks.lexicon import (
    Alternatives,
    Categories,
    Category,
    Span,
    alternatives,
    find,
    plain,
    replace,
    words,
)
from lmms_plugin.tasks.severities import generator

_DOING = re.compile(r"[a-z]{2,}ing")


class Mismatch(NamedTuple):
    """A changed expression.

    Attributes:
        expression: what it says now.
        kind: what was changed: the kind of attribute, or `object`.
        old: the word or phrase as it was, in lower case.
        new: what stands there now.
        start: offset of the change.
    """

    expression: str
    kind: str
    old: str
    new: str
    start: int


def attribute_swaps(expression: str, exclusive: Alternatives) -> list[Mismatch]:
    """The expression with one attribute or noun replaced by one that excludes it, in every way the list knows.

    Args:
        expression: an expression that is true of an object.
        exclusive: words that exclude one another.

    Returns:
        All changed expressions; none where the list knows no word of it.
    """
    return [
        Mismatch(replace(expression, span, new), exclusive.of[span.phrase].kind, span.phrase, new, span.start)
        for span in find(expression, exclusive.of)
        for new in exclusive.of[span.phrase].replacements
    ]


def absent_objects(expression: str, known: Categories, absent: Collection[Category]) -> list[Mismatch]:
    """The expression about an object of each absent category instead of its own.

    Args:
        expression: an expression that is true of an object.
        known: what objects are called.
        absent: categories of which the picture holds none.

    Returns:
        All changed expressions; none where the expression names no object that is known.
    """
    span = head_noun(expression, known)
    if span is None:
        return []
    plural = span.phrase in known.plurals
    nouns = [category.noun.plural if plural else category.noun.singular for category in absent]
    return [Mismatch(replace(expression, span, new), "object", span.phrase, new, span.start) for new in nouns]


def head_noun(expression: str, known: Categories) -> Span | None:
    """What an expression is about: the last known noun of its first phrase that has one; None where no noun is known.

    A phrase ends before a preposition, a relative pronoun or a participle: `red shirt` in `red shirt guy on couch`
    belongs to `guy`. A colour that is also a fruit is a colour, unless it ends its phrase.
    """
    nouns = find(expression, known.of)
    ends = [word.start for word in words(expression) if _ends_phrase(word, nouns)]
    nouns = [noun for noun in nouns if not _is_colour(noun.phrase) or _is_last(noun, expression, ends)]
    end = next((start for start in ends if nouns and start > nouns[0].start), len(expression))
    return next((noun for noun in reversed(nouns) if noun.stop <= end), None)


def _is_colour(phrase: str) -> bool:
    alternative = alternatives().of.get(phrase)
    return alternative is not None and alternative.kind == "colour"


def _is_last(noun: Span, expression: str, ends: Sequence[int]) -> bool:
    """Whether a noun is the last word of its phrase."""
    following = words(expression[noun.stop :])
    return not following or noun.stop + following[0].start in ends


def _ends_phrase(word: Span, nouns: Sequence[Span]) -> bool:
    inside_a_noun = any(noun.start <= word.start < noun.stop for noun in nouns)
    return not inside_a_noun and (word.phrase in plain("phrase_ends") or _DOING.fullmatch(word.phrase) is not None)


def one_of(candidates: Sequence[Mismatch], name: str, key: str | int) -> Mismatch | None:
    """One candidate by (key, name) alone: first a place, every place as likely as the other, then what stands there.

    None without candidates.
    """
    if not candidates:
        return None
    rng = generator(key, name, 0)
    places = sorted({candidate.start for candidate in candidates})
    place = places[int(rng.integers(len(places)))]
    there = [candidate for candidate in candidates if candidate.start == place]
    return there[int(rng.integers(len(there)))]
