"""Libraries that the cells of a study share: imported once, for all cells that run on the CPU of this machine.

A cell still has a process of its own, a copy of one in which no cell has run (`lmms_plugin.utils.processes.preloaded`):
nothing of one cell reaches another. The driver of a GPU may not outlive such copying: cells on GPUs import by
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmms_plugin.study.file.identity import Keyed
from lmms_plugin.utils.processes import preloaded
from lmms_plugin.utils.processes.preloaded import Preloaded
from lmms_plugin.utils.variables import PREFIX

LOG = ".libraries.log"
"""Name of the log of the process, in the folder of the study."""


@dataclass
class SharedLibraries:
    """Process of imported libraries, started for the first cell that can use it.

    Attributes:
        log: File for what the process prints itself.
        wanted: Whether to share any.
    """

    log: Path
    wanted: bool = preloaded.POSSIBLE
    _process: Preloaded | None = None
    _versions: Mapping[str, str] = field(default_factory=dict)
    _alone: set[str] = field(default_factory=set)

    def of(self, keyed: Keyed, environment: Mapping[str, str]) -> Preloaded | None:
        """Return the process that can run a cell; None if the cell has to import libraries by itself.

        Args:
            keyed: Cell with its key.
            environment: Environment of the cell.
        """
        if not self.wanted or keyed.cell.resources.processes > 1 or keyed.id in self._alone:
            return None
        if self._process is not None and (self._process.over or self._other_versions(keyed)):
            self.end()
        try:
            process = self._process or Preloaded.start(environment, self.log)
        except OSError:
            self.wanted = False
            return None
        self._process, self._versions = process, {**keyed.parts["versions"], **self._versions}
        differing = {name for name, _ in environment.items() ^ process.environment.items()}
        # Libraries may read any other variable when they are imported.
        return process if all(name.startswith(PREFIX) for name in differing) else None

    def leave_alone(self, keyed: Keyed) -> None:
        """Have a cell import libraries by itself from now on."""
        self._alone.add(keyed.id)

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.end()
        self._process, self._versions = None, {}

    def _other_versions(self, keyed: Keyed) -> bool:
        now: Mapping[str, str] = keyed.parts["versions"]
        return any(self._versions.get(name, version) != version for name, version in now.items())
