"""The names `lmms-eval --tasks` accepts from this package, without importing lmms-eval."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmms_plugin.tasks.registry.task_files import TaskSource, sources
from lmms_plugin.utils.messages import counted


class Listed(NamedTuple):
    """One line of the list: the name, `task`, `group` or `cell`, and what it is."""

    name: str
    kind: str
    summary: str


def tasks(cells: bool = False) -> list[Listed]:
    """All tasks and groups sorted by name; with `cells`, also every single cell split × shift × severity."""
    return sorted(_listed(cells))


def _listed(cells: bool) -> Iterator[Listed]:
    for name, source in sources().items():
        config = source.configuration
        if source.kind == "group":
            yield Listed(name, "group", _of_group(source) if source.generated else _members(config["task"]))
        elif not source.generated:
            yield Listed(name, "task", f"{source.file.parent.name}, split {config['test_split']}")
        elif cells:
            yield Listed(name, "cell", f"split {config['test_split']}, {_place(config['metadata'])}")


def _members(tasks: Sequence[str]) -> str:
    return f"{counted(len(tasks), 'task')}: {', '.join(tasks)}"


def _of_group(entry: TaskSource) -> str:
    """What a generated group holds, and whether its line in the table is a mean."""
    members = entry.overrides["task"]
    if entry.file.name.startswith("_mean_over"):
        severities = sorted({member.rpartition("_")[2] for member in members})
        several = "severities" if len(severities) > 1 else "severity"
        cells = counted(len(members), "cell")
        return f"plain mean over {cells} at {several} {', '.join(severities)}, e.g. {members[-1]}"
    return f"{counted(len(members), 'member')} without a mean, e.g. {members[-1]}"


def _place(metadata: Mapping[str, Any]) -> str:
    """What a cell does to image and expression, in words."""
    parts = [metadata["mismatch"]] if "mismatch" in metadata else []
    for shift, severity in (("shift", "severity"), ("text_shift", "text_severity")):
        if shift in metadata:
            parts.append(f"{metadata[shift]} at severity {metadata[severity]}")
    return " and ".join(parts)
