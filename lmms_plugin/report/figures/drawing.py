"""What all figures share: style, measures in inches, legends, and what a figure is."""

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
    # Names are data: a dollar sign begins no formula.
    "text.parse_math": False,
}
_ROOM, _LONGEST_SLUG = 30, 60
"""Characters of a name in a figure, and in the name of a file."""
WIDE, NARROW = 9.4, 4.6
"""Widths of figures in inches, for a page and for a phone."""
BAND = "A band reaches from the lowest to the highest run where a line is the mean of several."


class DrawnFigure(NamedTuple):
    """A figure.

    Attributes:
        name: For files and anchors.
        title: In a line.
        says: What it shows and how to read it.
        figure: The drawing.
        table: Its numbers.
        more: Whether it belongs to what is folded away at first.
    """

    name: str
    title: str
    says: str
    figure: Figure
    table: ReportTable
    more: bool = False


class Margins(NamedTuple):
    """Room around and between panels, in inches."""

    left: float = 0.62
    right: float = 0.12
    top: float = 0.28
    bottom: float = 0.5
    across: float = 0.3
    down: float = 0.55


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
    """A figure of rows × columns panels below a legend; sizes are set and not fitted, so that figures line up.

    Args:
        rows: Panels below one another.
        columns: Panels side by side.
        width: Of the figure, in inches.
        height: Of the rows together, in inches, without the room between them.
        handles: Of the legend; none for no legend.
        margins: Room around the panels.
        sharex: As in matplotlib.
        sharey: As in matplotlib.
        ratios: Of the rows' heights.
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
        figure.legend(
            handles=list(handles),
            loc="upper left",
            bbox_to_anchor=(0.06 / width, 1.0),
            ncols=across,
            handlelength=1.3,
            handletextpad=0.5,
            columnspacing=1.4,
            borderaxespad=0.0,
            labelspacing=0.35,
        )
    return figure, grid


def _legend_size(handles: Sequence[Any], width: float) -> tuple[int, int]:
    """Lines of a legend, and entries of each."""
    if not handles:
        return 0, 1
    widest = max(len(handle.get_label()) for handle in handles)
    across = max(1, min(len(handles), int(width / (0.42 + 0.072 * widest))))
    return math.ceil(len(handles) / across), across


def small_multiples(
    chosen: Mapping[int | None, Sequence[Key]], styles: Mapping[str, Look], across: int, xlabel: str, ylabel: str
) -> tuple[Figure, list[Any]]:
    """One panel per number of bits, and its axes in that order."""
    columns = min(across, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    full = WIDE if across > 2 else NARROW
    # A few panels do not fill the page: panels are as wide in every figure.
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
    """Number of bits → series of its panel, the unquantized model in each."""
    return keys_by_bits(series(lines))


def keys_by_bits(keys: Iterable[Key]) -> dict[int | None, list[Key]]:
    """The same of methods and bits."""
    found = list(keys)
    dense = [key for key in found if key[0] == DENSE]
    quantized = sorted((key for key in found if key[0] != DENSE), key=lambda key: -(key[1] or 0))
    parted: dict[int | None, list[Key]] = {}
    for key in quantized:
        parted.setdefault(key[1], list(dense)).append(key)
    return parted or ({DENSE_BITS: dense} if dense else {})


def method_handles(styles: Mapping[str, Look], *, line: bool = True) -> list[Any]:
    """Legend of quantizers."""
    return [handle(look.colour, look.mark, method_name(method), line=line) for method, look in styles.items()]


def handle(colour: str, mark: str, label: str, *, line: bool = True) -> Any:
    """One entry of a legend."""
    return Line2D([], [], color=colour, marker=mark, label=short(label), linestyle="-" if line else "none")


def bar_handle(colour: str, label: str) -> Any:
    """One entry of a legend of bars."""
    return Patch(color=colour, label=short(label))


def method_name(method: str) -> str:
    """As people call it."""
    return UNQUANTIZED if method == DENSE else method


def label(key: Key) -> str:
    """Method and bits in words."""
    method, bits = key
    return method_name(method) if method == DENSE or bits is None else f"{method} {bits}"


def short(words: str) -> str:
    """A name as figures have room for: its beginning and its end, in characters that can be drawn."""
    drawn = "".join(c if c.isprintable() else "\ufffd" for c in words)
    return drawn if len(drawn) <= _ROOM else f"{drawn[: _ROOM // 2]}…{drawn[len(drawn) - (_ROOM - 1) // 2 :]}"


def slug(words: str) -> str:
    """For files and anchors; a long one ends with what tells it from others."""
    found = "-".join("".join(c if c.isalnum() else " " for c in words.lower()).split())
    return found if len(found) <= _LONGEST_SLUG else f"{found[:_LONGEST_SLUG]}-{hashing.of_value(words)[:8]}"


def listed(names: Iterable[str], most: int = 8) -> str:
    """Different names in one line."""
    found = list(dict.fromkeys(names))
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
