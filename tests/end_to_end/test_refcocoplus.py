"""The installed `lmms-eval` command with our models and tasks, in processes of its own."""

import json
import shutil
import sys
from pathlib import Path

import lmms_eval
import pytest
from helpers.environments import run

from lmms_plugin.selector.features import read

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
LMMS_EVAL = (str(BIN / "lmms-eval"),)
PRELOADED = ()
"""No launcher: lmms-eval in a process that has the libraries of others already."""
# On a CPU `accelerate launch` starts one process whatever it is told.
TWO_PROCESSES = (str(BIN / "torchrun"), "--nproc_per_node", "2", "-m", "lmms_eval")


@pytest.fixture
def evaluate(local_copy, tmp_path, commands):
    """Run lmms-eval; return its results file, its log of samples in order, and what it printed."""

    def evaluate(model, model_args, tasks, *more, launcher=PRELOADED, name="out"):
        output = tmp_path / name
        arguments = ["--model", model, "--model_args", model_args, "--tasks", tasks, "--output_path", str(output)]
        arguments += ["--log_samples", *more]
        given = {"cwd": tmp_path, "LMMS_PLUGIN_REFCOCOPLUS": str(local_copy)}
        printed = (
            run([*launcher, *arguments], **given) if launcher else commands.output("lmms-eval", *arguments, **given)
        )
        files = list(output.rglob("*_results.json"))
        assert len(files) == 1, printed[-5000:]
        return {"results": json.loads(files[0].read_text()), "samples": _samples(output), "printed": printed}

    return evaluate


def _samples(output):
    found = {}
    for path in output.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        task = path.name.split("_samples_")[1].removesuffix(".jsonl")
        found[task] = sorted(lines, key=lambda sample: sample["doc_id"])
    return found


def test_main_command_runs_every_corruption(evaluate, checkpoint):
    args = f"pretrained={checkpoint('idefics3')},bits=4,group_size=32,calibration=noise,calibration_samples=4"
    outcome = evaluate("quant_awq", args, "refcocoplus_shift", "--limit", "2", launcher=LMMS_EVAL)
    tasks = outcome["results"]["results"]
    shifted = [task for task in tasks if task.endswith("_3")]
    assert len(shifted) == 36
    mean = sum(tasks[task]["mean_iou,none"] for task in shifted if "testA" in task) / 18
    assert tasks["refcocoplus_shift_testA"]["mean_iou,none"] == pytest.approx(mean)


def test_second_run_answers_from_the_cache_with_identical_metrics(evaluate, tmp_path):
    args = ("pretrained=demo,bits=4", "shapes_rec,shapes_shift_fog_3", "--limit", "24", "--batch_size", "8")
    cached = ("--use_cache", str(tmp_path / "cache"))
    first = evaluate("quant_rtn", *args, *cached, name="first")
    second = evaluate("quant_rtn", *args, *cached, launcher=LMMS_EVAL, name="second")
    assert first["results"]["results"] == second["results"]["results"]
    assert first["results"]["results"]["shapes_rec"]["ece,none"] > 0
    for task, samples in first["samples"].items():
        assert [s["mean_iou"] for s in samples] == [s["mean_iou"] for s in second["samples"][task]]
    assert "Answering" in first["printed"]
    assert "Answering" not in second["printed"]
    assert first["results"]["throughput"]["avg_bits_per_weight"] < 16
    assert "throughput" not in second["results"]
    assert "so it was not loaded" in second["printed"]


def test_two_processes_give_the_same_results_as_one(evaluate, tmp_path):
    args = ("shapes_rec,shapes_shift_snow_3", "--limit", "25", "--batch_size", "4")
    model, features = "pretrained=demo,bits=4", tmp_path / "features"
    one = evaluate("quant_rtn", model, *args, name="one")
    two = evaluate("quant_rtn", f"{model},features={features}", *args, launcher=TWO_PROCESSES, name="two")
    processes = {file.stem.rpartition("-")[2] for file in features.iterdir()}
    assert len(processes) == 2
    # lmms-eval hands some requests out twice, so that all processes have as many.
    assert {f"{task}/{document}" for task in one["samples"] for document in range(25)} <= set(read(features).index)
    for task, samples in one["samples"].items():
        answers = [sample["mean_iou"]["answer"] for sample in samples]
        assert answers == [sample["mean_iou"]["answer"] for sample in two["samples"][task]]
        for key, value in one["results"]["results"][task].items():
            # Batches hold other images, and their padding changes the order of additions.
            near = pytest.approx(value, rel=1e-3) if type(value) is float else value
            assert two["results"]["results"][task][key] == near


def test_built_in_grounding_task_gets_plain_answers(evaluate, local_copy, tmp_path):
    original = Path(lmms_eval.__file__).parent / "tasks" / "refcoco+"
    folder = tmp_path / "tasks" / "refcoco"
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.yaml"))
    (folder / "local.yaml").write_text(
        "task: builtin_bbox_rec_local\ninclude: _default_template_bbox_rec_yaml\ntest_split: testA\n"
        f"dataset_path: parquet\ndataset_kwargs: {{data_files: {{testA: {local_copy}/testA-00000-of-00001.parquet}}}}\n"
    )
    more = ("--include_path", str(tmp_path / "tasks"), "--limit", "4")
    outcome = evaluate("quant_rtn", "pretrained=demo,bits=4", "builtin_bbox_rec_local", *more)
    assert "refcoco_IoU,none" in outcome["results"]["results"]["builtin_bbox_rec_local"]
    for sample in outcome["samples"]["builtin_bbox_rec_local"]:
        assert sample["filtered_resps"][0]
        assert "<|lmms_plugin|>" not in json.dumps(sample["filtered_resps"])


def test_multiple_choice_by_log_likelihood(evaluate, tmp_path):
    """The demo model was trained to write boxes: it must find a box likelier than words."""
    rows = [{"question": "Locate red circle.", "choices": ["elephant", "[12,34,56,78]"], "answer": 1}] * 2
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(
        "task: local_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: answer\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    more = ("--include_path", str(tmp_path / "tasks"), "--force_simple")
    outcome = evaluate("quant_rtn", "pretrained=demo,bits=8", "local_choice", *more)
    assert outcome["results"]["results"]["local_choice"]["acc,none"] == 1.0


def test_model_that_is_not_ours_is_scored_without_calibration(evaluate):
    outcome = evaluate("dummy", "response=nothing", "refcocoplus_rec_testA", "--limit", "3")
    values = outcome["results"]["results"]["refcocoplus_rec_testA"]
    assert values["parse_rate,none"] == 0.0
    assert "mean_iou,none" in values
    assert not any(key.startswith(("ece", "ace", "brier", "auroc")) for key in values)
