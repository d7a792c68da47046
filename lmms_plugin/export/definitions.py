"""The tasks of this package as they are defined here, whatever a results file says about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from lmms_plugin.analysis.records import Place, place_of

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
    place: Place


class _Loader(yaml.SafeLoader):
    """Leaves `!function` as the name it gives: what is not asked for is not imported."""


_Loader.add_constructor("!function", lambda _, node: node.value)


@cache
def definition(task: str) -> Definition:
    """A task by its name.

    Raises:
        ValueError: If it is none of this package's.
    """
    files = _files()
    if task not in files:
        raise ValueError(f"task {task}: expected a task of this package (`lmms-plugin tasks --cells` lists them)")
    config = _merged(files[task]) | _cells().get(task, {})
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
    return task in _files()


@cache
def _cells() -> Mapping[str, dict[str, Any]]:
    """What sets each generated cell apart from its template, its shift and severity among it."""
    from lmms_plugin.tasks.registry import cells

    return {name: entry.overrides for name, entry in cells.entries().items()}


@cache
def _files() -> Mapping[str, Path]:
    """Every task's YAML."""
    from lmms_plugin.tasks.registry import cells

    found = {name: entry.yaml for name, entry in cells.entries().items() if entry.kind == "task"}
    for path in cells.FOLDER.rglob("*.yaml"):
        name = _read(path).get("task")
        if isinstance(name, str):
            found[name] = path
    return found


def _merged(path: Path) -> dict[str, Any]:
    """A task's configuration over those of the files it includes, key by key, as lmms-eval merges them."""
    own = _read(path)
    included = own.pop("include", [])
    merged: dict[str, Any] = {}
    for name in reversed([included] if isinstance(included, str) else included):
        merged |= _merged((path.parent / name).resolve())
    return merged | own


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    return content


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    function: Callable[..., Any] = getattr(import_module(module), attribute)
    return function
