"""Messages about unknown names: the nearest known name, and all known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name nearest to a word, ignoring case; None if none is near."""
    names = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), names, n=1)
    return names[found[0]] if found else None


def near(word: str, known: Iterable[str]) -> str:
    """Return the end of a message, `, did you mean 'awq'?`; empty if no known name is near."""
    found = nearest(word, known)
    return "" if found is None else f", did you mean {found!r}?"


def unknown(kind: str, word: str, known: Iterable[str], owner: str | None = None) -> ValueError:
    """Return the error about an unknown name; it names the nearest and lists all.

    Args:
        kind: Kind of name that was expected.
        word: Word as given.
        known: All known names, in the order of the list.
        owner: Owner of these names, where others have other names.
    """
    known = list(known)
    whose = "" if owner is None else f" for {owner!r}"
    return ValueError(f"unknown {kind} {word!r}{near(word, known)} (known{whose}: {', '.join(known) or 'none'})")
