"""The figures as the page holds them: once for wide windows and print, once for narrow ones."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from markupsafe import Markup

from lmms_plugin.report.figures import all_figures as figures
from lmms_plugin.report.figures import svg
from lmms_plugin.report.figures.drawing import DrawnFigure
from lmms_plugin.report.numbers.summary import Summary

ONE_PROCESS = 500
"""Lines up to which drawing takes less long than starting a process."""


class Shown(NamedTuple):
    """A figure on the page.

    Attributes:
        drawn: The figure.
        wide: For wide windows and print, as SVG.
        narrow: For narrow windows.
    """

    drawn: DrawnFigure
    wide: Markup
    narrow: Markup


def shown(summary: Summary, workers: int) -> dict[str, list[Shown]]:
    """All figures by section; drawn by two processes where there are many lines.

    Args:
        summary: What to draw.
        workers: Processes there may be.
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
