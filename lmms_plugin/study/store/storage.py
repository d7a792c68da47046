"""Finished cells in shared storage: any place that fsspec can open by a URL."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

from lmms_plugin.analysis.study_files import CELLS, DONE, STUDY
from lmms_plugin.study.store.folder import StudyFolder


@dataclass(frozen=True)
class Storage:
    """A shared place for finished cells.

    It has no rename: a cell is finished there when its `done.json` exists, which is written last.

    Attributes:
        system: File system of fsspec.
        root: Folder in it.
    """

    system: Any
    root: str

    @classmethod
    def at(cls, url: str) -> Storage:
        """Open a place.

        Raises:
            ValueError: fsspec does not know the kind of place.
            ImportError: The library for it is missing.
        """
        from fsspec.core import url_to_fs

        return cls(*url_to_fs(url))

    def has(self, cell: str) -> bool:
        """Return whether a cell is finished there."""
        found: bool = self.system.exists(self._path(cell, DONE))
        return found

    def put(self, cell: str, folder: StudyFolder) -> None:
        """Copy a finished cell to the storage."""
        path = folder.done_path(cell)
        for name in (*folder.done(cell)["files"], DONE):
            self.system.makedirs(posixpath.dirname(self._path(cell, name)), exist_ok=True)
            self.system.put_file(str(path / name), self._path(cell, name))

    def fetch(self, cell: str, folder: StudyFolder) -> bool:
        """Copy a finished cell, whose lock the caller holds, from the storage, and return whether there was one.

        Raises:
            ValueError: A file differs from the one that was stored.
        """
        if not self.has(cell):
            return False
        work = folder.begin(cell)
        self.system.get_file(self._path(cell, DONE), str(work / DONE))
        for name in folder.listed(work):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            self.system.get_file(self._path(cell, name), str(work / name))
        folder.adopt(cell)
        return True

    def put_study(self, folder: StudyFolder) -> None:
        """Copy the study file to the storage."""
        self.system.makedirs(self.root, exist_ok=True)
        self.system.put_file(str(folder.path / STUDY), posixpath.join(self.root, STUDY))

    def _path(self, cell: str, name: str) -> str:
        return posixpath.join(self.root, CELLS, cell, name)
