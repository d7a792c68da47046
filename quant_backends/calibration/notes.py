"""Small values of a calibration on disk, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loguru import logger

from lmms_plugin.utils import files, hashing


class Notes:
    """JSON-ready values of one calibration, by name.

    Args:
        folder: Folder of these values; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def note(self, name: str, value: Any) -> None:
        """Store a JSON-ready value under a name, with its digest."""
        told = {"value": value, "sha256": hashing.of_value(value)}
        self.write(self.folder / f"{name}.json", json.dumps(told).encode())

    def noted(self, name: str) -> Any:
        """Return the value stored by `note`; None if there is none, or its file cannot be read or is damaged."""
        try:
            told = files.read_json(self.folder / f"{name}.json")
        except (OSError, ValueError):
            return None
        value = told.get("value")
        return value if told.get("sha256") == hashing.of_value(value) else None

    def write(self, target: Path, content: bytes) -> None:
        """Write a file of the folder atomically; a full disk keeps nothing and says so.

        Raises:
            FileNotFoundError: The folder is removed each time that it is made.
        """
        # In a parallel evaluation, another process with the same calibration may finish and remove the folder.
        for _ in range(3):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                return files.replace_bytes(target, content)
            except FileNotFoundError:
                continue
            except OSError as error:
                # A full disk is no reason to give up hours of work.
                logger.warning(f"{target.stem} is not kept in {self.folder} ({error}): interrupted, it is done again")
                return None
        raise FileNotFoundError(f"{self.folder} is removed each time that it is made")
