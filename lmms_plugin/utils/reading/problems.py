"""Errors of several lines: all that is wrong in a file is told at once, one line each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lmms_plugin.utils.messages import one_line

MOST_LINES = 20
"""Maximum number of problems that are told; more are counted."""


class SeveralErrors(ValueError):
    """Several problems of one file; its arguments are one line for each problem."""

    def __str__(self) -> str:
        """Return the lines."""
        return "\n".join(self.args)


def lines_of(error: BaseException) -> tuple[str, ...]:
    """Return what an error tells, in lines; one line unless it is several errors."""
    return error.args if isinstance(error, SeveralErrors) else (one_line(error),)


def refusal(lines: Iterable[str]) -> ValueError:
    """Return one error for all problems, each told once; beyond `MOST_LINES`, the rest is counted.

    Args:
        lines: One line for each problem; at least one.
    """
    told = list(dict.fromkeys(lines))
    if len(told) == 1:
        return ValueError(told[0])
    left = len(told) - MOST_LINES
    return SeveralErrors(*told[:MOST_LINES], *([f"and {left} more"] if left > 0 else []))


class Problems:
    """Collection of the problems of several checks that do not depend on each other."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._cause: ValueError | None = None

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep a `ValueError` of one check for the end."""
        try:
            yield
        except ValueError as error:
            self._lines += lines_of(error)
            self._cause = self._cause or error

    def expect_none(self) -> None:
        """Refuse all that was collected.

        Raises:
            ValueError: A check failed; `SeveralErrors` if there is more than one problem.
        """
        if self._lines:
            raise refusal(self._lines) from self._cause
