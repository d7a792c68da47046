"""Designs of studies that compare every cell with the unquantized model."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.study_folders import CLEAN, write_cell

from lmms_plugin.cli.screens.plan_screen import plan_screen
from lmms_plugin.cli.screens.screen import HEIGHT, WIDTH
from lmms_plugin.metrics.power import power_of_equivalence, smallest_difference
from lmms_plugin.study.file.analyses import AgainstReference
from lmms_plugin.study.file.asked import parse
from lmms_plugin.study.file.expansion import cells
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.run import cost, design, reference_design
from lmms_plugin.study.run.planning import Plan, PlannedCell
from lmms_plugin.study.run.weights import Size

STUDIES = Path(__file__).parents[2] / "studies"
TWO_TASKS = """
models: [Qwen/Qwen3-VL-8B-Instruct]
tasks: [[refcocoplus_rec_val, refcocoplus_shift_val_fog_3]]
limit: 717
grids:
  - {methods: [none]}
  - {methods: [rtn, hqq], bits: [4]}
analysis:
  kind: against_reference
  question: What is lost?
  metrics: ["acc@0.5", ece]
  margin: 0.05
"""


def planned(file):
    """The plan of a study, without reading code and checkpoints for keys and sizes."""
    study = read(file)
    found = [
        PlannedCell(
            SimpleNamespace(cell=cell, id=cell.slug), "missing", cost.Seconds(60.0, ""), Size(None, None, ""), 0
        )
        for cell in cells(study)
    ]
    return Plan(study, tuple(found), ())


@pytest.fixture
def two_tasks(tmp_path, monkeypatch):
    monkeypatch.delenv("LMMS_PLUGIN_REFCOCOPLUS", raising=False)
    file = tmp_path / "study.yaml"
    file.write_text(TWO_TASKS)
    return planned(file)


def test_changes_of_accuracy_have_the_closed_form_of_the_limit(two_tasks):
    """717 documents are 100 images of RefCOCO+; two cells on two tasks are four tests of a metric."""
    made = design.told(two_tasks)
    assert made.tests == 4
    accuracies = [one for one in made.shown if one.metric == "acc@0.5"]
    assert [(one.images, one.documents) for one in accuracies] == [(100, 717)] * 2
    error = math.sqrt(0.12 * (1 + 0.05 * (10758 / 1500 - 1)) / 717)
    for one in accuracies:
        assert one.smallest == pytest.approx(smallest_difference(error, level=1 - 0.05 / 4, images=100), rel=1e-3)
        equal = power_of_equivalence(0.05, error, level=0.95, images=100)
        assert one.equivalent == pytest.approx(equal, rel=1e-2)


def test_other_metrics_wait_for_finished_cells(two_tasks):
    made = design.told(two_tasks)
    assert {one.smallest for one in made.shown if one.metric == "ece"} == {None}
    lines = plan_screen(two_tasks, made).splitlines()
    (row,) = (line.split() for line in lines if line.startswith("refcocoplus_rec_val"))
    assert row[1:] == ["100", "717", f"{100 * made.largest('acc@0.5'):.1f}"]
    said = " ".join(lines[: lines.index("")])
    assert "on every task that has it" in said
    assert said.endswith("Of ece that is not known before some cells are finished (--output).")


def test_tasks_of_which_nothing_is_known_have_no_row():
    """Those of rejection, without finished cells; the names of the others have room then."""
    found = planned(STUDIES / "kv_cache.yaml")
    lines = plan_screen(found, design.told(found)).splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("task ") and line.endswith("acc@0.5"))
    tasks = [line.split()[0] for line in lines[start + 1 : lines.index("", start)]]
    assert tasks == ["shapes_rec", "shapes_shift_gaussian_noise_3"]


def test_images_of_local_data_are_counted_and_rejections_are_not(tmp_path):
    made = design.told(planned(STUDIES / "formats.yaml"))
    of = {(one.task, one.metric): one for one in made.shown}
    assert of["shapes_rec", "acc@0.5"].documents == 240
    assert of["shapes_rec", "acc@0.5"].smallest > 0.0
    assert of["shapes_rejection_attribute_swap", "rejection_auroc"].images is None
    assert ("shapes_rejection_attribute_swap", "acc@0.5") not in of


@pytest.mark.parametrize("name", ["formats", "kv_cache"])
def test_the_screen_answers_first(name):
    found = planned(STUDIES / f"{name}.yaml")
    lines = plan_screen(found, design.told(found)).splitlines()
    assert len(lines) <= HEIGHT
    assert max(map(len, lines)) <= WIDTH
    assert "It finds changes of" in " ".join(lines[:4])


def test_finished_cells_tell_the_variance_of_every_metric(tmp_path):
    """The error of a mean over images of four documents, from the width of its bootstrap interval."""
    random = np.random.default_rng(0)
    right = {name: random.random(800) < share for name, share in (("none", 0.8), ("rtn", 0.7))}
    for name, answers in right.items():
        write_cell(tmp_path, name, {"method": name, "bits": 4}, {CLEAN: answers})
    asked = {"question": "What is lost?", "metrics": ["mean_iou", "ece"]}
    found = reference_design.measured(tmp_path, list(right), parse(AgainstReference, asked))
    assert set(found) == {(CLEAN, "mean_iou"), (CLEAN, "ece")}
    images, variance = found[CLEAN, "mean_iou"]
    assert images[:2] == (200, 800)
    # Answers have an IoU of 0.8 or 0.2.
    each = 0.6 * (right["rtn"].astype(float) - right["none"]).reshape(200, 4).mean(axis=1)
    assert variance.images == pytest.approx(each.var(ddof=1), rel=0.1)
    assert variance.basis == "measured on 800 documents of 200 images"


def test_one_cell_alone_is_no_pilot(tmp_path):
    write_cell(tmp_path, "none", {"method": "none"}, {CLEAN: np.arange(40) < 30})
    asked = parse(AgainstReference, {"question": "What is lost?", "metrics": ["ece"]})
    assert reference_design.measured(tmp_path, ["none"], asked) == {}


def test_images_are_chosen_for_no_study_of_this_kind(two_tasks):
    with pytest.raises(
        ValueError, match="of kind method_by_shift, got against_reference: images are chosen for no other"
    ):
        design.chosen(two_tasks, budget=3600.0)
