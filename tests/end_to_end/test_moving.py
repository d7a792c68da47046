"""Shifts that move boxes through the installed `lmms-eval`: the demo, RefCOCO+'s schema, and their logs read again."""

import json

import pytest

from lmms_plugin.analysis import logs
from lmms_plugin.export.rescoring import rescore
from lmms_plugin.protocol.boxes import Box, iou

pytestmark = pytest.mark.slow
SHIFTS = ("horizontal_flip_3", "crop_1", "quarter_turn_1", "upscale_2", "zoom_blur_5", "elastic_transform_3")
DATASETS = ("shapes_shift", "refcocoplus_shift_testA")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, local_copy, commands):
    """Results file of one run of the demo's checkpoint on both datasets."""
    folder = tmp_path_factory.mktemp("moving")
    tasks = [f"{dataset}_{shift}" for dataset in DATASETS for shift in SHIFTS]
    command = ["lmms-eval", "--model", "quant_rtn", "--model_args", "pretrained=demo,bits=4", "--tasks"]
    command += [",".join(["shapes_rec", *tasks]), "--limit", "12", "--batch_size", "12", "--log_samples"]
    command += ["--output_path", folder]
    printed = commands.output(*command, cwd=folder, LMMS_PLUGIN_REFCOCOPLUS=str(local_copy))
    files = list(folder.rglob("*_results.json"))
    assert len(files) == 1, printed[-5000:]
    return files[0]


def records(outcome, task):
    log = outcome.with_name(outcome.name.replace("_results.json", f"_samples_{task}.jsonl"))
    return [json.loads(line)["mean_iou"] for line in log.read_text().splitlines()]


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_cell_is_answered_in_the_frame_of_its_picture(outcome, dataset, shift):
    table = json.loads(outcome.read_text())["results"][f"{dataset}_{shift}"]
    found = records(outcome, f"{dataset}_{shift}")
    assert table["mean_iou,none"] == pytest.approx(sum(record["score"] for record in found) / len(found))
    assert 0 < table["shifted_rate,none"] <= 1
    assert 0 <= table["acc@0.5_unmoved,none"] <= 1
    moved = [record["target"] != pytest.approx(record["annotated"], abs=1e-6) for record in found]
    assert any(moved) == (shift != "upscale_2")


def test_mirrored_targets_are_mirrored(outcome):
    for record in records(outcome, "shapes_shift_horizontal_flip_3"):
        left, top, right, bottom = record["annotated"]
        assert record["target"] == pytest.approx([1 - right, top, 1 - left, bottom])


def test_everything_is_measured_again_from_the_log(outcome, commands, tmp_path):
    done = commands.run("lmms-plugin", "metrics", outcome, "--json", "--resamples", "20", cwd=tmp_path)
    done.check_returncode()
    (run,) = json.loads(done.stdout)
    table = json.loads(outcome.read_text())["results"]
    numbers = {row["task"]: row["value"] for row in run["metrics"] if row["metric"] == "acc@0.5"}
    for shift in SHIFTS:
        task = f"shapes_shift_{shift}"
        assert numbers[task] == pytest.approx(table[task]["acc@0.5,none"])


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_the_log_is_scored_anew(outcome, dataset, shift):
    task = f"{dataset}_{shift}"
    found = rescore(logs.read_one(outcome), task)
    assert found.metrics["acc@0.5_unmoved"] == rescored_by_hand(records(outcome, task))


def rescored_by_hand(found):
    right = [record["box"] and iou(Box(*record["box"]), Box(*record["annotated"])) >= 0.5 for record in found]
    return pytest.approx(sum(map(bool, right)) / len(right))
