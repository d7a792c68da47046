"""Folders of results with planted answers: one task, a grid of shifts and severities, pairs that are to be rejected."""

import json

import numpy as np

from lmms_plugin.analysis import logs, measure

SETTINGS = measure.MeasurementSettings(resamples=60)
CONFIG = {"dataset_path": "data", "test_split": "test", "metric_list": [{"metric": "mean_iou"}, {"metric": "ece"}]}
CELLS = {
    "rec": None,
    "rec_fog_1": ("fog", 1),
    "rec_fog_3": ("fog", 3),
    "rec_snow_1": ("snow", 1),
    "rec_snow_3": ("snow", 3),
}


def line(k, iou, confidence):
    record = {
        "image": f"image{k // 4}",
        "id": f"{k:03d}",
        "score": iou,
        "expression": f"thing {k}",
        "target": [0, 0, 1, 1],
    }
    record |= {"box": [0, 0, 1, iou] if iou else None}
    record |= {} if confidence is None else {"confidence": confidence}
    return {"doc_id": k, "mean_iou": record}


def answers(skill, severity=0, n=120):
    """Documents whose difficulty is the same in every run, so that better runs are right wherever worse ones are."""
    rng = np.random.default_rng(0)
    difficulty, confidence = rng.random(n), rng.beta(4, 2, n)
    iou = np.where(difficulty < skill - 0.1 * severity, 0.8, 0.2)
    both = zip(iou.tolist(), confidence.tolist(), strict=True)
    return [line(k, u, {"coordinate_mean": c, "joint": c**4}) for k, (u, c) in enumerate(both)]


def table(lines):
    scores = [line["mean_iou"]["score"] for line in lines if "mean_iou" in line]
    return {"alias": "task"} | ({"mean_iou,none": float(np.mean(scores))} if scores else {})


def write(folder, tasks, name="quant_none", date="20260101_000000", **configs):
    folder.mkdir(parents=True, exist_ok=True)
    for task, lines in tasks.items():
        log = folder / f"{date}_samples_{task}.jsonl"
        log.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    content = {
        "results": {task: table(lines) for task, lines in tasks.items()},
        "configs": {task: CONFIG | configs.get(task, {}) for task in tasks},
        "n-samples": {task: {"original": len(lines), "effective": len(lines)} for task, lines in tasks.items()},
        "config": {"model": name, "model_args": "pretrained=demo", "limit": None},
    }
    (folder / f"{date}_results.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_grid(folder, skill, per_severity=1.0):
    tasks = {name: answers(skill, per_severity * (cell[1] if cell else 0)) for name, cell in CELLS.items()}
    place = {name: {"metadata": {"shift": c[0], "severity": c[1]}} for name, c in CELLS.items() if c}
    return logs.read_one(write(folder, tasks, **place))


def judged(k, matches, confidence):
    record = {"image": f"image{k // 4}", "id": f"{k:03d}/{matches:g}", "pair": f"{k:03d}", "matches": matches}
    record |= {"score": float(confidence > 0), "expression": f"thing {k} {matches:g}", "answer": "", "box": None}
    return {"doc_id": 2 * k + int(matches == 0), "box_rate": record | {"confidence": {"coordinate_mean": confidence}}}


def pairs(gap, n=60):
    """Pairs of which the changed side has `gap` less confidence on average, and none in every tenth."""
    rng = np.random.default_rng(1)
    true = rng.uniform(0.4, 0.9, n)
    changed = np.clip(true - gap + rng.normal(0, 0.1, n), 0.01, 1.0)
    changed[::10] = 0.0
    sides = zip(true.tolist(), changed.tolist(), strict=True)
    return [judged(k, m, c) for k, (t, f) in enumerate(sides) for m, c in ((1.0, t), (0.0, f))]


def rejection(folder, gap):
    return logs.read_one(write(folder, {"rejection": pairs(gap)}))
