"""Output to a terminal: names are printed as data, never as markup or as characters that the terminal cannot encode."""

from __future__ import annotations

import io
import sys
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_WIDTH = 160


def console() -> Console:
    """Return a console on standard output that prints `[/x]` and `:x:` literally.

    Tables in a file or a pipe are not cut to the assumed width of 80 columns.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


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
                console=self.console, get_renderable=self.drawn, refresh_per_second=4, transient=self.wiped
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def drawn(self) -> RenderableType:
        """Return what to draw at this moment."""
        raise NotImplementedError
