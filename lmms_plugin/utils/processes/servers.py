"""A server as a child process: started by its command, waited for, and ended with everything it started.

What ends it is a guard (see `guard`), so that it also ends when this process is killed with SIGKILL (seen on Linux).
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from lmms_plugin.utils.messages import one_line
from lmms_plugin.utils.processes import guard, process_log
from lmms_plugin.utils.processes.launch_command import PORT, LaunchCommand

Found = TypeVar("Found")
HOST = "127.0.0.1"
GRACE = 15.0
"""Seconds that a server has between SIGTERM and SIGKILL."""
_TELLING = (
    re.compile(r"\b(?:\w+\.)*\w*(?:Error|Exception)\b: .*"),
    re.compile(r".*\b(?:error|failed|fatal)\b.*", re.I),
)
"""Patterns of lines that tell why a process ended, the best first."""
_NOT_THE_CAUSE = "See root cause above"
_LAST_LINES, _LOOKED_AT, _LAST_LETTERS, _SAID = 20, 100, 64_000, 300
_LONGEST_LINE = 1000
"""Letters of a line that are looked at: the search takes time that grows with the square of their number."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


class ServerFailed(ValueError):
    """A server that was started and does not answer; the message is one line that names its log.

    Attributes:
        log_end: Last lines of the log.
    """

    def __init__(self, problem: str, log: Path) -> None:
        written = [line[:_LONGEST_LINE] for line in process_log.lines(_end_of(log).rstrip())]
        self.log_end = "\n".join(written[-_LAST_LINES:])
        said = _telling(written)
        super().__init__(f"{problem}{f'; it says: {said}' if said else ''} (log: {log})")


class RunningServer(ABC):
    """A server on this machine, whoever has started it.

    Attributes:
        log: File of its output.
        port: Port on 127.0.0.1.
    """

    log: Path
    port: int
    _since: float

    @property
    def address(self) -> str:
        """Its address, without a path."""
        return f"http://{HOST}:{self.port}"

    @property
    @abstractmethod
    def ended(self) -> str | None:
        """How it has ended, in words; None while it runs."""

    @abstractmethod
    def stop(self) -> None:
        """End it, if it is this process's to end."""

    def expect_running(self) -> None:
        """Raise an error if it has ended.

        Raises:
            ServerFailed: It has; says how, and what it last said.
        """
        if (ended := self.ended) is not None:
            raise ServerFailed(f"the server {ended}", self.log)

    def wait(self, ready: Callable[[float], Found], seconds: float, not_yet: type[Exception]) -> Found:
        """Wait until it is ready.

        Args:
            ready: Asks it, within the given seconds, for whatever shows that it is; called as soon as it listens.
            seconds: Time limit, from its start.
            not_yet: Exception that `ready` raises while it is not; others are passed on.

        Returns:
            What `ready` returned.

        Raises:
            ServerFailed: It ended, or was not ready in time.
        """
        last = f"nothing listens on port {self.port}"
        while True:
            self.expect_running()
            waited = time.monotonic() - self._since
            if waited >= seconds:
                raise ServerFailed(f"the server did not answer within {seconds:g} s of its start ({last})", self.log)
            if _listens(self.port):
                try:
                    return ready(seconds - waited)
                except not_yet as error:
                    last = one_line(error)
            time.sleep(min(_LONGEST_PAUSE, _SHORTEST_PAUSE + waited / 20))


@dataclass
class Server(RunningServer):
    """A server that this process starts.

    Attributes:
        command: Program and arguments; `{port}` stands for the port.
        log: File for its output.
        port: Port on 127.0.0.1; 0 to choose a free one when it is started.
        environment: Variables beside those of this process, likewise with `{port}`.
        folder: Working directory; None for the current one.
        grace: Seconds between SIGTERM and SIGKILL when it is ended.
    """

    command: Sequence[str]
    log: Path
    port: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    grace: float = GRACE
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _since: float = field(default_factory=time.monotonic, init=False, repr=False)

    @classmethod
    def of(cls, command: LaunchCommand, log: Path, environment: Mapping[str, str] | None = None) -> Self:
        """Return the server that a command starts; it is not started yet.

        Args:
            command: Command of the server.
            log: File for its output.
            environment: Further variables beside those of this process; the command's own come first.
        """
        return cls(command.words, log, command.port or 0, {**(environment or {}), **command.environment})

    def start(self, *, inherited: Sequence[int] = ()) -> Self:
        """Start it; returns at once.

        Args:
            inherited: File descriptors that stay open as long as it runs, for locks.

        Raises:
            ValueError: The port is taken.
        """
        if self.port:
            expect_free(self.port)
        else:
            self.port = free_port()
        filled = {name: self._filled(value) for name, value in self.environment.items()}
        self._since = time.monotonic()
        self._process = guard.start(
            [self._filled(word) for word in self.command],
            self.log,
            folder=self.folder,
            environment={**os.environ, **filled},
            inherited=inherited,
            grace=self.grace,
        )
        return self

    def _filled(self, text: str) -> str:
        return text.replace(PORT, str(self.port))

    @property
    def ended(self) -> str | None:
        """How it has ended, in words; None while it runs."""
        status = None if self._process is None else self._process.poll()
        return None if status is None else process_log.ending(status)

    @property
    def pid(self) -> int | None:
        """Id of the process whose descendants are the server; None if it was not started."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """End it and everything it started, and wait until all of it has ended; nothing if it does not run."""
        if self._process is not None:
            guard.end(self._process)

    def __enter__(self) -> Self:
        return self if self._process is not None else self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def expect_free(port: int) -> None:
    """Refuse a port on which something listens.

    Raises:
        ValueError: Something does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"port {port} of this machine cannot be used ({error.strerror}): end what listens there, or write "
                f"{PORT} in its place, for which a free one is chosen"
            ) from error


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def _end_of(log: Path) -> str:
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LAST_LETTERS))
            return stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _telling(written: Sequence[str]) -> str:
    """Return the line of a log that most probably tells why its process ended."""
    lines = [line.strip() for line in written[-_LOOKED_AT:] if line.strip() and _NOT_THE_CAUSE not in line]
    found = (match[0] for pattern in _TELLING for line in reversed(lines) if (match := pattern.search(line)))
    said = " ".join(next(found, lines[-1] if lines else "").split())
    return said if len(said) <= _SAID else f"{said[:_SAID]}…"
