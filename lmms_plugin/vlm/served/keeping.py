"""Answers of a server kept as they come, so that a run that was broken off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from lmms_plugin.utils import hashing


@dataclass
class KeptAnswers:
    """One file of answers by `hashing.of_value` of what was asked, a line of JSON each; only its index is in memory.

    Attributes:
        file: File that answers are appended to.
        found: Number of answers that were there when the run began.
    """

    file: Path
    found: int = field(default=0, init=False)
    _places: dict[str, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)
    _lock: Any = field(default_factory=Lock, init=False, repr=False)

    @classmethod
    def of(cls, folder: str, identity: Mapping[str, Any]) -> KeptAnswers:
        """Open the answers of one served model.

        Args:
            folder: Folder for the files of all runs; made if missing.
            identity: Values that tell the run apart from others.
        """
        place = Path(folder).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        return cls(place / f"served-{hashing.of_value(identity)[:16]}.jsonl")

    def __post_init__(self) -> None:
        self._stream: BinaryIO = self.file.open("a+b")
        self._stream.seek(0)
        start = 0
        for line in self._stream:
            # The last line of a run that was killed may be cut off.
            if line.endswith(b"\n") and (record := _record(line)) is not None:
                self._places[record["key"]] = (start, len(line))
            start += len(line)
        self.found = len(self._places)
        self._stream.seek(0, 2)
        if start and not _ends_a_line(self.file):
            self._stream.write(b"\n")
            self._stream.flush()

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the answer to what has this hash; None if there is none yet."""
        with self._lock:
            if key not in self._places:
                return None
            start, length = self._places[key]
            with self.file.open("rb") as stream:
                stream.seek(start)
                record = _record(stream.read(length))
        # Another process may have appended at the same time.
        return record["answer"] if record is not None and record["key"] == key else None

    def keep(self, key: str, answer: Mapping[str, Any]) -> None:
        """Append an answer; it is in the file when this returns."""
        line = json.dumps({"key": key, "answer": answer}, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            start = self._stream.seek(0, 2)
            self._stream.write(line)
            self._stream.flush()
            self._places[key] = (start, len(line))

    def remove(self) -> None:
        """Forget all of them: the run is over."""
        with self._lock:
            self._stream.close()
            self.file.unlink(missing_ok=True)
            self._places.clear()


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("key"), str) and isinstance(record.get("answer"), dict)
    return record if whole else None


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read() == b"\n"
