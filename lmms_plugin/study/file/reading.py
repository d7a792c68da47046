"""Reading of study files: every name and number is validated, and errors point at its place."""

from __future__ import annotations

from pathlib import Path

from lmms_plugin.study.file import analyses
from lmms_plugin.study.file.asked import located
from lmms_plugin.study.file.schema import At, Crossed, Grid, Study, StudyFile
from lmms_plugin.utils.reading.located import Entry, load
from lmms_plugin.utils.reading.problems import Problems


def read(file: Path) -> Study:
    """Read a study file.

    Top-level entries apply to each of its `grids` and `cells`, which may override them; without both, the top level is
    the only grid.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Entries are invalid; every problem is a line that names its place, what was expected and what came.
    """
    top = load(file)
    problems = Problems()
    with problems.collected():
        said = top.validated(StudyFile, opened=True)
    with problems.collected():
        analysis = _checked(top.fields().get("analysis") if top.is_mapping else None)
    problems.expect_none()
    shared = said.given(Grid.model_fields)
    # A cell does not inherit these axes: several values would make several cells of it.
    of_cells = said.given(Crossed.model_fields.keys() - {"methods", "bits", "components", "calibration", "seeds"})
    grids = [
        (one.given(Grid.model_fields) | {"exclude": said.exclude + one.exclude}, where) for one, where in said.grids
    ]
    found = [(shared | given, where) for given, where in grids]
    found += [(of_cells | one.given(Crossed.model_fields), where) for one, where in said.cells]
    complete: list[At[Grid]] = []
    for given, where in found or [(shared, top.where)]:
        with problems.collected():
            complete.append(At(Grid.complete(given, where), where))
    problems.expect_none()
    return Study(said.name or file.stem, str(file), tuple(complete), analysis)


def _checked(analysis: Entry | None) -> Entry | None:
    if analysis is not None:
        if not analysis.is_mapping:
            raise analysis.wrong("a mapping")
        try:
            analyses.question(analysis.plain())
        except ValueError as error:
            raise located(error, analysis) from error
    return analysis
