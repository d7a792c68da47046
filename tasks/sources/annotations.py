"""Annotation files in COCO's form: an object with lists of entries."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.files import json_value


def read(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DatasetError: it is damaged.
    """
    try:
        return json_value(path.read_bytes(), str(path))
    except ValueError as error:
        raise DatasetError(f"{error}; fetch it again") from error


def entries(path: Path, key: str, fields: Collection[str], content: Any = None) -> list[dict[str, Any]]:
    """The entries of one list.

    Args:
        path: JSON file.
        key: which list.
        fields: what every entry must have.
        content: of the file, if it has been read.

    Raises:
        DatasetError: the file is damaged, there is no such list, it is empty, or an entry lacks a field.
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
