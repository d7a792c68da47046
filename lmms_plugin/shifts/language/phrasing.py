"""Alternative constructions with the same meaning: where an expression has one, and the resulting text."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from lmms_plugin.shifts.language.lexicon import Span, alternatives, categories, find, plain, words

ARTICLE = re.compile(r"^(the|a|an)\s+", re.IGNORECASE)
FRAMES = (
    ("{}",),
    ("the {}", "this {}", "{} here"),
    ("the {} that can be seen in this picture", "what looks like the {} in this image", "what I would call the {}"),
)
"""What is put around an expression without its leading article: nothing, a word, a clause."""

_DOING = re.compile(r"(?<=\s)(?!building|ceiling|clothing|string|icing)[a-z]{2,}ing\b", re.IGNORECASE)
_IN = re.compile(r" in (?:(?:a|an|the) )?", re.IGNORECASE)
_WITH = re.compile(r" with ", re.IGNORECASE)
_PERSON, _ANIMAL = "person", "animal"
_LOOKS = ("colour", "pattern", "material")
_WORN = ("colour", "pattern", "clothing")


class Rebuilding(NamedTuple):
    """Place with another construction: `text[start:stop]` becomes `rebuilt`."""

    start: int
    stop: int
    rebuilt: str


def rebuildings(text: str) -> list[Rebuilding]:
    """Return all places of an expression that have another construction, in order, without overlap."""
    found: list[Rebuilding] = []
    for place in sorted([*_looks(text), *_dressed(text), *_having(text), *_doing(text)]):
        if not found or place.start >= found[-1].stop:
            found.append(place)
    return found


def _looks(text: str) -> Iterator[Rebuilding]:
    """Rebuild `red shirt` → `shirt that is red`: a single colour, pattern or material right before its noun."""
    nouns, looks = categories().of, {p for p, entry in alternatives().of.items() if entry.kind in _LOOKS}
    spans = find(text, nouns.keys() | looks)
    joined = [text[one.stop : other.start].isspace() for one, other in pairwise(spans)] + [False]
    for k, (look, thing) in enumerate(pairwise(spans)):
        # Neither may belong to a longer row of such words: `red and white bus`, `dark brown horse`, `red shirt guy`.
        if not joined[k] or joined[k + 1] or not _begins_phrase(look, text):
            continue
        if look.phrase in looks and thing.phrase not in looks:
            link = f" that {_be(thing.phrase)} "
            rebuilt = text[thing.start : thing.stop] + link + text[look.start : look.stop]
            yield Rebuilding(look.start, thing.stop, rebuilt)


def _begins_phrase(span: Span, text: str) -> bool:
    before = words(text[: span.start])
    return not before or before[-1].phrase in {*plain("function_words"), *plain("phrase_ends")} - {"and", "or"}


def _be(noun: str) -> str:
    return "are" if noun in categories().plurals else "is"


def _dressed(text: str) -> Iterator[Rebuilding]:
    """Rebuild `man in` → `man dressed in`, before a colour or a garment."""
    nouns, entries = categories().of, alternatives().of
    worn = find(text, {phrase for phrase, entry in entries.items() if entry.kind in _WORN})
    for span in find(text, nouns):
        match = _IN.match(text, span.stop)
        if match and _is(span.phrase, _PERSON) and any(garment.start == match.end() for garment in worn):
            yield Rebuilding(match.start(), match.start() + len(" in"), " dressed in")


def _is(phrase: str, *supercategories: str) -> bool:
    return any(category.supercategory in supercategories for category in categories().of[phrase])


def _having(text: str) -> Iterator[Rebuilding]:
    """Rebuild `man with` → `man who has`, `cup with` → `cup that has`; what a shirt is worn with is not the shirt's."""
    for span in find(text, categories().of):
        match = _WITH.match(text, span.stop)
        if match and not _is(span.phrase, "other"):
            link = "who" if _is(span.phrase, _PERSON) else "that"
            has = "have" if span.phrase in categories().plurals else "has"
            yield Rebuilding(match.start(), match.end(), f" {link} {has} ")


def _doing(text: str) -> Iterator[Rebuilding]:
    """Rebuild `man standing` → `man who is standing`, `zebra eating` → `zebra that is eating`."""
    for span in find(text, categories().of):
        match = _DOING.match(text, span.stop + 1)
        if match and _is(span.phrase, _PERSON, _ANIMAL):
            link = "who" if _is(span.phrase, _PERSON) else "that"
            yield Rebuilding(match.start(), match.end(), f"{link} {_be(span.phrase)} {match.group()}")
