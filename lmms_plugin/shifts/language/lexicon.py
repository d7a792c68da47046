"""The packaged word lists, and finding and replacing their words in an expression.

The lists (`wordlists/*.txt`) are our own. Each says in its head how it is written; a line added there is all it takes
to teach the shifts a word.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

FOLDER = Path(__file__).parent / "wordlists"
NOUNS = "nouns"
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_SIBILANT = re.compile(r"(s|x|z|ch|sh)$")
_VOWEL = re.compile(r"(?!uni|one\b|eu)[aeiou]", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(an?)(\s+)$", re.IGNORECASE)


class Span(NamedTuple):
    """A word or phrase where it stands in a text.

    Attributes:
        start: offset of its first character.
        stop: offset behind its last.
        phrase: in lower case, its words one space apart.
    """

    start: int
    stop: int
    phrase: str


class Noun(NamedTuple):
    """Both numbers of a noun."""

    singular: str
    plural: str


class Alternative(NamedTuple):
    """What a word may be replaced by so that the expression means something else.

    Attributes:
        kind: section of the list, such as `colour`.
        replacements: words that exclude it.
    """

    kind: str
    replacements: tuple[str, ...]


class ExclusiveWords(NamedTuple):
    """Words that exclude one another.

    Attributes:
        of: what each word or phrase may be replaced by.
        like: word or phrase → all that say about the same, itself among them.
    """

    of: Mapping[str, Alternative]
    like: Mapping[str, frozenset[str]]


class Category(NamedTuple):
    """A category of objects.

    Attributes:
        name: COCO's where COCO has it.
        supercategory: COCO's, or `other`.
        noun: what an object of it is called.
        offered: whether it may be put in for another one.
    """

    name: str
    supercategory: str
    noun: Noun
    offered: bool


class Categories(NamedTuple):
    """Categories of objects and what expressions call them.

    Attributes:
        all: every category.
        of: word or phrase → the categories it may mean; `glasses` are eyewear or wine glasses.
        plurals: which of these phrases are plurals.
    """

    all: tuple[Category, ...]
    of: Mapping[str, tuple[Category, ...]]
    plurals: frozenset[str]


def words(text: str) -> list[Span]:
    """The words of a text in order; letters and digits, hyphens inside included, apostrophes not."""
    return [Span(match.start(), match.end(), match.group().lower()) for match in _WORD.finditer(text)]


def find(text: str, vocabulary: Collection[str]) -> list[Span]:
    """The phrases of a text that are in the vocabulary, in order, the longest first, without overlap.

    Args:
        text: any text.
        vocabulary: phrases in lower case, their words one space apart.
    """
    found, spans = list[Span](), words(text)
    longest = max((phrase.count(" ") + 1 for phrase in vocabulary), default=0)
    k = 0
    while k < len(spans):
        candidates = (_joined(text, spans[k : k + length]) for length in range(longest, 0, -1))
        match = next((span for span in candidates if span is not None and span.phrase in vocabulary), None)
        if match is not None:
            found.append(match)
        k += match.phrase.count(" ") + 1 if match is not None else 1
    return found


def _joined(text: str, spans: list[Span]) -> Span | None:
    """Words as one phrase; None where something other than spaces stands between them."""
    gaps = (text[one.stop : other.start] for one, other in pairwise(spans))
    if any(gap.strip() for gap in gaps):
        return None
    return Span(spans[0].start, spans[-1].stop, " ".join(span.phrase for span in spans))


def replace(text: str, span: Span, by: str) -> str:
    """The text with a phrase replaced, in its case, `a` and `an` before it set right."""
    old = text[span.start : span.stop]
    if len(old) > 1 and old.isupper():
        by = by.upper()
    elif old[0].isupper():
        by = by[0].upper() + by[1:]
    before = _ARTICLE.sub(lambda match: _article(match.group(1), by) + match.group(2), text[: span.start])
    return before + by + text[span.stop :]


def _article(old: str, following: str) -> str:
    article = "an" if _VOWEL.match(following) else "a"
    return article.upper() if old.isupper() and len(old) > 1 else old[0] + article[1:]


def noun(written: str) -> Noun:
    """Both numbers of a noun as the lists write it: `shirt`, or `man/men` where the plural is irregular."""
    singular, _, plural = (part.strip() for part in written.partition("/"))
    return Noun(singular, plural or _regular(singular))


def _regular(singular: str) -> str:
    if singular.endswith("y") and singular[-2:-1] not in "aeiou":
        return singular[:-1] + "ies"
    return singular + ("es" if _SIBILANT.search(singular) else "s")


@lru_cache(maxsize=1)
def synonyms() -> Mapping[str, tuple[str, ...]]:
    """Each word or phrase of `synonyms.txt` → the others of its set, plural for plural."""
    sets: list[tuple[str, ...]] = []
    for section, line in _lines("synonyms.txt"):
        written = _items(line)
        if section == NOUNS:
            sets += [tuple(number) for number in zip(*map(noun, written), strict=True)]
        else:
            sets.append(tuple(written))
    return MappingProxyType({phrase: tuple(p for p in group if p != phrase) for group in sets for phrase in group})


@lru_cache(maxsize=1)
def alternatives() -> ExclusiveWords:
    """The exclusive words of `alternatives.txt`."""
    of: dict[str, Alternative] = {}
    like: dict[str, frozenset[str]] = {}
    for section, line in _lines("alternatives.txt"):
        kind, sides = section.removeprefix(f"{NOUNS}: "), [side.split(";") for side in line.split("->")]
        parts = [[_items(part) for part in side] for side in sides]
        group: set[str] = set()
        for left, right in zip(*parts, strict=True):
            if kind != section:
                numbers = [list(zip(*map(noun, side), strict=True)) for side in (left, right)]
                pairs = list(zip(*numbers, strict=True))
            else:
                pairs = [(tuple(left), tuple(right))]
            for words_of, replacements in pairs:
                group.update(words_of)
                # Where singular and plural are one word, it is a plural to its replacements.
                of |= dict.fromkeys(words_of, Alternative(kind, replacements))
        like |= dict.fromkeys(group, frozenset(group))
    return ExclusiveWords(MappingProxyType(of), MappingProxyType(like))


@lru_cache(maxsize=1)
def compounds() -> frozenset[str]:
    """The names of `compounds.txt`, singular and plural, in which no word is exchanged."""
    return frozenset(form for item in plain("compounds") for form in noun(item))


@lru_cache(maxsize=1)
def categories() -> Categories:
    """The categories of `categories.txt`."""
    every: list[Category] = []
    of: dict[str, tuple[Category, ...]] = {}
    plurals: set[str] = set()
    for section, line in _lines("categories.txt"):
        head, _, names = line.partition(":")
        nouns = [noun(item) for item in _items(names)]
        offered = section != "other" and not head.endswith("!")
        category = Category(head.rstrip("!"), section, nouns[0], offered)
        every.append(category)
        plurals |= {n.plural for n in nouns if n.plural != n.singular or n.plural.endswith("s")}
        for phrase in dict.fromkeys(form for n in nouns for form in n):
            of[phrase] = (*of.get(phrase, ()), category)
    return Categories(tuple(every), MappingProxyType(of), frozenset(plurals))


@lru_cache(maxsize=8)
def plain(name: str) -> tuple[str, ...]:
    """All words and phrases of a list without sections, such as `fillers`."""
    return tuple(item for _, line in _lines(f"{name}.txt") for item in _items(line))


def _lines(name: str) -> Iterator[tuple[str, str]]:
    """Section and content of each line of a list that holds something."""
    section = ""
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        content = line.strip()
        if content.startswith("["):
            section = content.strip("[]")
        elif content and not content.startswith("#"):
            yield section, content


def _items(line: str) -> list[str]:
    return [item.strip() for item in line.split(",")]
