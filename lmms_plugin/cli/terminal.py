"""What goes to a terminal: names are data, and never markup or characters that it cannot write."""

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
    """Standard output for tables, in which `[/x]` and `:x:` are what they are.

    Tables that go to a file or a pipe must not be cut to the 80 columns assumed for it.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def write_anything() -> None:
    """Have standard output and error write names that are no UTF-8, as file names may be, with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class InPlace:
    """A context within which something is drawn again and again at the bottom of a terminal, and nowhere else.

    Attributes:
        console: Where to.
        wiped: Whether it vanishes at the end.
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
        """What to draw, as things stand."""
        raise NotImplementedError
