"""Words for directions, in expressions about a picture that is mirrored, turned or cut.

An expression must stay true of the moved picture. Left and right change places in a mirrored one; that holds for the
viewer's sides and for a person's own alike, because the mirror image of a raised left hand is a raised right hand.
What cannot be changed for certain gives None, and the document is left out: adverbs (`right next to`), remains (`one
left`), idioms (`right way up`), clocks and compasses, abbreviations, misspellings and words run together (`farleft` is
known, `leftdog` is not), and writing, which nobody reads in a mirror. The words are English: what is written in
another script is left out, too, and so are the commonest words for left and right of other languages.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from types import MappingProxyType

_SIDE = re.compile(
    r"""(?<![\w])
    (?P<before>(?:top|bottom|upper|lower|far|mid|middle|cent(?:er|re)|back|front|rear)?-?)
    (?P<side>left|right)
    (?P<after>(?:-?(?:most|hand|handed|hander|side|ward|wards)|er|y|ie|ies)?)
    (?![\w])""",
    re.IGNORECASE | re.VERBOSE,
)
_OTHER = MappingProxyType({"left": "right", "right": "left"})
_INSIDE = re.compile(r"left|right", re.IGNORECASE)
_WITHOUT_A_SIDE = re.compile(
    r"\b(?:a?bright\w*|(?:af)?frights?|(?:af)?fright(?:en\w*|ful\w*|ed)|(?:copy|birth|out|up|al|down|forth|a)right\w*"
    r"|righteous\w*|rightful\w*|(?:play|ship|wheel|mill)?wrights?|clefts?|left[- ]?overs?)\b",
    re.IGNORECASE,
)
"""Words that hold one of the two and name no side. In others, a space is missing: `farleft`, `leftdog`, `left2`."""

_NOT_A_SIDE = re.compile(
    r"\b(?:all|quite)[- ]+right\b"
    r"|\bright[- ]+(?:now|away|there|here|way|of[- ]way|angle[sd]?|triangles?|whales?|click|size|colou?r)\b"
    r"|\bright[- ]?side[- ]?(?:up|down|out)\b"
    r"|\bwhat(?:'?s|\s+is|\s+was)?\s+left\b"
    r"|\bleft[- ]?overs?\b|\bleft\s+(?:alone|unattended|open|uneaten|empty|off|for|after)\b",
    re.IGNORECASE,
)
_PLACED = frozenset(
    (
        *("on", "to", "at", "in", "from", "of", "the", "far", "your", "our", "my", "his", "her", "their", "its"),
        *("top", "bottom", "upper", "lower", "front", "back", "rear", "middle", "center", "centre", "very", "most"),
        *("facing", "looking", "towards", "toward", "with"),
    )
)
"""Words behind which `left` and `right` are sides."""
_PLACING = frozenset(("of", "side", "hand", "corner", "edge", "half", "end", "most", "one", "ones", "person", "guy"))
"""Words before which they are, unless something remains (`one left`)."""
_RIGHT_AS_ADVERB = frozenset(
    (
        *("next", "behind", "beside", "besides", "before", "after", "above", "below", "under", "underneath"),
        *("beneath", "against", "by", "near", "around", "in", "on", "at", "up", "down", "along", "through", "inside"),
        *("outside", "between", "across", "over", "off", "out", "into", "onto", "to", "past", "beyond"),
    )
)
_LOOKING = frozenset(("facing", "looking"))
"""Verbs behind which `right` is a side, but for `looking right at us`."""
_LEFT_AS_VERB = frozenset(
    (
        *("behind", "out", "over", "in", "on", "at", "to", "with", "there", "here"),
        *("by", "near", "under", "beside", "next", "against", "inside", "outside"),
    )
)
_SUBJECTS = frozenset(
    (
        *("is", "are", "was", "were", "be", "been", "being", "has", "have", "had", "who", "that", "he", "she", "it"),
        *("they", "one", "ones", "only", "nothing", "something", "whats", "bite", "bites", "piece", "pieces"),
        *("slice", "slices", "some", "most", "little", "much", "food", "just", "last", "few", "many", "all"),
        *("both", "none", "two", "three", "four", "five", "six", "several"),
    )
)
"""Words behind which `left` may be what remains or went away."""

_UNSURE = re.compile(
    r"\b(?:l|r|lt|rt|lft|rgt|rght|lef|letf|lfet|elft|leftt|rigt|rigth|rihgt|righ|rightt|ritght)\b"
    r"|\b(?:anti-?|counter-?)?clockwise\b|\bo[' ]?clock\b|\b\d{1,2}:\d\d\b"
    r"|\b(?:north|south)?-?(?:east|west)(?:ern)?\b"
    r"|\b[lr]hs\b|\bport(?:[- ]side|side)\b|\bstarboard\b|\bsouthpaws?\b"
    # German, French, Spanish, Italian, Portuguese, Swedish, Danish, Norwegian, Polish.
    r"|\b(?:links|rechts|linke[rsnm]?|rechte[rsnm]?|gauche|droite?|izquierd[oa]s?|derech[oa]s?|sinistr[aoei]|destr[aoei]"
    r"|esquerd[oa]s?|direit[oa]s?|v\u00e4nster|v\u00e4nstra|h\u00f6ger|h\u00f6gra|venstre|h\u00f8jre|h\u00f8yre"
    r"|lew(?:o|y|a|ej)|praw(?:o|y|a|ej))\b",
    re.IGNORECASE,
)
_WRITING = re.compile(
    r"[#\"]|(?<!\w)'[^']+'(?!\w)|\b(?:numbers?|numbered|digits?|letters?|lettering|says?|saying|written|writing|words?"
    r"|text|logos?|labell?ed|initials?|spell(?:s|ed|ing)|captions?|headlines?|(?:licen[sc]e|number)[- ]?plates?"
    r"|name[- ]?(?:tag|plate)s?)\b"
    # `player 12`, `jersey 5`, `5 on shirt`, and not `2 dogs`, `the 2 dogs` or `1 on the left`.
    r"|(?<=[a-z])(?<!\bthe)(?<!\bof)\s+\d+\b(?!\s+from)|^\d+\s+on\s+(?:(?:his|her|their|its|the)\s+)?"
    r"(?:shirt|back|jersey|chest|uniform|side\s+of)\b",
    re.IGNORECASE,
)
_UP_AND_DOWN = re.compile(
    r"\b(?:top\w*|bottom\w*|upper\w*|lower\w*|above|below|under|underneath|beneath|over|overhead|up|down|upside|upright"
    r"|upward|upwards|downward|downwards|high|higher|highest|low|lowest|horizontal\w*|vertical\w*|sideways"
    r"|north\w*|south\w*)\b",
    re.IGNORECASE,
)
_IN_THE_FRAME = re.compile(
    r"\b(?:edges?|corners?|borders?|frame|middle|cent(?:er|re)(?:most)?|cut|cutoff|cropped|partial|partially|partly|half"
    r"|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last|\d+(?:st|nd|rd|th)|centr(?:al|ed)|centered"
    r"|visible|barely|sliver)\b|\b(?:of|in|on)\s+(?:the\s+|this\s+)?(?:picture|photo|pic|image|shot|screen|view|sight)\b"
    # Counts from a side: `two from the left`, `number 3 in from right`.
    r"|\bfrom\s+(?:the\s+)?(?:far\s+)?(?:left|right|top|bottom|front|back|end)\b",
    re.IGNORECASE,
)


def kept(expression: str) -> str | None:
    """Return the expression: nothing that it says of directions has changed."""
    return expression


def cropped(expression: str) -> str | None:
    """Return the expression, or None where it names a place in the frame or counts objects off.

    `leftmost` stays true of what is cut out or put on a larger canvas; `second from left`, `in the corner` and `half a
    dog at the edge` may not.
    """
    text = _plain(expression)
    return None if text is None or _IN_THE_FRAME.search(text) else expression


def turned(expression: str) -> str | None:
    """Return the expression, or None where it speaks of left, right, up or down, which a quarter turn changes."""
    text = _plain(expression)
    directed = (_SIDE, _NOT_A_SIDE, _UNSURE, _UP_AND_DOWN)
    if text is None or any(words.search(text) for words in directed):
        return None
    return None if _hides_a_side(text) else expression


def mirrored(expression: str) -> str | None:
    """Return the expression with left and right exchanged, or None where it is not certain what they mean."""
    text = _plain(expression)
    if text is None or any(words.search(text) for words in (_NOT_A_SIDE, _UNSURE, _WRITING)) or _hides_a_side(text):
        return None
    sides = list(_SIDE.finditer(text))
    if not sides:
        return expression
    if not all(_is_side(text, found) for found in sides):
        return None
    return _SIDE.sub(lambda found: found["before"] + _exchanged(found["side"]) + found["after"], text)


RULES: Mapping[str, Callable[[str], str | None]] = MappingProxyType(
    {"kept": kept, "cropped": cropped, "mirrored": mirrored, "turned": turned}
)
"""What becomes of an expression → the function that does it; None where the document is left out."""


_TYPEWRITTEN = str.maketrans(
    {**dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'"), **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"')}
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
)


def _plain(expression: str) -> str | None:
    """Return the expression in the letters, quotes and hyphens of a typewriter; None in another script than Latin."""
    if expression.isascii():
        return expression
    shown = (letter for letter in unicodedata.normalize("NFKC", expression) if unicodedata.category(letter) != "Cf")
    text = "".join(shown).translate(_TYPEWRITTEN)
    others = (letter for letter in text if letter.isalpha() and not unicodedata.name(letter, "").startswith("LATIN"))
    return None if any(others) else text


def _hides_a_side(expression: str) -> bool:
    """Return whether `left` or `right` is left in a word that is neither a side nor known to name none."""
    return _INSIDE.search(_WITHOUT_A_SIDE.sub(" ", _SIDE.sub(" ", expression))) is not None


def _is_side(text: str, found: re.Match[str]) -> bool:
    if found["before"].strip("-") or found["after"]:
        return True
    behind = re.search(r"([\w']+)[^\w']*$", text[: found.start()])
    ahead = re.match(r"\s+([\w']+)", text[found.end() :])
    last, following = (match[1].lower() if match else "" for match in (behind, ahead))
    if last in _LOOKING and found["side"].lower() == "right" and following in _RIGHT_AS_ADVERB:
        return False
    if last in _PLACED or following in _PLACING:
        return True
    if found["side"].lower() == "right":
        return following not in _RIGHT_AS_ADVERB
    went = following in _LEFT_AS_VERB or following.endswith("ing")
    return last not in _SUBJECTS and not (went and last)


def _exchanged(side: str) -> str:
    other = _OTHER[side.lower()]
    if side.isupper():
        return other.upper()
    return other.capitalize() if side[0].isupper() else other
