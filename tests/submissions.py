"""Small runs and submissions, written as lmms-eval and this package write them, and ways of tampering with them."""

import json

import datasets
import numpy as np

from lmms_plugin.demo import DATA
from lmms_plugin.export import submission, verification
from lmms_plugin.export.definitions import definition
from lmms_plugin.export.every_eval_ever import Source
from lmms_plugin.export.measured import measured
from lmms_plugin.reliability import Settings
from lmms_plugin.response import MARKER, Response, Token
from lmms_plugin.results import read_one
from lmms_plugin.tasks.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding_metrics import Judged

TASK = "shapes_rec"
SOURCE = Source("somebody/model", "a laboratory", "third_party", "lmms-plugin", 1_800_000_000)
SETTINGS = Settings(resamples=20)


def answered(count):
    """Lines of a log: the demo's first expressions with answers near their boxes, some far off, more or less sure."""
    docs = ExpressionDocs(datasets.load_dataset(str(DATA), split="test"))
    rng = np.random.default_rng(0)
    return [_line(number, docs.content(number), rng) for number in range(count)]


def _line(number, doc, rng):
    sure = bool(rng.random() < 0.7)
    x, y, width, height = doc["bbox"]
    edges = np.array([x, y, x + width, y + height]) / 112 + rng.normal(0, 0.01 if sure else 0.15, 4)
    text = "[" + ",".join(f"{int(np.clip(100 * edge, 0, 99)):02d}" for edge in edges) + "]"
    tokens = [Token(character, float(np.log(rng.uniform(0.8 if sure else 0.3, 1.0)))) for character in text]
    response = Response(text, tuple(tokens), (doc["width"], doc["height"]), None, "demo")
    return scored(number, doc, response.encode())


def scored(number, doc, answer):
    """A line as lmms-eval writes it."""
    task = definition(TASK)
    own = {"doc_id": number, "target": task.target(doc), "filtered_resps": answer, "input": f"Where is {number}?"}
    return own | json.loads(json.dumps(task.score(doc, [answer])))


def scored_as(row, answer=None, target=None):
    """A line of the log with another answer or another true box, and all scores as they then are."""
    record = row["mean_iou"]
    box = target or record["target"]
    doc = {"image_id": record["image"], "expression_id": record["id"], "expression": record["expression"]}
    doc |= {"width": 1, "height": 1, "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
    return scored(row["doc_id"], doc, answer or row["filtered_resps"])


def retold(row, **told):
    """A line of the log whose answer says something else of itself, and all scores as they then are."""
    text, marker, trailer = row["filtered_resps"].rpartition(MARKER)
    return scored_as(row, answer=text + marker + json.dumps(json.loads(trailer) | told))


def write_run(folder, rows, model="quant_rtn", model_args="pretrained=demo,bits=4", **config):
    """A run of these lines, with the table of results that belongs to them."""
    folder.mkdir(parents=True)
    (folder / f"run_samples_{TASK}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, table = definition(TASK), {"alias": TASK}
    for name, aggregation in task.aggregations.items():
        if name in rows[0]:
            table[f"{name},none"] = aggregation(entries(name, rows))
            table[f"{name}_stderr,none"] = "N/A"
    content = {
        "results": {TASK: table},
        "configs": {TASK: {"dataset_path": "/somewhere/data", "test_split": "test"}},
        "n-samples": {TASK: {"original": len(rows), "effective": len(rows)}},
        "config": {"model": model, "model_args": model_args, "limit": None} | config,
        "date": "20260101_120000",
    }
    (folder / "run_results.json").write_text(json.dumps(content))
    return folder


def entries(name, rows):
    return [Judged(*row[name]) if isinstance(row[name], list) else row[name] for row in rows]


def submit(run_folder, folder, source=SOURCE, settings=SETTINGS):
    submission.build(measured(read_one(run_folder), settings), source, folder)
    return folder


def verify(path, settings=SETTINGS):
    return verification.verify(path, settings)


def seal(folder):
    """What a careful attacker does last: hash everything again."""
    file = folder / submission.MANIFEST
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"files": submission.digests(folder)}))
