"""Tables that `sensitivity` and `strength` print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from lmms_plugin.analysis.component_importance import ENOUGH_R2, MEASURES, ComponentSensitivity
from lmms_plugin.selector.features import LAST_LAYER
from lmms_plugin.selector.shift_strength import SCORES, Strength

if TYPE_CHECKING:
    from lmms_plugin.selector.features import Store


def sensitivity_table(found: ComponentSensitivity) -> Table:
    """Return the table of component importances, with the grid that they hold for."""
    shown = Table(
        title=found.grid.name,
        caption=f"Grid: {found.grid.described()}.\nR² of the forest on unseen runs: {found.r2:.2f}."
        + ("" if found.r2 > ENOUGH_R2 else " Too low for its importances to mean much."),
    )
    shown.add_column("component", no_wrap=True)
    for heading in (*MEASURES, "consensus", "95 % interval"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for one in found.importances:
        shares = (one.forest, one.permutation, one.shap, one.consensus)
        shown.add_row(one.component, *(f"{share:.1f} %" for share in shares), f"{one.low:.1f} … {one.high:.1f}")
    return shown


def strength_table(found: Sequence[Strength], store: Store) -> Table:
    """Return the table of shift strengths, weakest shift first."""
    layer = store.origin.layer
    seen = "after the last layer" if layer == LAST_LAYER else f"before layer {layer} of the language model"
    shown = Table(title="Strength of shifts", caption=f"Features: image positions {seen}. First line: no shift.")
    for heading in ("task", "MMD²", "Fréchet", "images", *SCORES):
        shown.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=True)
    for one in sorted(found, key=lambda one: one.mmd):
        numbers = [one.mmd, one.frechet, *(one.scores[name] for name in SCORES)]
        texts = ["" if math.isnan(number) else f"{number:.4f}" for number in numbers]
        shown.add_row(one.task, *texts[:2], str(one.images), *texts[2:])
    return shown
