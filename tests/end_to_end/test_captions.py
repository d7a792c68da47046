"""The tasks of arXiv 2601.15287 through the installed `lmms-eval` command, on a tiny quantized BLIP-2."""

import json

import pytest
from helpers import caption_copies

pytestmark = pytest.mark.slow
TASKS = "coco2014_cap_val,coco_caption_val2014,vqav2_val,gqa,flickr30k_retrieval_pool20,flickr30k_retrieval"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, checkpoint, commands):
    """Results, logged samples by task, and the account of quantization."""
    folder = tmp_path_factory.mktemp("captions")
    environment = caption_copies.write(folder)
    bits = "bits=4,vision_bits=8,connector_bits=8,group_size=32"
    model_args = f"pretrained={checkpoint('blip2_opt')},{bits},device=cpu,report={folder / 'report.json'}"
    command = ["lmms-eval", "--model", "quant_rtn", "--model_args", model_args, "--tasks", TASKS]
    command += ["--batch_size", "4", "--log_samples", "--output_path", folder / "out"]
    printed = commands.output(*command, cwd=folder, **environment)
    # lmms-eval's captioning task writes a file of such a name for the benchmark's server, too.
    files = [file for file in (folder / "out").rglob("*_results.json") if file.parent.name != "submissions"]
    assert len(files) == 1, printed[-8000:]
    samples = {
        path.name.split("_samples_")[1].removesuffix(".jsonl"): list(map(json.loads, path.read_text().splitlines()))
        for path in (folder / "out").rglob("*_samples_*.jsonl")
    }
    return json.loads(files[0].read_text())["results"], samples, json.loads((folder / "report.json").read_text())


def test_every_task_has_its_scores(outcome):
    results, samples, _ = outcome
    assert set(samples) == set(TASKS.split(","))
    assert results["coco2014_cap_val"]["coco_CIDEr,none"] >= 0.0
    assert results["coco2014_cap_val"]["coco_METEOR,none"] >= 0.0
    # The same model, photographs and request, so the same captions.
    for metric in ("CIDEr", "METEOR", "Bleu_4", "ROUGE_L"):
        ours = results["coco_caption_val2014"][f"{metric},none"]
        assert ours == pytest.approx(results["coco2014_cap_val"][f"coco_{metric},none"])
    assert all(0 < sample["CIDEr"]["confidence"]["joint"] < 1 for sample in samples["coco_caption_val2014"])
    assert 0.0 <= results["vqav2_val"]["exact_match,none"] <= 1.0
    assert 0.0 <= results["gqa"]["exact_match,none"] <= 1.0
    for task in ("flickr30k_retrieval_pool20", "flickr30k_retrieval"):
        values = results[task]
        assert values["candidates,none"] == 5 * caption_copies.IMAGES
        for direction in ("text", "image"):
            r = [values[f"{direction}_r@{k},none"] for k in (1, 5, 10)]
            assert 0.0 <= r[0] <= r[1] <= r[2] <= 1.0
            assert values[f"{direction}_r@1_low,none"] <= r[0] <= values[f"{direction}_r@1_high,none"]
    assert results["flickr30k_retrieval"]["text_r@1,none"] == results["flickr30k_retrieval_pool20"]["text_r@1,none"]


def test_every_component_was_quantized_as_asked(outcome):
    _, _, report = outcome
    bits = {module["component"]: module["bits"] for module in report["modules"] if module["bits"] is not None}
    assert bits == {"vision": 8, "connector": 8, "language": 4}
