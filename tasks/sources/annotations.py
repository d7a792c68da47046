"""Annotation files in COCO's form: an object with lists of entries."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.files import json_value

_PHOTOGRAPH = re.compile(r"(?:^|[/\\])COCO_\w+?_(\d{12})$")
_SAME_BOX = 0.5


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
        DatasetError: The file is damaged, there is no such list, it is empty, or an entry lacks a field.
    """
    content = read(path) if content is None else content
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not found:
        seen = sorted(content) if isinstance(content, dict) else str(content)[:80]
        raise DatasetError(f"{path}: expected an object with a list {key!r}, got {seen}")
    for entry in found:
        if missing := set(fields) - set(entry):
            raise DatasetError(f"{path}: expected {sorted(missing)} in every entry of {key!r}, got {str(entry)[:120]}")
    return found


def photograph_number(name: str) -> int | None:
    """Return COCO's number of a photograph by its name without ending; None if that is not COCO's."""
    found = _PHOTOGRAPH.search(name)
    return int(found.group(1)) if found else None


def same_box(box: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two boxes in pixels are the same up to rounding: each number within half a pixel."""
    return len(box) == len(other) and all(abs(a - b) <= _SAME_BOX for a, b in zip(box, other, strict=True))
