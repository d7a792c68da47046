"""All figures of the report, section by section."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from matplotlib import rc_context

from lmms_plugin.report.figures import changes, losses, reliability, tradeoffs, under_shift
from lmms_plugin.report.figures.drawing import STYLE, DrawnFigure
from lmms_plugin.report.numbers.summary import Scope, Summary

SECTIONS: Mapping[str, Callable[[Scope, Summary, int], Iterator[DrawnFigure]]] = MappingProxyType(
    {
        "lost": losses.draw,
        "pareto": tradeoffs.draw,
        "reliability": reliability.reliability,
        "risk": reliability.risk_coverage,
        "severity": under_shift.severity,
        "heat": under_shift.heat,
        "flips": changes.flips,
    }
)
"""Section → function that draws it, for one model on one dataset."""
PAGE, PHONE = 4, 2
"""Number of panels side by side."""


def every(summary: Summary, across: int = PAGE) -> dict[str, list[DrawnFigure]]:
    """Draw all figures by section; figures with nothing to show are left out.

    Args:
        summary: Results to draw.
        across: Number of panels side by side.
    """
    with rc_context(dict(STYLE)):
        found = {
            section: [drawn for scope in summary.scopes for drawn in draw(scope, summary, across)]
            for section, draw in SECTIONS.items()
        }
        found["layers"] = list(changes.layers(summary, across))
    return found
