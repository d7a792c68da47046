"""Numbers that are kept of a study's cells: the same as those of the logs, and never those of other logs."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import report_study
import test_results
import test_results_language
from small_studies import CELL

from lmms_plugin import reliability, results
from lmms_plugin.report import building, kept, numbers, reading
from lmms_plugin.report.reading import Measuring
from lmms_plugin.study.attempt import Outcome
from lmms_plugin.study.folder import StudyFolder
from lmms_plugin.study.identity import Keyed
from lmms_plugin.study.recording import Recorder
from lmms_plugin.study.storage import Storage

SETTINGS = reliability.Settings(resamples=20)


@pytest.fixture
def study(tmp_path):
    return report_study.write_study(tmp_path / "study", count=12)


def page_of(study, settings=SETTINGS):
    page = study.parent / "page.html"
    list(building.build(study, page, settings, title=None, figures=None, pictures=2))
    return page.read_text()


def kept_files(study):
    return sorted(file.name for file in (study / ".measured").iterdir())


def taken(study, settings=SETTINGS):
    """Runs, and the files that were measured anew."""
    measured, real = [], numbers.of

    def of(file, table, given):
        measured.append(file)
        return real(file, table, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "of", of)
        return reading.read_folder(study, settings).runs, measured


def test_a_page_from_kept_numbers_is_that_from_the_logs(study):
    first = page_of(study)
    assert kept_files(study) == ["awq-3-0.bin", "awq-3-1.bin", "none.bin", "rtn-2.bin", "rtn-3.bin"]
    assert page_of(study) == first
    assert taken(study)[1] == []


def test_every_kind_of_number_comes_back(tmp_path):
    cell = tmp_path / "cells" / "all"
    (run,) = results.find(test_results.write(cell / "run", {"rejection": test_results_language.pairs(0.1)}))
    # One image leaves nothing to draw, and so no resamples.
    docs = report_study.documents(1)
    single = report_study.write_run(cell / "single", docs, 0.9, tasks={"shapes_rec": None})
    several = report_study.write_run(cell / "several", report_study.documents(12), 0.6, 1)
    code = kept.code()
    for file in (run, single, several):
        table = json.loads(file.read_text())
        fresh = numbers.of(file, table, SETTINGS)
        assert file is not single or all(not len(group.resampled) for group in fresh.measured.groups.values())
        path, stamp = cell / "kept", kept.stamp(SETTINGS, code)
        kept.save(path, stamp, kept.sources(file), fresh)
        assert_same(kept.load(path, file, stamp), fresh)


def assert_same(one, other):
    np.testing.assert_equal(one.rejection, other.rejection)
    assert one.others == other.others
    for name in ("tasks", "groups"):
        mine, others = getattr(one.measured, name), getattr(other.measured, name)
        assert list(mine) == list(others)
        for key, value in mine.items():
            np.testing.assert_equal(vars(value), vars(others[key]))
            for member, array in vars(value).items():
                if isinstance(array, np.ndarray):
                    assert array.dtype == getattr(others[key], member).dtype
    assert {name: ids.to_pylist() for name, ids in one.measured.documents.items()} == {
        name: ids.to_pylist() for name, ids in other.measured.documents.items()
    }


def test_a_log_that_changed_is_measured_anew(study):
    taken(study)
    log = next((study / "cells" / "rtn-3").rglob("*_samples_shapes_rec.jsonl"))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        confidence = row["mean_iou"]["confidence"]
        row["mean_iou"]["confidence"] = dict.fromkeys(confidence, 0.25)
    log.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    runs, measured = taken(study)
    assert [file.parents[1].name for file in measured] == ["rtn-3"]
    (run,) = (run for run in runs if run.axes.cell == "rtn-3")
    task = run.measured.tasks["shapes_rec"]
    # All confidences lie in the bin of 0.25.
    assert np.flatnonzero(task.bins[0]).size == 1
    assert task.bins[1].max() == 0.25


def test_a_log_that_was_cut_is_refused_although_its_numbers_are_kept(study):
    taken(study)
    log = next((study / "cells" / "rtn-3").rglob("*_samples_shapes_rec.jsonl"))
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"shapes_rec.jsonl"):
        taken(study)


def test_a_change_that_leaves_size_and_time_is_seen(study):
    taken(study)
    log = next((study / "cells" / "rtn-3").rglob("*_samples_shapes_rec.jsonl"))
    before = log.stat()
    log.write_bytes(log.read_bytes().replace(b'"expression": "', b'"expression": "T', 1)[:-2] + b"\n")
    os.utime(log, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (log.stat().st_size, log.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(ValueError, match=r"shapes_rec.jsonl"):
        taken(study)


def test_a_copy_of_the_study_needs_no_measuring(study, tmp_path, monkeypatch):
    taken(study)
    read, real = [], kept._content
    monkeypatch.setattr(kept, "_content", lambda file: read.append(file) or real(file))
    assert taken(study)[1] == []
    # What was not touched is not even read.
    assert read == []
    shutil.copytree(study, tmp_path / "copy")
    assert taken(tmp_path / "copy")[1] == []
    assert len(read) == 5 * (1 + len(report_study.TASKS))


@pytest.mark.parametrize("added", [True, False])
def test_another_log_measures_anew(study, added):
    taken(study)
    log = next((study / "cells" / "rtn-3").rglob("*_samples_shapes_rec.jsonl"))
    other = log.with_name(log.name.replace("shapes_rec", "shapes_more"))
    if added:
        shutil.copy(log, other)
        assert [file.parents[1].name for file in taken(study)[1]] == ["rtn-3"]
    else:
        log.rename(other)
        with pytest.raises(ValueError, match=r"shapes_rec.jsonl"):
            taken(study)


@pytest.mark.parametrize("change", [{"resamples": 21}, {"seed": 1}, {"level": 0.9}, {"held_out": 0.3}])
def test_other_settings_are_measured_anew(study, change):
    taken(study)
    assert len(taken(study, replace(SETTINGS, **change))[1]) == 5


def test_processes_are_no_other_settings(study):
    taken(study)
    assert taken(study, replace(SETTINGS, workers=2))[1] == []


def test_other_code_measures_anew(study, monkeypatch):
    taken(study)
    monkeypatch.setattr(kept, "code", lambda: "of tomorrow")
    assert len(taken(study)[1]) == 5


def test_what_measures_is_part_of_the_code(monkeypatch):
    seen = []
    monkeypatch.setattr(kept, "digest", seen.append)
    kept.code()
    files, versions = seen[0]
    assert {f"lmms_plugin.{name}" for name in ("results", "metrics.weighted", "report.measuring", "report.kept")} <= {
        *files
    }
    assert {"numpy", "scipy", "pyarrow"} <= {*versions}


@pytest.mark.parametrize("place", [0, 15, 16, 200, -1])
def test_a_damaged_file_is_measured_anew(study, place):
    taken(study)
    path = study / ".measured" / "none.bin"
    whole = path.read_bytes()
    for damaged in (whole[:place], bytes(byte ^ (k == place % len(whole)) for k, byte in enumerate(whole))):
        path.write_bytes(damaged)
        assert [file.parents[1].name for file in taken(study)[1]] == ["none"]
        assert path.read_bytes() == whole


def test_a_folder_that_may_not_be_written_to_is_reported_on(study):
    # A file in the place of the folder, which permissions would not keep the superuser from making.
    (study / ".measured").write_text("")
    assert len(taken(study)[1]) == 5


def test_nothing_is_written_outside_of_a_study(tmp_path):
    docs = report_study.documents(12)
    report_study.write_run(tmp_path / "runs" / "a", docs, 0.9)
    before = sorted(tmp_path.rglob("*"))
    page_of(tmp_path / "runs")
    assert sorted({*tmp_path.rglob("*")} - {*before}) == [tmp_path / "page.html"]


def test_numbers_go_with_their_cell(study, tmp_path):
    taken(study)
    source = tmp_path / "study.yaml"
    source.write_text("models: [demo]")
    shutil.rmtree(study / "cells")
    shutil.rmtree(study / "failed")
    # What was measured does not make the folder one of something else.
    StudyFolder(study).open(source)
    assert kept_files(study) == []


def finish(folder, recorder, name):
    """Let a runner finish the cell that lies in a folder of that name."""
    work = recorder.folder.begin(name)
    shutil.copytree(folder, work, dirs_exist_ok=True)
    keyed = Keyed(CELL, {"key": name}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keyed, "id", name)
        recorder.record(keyed, Outcome(None, 0, {"seconds": 1.0}, "", ()), 0)


class Silent:
    """Is told, and says nothing."""

    def done(self, cell, seconds):
        pass


def test_a_runner_keeps_numbers_of_what_it_finishes_or_fetches(study, tmp_path):
    source = tmp_path / "study.yaml"
    source.write_text("models: [demo]")
    storage = Storage.at(str(tmp_path / "shared"))
    for name in ("here", "there"):
        folder = StudyFolder(tmp_path / name)
        folder.open(source)
        recorder = Recorder(folder, Silent(), storage, Measuring(SETTINGS, kept.code()))
        if name == "here":
            finish(study / "cells" / "rtn-3", recorder, "rtn-3")
        else:
            recorder.claim("rtn-3")
        assert kept_files(folder.path) == ["rtn-3.bin"]
        # The runner's own `cell.json` tells other axes, but not other numbers.
        assert taken(folder.path)[1] == []


def test_a_cell_that_cannot_be_measured_is_finished_all_the_same(study, tmp_path):
    source = tmp_path / "study.yaml"
    source.write_text("models: [demo]")
    folder = StudyFolder(tmp_path / "here")
    folder.open(source)
    next((study / "cells" / "rtn-3").rglob("*_samples_shapes_rec.jsonl")).unlink()
    finish(study / "cells" / "rtn-3", Recorder(folder, Silent(), None, Measuring(SETTINGS, kept.code())), "rtn-3")
    assert folder.is_done("rtn-3")


def test_a_study_is_measured_as_its_report_will_by_default(study):
    measuring = Measuring.by_default(5)
    for cell in (study / "cells").iterdir():
        measuring.keep(cell)
    assert taken(study, reliability.Settings(resamples=reading.default_resamples(study)))[1] == []
