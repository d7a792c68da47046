"""The figures inside the page: one version for wide windows and print, one for narrow windows."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
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
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            promised = pool.submit(_narrow, summary)
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


def _inline(drawn: DrawnFigure, name: str) -> Markup:
    return Markup(svg.inline(drawn.figure, name, drawn.title, drawn.says))
