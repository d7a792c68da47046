"""Every naturally shifted task through the installed `lmms-eval` command, in one process."""

import json
import math
import re
from pathlib import Path

import pytest
from helpers import natural_copies

from lmms_plugin.registration import tasks_folder
from lmms_plugin.tasks.registry import catalogue
from lmms_plugin.tasks.registry.cells import FOLDER

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "adding_a_dataset.md"
BLOCKS = re.findall(r"```(python|yaml)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
SHOWN = {language: code for language, code in BLOCKS if "labels.csv" not in code}
TASKS = {
    path.stem for path in (FOLDER / "grounding" / "natural_images").glob("*.yaml") if not path.name.startswith("_")
}


def add_a_dataset(folder):
    """The two files that the documentation shows, with the one word that a reader replaces replaced."""
    folder.mkdir()
    (folder / "warehouse.py").write_text(SHOWN["python"])
    (folder / "warehouse.yaml").write_text(SHOWN["yaml"].replace("TASKS", tasks_folder()))
    return folder


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, commands):
    """Results and records by task of the demo model, at four bits, on small copies of all datasets."""
    folder = tmp_path_factory.mktemp("natural")
    environment = natural_copies.write(folder / "copies")
    environment["LMMS_PLUGIN_REFCOCOPLUS_REVIEWED"] = str(natural_copies.write_reviewed(folder / "reviewed"))
    environment["LMMS_PLUGIN_COCO_INSTANCES"] = str(natural_copies.write_instances(folder / "instances"))
    environment["LMMS_PLUGIN_WAREHOUSE"] = str(natural_copies.write_warehouse(folder / "warehouse"))
    command = ["lmms-eval", "--model", "quant_rtn"]
    command += ["--model_args", "pretrained=demo,bits=4", "--batch_size", "8", "--log_samples"]
    command += ["--tasks", "refcocoplus_shift_natural,refcocoplus_reviewed,warehouse_rec"]
    command += ["--include_path", str(add_a_dataset(folder / "added"))]
    printed = commands.output(*command, "--output_path", folder / "out", cwd=folder, **environment)
    files = list((folder / "out").rglob("*_results.json"))
    assert len(files) == 1, printed[-5000:]
    records = {
        path.name.split("_samples_")[1].removesuffix(".jsonl"): [
            next(line[key] for key in ("box_rate", "mean_iou") if key in line)
            for line in map(json.loads, path.read_text().splitlines())
        ]
        for path in (folder / "out").rglob("*_samples_*.jsonl")
    }
    return json.loads(files[0].read_text()), records, folder / "out"


def test_every_task_ran(outcome):
    results, records, _ = outcome
    assert set(results["results"]) >= TASKS
    groups = {task.name for task in catalogue.tasks() if task.kind == "group"}
    assert set(records) >= TASKS - groups


def test_the_table_is_that_of_the_records(outcome):
    results, records, _ = outcome
    for task in TASKS & set(records):
        values, logged = results["results"][task], records[task]
        assert all(record["confidence"] for record in logged)
        if task.endswith("_rejection"):
            assert {record["matches"] for record in logged} == {0.0, 1.0}
            assert 0.0 <= values["rejection_auroc,none"] <= 1.0
            nothing = [record["score"] for record in logged if not record["matches"]]
            assert values["box_rate_no_target,none"] == math.fsum(nothing) / len(nothing)
            continue
        scores = [record["score"] for record in logged]
        assert values["mean_iou,none"] == pytest.approx(sum(scores) / len(scores))
        assert values["acc@0.5,none"] == pytest.approx(sum(score >= 0.5 for score in scores) / len(scores))
        assert ("click_acc,none" in values) == task.startswith("screenspot")
        assert 0.0 <= values["ece,none"] <= 1.0


def test_both_splits_of_ref_l4_weigh_by_their_size(outcome):
    results, records, _ = outcome
    scores = [record["score"] for task in ("ref_l4_val", "ref_l4_test") for record in records[task]]
    assert results["results"]["ref_l4"]["mean_iou,none"] == pytest.approx(sum(scores) / len(scores))


def test_clean_expressions_are_counted_apart(outcome):
    results, records, _ = outcome
    values, logged = results["results"]["refcocoplus_reviewed_testA"], records["refcocoplus_reviewed_testA"]
    clean = [record["score"] for record in logged if record["tags"]["clean"]]
    assert 0 < len(clean) < len(logged)
    assert values["mean_iou_clean,none"] == pytest.approx(sum(clean) / len(clean))
    assert values["clean_rate,none"] == pytest.approx(len(clean) / len(logged))
    assert values["mean_iou,none"] == pytest.approx(sum(record["score"] for record in logged) / len(logged))
    assert values["reviewed_rate,none"] == 1.0


def test_results_are_parted_by_the_number_of_distractors(outcome):
    from lmms_plugin.analysis import measure
    from lmms_plugin.analysis.logs import read_one

    results, records, folder = outcome
    for task in ("refcocoplus_rec_testA", "refcocoplus_reviewed_testA", "refcoco_rec_testB", "ref_adv"):
        strata = {record["stratum"] for record in records[task]}
        assert len(strata) > 1
        for stratum in strata:
            scores = [record["score"] for record in records[task] if record["stratum"] == stratum]
            share = sum(score >= 0.5 for score in scores) / len(scores)
            assert results["results"][task][f"acc@0.5_{stratum},none"] == pytest.approx(share)
    measured = {one.metric for one in measure.measure(read_one(folder), measure.MeasurementSettings(resamples=20))}
    assert {"acc@0.5_distractors_2-3", "ece_distractors_7+", "ece_floor_distractors_0"} <= measured


def test_datasets_that_share_files_of_one_kind_are_told_apart(outcome):
    from lmms_plugin.analysis.logs import read_one

    places = [(task, records.place) for task, records in read_one(outcome[2]).tasks.items() if task in TASKS]
    assert len({place for _, place in places}) == len(places) > 10


def test_a_dataset_is_added_as_the_documentation_shows(outcome):
    results, records, _ = outcome
    logged = records["warehouse_rec"]
    assert len(logged) == len(natural_copies.THINGS)
    assert {record["tags"]["camera"] for record in logged} == {"north"}
    assert results["results"]["warehouse_rec"]["parse_rate,none"] > 0.5
