"""Hashes of values, files, folders, code and checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_BLOCKS, _BLOCK = 64, 4096
_WEIGHTS = ("*.safetensors", "*.bin")


def of_value(value: Any) -> str:
    """Return the SHA-256 of a value as JSON with sorted names.

    Raises:
        TypeError: JSON cannot hold the value.
    """
    return of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def of_bytes(content: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def of_file(file: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def of_files(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Return the SHA-256 of the files at any depth below a folder, by relative path; links are skipped.

    Args:
        folder: Folder with the files.
        pattern: Pattern of their names.
    """
    files = sorted(file for file in folder.rglob(pattern) if file.is_file() and not file.is_symlink())
    return {file.relative_to(folder).as_posix(): of_file(file) for file in files}


def of_code(folder: Path) -> str:
    """Return the SHA-256 of paths and contents of the Python files at any depth below a folder."""
    return of_value(of_files(folder, "*.py"))


def of_package() -> str:
    """Return the SHA-256 of all code of this package."""
    return of_code(Path(__file__).parents[1])


def of_path(path: Path) -> str:
    """Return a fingerprint of a file or of all files of a folder: relative names, sizes, and 64 blocks of each file.

    It does not depend on the place of the folder, and takes milliseconds for any size. Hidden files are skipped.

    Raises:
        FileNotFoundError: `path` does not exist.
    """
    return of_value([[name, *_sample(file)] for name, file in shown_files(path).items()])


def shown_files(path: Path) -> dict[str, Path]:
    """Return the files of a folder at any depth by relative name, hidden ones skipped; of a file itself by its suffix.

    Raises:
        FileNotFoundError: `path` does not exist.
    """
    if path.is_file():
        return {path.suffix: path}
    if not path.is_dir():
        raise FileNotFoundError(f"there is nothing at {path}")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    return {file.relative_to(path).as_posix(): file for file in files}


def of_source(path: str, revision: Callable[[str], str | None]) -> dict[str, str | None]:
    """Identify the state of a checkpoint or a dataset: by its files if it is local, else by its commit on the hub.

    Args:
        path: Path of a file or folder, or id of a repository on the hub.
        revision: Function from the id of a repository to the commit that is read; None if unknown.
    """
    local = Path(path).expanduser()
    return {"files": of_path(local)} if local.exists() else {"repository": path, "revision": revision(path)}


def of_weights(folder: Path) -> str:
    """Return a fingerprint of a checkpoint's weights: SHA-256 of sizes and of 64 blocks of each file, spread evenly.

    Two trainings of one model differ almost everywhere, so a sample distinguishes them; it takes milliseconds for any
    size. The same weights in another number of files have another fingerprint.

    Args:
        folder: Folder with the weights.

    Raises:
        FileNotFoundError: There are no weights.
    """
    files = next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), None)
    if files is None:
        raise FileNotFoundError(f"expected weights ({' or '.join(_WEIGHTS)}) in {folder}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "big"))
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.parts)


def _sample(file: Path) -> tuple[int, str]:
    size, digest = file.stat().st_size, hashlib.sha256()
    for part in [file.read_bytes()] if size <= _BLOCKS * _BLOCK else _blocks(file):
        digest.update(part)
    return size, digest.hexdigest()


def _blocks(file: Path) -> Iterator[bytes]:
    """Yield 64 blocks of 4,096 bytes, spread evenly from start to end of a file; they overlap in a short one."""
    last = max(0, file.stat().st_size - _BLOCK)
    with file.open("rb") as stream:
        for block in range(_BLOCKS):
            stream.seek(last * block // (_BLOCKS - 1))
            yield stream.read(_BLOCK)
