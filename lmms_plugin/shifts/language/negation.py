"""Scope of negation in an expression: words inserted there leave it true."""

import re

from lmms_plugin.shifts.language.lexicon import Span

_CONTRACTED = "is|are|was|were|does|do|did|has|have|had|ca|wo|ai|could|should|would"
_NEGATOR = re.compile(
    rf"""\b(?:
        not | no | non | none | nobody | nothing | never | neither | nor | cannot
        | without | w/o | w/out | wo/ | minus | lacks? | lacking | missing | absent
        | except | excepting | excluding | besides | unlike
        | (?:other|rather) \s+ than | instead \s+ of | opposite \s+ of | different \s+ (?:from|than)
        | (?:every(?:one|body|thing)?|any(?:one|body|thing)?|all) \s+ but
        | (?:{_CONTRACTED})\s?n\s?['\u2019`]?\s?t
    )(?![\w])""",
    re.IGNORECASE | re.VERBOSE,
)
_CLAUSE_END = re.compile(r"[;.!?)]|\bbut\b", re.IGNORECASE)
_TAKEN_OFF = re.compile(r"\s+(?:off|removed|gone|missing)\b", re.IGNORECASE)


def negators(text: str) -> list[Span]:
    """Return the words that negate, in order: not, n't, no, without, w/o, never, except, other than and their like."""
    return [Span(match.start(), match.end(), match.group().lower()) for match in _NEGATOR.finditer(text)]


def is_negated(text: str, span: Span) -> bool:
    """Return whether a phrase is in the scope of a negation.

    The scope runs from a negating word to the end of its clause: a full stop, a semicolon or `but`, not a comma,
    because of `not red, green or blue`. Words after the negated ones without being meant (`man without a hat in red`)
    count, too: nothing separates the two. So does what is taken off (`shirt off`).

    Args:
        text: Expression.
        span: Phrase of it; one that begins with the negating word is not negated by it.
    """
    if _TAKEN_OFF.match(text, span.stop):
        return True
    return any(found.stop <= span.start < _end_of_clause(text, found.stop) for found in negators(text))


def _end_of_clause(text: str, start: int) -> int:
    end = _CLAUSE_END.search(text, start)
    return len(text) if end is None else end.start()
