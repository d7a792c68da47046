"""The grid split × shift × severity as lmms-eval tasks, each findable by name, from one template per dataset.

Eighteen corruptions × five severities × three splits would be 270 files that differ in three words. A cell is the
template's YAML with its name, split, shift and severity filled in; `lmms_plugin.registration` adds the entries to
lmms-eval's index.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lmms_plugin.tasks.refcocoplus import SPLITS
from lmms_plugin.tasks.shifts import SEVERITIES, SHIFTS

FOLDER = Path(__file__).parent
DEFAULT_SEVERITY = 3


@dataclass(frozen=True)
class Entry:
    """What lmms-eval's task index needs of one task or group: its kind, its YAML, and the keys set on top of that."""

    kind: str
    yaml: Path
    overrides: dict[str, Any]


def entries() -> dict[str, Entry]:
    """Every generated task and group by name."""
    return dict(_generate())


def _generate() -> Iterator[tuple[str, Entry]]:
    for split, shift, severity in product(SPLITS, SHIFTS, SEVERITIES):
        yield _cell("refcocoplus_shift", f"refcocoplus_shift_{split}", split, shift, severity)
    for shift, severity in product(SHIFTS, SEVERITIES):
        yield _cell("shapes", "shapes_shift", "test", shift, severity)
    for split in SPLITS:
        yield _mean_over_cells(f"refcocoplus_shift_{split}", f"refcocoplus_shift_{split}", (DEFAULT_SEVERITY,))
        yield _mean_over_cells(f"refcocoplus_shift_full_{split}", f"refcocoplus_shift_{split}", SEVERITIES)
    yield _mean_over_cells("shapes_shift", "shapes_shift", (DEFAULT_SEVERITY,))
    yield _mean_over_cells("shapes_shift_full", "shapes_shift", SEVERITIES)
    yield _clean_and_shifted("refcocoplus_shift", ("testA", "testB"))
    yield _clean_and_shifted("refcocoplus_shift_full", SPLITS)


def _cell(folder: str, prefix: str, split: str, shift: str, severity: int) -> tuple[str, Entry]:
    name = f"{prefix}_{shift}_{severity}"
    place = {"shift": shift, "severity": severity}
    overrides = {
        "task": name,
        "test_split": split,
        "lmms_eval_specific_kwargs": {"default": dict(place)},
        "metadata": {"version": 1.0, **place},
    }
    return name, Entry("task", FOLDER / folder / "_cell.yaml", overrides)


def _mean_over_cells(name: str, prefix: str, severities: tuple[int, ...]) -> tuple[str, Entry]:
    """A group whose line in the table is the mean over its cells: mPC of Michaelis et al. (arXiv 1907.07484)."""
    tasks = [f"{prefix}_{shift}_{severity}" for shift, severity in product(SHIFTS, severities)]
    return name, Entry("group", FOLDER / "_mean_over_cells.yaml", {"group": name, "task": tasks})


def _clean_and_shifted(name: str, splits: tuple[str, ...]) -> tuple[str, Entry]:
    """Clean splits and their shifted groups side by side, without a mean that would mix them."""
    tasks = [f"refcocoplus_rec_{split}" for split in splits] + [f"{name}_{split}" for split in splits]
    return name, Entry("group", FOLDER / "_clean_and_shifted.yaml", {"group": name, "task": tasks})
