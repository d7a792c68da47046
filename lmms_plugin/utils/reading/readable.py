"""Files that libraries read for us: what these raise about damaged ones, as errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from lmms_plugin.utils.reading.validation import Problem

_OWN_WORDS = (OSError, ImportError, MemoryError, RuntimeError)
"""Errors that are none of damage (memory that runs out on a GPU is a `RuntimeError`), or that name the file."""
_LONGEST = 300


def problem(error: ValidationError) -> str:
    """What pydantic refuses in what a file says, in one short line."""
    return Problem.of(error).text


@contextmanager
def readable(what: object) -> Iterator[None]:
    """Name what is read in every error about it; libraries raise plain `Exception`, `KeyError` and such of damage.

    Args:
        what: Is read, as an error is to call it.

    Raises:
        ValueError: It cannot be read; one line.
    """
    try:
        yield
    except _OWN_WORDS:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        # Our own checks say what they expected.
        if type(error) is ValueError and "expected" in text:
            raise
        said = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        raise ValueError(f"{what} cannot be read, it may be damaged: {said[:_LONGEST]}") from error
