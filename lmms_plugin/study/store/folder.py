"""A study's folder: what is finished, what failed, what is under way, safe against being killed at any moment.

A cell is finished when its folder stands below `cells/`, which it gets to by one rename of a complete folder. Work
happens below `.running/`, under a lock that the system takes away from a process that ends in whatever manner.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_plugin.analysis import study_files
from lmms_plugin.analysis.study_files import CELL, CELLS, DONE, FAILED, FAILURES, LOG, STUDY, place
from lmms_plugin.utils import hashing
from lmms_plugin.utils.files import (
    State,
    is_plain,
    read_json,
    replace_text,
    sync,
    sync_folder,
    write_json,
)
from lmms_plugin.utils.reading import accounts

MEASURED = ".measured"
_LOCK, _UNFINISHED, _STATES = ".lock", ".unfinished", "files.json"


@dataclass
class Lock:
    """The right to work on one cell, until `release` or the end of the process (and of those it was handed to).

    Attributes:
        path: Of the lock's file.
        descriptor: Of the open file, which child processes may inherit.
    """

    path: Path
    descriptor: int

    @classmethod
    def take(cls, path: Path) -> Lock | None:
        """Take a lock; None if someone else has it."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            # Its last owner may have removed the file between our opening and our locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return cls(path, descriptor)
            os.close(descriptor)

    def release(self) -> None:
        """Give it back."""
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study.

    Attributes:
        path: Of the folder.
    """

    path: Path

    @property
    def running(self) -> Path:
        """Where unfinished work lies."""
        return self.path / ".running"

    @property
    def superseded(self) -> Path:
        """Where finished cells lie that were run again with other code, data or versions."""
        return self.path / ".superseded"

    def done_path(self, cell: str) -> Path:
        """Where a cell lies when it is finished."""
        return self.path / CELLS / cell

    def failed_path(self, cell: str) -> Path:
        """Where the account of a cell that failed lies."""
        return self.path / FAILURES / cell

    def is_done(self, cell: str) -> bool:
        """Whether a cell is finished, and all its files are as they were then."""
        return (self.done_path(cell) / DONE).is_file() and self.damage(cell) is None

    def damage(self, cell: str) -> str | None:
        """What is wrong with the files of a cell that was finished; None if nothing is, or it never was.

        A file is the same if its size and times are as they were when it was last hashed; of any other, all bytes are.
        """
        folder = self.done_path(cell)
        try:
            done, _ = self.done(cell), self.about(folder)
        except FileNotFoundError:
            return f"{CELL} of {cell} is gone" if (folder / DONE).exists() else None
        except ValueError as error:
            return str(error)
        return self._damaged(cell, done["files"])

    def _damaged(self, cell: str, files: Mapping[str, str]) -> str | None:
        folder, remembered = self.done_path(cell), self.path / MEASURED / cell / _STATES
        before = _states(remembered)
        now: dict[str, tuple[State, str]] = {}
        for name, digest in files.items():
            try:
                if not is_plain(folder, name):
                    return f"{name} of {cell} is gone"
                state = State.of(folder / name)
                hashed = digest if before.get(name) == [*state, digest] else hashing.of_file(folder / name)
            except FileNotFoundError:
                return f"{name} of {cell} is gone"
            except OSError as error:
                return f"{name} of {cell} cannot be read: {error.strerror}"
            if hashed != digest:
                return f"{name} of {cell} is not as it was when the cell was finished"
            if state.settled:
                now[name] = state, digest
        told = {name: [*state, digest] for name, (state, digest) in now.items()}
        if told != before:
            # Without it the next look takes longer, and nothing else.
            with contextlib.suppress(OSError):
                remembered.parent.mkdir(parents=True, exist_ok=True)
                replace_text(remembered, json.dumps(told))
        return None

    def damaged(self) -> dict[str, str]:
        """Cells that were finished and are not whole any more, and what is wrong with each."""
        found = {cell: self.damage(cell) for cell in self._moved()}
        return {cell: damage for cell, damage in found.items() if damage is not None}

    def has_failed(self, cell: str) -> bool:
        """Whether the last attempt at a cell failed."""
        return (self.failed_path(cell) / FAILED).is_file() and not self.is_done(cell)

    def failure(self, cell: str) -> dict[str, Any] | None:
        """What `failed.json` of a cell says; None where it has not failed."""
        if self.is_done(cell):
            return None
        try:
            return {"problem": "unknown"} | accounts.read(self.failed_path(cell) / FAILED, study_files.FailureAccount)
        except FileNotFoundError:
            return None
        except ValueError as error:
            return {"problem": str(error), "returncode": None, "tail": ""}

    def is_running(self, cell: str) -> bool:
        """Whether someone works on a cell now."""
        path = self.running / f"{cell}{_LOCK}"
        if not path.exists():
            return False
        lock = Lock.take(path)
        if lock is not None:
            lock.release()
        return lock is None

    def open(self, study_file: Path) -> None:
        """Make the folder, keep the study file in it, and clear away what killed runners left.

        Raises:
            ValueError: If the folder holds something else than a study, or a link where work is removed.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"expected a folder for the study, got the file {self.path}")
        if self._is_of_something_else():
            raise ValueError(f"expected an empty folder or one of a study (with study.yaml in it), got {self.path}")
        for ours in (CELLS, FAILURES, self.running.name, self.superseded.name, MEASURED):
            if (self.path / ours).is_symlink():
                raise ValueError(f"expected a folder of the study itself, got the link {self.path / ours}")
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / STUDY, study_file.read_text(encoding="utf-8"))
        for folder in (self.path / CELLS, self.path / FAILURES, self.running):
            folder.mkdir(exist_ok=True)
        for left in sorted(self.running.iterdir()):
            self._clear(left)
        for measured in (self.path / MEASURED).glob("*/"):
            if not self.done_path(measured.name).exists():
                _forget(measured)

    def _is_of_something_else(self) -> bool:
        """Whether the folder holds what no study's has; a runner that is starting may not have come to its file yet."""
        if not self.path.is_dir():
            return False
        ours = (CELLS, FAILURES, self.running.name)
        foreign = [
            one
            for one in self.path.iterdir()
            if one.name != MEASURED
            and not one.name.startswith(f".{STUDY}.")
            and not (one.name in ours and one.is_dir() and not any(one.iterdir()))
        ]
        return bool(foreign) and not (self.path / STUDY).is_file()

    def _clear(self, left: Path) -> None:
        if left.name.endswith(_LOCK) or left.name.startswith("."):
            return
        lock = self.lock(left.name)
        if lock is not None:
            _remove(left)
            lock.release()

    def lock(self, cell: str) -> Lock | None:
        """Take the right to work on a cell; None if another runner has it."""
        return Lock.take(self.running / f"{cell}{_LOCK}")

    def begin(self, cell: str) -> Path:
        """An empty folder to work on a cell in, whose lock the caller has."""
        path = self.running / cell
        _remove(path)
        path.mkdir()
        return path

    def discard(self, cell: str) -> None:
        """Drop the work on a cell, whose lock the caller has."""
        _remove(self.running / cell)

    def finish(self, cell: str, about: Mapping[str, Any], done: Mapping[str, Any]) -> None:
        """Turn the work on a cell into a finished cell, by one rename.

        Args:
            cell: Its id.
            about: What goes into `cell.json`.
            done: What goes into `done.json`, together with the hashes of all files.
        """
        work = self.running / cell
        write_json(work / CELL, about)
        write_json(work / DONE, {**done, "files": hashing.of_files(work)})
        self._move_to_finished(cell, about)

    def adopt(self, cell: str) -> None:
        """Turn a copy of a finished cell, made where cells are worked on, into a finished cell.

        Raises:
            ValueError: If a file is missing or is not as its hash says.
        """
        work = self.running / cell
        expected, found = self.done_in(work)["files"], hashing.of_files(work)
        for name, digest in expected.items():
            if found.get(name) != digest:
                raise ValueError(f"expected {name} of {cell} as it was finished, got another or none in {work}")
        self._move_to_finished(cell, self.about(work))

    @classmethod
    def listed(cls, folder: Path) -> list[str]:
        """Files that `done.json` of a folder lists.

        Raises:
            ValueError: If it is damaged, or lists one that would lie elsewhere.
        """
        return list(cls.done_in(folder)["files"])

    def _move_to_finished(self, cell: str, about: Mapping[str, Any]) -> None:
        work = self.running / cell
        sync(work)
        self._make_room(cell, about)
        os.rename(work, self.done_path(cell))
        sync_folder(self.path / CELLS)
        self._forget_failures(about)

    def fail(self, cell: str, about: Mapping[str, Any], failed: Mapping[str, Any]) -> None:
        """Record that a cell failed; of its work only the log stays."""
        work = self.running / cell
        for left in work.iterdir():
            if left.name != LOG:
                _remove(left)
        write_json(work / CELL, about)
        write_json(work / FAILED, failed)
        sync(work)
        _remove(self.failed_path(cell))
        os.rename(work, self.failed_path(cell))

    def restore(self, cell: str) -> bool:
        """Take back a finished cell that was superseded, if it is whole; returns whether there was one."""
        aside = self.superseded / cell
        try:
            files, about = self.done_in(aside)["files"], self.about(aside)
        except (FileNotFoundError, ValueError):
            return False
        found = hashing.of_files(aside)
        if any(found.get(name) != digest for name, digest in files.items()):
            return False
        self._make_room(cell, about)
        os.rename(self.superseded / cell, self.done_path(cell))
        self._forget_failures(about)
        return True

    def _forget_failures(self, about: Mapping[str, Any]) -> None:
        """Remove accounts of failures at what is finished now, whatever code, data or settings they were with."""
        for file in (self.path / FAILURES).glob(f"*/{CELL}"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                if place(self.about(file.parent)) == place(about):
                    _remove(file.parent)

    def _make_room(self, cell: str, about: Mapping[str, Any]) -> None:
        """Put aside finished cells that answered the same question otherwise, and what is in the place of this one.

        Another runner may be doing the same.
        """
        for other in self._moved():
            # Nothing is known of what a damaged one answered.
            with contextlib.suppress(FileNotFoundError, ValueError):
                if other != cell and asks_the_same(self.about(self.done_path(other)), about):
                    self._put_aside(other, other)
        with contextlib.suppress(FileNotFoundError):
            self._put_aside(cell, f"{cell}{_UNFINISHED}")

    def _put_aside(self, cell: str, name: str) -> None:
        aside = self.superseded / name
        self.superseded.mkdir(exist_ok=True)
        try:
            os.rename(self.done_path(cell), aside)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (aside / DONE).is_file():
                _remove(self.done_path(cell))
                return
            _remove(aside)
            os.rename(self.done_path(cell), aside)

    def finished(self) -> list[str]:
        """Ids of all finished cells that are whole, those of other plans included."""
        return [cell for cell in self._moved() if self.damage(cell) is None]

    def _moved(self) -> list[str]:
        return sorted(file.parent.name for file in (self.path / CELLS).glob(f"*/{DONE}"))

    @staticmethod
    def about(folder: Path) -> dict[str, Any]:
        """What `cell.json` says.

        Raises:
            ValueError: If it is damaged.
        """
        return accounts.read(folder / CELL, study_files.About)

    @staticmethod
    def done_in(folder: Path) -> dict[str, Any]:
        """What `done.json` says.

        Raises:
            ValueError: If it is damaged.
        """
        return accounts.read(folder / DONE, study_files.Done)

    def done(self, cell: str) -> dict[str, Any]:
        """What `done.json` of a finished cell says."""
        return self.done_in(self.done_path(cell))


def _forget(measured: Path) -> None:
    """Remove what is remembered of a cell's files, where that is allowed; nothing depends on it."""
    if measured.is_symlink():
        return
    with contextlib.suppress(OSError):
        (measured / _STATES).unlink(missing_ok=True)
        measured.rmdir()


def _states(file: Path) -> dict[str, Any]:
    """Name → size, times and SHA-256 of a file when it was last hashed; empty where nothing, or nonsense, is kept."""
    with contextlib.suppress(OSError, ValueError):
        return read_json(file)
    return {}


def asks_the_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two cells differ only in what answered them."""
    settings = ("model", "model_args", "batch_size", "processes")
    return place(one) == place(other) and all(one.get(name) == other.get(name) for name in settings)


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    replace_text(path, text)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, first of all what says that a cell is whole, should this be killed on the way.

    What a link leads to is left alone.
    """
    folder = path.is_dir() and not path.is_symlink()
    with contextlib.suppress(FileNotFoundError):
        for end in (DONE, FAILED) if folder else ():
            (path / end).unlink(missing_ok=True)
        shutil.rmtree(path) if folder else path.unlink()
