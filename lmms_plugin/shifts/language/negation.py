"""Where an expression says what is not so: words put in there leave it true."""

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
    """The words that negate, in order: not, n't, no, without, w/o, never, except, other than and their like."""
    return [Span(match.start(), match.end(), match.group().lower()) for match in _NEGATOR.finditer(text)]


def is_negated(text: str, span: Span) -> bool:
    """Whether a phrase stands where an expression says what is not so.

    That is from a word that negates to the end of its clause: a full stop, a semicolon or `but`, not a comma, because
    of `not red, green or blue`. What stands behind the negated words without being meant (`man without a hat in red`)
    counts, too: nothing tells the two apart. So does what is taken off (`shirt off`).

    Args:
        text: An expression.
        span: A phrase of it; one that begins with the word that negates is not negated by it.
    """
    if _TAKEN_OFF.match(text, span.stop):
        return True
    return any(found.stop <= span.start < _end_of_clause(text, found.stop) for found in negators(text))


def _end_of_clause(text: str, start: int) -> int:
    end = _CLAUSE_END.search(text, start)
    return len(text) if end is None else end.start()
