"""Places to write to, as users name them: looked at before anything is computed for them."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def expect_file(option: str, path: Path) -> Path:
    """Refuse a path at which no file can be written, with its folder made first where it is missing.

    Args:
        option: How the user named it, for messages: `--output`, `report`.
        path: Of the file; may be there already, to be replaced.

    Returns:
        The path.

    Raises:
        ValueError: It is a folder, a part of it is a file, or nothing can be written there; one line.
    """
    if os.path.isdir(path):
        raise ValueError(f"{option}: expected the name of a file, got the folder {path}; name a file in it")
    _expect_room(option, path, path.parent)
    if os.path.exists(path):
        # A link may lead to where nothing can be written though its own folder takes files.
        try:
            path.open("ab").close()
        except OSError as error:
            raise _unwritable(option, path, error) from error
    return path


def expect_folder(option: str, path: Path) -> Path:
    """Refuse a path that can be no folder to write into; it need not be there.

    Args:
        option: As in `expect_file`.
        path: Of the folder.

    Returns:
        The path.

    Raises:
        ValueError: It or a part of it is a file, or nothing can be written there; one line.
    """
    _expect_room(option, path, path)
    return path


def expect_free(folder: str | Path, option: str = "save_quantized") -> Path:
    """Return the folder to save to; it and those above it are made when there is something to save.

    Args:
        folder: As the user named it.
        option: By which, for messages.

    Raises:
        ValueError: Something is there already, or nothing can be written there.
    """
    path = Path(folder).expanduser().absolute()
    if os.path.exists(path) and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{option}: {path} is there already and not empty; name a new folder")
    expect_folder(option, path)
    # What is written there is written beside it first.
    expect_folder(option, path.parent)
    return path


def _expect_room(option: str, path: Path, folder: Path) -> None:
    """Write and remove a file in the folder, or in the nearest above it that is there."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except OSError as error:
        # The name is too long, or lies where one may not look.
        raise _unwritable(option, path, error) from error
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(one))
    if not os.path.isdir(there):
        what = "a folder" if there == path.absolute() else f"a path below folders for {path}"
        got = "the file" if os.path.exists(there) else "a link to nothing,"
        raise ValueError(f"{option}: expected {what}, got {got} {there}; name another place")
    try:
        # Rights alone do not tell: a folder may lie on a file system that takes no files.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _unwritable(option, there, error) from error


def _unwritable(option: str, place: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{option}: cannot write to {place} ({(error.strerror or str(error)).lower()}); name another place"
    )
