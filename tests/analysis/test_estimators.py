"""Estimators beside one another, from logs made by hand."""

import json
import math

import numpy as np
import pytest

from lmms_plugin import metrics
from lmms_plugin.analysis import estimator_ranking
from lmms_plugin.analysis.logs import read_one
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.cli import printed
from lmms_plugin.metrics import bootstrap

SETTINGS = MeasurementSettings(resamples=50)


def write(folder, confidences, scores):
    """A run of one grounding task, one image per expression."""
    rows = [
        {
            "doc_id": k,
            "mean_iou": {
                "id": str(k),
                "image": f"i{k}",
                "score": score,
                "box": [0, 0, 1, 1],
                "target": [0, 0, 1, 1],
                "expression": "x",
                "confidence": confidence,
            },
        }
        for k, (confidence, score) in enumerate(zip(confidences, scores, strict=True))
    ]
    (folder / "r_samples_rec.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"dataset_path": "data", "test_split": "test", "metric_list": [{"metric": "mean_iou"}]}
    samples = {"original": len(rows), "effective": len(rows)}
    results = {"configs": {"rec": config}, "n-samples": {"rec": samples}, "results": {"rec": {}}, "config": {}}
    (folder / "r_results.json").write_text(json.dumps(results))
    return read_one(folder)


def test_each_is_judged_by_the_metrics_of_its_own_records(tmp_path):
    rng = np.random.default_rng(0)
    good, other, score = rng.random(60), rng.random(60), rng.random(60)
    confidences = [
        {"joint": 0.5 * g + 0.5 * s, "verbalised": None if k % 3 else o}
        for k, (g, o, s) in enumerate(zip(good, other, score, strict=True))
    ]
    judged = estimator_ranking.judge(write(tmp_path, confidences, score.tolist()), SETTINGS)
    assert [one.estimator for one in judged] == ["joint", "verbalised"]
    assert [(one.records, one.missing) for one in judged] == [(60, 0), (20, 40)]
    order = np.argsort([str(k) for k in range(60)])
    right = (score >= 0.5).astype(float)
    for one in judged:
        known = [k for k in order if confidences[k][one.estimator] is not None]
        confidence = np.array([confidences[k][one.estimator] for k in known])
        assert one.auroc == pytest.approx(metrics.auroc(confidence, right[known]))
        assert one.aurc == pytest.approx(metrics.aurc(confidence, right[known]))
        assert one.ece == pytest.approx(metrics.ece(confidence, right[known]))
        assert one.accuracy == pytest.approx(right[known].mean())
        assert one.auroc_interval.low <= one.auroc <= one.auroc_interval.high
    assert printed.estimators_table(judged, "run", 0.95).row_count == 2


def test_one_that_has_no_value_at_all_is_not_judged(tmp_path):
    run = write(tmp_path, [{"joint": 0.5, "verbalised": None}] * 3, [0.9, 0.1, 0.9])
    assert [one.estimator for one in estimator_ranking.judge(run, SETTINGS)] == ["joint"]


def test_answers_that_are_all_right_cannot_be_told_apart(tmp_path):
    (one,) = estimator_ranking.judge(write(tmp_path, [{"joint": 0.5}] * 3, [0.9] * 3), SETTINGS)
    assert math.isnan(one.auroc)
    assert one.aurc == 0.0


def test_a_run_without_confidences_says_so(tmp_path):
    with pytest.raises(ValueError, match="expected confidences in the logs"):
        estimator_ranking.judge(write(tmp_path, [{}] * 3, [0.9] * 3), SETTINGS)


def test_intervals_of_fractions_are_fractions(tmp_path):
    # Sure of everything and always wrong but for one answer: twice the value less the lowest resample is above 1.
    rng = np.random.default_rng(0)
    run = write(tmp_path, [{"joint": float(c)} for c in rng.uniform(0.99, 1.0, 6)], [0.9] + [0.1] * 5)
    settings = MeasurementSettings(resamples=200, level=0.99)
    (one,) = estimator_ranking.judge(run, settings)
    resampled = [metrics.ece(*_drawn(run, k)) for k in range(settings.resamples)]
    assert 2 * one.ece - np.quantile(resampled, 0.005) > 1.0
    assert one.ece_interval.high == 1.0


def _drawn(run, resample):
    records = run.tasks["rec"]
    times = bootstrap.draw(records.names.size, SETTINGS.seed, resample)[records.image]
    return np.repeat(records.confidence["joint"], times), np.repeat(records.outcome, times)
