"""A study file as values: every name and number checked where it stands."""

from __future__ import annotations

from pathlib import Path

from lmms_plugin.study.file import analyses
from lmms_plugin.study.file.asked import located
from lmms_plugin.study.file.schema import At, Crossed, Grid, Study, StudyFile
from lmms_plugin.utils.reading.located import Entry, load


def read(file: Path) -> Study:
    """Read a study file.

    What stands at its top holds for every one of its `grids` and `cells`, each of which may say otherwise; without
    them it is the only grid.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If something in it is not as it has to be; says where, what was expected and what came.
    """
    top = load(file)
    said = top.validated(StudyFile, opened=True)
    shared = said.given(Grid.model_fields)
    # Of these axes, a cell has its own alone: others would make several of it.
    of_cells = said.given(Crossed.model_fields.keys() - {"methods", "bits", "components", "calibration", "seeds"})
    grids = [
        (one.given(Grid.model_fields) | {"exclude": said.exclude + one.exclude}, where) for one, where in said.grids
    ]
    found = [(shared | given, where) for given, where in grids]
    found += [(of_cells | one.given(Crossed.model_fields), where) for one, where in said.cells]
    complete = tuple(At(Grid.complete(given, where), where) for given, where in found or [(shared, top.where)])
    return Study(said.name or file.stem, str(file), complete, _checked(said.analysis))


def _checked(analysis: Entry | None) -> Entry | None:
    if analysis is not None:
        if not analysis.is_mapping:
            raise analysis.wrong("a mapping")
        try:
            analyses.question(analysis.plain())
        except ValueError as error:
            raise located(error, analysis) from error
    return analysis
