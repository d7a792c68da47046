"""A model's own word on how sure it is: how answers to `lmms_plugin.protocol.dialects.CONFIDENCE_QUESTION` are read."""

import math
import re

_OF_HUNDRED = re.compile(r"\s*(?:%|percent\b|/\s*100\b|out of 100\b)", re.IGNORECASE)
_DIGITS = re.compile(r"\d+(?:\.\d+)?")
# Not part of a word, a list, a date, or a number with a sign.
_NUMBER = re.compile(rf"(?<![\w.,-]){_DIGITS.pattern}(?!\w|[.,-]\d)")


def stated_confidence(statement: str) -> float:
    """Read what a model says about its confidence, its reasoning left out (`Response.stated`).

    The scale is the one that was asked for, and never guessed: exactly one number between 0 and 100, perhaps followed
    by "%", "percent", "/100" or "out of 100". A range, a list, a number with a sign or above 100 is no confidence; nor
    is a fraction below 1, which may be meant either way.

    Returns:
        In [0, 1]; NaN where the statement names no such number, to be counted apart and never taken for 0.
    """
    text = _OF_HUNDRED.sub(" ", statement)
    numbers = _NUMBER.findall(text)
    if len(numbers) != 1 or len(_DIGITS.findall(text)) != 1:
        return math.nan
    value = float(numbers[0])
    unambiguous = value == 0.0 or 1.0 <= value <= 100.0
    return value / 100.0 if unambiguous else math.nan
