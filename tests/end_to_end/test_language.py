"""Language shifts, joint cells and rejection through the installed `lmms-eval`: the demo, RefCOCO+'s schema."""

import json

import pytest

pytestmark = pytest.mark.slow
KINDS = ("keyboard_typos_3", "fog_and_synonyms_3")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, local_copy, commands):
    """Folder of one run of the demo's checkpoint on both datasets."""
    folder = tmp_path_factory.mktemp("language")
    tasks = [f"{prefix}_{kind}" for prefix in ("shapes_shift", "refcocoplus_shift_testA") for kind in KINDS]
    tasks += ["shapes_rejection_attribute_swap", "refcocoplus_rejection_testA_absent_object"]
    command = ["lmms-eval", "--model", "quant_rtn", "--model_args", "pretrained=demo,bits=4", "--tasks"]
    command += [",".join(tasks), "--limit", "24", "--batch_size", "24", "--log_samples", "--output_path", folder]
    printed = commands.output(*command, cwd=folder, LMMS_PLUGIN_REFCOCOPLUS=str(local_copy))
    files = list(folder.rglob("*_results.json"))
    assert len(files) == 1, printed[-5000:]
    return files[0]


def samples(outcome, task):
    log = outcome.with_name(outcome.name.replace("_results.json", f"_samples_{task}.jsonl"))
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("dataset", ["shapes_shift", "refcocoplus_shift_testA"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shifted_expression_is_logged_beside_the_original(outcome, dataset, kind):
    table = json.loads(outcome.read_text())["results"][f"{dataset}_{kind}"]
    records = [sample["mean_iou"] for sample in samples(outcome, f"{dataset}_{kind}")]
    assert all(record["expression"] != record["original_expression"] for record in records)
    rate = table["shifted_rate,none"]
    assert rate == 1.0 if kind == "keyboard_typos_3" else 0.0 < rate < 1.0
    assert table["mean_iou,none"] == pytest.approx(sum(record["score"] for record in records) / len(records))


@pytest.mark.parametrize("task", ["shapes_rejection_attribute_swap", "refcocoplus_rejection_testA_absent_object"])
def test_rejection_is_recomputed_from_the_log(outcome, task, commands, tmp_path):
    table = json.loads(outcome.read_text())["results"][task]
    records = [sample["box_rate"] for sample in samples(outcome, task)]
    assert [record["matches"] for record in records] == [1.0, 0.0] * (len(records) // 2)
    done = commands.run("lmms-plugin", "metrics", outcome, "--json", "--resamples", "20", cwd=tmp_path)
    done.check_returncode()
    numbers = {row["metric"]: row["value"] for row in json.loads(done.stdout)[0]["metrics"] if row["task"] == task}
    assert set(numbers) <= {name.split(",")[0] for name in table}
    for name in ("rejection_auroc", "rejection_fpr@0.95", "confidence_falls", "box_rate_true", "box_rate_changed"):
        assert numbers[name] == pytest.approx(table[f"{name},none"]), name
