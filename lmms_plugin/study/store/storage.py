"""Finished cells in shared storage: any place that fsspec knows by a URL."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

from lmms_plugin.analysis.study_files import CELLS, DONE, STUDY
from lmms_plugin.study.store.folder import StudyFolder


@dataclass(frozen=True)
class Storage:
    """A place for finished cells.

    It has no rename, so there a cell is finished when its `done.json` is there, which is written last.

    Attributes:
        system: Of fsspec.
        root: Folder in it.
    """

    system: Any
    root: str

    @classmethod
    def at(cls, url: str) -> Storage:
        """Open a place.

        Raises:
            ValueError: If fsspec knows no such kind of place.
            ImportError: If the library for it is missing.
        """
        from fsspec.core import url_to_fs

        return cls(*url_to_fs(url))

    def has(self, cell: str) -> bool:
        """Whether a cell is finished there."""
        found: bool = self.system.exists(self._path(cell, DONE))
        return found

    def put(self, cell: str, folder: StudyFolder) -> None:
        """Copy a finished cell there."""
        path = folder.done_path(cell)
        for name in (*folder.done(cell)["files"], DONE):
            self.system.makedirs(posixpath.dirname(self._path(cell, name)), exist_ok=True)
            self.system.put_file(str(path / name), self._path(cell, name))

    def fetch(self, cell: str, folder: StudyFolder) -> bool:
        """Copy a finished cell, whose lock the caller has, from there; returns whether there was one.

        Raises:
            ValueError: If a file is not the one that was put there.
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
        """Copy the study file there."""
        self.system.makedirs(self.root, exist_ok=True)
        self.system.put_file(str(folder.path / STUDY), posixpath.join(self.root, STUDY))

    def _path(self, cell: str, name: str) -> str:
        return posixpath.join(self.root, CELLS, cell, name)
