"""A study that was run once for all tests that look at its files."""

import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.small_studies import STUDY, start, write

# Offline there is no RefCOCO+; the last line of the log says so.
FAILING = """cells: [{method: none, tasks: [refcocoplus_rec_val]}]
analysis: {kind: components, question: Which one, metrics: [ece]}
"""


@pytest.fixture(scope="session")
def undisturbed(shared: Path) -> Path:
    """Return the folder of a study that nobody disturbed: both cells are done, and one that is added to them failed."""
    folder = shared / "undisturbed"
    with FileLock(shared / "undisturbed.lock"):
        if not (folder / "made").exists():
            _make(folder)
            (folder / "made").touch()
    return folder / "out"


def _make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    for name in ("study.yaml", "verdict.json", "verdict.md"):
        (folder / "out" / name).write_text("Of an earlier study.", encoding="utf-8")
    process = start(write(folder, STUDY + FAILING), folder / "out")
    said, _ = process.communicate()
    assert process.returncode == 1, said
    assert "FAILED" in said
    assert "The analysis was not made: of 3 cells 1 failed." in said
    assert f"study analyse {folder / 'out'} --partial" in said
    assert not list((folder / "out").glob("verdict.*"))
