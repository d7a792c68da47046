"""Atomic writing of files and folders, and detection of changes."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from uuid import uuid4

_LONGEST, _LONGEST_PART = 200, 255
"""Bytes of a name that leave room for the suffix of temporary files, and maximum bytes that file systems accept."""
_UNFINISHED = ".unfinished-"
SETTLED_NANOSECONDS = 2_000_000_000
"""Some file systems store times in steps of two seconds: a second change within one step leaves no trace."""


class State(NamedTuple):
    """State of a file that detects changes without reading it; copies that keep one of the times do not keep the other.

    Attributes:
        size: Size in bytes.
        modified: Time of the last change of its content, in nanoseconds since the epoch.
        changed: Time of the last change of anything about it, likewise.
    """

    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: Path) -> State:
        """Return the current state of a file."""
        now = file.stat()
        return cls(now.st_size, now.st_mtime_ns, now.st_ctime_ns)

    @property
    def settled(self) -> bool:
        """Return whether any later change of the file changes its state."""
        return time.time_ns() - max(self.modified, self.changed) > SETTLED_NANOSECONDS


def expect_inside(name: str) -> str:
    """Return a path that was read from a file, if it leads below the folder that it is relative to.

    Raises:
        ValueError: The path is absolute, leaves the folder, or is not a path.
    """
    place = PurePosixPath(name)
    outside = place.is_absolute() or ".." in place.parts or bool(PureWindowsPath(name).drive)
    too_long = any(len(encoded(part)) > _LONGEST_PART for part in place.parts)
    if outside or too_long or not place.parts or "\\" in name or "\0" in name:
        raise ValueError(f"expected the path of a file inside the folder, got {name!r:.200}")
    return name


def is_plain(folder: Path, name: str) -> bool:
    """Return whether a path below a folder leads to a file there, through no link.

    Raises:
        ValueError: The path leads out of the folder.
    """
    path = folder / expect_inside(name)
    linked = any(one.is_symlink() for one in (path, *path.parents) if one != folder and one.is_relative_to(folder))
    return path.is_file() and not linked


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: at every moment it has either the old or the new content."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically, as `replace_text`."""
    replace_all({path: content})


def replace_all(contents: Mapping[Path, bytes]) -> None:
    """Write several files; none is replaced before all are written to temporary files."""
    with ExitStack() as stack:
        # What is entered last exits first: files are replaced in the order in which they are given.
        for path, content in reversed(list(contents.items())):
            stack.enter_context(replacing(path)).write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside a file; its content replaces the file on success and is removed on failure."""
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
    """Yield a temporary folder beside another; it becomes that folder on success and is removed on failure.

    Raises:
        OSError: `folder` exists by then and is not an empty folder.
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
    return path.with_name(f".{name}{_UNFINISHED}{uuid4().hex}")


def remove_unfinished(folder: Path, seconds: float) -> None:
    """Remove temporary files at any depth below a folder that were last written so many seconds ago or earlier.

    A process that is killed leaves them.
    """
    for file in folder.rglob(f".*{_UNFINISHED}*"):
        # Another process may have removed it since, or it may belong to another user.
        with suppress(OSError):
            if file.is_file() and time.time() - file.stat().st_mtime > seconds:
                file.unlink()


def encoded(text: str) -> bytes:
    """Encode a text in UTF-8; lone surrogates, which file names may hold, become escapes."""
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file is damaged.
    """
    return json_object(path.read_bytes(), str(path))


def json_object(content: bytes, name: str, whole: Callable[[str], int] | None = None) -> dict[str, Any]:
    """Parse bytes as a JSON object.

    Args:
        content: Bytes in UTF-8.
        name: Name of their file, for the error message.
        whole: Function that converts the digits of an integer; `int` by default.

    Raises:
        ValueError: The bytes are not a JSON object.
    """
    value = json_value(content, name, whole)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {name}, got {value!r:.60}")
    return value


def json_value(content: bytes, name: str, whole: Callable[[str], int] | None = None) -> Any:
    """Parse bytes as any JSON value; arguments as of `json_object`.

    Raises:
        ValueError: The bytes are not JSON.
    """
    try:
        return json.loads(content, parse_int=whole)
    # Python parses by recursion, and no integer of more than 4,300 digits.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {name}, which is damaged: {error}") from error


def sync(folder: Path) -> None:
    """Flush a folder's files to disk, so that a renamed folder is complete even after a power failure."""
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
    """Flush a folder's list of files to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
