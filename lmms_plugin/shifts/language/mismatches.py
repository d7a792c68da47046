"""Expressions that match nothing: a true expression with one word replaced by something absent from the picture.

There are two kinds, each a function that lists all possible replacements; `one_of` chooses by key. The caller knows
what the picture holds: exactly for drawn scenes, from the other expressions about it for photographs
(`lmms_plugin.tasks.grounding.mentions`).
"""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from lmms_plugin.shifts.language.lexicon import (
    Categories,
    Category,
    ExclusiveWords,
    Span,
    alternatives,
    categories,
    compounds,
    find,
    plain,
    replace,
    words,
)
from lmms_plugin.shifts.language.negation import is_negated
from lmms_plugin.shifts.severities import generator

_DOING = re.compile(r"[a-z]{2,}ing")
_ONLY_A_GAP = re.compile(r"[\s-]*")
_ADJECTIVES = ("pattern", "hair", "shape")
_ONE_IN_A_ROW = ("colour", "clothing", "animals", "people")
_THINGS = ("orange", "lime", "olive", "cream", "silver", "gold", "lavender", "violet", "lilac")
_SKIN = ("white", "black", "brown", "tan")
_COPULA = ("is", "are", "s")
_BEFORE_A_COLOUR = (*_COPULA, "in", "wearing", "dark", "light", "bright", "neon", "all")
_AFTER_A_FRUIT = ("cut", "peeled", "sliced", "halved", "alone", "closest", "nearest", "furthest", "farthest")
_OF = re.compile(r"\s+of\s+(?:(?:the|an?|some)\s+)?", re.IGNORECASE)


class Mismatch(NamedTuple):
    """Changed expression.

    Attributes:
        expression: New expression.
        kind: Kind of the change: the kind of attribute, or `object`.
        old: Replaced word or phrase, in lower case.
        new: Replacement.
        start: Offset of the change.
    """

    expression: str
    kind: str
    old: str
    new: str
    start: int


def attribute_swaps(expression: str, exclusive: ExclusiveWords) -> list[Mismatch]:
    """Return the expression with one attribute or noun replaced by an exclusive one, in every way the list knows.

    Args:
        expression: Expression that is true of an object.
        exclusive: Words that exclude one another.

    Returns:
        All changed expressions; none where the list knows no word of it.
    """
    return [
        Mismatch(replace(expression, span, new), exclusive.of[span.phrase].kind, span.phrase, new, span.start)
        for span in find(expression, exclusive.of)
        for new in exclusive.of[span.phrase].replacements
    ]


def swaps_about_photographs(expression: str) -> list[Mismatch]:
    """Return the `attribute_swaps` by the packaged list that are good English and no longer true.

    Excluded are words under a negation (`not the red one` is true of what is not green, too), parts of names of several
    words (`ice cream`), and places where the replacement would not fit: an adjective without its noun (`the blonde`),
    the fruit among the colours, two colours or garments in a row, a relative before an animal (`mother elephant`), the
    colour of a person.
    """
    exclusive = alternatives()
    spans = find(expression, exclusive.of.keys() | compounds())
    return [
        Mismatch(replace(expression, span, new), exclusive.of[span.phrase].kind, span.phrase, new, span.start)
        for span in spans
        if span.phrase in exclusive.of and _can_be_swapped(expression, span, spans)
        for new in exclusive.of[span.phrase].replacements
    ]


def _can_be_swapped(expression: str, span: Span, spans: Sequence[Span]) -> bool:
    kind = alternatives().of[span.phrase].kind
    before, after = _neighbours(expression, span)
    beside = {category.supercategory for category in categories().of.get(after, ())}
    in_a_row = kind in _ONE_IN_A_ROW and any(
        _kind(other.phrase) == kind and _touch(expression, span, other) for other in spans
    )
    return not (
        is_negated(expression, span)
        or in_a_row
        or (kind in _ADJECTIVES and not span.phrase.endswith(" hair") and not _is_adjective(before, after))
        or (span.phrase in _THINGS and not _is_colour_here(expression, span, before, after))
        or (span.phrase in _SKIN and "person" in beside)
        or (kind == "people" and "animal" in beside)
    )


def _kind(phrase: str) -> str | None:
    found = alternatives().of.get(phrase)
    return None if found is None else found.kind


def _is_adjective(before: str, after: str) -> bool:
    """Return whether a phrase continues after the word, or the word is predicated of something."""
    goes_on = after != "" and after not in plain("phrase_ends") and _DOING.fullmatch(after) is None
    return goes_on or before in _COPULA


def _is_colour_here(expression: str, span: Span, before: str, after: str) -> bool:
    """Return whether a word that names both a colour and a thing is the colour here."""
    if before in _BEFORE_A_COLOUR:
        return True
    following = [word.phrase for word in words(expression) if word.start >= span.stop]
    of_two = after == "and" and len(following) > 1 and _kind(following[1]) == "colour"
    return of_two or (_is_adjective(before, after) and after not in _AFTER_A_FRUIT)


def _neighbours(expression: str, span: Span) -> tuple[str, str]:
    """Return the words directly before and after a phrase; empty where there is none, or something else between."""
    every = words(expression)
    before = [word.phrase for word in every if word.stop <= span.start and _near(expression, word, span)]
    after = [word.phrase for word in every if word.start >= span.stop and _touch(expression, span, word)]
    return (before or [""])[-1], (after or [""])[0]


def _near(expression: str, word: Span, span: Span) -> bool:
    """Return whether only spaces, apostrophes and articles are between a word and a phrase."""
    return re.fullmatch(r"['\u2019\s]*(?:(?:an?|the)\s+)?", expression[word.stop : span.start]) is not None


def _touch(expression: str, one: Span, other: Span) -> bool:
    first, second = sorted((one, other))
    return first.stop <= second.start and _ONLY_A_GAP.fullmatch(expression, first.stop, second.start) is not None


def absent_objects(expression: str, known: Categories, absent: Collection[Category]) -> list[Mismatch]:
    """Return the expression about an object of each absent category instead of its own.

    Args:
        expression: Expression that is true of an object.
        known: Categories with their names.
        absent: Categories of which the picture holds no object.

    Returns:
        All changed expressions; none where the expression names no known object, or is negated.
    """
    head = head_noun(expression, known)
    span = None if head is None else _with_its_nouns(expression, head, known)
    if head is None or span is None or is_negated(expression, span):
        return []
    plural = head.phrase in known.plurals
    nouns = [category.noun.plural if plural else category.noun.singular for category in absent]
    return [Mismatch(replace(expression, span, new), "object", span.phrase, new, span.start) for new in nouns]


def head_noun(expression: str, known: Categories) -> Span | None:
    """Return the head of an expression: the last known noun of its first phrase that has one; None without any.

    A phrase ends before a preposition, a relative pronoun or a participle: `red shirt` in `red shirt guy on couch`
    belongs to `guy`. A colour that is also a fruit is a colour, unless it ends its phrase.
    """
    nouns = find(expression, known.of)
    ends = [word.start for word in words(expression) if _ends_phrase(word, nouns)]
    nouns = [noun for noun in nouns if not _is_colour(noun.phrase) or _is_last(noun, expression, ends)]
    end = next((start for start in ends if nouns and start > nouns[0].start), len(expression))
    return next((noun for noun in reversed(nouns) if noun.stop <= end), None)


def _with_its_nouns(expression: str, head: Span, known: Categories) -> Span | None:
    """Return a noun with the nouns that belong to it: `baseball player`, `cup of coffee`; None if unknown.

    Replaced alone it would leave a `baseball zebra` and a `zebra of coffee`.
    """
    nouns = find(expression, known.of)
    start, stop = head.start, head.stop
    before = [word for word in (*nouns, *find(expression, plain("sports"))) if word.stop <= start]
    for word in sorted(before, reverse=True):
        if not _ONLY_A_GAP.fullmatch(expression, word.stop, start) or _is_colour(word.phrase):
            break
        start = word.start
    for name in find(expression, compounds() | alternatives().of.keys()):
        if name.start < stop and start < name.stop:
            start, stop = min(start, name.start), max(stop, name.stop)
    of = _OF.match(expression, stop)
    if of is not None:
        content = next((noun for noun in nouns if noun.start == of.end()), None)
        if content is None:
            return None
        stop = content.stop
    return Span(start, stop, expression[start:stop].lower())


def _is_colour(phrase: str) -> bool:
    alternative = alternatives().of.get(phrase)
    return alternative is not None and alternative.kind == "colour"


def _is_last(noun: Span, expression: str, ends: Sequence[int]) -> bool:
    following = words(expression[noun.stop :])
    return not following or noun.stop + following[0].start in ends


def _ends_phrase(word: Span, nouns: Sequence[Span]) -> bool:
    inside_a_noun = any(noun.start <= word.start < noun.stop for noun in nouns)
    return not inside_a_noun and (word.phrase in plain("phrase_ends") or _DOING.fullmatch(word.phrase) is not None)


def one_of(candidates: Sequence[Mismatch], name: str, key: str | int) -> Mismatch | None:
    """Choose one candidate by (key, name) alone: first a place, uniformly, then the replacement there.

    None without candidates.
    """
    if not candidates:
        return None
    rng = generator(key, name, 0)
    places = sorted({candidate.start for candidate in candidates})
    place = places[int(rng.integers(len(places)))]
    there = [candidate for candidate in candidates if candidate.start == place]
    return there[int(rng.integers(len(there)))]
