"""Errors that name the file, for damaged files that libraries read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from lmms_plugin.utils.reading.validation import Problem

_OWN_WORDS = (OSError, ImportError, MemoryError, RuntimeError)
"""Errors that do not indicate damage (out of memory on a GPU is a `RuntimeError`), or that name the file."""
_LONGEST = 300


def problem(error: ValidationError) -> str:
    """Return what pydantic refuses in a file, in one short line."""
    return Problem.of(error).text


@contextmanager
def readable(what: object) -> Iterator[None]:
    """Name the file in every error about it; for damage, libraries raise plain `Exception`, `KeyError` and others.

    Args:
        what: Name of what is read, for the error.

    Raises:
        ValueError: It cannot be read; one line.
    """
    try:
        yield
    except _OWN_WORDS:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        # Our own checks state what they expected.
        if type(error) is ValueError and "expected" in text:
            raise
        said = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        raise ValueError(f"{what} cannot be read, it may be damaged: {said[:_LONGEST]}") from error
