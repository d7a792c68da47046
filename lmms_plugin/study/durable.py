"""Files that are whole at every moment, or can be told from those that are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4


def replace_text(path: Path, text: str) -> None:
    """Write a file that at every moment is as it was before or as it is to be."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """The same of bytes."""
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        value = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected JSON in {path}, which is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {path}, got {value!r:.60}")
    return value


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path relative to that."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found = {}
    for file in files:
        with file.open("rb") as stream:
            found[file.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that what is renamed is whole even after a power cut."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Bring to the disk which files a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
