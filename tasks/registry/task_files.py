"""The YAML files of this package's tasks, read without importing lmms-eval or the functions that they name."""

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
    """The long name of a function in a task's YAML."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """Leaves `!function` as the name it gives: what is not asked for is not imported."""


_Loader.add_constructor("!function", lambda _, node: Function(node.value))


@dataclass(frozen=True)
class TaskSource:
    """Where the configuration of a task or group comes from.

    Attributes:
        kind: `task` or `group`.
        file: Its YAML.
        overrides: What a generated one sets on top of that.
        generated: Whether it is one of `lmms_plugin.tasks.registry.cells.entries`, and has no YAML of its own.
    """

    kind: str
    file: Path
    overrides: Mapping[str, Any]
    generated: bool

    @property
    def configuration(self) -> dict[str, Any]:
        """The whole configuration, as lmms-eval puts it together."""
        return {**merged(self.file), **self.overrides}


@cache
def sources() -> Mapping[str, TaskSource]:
    """Every task and group of this package by name; files first, sorted, then generated ones."""
    found = {}
    for file in sorted(cells.FOLDER.rglob("*.yaml")):
        # What a file includes may be a task of its own: a name is what the file itself says.
        own = read(file)
        kind = "group" if "group" in own else "task"
        if isinstance(own.get(kind), str):
            found[own[kind]] = TaskSource(kind, file, MappingProxyType({}), generated=False)
    for name, entry in cells.entries().items():
        found.setdefault(name, TaskSource(entry.kind, entry.yaml, MappingProxyType(entry.overrides), generated=True))
    return MappingProxyType(found)


@cache
def merged(file: Path) -> Mapping[str, Any]:
    """A file's configuration over those of the files it includes, key by key, as lmms-eval merges them."""
    own = read(file)
    included = own.pop("include", [])
    found: dict[str, Any] = {}
    for name in reversed([included] if isinstance(included, str) else included):
        found |= merged((file.parent / name).resolve())
    return MappingProxyType(found | own)


def read(file: Path) -> dict[str, Any]:
    """A file as it is, without what it includes."""
    content: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    return content
