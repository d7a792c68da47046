"""Libraries that the cells of a study share: imported once, for all cells that see as many GPUs of this machine.

A cell still has a process of its own, a copy of one in which no cell has run (`lmms_plugin.utils.processes.preloaded`):
nothing of one cell reaches another. What libraries find out when they are imported may depend on whether there are
GPUs, and on how many: cells on the CPU and cells on GPUs are copies of different processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmms_plugin.study.file.identity import Keyed
from lmms_plugin.utils.processes import preloaded
from lmms_plugin.utils.processes.preloaded import VISIBLE_GPUS, Preloaded
from lmms_plugin.utils.variables import PREFIX

LOG = ".libraries.log"
"""Name of the log of the process, in the folder of the study."""


@dataclass
class SharedLibraries:
    """Processes of imported libraries, each started for the first cell that can use it.

    Attributes:
        log: File for what the processes print themselves.
        wanted: Whether to share any.
    """

    log: Path
    wanted: bool = preloaded.POSSIBLE
    _processes: dict[int, Preloaded] = field(default_factory=dict)
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
        if self._other_versions(keyed):
            self.end()
        gpus = len(environment.get(VISIBLE_GPUS, "").replace(",", " ").split())
        try:
            process = self._process(gpus, environment)
        except OSError:
            self.wanted = False
            return None
        self._versions = {**keyed.parts["versions"], **self._versions}
        differing = {name for name, _ in environment.items() ^ process.environment.items()} - {VISIBLE_GPUS}
        # Libraries may read any other variable when they are imported.
        return process if all(name.startswith(PREFIX) for name in differing) else None

    def _process(self, gpus: int, environment: Mapping[str, str]) -> Preloaded:
        process = self._processes.get(gpus)
        if process is None or process.over:
            log = self.log if not gpus else self.log.with_stem(f"{self.log.stem}_{gpus}_gpus")
            process = self._processes[gpus] = Preloaded.start(environment, log)
        return process

    def leave_alone(self, keyed: Keyed) -> None:
        """Have a cell import libraries by itself from now on."""
        self._alone.add(keyed.id)

    def end(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.end()
        self._processes, self._versions = {}, {}

    def _other_versions(self, keyed: Keyed) -> bool:
        now: Mapping[str, str] = keyed.parts["versions"]
        return any(self._versions.get(name, version) != version for name, version in now.items())
