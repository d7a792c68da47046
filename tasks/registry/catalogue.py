"""The names `lmms-eval --tasks` accepts from this package, without importing lmms-eval."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from lmms_plugin.tasks.registry import cells as generated
from lmms_plugin.utils.messages import counted


class Listed(NamedTuple):
    """One line of the list: the name, `task`, `group` or `cell`, and what it is."""

    name: str
    kind: str
    summary: str


class FunctionName(str):
    """The long name of a function in a task's YAML."""


class _NameLoader(yaml.SafeLoader):
    """Reads a task's YAML without importing the functions it names."""


_NameLoader.add_constructor("!function", lambda _, node: FunctionName(node.value))


@cache
def merged(file: Path) -> Mapping[str, Any]:
    """A YAML with what it includes, as lmms-eval merges them."""
    config = yaml.load(file.read_text(encoding="utf-8"), Loader=_NameLoader)
    include = config.pop("include", [])
    found: dict[str, Any] = {}
    for other in reversed([include] if isinstance(include, str) else include):
        found |= merged(file.parent / other)
    return MappingProxyType(found | config)


def tasks(cells: bool = False) -> list[Listed]:
    """All tasks and groups sorted by name; with `cells`, also every single cell split × shift × severity."""
    return sorted([*_from_files(), *_generated(cells)])


def _from_files() -> Iterator[Listed]:
    for path in sorted(generated.FOLDER.rglob("*.yaml")):
        config = merged(path)
        if isinstance(config.get("task"), str):
            yield Listed(config["task"], "task", f"{path.parent.name}, split {config['test_split']}")
        elif "group" in config:
            yield Listed(
                config["group"], "group", f"{counted(len(config['task']), 'task')}: {', '.join(config['task'])}"
            )


def _generated(cells: bool) -> Iterator[Listed]:
    for name, entry in generated.entries().items():
        if entry.kind == "group":
            yield Listed(name, "group", _of_group(entry))
        elif cells:
            yield Listed(name, "cell", f"split {entry.overrides['test_split']}, {_place(entry.overrides['metadata'])}")


def _of_group(entry: generated.Entry) -> str:
    """What a generated group holds, and whether its line in the table is a mean."""
    members = entry.overrides["task"]
    if entry.yaml.name.startswith("_mean_over"):
        severities = sorted({member.rpartition("_")[2] for member in members})
        several = "severities" if len(severities) > 1 else "severity"
        return (
            f"plain mean over {counted(len(members), 'cell')} at {several} {', '.join(severities)}, e.g. {members[-1]}"
        )
    return f"{counted(len(members), 'member')} without a mean, e.g. {members[-1]}"


def _place(metadata: Mapping[str, Any]) -> str:
    """What a cell does to image and expression, in words."""
    parts = [metadata["mismatch"]] if "mismatch" in metadata else []
    for shift, severity in (("shift", "severity"), ("text_shift", "text_severity")):
        if shift in metadata:
            parts.append(f"{metadata[shift]} at severity {metadata[severity]}")
    return " and ".join(parts)
