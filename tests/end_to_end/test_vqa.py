"""Reliable VQA through the installed `lmms-eval` command, in processes of its own."""

import json
import math

import pytest
from helpers import vqa_copies

from lmms_plugin import metrics
from lmms_plugin.confidence.estimators import TEXT_ESTIMATORS
from lmms_plugin.tasks.vqa.aggregations import NEEDS_HELD_OUT, ON_TEST

pytestmark = pytest.mark.slow


@pytest.fixture
def evaluate(tmp_path, commands):
    """Run lmms-eval; return the results of its tasks, their records, and what it printed."""
    environment = vqa_copies.write(tmp_path / "copies")

    def evaluate(model, model_args, tasks, *more):
        output = tmp_path / "out"
        command = ["lmms-eval", "--model", model, "--model_args", model_args, "--tasks", tasks]
        command += ["--output_path", output, "--log_samples", *more]
        printed = commands.output(*command, cwd=tmp_path, **environment)
        files = list(output.rglob("*_results.json"))
        assert len(files) == 1, printed[-5000:]
        records = {
            path.name.split("_samples_")[1].removesuffix(".jsonl"): [
                json.loads(line)["accuracy"] for line in path.read_text().splitlines()
            ]
            for path in output.rglob("*_samples_*.jsonl")
        }
        return json.loads(files[0].read_text())["results"], records, printed

    return evaluate


def test_a_quantized_model_is_measured_and_its_log_gives_the_same_numbers(evaluate, checkpoint):
    args = f"pretrained={checkpoint('smolvlm')},bits=4,group_size=32,device=cpu"
    results, records, printed = evaluate("quant_rtn", args, "reliable_vqav2_advqa_50,reliable_vizwiz")
    for task, values in results.items():
        reported = [record for record in records[task] if record["part"] == "test"]
        held_out = [record for record in records[task] if record["part"] == "val"]
        test, val = (
            ([record["confidence"]["joint"] for record in part], [record["accuracy"] for record in part])
            for part in (reported, held_out)
        )
        assert {f"{name},none" for name in (*ON_TEST, *NEEDS_HELD_OUT)} <= set(values)
        assert values["accuracy,none"] == pytest.approx(sum(test[1]) / len(test[1]))
        assert values["confidence_rate,none"] == 1.0
        assert values["ece,none"] == pytest.approx(metrics.ece(*test))
        phi = metrics.effective_reliability(*test, 10, metrics.threshold_at_cost(*val, 10))
        assert values["phi@10,none"] == pytest.approx(phi)
        assert all({"joint", "mean", "min", "first"} <= set(record["confidence"]) for record in records[task])
        assert all(set(record["confidence"]) <= set(TEXT_ESTIMATORS) for record in records[task])
        assert "phi@10" in printed
    assert {record["id"].split("/")[0] for record in records["reliable_vqav2_advqa_50"]} == {"vqav2", "advqa"}


def test_a_model_that_is_not_ours_is_scored_without_confidence(evaluate):
    results, records, _ = evaluate("dummy", "response=No.", "reliable_advqa", "--limit", "30")
    values = results["reliable_advqa"]
    right = [record["accuracy"] for record in records["reliable_advqa"] if record["part"] == "test"]
    assert values["accuracy,none"] == math.fsum(right) / len(right)
    assert values["accuracy_reliable_vqa,none"] < values["accuracy,none"]
    assert values["confidence_rate,none"] == 0.0
    assert not any(key.startswith(("ece", "phi", "coverage")) for key in values)
