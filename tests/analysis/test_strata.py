"""Accuracy and calibration by stratum, from logs: both readers, and numbers computed apart."""

import json

import numpy as np
import pytest
from helpers import planted_logs

from lmms_plugin import metrics
from lmms_plugin.analysis import columns, logs, measure

NAMES = ("distractors_0", "distractors_2-3", "")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    lines = planted_logs.answers(0.7)
    for k, line in enumerate(lines):
        if name := NAMES[k % 3]:
            line["mean_iou"]["stratum"] = name
        # lmms-eval's rows go on behind the record.
        line["parse_rate"] = {"score": 1.0}
    lines[1]["mean_iou"]["stratum"] = "distractors_4+"
    return logs.read_one(planted_logs.write(tmp_path_factory.mktemp("strata"), {"rec": lines}))


def test_both_readers_agree(run):
    config = run.content["configs"]["rec"]
    fast = columns.read("rec", config, run.log("rec"), None)
    slow = logs.by_rows("rec", config, run.log("rec"))
    assert fast.strata.tolist() == slow.strata.tolist() == run.tasks["rec"].strata.tolist()
    assert fast.strata[:4].tolist() == ["distractors_0", "distractors_4+", "", "distractors_0"]


def test_a_log_without_strata_has_none(tmp_path):
    run = logs.read_one(planted_logs.write(tmp_path, {"rec": planted_logs.answers(0.7)}))
    assert run.tasks["rec"].strata is None
    assert not [one for one in measure.measure(run, planted_logs.SETTINGS) if "distractors" in one.metric]


def test_numbers_of_a_stratum_are_those_of_its_records(run):
    records = run.tasks["rec"]
    found = {one.metric: one for one in measure.measure(run, planted_logs.SETTINGS)}
    for name in ("distractors_0", "distractors_2-3"):
        keep = records.strata == name
        confidence, right = records.confidence["coordinate_mean"][keep], records.score[keep] >= 0.5
        accuracy, ece = found[f"acc@0.5_{name}"], found[f"ece_{name}"]
        assert accuracy.value == pytest.approx(right.mean())
        assert ece.value == pytest.approx(metrics.ece(confidence, right.astype(float)))
        assert accuracy.low < accuracy.value < accuracy.high
        assert accuracy.records == ece.records == keep.sum()
        assert accuracy.images == np.unique(records.images[keep]).size
        assert found[f"ece_floor_{name}"].value > 0


def test_a_stratum_of_one_image_has_no_interval_and_is_left_out(run):
    assert not [one for one in measure.measure(run, planted_logs.SETTINGS) if one.metric.endswith("_4+")]


def test_strata_do_not_change_the_other_numbers(run, tmp_path):
    lines = [json.loads(line) for line in run.log("rec").read_text().splitlines()]
    for line in lines:
        line["mean_iou"].pop("stratum", None)
    without = logs.read_one(planted_logs.write(tmp_path, {"rec": lines}))
    found = [one for one in measure.measure(run, planted_logs.SETTINGS) if "distractors" not in one.metric]
    # Texts, because an undefined number does not equal itself.
    assert list(map(str, found)) == list(map(str, measure.measure(without, planted_logs.SETTINGS)))
