"""Parts shared by all figures: style, sizes in inches, legends, and the type of a drawn figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lmms_plugin.analysis.axes import DENSE_BITS, UNQUANTIZED
from lmms_plugin.report.figures.palette import DENSE, INK, MUTED, RULE, Look
from lmms_plugin.report.numbers.summary import Line, series
from lmms_plugin.report.numbers.tables import ReportTable
from lmms_plugin.utils import hashing

Floats = npt.NDArray[np.float64]
Key = tuple[str, int | None]
"""Method and bits."""

STYLE: Mapping[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 9.0,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    # Names are data: a dollar sign does not start a formula.
    "text.parse_math": False,
}
_ROOM, _LONGEST_SLUG = 30, 60
"""Maximum number of characters of a name in a figure, and in a file name."""
WIDE, NARROW = 9.4, 4.6
"""Widths of figures in inches, for a page and for a phone."""
BAND = "A band reaches from the lowest to the highest run where a line is the mean of several."


class DrawnFigure(NamedTuple):
    """A drawn figure.

    Attributes:
        name: Name for files and anchors.
        title: Title in one line.
        says: What the figure shows and how to read it.
        figure: Matplotlib figure.
        table: Numbers of the figure.
        more: Whether the figure is folded away at first.
    """

    name: str
    title: str
    says: str
    figure: Figure
    table: ReportTable
    more: bool = False


class Margins(NamedTuple):
    """Space around and between panels, in inches."""

    left: float = 0.62
    right: float = 0.12
    top: float = 0.28
    bottom: float = 0.5
    across: float = 0.3
    down: float = 0.55


_LEGEND: dict[str, float] = {
    "handlelength": 1.3,
    "handletextpad": 0.5,
    "columnspacing": 1.4,
    "borderaxespad": 0.0,
    "labelspacing": 0.35,
}


def panels(
    rows: int,
    columns: int,
    width: float,
    height: float,
    handles: Sequence[Any] = (),
    margins: Margins = Margins(),  # noqa: B008
    *,
    sharex: Any = True,
    sharey: Any = True,
    ratios: Sequence[float] | None = None,
) -> tuple[Figure, Any]:
    """Create a figure of rows × columns panels below a legend; sizes are fixed, not fitted, so that figures line up.

    Args:
        rows: Number of panels below one another.
        columns: Number of panels side by side.
        width: Width of the figure, in inches.
        height: Total height of the rows, in inches, without the space between them.
        handles: Entries of the legend; empty for no legend.
        margins: Space around the panels.
        sharex: As in matplotlib.
        sharey: As in matplotlib.
        ratios: Ratios of the rows' heights.
    """
    lines, across = _legend_size(handles, width)
    head = 0.2 * lines + (0.12 if lines else 0.0)
    total = height + margins.top + margins.bottom + margins.down * (rows - 1) + head
    figure = Figure(figsize=(width, total))
    side = (width - margins.left - margins.right - margins.across * (columns - 1)) / columns
    grid = figure.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=sharex,
        sharey=sharey,
        gridspec_kw={
            "left": margins.left / width,
            "right": 1 - margins.right / width,
            "top": 1 - (margins.top + head) / total,
            "bottom": margins.bottom / total,
            "wspace": margins.across / side,
            "hspace": margins.down * rows / height,
            "height_ratios": ratios,
        },
    )
    if handles:
        place = (0.06 / width, 1.0)
        figure.legend(handles=list(handles), loc="upper left", bbox_to_anchor=place, ncols=across, **_LEGEND)
    return figure, grid


def _legend_size(handles: Sequence[Any], width: float) -> tuple[int, int]:
    """Return the number of lines of a legend, and of entries in each."""
    if not handles:
        return 0, 1
    widest = max(len(handle.get_label()) for handle in handles)
    across = max(1, min(len(handles), int(width / (0.42 + 0.072 * widest))))
    return math.ceil(len(handles) / across), across


def small_multiples(
    chosen: Mapping[int | None, Sequence[Key]], styles: Mapping[str, Look], across: int, xlabel: str, ylabel: str
) -> tuple[Figure, list[Any]]:
    """Create one panel per number of bits, and return their axes in that order."""
    columns = min(across, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    full = WIDE if across > 2 else NARROW
    # A few panels do not fill the page, so that panels are equally wide in every figure.
    width = full if columns == across else Margins().left + (full - Margins().left) * columns / across
    figure, grid = panels(rows, columns, width, 1.75 * rows, method_handles(styles))
    axes = grid.ravel().tolist()
    for place, axis in enumerate(axes):
        axis.set_visible(place < len(chosen))
        last = place + columns >= len(chosen)
        axis.tick_params(labelbottom=last)
        if last:
            axis.set_xlabel(xlabel)
        if place % columns == 0:
            axis.set_ylabel(ylabel)
    for axis, bits in zip(axes, chosen, strict=False):
        axis.set_title("other" if bits is None else f"{bits} bits")
    return figure, axes[: len(chosen)]


def by_bits(lines: Iterable[Line]) -> dict[int | None, list[Key]]:
    """Group series by number of bits for the panels, with the unquantized model in each."""
    return keys_by_bits(series(lines))


def keys_by_bits(keys: Iterable[Key]) -> dict[int | None, list[Key]]:
    """Group methods and bits by number of bits, likewise."""
    found = list(keys)
    dense = [key for key in found if key[0] == DENSE]
    quantized = sorted((key for key in found if key[0] != DENSE), key=lambda key: -(key[1] or 0))
    parted: dict[int | None, list[Key]] = {}
    for key in quantized:
        parted.setdefault(key[1], list(dense)).append(key)
    return parted or ({DENSE_BITS: dense} if dense else {})


def method_handles(styles: Mapping[str, Look], *, line: bool = True) -> list[Any]:
    """Return the legend entries of the quantizers."""
    return [handle(look.colour, look.mark, method_name(method), line=line) for method, look in styles.items()]


def handle(colour: str, mark: str, label: str, *, line: bool = True) -> Any:
    """Return one entry of a legend."""
    return Line2D([], [], color=colour, marker=mark, label=short(label), linestyle="-" if line else "none")


def bar_handle(colour: str, label: str) -> Any:
    """Return one entry of a legend of bars."""
    return Patch(color=colour, label=short(label))


def method_name(method: str) -> str:
    """Return the common name of a method."""
    return UNQUANTIZED if method == DENSE else method


def label(key: Key) -> str:
    """Describe method and bits in words."""
    method, bits = key
    return method_name(method) if method == DENSE or bits is None else f"{method} {bits}"


def short(words: str) -> str:
    """Shorten a name to its beginning and end, in characters that can be drawn."""
    drawn = "".join(c if c.isprintable() else "\ufffd" for c in words)
    return drawn if len(drawn) <= _ROOM else f"{drawn[: _ROOM // 2]}…{drawn[len(drawn) - (_ROOM - 1) // 2 :]}"


def slug(words: str) -> str:
    """Return a name for files and anchors; a long one ends with a suffix that makes it unique."""
    found = "-".join("".join(c if c.isalnum() else " " for c in words.lower()).split())
    return found if len(found) <= _LONGEST_SLUG else f"{found[:_LONGEST_SLUG]}-{hashing.of_value(words)[:8]}"


def listed(names: Iterable[str], most: int = 8) -> str:
    """List distinct names in one line."""
    found = list(dict.fromkeys(names))
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
