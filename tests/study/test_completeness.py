"""An analysis is of all cells of a study, or says first of all that it is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.study_folders import CLEAN, SHIFTED, outcomes, write_cell
from typer.testing import CliRunner

from lmms_plugin.analysis.study_files import DONE, VERDICT, VERDICT_IN_WORDS
from lmms_plugin.cli.study import app
from lmms_plugin.study.file.expansion import cells
from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.study.verdicts.completeness import analyse, coverage

STUDY = f"""
models: [demo]
tasks: [{CLEAN}, {", ".join(SHIFTED)}]
grids:
  - methods: [none]
  - {{methods: [rtn], bits: [4]}}
  - {{methods: [awq], bits: [4], calibration: [noise, self], seeds: [0, 1]}}
analysis:
  question: Which?
  clean: {CLEAN}
  shifted: [{", ".join(SHIFTED)}]
  resamples: 20
  arms: {{aware: {{method: awq}}, plain: {{method: rtn}}}}
  contrasts: [[aware, plain]]
"""


def write(folder: Path, cell: Cell, name: str, right: int = 30) -> None:
    write_cell(folder, name, cell.axes.to_dict(), outcomes(40, right, right - 5, right - 10))


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Cell, ...]:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    return cells(read(file))


@pytest.fixture
def incomplete(tmp_path: Path, planned: tuple[Cell, ...]) -> Path:
    """Lacks one of six cells."""
    for cell in planned[:-1]:
        write(tmp_path, cell, cell.slug)
    return tmp_path


def test_an_incomplete_study_has_no_verdict(incomplete: Path) -> None:
    said = r"5 of 6 cells are finished, missing: demo_awq_4bit_g128_self_seed1 \(--partial"
    with pytest.raises(ValueError, match=said):
        analyse(incomplete)
    assert not list(incomplete.glob("verdict.*"))


def test_a_folder_that_is_no_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the folder of a study.*got .*other without study\.yaml"):
        analyse(tmp_path / "other")


def test_a_partial_verdict_says_so_first(incomplete: Path) -> None:
    (found,) = analyse(incomplete, partial=True)
    said = json.loads((incomplete / VERDICT).read_text())
    assert said["notes"][0].startswith("Partial: 5 of 6 cells are finished, missing: demo_awq_4bit_g128_self_seed1. ")
    assert said["sentences"][0] == "Partial: 5 of 6 cells are finished (see the notes)."
    assert said["notes"][0] in (incomplete / VERDICT_IN_WORDS).read_text()
    assert found.notes[0] == said["notes"][0]


def test_a_whole_study_is_not_called_partial(incomplete: Path, planned: tuple[Cell, ...]) -> None:
    write(incomplete, planned[-1], "last")
    for partial in (False, True):
        analyse(incomplete, partial=partial)
        assert "artial" not in (incomplete / VERDICT_IN_WORDS).read_text()


def test_a_verdict_is_replaced_as_a_whole(incomplete: Path) -> None:
    analyse(incomplete, partial=True)
    for name in (VERDICT, VERDICT_IN_WORDS):
        (incomplete / f"before-{name}").hardlink_to(incomplete / name)
    before = (incomplete / f"before-{VERDICT}").read_text()
    (incomplete / "study.yaml").write_text(STUDY.replace("Which?", "What?"))
    analyse(incomplete, partial=True)
    # A file written in its place would have changed under its other name, too.
    assert (incomplete / f"before-{VERDICT}").read_text() == before
    assert "Which?" in (incomplete / f"before-{VERDICT_IN_WORDS}").read_text()
    assert "What?" in (incomplete / VERDICT_IN_WORDS).read_text()
    assert not list(incomplete.glob(".verdict*"))


def test_the_command_ends_with_an_error_and_takes_partial(incomplete: Path) -> None:
    refused = CliRunner().invoke(app, ["analyse", str(incomplete)])
    assert refused.exit_code != 0
    assert "--partial analyses what is there" in str(refused.exception)
    assert "Partial: 5 of 6 cells" in CliRunner().invoke(app, ["analyse", str(incomplete), "--partial"]).stdout


def test_many_missing_cells_are_counted_and_the_first_named(tmp_path: Path, planned: tuple[Cell, ...]) -> None:
    found = coverage(StudyFolder(tmp_path), planned).partial
    assert found == (
        "0 of 6 cells are finished",
        "demo_none_16bit, demo_rtn_4bit_g128, demo_awq_4bit_g128_noise_seed0 and 3 more",
    )
    both = (planned[0], replace(planned[0], tasks=(CLEAN,)))
    found = coverage(StudyFolder(tmp_path), both).partial
    assert found is not None
    assert found.missing == "demo_none_16bit (rec, rec_fog_1, rec_fog_3), demo_none_16bit (rec)"


def test_cells_count_by_their_place_and_the_newest_of_several(tmp_path: Path, planned: tuple[Cell, ...]) -> None:
    for name, moment in (("new", "2026-02-01"), ("old", "2026-01-01")):
        write(tmp_path, planned[1], name)
        (tmp_path / "cells" / name / DONE).write_text(json.dumps({"seconds": 1.0, "finished": moment, "files": {}}))
    write_cell(tmp_path, "limited", planned[0].axes.to_dict(), outcomes(40, 9, 8, 7), limit=40)
    write_cell(tmp_path, "other-tasks", planned[2].axes.to_dict(), {CLEAN: outcomes(40, 9, 8, 7)[CLEAN]})
    found = coverage(StudyFolder(tmp_path), planned)
    assert found.finished == ("new",)
    assert planned[0] in found.missing
    assert planned[2] in found.missing


def test_the_order_of_tasks_does_not_matter(incomplete: Path, planned: tuple[Cell, ...]) -> None:
    write(incomplete, planned[-1], "last")
    file = incomplete / "study.yaml"
    file.write_text(STUDY.replace(f"tasks: [{CLEAN}, {', '.join(SHIFTED)}]", f"tasks: [{', '.join(SHIFTED)}, {CLEAN}]"))
    assert read(file).grids[0].value.tasks[0].value == (*SHIFTED, CLEAN)
    assert not coverage(StudyFolder(incomplete), cells(read(file))).missing


def test_a_study_can_be_analysed_where_it_could_not_be_run(incomplete: Path, planned: tuple[Cell, ...]) -> None:
    file = incomplete / "study.yaml"
    file.write_text(STUDY.replace("models: [demo]", "models: [/nowhere/at/all/demo]"))
    write(incomplete, planned[-1], "last")
    assert analyse(incomplete)
    with pytest.raises(ValueError, match="there is no folder"):
        cells(read(file))
