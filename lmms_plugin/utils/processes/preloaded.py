"""A process that holds the libraries of others imported, and becomes a command in a copy of itself.

Importing them takes `lmms-eval` as long as much of what small runs have it do. A copy has arguments, environment,
working folder, output and exit status of its own, and imports lmms-eval and this package anew, in the order of any
other start. Beside each copy stands its guard, which ends whatever the copy leaves behind. Linux alone.

A copy may use GPUs as long as the process itself has not initialised CUDA, which no copy outlives. It asks how many
GPUs there are by NVML alone, and computes nothing. A copy that is to see GPUs looks whether it can, before anything
else; where it cannot, since some library initialised CUDA while it was imported (torchao does), it starts the command
anew, as if there were no such process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmms_plugin.utils.processes import guard

POSSIBLE = sys.platform == "linux"
LIBRARIES = (
    *("torch", "transformers", "datasets", "evaluate", "accelerate", "sacrebleu", "nltk", "sklearn.metrics"),
    *("scipy.stats", "pytablewriter", "aiohttp", "loguru", "rich.console", "pydantic", "tenacity", "typer"),
)
"""What `lmms-eval` imports of others."""
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_WITHOUT_DRIVER = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Has torch count GPUs without initialising CUDA, while libraries are imported."""
_THIS = "lmms_plugin.utils.processes.preloaded"
_MOST_BYTES, _MOST_FILES = 1 << 17, 4
_LOOK_SECONDS = 0.05


@dataclass
class Copy:
    """A command that a copy runs, with the part of `subprocess.Popen` that a runner needs.

    Attributes:
        returncode: Exit status; 128 plus the number of the signal that ended it, as of any guarded command; None while
            it runs.
    """

    _connection: socket.socket
    returncode: int | None = field(default=None, init=False)

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._hear()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it and everything it started have ended; return the exit status.

        Args:
            timeout: Seconds to wait at most; None for as long as it takes.

        Raises:
            subprocess.TimeoutExpired: It was still running then.
        """
        if self.returncode is None:
            if timeout is not None and not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a copy of the libraries' process", timeout)
            self._hear()
        assert self.returncode is not None
        return self.returncode

    def end(self) -> None:
        """End it with everything it started, and wait until all of it has ended."""
        # Its guard sees that nobody listens any longer.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        self.wait()
        self._connection.close()

    def _hear(self) -> None:
        try:
            said = self._connection.recv(_MOST_BYTES)
        except OSError:
            said = b""
        # Who ends its guard ends the copy.
        status = int(said) if said else -signal.SIGKILL
        self.returncode = status if status >= 0 else 128 - status


@dataclass
class Preloaded:
    """The process that holds the libraries, as those see it who have it run commands.

    Attributes:
        environment: Environment that the libraries were imported in.
    """

    environment: Mapping[str, str]
    _connection: socket.socket
    _process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, environment: Mapping[str, str], log: Path) -> Preloaded:
        """Start it under a guard; libraries are imported while the caller goes on.

        Args:
            environment: Environment that the libraries are imported in.
            log: File for what it prints itself.

        Raises:
            OSError: It ended at once.
        """
        # Paths of sockets may have a hundred characters, which folders of studies often exceed.
        with tempfile.TemporaryDirectory() as folder:
            address = f"{folder}/socket"
            command = [sys.executable, "-P", "-m", _THIS, address]
            process = guard.start(command, log, environment={**environment, **_WITHOUT_DRIVER})
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            while True:
                try:
                    connection.connect(address)
                    return cls(dict(environment), connection, process)
                except OSError:
                    if process.poll() is not None:
                        connection.close()
                        told = f"{' '.join(command)} ended with {process.returncode} (its log: {log})"
                        raise OSError(told) from None
                    time.sleep(_LOOK_SECONDS)

    @property
    def over(self) -> bool:
        """Return whether it has ended."""
        return self._process.poll() is not None

    def run(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        stdout: Path,
        stderr: Path | None = None,
        inherited: Sequence[int] = (),
    ) -> Copy:
        """Run a command, a script in Python, in a copy.

        Args:
            command: Command with the path of its script.
            folder: Working directory.
            environment: Environment variables; those that libraries read when imported are as they were then.
            stdout: File for standard output.
            stderr: File for standard error; None for that of standard output.
            inherited: File descriptors that the copy's guard keeps open.

        Raises:
            OSError: The process has ended.
        """
        files = {"stdout": str(stdout), "stderr": None if stderr is None else str(stderr)}
        request = {"command": list(command), "cwd": str(folder), "environment": dict(environment), **files}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(self._connection, [json.dumps(request).encode()], [theirs.fileno(), *inherited])
            except OSError:
                ours.close()
                raise
        return Copy(ours)

    def end(self) -> None:
        """End it, and all copies that run."""
        guard.end(self._process)
        self._connection.close()


def main() -> None:
    """Serve requests until nobody is connected; in a copy, run what was asked for and end as it ends."""
    address, *kept = sys.argv[1:]
    connection = socket.socket(fileno=int(kept[0])) if kept else _connected(address)
    for name in () if kept else LIBRARIES:
        importlib.import_module(name)
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        # It would hold memory of a GPU for as long as it lives, and no copy could use one: it starts anew without.
        print("a library initialised CUDA while it was imported: commands import by themselves", flush=True)
        os.set_inheritable(connection.fileno(), True)
        os.execv(sys.executable, [sys.executable, "-P", "-m", _THIS, address, str(connection.fileno())])
    # Collections would touch, and so copy, what copies share; only the last one needs to see it.
    gc.freeze()
    atexit.register(gc.unfreeze)
    request = _next_of_a_copy(connection)
    if request is not None:
        become(request)


def _connected(address: str) -> socket.socket:
    """Return the connection of the one who has commands run."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        return listener.accept()[0]


def _next_of_a_copy(connection: socket.socket) -> dict[str, Any] | None:
    """Wait for requests; return one in the copy that is to run it, and None when nobody is connected any longer."""
    # The system reaps the guards of copies.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        said, files, _, _ = socket.recv_fds(connection, _MOST_BYTES, _MOST_FILES)
        if not said:
            return None
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            _stand_guard(files)
            request: dict[str, Any] = json.loads(said)
            return request
        for file in files:
            os.close(file)


def _stand_guard(files: Sequence[int]) -> None:
    """Return in a copy; beside it, tell its exit status when it and all that it started have ended.

    Args:
        files: Socket of the one who asked, and file descriptors to keep open.
    """
    guard.die_with_parent()
    guard.adopt_orphans()
    copy = os.fork()
    if copy == 0:
        guard.die_with_parent()
        os.setpgrp()
        for file in files:
            os.close(file)
        return
    # Both set it: neither knows who is first.
    with contextlib.suppress(OSError):
        os.setpgid(copy, copy)
    with socket.socket(fileno=files[0]) as client:
        status = _ended(copy, client)
        guard.end_group(copy)
        with contextlib.suppress(OSError):
            client.send(b"%d" % status)
    os._exit(0)


def _ended(copy: int, client: socket.socket) -> int:
    """Return the exit status of a copy, which is ended when nobody listens any longer."""
    watched = os.pidfd_open(copy)
    ready, _, _ = select.select([watched, client.fileno()], [], [])
    if watched not in ready:
        os.killpg(copy, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])


def become(request: Mapping[str, Any]) -> None:
    """Run a command in this process, which ends as the command ends.

    Args:
        request: `command`, `cwd`, `environment`, and files for `stdout` and `stderr` (None for that of `stdout`).
    """
    out = _opened(request["stdout"])
    error = out if request["stderr"] is None else _opened(request["stderr"])
    os.dup2(out, 1)
    os.dup2(error, 2)
    for file in {out, error}:
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    if os.environ.get(VISIBLE_GPUS, "all") and not _reaches_gpus():
        os.execv(sys.executable, [sys.executable, *request["command"]])
    # The copy imports this package as it is now.
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_plugin"]:
        del sys.modules[name]
    sys.argv = list(request["command"])
    script = sys.argv[0]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _reaches_gpus() -> bool:
    """Return whether this copy can use GPUs; True where no library that could has been imported."""
    torch = sys.modules.get("torch")
    return torch is None or (not torch.cuda._is_in_bad_fork() and torch.cuda.is_available())


def _opened(file: str) -> int:
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)


if __name__ == "__main__":
    main()
