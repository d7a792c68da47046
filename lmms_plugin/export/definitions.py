"""The tasks of this package as they are defined here, whatever a results file says about them."""

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
    """How a task is scored.

    Attributes:
        task: Its name.
        score: Document and answers → what each metric needs of the document.
        target: Document → the true answer as the log has it.
        aggregations: Metric → from what it needs of all documents to its value.
        higher_is_better: Metric → whether more of it is better.
        max_new_tokens: Longest answer; None where the task does not say.
        place: What it asks about.
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
    """A task by its name.

    Raises:
        ValueError: If it is none of this package's.
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
    """Whether a task is one of this package's."""
    return task in task_files.sources() and task_files.sources()[task].kind == "task"


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    function: Callable[..., Any] = getattr(import_module(module), attribute)
    return function
