"""Files that are whole at every moment, or can be told from those that are."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from uuid import uuid4

_LONGEST, _LONGEST_PART = 200, 255
"""Bytes of a name that leave room for what tells files apart that are being written, and those that systems take."""
SETTLED_NANOSECONDS = 2_000_000_000
"""Some file systems count time in steps of two seconds: within one, a second change leaves no trace."""


class State(NamedTuple):
    """What tells without reading it that a file is as it was. Copies that keep one time do not keep the other.

    Attributes:
        size: In bytes.
        modified: Its content, in nanoseconds since the epoch.
        changed: Anything about it, likewise.
    """

    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: Path) -> State:
        """A file as it is now."""
        now = file.stat()
        return cls(now.st_size, now.st_mtime_ns, now.st_ctime_ns)

    @property
    def settled(self) -> bool:
        """Whether any later change leaves a trace in it."""
        return time.time_ns() - max(self.modified, self.changed) > SETTLED_NANOSECONDS


def expect_inside(name: str) -> str:
    """A path that was read from a file, if it leads to something below the folder that it is relative to.

    Raises:
        ValueError: If it is absolute, climbs out, or is no path.
    """
    place = PurePosixPath(name)
    outside = place.is_absolute() or ".." in place.parts or bool(PureWindowsPath(name).drive)
    too_long = any(len(encoded(part)) > _LONGEST_PART for part in place.parts)
    if outside or too_long or not place.parts or "\\" in name or "\0" in name:
        raise ValueError(f"expected the path of a file inside the folder, got {name!r:.200}")
    return name


def is_plain(folder: Path, name: str) -> bool:
    """Whether a path below a folder leads to a file there, through no link.

    Raises:
        ValueError: If it leads out of the folder.
    """
    path = folder / expect_inside(name)
    linked = any(one.is_symlink() for one in (path, *path.parents) if one != folder and one.is_relative_to(folder))
    return path.is_file() and not linked


def replace_text(path: Path, text: str) -> None:
    """Write a file that at every moment is as it was before or as it is to be."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """The same of bytes."""
    replace_all({path: content})


def replace_all(contents: Mapping[Path, bytes]) -> None:
    """The same of several files; none is replaced before all are written beside their places."""
    with ExitStack() as stack:
        # What is entered last ends first: files take their places in the order in which they are given.
        for path, content in reversed(list(contents.items())):
            stack.enter_context(replacing(path)).write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place beside a file to write to; what is there becomes the file if all goes well and vanishes if not."""
    unfinished = _beside(path)
    try:
        yield unfinished
        _sync_file(unfinished)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder beside another to write to; it becomes that folder if all goes well and vanishes if not.

    Raises:
        OSError: If there is something at `folder` by then, other than an empty folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(folder)
    unfinished.mkdir()
    try:
        yield unfinished
        sync(unfinished)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _beside(path: Path) -> Path:
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST])
    return path.with_name(f".{name}.unfinished-{uuid4().hex}")


def encoded(text: str) -> bytes:
    """A text in UTF-8; halves of surrogate pairs, which names of files may hold, as escapes."""
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file is damaged.
    """
    return json_object(path.read_bytes(), str(path))


def json_object(content: bytes, name: str, whole: Callable[[str], int] | None = None) -> dict[str, Any]:
    """The JSON object that bytes hold.

    Args:
        content: In UTF-8.
        name: Of the file that they are of, for the message of an error.
        whole: What makes a number of the digits of a whole one; `int` by default.

    Raises:
        ValueError: If they are no JSON, or JSON of another kind.
    """
    value = json_value(content, name, whole)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {name}, got {value!r:.60}")
    return value


def json_value(content: bytes, name: str, whole: Callable[[str], int] | None = None) -> Any:
    """The same of whatever JSON holds.

    Raises:
        ValueError: If they are no JSON.
    """
    try:
        return json.loads(content, parse_int=whole)
    # Python parses by recursion, and no integer of more than 4,300 digits.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {name}, which is damaged: {error}") from error


def sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that what is renamed is whole even after a power cut."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync_file(path)
        else:
            sync_folder(path)
    sync_folder(folder)


def _sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Bring to the disk which files a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
