"""Colours and markers of the figures: a quantizer looks the same in every figure, on paper and on a dark screen.

Figures are drawn in the light colours. On the page each colour becomes a variable of the style sheet, so that one
drawing serves light, dark and print. Every colour has a contrast of at least 3 : 1 with its background, and lines
differ in their markers as well, so that no information depends on colour alone.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple


class Tone(NamedTuple):
    """One colour on a light and on a dark background."""

    light: str
    dark: str


INK = "#1a2027"
MUTED = "#58626e"
RULE = "#d5dbe2"
GOOD = "#2f7fb5"
BAD = "#cf5b2e"
BAND_ALPHA = 0.16

TONES: Mapping[str, Tone] = MappingProxyType(
    {
        "ink": Tone(INK, "#e8ebef"),
        "muted": Tone(MUTED, "#a3adb9"),
        "rule": Tone(RULE, "#343c46"),
        "good": Tone(GOOD, "#3f8fc6"),
        "bad": Tone(BAD, "#c2552b"),
        "s0": Tone("#4a525c", "#c3cad3"),
        "s1": Tone("#0b6bab", "#63b3ee"),
        "s2": Tone("#b8510d", "#f19a5b"),
        "s3": Tone("#0e7f5f", "#4fcfa5"),
        "s4": Tone("#a23d7f", "#ea92c6"),
        "s5": Tone("#7a5d00", "#dcb93f"),
        "s6": Tone("#5b4db0", "#aba0f5"),
        "s7": Tone("#9a2f3b", "#f2858f"),
        "s8": Tone("#2b7a86", "#6cc9d6"),
        "s9": Tone("#6b6f1d", "#c3c85e"),
        "s10": Tone("#7b4a2a", "#d3a07c"),
        "s11": Tone("#3f6f2a", "#94cd7a"),
    }
)

SURFACES: Mapping[str, Tone] = MappingProxyType(
    {
        "paper": Tone("#fdfdfc", "#14181d"),
        "tint": Tone("#f1f3f5", "#1d2229"),
        "edge": Tone("#7d8793", "#76828f"),
        "badtext": Tone("#a83f17", "#f0915f"),
    }
)
"""Colours of the page that figures do not use."""

_KNOWN = (
    *("none", "rtn", "hqq", "awq", "mbq", "gptq", "ptqtp", "ptqtp_weighted"),
    *("quanto", "bitsandbytes", "torchao", "autoround"),
)
_MARKS = ("s", "o", "^", "D", "v", "P", "X", "<", ">", "h", "p", "d")
DENSE = "none"


class Look(NamedTuple):
    """Colour and marker of a quantizer."""

    colour: str
    mark: str


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """Return method → colour and marker; unknown methods take those that the known ones leave."""
    found: dict[str, Look] = {}
    places = {name: k for k, name in enumerate(_KNOWN)}
    wanted = list(dict.fromkeys(methods))
    free = [k for k in range(1, len(_KNOWN)) if _KNOWN[k] not in wanted] or list(range(1, len(_KNOWN)))
    for method in wanted:
        place = places[method] if method in places else free[len([m for m in found if m not in places]) % len(free)]
        found[method] = Look(TONES[f"s{place}"].light, _MARKS[place])
    return found
