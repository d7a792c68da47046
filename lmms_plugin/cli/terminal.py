"""Output to a terminal: names are printed as data, never as markup or as characters that the terminal cannot encode."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

T = TypeVar("T")
_WIDTH, _UNLIMITED = 160, 1000
_END = object()


def console(*tables: RenderableType) -> Console:
    """Return a console on standard output that prints `[/x]` and `:x:` literally.

    Tables in a file or a pipe are not cut to the assumed width of 80 columns.

    Args:
        tables: Tables that it is at least as wide as.
    """
    own = _console(None if sys.stdout.isatty() else _WIDTH)
    needed = max((_console(_UNLIMITED).measure(table).maximum for table in tables), default=0)
    return _console(needed) if needed > own.width else own


def _console(width: int | None) -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, width=width)


def write_anything() -> None:
    """Make standard output and error escape names that are not valid UTF-8, as file names may be."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class InPlace:
    """Context manager that redraws something at the bottom of a terminal, and draws nothing elsewhere.

    Attributes:
        console: Console to write to.
        wiped: Whether the drawing disappears at the end.
    """

    console: Console
    wiped: ClassVar[bool] = False
    _live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(
                console=self.console,
                get_renderable=self.drawn,
                refresh_per_second=4,
                transient=self.wiped,
                # What is printed to a file or a pipe stays there.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def stop(self) -> None:
        """End the drawing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def drawn(self) -> RenderableType:
        """Return what to draw at this moment."""
        raise NotImplementedError


class Working(InPlace):
    """Note on standard error of what a command does and for how long, on a terminal alone; wiped at the end.

    Args:
        what: What is done.
    """

    wiped = True

    def __init__(self, what: str) -> None:
        # rich costs start-up time, and errors in arguments need none.
        from rich.console import Console
        from rich.spinner import Spinner

        self.console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._what, self._since = what, time.monotonic()
        self._spinner = Spinner("line")

    def drawn(self) -> RenderableType:
        """Return the note with the seconds since its start."""
        self._spinner.update(text=f"{self._what} ({time.monotonic() - self._since:.0f} s)")
        return self._spinner


def each(items: Iterable[T], what: str) -> Iterator[T]:
    """Yield items, with a note of `Working` while one is waited for."""
    waiting = iter(items)
    while True:
        with Working(what):
            item = next(waiting, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]
