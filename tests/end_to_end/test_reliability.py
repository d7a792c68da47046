"""What the installed `lmms-eval` wrote, recomputed and compared by the installed `lmms-plugin`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.environments import run

from lmms_plugin.tasks.grounding.aggregations import CALIBRATION

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
TASKS = ("shapes_rec", "shapes_shift_fog_3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the dense model and of two-bit weights, which hurt."""
    folder = tmp_path_factory.mktemp("runs")
    for model, arguments in (("quant_none", "pretrained=demo"), ("quant_rtn", "pretrained=demo,bits=2")):
        command = [str(BIN / "lmms-eval"), "--model", model, "--model_args", arguments, "--tasks", ",".join(TASKS)]
        command += ["--limit", "40", "--batch_size", "20", "--log_samples", "--output_path", str(folder / model)]
        run(command, folder)
    return folder


def ours(*arguments):
    done = subprocess.run([str(BIN / "lmms-plugin"), *map(str, arguments)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_metrics_agree_with_the_table_lmms_eval_printed(runs):
    (report,) = ours("metrics", runs / "quant_none", "--json", "--resamples", "50")
    (file,) = runs.glob("quant_none/*/*_results.json")
    table = json.loads(file.read_text())["results"]
    assert report["limit"] == 40
    for task in TASKS:
        numbers = {row["metric"]: row for row in report["metrics"] if row["task"] == task}
        for name in {*CALIBRATION, "acc@0.5", "acc@0.75", "acc@0.9", "mean_iou", "parse_rate", "confidence_rate"}:
            printed = table[task][f"{name},none"]
            recomputed = numbers[name]["value"]
            assert recomputed == (pytest.approx(printed) if printed == printed else None), name
        assert numbers["acc@0.5"]["records"] == 40


def test_two_bits_are_worse_than_sixteen(runs):
    found = ours("compare", runs / "quant_none", runs / "quant_rtn", "--json", "--resamples", "200", "--margin", "0.01")
    rows = {(row["task"], row["metric"]): row for row in found["changes"]}
    iou = rows["shapes_rec", "mean_iou"]
    assert iou["difference"]["value"] == pytest.approx(iou["second"] - iou["first"])
    assert iou["difference"]["high"] < 0
    assert iou["difference"]["equivalent"] is False
    (flips,) = [row for row in found["flips"] if row["task"] == "shapes_rec"]
    change = rows["shapes_rec", "acc@0.5"]["difference"]["value"]
    assert flips["won"] - flips["lost"] == pytest.approx(40 * change)
    assert {row["cells"] for row in found["shifted"]} == {1}
