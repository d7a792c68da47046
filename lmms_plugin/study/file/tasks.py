"""Description of a task: its configuration and its data, as far as answers and scores depend on them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
import yaml
from pyarrow import parquet

from lmms_plugin.analysis.records import GROUNDING, REJECTION
from lmms_plugin.study.file.fingerprints import HUB_ID, attribute, of_value, revision
from lmms_plugin.tasks.registry import task_files
from lmms_plugin.tasks.sources.data_source import located
from lmms_plugin.utils import hashing, variables
from lmms_plugin.utils.reading.readable import readable
from lmms_plugin.utils.suggest import near


class Described(NamedTuple):
    """A task or group.

    Attributes:
        fingerprint: Fingerprint of the configurations and data of all its tasks.
        modules: Modules whose functions the configurations name.
        tasks: Names of the single tasks.
        documents: Maximum number of documents of each task; None if unknown.
        metrics: Metrics of each task, as in lmms-eval's table.
    """

    fingerprint: str
    modules: frozenset[str]
    tasks: tuple[str, ...]
    documents: tuple[int | None, ...]
    metrics: Mapping[str, tuple[str, ...]]


_DATA = ("dataset_path", "dataset_kwargs")


@cache
def describe(name: str) -> Described:
    """Describe a task or a group.

    Tasks of this package are read from their YAML; only other tasks need lmms-eval's index, which takes half a minute.

    Raises:
        ValueError: lmms-eval knows no such task; names the nearest.
    """
    ours = task_files.sources()
    found = dict(_single(name, ours)) if name in ours else _of_lmms_eval(name)
    modules = {module for config in found.values() for module in _modules(config)}
    described = {task: _resolved(config) for task, config in found.items()}
    single = [task for task, config in found.items() if not isinstance(config.get("task"), list)]
    documents = tuple(_documents(found[task]) for task in single)
    metrics = {task: _metrics(found[task]) for task in single}
    return Described(hashing.of_value(described), frozenset(modules), tuple(single), documents, metrics)


def _documents(config: Mapping[str, Any]) -> int | None:
    """Count the documents of a local dataset, else return the published number."""
    metrics = _metrics(config)
    # Rejection tasks ask each expression that can be changed twice; how many can be changed is not known here.
    if REJECTION.record in metrics:
        return None
    path, arguments = configured_place(config)
    split = config.get("test_split")
    local = (arguments or {}).get("data_files", {}).get(split) if path == "parquet" else None
    if local is None and isinstance(path, str) and Path(path).is_dir():
        local = sorted(map(str, Path(path).glob(f"{split}*.parquet")))
    if local:
        return sum(count_rows(file, expressions=GROUNDING.record in metrics) for file in local)
    size = published_size(config)
    return None if size is None else size.documents


def _metrics(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(entry["metric"] for entry in config.get("metric_list") or ())


def count_rows(file: str, *, expressions: bool) -> int:
    """Count the rows of a file, or the expressions in RefCOCO+'s schema, where one row holds several."""
    with readable(file):
        stored = parquet.ParquetFile(file)
        if not expressions or "answer" not in stored.schema_arrow.names:
            return int(stored.metadata.num_rows)
        return int(pc.sum(pc.list_value_length(stored.read(["answer"])["answer"])).as_py() or 0)


class PublishedSize(NamedTuple):
    """Size of a split as published.

    Attributes:
        documents: Number of documents.
        images: Number of images that they are about; None if it was not published.
    """

    documents: int
    images: int | None = None


def published_size(config: Mapping[str, Any]) -> PublishedSize | None:
    """Return the published size of the split that a task asks about; None if it is not known."""
    return _published_sizes().get((configured_place(config)[0], config.get("test_split")))


@cache
def _published_sizes() -> Mapping[tuple[Any, Any], PublishedSize]:
    file = files("lmms_plugin.study.file").joinpath("documents.yaml")
    found: dict[Any, dict[Any, dict[str, int]]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {(path, split): PublishedSize(**size) for path, splits in found.items() for split, size in splits.items()}


def _single(name: str, ours: Mapping[str, task_files.TaskSource]) -> Iterator[tuple[str, dict[str, Any]]]:
    config = ours[name].configuration
    members = config.get("task")
    yield name, config
    if isinstance(members, list):
        for member in members:
            if isinstance(member, str) and member in ours:
                yield from _single(member, ours)


def _of_lmms_eval(name: str) -> dict[str, dict[str, Any]]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        manager = _manager()
        if name not in manager.task_index:
            raise ValueError(f"unknown task {name!r}{near(name, manager.all_tasks)}")
        return dict(_foreign(manager, name))


def _foreign(manager: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    members = manager.task_index[name].get("task")
    config = {} if manager._name_is_tag(name) else dict(manager._get_config(name))
    yield name, config
    # Of a group with a file of its own, the index says -1 and its file lists the members.
    listed = config.get("task") if members == -1 else members
    for member in listed if isinstance(listed, list) else []:
        known = member if isinstance(member, str) else member.get("task")
        if isinstance(known, str) and known in manager.task_index:
            yield from _foreign(manager, known)


@cache
def _manager() -> Any:
    import lmms_eval.models  # noqa: F401  Its import makes the tasks of plugins known.
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR")


def _modules(value: Any) -> Iterator[str]:
    if isinstance(value, task_files.Function):
        yield value.rpartition(".")[0]
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _modules(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _modules(one)
    elif hasattr(value, "__module__") and isinstance(value.__module__, str):
        yield value.__module__


def _resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    data = {name: value for name, value in zip(_DATA, configured_place(config), strict=True) if value is not None}
    resolved = {name: of_value(value) for name, value in {**config, **data}.items()}
    path = resolved.get("dataset_path")
    if isinstance(path, str) and HUB_ID.fullmatch(path):
        resolved["dataset_revision"] = revision(path, "dataset")
    return resolved


def configured_place(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return path and arguments of a task's dataset, as `datasets.load_dataset` takes them."""
    path, arguments = (looked_up(config.get(name)) for name in _DATA)
    return located(path, arguments)


def looked_up(value: Any) -> Any:
    """Return the object that a value of a task's YAML stands for."""
    return attribute(value) if isinstance(value, task_files.Function) else value


def local_copies(environment: Mapping[str, str]) -> dict[str, str]:
    """Fingerprint the local copies of datasets that environment variables of this package name."""
    named = sorted(environment.keys() - variables.OF_NO_DATASET)
    folders = {name: variables.folder(name, environment) for name in named if name.startswith(variables.PREFIX)}
    return {name: hashing.of_path(path) for name, path in folders.items() if path is not None and path.exists()}


def known(names: Iterable[str]) -> dict[str, Described]:
    """Describe several tasks or groups by name.

    Raises:
        ValueError: As `describe`.
    """
    return {name: describe(name) for name in names}
