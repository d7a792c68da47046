"""Definitions of this package's tasks, independent of what a results file says about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from lmms_plugin.analysis.records import EvaluationSet, place_of
from lmms_plugin.tasks.registry import task_files

Aggregation = Callable[[Sequence[Any]], float]


@dataclass(frozen=True)
class Definition:
    """Scoring of a task.

    Attributes:
        task: Name of the task.
        score: Function from document and answers to the input of each metric.
        target: Function from a document to the true answer as logged.
        aggregations: Metric → function from the inputs of all documents to its value.
        higher_is_better: Metric → whether larger is better.
        max_new_tokens: Maximum length of an answer in tokens; None where the task does not set it.
        place: Evaluation set of the task.
    """

    task: str
    score: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]]
    target: Callable[[Mapping[str, Any]], str]
    aggregations: Mapping[str, Aggregation]
    higher_is_better: Mapping[str, bool]
    max_new_tokens: int | None
    place: EvaluationSet


@cache
def definition(task: str) -> Definition:
    """Return the definition of a task by its name.

    Raises:
        ValueError: The task does not belong to this package.
    """
    if not is_ours(task):
        raise ValueError(f"task {task}: expected a task of this package (`lmms-plugin tasks --cells` lists them)")
    config = task_files.sources()[task].configuration
    metrics = config["metric_list"]
    return Definition(
        task=task,
        score=_function(config["process_results"]),
        target=_function(config["doc_to_target"]),
        aggregations={entry["metric"]: _function(entry["aggregation"]) for entry in metrics},
        higher_is_better={entry["metric"]: entry["higher_is_better"] for entry in metrics},
        max_new_tokens=config.get("generation_kwargs", {}).get("max_new_tokens"),
        place=place_of(config),
    )


def is_ours(task: str) -> bool:
    """Return whether a task belongs to this package."""
    return task in task_files.sources() and task_files.sources()[task].kind == "task"


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    function: Callable[..., Any] = getattr(import_module(module), attribute)
    return function
