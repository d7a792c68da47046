"""All estimators in one run of the installed `lmms-eval`, and compared by the installed `lmms-plugin`."""

import json
from functools import partial

import pytest

from lmms_plugin.confidence.estimators import ESTIMATORS, NEEDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory, commands):
    """Folder of a run with every kind of evidence, and of one with none that must be asked for."""
    folder = tmp_path_factory.mktemp("runs")
    for name, wishes in (("all", ",samples=2,verbalised=True"), ("plain", "")):
        command = ["lmms-eval", "--model", "quant_none", "--model_args", f"pretrained=demo{wishes}"]
        command += ["--tasks", "shapes_rec", "--limit", "12", "--batch_size", "6"]
        commands.output(*command, "--log_samples", "--output_path", folder / name, cwd=folder)
    return folder


@pytest.fixture
def ours(commands, tmp_path):
    return partial(commands.run, "lmms-plugin", cwd=tmp_path)


def table_of(folder):
    (file,) = folder.rglob("*_results.json")
    return json.loads(file.read_text())["results"]["shapes_rec"]


def test_every_estimator_is_in_the_table_and_the_log(results):
    table = table_of(results / "all")
    for name in NEEDS:
        assert f"aurc_{name},none" in table
    assert table["sample_parse_rate,none"] > 0
    (log,) = (results / "all").rglob("*_samples_shapes_rec.jsonl")
    for line in log.read_text().splitlines():
        record = json.loads(line)["mean_iou"]
        assert set(record["confidence"]) == set(ESTIMATORS)
        assert 0 < record["confidence"]["expected_iou"] <= 1
        assert record["samples"]["asked"] == 2
        assert isinstance(record["statement"], str)


def test_answers_are_the_same_whatever_else_is_gathered(results):
    for metric in ("acc@0.5", "mean_iou", "ece", "aurc_expected_iou"):
        both = (table_of(results / name)[f"{metric},none"] for name in ("all", "plain"))
        # Answers are the same; on their way, other batches add in another order.
        assert next(both) == pytest.approx(next(both), rel=1e-4)
    assert not any("agreement" in name or "verbalised" in name for name in table_of(results / "plain"))


def test_they_are_compared_from_the_log(results, ours):
    done = ours("estimators", results / "all", "--json", "--resamples", "20")
    judged = {one["estimator"]: one for one in json.loads(done.stdout)[0]["estimators"]}
    assert {"joint", "expected_iou", "agreement", "agreement_pairwise"} <= set(judged)
    assert judged["agreement"]["aurc"] == pytest.approx(table_of(results / "all")["aurc_agreement,none"])


def test_metrics_and_compare_take_any_of_them_or_say_how_to_obtain_it(results, ours):
    done = ours("metrics", results / "all", "--estimator", "agreement", "--json", "--resamples", "20")
    numbers = {row["metric"]: row["value"] for row in json.loads(done.stdout)[0]["metrics"]}
    assert numbers["ece"] == pytest.approx(table_of(results / "all")["ece_agreement,none"])
    both = ours("compare", results / "plain", results / "all", "--estimator", "expected_iou", "--resamples", "20")
    assert both.returncode == 0
    missing = ours("metrics", results / "plain", "--estimator", "agreement", "--resamples", "20")
    assert missing.returncode == 2
    assert "run with --model_args samples=8" in missing.stderr
