"""Servers that cells of one launch command share: each is started for the first of them and ended after the last."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lmms_plugin.study.file.grid import Cell
from lmms_plugin.utils import hashing
from lmms_plugin.utils.processes import lent_servers
from lmms_plugin.utils.processes.launch_command import LaunchCommand
from lmms_plugin.utils.processes.servers import Server

FOLDER = ".servers"
"""Name of the folder of logs, in the folder of the study."""
_LENGTH = 12


class _Key(NamedTuple):
    """What cells of one server have in common."""

    command: str
    gpus: int | None


class _Shared(NamedTuple):
    server: Server
    gpus: tuple[str, ...]
    file: Path
    lent: Mapping[str, str]


@dataclass
class SharedServers:
    """Servers of a study on this machine.

    Attributes:
        folder: Folder for their logs.
    """

    folder: Path
    _running: dict[_Key, _Shared] = field(default_factory=dict)

    @property
    def gpus(self) -> frozenset[str]:
        """GPUs that servers occupy."""
        running = (shared for shared in self._running.values() if shared.server.ended is None)
        return frozenset(gpu for shared in running for gpu in shared.gpus)

    def gpus_of(self, cell: Cell) -> tuple[str, ...] | None:
        """Return the GPUs of the server that runs for a cell; None if none runs."""
        key = _key(cell)
        shared = None if key is None else self._running.get(key)
        return None if shared is None or shared.server.ended is not None else shared.gpus

    def lend(self, cell: Cell, gpus: tuple[str, ...]) -> Mapping[str, str]:
        """Return the variables by which a cell finds its server, which is started if it does not run.

        Args:
            cell: Cell that is about to start.
            gpus: GPUs of the server.

        Returns:
            Variables; empty for a cell without such a server, and for one whose server cannot be started here: that
            cell tries it itself, and its log says why it cannot.
        """
        key, command = _key(cell), cell.launch
        if key is None or command is None:
            return {}
        if self.gpus_of(cell) is None:
            self._end(key)
            try:
                self._running[key] = self._started(key, command, gpus)
            except ValueError:
                return {}
        return self._running[key].lent

    def _started(self, key: _Key, command: LaunchCommand, gpus: tuple[str, ...]) -> _Shared:
        # Cells run in folders of their own.
        folder = self.folder.absolute()
        folder.mkdir(exist_ok=True)
        # Several runners may work on one folder.
        name = f"{hashing.of_value(list(key))[:_LENGTH]}-{os.getpid()}"
        file = folder / f"{name}.json"
        server = Server.of(command, folder / f"{name}.log", {"CUDA_VISIBLE_DEVICES": ",".join(gpus)})
        return _Shared(server, gpus, file, lent_servers.lend(server, command, file))

    def end_unused(self, cells: Iterable[Cell]) -> None:
        """End the servers that none of these cells needs."""
        needed = {_key(cell) for cell in cells}
        for key in [key for key in self._running if key not in needed]:
            self._end(key)

    def _end(self, key: _Key) -> None:
        shared = self._running.pop(key, None)
        if shared is not None:
            lent_servers.end(shared.server, shared.file)


def _key(cell: Cell) -> _Key | None:
    command = cell.launch
    return None if command is None else _Key(command.text, cell.resources.gpus)
