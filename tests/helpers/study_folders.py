"""Folders of finished studies with planted answers, in the format that lmms-eval and the study engine write."""

import json

import numpy as np

CLEAN, SHIFTED = "rec", ("rec_fog_1", "rec_fog_3")
_CONFIG = {"dataset_path": "data", "test_split": "test", "metric_list": [{"metric": "mean_iou"}, {"metric": "ece"}]}
_PLACES = {CLEAN: None, "rec_fog_1": ("fog", 1), "rec_fog_3": ("fog", 3)}
_AXES = ("model", "method", "bits", "group_size", "components", "calibration", "seed")


def write_cell(study, name, axes, outcomes, confidence=0.9, limit=None):
    """Write a cell whose answers are right where `outcomes[task]` (n,) is 1; four documents an image."""
    folder = study / "cells" / name
    folder.mkdir(parents=True)
    stem = "20260101_000000"
    for task, right in outcomes.items():
        lines = [_line(k, one, confidence) for k, one in enumerate(right)]
        (folder / f"{stem}_samples_{task}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    content = {
        "results": {task: {"mean_iou,none": float(np.mean(_iou(right)))} for task, right in outcomes.items()},
        "configs": {task: _CONFIG | _metadata(task) for task in outcomes},
        "n-samples": {task: {"original": len(right), "effective": len(right)} for task, right in outcomes.items()},
        "config": {"model": f"quant_{axes['method']}", "model_args": "pretrained=demo", "limit": limit},
    }
    (folder / f"{stem}_results.json").write_text(json.dumps(content))
    full = dict.fromkeys(_AXES) | {"model": "demo"} | axes
    about = {"id": name, "key": name, "axes": full, "tasks": list(outcomes), "limit": limit}
    (folder / "cell.json").write_text(json.dumps(about))
    (folder / "done.json").write_text(json.dumps({"seconds": 1.0, "files": {}}))
    return folder


def outcomes(n, clean, first, third):
    """Outcomes of the tasks with so many right answers each, the first ones of n."""
    return {task: np.arange(n) < count for task, count in zip(_PLACES, (clean, first, third), strict=True)}


def _iou(right):
    return np.where(right, 0.8, 0.2)


def _line(k, right, confidence):
    record = {"image": f"image{k // 4}", "id": f"{k:04d}", "score": float(_iou(right)), "expression": f"thing {k}"}
    record |= {"target": [0, 0, 1, 1], "box": [0, 0, 1, 1]}
    return {"doc_id": k, "mean_iou": record | {"confidence": {"coordinate_mean": confidence}}}


def _metadata(task):
    place = _PLACES[task]
    return {"metadata": {"shift": place[0], "severity": place[1]}} if place else {}
