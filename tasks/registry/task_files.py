"""YAML files of this package's tasks, read without importing lmms-eval or the functions that they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from lmms_plugin.tasks.registry import cells


class Function(str):
    """Qualified name of a function in a task's YAML."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """YAML loader that keeps `!function` as a name, so that nothing is imported."""


_Loader.add_constructor("!function", lambda _, node: Function(node.value))


@dataclass(frozen=True)
class TaskSource:
    """Source of the configuration of a task or group.

    Attributes:
        kind: `task` or `group`.
        file: YAML file.
        overrides: Keys with which a generated task overrides the file.
        generated: Whether it is one of `lmms_plugin.tasks.registry.cells.entries`, without YAML of its own.
    """

    kind: str
    file: Path
    overrides: Mapping[str, Any]
    generated: bool

    @property
    def configuration(self) -> dict[str, Any]:
        """Return the whole configuration, as lmms-eval composes it."""
        return {**merged(self.file), **self.overrides}


@cache
def sources() -> Mapping[str, TaskSource]:
    """Return every task and group of this package by name; files first, sorted, then generated ones."""
    found = {}
    for file in sorted(cells.FOLDER.rglob("*.yaml")):
        # An included file may be a task of its own: only the file itself gives the name.
        own = read(file)
        kind = "group" if "group" in own else "task"
        if isinstance(own.get(kind), str):
            found[own[kind]] = TaskSource(kind, file, MappingProxyType({}), generated=False)
    for name, entry in cells.entries().items():
        found.setdefault(name, TaskSource(entry.kind, entry.yaml, MappingProxyType(entry.overrides), generated=True))
    return MappingProxyType(found)


@cache
def merged(file: Path) -> Mapping[str, Any]:
    """Merge a file's configuration over those of the files it includes, key by key, as lmms-eval does."""
    own = read(file)
    included = own.pop("include", [])
    found: dict[str, Any] = {}
    for name in reversed([included] if isinstance(included, str) else included):
        found |= merged((file.parent / name).resolve())
    return MappingProxyType(found | own)


def read(file: Path) -> dict[str, Any]:
    """Read a file without the files it includes."""
    content: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    return content
