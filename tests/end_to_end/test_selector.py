"""From features to a learned confidence through the installed commands: with a cache, and on other images."""

import json

import pytest

from lmms_plugin.analysis.logs import read_one
from lmms_plugin.selector.network import Selector

pytestmark = pytest.mark.slow
# Two bits hurt: right and wrong answers in every few.
MODEL = "pretrained=demo,bits=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, commands):
    """A selector trained on the demo's scenes for training, and a run on others that uses it and keeps features."""
    folder = tmp_path_factory.mktemp("selector")
    evaluate = ("--model", "quant_rtn", "--batch_size", "16", "--log_samples")
    dev = (*evaluate, "--model_args", f"{MODEL},features={folder / 'dev_features'}", "--tasks", "shapes_rec_dev")
    dev += ("--limit", "120", "--use_cache", str(folder / "cache"))
    commands.output("lmms-eval", *dev, "--output_path", folder / "first", cwd=folder)
    written = sorted((folder / "dev_features").iterdir())
    printed = commands.output("lmms-eval", *dev, "--output_path", folder / "dev", cwd=folder)
    assert "requests served from cache" in printed
    assert sorted((folder / "dev_features").iterdir()) == written
    fit = ("selector", "fit", folder / "dev", "--features", folder / "dev_features", "--hidden", "64", "--lr", "1e-3")
    commands.output("lmms-plugin", *fit, "--output", folder / "selector.safetensors", cwd=folder)
    arguments = f"{MODEL},selector={folder / 'selector.safetensors'},features={folder / 'features'}"
    test = ("--model_args", arguments, "--tasks", "shapes_rec,shapes_shift_fog_3", "--limit", "60")
    commands.output("lmms-eval", *evaluate, *test, "--output_path", folder / "test", cwd=folder)
    return folder


def test_the_file_says_what_it_was_trained_on(folder):
    record = Selector.load(folder / "selector.safetensors").record
    assert record.data["tasks"] == ["shapes_rec_dev"]
    assert record.data["answers"] == 120
    assert record.origin.quantization["method"] == "rtn"
    assert record.origin.quantization["plan"]["language"]["bits"] == 2
    assert 0.1 < record.data["mean_target"] < 0.9


def test_the_table_shows_it_beside_the_tokens_and_the_log_gives_the_same_numbers(folder, commands):
    table = json.loads(read_one(folder / "test").file.read_text())["results"]
    command = ("lmms-plugin", "metrics", folder / "test", "--estimator", "selector", "--json", "--resamples", "20")
    (report,) = json.loads(commands.output(*command, cwd=folder))
    for task in ("shapes_rec", "shapes_shift_fog_3"):
        numbers = {row["metric"]: row["value"] for row in report["metrics"] if row["task"] == task}
        for metric in ("ece", "auroc", "aurc"):
            assert table[task][f"{metric}_selector,none"] == pytest.approx(numbers[metric]), metric
            assert f"{metric}_selector_transferred,none" not in table[task]
        assert numbers["confidence_rate"] == 1.0


def test_applying_it_to_kept_features_gives_what_it_said_while_answering(folder, commands):
    command = ["lmms-plugin", "selector", "apply", folder / "test", "--features", folder / "features"]
    command += ["--selector", folder / "selector.safetensors", "--output", folder / "applied"]
    commands.output(*command, cwd=folder)
    online, offline = read_one(folder / "test"), read_one(folder / "applied")
    for task, records in online.tasks.items():
        assert records.confidence_by("selector") == pytest.approx(
            offline.tasks[task].confidence_by("selector"), abs=1e-5
        )
        assert len(set(records.confidence_by("selector"))) > 10
