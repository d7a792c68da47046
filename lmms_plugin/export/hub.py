"""Results as the Hugging Face hub reads them, by the types of its own library.

`.eval_results/*.yaml` holds one number for a task of a benchmark's dataset; which dataset and task these are, only the
user can say. `model-index` in a model card holds any number of metrics.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.records import VQA, TaskRecords
from lmms_plugin.export.every_eval_ever import HUB_ID
from lmms_plugin.export.measured import VerifiedRun
from lmms_plugin.utils.files import replace_text

TASK_TYPES = {VQA: "visual-question-answering"}
_OTHER_TASK_TYPE = "image-text-to-text"


class BenchmarkEntry(NamedTuple):
    """What the hub must be told and no results file knows.

    Attributes:
        dataset_id: Of the benchmark on the hub.
        task_id: Of the task in that dataset's `eval.yaml`.
        task: The run's task whose number it is; None for the only one.
        metric: Which of its metrics.
        scale: What the value is multiplied by: 100 where the benchmark counts in percent.
        source_url: Where the evaluation can be looked at; None for nowhere.
    """

    dataset_id: str
    task_id: str
    task: str | None
    metric: str
    scale: float = 1.0
    source_url: str | None = None


def write_eval_results(measured: VerifiedRun, entry: BenchmarkEntry, folder: Path) -> Path:
    """Write one number to `.eval_results/` below a folder.

    Raises:
        ValueError: If the run does not have the metric, or several tasks and none is chosen, or an id is none.
    """
    task = _task(measured, entry.task)
    scores = measured.scores[task]
    if entry.metric not in scores:
        raise ValueError(f"expected a metric of task {task}: {', '.join(scores)}; got {entry.metric!r}")
    if not HUB_ID.fullmatch(entry.dataset_id) or not entry.task_id.strip():
        raise ValueError(
            f"expected a dataset as organization/name and a task, got {entry.dataset_id!r}, {entry.task_id!r}"
        )
    result = EvalResultEntry(
        dataset_id=entry.dataset_id,
        task_id=entry.task_id,
        value=scores[entry.metric].value * entry.scale,
        source_url=entry.source_url,
        notes=f"{measured.run.label}; {entry.metric} of {task} in lmms-eval",
    )
    content = yaml.safe_dump(eval_result_entries_to_yaml([result]), sort_keys=False, allow_unicode=True)
    name = re.sub(r"[^\w.-]+", "_", f"{entry.dataset_id}_{entry.task_id}")
    return _write(folder / EVAL_RESULTS_FOLDER / f"{name}.yaml", content)


def write_model_index(measured: VerifiedRun, model_name: str, dataset_id: str | None, folder: Path) -> Path:
    """Write a model card's header with every metric of every task.

    Args:
        measured: The run.
        model_name: As the card calls it.
        dataset_id: On the hub, for tasks that do not name one themselves; None where all do.
        folder: Where `README.md` is written.

    Raises:
        ValueError: If a task names no dataset on the hub and the user named none.
    """
    results = []
    for task, scores in measured.scores.items():
        records = measured.run.tasks[task]
        dataset = _dataset(records, dataset_id)
        for metric, score in scores.items():
            results.append(
                EvalResult(
                    task_type=TASK_TYPES.get(records.kind, _OTHER_TASK_TYPE),
                    task_name=task,
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_config=task,
                    dataset_split=records.place.split,
                    metric_type=metric,
                    metric_name=metric,
                    metric_value=score.value,
                    metric_args={"records": score.records, "images": score.images} | _interval(score.low, score.high),
                )
            )
    card = ModelCardData(model_name=model_name, eval_results=results)
    note = f"Evaluated with lmms-eval and lmms-plugin as `{measured.run.label}`."
    return _write(folder / "README.md", f"---\n{card.to_yaml()}\n---\n\n{note}\n")


def expect_datasets(run: LoggedRun, dataset_id: str | None) -> None:
    """Check that every task has a dataset on the hub, its own or the one the user named.

    Raises:
        ValueError: If one has none.
    """
    for records in run.tasks.values():
        _dataset(records, dataset_id)


def _dataset(records: TaskRecords, dataset_id: str | None) -> str:
    if HUB_ID.fullmatch(records.place.dataset):
        return records.place.dataset
    if dataset_id is None or not HUB_ID.fullmatch(dataset_id):
        raise ValueError(
            f"task {records.task} names no dataset on the hub: name it with --dataset-id, got {dataset_id!r}"
        )
    return dataset_id


def _interval(low: float, high: float) -> dict[str, float]:
    return {"low": low, "high": high} if low == low else {}


def _task(measured: VerifiedRun, task: str | None) -> str:
    known = list(measured.scores)
    if task is None and len(known) == 1:
        return known[0]
    if task is None or task not in measured.scores:
        raise ValueError(f"expected one of the run's tasks {', '.join(known)} as --task, got {task!r}")
    return task


def _write(path: Path, content: str) -> Path:
    if path.exists():
        raise ValueError(f"{path} is there already")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, content)
    return path
