"""Pictures with true and predicted boxes, per quantizer; expressions that quantization costs most come first.

Logs hold no images. They come from the task's dataset, through the task's own code and its shift, so that a picture
shows what the models saw. Where that dataset is not available locally, the report says so instead.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmms_plugin import demo
from lmms_plugin.analysis import logs
from lmms_plugin.analysis.groups import Task
from lmms_plugin.analysis.records import CLEAN, GROUNDING
from lmms_plugin.report.figures.drawing import label
from lmms_plugin.report.numbers.results_folder import ReportedRun
from lmms_plugin.report.numbers.summary import Line, Scope, Summary, series
from lmms_plugin.tasks.grounding import refcocoplus
from lmms_plugin.tasks.registry import cells

if TYPE_CHECKING:
    from PIL import Image

MODELS = 12
"""Maximum number of quantizers per expression."""
_SIDE = 320
_CANDIDATES = 4
"""Ratio of examined to shown expressions, one per image."""


class Tile(NamedTuple):
    """One model's answer.

    Attributes:
        model: Method and bits.
        box: Predicted box as x, y, width, height in percent of the image; None for an answer without a box.
        iou: IoU with the true box.
        right: Whether the answer counts as right.
    """

    model: str
    box: tuple[float, float, float, float] | None
    iou: float
    right: bool


class Case(NamedTuple):
    """One expression.

    Attributes:
        expression: Expression as the model was asked.
        task: Task in words.
        image: Image as a data URI.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        target: True box, in the frame of `Tile`.
        tiles: Answers, that of the unquantized model first.
        lost: Number of quantized models with a wrong answer.
    """

    expression: str
    task: str
    image: str
    width: int
    height: int
    target: tuple[float, float, float, float]
    tiles: tuple[Tile, ...]
    lost: int


class Gallery(NamedTuple):
    """All pictures, and why some tasks have none."""

    cases: tuple[Case, ...]
    missing: tuple[str, ...]


class _Chosen(NamedTuple):
    """Selection of one task: its runs by label, and ids of expressions, worst first."""

    scope: Scope
    condition: str
    task: str
    runs: dict[str, ReportedRun]
    ids: list[str]


def build(summary: Summary, count: int) -> Gallery:
    """Find the expressions that quantization costs most, with their pictures.

    Args:
        summary: Runs.
        count: Number of expressions.
    """
    chosen = [one for scope in summary.scopes for one in _chosen(scope, summary, count)] if count else []
    if not chosen:
        why = (
            "any answer: none were asked for"
            if not count
            else "any answer: no quantized run with boxes stands beside an unquantized one of the same model"
        )
        return Gallery((), (why,))
    cases: list[Case] = []
    missing: list[str] = []
    # The share of tasks without a local dataset goes to the others.
    at_hand = [one for one in chosen if _source(one.task) is not None]
    missing += [f"{one.scope.title}: {_why(one)}" for one in chosen if one not in at_hand]
    for place, one in enumerate(at_hand):
        share = count * (place + 1) // len(at_hand) - count * place // len(at_hand)
        found = _cases(one, share)
        cases += found
        if share and not found:
            missing.append(f"{one.scope.title}, {one.condition}: its images are not in the dataset at hand")
    return Gallery(tuple(cases), tuple(dict.fromkeys(missing)))


def _chosen(scope: Scope, summary: Summary, count: int) -> list[_Chosen]:
    """Select the clean task and the shifted one that quantization costs most."""
    if scope.family.record != GROUNDING.record:
        return []
    found = []
    for condition in scope.conditions:
        lines = scope.under(condition)
        base = _most_compared(lines)
        if base is None:
            continue
        dense = base.runs[-1]
        beside = series(line for line in lines if line.base is base)
        quantized = {label(key): members[0].runs[-1] for key, members in list(beside.items())[:MODELS]}
        runs = {base.config.label: dense, **quantized}
        losses = {task: _losses(task, dense, list(quantized.values())) for task in base.group.tasks}
        task = max(losses, key=lambda name: float(losses[name].clip(0).mean()))
        order = np.argsort(-losses[task], kind="stable")[: count * _CANDIDATES]
        ids = summary.folder.documents[dense.measured.tasks[task].documents][order].tolist()
        found.append(_Chosen(scope, condition, task, runs, ids))
    return found


def _most_compared(lines: Sequence[Line]) -> Line | None:
    """Return the unquantized line that most lines are compared with, the first of equals; None if there is none."""
    bases = [line.base for line in lines if line.base is not None]
    return max(bases, key=lambda base: sum(other is base for other in bases), default=None)


def _losses(task: str, dense: ReportedRun, runs: Sequence[ReportedRun]) -> np.ndarray:
    """Return the loss of IoU of each expression, over all quantized models; below 0 where unquantized is wrong."""
    base: Task = dense.measured.tasks[task]
    lost = np.sum([base.score - run.measured.tasks[task].score for run in runs], axis=0)
    return np.where(base.outcome > 0, lost, -1.0)


def _cases(chosen: _Chosen, count: int) -> list[Case]:
    records = {name: _records(logs.log_of(run.file, chosen.task), set(chosen.ids)) for name, run in chosen.runs.items()}
    records = {name: found for name, found in records.items() if found}
    base = next(iter(records.values()), {})
    one_each: dict[str, str] = {}
    for name in chosen.ids:
        if name in base:
            one_each.setdefault(base[name]["image"], name)
    wanted = list(one_each.values())[:count]
    images = _images(chosen.task, set(wanted))
    title = chosen.condition if chosen.condition == CLEAN else chosen.task
    return [
        _case(
            {model: of[name] for model, of in records.items() if name in of},
            images[name],
            f"{chosen.scope.title}, {title}",
        )
        for name in wanted
        if name in images
    ]


def _case(answers: Mapping[str, Mapping[str, Any]], image: Image.Image, title: str) -> Case:
    right = GROUNDING.right or 0.5
    tiles = tuple(
        Tile(model, _percent(one["box"]) if one["box"] else None, one["score"], one["score"] >= right)
        for model, one in answers.items()
    )
    first = next(iter(answers.values()))
    lost = sum(not tile.right for tile in tiles[1:])
    return Case(first["expression"], title, _uri(image), *image.size, _percent(first["target"]), tiles, lost)


def _percent(box: Sequence[float]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (100 * value for value in box)
    return x1, y1, x2 - x1, y2 - y1


def _uri(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _records(log: Path, ids: set[str]) -> dict[str, dict[str, Any]]:
    """Read the records of some documents."""
    start = f'"{GROUNDING.record}": {{'.encode()
    sought = tuple(f'"id": {json.dumps(name)}'.encode() for name in ids) + tuple(
        f'"id": {json.dumps(name, ensure_ascii=False)}'.encode() for name in ids if not name.isascii()
    )
    known = set(sought)
    found = {}
    with log.open("rb") as lines:
        for line in lines:
            begin = line.find(b'"id": "', line.find(start))
            if line[begin : line.find(b'"', begin + 7) + 1] in known:
                record = json.loads(line)[GROUNDING.record]
                found[record["id"]] = record
    return found


def _source(task: str) -> Callable[[], Any] | None:
    """Return the function that loads a task's dataset rows, if the dataset is available locally."""
    if task == "shapes_rec" or task.startswith("shapes_shift_"):
        return _demo_rows
    if task.startswith(("refcocoplus_rec_", "refcocoplus_shift_")) and os.environ.get(refcocoplus.VARIABLE):
        split = next((split for split in refcocoplus.SPLITS if f"_{split}" in task), None)
        return None if split is None else lambda: _refcocoplus_rows(split)
    return None


def _why(chosen: _Chosen) -> str:
    if chosen.task.startswith("refcocoplus"):
        return f"its images are not at hand; set {refcocoplus.VARIABLE} to a local copy of RefCOCO+"
    return f"the images of {chosen.task} are not at hand"


def _demo_rows() -> Any:
    import datasets

    return datasets.load_dataset(demo.DATA, split="test")


def _refcocoplus_rows(split: str) -> Any:
    import datasets

    files = refcocoplus.local_files()
    return datasets.load_dataset("parquet", data_files=files, split=split)


def _images(task: str, wanted: set[str]) -> dict[str, Image.Image]:
    """Return the images of the wanted expressions, by expression id, under the task's shift."""
    rows = _source(task)
    if rows is None or not wanted:
        return {}
    # Imported only if there are images to show: it takes seconds.
    from lmms_plugin.tasks.grounding import comprehension

    entry = cells.entries().get(task)
    kwargs = entry.overrides["lmms_eval_specific_kwargs"]["default"] if entry else None
    docs = comprehension.process_docs(rows())
    names = docs.remove_columns("image")
    places = [k for k, doc in enumerate(names) if doc["expression_id"] in wanted]
    return {names[k]["expression_id"]: comprehension.doc_to_visual(docs[k], kwargs)[0] for k in places}
