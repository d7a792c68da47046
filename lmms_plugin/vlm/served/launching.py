"""A server that is started for a run, ready once it has answered, and ended with the run."""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

from loguru import logger

from lmms_plugin.utils.processes.servers import Server, ServerFailed
from lmms_plugin.vlm.served.client import Passing, ServerError

Found = TypeVar("Found")
_TOLD_SECONDS = 60.0
_MOST_BROKEN = 10
"""Answers of status 500 in a row after which a server counts as broken, and not as one that is starting."""


@dataclass
class Launched:
    """A server that this process has started; it ends with this object, or with the process, however that ends.

    Attributes:
        server: Started.
        seconds: From its start until it must have answered.
        keeps_log: Whether the log stays after a run that went well.
    """

    server: Server
    seconds: float
    keeps_log: bool = True
    _said: bool = field(default=False, init=False, repr=False)
    _told: float = field(default_factory=time.monotonic, init=False, repr=False)

    def __post_init__(self) -> None:
        self._ends = weakref.finalize(self, self.server.stop)

    @classmethod
    def start(cls, server: Server, seconds: float, *, keeps_log: bool = True) -> Launched:
        """Start a server.

        Raises:
            ValueError: its port is taken.
        """
        launched = cls(server.start(), seconds, keeps_log)
        logger.info("started a server on port {}: its log is {}", server.port, server.log)
        return launched

    @property
    def base_url(self) -> str:
        """Address of its API."""
        return f"{self.server.address}/v1"

    def wait(self, ask: Callable[[float], Found]) -> Found:
        """Wait until a request succeeds, and return its result.

        A server that says that it is healthy may still fail at its first image, so `ask` is to ask about one.

        Args:
            ask: Makes the request within the given seconds; raises `Passing` for what may pass.

        Raises:
            ServerError: the server ended, does not work, or was not ready in time; the end of its log is logged.
        """
        broken = 0

        def told(left: float) -> Found:
            nonlocal broken
            if time.monotonic() - self._told >= _TOLD_SECONDS:
                self._told = time.monotonic()
                logger.info("waiting for the server, for {:.0f} s at most: its log is {}", left, self.server.log)
            try:
                return ask(left)
            except Passing as error:
                broken = broken + 1 if error.status == HTTPStatus.INTERNAL_SERVER_ERROR else 0
                if broken == _MOST_BROKEN:
                    raise ServerError(f"{error} ({broken} times in a row; log: {self.server.log})") from error
                raise

        try:
            return self.server.wait(told, self.seconds, Passing)
        except ServerFailed as error:
            raise self._explained(error) from error

    def expect_running(self) -> None:
        """Raise an error if it has ended.

        Raises:
            ServerError: it has; the end of its log is logged.
        """
        try:
            self.server.expect_running()
        except ServerFailed as error:
            raise self._explained(error) from error

    def _explained(self, error: ServerFailed) -> ServerError:
        # Many requests are in flight when a server ends.
        if not self._said:
            self._said = True
            logger.error("the end of {}:\n{}", self.server.log, error.log_end)
        return ServerError(str(error))

    def end(self) -> None:
        """End it after a run that went well."""
        self._ends()
        if not self.keeps_log:
            self.server.log.unlink(missing_ok=True)


def temporary_log() -> Path:
    """Return a new file for the output of a server."""
    with tempfile.NamedTemporaryFile(prefix="lmms-plugin-server-", suffix=".log", delete=False) as file:
        return Path(file.name)
