"""What was measured of a study's cells, kept in the study's folder, so that not every report parses their logs.

It counts as long as results file, logs, settings and code are those that it was made with, and may be deleted at any
time. A file whose size and times of change are as they were is the same; of any other, all bytes are hashed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from lmms_plugin.analysis.reliability import Settings
from lmms_plugin.analysis.results import logs_of
from lmms_plugin.report import numbers, packed
from lmms_plugin.report.numbers import Numbers
from lmms_plugin.study.file.fingerprints import code
from lmms_plugin.study.store.folder import CELL, CELLS, MEASURED
from lmms_plugin.utils.files import State, replace_bytes
from lmms_plugin.utils.hashing import of_value as digest

# Taken when the code is loaded: what a file says later is not what this process does.
CODE = digest([code((numbers.__name__, packed.__name__)), sys.version_info[:2]])
"""Fingerprint of the code that measures, with the versions of the libraries that it imports."""

_SEAL_BYTES = 16


class Source(NamedTuple):
    """A file that numbers are made of.

    Attributes:
        state: As it was before its bytes were read; None if it had just changed, and may have changed again.
        content: Hash of its bytes.
    """

    state: State | None
    content: str

    @classmethod
    def of(cls, file: Path) -> Source:
        """A file as it is now."""
        state = State.of(file)
        with file.open("rb") as stream:
            # It is to tell changes, not forgeries, and takes a fifth of the time of SHA-256 for gigabytes of logs.
            content = hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
        return cls(state if state.settled else None, content)


@dataclass(frozen=True)
class Kept:
    """The place where the numbers of one results file are kept.

    Attributes:
        file: The results file.
        settings: Of the report.
        path: Where its numbers are, those of other settings beside them.
    """

    file: Path
    settings: Settings
    path: Path

    @classmethod
    def of(cls, cell: Path, file: Path, settings: Settings) -> Kept | None:
        """The place for a results file of a study's cell; None for any other folder, which is not ours to write into.

        Args:
            cell: Folder of the cell.
            file: The results file.
            settings: Of the report.
        """
        if cell.parent.name != CELLS or not (cell / CELL).is_file():
            return None
        folder = cell.parent.with_name(MEASURED) / cell.name
        return cls(file, settings, folder / f"{file.stem}-{_asked(settings)[:8]}.bin")

    def numbers(self) -> Numbers:
        """The numbers, measured now if those that are kept are of other files, code or settings, or damaged.

        Raises:
            ValueError: As `lmms_plugin.analysis.results.read`.
        """
        found = self._load()
        if found is None:
            # Before anything is read: what changes meanwhile is another file.
            sources = {one.name: Source.of(one) for one in self._files()}
            found = numbers.of(self.file, self.settings)
            self._save(sources, packed.pack(found))
        return found

    def _files(self) -> tuple[Path, ...]:
        return self.file, *logs_of(self.file)

    def _load(self) -> Numbers | None:
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        seal, body = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
        if seal != self._seal(body):
            return None
        head, _, archive = body.partition(b"\n")
        before = {name: Source(state and State(*state), of) for name, (state, of) in json.loads(head).items()}
        files = {one.name: one for one in self._files()}
        if files.keys() != before.keys():
            return None
        now = {
            name: before[name] if State.of(one) == before[name].state else Source.of(one) for name, one in files.items()
        }
        if any(now[name].content != before[name].content for name in now):
            return None
        if now != before:
            self._save(now, archive)
        return packed.unpack(archive)

    def _save(self, sources: Mapping[str, Source], archive: bytes) -> None:
        body = json.dumps(sources).encode() + b"\n" + archive
        # Without them the next report takes longer, and nothing else.
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(self.path, self._seal(body) + body)

    def _seal(self, body: bytes) -> bytes:
        """Ties bytes to code and settings: with others, or if a bit is lost, it is another one."""
        return xxhash.xxh3_128_digest(f"{CODE} {_asked(self.settings)} ".encode() + body)


def _asked(settings: Settings) -> str:
    told = asdict(settings)
    # Threads change nothing.
    del told["workers"]
    return digest(told)
