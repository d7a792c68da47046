"""The installed `lmms-eval` command with our models and tasks, in processes of its own."""

import json
import shutil
import sys
from pathlib import Path

import lmms_eval
import photographs
import pytest
from environments import run
from families import FAMILIES

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
METRICS = ("acc@0.5", "acc@0.75", "acc@0.9", "mean_iou", "parse_rate", "boxes_per_answer", "ece", "ace", "brier", "auroc")


@pytest.fixture(scope="session")
def local_copy(tmp_path_factory):
    return photographs.write(tmp_path_factory.mktemp("refcocoplus"))


@pytest.fixture
def evaluate(local_copy, tmp_path):
    """Run lmms-eval on the local copy; returns what the results file and the log of samples hold."""

    def evaluate(model, model_args, tasks, *more, launcher=(str(BIN / "lmms-eval"),), name="out"):
        output = tmp_path / name
        arguments = ["--model", model, "--model_args", model_args, "--tasks", tasks, "--output_path", str(output)]
        printed = run([*launcher, *arguments, "--log_samples", *more], tmp_path, LMMS_PLUGIN_REFCOCOPLUS=str(local_copy))
        files = list(output.rglob("*_results.json"))
        assert len(files) == 1, printed[-5000:]
        samples = {}
        for path in output.rglob("*_samples_*.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            samples[path.name.split("_samples_")[1].removesuffix(".jsonl")] = sorted(lines, key=lambda s: s["doc_id"])
        return {"results": json.loads(files[0].read_text()), "samples": samples, "printed": printed}

    return evaluate


def metrics(outcome):
    """The numbers of the results table, without what the harness says about time or functions' addresses."""
    return {task: {k: v for k, v in values.items() if k != "alias"} for task, values in outcome["results"]["results"].items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_the_main_task_on_photographs(evaluate, checkpoint, family):
    outcome = evaluate("quant_rtn", f"pretrained={checkpoint(family)},bits=4,group_size=32", "refcocoplus_rec_testA", "--limit", "4")
    values = outcome["results"]["results"]["refcocoplus_rec_testA"]
    assert {f"{name},none" for name in METRICS[:6]} <= set(values)
    for sample in outcome["samples"]["refcocoplus_rec_testA"]:
        assert 0 < sample["grounding"]["confidence"]["joint"] <= 1


def test_main_command_runs_every_corruption(evaluate, checkpoint):
    args = f"pretrained={checkpoint('idefics3')},bits=4,group_size=32,calibration=noise,calibration_samples=4"
    outcome = evaluate("quant_awq", args, "refcocoplus_shift", "--limit", "2")
    tasks = outcome["results"]["results"]
    shifted = [task for task in tasks if task.endswith("_3")]
    assert len(shifted) == 36
    mean = sum(tasks[task]["mean_iou,none"] for task in shifted if "testA" in task) / 18
    assert tasks["refcocoplus_shift_testA"]["mean_iou,none"] == pytest.approx(mean)


def test_second_run_answers_from_the_cache_with_identical_metrics(evaluate, checkpoint, tmp_path):
    args = (f"pretrained={checkpoint('qwen2_5_vl')},bits=8,group_size=32", "refcocoplus_rec_testA,refcocoplus_shift_testA_fog_3")
    first = evaluate("quant_rtn", *args, "--use_cache", str(tmp_path / "cache"), name="first")
    second = evaluate("quant_rtn", *args, "--use_cache", str(tmp_path / "cache"), name="second")
    assert metrics(first) == metrics(second)
    for task, samples in first["samples"].items():
        assert [s["grounding"] for s in samples] == [s["grounding"] for s in second["samples"][task]]


def test_two_processes_give_the_same_results_as_one(evaluate, checkpoint):
    args = (f"pretrained={checkpoint('qwen2_vl')},bits=4,group_size=32", "refcocoplus_rec_testB,refcocoplus_shift_testB_snow_3")
    launch = (str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "lmms_eval")
    one = evaluate("quant_rtn", *args, "--batch_size", "3", name="one")
    two = evaluate("quant_rtn", *args, "--batch_size", "3", launcher=launch, name="two")
    assert metrics(one).keys() == metrics(two).keys()
    for task, values in metrics(one).items():
        assert values == pytest.approx(metrics(two)[task], nan_ok=True), task
    for task, samples in one["samples"].items():
        assert [s["grounding"]["answer"] for s in samples] == [s["grounding"]["answer"] for s in two["samples"][task]]


def test_built_in_grounding_task_gets_plain_answers(evaluate, checkpoint, local_copy, tmp_path):
    original = Path(lmms_eval.__file__).parent / "tasks" / "refcoco+"
    folder = tmp_path / "tasks"
    shutil.copytree(original, folder / "refcoco")
    for path in (folder / "refcoco").glob("*.yaml"):
        path.unlink()
    (folder / "refcoco" / "local.yaml").write_text(
        "task: builtin_bbox_rec_local\ninclude: _default_template_bbox_rec_yaml\ntest_split: testA\n"
        f"dataset_path: {local_copy}\n"
    )
    outcome = evaluate(
        "quant_rtn", f"pretrained={checkpoint('qwen2_5_vl')},bits=4,group_size=32", "builtin_bbox_rec_local", "--include_path", str(folder), "--limit", "4"
    )
    assert "refcoco_IoU,none" in outcome["results"]["results"]["builtin_bbox_rec_local"]
    for sample in outcome["samples"]["builtin_bbox_rec_local"]:
        assert "<|lmms_plugin|>" not in json.dumps(sample["filtered_resps"])


def test_model_that_is_not_ours_is_scored_without_calibration(evaluate):
    outcome = evaluate("dummy", "response=nothing", "refcocoplus_rec_testA", "--limit", "3")
    values = outcome["results"]["results"]["refcocoplus_rec_testA"]
    assert "mean_iou,none" in values
    assert not any(key.startswith(("ece", "brier")) for key in values)
