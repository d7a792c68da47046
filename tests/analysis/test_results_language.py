"""Logs of language shifts and of rejection, read, measured and compared."""

import math
from itertools import product

import numpy as np
import pytest
from helpers.planted_logs import SETTINGS, answers, pairs, rejection, write

from lmms_plugin import metrics
from lmms_plugin.analysis import comparison, logs, measure
from lmms_plugin.shifts.benchmark import FIFTEEN
from lmms_plugin.shifts.severities import SEVERITIES

TYPOS = {"metadata": {"text_shift": "casing", "text_severity": 3}}


@pytest.mark.parametrize(
    ("metadata", "place"),
    [
        ({}, (None, None, "image")),
        ({"shift": "fog", "severity": 2}, ("fog", 2, "image")),
        ({"text_shift": "casing", "text_severity": 4}, ("casing", 4, "language")),
        ({"shift": "crop", "severity": 2, "shifted": "geometry"}, ("crop", 2, "geometry")),
        (
            {"shift": "fog", "severity": 2, "text_shift": "casing", "text_severity": 2},
            ("fog_and_casing", 2, "image and language"),
        ),
        (
            {"shift": "fog", "severity": 2, "text_shift": "casing", "text_severity": 5},
            ("fog_and_casing_5", 2, "image and language"),
        ),
    ],
    ids=["clean", "image", "language", "geometry", "both", "both, unequal"],
)
def test_place(tmp_path, metadata, place):
    run = logs.read_one(write(tmp_path, {"rec": answers(0.8)}, rec={"metadata": metadata}))
    assert run.tasks["rec"].place == ("data", "test", *place)


def test_robustness_to_language_is_of_the_documents_that_both_tasks_have(tmp_path):
    clean, shifted = answers(0.9), answers(0.9, 3)[40:]
    run = logs.read_one(write(tmp_path, {"rec": clean, "rec_casing_3": shifted}, rec_casing_3=TYPOS))
    rows = {row.metric: row for row in measure.robust(run, SETTINGS)["rec, language"]}
    assert rows["acc@0.5"].clean == np.mean([line["mean_iou"]["score"] >= 0.5 for line in clean[40:]])
    assert rows["acc@0.5"].mean == np.mean([line["mean_iou"]["score"] >= 0.5 for line in shifted])


def moved(shift, severity, **more):
    return {"metadata": {"shift": shift, "severity": severity, **more}}


def test_the_fifteen_corruptions_have_a_mean_of_their_own(tmp_path):
    skill = {place: 0.5 + 0.004 * k for k, place in enumerate(product(FIFTEEN, SEVERITIES))}
    more = {("speckle_noise", 3): 0.1, ("crop", 3): 0.2}
    tasks = {"rec": answers(0.9)} | {f"rec_{s}_{v}": answers(x) for (s, v), x in (skill | more).items()}
    configs = {f"rec_{s}_{v}": moved(s, v) for s, v in skill | more}
    configs["rec_crop_3"] = moved("crop", 3, shifted="geometry")
    found = measure.robust(logs.read_one(write(tmp_path, tasks, **configs)), SETTINGS)
    # With one more corruption at one severity there is no full table but the benchmark's, and geometry is apart.
    assert list(found) == ["rec, mPC and rPC of 15 corruptions", "rec, geometry"]
    rows = {row.metric: row for row in found["rec, mPC and rPC of 15 corruptions"]}
    right = [np.mean([one["mean_iou"]["score"] >= 0.5 for one in answers(x)]) for x in skill.values()]
    clean = np.mean([one["mean_iou"]["score"] >= 0.5 for one in tasks["rec"]])
    assert rows["acc@0.5"].mean == pytest.approx(np.mean(right))
    assert rows["acc@0.5"].retained == pytest.approx(np.mean(right) / clean)


def test_a_shift_that_leaves_documents_out_leaves_the_others_their_interaction(tmp_path):
    cells = {"rec": answers(0.9), "rec_pad_1": answers(0.8), "rec_pad_3": answers(0.7)}
    cells |= {"rec_crop_1": answers(0.8), "rec_crop_3": answers(0.7)[40:]}
    places = {f"rec_{s}_{v}": moved(s, v, shifted="geometry") for s in ("pad", "crop") for v in (1, 3)}
    first, second = (logs.read_one(write(tmp_path / name, cells, **places)) for name in ("a", "b"))
    (row,) = [row for row in comparison.compare(first, second, SETTINGS).shifted if row.metric == "acc@0.5"]
    assert (row.task, row.cells) == ("rec, geometry", 2)


def test_rejection_is_measured_by_ranking_and_by_pairs(tmp_path):
    run = rejection(tmp_path, 0.1)
    lines = [line["box_rate"] for line in pairs(0.1)]
    confidence = [line["confidence"]["coordinate_mean"] for line in lines]
    matches = [line["matches"] for line in lines]
    numbers = {number.metric: number for number in measure.measure(run, SETTINGS)}
    names = {"box_rate_true", "box_rate_changed", "rejection_auroc", "rejection_fpr@0.95", "confidence_falls"}
    assert set(numbers) == names
    assert numbers["rejection_auroc"].value == pytest.approx(metrics.auroc(confidence, matches))
    assert numbers["rejection_fpr@0.95"].value == pytest.approx(metrics.fpr_at_tpr(confidence, matches))
    falls = [confidence[2 * k] > confidence[2 * k + 1] for k in range(60)]
    assert numbers["confidence_falls"].value == pytest.approx(np.mean(falls))
    assert (numbers["confidence_falls"].records, numbers["rejection_auroc"].records) == (60, 120)
    assert numbers["box_rate_true"].value == 1.0
    assert numbers["box_rate_changed"].value == pytest.approx(0.9)
    for name in ("rejection_auroc", "confidence_falls"):
        assert numbers[name].low <= numbers[name].value <= numbers[name].high


def test_two_runs_are_compared_by_how_well_they_reject(tmp_path):
    found = comparison.compare(rejection(tmp_path / "a", 0.3), rejection(tmp_path / "b", 0.0), SETTINGS)
    rows = {row.metric: row for row in found.changes}
    assert set(rows) == {"box_rate", "rejection_auroc", "rejection_fpr@0.95"}
    assert rows["rejection_auroc"].difference.high < 0
    assert not found.flips
    assert not found.shifted
    assert not math.isnan(rows["box_rate"].first)
