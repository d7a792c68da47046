"""Measurements that are kept: the same numbers without reading, and never those of other files or settings."""

import os
import time

import numpy as np
import pytest
from helpers.submissions import answered, write_run

from lmms_plugin.analysis import logs
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.report.numbers import kept, results_folder
from lmms_plugin.report.numbers.results_folder import read_folder
from lmms_plugin.utils import files

SETTINGS = MeasurementSettings(resamples=40)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SETTLED_NANOSECONDS", 20_000_000)
    run = write_run(tmp_path / "run", answered(48))
    settle(run)
    return run


def settle(folder):
    while not all(files.State.of(file).settled for file in folder.rglob("*") if file.is_file()):
        time.sleep(0.01)


@pytest.fixture
def read(monkeypatch):
    """Results files whose logs were read, in order."""
    seen, original = [], logs.read

    def spy(file, wanted=None):
        seen.append(file)
        return original(file, wanted)

    monkeypatch.setattr(logs, "read", spy)
    return seen


def parts(folder):
    """All numbers of a folder, as they are compared."""
    (run,) = folder.runs
    for task in run.measured.tasks.values():
        yield from (getattr(task, name) for name in vars(task))
    for where, group in run.measured.groups.items():
        yield where
        yield from (getattr(group, name) for name in vars(group))
    yield from run.measured.resampled.items()
    # How wide the texts are stored is no part of them.
    yield from ((name, tuple(ids.tolist())) for name, ids in folder.documents.items())
    yield from (run.axes, run.model, run.model_args, run.limit, run.date, run.cost, run.layers, run.others)


def equal(one, other):
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_numbers_that_are_kept_are_the_same_to_the_last_bit(folder, read):
    first, again = read_folder(folder, SETTINGS), read_folder(folder, SETTINGS)
    assert len(read) == 1
    pairs = list(zip(parts(first), parts(again), strict=True))
    assert len(pairs) > 20
    assert all(equal(one, other) for one, other in pairs)


def test_metrics_of_rejection_are_kept_with_values_that_do_not_exist():
    numbers = (
        results_folder.MetricValue("rejection", "box_rate_true", 0.1 + 0.2, float("nan"), float("inf"), 7, 3),
        results_folder.MetricValue("rejection", "fpr", -0.0, 1e-310, 1.0, 2**40, 2),
    )
    measurement = kept.Measurement(kept.MeasuredRun({}, {}, {}, {}), numbers, ("gqa",))
    found = kept.decoded(kept.encoded(measurement))
    assert repr(found) == repr(measurement)


@pytest.mark.parametrize("settings", [MeasurementSettings(resamples=41), MeasurementSettings(resamples=40, seed=1)])
def test_other_settings_are_measured_anew(folder, read, settings):
    read_folder(folder, SETTINGS)
    read_folder(folder, settings)
    assert len(read) == 2


def test_the_number_of_processes_changes_nothing(folder, read):
    read_folder(folder, SETTINGS)
    read_folder(folder, MeasurementSettings(resamples=40, workers=2))
    assert len(read) == 1


def test_a_log_that_changed_is_read_even_where_it_kept_its_size_and_time(folder, read):
    read_folder(folder, SETTINGS)
    (log,) = folder.rglob("*.jsonl")
    stat, content = log.stat(), log.read_bytes()
    log.write_bytes(content.replace(b"}\n", b"]\n", 1))
    os.utime(log, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    settle(folder)
    with pytest.raises(ValueError, match="damaged"):
        read_folder(folder, SETTINGS)
    assert len(read) == 2


def test_files_that_are_just_being_written_are_not_kept(folder, read, monkeypatch):
    monkeypatch.setattr(files, "SETTLED_NANOSECONDS", 60 * 10**9)
    for _ in range(2):
        read_folder(folder, SETTINGS)
    assert len(read) == 2


def test_what_is_kept_and_damaged_is_measured_again(folder, read, tmp_path):
    first = read_folder(folder, SETTINGS)
    (file,) = (tmp_path / "cache" / "measured").iterdir()
    for content in (b"", file.read_bytes()[:-40], b"PK" + bytes(200)):
        file.write_bytes(content)
        again = read_folder(folder, SETTINGS)
        assert all(map(equal, parts(first), parts(again)))
    assert len(read) == 4


def test_nothing_is_kept_where_the_user_wants_no_cache(folder, read, monkeypatch, tmp_path):
    monkeypatch.setenv("LMMS_PLUGIN_CACHE", "")
    for _ in range(2):
        read_folder(folder, SETTINGS)
    assert len(read) == 2
    assert not (tmp_path / "cache").exists()
