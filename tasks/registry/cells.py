"""The grid split × shift × severity as lmms-eval tasks, each available by name, from a few templates per dataset.

Eighteen corruptions × five severities × three splits would be 270 files that differ in three words. A cell is the
template's YAML with its name, split, shift and severity filled in; `lmms_plugin.registration` adds the entries to
lmms-eval's index. A cell may have a corruption, a language shift, or one of each at the same severity, or a shift that
moves boxes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.shifts.benchmark import FIFTEEN
from lmms_plugin.shifts.image.corruptions import SHIFTS
from lmms_plugin.shifts.image.moving import MOVING
from lmms_plugin.shifts.language.rewording import TEXT_SHIFTS
from lmms_plugin.shifts.severities import SEVERITIES
from lmms_plugin.tasks.grounding.language_shifts import Reworded
from lmms_plugin.tasks.grounding.moving_shifts import Moved
from lmms_plugin.tasks.grounding.refcocoplus import SPLITS

FOLDER = Path(__file__).parents[1]
DEFAULT_SEVERITY = 3
TESTS = ("testA", "testB")
MISMATCHES = ("attribute_swap", "absent_object")
CLEAN: dict[str, Any] = {}
GEOMETRY = tuple(name for name, shift in MOVING.items() if shift.kind == "geometry")
_SECOND_VERSION = ("motion_blur", "glass_blur")
"""In the first one tasks of these names had the corruptions that are now `centred_motion_blur` and its like."""


@dataclass(frozen=True)
class IndexEntry:
    """Entry of lmms-eval's task index: the kind of a task or group, its YAML, and the keys that override the YAML."""

    kind: str
    yaml: Path
    overrides: dict[str, Any]


class Dataset(NamedTuple):
    """A dataset with cells.

    Attributes:
        name: Prefix of its tasks' names.
        splits: Split → continuation of the name of a task on it.
        shift: Template of cells with a corruption, relative to this folder.
        moved: Template of cells with a shift that moves boxes.
        text_shift: Template of cells with a language shift.
        rejection: Kind of mismatch → template of its cells.
    """

    name: str
    splits: dict[str, str]
    shift: str
    moved: str
    text_shift: str
    rejection: dict[str, str]


REFCOCOPLUS = Dataset(
    "refcocoplus",
    {split: f"_{split}" for split in SPLITS},
    "grounding/refcocoplus_shift/_cell.yaml",
    "grounding/refcocoplus_shift/_moved_cell.yaml",
    "grounding/refcocoplus_shift/_text_cell.yaml",
    {mismatch: f"grounding/refcocoplus_rejection/_{mismatch}.yaml" for mismatch in MISMATCHES},
)
SHAPES = Dataset(
    "shapes",
    {"test": ""},
    "grounding/shapes/_cell.yaml",
    "grounding/shapes/_moved_cell.yaml",
    "grounding/shapes/_text_cell.yaml",
    {mismatch: f"grounding/shapes/_{mismatch}.yaml" for mismatch in MISMATCHES},
)


def entries() -> dict[str, IndexEntry]:
    """Return every generated task and group by name."""
    return dict(_generate())


def _generate() -> Iterator[tuple[str, IndexEntry]]:
    for dataset in (REFCOCOPLUS, SHAPES):
        for split in dataset.splits:
            yield from _cells(dataset, split)
            yield from _moved_cells(dataset, split)
            yield from _means(dataset, split)
    yield _listed("refcocoplus_shift", _clean(TESTS) + _by_split("refcocoplus_shift", TESTS))
    yield _listed("refcocoplus_shift_full", _clean(SPLITS) + _by_split("refcocoplus_shift_full", SPLITS))
    for kind in ("c", "geometry", "geometry_full"):
        name = f"refcocoplus_{kind}"
        yield _listed(name, _clean(TESTS) + _by_split(name, TESTS))
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
    """Yield all single tasks of a split: corruptions, language shifts, both, and rejection, clean and corrupted."""
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


def _moved_cells(dataset: Dataset, split: str) -> Iterator[tuple[str, IndexEntry]]:
    """Yield all single tasks of a split under shifts that move boxes."""
    for severity, (shift, moving) in product(SEVERITIES, MOVING.items()):
        name = f"{dataset.name}_shift{dataset.splits[split]}_{shift}_{severity}"
        place: dict[str, Any] = {"shift": shift, "severity": severity}
        told = {"version": 2.0 if shift in _SECOND_VERSION else 1.0, **place}
        if moving.kind == "geometry":
            told["shifted"] = "geometry"
        more = {"process_docs": Moved(shift, severity), "metadata": told}
        yield _cell(name, dataset.moved, split, place, more)


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
    """Yield groups whose line in the table is the mean over their cells."""
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
    yield _mean_over_cells(f"{name}_c{suffix}", prefix, FIFTEEN, SEVERITIES)
    for group, severities in (("geometry", (DEFAULT_SEVERITY,)), ("geometry_full", SEVERITIES)):
        template = "grounding/_mean_over_moved_cells.yaml"
        yield _mean_over_cells(f"{name}_{group}{suffix}", prefix, GEOMETRY, severities, template)
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
    """Return a group whose line in the table is the unweighted mean over its cells.

    Over `FIFTEEN` at five severities it is the mPC of Michaelis et al. (arXiv 1907.07484), of accuracy for precision.
    """
    tasks = [f"{prefix}_{shift}_{severity}" for shift, severity in product(shifts, severities)]
    return name, IndexEntry("group", FOLDER / template, {"group": name, "task": tasks})


def _listed(name: str, tasks: list[str]) -> tuple[str, IndexEntry]:
    """Return a group of tasks and groups without a mean, which would mix them."""
    return name, IndexEntry("group", FOLDER / "grounding/_clean_and_shifted.yaml", {"group": name, "task": tasks})


def _clean(splits: Sequence[str]) -> list[str]:
    return _by_split("refcocoplus_rec", splits)


def _by_split(name: str, splits: Sequence[str]) -> list[str]:
    return [f"{name}_{split}" for split in splits]
