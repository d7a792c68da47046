"""A server that one process starts and lends to others, which learn of it, and of its end, by two files.

As long as the server runs, its guard holds a lock on one of them, which the operating system takes back however the
guard ends; so no number of a process is trusted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmms_plugin.utils.files import read_json, replace_text
from lmms_plugin.utils.processes.launch_command import LaunchCommand
from lmms_plugin.utils.processes.servers import RunningServer, Server
from lmms_plugin.utils.variables import LENT_SERVER

_LOCK = ".lock"


@dataclass
class LentServer(RunningServer):
    """A server that another process has started.

    Attributes:
        log: File of its output.
        port: Port on 127.0.0.1.
        lock: File that is locked while it runs.
    """

    log: Path
    port: int
    lock: Path
    _since: float = field(default_factory=time.monotonic, init=False, repr=False)

    @classmethod
    def of(cls, environment: Mapping[str, str], command: LaunchCommand) -> LentServer | None:
        """Return the server that is lent to this process; None if none is that this command would start.

        Args:
            environment: Variables of this process.
            command: Command that would start it.

        Raises:
            ValueError: The file about it is damaged.
        """
        file = environment.get(LENT_SERVER)
        if not file:
            return None
        told = read_json(Path(file))
        if told.get("command") != command.text:
            return None
        try:
            return cls(Path(told["log"]), int(told["port"]), Path(told["lock"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"expected log, port and lock of a server in {file}, got {told}") from error

    @property
    def ended(self) -> str | None:
        """How it has ended, in words; None while it runs."""
        try:
            descriptor = os.open(self.lock, os.O_RDONLY)
        except FileNotFoundError:
            return "has been ended by the study that started it"
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        finally:
            os.close(descriptor)
        return "has ended"

    def stop(self) -> None:
        """Leave it to the process that has started it."""


def lend(server: Server, command: LaunchCommand, file: Path) -> dict[str, str]:
    """Start a server that others may use.

    Args:
        server: Server that the command starts.
        command: Command that borrowers must name.
        file: File about it, for borrowers.

    Returns:
        Variables for the processes of borrowers.

    Raises:
        ValueError: Its port is taken.
    """
    lock = file.with_name(f"{file.name}{_LOCK}")
    with _locked(lock) as descriptor:
        server.start(inherited=(descriptor,))
    told = {"command": command.text, "log": str(server.log), "port": server.port, "lock": str(lock)}
    replace_text(file, json.dumps(told))
    return {LENT_SERVER: str(file)}


def end(server: Server, file: Path) -> None:
    """End a server that was lent, and remove the files about it."""
    server.stop()
    file.unlink(missing_ok=True)
    file.with_name(f"{file.name}{_LOCK}").unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[int]:
    """Open and lock a file; who inherits the descriptor goes on holding the lock."""
    lock.unlink(missing_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
