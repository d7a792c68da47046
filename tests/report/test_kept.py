"""Numbers that are kept of a study's cells: the same as those of the logs, and never those of other logs."""

import errno
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import test_results
import test_results_language
from helpers import report_study
from helpers.small_studies import CELL

from lmms_plugin.analysis import reliability, results
from lmms_plugin.report import building, kept, numbers, packed, reading
from lmms_plugin.report.kept import Kept, Source
from lmms_plugin.study.file import fingerprints
from lmms_plugin.study.file.identity import Keyed
from lmms_plugin.study.run.attempt import Outcome
from lmms_plugin.study.run.recording import Recorder
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.study.store.storage import Storage
from lmms_plugin.utils import files

SETTINGS = reliability.Settings(resamples=20)
DEFAULT = reliability.Settings(resamples=reading.RESAMPLES)
CELLS = ["awq-3-0", "awq-3-1", "none", "rtn-2", "rtn-3"]
FILES = len(CELLS) * (1 + len(report_study.TASKS))


@pytest.fixture(autouse=True)
def times_are_trusted_at_once(monkeypatch):
    monkeypatch.setattr(files, "_SETTLED_NANOSECONDS", -1)


@pytest.fixture
def study(tmp_path):
    return report_study.write_study(tmp_path / "study", count=12)


def page_of(study, settings=SETTINGS):
    page = study.parent / "page.html"
    list(building.build(study, page, settings, title=None, figures=None, pictures=2))
    return page.read_text()


def kept_of(study):
    return sorted(folder.name for folder in (study / ".measured").iterdir() if any(folder.glob("*.bin")))


def log_of(study, cell="rtn-3"):
    return next((study / "cells" / cell).rglob("*_samples_shapes_rec.jsonl"))


def rewrite(log, change):
    """Change every record of a log."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        change(row["mean_iou"])
    log.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def measured(study, settings=SETTINGS):
    """Cells that a report on a study measures anew."""
    found, real = [], numbers.of

    def of(file, given):
        found.append(file.parents[1].name)
        return real(file, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "of", of)
        reading.read_folder(study, settings)
    return sorted(found)


def hashed(study):
    """How many files a report that measures nothing reads to tell that they are the same."""
    found, real = [], Source.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "of", lambda file: found.append(file) or real(file))
        assert measured(study) == []
    return len(found)


def test_a_page_from_kept_numbers_is_that_from_the_logs(study):
    first = page_of(study)
    assert kept_of(study) == CELLS
    assert measured(study) == []
    assert page_of(study) == first


def test_every_kind_of_number_comes_back(tmp_path):
    (rejection,) = results.find(test_results.write(tmp_path / "a", {"rejection": test_results_language.pairs(0.1)}))
    # One image leaves nothing to draw, and so no resamples.
    single = report_study.write_run(tmp_path / "b", report_study.documents(1), 0.9, tasks={"shapes_rec": None})
    # Language shifts leave documents out: theirs are a set of their own. And there is a task of somebody else.
    tasks = {"rec": test_results.answers(0.8), "rec_typos_3": test_results.answers(0.7)[:80], "other": [{"doc_id": 0}]}
    metadata = {"metadata": {"shift": "typos", "severity": 3, "shifts": "text"}}
    theirs = {"metric_list": [{"metric": "exact_match"}]}
    (several,) = results.find(test_results.write(tmp_path / "c", tasks, rec_typos_3=metadata, other=theirs))
    found = [numbers.of(file, SETTINGS) for file in (rejection, single, several)]
    assert found[0].rejection
    assert all(not len(group.resampled) for group in found[1].measured.groups.values())
    assert found[2].others == ("other",)
    assert len(found[2].measured.documents) == 2
    for one in found:
        assert_same(packed.unpack(packed.pack(one)), one)


def assert_same(one, other):
    np.testing.assert_equal(one.rejection, other.rejection)
    assert one.others == other.others
    for name in ("tasks", "groups"):
        mine, others = getattr(one.measured, name), getattr(other.measured, name)
        assert list(mine) == list(others)
        for key, value in mine.items():
            np.testing.assert_equal(vars(value), vars(others[key]))
            for member, array in vars(value).items():
                assert type(array) is type(getattr(others[key], member))
                if isinstance(array, np.ndarray):
                    assert array.dtype == getattr(others[key], member).dtype
    assert {name: ids.to_pylist() for name, ids in one.measured.documents.items()} == {
        name: ids.to_pylist() for name, ids in other.measured.documents.items()
    }


def test_a_log_that_changed_is_measured_anew(study):
    reading.read_folder(study, SETTINGS)
    rewrite(log_of(study), lambda record: record.update(confidence=dict.fromkeys(record["confidence"], 0.25)))
    assert measured(study) == ["rtn-3"]
    (run,) = (run for run in reading.read_folder(study, SETTINGS).runs if run.axes.cell == "rtn-3")
    task = run.measured.tasks["shapes_rec"]
    # All confidences lie in the bin of 0.25.
    assert np.flatnonzero(task.bins[0]).size == 1
    assert task.bins[1].max() == 0.25


def test_a_results_file_that_changed_is_measured_anew(study):
    reading.read_folder(study, SETTINGS)
    (file,) = (study / "cells" / "rtn-3").rglob("*_results.json")
    file.write_text(file.read_text().replace('"severity": 5', '"severity": 4'))
    assert measured(study) == ["rtn-3"]


def test_a_log_that_was_cut_is_refused_although_its_numbers_are_kept(study):
    reading.read_folder(study, SETTINGS)
    log = log_of(study)
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"shapes_rec.jsonl"):
        reading.read_folder(study, SETTINGS)


def test_a_change_that_leaves_size_and_time_is_seen(study):
    reading.read_folder(study, SETTINGS)
    log = log_of(study)
    before = log.stat()
    log.write_bytes(log.read_bytes().replace(b'"expression": "', b'"expression": "T', 1)[:-2] + b"\n")
    os.utime(log, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (log.stat().st_size, log.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(ValueError, match=r"shapes_rec.jsonl"):
        reading.read_folder(study, SETTINGS)


def test_times_of_a_file_that_has_just_changed_are_not_trusted(study, monkeypatch):
    monkeypatch.setattr(files, "_SETTLED_NANOSECONDS", 3_600_000_000_000)
    reading.read_folder(study, SETTINGS)
    assert hashed(study) == hashed(study) == FILES
    monkeypatch.setattr(files, "_SETTLED_NANOSECONDS", -1)
    assert (hashed(study), hashed(study)) == (FILES, 0)


def test_a_copy_is_hashed_once_and_not_measured(study, tmp_path):
    reading.read_folder(study, SETTINGS)
    assert hashed(study) == 0
    copy = shutil.copytree(study, tmp_path / "copy")
    assert (hashed(copy), hashed(copy)) == (FILES, 0)


def test_a_log_that_changes_while_it_is_measured_is_measured_anew(study, monkeypatch):
    real = numbers.of

    def of(file, settings):
        found = real(file, settings)
        rewrite(log_of(study), lambda record: record.update(expression="Another"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(numbers, "of", of)
        reading.keep(study / "cells" / "rtn-3")
    assert "rtn-3" in measured(study, DEFAULT)


def test_a_log_that_changes_while_it_is_hashed_is_measured_anew(study, monkeypatch):
    log, real = log_of(study), kept.hashlib.file_digest

    def file_digest(stream, digest):
        found = real(stream, digest)
        if stream.name == str(log):
            rewrite(log, lambda record: record.update(expression="Another"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(kept.hashlib, "file_digest", file_digest)
        reading.keep(study / "cells" / "rtn-3")
    assert "rtn-3" in measured(study, DEFAULT)


@pytest.mark.parametrize("added", [True, False])
def test_another_log_measures_anew(study, added):
    reading.read_folder(study, SETTINGS)
    log = log_of(study)
    other = log.with_name(log.name.replace("shapes_rec", "shapes_more"))
    if added:
        shutil.copy(log, other)
        assert measured(study) == ["rtn-3"]
    else:
        log.rename(other)
        with pytest.raises(ValueError, match=r"shapes_rec.jsonl"):
            reading.read_folder(study, SETTINGS)


@pytest.mark.parametrize(
    "change", [{"resamples": 21}, {"seed": 1}, {"level": 0.9}, {"held_out": 0.3}, {"estimator": "joint"}]
)
def test_other_settings_have_numbers_of_their_own(study, change):
    reading.read_folder(study, SETTINGS)
    other = replace(SETTINGS, **change)
    assert measured(study, other) == CELLS
    assert measured(study, other) == measured(study) == []


def test_processes_are_no_other_settings(study):
    reading.read_folder(study, SETTINGS)
    assert measured(study, replace(SETTINGS, workers=2)) == []


def test_other_code_measures_anew(study, monkeypatch):
    reading.read_folder(study, SETTINGS)
    monkeypatch.setattr(kept, "CODE", "of tomorrow")
    assert measured(study) == CELLS


def test_what_measures_is_part_of_the_code():
    files, versions = fingerprints.code((numbers.__name__, packed.__name__))
    needed = ("results", "reliability", "metrics.weighted", "report.columns", "report.measuring", "report.packed")
    assert {f"lmms_plugin.{name}" for name in needed} <= {*files}
    assert {"numpy", "scipy", "pyarrow"} <= {*versions}
    # What is edited for other reasons is not.
    assert not {"lmms_plugin.study.file.grid", "lmms_plugin.study.store.folder", "lmms_plugin.quant_backends"} & {
        *files
    }


@pytest.mark.parametrize("place", [0, 15, 16, 200, -1])
def test_a_damaged_file_is_measured_anew(study, place):
    reading.read_folder(study, SETTINGS)
    (path,) = (study / ".measured" / "none").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:place], bytes(byte ^ (k == place % len(whole)) for k, byte in enumerate(whole))):
        path.write_bytes(damaged)
        assert measured(study) == ["none"]
        assert path.read_bytes() == whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ESTALE])
def test_where_nothing_can_be_written_the_report_is_made_and_nothing_stays(study, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", refuse)
        reading.read_folder(study, SETTINGS)
    assert not [file for file in (study / ".measured").rglob("*") if file.is_file()]
    (study / ".measured").chmod(0o755)
    shutil.rmtree(study / ".measured")
    (study / ".measured").write_text("")
    assert measured(study) == CELLS


@pytest.mark.parametrize("folder", ["runs", "cells"])
def test_nothing_is_written_where_there_are_no_cells(tmp_path, folder):
    report_study.write_run(tmp_path / folder / "a", report_study.documents(12), 0.9)
    before = {*tmp_path.rglob("*")}
    reading.read_folder(tmp_path, SETTINGS)
    assert {*tmp_path.rglob("*")} == before
    assert Kept.of(tmp_path / folder / "a", next(tmp_path.rglob("*_results.json")), SETTINGS) is None


def test_two_runs_in_a_cell_do_not_displace_each_other(study):
    cell = study / "cells" / "rtn-3"
    for file in sorted((cell / "demo").iterdir()):
        shutil.copy(file, file.with_name(file.name.replace(report_study.DATE, "20270102_030405")))
    reading.read_folder(study, SETTINGS)
    assert measured(study) == []


def open_folder(path):
    source = path.with_name("study.yaml")
    source.write_text("models: [demo]")
    folder = StudyFolder(path)
    folder.open(source)
    return folder


def test_numbers_go_with_their_cell_and_nothing_else_does(study):
    reading.read_folder(study, SETTINGS)
    theirs = study / ".measured" / "rtn-3" / "notes.txt"
    theirs.write_text("precious")
    (study / ".measured" / "stray.txt").write_text("precious")
    shutil.rmtree(study / "cells")
    shutil.rmtree(study / "failed")
    # What was measured does not make the folder one of something else.
    open_folder(study)
    assert kept_of(study) == []
    assert [file.name for file in sorted((study / ".measured").rglob("*.txt"))] == ["notes.txt", "stray.txt"]


def test_a_folder_with_a_name_like_ours_is_of_something_else(tmp_path):
    (tmp_path / "study" / ".measured-by-hand").mkdir(parents=True)
    with pytest.raises(ValueError, match="expected an empty folder"):
        open_folder(tmp_path / "study")


def finish(folder, recorder, name):
    """Let a runner finish the cell that lies in a folder."""
    work = recorder.folder.begin(name)
    shutil.copytree(folder, work, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keyed, "id", name)
        recorder.record(Keyed(CELL, {"key": name}, {}), Outcome(None, 0, {"seconds": 1.0}, "", ()), 0)


class Silent:
    """Is told, and remembers who was done."""

    def __init__(self):
        self.finished = []

    def done(self, cell, _seconds):
        self.finished.append(cell)


def test_a_runner_measures_what_it_finishes_fetches_or_takes_back(study, tmp_path):
    storage = Storage.at(str(tmp_path / "shared"))
    here = open_folder(tmp_path / "here")
    finish(study / "cells" / "rtn-3", Recorder(here, Silent(), storage, reading.keep), "rtn-3")
    assert kept_of(here.path) == ["rtn-3"]
    assert measured(here.path, DEFAULT) == []

    there = open_folder(tmp_path / "there")
    Recorder(there, Silent(), storage, reading.keep).claim("rtn-3")
    assert kept_of(there.path) == ["rtn-3"]

    there.superseded.mkdir(exist_ok=True)
    there.done_path("rtn-3").rename(there.superseded / "rtn-3")
    there.open(there.path / "study.yaml")
    assert kept_of(there.path) == []
    Recorder(there, Silent(), measure=reading.keep).claim("rtn-3")
    assert kept_of(there.path) == ["rtn-3"]


@pytest.mark.parametrize(
    "error", [ValueError("no log"), OSError(errno.ESTALE, "stale"), KeyError("name"), AttributeError("get")]
)
def test_a_cell_that_cannot_be_measured_is_finished_all_the_same(study, tmp_path, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(numbers, "of", refuse)
    folder, watcher = open_folder(tmp_path / "here"), Silent()
    finish(study / "cells" / "rtn-3", Recorder(folder, watcher, measure=reading.keep), "rtn-3")
    assert folder.is_done("rtn-3")
    assert watcher.finished == ["rtn-3"]
