"""Strata of expressions by their distractors: the other objects of the target's category in its photograph.

Ref-Adv-s notes their number itself. For RefCOCO+ and its siblings, whose rows on the hub hold a box and no category, it
is counted in the annotations of the photographs that their authors publish with the expressions (`instances.json` of
lichengunc/refer, in COCO's form) or in COCO's own (`instances_train2014.json`), in the folder that
`LMMS_PLUGIN_COCO_INSTANCES` names. The target is the annotation with its box. A crowd counts as one object. Without
that folder there are no strata, and an expression whose box is that of no annotation, or of two categories, is in none.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmms_plugin.tasks.sources.annotations import entries, read, same_box
from lmms_plugin.utils.copies import AbsentSplitError, local_folder

VARIABLE = "LMMS_PLUGIN_COCO_INSTANCES"
FILES = ("instances.json", "instances_train2014.json")
_FIELDS = ("image_id", "category_id", "bbox")


@dataclass(frozen=True)
class Strata:
    """Strata of a dataset by the number of distractors.

    Attributes:
        starts: Smallest number of each stratum, ascending; the last has no end.
        column: Column of the number: an integer, or a list with one entry per distractor, either also as text; None
            where it is counted in `Instances`.
    """

    starts: tuple[int, ...]
    column: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the strata, ascending, by which a metric ends: `distractors_0`, `distractors_2-3`."""
        ends = [(first, after - 1) for first, after in pairwise(self.starts)]
        between = [str(first) if first == last else f"{first}-{last}" for first, last in ends]
        return tuple(f"distractors_{name}" for name in (*between, f"{self.starts[-1]}+"))

    def of(self, distractors: int | None) -> str | None:
        """Return the name of a number's stratum; None where the number is unknown, or below the first."""
        if distractors is None or distractors < self.starts[0]:
            return None
        return self.names[sum(start <= distractors for start in self.starts) - 1]


REFCOCO = Strata((0, 1, 2, 4))
"""Strata of RefCOCO+, RefCOCO and RefCOCOg."""

REF_ADV = Strata((2, 4, 7), column="distractors")
"""Strata of Ref-Adv-s, as in its authors' evaluation."""


class Instances:
    """Objects of photographs.

    Args:
        path: Annotations in COCO's form.

    Raises:
        DatasetError: The file is not in that form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._of: defaultdict[int, list[tuple[int, Sequence[float]]]] = defaultdict(list)
        for entry in entries(path, "annotations", _FIELDS, read(path)):
            self._of[entry["image_id"]].append((entry["category_id"], tuple(entry["bbox"])))

    def __len__(self) -> int:
        """Return the number of photographs with objects."""
        return len(self._of)

    def distractors(self, photograph: int, box: Sequence[float]) -> int | None:
        """Return the number of other objects of the target's category; None where the target is not found.

        Args:
            photograph: COCO's number of the photograph.
            box: Box of the target as [x, y, width, height] in pixels.
        """
        objects = self._of.get(photograph, [])
        found = {category for category, other in objects if same_box(box, other)}
        if len(found) != 1:
            return None
        return sum(category in found for category, _ in objects) - 1


def instances() -> Instances | None:
    """Return the annotations in the folder that `VARIABLE` names; None if it is not set.

    Raises:
        DatasetError: The folder or the file in it does not exist, or the file is damaged.
    """
    path = file()
    return None if path is None else _read_once(path, path.stat().st_mtime_ns)


def file() -> Path | None:
    """Return the file of annotations in the folder that `VARIABLE` names; None if it is not set.

    Raises:
        DatasetError: The folder does not exist, or holds none.
    """
    wanted = " or ".join(FILES)
    folder = local_folder(VARIABLE, f"Set it to a folder that holds {wanted}.")
    if folder is None:
        return None
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise AbsentSplitError(f"{VARIABLE}={folder}: expected {wanted}, found {found}")


def number_in(written: Any) -> int:
    """Return the number of distractors that a column holds.

    Raises:
        ValueError: It is neither an integer that is not negative nor a list, nor the text of one.
    """
    value = written
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    number = len(value) if isinstance(value, list) else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"expected the number of distractors or a list of them, got {written!r:.80}")
    return number


@lru_cache(maxsize=1)
def _read_once(path: Path, changed: int) -> Instances:
    return Instances(path)
