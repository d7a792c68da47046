"""A small study folder: the demo's documents, answered by dice, recorded by the task's own code."""

import json
import math

import numpy as np

from lmms_plugin import demo
from lmms_plugin.protocol.response import Response, Token
from lmms_plugin.tasks.grounding import comprehension

TASKS = {
    "shapes_rec": None,
    "shapes_shift_fog_3": ("fog", 3),
    "shapes_shift_gaussian_noise_3": ("gaussian_noise", 3),
    "shapes_shift_gaussian_noise_5": ("gaussian_noise", 5),
}
DATE = "20260102_030405"


def documents(count):
    import datasets

    docs = comprehension.process_docs(datasets.load_dataset(demo.DATA, split="test"))
    return [dict(docs[k]) for k in range(count)]


def axes(method="none", bits=16, seed=None, **more):
    dense = method == "none"
    given = {"model": "demo", "method": method, "bits": bits, "group_size": None if dense else 64}
    return given | {"components": None if dense else "language", "calibration": None, "seed": seed} | more


def answer(doc, rng, skill):
    """A box near the true one or somewhere else, or none at all, with log-probabilities of its own."""
    luck = rng.random()
    right = luck < skill
    x, y, width, height = doc["bbox"]
    true = np.array([x / doc["width"], y / doc["height"], (x + width) / doc["width"], (y + height) / doc["height"]])
    box = true if right else rng.permutation(true)
    numbers = ",".join(f"{min(99, max(0, round(100 * value))):02}" for value in box)
    text = f"[{numbers}]" if luck < 0.97 else "nothing"
    sure = math.log(np.clip(rng.normal(0.85 if right else 0.6, 0.12), 0.05, 0.999))
    size = (doc["width"], doc["height"])
    tokens = tuple(Token(letter, sure) for letter in text)
    return Response(text, (*tokens, Token("", 0.0)), size, size, "demo").encode()


def rows(docs, skill, seed):
    rng = np.random.default_rng(seed)
    found = []
    for number, doc in enumerate(docs):
        given = answer(doc, rng, skill)
        output = comprehension.process_results(doc, [given], estimator="coordinate_mean")
        head = {"doc_id": number, "target": comprehension.doc_to_target(doc), "filtered_resps": given}
        found.append(head | output | {"input": comprehension.doc_to_text(doc)})
    return found


def write_run(folder, docs, skill, seed=0, model="quant_none", model_args="pretrained=demo", limit=None, tasks=TASKS):
    """One run's files as lmms-eval writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"results": {}, "configs": {}, "n-samples": {}}
    for place, (task, shift) in enumerate(tasks.items()):
        found = rows(docs, skill - (0.06 * shift[1] if shift else 0.0), [seed, place])
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (folder / f"{DATE}_samples_{task}.jsonl").write_text(lines, encoding="utf-8")
        scores = [row["mean_iou"]["score"] for row in found]
        content["results"][task] = {"alias": task, "mean_iou,none": float(np.mean(scores))}
        metadata = {"version": 1.0} | ({"shift": shift[0], "severity": shift[1]} if shift else {})
        names = [{"metric": "mean_iou"}, {"metric": "ece"}]
        content["configs"][task] = {
            "dataset_path": demo.DATA,
            "test_split": "test",
            "metadata": metadata,
            "metric_list": names,
        }
        content["n-samples"][task] = {"original": len(found), "effective": len(found)}
    content |= {"config": {"model": model, "model_args": model_args, "limit": limit}, "date": DATE}
    content["throughput"] = {"total_gen_tokens": 1000, "total_elapsed_time": 4.0 if model == "quant_none" else 2.0}
    file = folder / f"{DATE}_results.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def write_cell(study, name, docs, given, skill, seed=0, **more):
    folder = study / "cells" / name
    file = write_run(folder / "demo", docs, skill, seed, f"quant_{given['method']}", **more)
    command = ["lmms-eval", "--model", f"quant_{given['method']}", "--model_args", "pretrained=demo"]
    cell = {"id": name, "key": name, "model_args": {"pretrained": "demo"}, "axes": given, "command": command}
    (folder / "cell.json").write_text(json.dumps(cell | {"versions": {"torch": "2.15.0"}}), encoding="utf-8")
    bits = given["bits"]
    modules = [
        {
            "name": f"layers.{k}",
            "component": "language",
            "bits": bits,
            "relative_error": 0.1 / bits,
            "output_error": None,
        }
        for k in range(4 if bits < 16 else 0)
    ]
    account = {"bits_per_weight": bits + 0.5, "bytes_after": 1e5 * bits, "seconds": 1.0, "modules": modules}
    (folder / "quant_report.json").write_text(json.dumps(account), encoding="utf-8")
    return file


def write_study(study, count=90):
    """An unquantized model and three quantized ones, one of them with two seeds, and a cell that failed."""
    docs = documents(count)
    write_cell(study, "none", docs, axes(), 0.9)
    write_cell(study, "rtn-3", docs, axes("rtn", 3), 0.8, seed=1)
    write_cell(study, "rtn-2", docs, axes("rtn", 2), 0.4, seed=2)
    for seed in (0, 1):
        write_cell(study, f"awq-3-{seed}", docs, axes("awq", 3, seed, calibration="noise"), 0.86, seed=3 + seed)
    failed = study / "failed" / "awq-2"
    failed.mkdir(parents=True)
    told = {"returncode": 1, "tail": "Traceback\nValueError: out of luck\n", "seconds": 2.0}
    (failed / "failed.json").write_text(json.dumps(told), encoding="utf-8")
    return study
