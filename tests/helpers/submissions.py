"""Small runs and submissions, written as lmms-eval and this package write them, and ways of tampering with them."""

import json

import datasets
import numpy as np

from lmms_plugin.analysis.logs import read_one
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.demo import DATA
from lmms_plugin.demo.scene_mismatches import absent_object
from lmms_plugin.export.definitions import definition
from lmms_plugin.export.every_eval_ever import EvaluationSource
from lmms_plugin.export.measured import measured
from lmms_plugin.leaderboard import submission, verification
from lmms_plugin.metrics.selective import HELD_OUT, REPORTED
from lmms_plugin.protocol.response import MARKER, Response, Token
from lmms_plugin.tasks.grounding import rejection
from lmms_plugin.tasks.grounding.aggregations import GroundingOutcome
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.vqa.aggregations import VqaOutcome

TASK, REJECTION_TASK, VQA_TASK = "shapes_rec", "shapes_rejection_absent_object", "reliable_vqav2"
ENTRIES = {TASK: GroundingOutcome, REJECTION_TASK: rejection.RejectionOutcome, VQA_TASK: VqaOutcome}
SOURCE = EvaluationSource("somebody/model", "a laboratory", "third_party", "lmms-plugin", 1_800_000_000)
SETTINGS = MeasurementSettings(resamples=20)


def answered(count):
    """Lines of a log: the demo's first expressions with answers near their boxes, some far off, more or less sure."""
    docs = ExpressionDocs(datasets.load_dataset(str(DATA), split="test"))
    rng = np.random.default_rng(0)
    return [_line(number, docs.content(number), rng) for number in range(count)]


def both_ways(count):
    """Lines of a log of expressions that match something and of others that match nothing, answered likewise."""
    docs = absent_object(datasets.load_dataset(str(DATA), split="test"))
    rng = np.random.default_rng(0)
    return [_line(number, docs.content(number), rng, REJECTION_TASK) for number in range(count)]


def questioned(count, word="two"):
    """Lines of a log of questions about images of both parts, of which some are answered wrongly."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        image, text = number // 2, word if number % 3 else "no"
        doc = {"image_id": str(image), "question_id": str(number), "part": (REPORTED, HELD_OUT)[image % 2]}
        doc |= {"question": "How many are there?", "answers": [word] * 9 + ["no"]}
        tokens = (Token(text, float(np.log(rng.uniform(0.3, 1.0)))),)
        rows.append(scored(number, doc, Response(text, tokens, None, None, None).encode(), VQA_TASK))
    return rows


def _line(number, doc, rng, task=TASK):
    sure = bool(rng.random() < 0.7)
    x, y, width, height = doc["bbox"]
    edges = np.array([x, y, x + width, y + height]) / 112 + rng.normal(0, 0.01 if sure else 0.15, 4)
    text = "[" + ",".join(f"{int(np.clip(100 * edge, 0, 99)):02d}" for edge in edges) + "]"
    tokens = [Token(character, float(np.log(rng.uniform(0.8 if sure else 0.3, 1.0)))) for character in text]
    response = Response(text, tuple(tokens), (doc["width"], doc["height"]), None, "demo")
    return scored(number, doc, response.encode(), task)


def scored(number, doc, answer, task=TASK):
    """A line as lmms-eval writes it."""
    task = definition(task)
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


def write_run(folder, rows, model="quant_rtn", model_args="pretrained=demo,bits=4", task=TASK, **config):
    """A run of these lines, with the table of results that belongs to them."""
    folder.mkdir(parents=True)
    (folder / f"run_samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"alias": task}
    for name, aggregation in definition(task).aggregations.items():
        if any(name in row for row in rows):
            table[f"{name},none"] = aggregation(entries(name, rows, task))
            table[f"{name}_stderr,none"] = "N/A"
    content = {
        "results": {task: table},
        "configs": {task: {"dataset_path": "/somewhere/data", "test_split": "test"}},
        "n-samples": {task: {"original": len(rows), "effective": len(rows)}},
        "config": {"model": model, "model_args": model_args, "limit": None} | config,
        "date": "20260101_120000",
    }
    (folder / "run_results.json").write_text(json.dumps(content))
    return folder


def entries(name, rows, task=TASK):
    found = [row[name] for row in rows if name in row]
    return [ENTRIES[task](*entry) if isinstance(entry, list) else entry for entry in found]


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
