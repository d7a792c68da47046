"""The figures inside the page: one version for wide windows and print, one for narrow windows."""

import multiprocessing
import pickle
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from lmms_plugin.report.figures import all_figures as figures
from lmms_plugin.report.figures import svg
from lmms_plugin.report.figures.drawing import DrawnFigure
from lmms_plugin.report.numbers.summary import Summary

ONE_PROCESS = 500
"""Number of lines up to which drawing is faster than starting a process."""


class Shown(NamedTuple):
    """A figure on the page.

    Attributes:
        drawn: Drawn figure.
        wide: SVG for wide windows and print.
        narrow: SVG for narrow windows.
    """

    drawn: DrawnFigure
    wide: Markup
    narrow: Markup


def shown(summary: Summary, workers: int) -> dict[str, list[Shown]]:
    """Draw all figures by section, in two processes where there are many lines.

    Args:
        summary: Results to draw.
        workers: Maximum number of processes.
    """
    if workers == 1 or len(summary.lines) < ONE_PROCESS:
        wide, narrow = _wide(summary), _narrow(summary)
    else:
        # Forking a process that has threads (BLAS, pyarrow) may hang.
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=context) as pool:
            # Through a file, since a pipe would hold all of a large study once more on either side.
            file = Path(folder) / "summary"
            with file.open("wb") as stream:
                pickle.dump(summary, stream)
            promised = pool.submit(_narrow_of, file)
            wide, narrow = _wide(summary), promised.result()
    return {
        section: [Shown(one, markup, other) for (one, markup), other in zip(drawn, narrow[section], strict=True)]
        for section, drawn in wide.items()
    }


def _wide(summary: Summary) -> dict[str, list[tuple[DrawnFigure, Markup]]]:
    drawn = figures.every(summary)
    return {section: [(one, _inline(one, one.name)) for one in several] for section, several in drawn.items()}


def _narrow(summary: Summary) -> dict[str, list[Markup]]:
    drawn = figures.every(summary, figures.PHONE)
    return {section: [_inline(one, f"{one.name}-n") for one in several] for section, several in drawn.items()}


def _narrow_of(file: Path) -> dict[str, list[Markup]]:
    with file.open("rb") as stream:
        return _narrow(pickle.load(stream))


def _inline(drawn: DrawnFigure, name: str) -> Markup:
    return Markup(svg.inline(drawn.figure, name, drawn.title, drawn.says))
