"""Installed commands in processes of their own that need not import the libraries of others first.

Tests whose point is how a process starts, is launched or is told of settings of libraries use `environments.run`.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock
from helpers import environments, preloaded

BIN = Path(sys.executable).parent
OF_EACH_COMMAND = ("LMMS_", "COLUMNS", "PYTEST_", "CUBLAS_", "RAY_", "PYTHONBREAKPOINT")
"""What variables begin with that may be others for each command: no library reads them when it is imported.

AutoRound sets one of cuBLAS's in the process that it quantizes in, Ray the last two where it is used."""


class Commands:
    """A connection to the process that all test workers share, started by the first that needs it."""

    def __init__(self, folder: Path) -> None:
        """Connect; `folder` is the one that all test workers share."""
        self._log = folder / "preloaded.log"
        self._environment = environments.settings()
        with FileLock(folder / "preloaded.lock"):
            self._socket = self._connected(folder / "preloaded.socket")
        self._answers = self._socket.makefile("rb")

    def _connected(self, named: Path) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        if named.is_file():
            try:
                client.connect(named.read_text())
                return client
            except OSError:
                # Nobody was connected for a moment.
                pass
        # Paths of sockets may have a hundred characters, which folders of tests often exceed.
        address = f"{tempfile.mkdtemp()}/socket"
        command = [sys.executable, "-P", preloaded.__file__, address]
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while True:
            try:
                client.connect(address)
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended:\n{self._log.read_text()[-4000:]}") from None
                time.sleep(0.05)
        named.write_text(address)
        return client

    def close(self) -> None:
        """Leave; with the last worker the process ends."""
        self._answers.close()
        self._socket.close()

    def run(self, name: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment with one thread and no network.

        Raises:
            ValueError: A variable differs that libraries read when they are imported.
        """
        given = environments.settings(**environment)
        differing = {key for key, _ in given.items() ^ self._environment.items() if not key.startswith(OF_EACH_COMMAND)}
        if differing:
            raise ValueError(f"expected variables of this package, got {sorted(differing)}: use environments.run")
        command = [str(BIN / name), *map(str, arguments)]
        with tempfile.TemporaryDirectory() as folder:
            files = {stream: f"{folder}/{stream}" for stream in ("stdout", "stderr")}
            request = {"command": command, "cwd": str(cwd), "environment": given, **files}
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            answer = self._answers.readline()
            if not answer:
                raise RuntimeError(f"the process of preloaded libraries has ended:\n{self._log.read_text()[-4000:]}")
            printed = {stream: Path(file).read_text(errors="replace") for stream, file in files.items()}
        return subprocess.CompletedProcess(command, int(answer), **printed)

    def output(self, name: str, *arguments: object, cwd: Path, **environment: str) -> str:
        """Return what a command prints; raises with its output if it fails."""
        return environments.output_of(self.run(name, *arguments, cwd=cwd, **environment))
