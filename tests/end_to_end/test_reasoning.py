"""A checkpoint whose chat template opens reasoning, through the installed commands."""

import json
import shutil

import pytest

from lmms_plugin.demo import CHECKPOINT

pytestmark = pytest.mark.slow
OPENS = "{% if add_generation_prompt and enable_thinking != False %}<think>\n{% endif %}"


@pytest.fixture(scope="module")
def results(tmp_path_factory, commands):
    """Folder of two runs of the demo: left inside its reasoning, and told not to reason."""
    folder = tmp_path_factory.mktemp("reasoning")
    thinker = shutil.copytree(CHECKPOINT, folder / "thinker")
    template = thinker / "chat_template.jinja"
    template.write_text(template.read_text().rstrip("\n") + OPENS)
    printed = {}
    for name, more in (("thinking", ""), ("told", ",enable_thinking=False")):
        command = ["lmms-eval", "--model", "quant_none", "--model_args", f"pretrained={thinker}{more}"]
        command += ["--tasks", "shapes_rec", "--limit", "24", "--batch_size", "8"]
        printed[name] = commands.output(*command, "--log_samples", "--output_path", folder / name, cwd=folder)
    return folder, printed


def of(folder):
    (file,), (log,) = folder.rglob("*_results.json"), folder.rglob("*_samples_shapes_rec.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return json.loads(file.read_text())["results"]["shapes_rec"], records


def test_boxes_in_reasoning_that_does_not_end_are_no_answers(results):
    folder, printed = results
    table, lines = of(folder / "thinking")
    assert (table["parse_rate,none"], table["acc@0.5,none"], table["unfinished_rate,none"]) == (0.0, 0.0, 1.0)
    assert table["confidence_rate,none"] == 0.0
    for line in lines:
        assert line["mean_iou"]["answer"] == ""
        assert line["mean_iou"]["reasoning"]
        assert line["filtered_resps"].startswith(line["mean_iou"]["reasoning"])
    assert "max_new_tokens=2048" in printed["thinking"]


def test_the_same_checkpoint_told_not_to_reason_answers(results):
    folder, printed = results
    table, lines = of(folder / "told")
    assert table["unfinished_rate,none"] == 0.0
    assert table["parse_rate,none"] > 0.9
    assert all("reasoning" not in line["mean_iou"] for line in lines)
    assert "max_new_tokens=2048" not in printed["told"]


def test_metrics_are_made_of_logs_without_answers(results, commands):
    folder, _ = results
    done = commands.run("lmms-plugin", "metrics", folder / "thinking", "--resamples", "20", "--all", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "parse_rate" in done.stdout
