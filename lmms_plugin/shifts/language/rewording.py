"""Language shifts for grounding: another wording of the same expression, the same for the same key.

People who ask for an object mistype, use caps lock, hesitate, leave words out and call things by other names. Each
shift is one function `f(text, rng, *level) -> text`, with the `level` of each severity given to the decorator, which
registers it in `TEXT_SHIFTS` and so in the tests. The levels are ours: numbers compare within this package only.

A shift that finds nothing to change returns None, never the unchanged text. Expressions that match nothing are made in
`lmms_plugin.shifts.language.mismatches`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from lmms_plugin.shifts.language import lexicon, phrasing
from lmms_plugin.shifts.language.lexicon import Span, find, replace, words
from lmms_plugin.shifts.language.negation import negators
from lmms_plugin.shifts.severities import SEVERITIES, checked, generator, named

Rewording = Callable[..., str | None]


@dataclass(frozen=True)
class TextShift:
    """Language shift with its five severities.

    Attributes:
        name: Name of the function.
        function: Function f(text, rng, *level) -> another text, or None where it finds nothing to change.
        levels: Arguments of severity 1 to 5.
    """

    name: str
    function: Rewording
    levels: tuple[tuple[float, ...], ...]


_TEXT_SHIFTS: dict[str, TextShift] = {}
TEXT_SHIFTS: Mapping[str, TextShift] = MappingProxyType(_TEXT_SHIFTS)


def text_shift(*levels: tuple[float, ...]) -> Callable[[Rewording], Rewording]:
    """Register the decorated function in `TEXT_SHIFTS` under its name, with one tuple of arguments per severity."""
    if len(levels) != len(SEVERITIES):
        raise ValueError(f"expected {len(SEVERITIES)} levels, got {len(levels)}")

    def register(function: Rewording) -> Rewording:
        _TEXT_SHIFTS[function.__name__] = TextShift(function.__name__, function, levels)
        return function

    return register


def apply(text: str, name: str, severity: int, key: str | int) -> str | None:
    """Return `text` under the shift `name`, or None if the shift finds nothing to change in it.

    The random draws follow from (key, name, severity) alone, by hash, as those of image shifts do.

    Args:
        text: Expression.
        name: Key of `TEXT_SHIFTS`.
        severity: Severity, 1 to 5.
        key: Key of the random draws, usually the document's id. 7 and "7" are the same key.

    Raises:
        ValueError: Unknown name (the message gives the nearest), severity not an integer from 1 to 5.
        TypeError: A key that is neither text nor an integer.
    """
    chosen, severity = named(name, TEXT_SHIFTS, "text shift"), checked(severity, name)
    shifted = chosen.function(text, generator(key, name, severity), *chosen.levels[severity - 1])
    return None if shifted == text else shifted


def _some(rng: np.random.Generator, places: int, share: float, of: int | None = None) -> list[int]:
    """Draw some of the places, ascending: that share of `of` things (of the places, unless given), at least one."""
    count = min(places, max(1, round(share * (places if of is None else of))))
    return sorted(int(place) for place in rng.permutation(places)[:count])


def _one_of(rng: np.random.Generator, options: "tuple[str, ...] | list[str]") -> str:
    return options[int(rng.integers(len(options)))]


# Typing

_ROWS = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
_KEYS = {key: (x + offset, y) for y, (row, offset) in enumerate(_ROWS) for x, key in enumerate(row)}
NEIGHBOURS: Mapping[str, str] = MappingProxyType(
    {
        key: "".join(other for other, (u, v) in _KEYS.items() if other != key and abs(u - x) <= 1 and abs(v - y) <= 1)
        for key, (x, y) in _KEYS.items()
    }
)
"""Letter → the letters whose keys touch its own on a US keyboard."""

_TYPED = ((0.04,), (0.08,), (0.12,), (0.18,), (0.25,))


@text_shift(*_TYPED)
def keyboard_typos(text: str, rng: np.random.Generator, share: float) -> str | None:
    """Hit a neighbouring key instead of that share of the letters."""
    letters = [i for i, character in enumerate(text) if character.lower() in NEIGHBOURS]
    if not letters:
        return None
    typed = list(text)
    for place in _some(rng, len(letters), share):
        old = text[letters[place]]
        new = _one_of(rng, list(NEIGHBOURS[old.lower()]))
        typed[letters[place]] = new.upper() if old.isupper() else new
    return "".join(typed)


@text_shift(*_TYPED)
def swapped_letters(text: str, rng: np.random.Generator, share: float) -> str | None:
    """Type two neighbouring letters of a word in the wrong order, as often as that share of the letters."""
    pairs = [i for i in range(len(text) - 1) if text[i : i + 2].isalpha() and text[i] != text[i + 1]]
    if not pairs:
        return None
    typed, left = list(text), max(1, round(share * sum(map(str.isalpha, text))))
    free = set(range(len(text)))
    for i in (pairs[k] for k in rng.permutation(len(pairs))):
        if left and {i, i + 1} <= free:
            typed[i], typed[i + 1] = typed[i + 1], typed[i]
            free -= {i, i + 1}
            left -= 1
    return "".join(typed)


@text_shift(*_TYPED)
def dropped_letters(text: str, rng: np.random.Generator, share: float) -> str | None:
    """Leave out that share of the letters; of every word one letter stays."""
    droppable = [i for span in words(text) for i in _all_but_one(span.start, span.stop, rng) if text[i].isalpha()]
    if not droppable:
        return None
    gone = {droppable[k] for k in _some(rng, len(droppable), share, of=sum(map(str.isalpha, text)))}
    return "".join(character for i, character in enumerate(text) if i not in gone)


def _all_but_one(start: int, stop: int, rng: np.random.Generator) -> list[int]:
    kept = int(rng.integers(start, stop))
    return [i for i in range(start, stop) if i != kept]


_OF_WORDS = ((0.2,), (0.4,), (0.6,), (0.8,), (1.0,))


@text_shift(*_OF_WORDS)
def casing(text: str, rng: np.random.Generator, share: float) -> str | None:
    """Swap the case of that share of the words, as with caps lock on."""
    cased = [span for span in words(text) if text[span.start : span.stop].swapcase() != text[span.start : span.stop]]
    if not cased:
        return None
    for place in _some(rng, len(cased), share):
        start, stop, _ = cased[place]
        text = text[:start] + text[start:stop].swapcase() + text[stop:]
    return text


@text_shift(*_OF_WORDS)
def spacing(text: str, rng: np.random.Generator, share: float) -> str | None:
    """Insert a space into a word, omit one between words or double it, as often as that share of the words."""
    spans = words(text)
    inside = [(i, i) for i in (int(rng.integers(s.start + 1, s.stop)) for s in spans if s.stop - s.start > 1)]
    places = inside + [match.span() for match in re.finditer(r"(?<=\S)\s+(?=\S)", text)]
    if not places:
        return None
    chosen = [places[k] for k in _some(rng, len(places), share, of=len(spans))]
    for start, stop in sorted(chosen, reverse=True):
        gap = text[start:stop]
        text = text[:start] + (_one_of(rng, ["", gap + " "]) if gap else " ") + text[stop:]
    return text


# Speaking


@text_shift((1,), (2,), (3,), (4,), (5,))
def fillers(text: str, rng: np.random.Generator, count: int) -> str | None:
    """Insert that many fillers before, between or after the words; no filler comes twice."""
    tokens, known = text.split(), lexicon.plain("fillers")
    if not tokens:
        return None
    for filler in rng.permutation(len(known))[:count]:
        tokens.insert(int(rng.integers(len(tokens) + 1)), known[filler])
    return " ".join(tokens)


@text_shift((0.15,), (0.3,), (0.45,), (0.6,), (0.75,))
def dropped_words(text: str, rng: np.random.Generator, share: float) -> str | None:
    """Leave out that share of the words, as in a telegram: function words first, then any; one word stays.

    The result may mean several objects: accuracy under this shift has no ceiling of 1. Words that negate stay, because
    without them it would mean the others.
    """
    tokens = text.split()
    function_words = lexicon.plain("function_words")
    order = [k for k in rng.permutation(len(tokens)) if not negators(tokens[k])]
    if len(order) < 2:
        return None
    order.sort(key=lambda k: tokens[k].lower() not in function_words)
    gone = set(order[: min(len(order) - 1, max(1, round(share * len(tokens))))])
    return " ".join(token for k, token in enumerate(tokens) if k not in gone)


@text_shift((0.25,), (0.5,), (1.0,), (1.5,), (2.5,))
def reordered_words(text: str, rng: np.random.Generator, share: float) -> str | None:
    """Exchange neighbouring words, one exchange after another, `share` for every gap between words."""
    tokens = text.split()
    if len(set(tokens)) < 2:
        return None
    original, left = list(tokens), max(1, round(share * (len(tokens) - 1)))
    while left > 0 or tokens == original:
        k = int(rng.integers(len(tokens) - 1))
        tokens[k], tokens[k + 1] = tokens[k + 1], tokens[k]
        left -= 1
    return " ".join(tokens)


# Choosing words


@text_shift(*_OF_WORDS)
def synonyms(text: str, rng: np.random.Generator, share: float) -> str | None:
    """Replace that share of the words and phrases that `wordlists/synonyms.txt` knows by another of their set."""
    known = lexicon.synonyms()
    spans = find(text, known)
    if not spans:
        return None
    for place in reversed(_some(rng, len(spans), share)):
        text = replace(text, spans[place], _one_of(rng, known[spans[place].phrase]))
    return text


@text_shift((0.01, 0), (0.5, 0), (1.0, 0), (1.0, 1), (1.0, 2))
def paraphrase(text: str, rng: np.random.Generator, share: float, frame: int) -> str | None:
    """Rebuild that share of the places that have another construction, and put `phrasing.FRAMES[frame]` around all.

    `cup with red rim` becomes `cup that has rim that is red`. Where nothing can be rebuilt, a frame of one word does.
    """
    core = phrasing.ARTICLE.sub("", text)
    if not core.strip():
        return None
    places = phrasing.rebuildings(core)
    for place in reversed(_some(rng, len(places), share)) if places else ():
        start, stop, rebuilt = places[place]
        core = replace(core, Span(start, stop, core[start:stop].lower()), rebuilt)
    framed = [f.format(core) for f in phrasing.FRAMES[frame if frame or places else 1]]
    return _one_of(rng, [f for f in framed if f != text])
