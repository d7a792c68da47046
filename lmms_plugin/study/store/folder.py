"""The folder of a study: finished, failed and running cells, safe against a kill at any moment.

A cell is finished when its folder is below `cells/`; one rename of a complete folder moves it there. Work happens below
`.running/`, under a lock that the operating system releases when its process ends for whatever reason.
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
    """Exclusive right to work on one cell, until `release` or the end of all processes that hold it.

    Attributes:
        path: Path of the lock file.
        descriptor: Descriptor of the open file, which child processes may inherit.
    """

    path: Path
    descriptor: int

    @classmethod
    def take(cls, path: Path) -> Lock | None:
        """Acquire a lock; None if another process holds it."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            # Its last owner may have removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return cls(path, descriptor)
            os.close(descriptor)

    def release(self) -> None:
        """Release the lock."""
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study.

    Attributes:
        path: Path of the folder.
    """

    path: Path

    @property
    def running(self) -> Path:
        """Folder of unfinished work."""
        return self.path / ".running"

    @property
    def superseded(self) -> Path:
        """Folder of finished cells that were run again with other code, data or versions."""
        return self.path / ".superseded"

    def done_path(self, cell: str) -> Path:
        """Return the folder of a finished cell."""
        return self.path / CELLS / cell

    def failed_path(self, cell: str) -> Path:
        """Return the folder of a failed cell."""
        return self.path / FAILURES / cell

    def is_done(self, cell: str) -> bool:
        """Return whether a cell is finished and all its files are unchanged."""
        return (self.done_path(cell) / DONE).is_file() and self.damage(cell) is None

    def damage(self, cell: str) -> str | None:
        """Return what is wrong with the files of a finished cell; None if nothing is, or the cell is not finished.

        A file is unchanged if its size and times are those at which it was last hashed; any other file is hashed again.
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
            # Without this file the next check only takes longer.
            with contextlib.suppress(OSError):
                remembered.parent.mkdir(parents=True, exist_ok=True)
                replace_text(remembered, json.dumps(told))
        return None

    def damaged(self) -> dict[str, str]:
        """Return the cells that were finished and are damaged now, and what is wrong with each."""
        found = {cell: self.damage(cell) for cell in self._moved()}
        return {cell: damage for cell, damage in found.items() if damage is not None}

    def has_failed(self, cell: str) -> bool:
        """Return whether the last attempt at a cell failed."""
        return (self.failed_path(cell) / FAILED).is_file() and not self.is_done(cell)

    def failure(self, cell: str) -> dict[str, Any] | None:
        """Return the content of a cell's `failed.json`; None if it has not failed."""
        if self.is_done(cell):
            return None
        try:
            return {"problem": "unknown"} | accounts.read(self.failed_path(cell) / FAILED, study_files.FailureAccount)
        except FileNotFoundError:
            return None
        except ValueError as error:
            return {"problem": str(error), "returncode": None, "tail": ""}

    def is_running(self, cell: str) -> bool:
        """Return whether a process works on a cell now."""
        path = self.running / f"{cell}{_LOCK}"
        if not path.exists():
            return False
        lock = Lock.take(path)
        if lock is not None:
            lock.release()
        return lock is None

    def open(self, study_file: Path) -> None:
        """Create the folder, store the study file in it, and remove what killed runners left.

        Raises:
            ValueError: The folder holds something other than a study, or a link where work is removed.
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
        """Return whether the folder holds other files than a study's; a starting runner may have written none yet."""
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
        """Lock a cell for work; None if another runner holds it."""
        return Lock.take(self.running / f"{cell}{_LOCK}")

    def begin(self, cell: str) -> Path:
        """Return an empty folder for work on a cell whose lock the caller holds."""
        path = self.running / cell
        _remove(path)
        path.mkdir()
        return path

    def discard(self, cell: str) -> None:
        """Discard the work on a cell whose lock the caller holds."""
        _remove(self.running / cell)

    def finish(self, cell: str, about: Mapping[str, Any], done: Mapping[str, Any]) -> None:
        """Turn the work on a cell into a finished cell, by one rename.

        Args:
            cell: Id of the cell.
            about: Content of `cell.json`.
            done: Content of `done.json`, to which the hashes of all files are added.
        """
        work = self.running / cell
        write_json(work / CELL, about)
        write_json(work / DONE, {**done, "files": hashing.of_files(work)})
        self._move_to_finished(cell, about)

    def adopt(self, cell: str) -> None:
        """Turn a copy of a finished cell, made in the folder of its work, into a finished cell.

        Raises:
            ValueError: A file is missing or does not match its hash.
        """
        work = self.running / cell
        expected, found = self.done_in(work)["files"], hashing.of_files(work)
        for name, digest in expected.items():
            if found.get(name) != digest:
                raise ValueError(f"expected {name} of {cell} as it was finished, got another or none in {work}")
        self._move_to_finished(cell, self.about(work))

    @classmethod
    def listed(cls, folder: Path) -> list[str]:
        """Return the files that `done.json` of a folder lists.

        Raises:
            ValueError: It is damaged, or lists a file outside the folder.
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
        """Record that a cell failed; of its work only the log is kept."""
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
        """Restore a superseded cell if it is undamaged, and return whether there was one."""
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
        """Remove records of failures at the question that is answered now, whatever code or data they had."""
        for file in (self.path / FAILURES).glob(f"*/{CELL}"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                if place(self.about(file.parent)) == place(about):
                    _remove(file.parent)

    def _make_room(self, cell: str, about: Mapping[str, Any]) -> None:
        """Move away finished cells that answered the same question otherwise, and whatever is in the place of this one.

        Another runner may do the same at the same time.
        """
        for other in self._moved():
            # The question of a damaged cell is unknown.
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
        """Return the ids of all undamaged finished cells, those of other plans included."""
        return [cell for cell in self._moved() if self.damage(cell) is None]

    def _moved(self) -> list[str]:
        return sorted(file.parent.name for file in (self.path / CELLS).glob(f"*/{DONE}"))

    @staticmethod
    def about(folder: Path) -> dict[str, Any]:
        """Return the content of `cell.json`.

        Raises:
            ValueError: It is damaged.
        """
        return accounts.read(folder / CELL, study_files.About)

    @staticmethod
    def done_in(folder: Path) -> dict[str, Any]:
        """Return the content of `done.json`.

        Raises:
            ValueError: It is damaged.
        """
        return accounts.read(folder / DONE, study_files.Done)

    def done(self, cell: str) -> dict[str, Any]:
        """Return the content of a finished cell's `done.json`."""
        return self.done_in(self.done_path(cell))


def _forget(measured: Path) -> None:
    """Remove the remembered state of a cell's files, where that is permitted; nothing depends on it."""
    if measured.is_symlink():
        return
    with contextlib.suppress(OSError):
        (measured / _STATES).unlink(missing_ok=True)
        measured.rmdir()


def _states(file: Path) -> dict[str, Any]:
    """Return name → size, times and SHA-256 of a file when it was last hashed; empty if none or invalid."""
    with contextlib.suppress(OSError, ValueError):
        return read_json(file)
    return {}


def asks_the_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two cells ask the same question, with whatever code, data and versions."""
    settings = ("model", "model_args", "batch_size", "processes")
    return place(one) == place(other) and all(one.get(name) == other.get(name) for name in settings)


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    replace_text(path, text)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; the mark of a finished cell goes first, in case of a kill on the way.

    The target of a link is not touched.
    """
    folder = path.is_dir() and not path.is_symlink()
    with contextlib.suppress(FileNotFoundError):
        for end in (DONE, FAILED) if folder else ():
            (path / end).unlink(missing_ok=True)
        shutil.rmtree(path) if folder else path.unlink()
