"""Texts of messages: counts, commands that can be pasted, errors in one line."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterable, Mapping
from types import MappingProxyType

_REMEDIES: Mapping[int, str] = MappingProxyType(
    {
        errno.ENOENT: "check how it is written, and that the folder it is to lie in is there",
        errno.EACCES: "change its permissions, or name another place",
        errno.EPERM: "change its permissions, or name another place",
        errno.EROFS: "name another place",
        errno.EISDIR: "name a file",
        errno.ENOTDIR: "name a folder, below folders alone",
        errno.EEXIST: "name another place, or remove what is there",
        errno.ENOTEMPTY: "name another place, or remove what is there",
        errno.ENAMETOOLONG: "name something shorter",
        errno.ENOSPC: "make room there, or name another place",
        errno.EDQUOT: "make room there, or name another place",
    }
)
"""Remedies for errors of the operating system at a path."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Format a number with its noun: `1 run`, `2 runs`.

    Args:
        number: Count.
        noun: Noun in the singular.
        plural: Noun in the plural; by default with an s.
    """
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def command_line(parts: Iterable[object]) -> str:
    """Quote a command for a shell, including blanks, quotes and dollar signs."""
    return shlex.join(map(str, parts))


def one_line(error: BaseException) -> str:
    """Format an error in one line; errors of the operating system name the path, the problem and the remedy."""
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None or error.filename is None:
        return " ".join(str(error).split()) or type(error).__name__
    path = error.filename if error.filename2 is None else error.filename2
    named = path.decode(errors="backslashreplace") if isinstance(path, bytes) else str(path)
    remedy = _REMEDIES.get(error.errno)
    return " ".join(f"{named}: {error.strerror.lower()}{f'; {remedy}' if remedy else ''}".split())
