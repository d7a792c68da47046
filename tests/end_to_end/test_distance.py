"""A quantized model beside its reference, through the real commands: results file, log of samples, and their reader."""

import json
import sys
from pathlib import Path

import pytest
from helpers.environments import run

from lmms_plugin.confidence.departure import MEASURES

COMMAND = str(Path(sys.executable).parent / "lmms-plugin")
MODELS = ("quant_none:pretrained=demo,device=cpu", "quant_rtn:pretrained=demo,device=cpu,bits=3")


@pytest.mark.model
@pytest.mark.slow
def test_a_run_with_a_reference_logs_its_distance(tmp_path):
    asked = ("--tasks", "shapes_rec", "--limit", "12", "--batch-size", "12", "--output", "run")
    printed = run([COMMAND, "distance", *MODELS, *asked, "--resamples", "50", "--json"], tmp_path)
    # What is run stands before it.
    (task,) = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])["tasks"]
    told = {one["measure"]: one["value"] for one in task["measures"]}
    assert told.keys() == MEASURES.keys()
    assert 0 < told["kl"] < told["kl_coordinates"] < 5
    assert 0.5 < told["token_agreement"] < 1
    (file,) = (tmp_path / "run").rglob("*_results.json")
    results = json.loads(file.read_text())
    table = results["results"]["shapes_rec"]
    for name, value in told.items():
        assert table[f"{name},none"] == pytest.approx(value)
        assert isinstance(table[f"{name}_stderr_clustered,none"], float)
    assert "reference=none" in str(results["config"]["model_args"])
    (log,) = (tmp_path / "run").rglob("*_samples_shapes_rec.jsonl")
    records = [json.loads(line)["mean_iou"]["reference"] for line in log.read_text().splitlines()]
    assert len(records) == 12
    flips = [row["score"] >= 0.5 for row in records]
    right = [json.loads(line)["acc@0.5"]["score"] for line in log.read_text().splitlines()]
    assert task["lost"] + task["won"] == sum(one != two for one, two in zip(flips, right, strict=True))
