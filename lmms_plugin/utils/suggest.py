"""What a message says of a name that nobody knows: what was probably meant, and what there is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a word was probably meant to be, in whatever case it is written; None where none is near."""
    names = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), names, n=1)
    return names[found[0]] if found else None


def near(word: str, known: Iterable[str]) -> str:
    """The same as the end of a message, `, did you mean 'awq'?`; empty where there is none."""
    found = nearest(word, known)
    return "" if found is None else f", did you mean {found!r}?"


def unknown(kind: str, word: str, known: Iterable[str], owner: str | None = None) -> ValueError:
    """The error about a name that is not among the known ones; names the nearest and lists all.

    Args:
        kind: What the word was to be the name of.
        word: As it was given.
        known: All names, in the order of the list.
        owner: What has these names, where others have others.
    """
    known = list(known)
    whose = "" if owner is None else f" for {owner!r}"
    return ValueError(f"unknown {kind} {word!r}{near(word, known)} (known{whose}: {', '.join(known) or 'none'})")
