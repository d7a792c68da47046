"""The benchmark of shifts that move boxes: which tasks it asks, and its tables, from planted logs."""

import json

import numpy as np
import pytest
from helpers import report_study

from bench.moving_shifts import BENCHMARK, MOVED, PARTS, REST, TASK, finished, folder_of, robustness, table, task_of
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.shifts.image.moving import MOVING

SETTINGS = MeasurementSettings(resamples=50)
PLACES = {task_of(*cell): cell for cell in (*MOVED, *BENCHMARK)} | {TASK: None}


def plant(output, model, part, skill, docs):
    """A run's files, with accuracies in its table of results as lmms-eval writes them."""
    tasks = {task: PLACES[task] for task in PARTS[part]}
    file = report_study.write_run(folder_of(output, model, part), docs, skill, tasks=tasks)
    content = json.loads(file.read_text())
    for task, scores in content["results"].items():
        log = file.with_name(f"{report_study.DATE}_samples_{task}.jsonl")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        accuracy = float(np.mean([row["mean_iou"]["score"] >= 0.5 for row in rows]))
        scores |= {"acc@0.5,none": accuracy}
        if PLACES[task] and PLACES[task][0] in MOVING:
            scores |= {"acc@0.5_unmoved,none": accuracy / 2, "shifted_rate,none": 0.7}
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output, docs = tmp_path_factory.mktemp("moving"), report_study.documents(20)
    for part in PARTS:
        plant(output, "none", part, 0.9, docs)
    for part in ("clean", "3"):
        plant(output, "rtn4", part, 0.5, docs)
    return finished(output)


def test_every_moving_shift_and_the_seventy_five_are_asked_once():
    tasks = [task for part in PARTS.values() for task in part]
    assert len(tasks) == len(set(tasks)) == 1 + 14 * 3 + 75 - 4 * 3
    assert set(PARTS[REST]).isdisjoint(PARTS["3"])


def test_accuracies_differences_and_what_is_missing_are_told(runs):
    head, _, clean, *rows = table(runs, SETTINGS)
    assert head == "| shift | none | rtn4 - none, points | none, unmoved | asked |"
    assert len(rows) == 3 * len(MOVING)
    value = runs["none"].results[TASK]["acc@0.5,none"]
    assert clean.startswith(f"| none | {value:.3f} [")
    assert clean.endswith(" |  |  |")
    cells = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1:] for row in rows}
    assert cells["`crop` 3"][1].startswith("-")
    assert cells["`crop` 5"][1] == ""
    assert cells["`crop` 3"][-1] == "0.70 |"


def test_mpc_is_the_mean_over_seventy_five_cells(runs):
    _, _, _, line = robustness(runs, SETTINGS)
    name, clean, mean, retained, unmoved = line.strip("| ").split(" | ")
    results = runs["none"].results
    expected = np.mean([results[task_of(*cell)]["acc@0.5,none"] for cell in BENCHMARK])
    assert name == "none"
    assert mean.startswith(f"{expected:.3f} [")
    assert float(retained) == pytest.approx(expected / results[TASK]["acc@0.5,none"], abs=1e-3)
    assert float(clean) == pytest.approx(results[TASK]["acc@0.5,none"], abs=1e-3)
    assert float(unmoved) < expected
