"""`lmms_plugin.read`: runs whose answers, metrics and comparisons are DataFrames with the numbers of the commands."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import planted_logs, report_study

import lmms_plugin
from lmms_plugin import data_frames
from lmms_plugin.analysis import comparison, logs, measure, overview
from lmms_plugin.analysis.findings import sentences

SETTINGS = measure.MeasurementSettings(resamples=20)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return lmms_plugin.read(report_study.write_study(tmp_path_factory.mktemp("study"), 30), resamples=20)


def test_importing_the_package_imports_no_pandas():
    late = {"pandas", "numpy", "torch", "lmms_plugin.analysis"}
    code = f"import sys, lmms_plugin; print(sorted({late} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert set(lmms_plugin.__all__) == {"__version__", "read"}


def test_runs_have_their_places(runs):
    frame = runs.configurations()
    assert tuple(frame.columns[:8]) == data_frames.RUN_COLUMNS
    assert sorted(frame["method"]) == ["awq", "awq", "none", "rtn", "rtn"]
    assert set(frame["bits"]) == {2, 3, 16}
    assert frame["seed"].dtype == "Int64"
    assert sorted(frame.loc[frame["method"] == "awq", "seed"]) == [0, 1]
    assert len(runs[1:3]) == 2
    assert [run.file for run in runs] == [logs.read(run.file).file for run in runs]


def test_answers_are_those_of_the_logs(runs):
    run = runs[0]
    frame = run.answers()
    assert tuple(frame.columns[:11]) == data_frames.ANSWER_COLUMNS
    assert "confidence_coordinate_mean" in frame
    for task, rows in frame.groupby("task"):
        records = run.logged.tasks[task]
        np.testing.assert_array_equal(rows["score"], records.score)
        np.testing.assert_array_equal(rows["confidence_coordinate_mean"], records.confidence["coordinate_mean"])
    assert len(runs.answers()) == 5 * 4 * 30
    noisy = frame[frame["task"] == "shapes_shift_gaussian_noise_5"]
    assert set(noisy["shift"]) == {"gaussian_noise"}
    assert set(noisy["severity"]) == {5}


def test_metrics_and_overview_are_those_of_the_command(runs):
    frame = runs[0].metrics()
    assert tuple(frame.columns) == data_frames.METRIC_COLUMNS
    expected = pd.DataFrame(measure.measure(runs[0].logged, SETTINGS), columns=measure.MetricValue._fields)
    pd.testing.assert_frame_equal(frame[list(expected.columns)], expected)
    rows = overview.overview(runs[0].logged, SETTINGS).groups
    seen = runs[0].overview()
    assert seen["ece_low"].tolist() == [row.ece.low for row in rows]
    assert seen["accuracy"].tolist() == [row.accuracy.value for row in rows]
    assert tuple(runs[:1].metrics().columns) == (*data_frames.RUN_COLUMNS, *data_frames.METRIC_COLUMNS)


def test_comparisons_are_those_of_the_command(runs):
    (dense,) = [run for run in runs if run.place.config.dense]
    other = next(run for run in runs if run.place.config.bits == 2)
    found, expected = dense.compare(other, 0.05), comparison.compare(dense.logged, other.logged, SETTINGS, 0.05)
    assert found.changes["difference"].tolist() == [row.difference.value for row in expected.changes]
    assert found.groups["low"].tolist() == [row.difference.low for row in expected.groups]
    assert {"equivalent", "p", "p_holm"} <= set(found.groups.columns)
    assert found.flips["lost"].tolist() == [row.lost for row in expected.flips]
    assert list(found.sentences) == sentences(expected, 0.95)
    against = runs.against_unquantized()
    assert sorted(set(against["method"])) == ["awq", "rtn"]
    worst = against[(against["bits"] == 2) & (against["metric"] == "acc@0.5")]
    groups = found.groups[found.groups["metric"] == "acc@0.5"]
    assert worst["difference"].tolist() == groups["difference"].tolist()


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(ValueError, match="expected a results file or a folder"):
        lmms_plugin.read(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'joint'"):
        lmms_plugin.read(tmp_path, estimator="joind")
    planted_logs.write_grid(tmp_path, 0.9)
    with pytest.raises(ValueError, match="expected a quantized run and an unquantized one"):
        lmms_plugin.read(str(tmp_path), resamples=20).against_unquantized()
