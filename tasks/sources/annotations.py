"""Annotation files in COCO's form: an object with lists of entries."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.files import json_value

_PHOTOGRAPH = re.compile(r"(?:^|[/\\])COCO_\w+?_(\d{12})$")
_SAME_BOX = 0.5


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_number_of_photograph(value: Any) -> bool:
    return _is_id(value) and str(value).isdecimal()


def _is_box(value: Any) -> bool:
    numbers = isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    return numbers and len(value) == 4 and all(map(math.isfinite, value))


_HELD: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    dict.fromkeys(("id", "image_id", "category_id", "question_id"), (_is_id, "a number or text"))
    | {"original_id": (_is_number_of_photograph, "a whole number"), "bbox": (_is_box, "four numbers")}
)
"""Field → whether it holds what COCO's form says, and that in words; other fields are checked where they are read."""
_ANYTHING: tuple[Callable[[Any], bool], str] = (lambda _: True, "")


def read(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DatasetError: It is damaged.
    """
    try:
        return json_value(path.read_bytes(), str(path))
    except ValueError as error:
        raise DatasetError(f"{error}; fetch it again") from error


def entries(path: Path, key: str, fields: Collection[str], content: Any = None) -> list[dict[str, Any]]:
    """Return the entries of one list.

    Args:
        path: JSON file.
        key: Name of the list.
        fields: Required fields of every entry.
        content: Content of the file, if already read.

    Raises:
        DatasetError: The file is damaged, there is no such list, it is empty, or an entry lacks a field or
            holds something else there.
    """
    content = read(path) if content is None else content
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not found:
        seen = sorted(content) if isinstance(content, dict) else str(content)[:80]
        raise DatasetError(f"{path}: expected an object with a list {key!r}, got {seen}")
    for entry in found:
        if not isinstance(entry, dict):
            raise DatasetError(f"{path}: expected objects in the list {key!r}, got {str(entry)[:120]}")
        if missing := set(fields) - set(entry):
            raise DatasetError(f"{path}: expected {sorted(missing)} in every entry of {key!r}, got {str(entry)[:120]}")
        # What is marked as nothing has no box.
        for field in fields if not entry.get("empty") else ():
            holds, expected = _HELD.get(field, _ANYTHING)
            if not holds(entry[field]):
                raise DatasetError(
                    f"{path}: expected {expected} as {field!r} in every entry of {key!r}, got {str(entry)[:120]}"
                )
    return found


def photograph_number(name: str) -> int | None:
    """Return COCO's number of a photograph by its name without ending; None if that is not COCO's."""
    found = _PHOTOGRAPH.search(name)
    return int(found.group(1)) if found else None


def same_box(box: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two boxes in pixels are the same up to rounding: each number within half a pixel."""
    return len(box) == len(other) and all(abs(a - b) <= _SAME_BOX for a, b in zip(box, other, strict=True))
