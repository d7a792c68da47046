"""What `sensitivity` and `strength` print first."""

from __future__ import annotations

from collections.abc import Sequence

from lmms_plugin.analysis.component_importance import ENOUGH_R2, MEASURES, ComponentSensitivity
from lmms_plugin.cli.screens.screen import NUMBERS, ScreenTable, number, screen
from lmms_plugin.selector.shift_strength import SCORES, Strength
from lmms_plugin.utils.messages import counted

_REST = f"Everything: --all, --json; {NUMBERS}"


def sensitivity_screen(found: Sequence[ComponentSensitivity]) -> str:
    """Return the component that decides the score in each grid, and the shares of the others."""
    answer, tables = [], []
    for one in found:
        first = max(one.importances, key=lambda importance: importance.consensus)
        between = f"{first.low:.0f} to {first.high:.0f}"
        beware = "" if one.r2 > ENOUGH_R2 else ", but the forest predicts unseen runs too badly for that to mean much"
        answer.append(
            f"The bits of {first.component} decide most of {one.grid.name}: {first.consensus:.0f} %"
            f" (95 % interval {between}; R² {one.r2:.2f}{beware})."
        )
        tables.append(_importances(one))
    return screen(answer, tables, (), _REST)


def _importances(one: ComponentSensitivity) -> ScreenTable:
    rows = []
    for each in one.importances:
        shares = (each.forest, each.permutation, each.shap, each.consensus)
        between = f"{each.low:.1f}\N{EN DASH}{each.high:.1f}"
        rows.append((each.component, *(f"{share:.1f} %" for share in shares), between))
    headings = ("component", *MEASURES, "consensus", "95 %")
    return ScreenTable(headings, rows, "component", f"{one.grid.name}: {one.grid.described()}")


def strength_screen(found: Sequence[Strength]) -> str:
    """Return the strongest and the weakest shift, and all of them with what they cost, weakest first."""
    ordered = sorted(found, key=lambda one: one.mmd)
    weakest, strongest = ordered[0], ordered[-1]
    answer = [
        f"Of {counted(len(found), 'task')}, {strongest.task} is furthest from the clean images"
        f" (MMD² {strongest.mmd:.4f}), and {weakest.task} nearest ({weakest.mmd:.4f})."
    ]
    rows = []
    for one in ordered:
        scores = [number(one.scores[name]) for name in SCORES]
        rows.append((one.task, number(one.mmd, 4), number(one.frechet, 4), str(one.images), *scores))
    table = ScreenTable(("task", "MMD²", "Fréchet", "images", *SCORES), rows, "task")
    return screen(answer, [table], ("A task without a shift is compared with itself, half with half.",), _REST)
