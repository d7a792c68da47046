"""What tells one thing from another: hashes of values, files, folders, code and checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_BLOCKS, _BLOCK = 64, 4096
_WEIGHTS = ("*.safetensors", "*.bin")


def of_value(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted names.

    Raises:
        TypeError: If it is none that JSON can hold.
    """
    return of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def of_bytes(content: bytes) -> str:
    """SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def of_file(file: Path) -> str:
    """SHA-256 of all bytes of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def of_files(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of the files at any depth below a folder, by their paths relative to it; links do not count.

    Args:
        folder: With the files.
        pattern: Of their names.
    """
    files = sorted(file for file in folder.rglob(pattern) if file.is_file() and not file.is_symlink())
    return {file.relative_to(folder).as_posix(): of_file(file) for file in files}


def of_code(folder: Path) -> str:
    """SHA-256 of the Python files at any depth below a folder: of their paths and all of their bytes."""
    return of_value(of_files(folder, "*.py"))


def of_path(path: Path) -> str:
    """Fingerprint of a file or of all files of a folder: names below it, sizes, and 64 blocks of each file.

    It does not depend on where the folder lies, and takes milliseconds for any size. Hidden files do not count.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
    """
    if path.is_file():
        return of_value([[path.suffix, *_sample(path)]])
    if not path.is_dir():
        raise FileNotFoundError(f"there is nothing at {path}")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    return of_value([[file.relative_to(path).as_posix(), *_sample(file)] for file in files])


def of_source(path: str, revision: Callable[[str], str | None]) -> dict[str, str | None]:
    """What tells a checkpoint or a dataset from others: its files where it lies here, else its commit on the hub.

    Args:
        path: Of a file or folder, or the id of a repository on the hub.
        revision: Id of a repository → the commit of it that is read; None where nothing tells.
    """
    local = Path(path).expanduser()
    return {"files": of_path(local)} if local.exists() else {"repository": path, "revision": revision(path)}


def of_weights(folder: Path) -> str:
    """Fingerprint of a checkpoint's weights: SHA-256 of sizes and of 64 blocks of each file, spread evenly.

    Two trainings of one model differ almost everywhere, so a sample tells them apart; it takes milliseconds for any
    size. The same weights in another number of files have another fingerprint.

    Args:
        folder: With the weights.

    Raises:
        FileNotFoundError: If there are none.
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
    """64 blocks of 4,096 bytes, spread evenly from the start of a file to its end; they overlap in a short one."""
    last = max(0, file.stat().st_size - _BLOCK)
    with file.open("rb") as stream:
        for block in range(_BLOCKS):
            stream.seek(last * block // (_BLOCKS - 1))
            yield stream.read(_BLOCK)
