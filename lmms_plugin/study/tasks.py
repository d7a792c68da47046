"""What a task is: its configuration and its data, as far as answers and scores depend on them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from lmms_plugin.study.contents import HUB_ID, attribute, digest, of_path, of_value, revision
from lmms_plugin.study.located import near
from lmms_plugin.tasks import cells as generated


class Described(NamedTuple):
    """A task or group.

    Attributes:
        fingerprint: Of the configurations of all its tasks and of their data.
        modules: Modules whose functions they name.
        tasks: Names of the single tasks.
    """

    fingerprint: str
    modules: frozenset[str]
    tasks: tuple[str, ...]


class _Function(str):
    """The long name of a function in a task's YAML."""


class _Loader(yaml.SafeLoader):
    """Reads a task's YAML without importing the functions it names."""


_Loader.add_constructor("!function", lambda _, node: _Function(node.value))


@cache
def describe(name: str) -> Described:
    """Describe a task or a group.

    Tasks of this package are read from their YAML; only for others lmms-eval is asked, which takes half a minute.

    Raises:
        ValueError: If lmms-eval knows no such task; names the nearest.
    """
    ours = _ours()
    found = dict(_single(name, ours)) if name in ours else _of_lmms_eval(name)
    modules = {module for config in found.values() for module in _modules(config)}
    described = {task: _resolved(config) for task, config in found.items()}
    single = tuple(task for task, config in found.items() if not isinstance(config.get("task"), list))
    return Described(digest(described), frozenset(modules), single)


class _Source(NamedTuple):
    file: Path
    overrides: Mapping[str, Any]


@cache
def _ours() -> dict[str, _Source]:
    found = {}
    for file in sorted(generated.FOLDER.rglob("*.yaml")):
        config = _merged(file)
        name = config.get("group", config.get("task"))
        if isinstance(name, str):
            found[name] = _Source(file, {})
    for name, entry in generated.entries().items():
        found.setdefault(name, _Source(entry.yaml, entry.overrides))
    return found


@cache
def _merged(file: Path) -> Mapping[str, Any]:
    """A YAML with what it includes, as lmms-eval merges them."""
    config = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    include = config.pop("include", [])
    merged: dict[str, Any] = {}
    for other in reversed([include] if isinstance(include, str) else include):
        merged |= _merged(file.parent / other)
    return MappingProxyType(merged | config)


def _single(name: str, ours: Mapping[str, _Source]) -> Iterator[tuple[str, dict[str, Any]]]:
    source = ours[name]
    config = {**_merged(source.file), **source.overrides}
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
    for member in manager._get_tasklist(name) if members == -1 or isinstance(members, list) else []:
        known = member if isinstance(member, str) else member.get("task")
        if isinstance(known, str) and known in manager.task_index:
            yield from _foreign(manager, known)


@cache
def _manager() -> Any:
    import lmms_eval.models  # noqa: F401  Its import makes the tasks of plugins known.
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR")


def _modules(value: Any) -> Iterator[str]:
    if isinstance(value, _Function):
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
    resolved = {}
    for name, value in config.items():
        if name in ("dataset_path", "dataset_kwargs"):
            value = attribute(value) if isinstance(value, _Function) else value
            value = value() if callable(value) else value
        resolved[name] = of_value(value)
    path = resolved.get("dataset_path")
    if isinstance(path, str) and HUB_ID.fullmatch(path):
        resolved["dataset_revision"] = revision(path, "dataset")
    return resolved


def local_copies(environment: Mapping[str, str]) -> dict[str, str]:
    """Fingerprints of the local copies of datasets that environment variables of this package name."""
    named = {name: Path(value).expanduser() for name, value in environment.items() if name.startswith("LMMS_PLUGIN_")}
    return {
        name: of_path(path) for name, path in sorted(named.items()) if name != "LMMS_PLUGIN_CACHE" and path.exists()
    }


def known(names: Iterable[str]) -> dict[str, Described]:
    """Describe several tasks or groups by name.

    Raises:
        ValueError: As `describe`.
    """
    return {name: describe(name) for name in names}
