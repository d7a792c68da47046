"""What the installed `lmms-eval` wrote, recomputed and compared by the installed `lmms-plugin`."""

import json

import pytest

from lmms_plugin.tasks.grounding.aggregations import CALIBRATION

pytestmark = pytest.mark.slow
TASKS = ("shapes_rec", "shapes_shift_fog_3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, commands):
    """Folders of the dense model and of two-bit weights, which hurt."""
    folder = tmp_path_factory.mktemp("runs")
    for model, arguments in (("quant_none", "pretrained=demo"), ("quant_rtn", "pretrained=demo,bits=2")):
        command = ["lmms-eval", "--model", model, "--model_args", arguments, "--tasks", ",".join(TASKS)]
        command += ["--limit", "40", "--batch_size", "20", "--log_samples", "--output_path", folder / model]
        commands.output(*command, cwd=folder)
    return folder


@pytest.fixture
def ours(commands, tmp_path):
    def ours(*arguments):
        done = commands.run("lmms-plugin", *arguments, cwd=tmp_path)
        done.check_returncode()
        return json.loads(done.stdout)

    return ours


def test_metrics_agree_with_the_table_lmms_eval_printed(runs, ours):
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


def test_two_bits_are_worse_than_sixteen(runs, ours):
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
