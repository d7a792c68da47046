"""The grid split × shift × severity as lmms-eval tasks, each findable by name, from a few templates per dataset.

Eighteen corruptions × five severities × three splits would be 270 files that differ in three words. A cell is the
template's YAML with its name, split, shift and severity filled in; `lmms_plugin.registration` adds the entries to
lmms-eval's index. A cell may have a corruption, a language shift, or one of each at the same severity.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.shifts.image.corruptions import SHIFTS
from lmms_plugin.shifts.language.rewording import TEXT_SHIFTS
from lmms_plugin.shifts.severities import SEVERITIES
from lmms_plugin.tasks.grounding.language_shifts import Reworded
from lmms_plugin.tasks.grounding.refcocoplus import SPLITS

FOLDER = Path(__file__).parents[1]
DEFAULT_SEVERITY = 3
TESTS = ("testA", "testB")
MISMATCHES = ("attribute_swap", "absent_object")
CLEAN: dict[str, Any] = {}


@dataclass(frozen=True)
class IndexEntry:
    """What lmms-eval's task index needs of one task or group: its kind, its YAML, and the keys set on top of that."""

    kind: str
    yaml: Path
    overrides: dict[str, Any]


class Dataset(NamedTuple):
    """A dataset that has cells.

    Attributes:
        name: how its tasks' names begin.
        splits: split → how the name of a task on it goes on.
        shift: template of cells with a corruption, relative to this folder.
        text_shift: template of cells with a language shift.
        rejection: kind of mismatch → template of its cells.
    """

    name: str
    splits: dict[str, str]
    shift: str
    text_shift: str
    rejection: dict[str, str]


REFCOCOPLUS = Dataset(
    "refcocoplus",
    {split: f"_{split}" for split in SPLITS},
    "grounding/refcocoplus_shift/_cell.yaml",
    "grounding/refcocoplus_shift/_text_cell.yaml",
    {mismatch: f"grounding/refcocoplus_rejection/_{mismatch}.yaml" for mismatch in MISMATCHES},
)
SHAPES = Dataset(
    "shapes",
    {"test": ""},
    "grounding/shapes/_cell.yaml",
    "grounding/shapes/_text_cell.yaml",
    {mismatch: f"grounding/shapes/_{mismatch}.yaml" for mismatch in MISMATCHES},
)


def entries() -> dict[str, IndexEntry]:
    """Every generated task and group by name."""
    return dict(_generate())


def _generate() -> Iterator[tuple[str, IndexEntry]]:
    for dataset in (REFCOCOPLUS, SHAPES):
        for split in dataset.splits:
            yield from _cells(dataset, split)
            yield from _means(dataset, split)
    yield _listed("refcocoplus_shift", _clean(TESTS) + _by_split("refcocoplus_shift", TESTS))
    yield _listed("refcocoplus_shift_full", _clean(SPLITS) + _by_split("refcocoplus_shift_full", SPLITS))
    for kind in ("text", "text_full", "joint"):
        name = f"refcocoplus_shift_{kind}"
        yield _listed(name, _clean(TESTS) + _by_split(name, TESTS))
    pairs = [f"{split}_{mismatch}" for split, mismatch in product(TESTS, MISMATCHES)]
    yield _listed("refcocoplus_rejection", _by_split("refcocoplus_rejection", pairs))
    yield _listed(
        "refcocoplus_rejection_shift",
        _by_split("refcocoplus_rejection", pairs) + _by_split("refcocoplus_rejection_shift", pairs),
    )
    yield _listed("shapes_rejection", _by_split("shapes_rejection", MISMATCHES))


def _cells(dataset: Dataset, split: str) -> Iterator[tuple[str, IndexEntry]]:
    """All single tasks of a split: corruptions, language shifts, both, and rejection, clean and under corruptions."""
    prefix = f"{dataset.name}_shift{dataset.splits[split]}"
    for severity, shift in product(SEVERITIES, (None, *SHIFTS)):
        image = CLEAN if shift is None else {"shift": shift, "severity": severity}
        if shift is not None:
            yield _cell(f"{prefix}_{shift}_{severity}", dataset.shift, split, image)
        for text_shift in TEXT_SHIFTS:
            what = text_shift if shift is None else f"{shift}_and_{text_shift}"
            place = {**image, "text_shift": text_shift, "text_severity": severity}
            more = {"process_docs": Reworded(text_shift, severity)}
            yield _cell(f"{prefix}_{what}_{severity}", dataset.text_shift, split, place, more)
        for mismatch, template in dataset.rejection.items():
            name = f"{dataset.name}_rejection{dataset.splits[split]}_{mismatch}"
            if shift is not None:
                yield _cell(f"{name}_{shift}_{severity}", template, split, {**image, "mismatch": mismatch})
            elif severity == DEFAULT_SEVERITY:
                yield _cell(name, template, split, {"mismatch": mismatch})


def _cell(
    name: str, template: str, split: str, place: dict[str, Any], more: dict[str, Any] | None = None
) -> tuple[str, IndexEntry]:
    overrides = {
        "task": name,
        "test_split": split,
        "lmms_eval_specific_kwargs": {"default": dict(place)},
        "metadata": {"version": 1.0, **place},
        **(more or {}),
    }
    return name, IndexEntry("task", FOLDER / template, overrides)


def _means(dataset: Dataset, split: str) -> Iterator[tuple[str, IndexEntry]]:
    """Groups whose line in the table is the mean over their cells."""
    name, suffix = dataset.name, dataset.splits[split]
    prefix, pairs = f"{name}_shift{suffix}", [f"{a}_and_{b}" for a, b in product(SHIFTS, TEXT_SHIFTS)]
    for group, shifts, severities in (
        ("shift", SHIFTS, (DEFAULT_SEVERITY,)),
        ("shift_full", SHIFTS, SEVERITIES),
        ("shift_text", TEXT_SHIFTS, (DEFAULT_SEVERITY,)),
        ("shift_text_full", TEXT_SHIFTS, SEVERITIES),
        ("shift_joint", pairs, (DEFAULT_SEVERITY,)),
    ):
        yield _mean_over_cells(f"{name}_{group}{suffix}", prefix, shifts, severities)
    for mismatch in dataset.rejection:
        group, prefix = f"{name}_rejection_shift{suffix}_{mismatch}", f"{name}_rejection{suffix}_{mismatch}"
        yield _mean_over_cells(group, prefix, SHIFTS, (DEFAULT_SEVERITY,), "grounding/_mean_over_rejection_cells.yaml")


def _mean_over_cells(
    name: str,
    prefix: str,
    shifts: Iterable[str],
    severities: Sequence[int],
    template: str = "grounding/_mean_over_cells.yaml",
) -> tuple[str, IndexEntry]:
    """A group whose line in the table is the mean over its cells, each with the same weight.

    Not the mPC of Michaelis et al. (arXiv 1907.07484), which is over fifteen corruptions at five severities.
    """
    tasks = [f"{prefix}_{shift}_{severity}" for shift, severity in product(shifts, severities)]
    return name, IndexEntry("group", FOLDER / template, {"group": name, "task": tasks})


def _listed(name: str, tasks: list[str]) -> tuple[str, IndexEntry]:
    """Tasks and groups side by side, without a mean that would mix them."""
    return name, IndexEntry("group", FOLDER / "grounding/_clean_and_shifted.yaml", {"group": name, "task": tasks})


def _clean(splits: Sequence[str]) -> list[str]:
    return _by_split("refcocoplus_rec", splits)


def _by_split(name: str, splits: Sequence[str]) -> list[str]:
    return [f"{name}_{split}" for split in splits]
