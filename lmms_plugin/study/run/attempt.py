"""One attempt at a cell: the lmms-eval process, and the check of its results."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin import harness_log
from lmms_plugin.analysis import logs
from lmms_plugin.analysis.study_files import LOG
from lmms_plugin.quant_backends.plans.report_schema import REPORT
from lmms_plugin.study.file import identity
from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.file.identity import Keyed
from lmms_plugin.study.file.tasks import known
from lmms_plugin.study.run.shared_libraries import SharedLibraries
from lmms_plugin.utils.processes import guard, installed, process_log
from lmms_plugin.utils.processes.preloaded import Copy
from lmms_plugin.utils.variables import API_KEY, IMAGES, PREFIX

_TAIL_LINES, _TAIL_LETTERS = 40, 6000
_SIGNALLED = 128


class Outcome(NamedTuple):
    """Outcome of an attempt.

    Attributes:
        problem: Why it failed; None on success.
        returncode: Exit status of the process.
        done: When, how long and where it ran.
        tail: End of the log.
        changed: Parts of the key that changed during the run, which may have used either state.
    """

    problem: str | None
    returncode: int
    done: Mapping[str, Any]
    tail: str
    changed: tuple[str, ...]


def command(cell: Cell, gpus: int) -> tuple[str, ...]:
    """Return the command of a cell, to be run in its folder.

    Args:
        cell: Cell of a study.
        gpus: Number of GPUs assigned to it.
    """
    processes = cell.resources.processes
    start: tuple[str, ...] = ("lmms-eval",)
    if processes > 1:
        # On a CPU, accelerate always starts one process.
        settled = (
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        )
        on_gpus = ("accelerate", "launch", "--multi_gpu", *settled, "--num_processes", str(processes))
        on_cpu = ("torchrun", "--standalone", "--nproc_per_node", str(processes))
        start = (*(on_gpus if gpus else on_cpu), "-m", "lmms_eval")
    limit = () if cell.limit is None else ("--limit", str(cell.limit))
    asked = ("--model", cell.model, "--model_args", f"{cell.model_args},report={REPORT}", "--tasks")
    asked += (",".join(cell.tasks), "--batch_size", str(cell.batch_size), *limit)
    return (*start, *asked, "--log_samples", "--output_path", ".")


def _shares(cell: Cell) -> bool:
    """Return whether a cell computes anything of the unquantized model that others may need."""
    return "shared_folder" not in cell.arguments and not cell.arguments.keys().isdisjoint(("calibration", "reference"))


def about(keyed: Keyed, gpus: int) -> dict[str, Any]:
    """Return the content of a cell's `cell.json`."""
    cell = keyed.cell
    return {
        "id": keyed.id,
        "key": keyed.key,
        "model": cell.model,
        "model_args": dict(cell.arguments),
        "tasks": list(cell.tasks),
        "limit": cell.limit,
        "images": cell.images,
        "batch_size": cell.batch_size,
        "processes": cell.resources.processes,
        "axes": cell.axes.to_dict(),
        "command": [*_prefix(cell), *command(cell, gpus)],
        "versions": dict(keyed.versions),
        "depends_on": dict(keyed.parts),
    }


def _prefix(cell: Cell) -> tuple[str, ...]:
    return () if cell.images is None else ("env", f"{IMAGES}={cell.images}")


@dataclass
class Attempt:
    """A process that runs a cell.

    Attributes:
        keyed: Cell with its key.
        folder: Working directory of the process.
        gpus: GPUs assigned to it.
        process: Guard of the process, or the copy of a process of imported libraries.
        started: Start time in seconds since the epoch.
        began: Start time in seconds of a monotonic clock.
        timed_out: Whether it was stopped because it exceeded the time limit.
    """

    keyed: Keyed
    folder: Path
    gpus: tuple[str, ...]
    process: subprocess.Popen[bytes] | Copy
    started: float
    began: float = field(default_factory=time.monotonic)
    timed_out: bool = False

    @classmethod
    def start(
        cls,
        keyed: Keyed,
        folder: Path,
        *,
        gpus: Sequence[str],
        threads: int | None = None,
        inherited: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        kept: Path | None = None,
        libraries: SharedLibraries | None = None,
        shared: Path | None = None,
    ) -> Attempt:
        """Start lmms-eval in a folder, with its output in the log there.

        Args:
            keyed: Cell with its key.
            folder: Empty folder.
            gpus: GPUs as CUDA counts them; empty for the CPU.
            threads: Threads of each process; None to keep the environment's setting.
            inherited: File descriptors that the guard keeps open.
            environment: Further variables of the process: those of a server that is lent to it.
            kept: Folder for the answers of a server, so that the next attempt goes on; None to keep none.
            libraries: Libraries that cells share; None to import them for this one.
            shared: Folder of what cells of one unquantized model share; None to share nothing.
        """
        first, *rest = command(keyed.cell, len(gpus))
        given = {"resume_folder": kept, "shared_folder": shared if _shares(keyed.cell) else None}
        for name, place in given.items():
            if place is not None:
                # A relative path has no comma, at which arguments are split.
                rest[rest.index("--model_args") + 1] += f",{name}={os.path.relpath(place, folder)}"
        images = {} if keyed.cell.images is None else {IMAGES: keyed.cell.images}
        # Where a server is lent, it has the GPUs, and the process that asks it sees none.
        seen = () if environment else gpus
        own = _environment(seen, threads) | images | dict(environment or {})
        preloaded = None if libraries is None else libraries.of(keyed, own)
        command_line, log = [installed.command(first), *rest], folder / LOG
        process: subprocess.Popen[bytes] | Copy | None = None
        if preloaded is not None:
            # It may have ended since.
            with suppress(OSError):
                process = preloaded.run(command_line, folder=folder, environment=own, stdout=log, inherited=inherited)
        if process is None:
            process = guard.start(command_line, log, folder=folder, environment=own, inherited=inherited)
        return cls(keyed, folder, tuple(gpus), process, time.time())

    @property
    def crashed(self) -> bool:
        """Return whether it was a copy that a signal ended."""
        return isinstance(self.process, Copy) and not self.timed_out and (self.process.poll() or 0) > _SIGNALLED

    @property
    def over(self) -> bool:
        """Return whether the process has ended."""
        return self.process.poll() is not None

    def expire(self) -> None:
        """Stop a process that has exceeded the time limit of its cell."""
        most = self.keyed.cell.resources.timeout
        if most is not None and not self.over and time.monotonic() - self.began >= most:
            self.timed_out = True
            self.end()

    def end(self) -> None:
        """Stop the process and everything it started, and wait until all of it has ended."""
        if isinstance(self.process, Copy):
            self.process.end()
        else:
            guard.end(self.process)

    def outcome(self) -> Outcome:
        """Check the results of a process that has ended; lmms-eval's exit status is not informative."""
        self.end()
        status, seconds = self.process.wait(), time.monotonic() - self.began
        done = {
            "seconds": round(seconds, 3),
            "started": _moment(self.started),
            "finished": _moment(self.started + seconds),
            "host": socket.gethostname(),
        }
        identity.forget()
        changed = self.keyed.differences(identity.keyed(self.keyed.cell, cuda=bool(self.gpus)).parts)
        problem = f"{' and '.join(changed)} changed while it ran" if changed else None
        if self.timed_out:
            problem = problem or f"it took longer than its timeout of {self.keyed.cell.resources.timeout} s"
        problem = problem or problem_of(self.keyed.cell, self.folder, status)
        return Outcome(problem, status, done, self._tail(), tuple(changed))

    def _tail(self) -> str:
        lines = process_log.lines(_log(self.folder).rstrip())
        return "\n".join(lines[-_TAIL_LINES:])[-_TAIL_LETTERS:]


def _log(folder: Path) -> str:
    # A copy that was ended at once has not opened its own.
    return (folder / LOG).read_text(encoding="utf-8", errors="replace") if (folder / LOG).exists() else ""


def problem_of(cell: Cell, folder: Path, status: int) -> str | None:
    """Return why a folder does not hold the complete results of a cell; None if it does."""
    try:
        files = [] if status else logs.find(folder)
    except ValueError:
        files = []
    if not files:
        return harness_log.failure(_log(folder), status)
    try:
        run = logs.read_one(folder)
    except ValueError as error:
        return str(error)
    missing = [name for task in known(cell.tasks).values() for name in task.tasks if name not in run.results]
    if missing:
        return f"expected results of {missing[0]}, got {', '.join(run.results)}"
    return None if (folder / REPORT).is_file() else f"expected {REPORT}, got none"


def _environment(gpus: Sequence[str], threads: int | None) -> dict[str, str]:
    environment = dict(os.environ)
    # The process runs in a folder of its own.
    for name, value in environment.items():
        if name.startswith(PREFIX) and name != API_KEY and value and not os.path.isabs(value) and os.path.exists(value):
            environment[name] = os.path.abspath(value)
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
