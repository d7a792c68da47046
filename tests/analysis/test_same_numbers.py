"""One number, whoever prints it: all commands on one folder agree to the last digit."""

import csv
import json
import math
import sys

import pytest
from helpers.submissions import TASK, VQA_TASK, answered, questioned, write_run

from lmms_plugin.analysis.groups import METRICS
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.cli.main import main
from lmms_plugin.report.numbers.results_folder import read_folder

RESAMPLES = 150
PAGE = {"ECE": "ece", "AURC": "aurc", "C@1%": "coverage@0.01", "C@5%": "coverage@0.05", "Φ1": "phi@1"}


@pytest.fixture(params=[(TASK, answered), (VQA_TASK, questioned)], ids=["boxes", "questions"])
def folder(request, tmp_path):
    task, rows = request.param
    return write_run(tmp_path / "run", rows(48), task=task)


@pytest.fixture
def printed(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lmms-plugin", *map(str, arguments), "--resamples", str(RESAMPLES)])
        with pytest.raises(SystemExit) as status:
            main()
        out, err = capsys.readouterr()
        assert status.value.code == 0, err
        return out

    return call


@pytest.fixture
def metrics(printed, folder):
    (run,) = json.loads(printed("metrics", folder, "--json"))
    return {row["metric"]: row for row in run["metrics"]}


def test_page(folder, metrics, printed, tmp_path):
    (run,) = read_folder(folder, MeasurementSettings(resamples=RESAMPLES)).runs
    (task,) = run.measured.tasks.values()
    (group,) = run.measured.groups.values()
    accuracy = "acc@0.5" if "acc@0.5" in metrics else "accuracy"
    found = {accuracy if name == "accuracy" else name: k for k, name in enumerate(METRICS)}
    shared = found.keys() & metrics.keys()
    assert len(shared) >= 11
    for name in shared:
        row, k = metrics[name], found[name]
        assert (task.value[k], task.low[k], task.high[k]) == (row["value"], row["low"], row["high"]), name
        assert (group.value[k], *group.interval(METRICS[k])) == (row["value"], row["low"], row["high"]), name
    printed("report", folder, "-o", tmp_path / "page.html", "--figures", tmp_path / "figures", "--pictures", 0)
    (line,) = csv.DictReader((tmp_path / "figures" / "leader.csv").read_text(encoding="utf-8").splitlines())
    for column, name in (PAGE | {"Accuracy": accuracy}).items():
        row = metrics[name]
        told = (line[column], line[f"{column} low"], line[f"{column} high"])
        assert told == tuple(f"{row[end]:.6g}" for end in ("value", "low", "high")), name


def test_export(folder, metrics, printed, tmp_path):
    ids = ["--model-id", "a/b", "--organization", "a laboratory", "--relationship", "other"]
    printed("export", folder, "--format", "every-eval-ever", *ids, "-o", tmp_path / "out")
    (file,) = (tmp_path / "out").rglob("*.json")
    told = {row["metric_config"]["metric_id"]: row for row in json.loads(file.read_text())["evaluation_results"]}
    shared = [name for name in told.keys() & metrics.keys() if metrics[name]["low"] is not None]
    assert len(shared) >= 20
    for name in shared:
        score, row = told[name]["score_details"], metrics[name]
        assert score["score"] == row["value"], name
        within = score["uncertainty"]["confidence_interval"]
        assert (within["lower"], within["upper"]) == (row["low"], row["high"]), name


def test_estimators(folder, metrics, printed):
    (run,) = json.loads(printed("estimators", folder, "--json"))
    own = "joint" if "accuracy" in metrics else "coordinate_mean"
    (judged,) = (row for row in run["estimators"] if row["estimator"] == own)
    for name in ("auroc", "aurc", "ece"):
        assert judged[name] == metrics[name]["value"], name
        within = judged[f"{name}_interval"]
        assert (within["low"], within["high"]) == (metrics[name]["low"], metrics[name]["high"]), name
    assert judged["ece_floor"] == metrics["ece_floor"]["value"]


def test_comparison(folder, metrics, printed):
    found = json.loads(printed("compare", folder, folder, "--json"))
    assert len(found["changes"]) >= 6
    for row in found["changes"]:
        value = metrics[row["metric"]]["value"]
        assert row["first"] == row["second"] == value or math.isnan(value)
