"""Importance of each component's bits for a score of a study's cells, beside published importances.

analysis:
kind: components
question: Which component does quantization hurt most?
metrics: [acc@0.5]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_plugin.analysis import component_importance
from lmms_plugin.analysis.reproduction import published
from lmms_plugin.study.file.analyses import ComponentBits
from lmms_plugin.study.file.asked import expect_metrics
from lmms_plugin.study.verdicts.arms import folders
from lmms_plugin.study.verdicts.conclusions import Conclusion, ExpectedCell

FIGURES = "figures"


def expect(question: ComponentBits, cells: Sequence[ExpectedCell]) -> None:
    """Refuse a study that will lack tasks or metrics of the question.

    Raises:
        ValueError: Something is missing; names it.
    """
    expect_metrics(question.metrics, question.tasks, [cell.tasks for cell in cells])


def conclude(study: Path, question: ComponentBits, only: Collection[str] | None, workers: int) -> list[Conclusion]:
    """Compute the importance of each component for every model, method, task and metric, and draw it below `figures/`.

    Raises:
        ValueError: There are no cells, or too few that differ in bits.
    """
    cells: list[component_importance.ComponentCell] = []
    for folder in folders(study, only):
        read, left_out = component_importance.read(folder)
        if left_out:
            raise ValueError(left_out[0])
        cells += read
    wanted = [grid for grid in component_importance.grids(cells, question.metrics) if _is_asked(grid, question)]
    if not wanted:
        raise ValueError(f"analysis: no task has one of the metrics {', '.join(question.metrics)}")
    (study / FIGURES).mkdir(exist_ok=True)
    return [_concluded(grid, study, question, workers) for grid in wanted]


def _is_asked(grid: component_importance.ComponentGrid, question: ComponentBits) -> bool:
    return not question.tasks or grid.name.split(", ")[-1].split(" ")[0] in question.tasks


def _concluded(
    grid: component_importance.ComponentGrid, study: Path, question: ComponentBits, workers: int
) -> Conclusion:
    found = component_importance.analyse(grid, resamples=question.resamples, seed=question.seed, workers=workers)
    component_importance.draw(found, study / FIGURES / f"components_{grid.file_name}.png")
    method, _, rest = grid.name.partition(" ")
    known = published.importances(rest, grid.name.split(", ")[-1], method)
    ranked = sorted(found.importances, key=lambda one: -one.consensus)
    shares = ", ".join(f"{one.component} {one.consensus:.0f} % [{one.low:.0f}, {one.high:.0f}]" for one in ranked)
    sentence = f"{grid.name}: {shares} of what varies over the grid ({grid.described()})."
    if found.r2 <= 0.5:
        sentence += f" The forest predicts unseen cells badly (R² {found.r2:.2f}): do not rely on these shares."
    return Conclusion(
        question.question,
        [sentence],
        [],
        [_table(found, known.shares if known else {})],
        [f"Published: {known.source}."] if known else [],
        {"question": question, **found.to_dict()},
    )


def _table(found: component_importance.ComponentSensitivity, known: Mapping[str, float]) -> dict[str, Any]:
    columns = [
        "component",
        *component_importance.MEASURES,
        "consensus",
        "95 % interval",
        *(["published"] if known else []),
    ]
    rows = []
    for one in found.importances:
        shares = [f"{share:.1f} %" for share in (one.forest, one.permutation, one.shap, one.consensus)]
        cells = [one.component, *shares, f"{one.low:.1f} to {one.high:.1f}"]
        rows.append(cells + ([f"{known[one.component]:g} %" if one.component in known else ""] if known else []))
    return {"title": found.grid.name, "columns": columns, "rows": rows}
