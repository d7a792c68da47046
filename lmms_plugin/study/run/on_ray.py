"""Ray runner: Ray finds the machines, waits for their GPUs and retries the work of a lost machine.

A worker runs a cell in a temporary folder of its own machine and returns the folder through Ray. Only the checkpoints
and data that the cells read need to be shared. The runner stores a returned folder as it stores local cells.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.analysis.study_files import LOG
from lmms_plugin.quant_backends.extras import require
from lmms_plugin.study.file import identity
from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.file.identity import Keyed
from lmms_plugin.study.run.attempt import Attempt, Outcome
from lmms_plugin.study.run.recording import Recorder, Taken
from lmms_plugin.study.store.folder import Lock
from lmms_plugin.utils.variables import API_KEY, LENT_SERVER, PREFIX

RETRIES = 3
POLL_SECONDS = 0.5
ELSEWHERE_SECONDS = 5.0
_SHOWN_SECONDS = 2.0
_FORWARDED = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Delivered(NamedTuple):
    """Result of a worker.

    Attributes:
        outcome: Outcome of the attempt.
        archive: Folder of the cell, as an uncompressed tar file.
    """

    outcome: Outcome
    archive: bytes


def evaluate(planned: Keyed, gpus: int, started: Any) -> Delivered:
    """Run a cell on the machine that executes this call.

    Args:
        planned: Cell with the key that the runner computed.
        gpus: Number of GPUs that Ray has reserved for it.
        started: Remote method that receives the cell's id and the machine.
    """
    started.remote(planned.id, socket.gethostname())
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpus else []
    with tempfile.TemporaryDirectory(prefix="lmms-plugin-") as name:
        folder = Path(name)
        here = identity.keyed(planned.cell, cuda=gpus > 0)
        other = here.differences(planned.parts)
        if other:
            text = f"expected the {' and '.join(other)} of the runner on {socket.gethostname()}, got other"
            return _refused(text, folder)
        attempt = Attempt.start(planned, folder, gpus=devices)
        with contextlib.suppress(subprocess.TimeoutExpired):
            attempt.process.wait(planned.cell.resources.timeout)
        attempt.expire()
        outcome = attempt.outcome()
        return Delivered(outcome, _packed(folder))


def _refused(problem: str, folder: Path) -> Delivered:
    (folder / LOG).write_text(problem + "\n", encoding="utf-8")
    return Delivered(Outcome(problem, 0, {"host": socket.gethostname()}, problem, ()), _packed(folder))


def _packed(folder: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(folder, arcname=".")
    return stream.getvalue()


class _Starts:
    """Ray actor that collects which cells have started, and where."""

    def __init__(self) -> None:
        self._new: list[tuple[str, str]] = []

    def add(self, cell: str, host: str) -> None:
        self._new.append((cell, host))

    def take(self) -> list[tuple[str, str]]:
        new, self._new = self._new, []
        return new


class _RayWork(NamedTuple):
    keyed: Keyed
    lock: Lock


@dataclass
class RayRunner:
    """Runner of cells on a Ray cluster.

    Attributes:
        recorder: Recorder of the study.
        key: Function that computes the key of a cell.
        needed: Function that computes the number of GPUs of a cell.
    """

    recorder: Recorder
    key: Callable[[Cell], Keyed]
    needed: Callable[[Cell], int]
    _working: dict[Any, _RayWork] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> None:
        """Run all cells until they are finished or failed; an interruption cancels the running ones.

        Raises:
            ValueError: No machine of the cluster has what a cell needs.
        """
        ray = require("ray", extra="ray", user="study run --ray")
        self._expect_room(ray, cells)
        starts = ray.remote(_Starts).options(num_cpus=0, max_restarts=-1, scheduling_strategy=_here(ray)).remote()
        waiting, asked = deque(cells), time.monotonic()
        try:
            elsewhere = self._submit(ray, waiting, starts)
            while self._working or elsewhere:
                self._settle(ray, starts)
                if elsewhere and time.monotonic() - asked > ELSEWHERE_SECONDS:
                    elsewhere, asked = self._submit(ray, elsewhere, starts), time.monotonic()
                self.recorder.watcher.tick()
                if elsewhere and not self._working:
                    time.sleep(POLL_SECONDS)
        finally:
            for reference, work in self._working.items():
                ray.cancel(reference, force=True)
                work.lock.release()

    def _expect_room(self, ray: Any, cells: Sequence[Cell]) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for cell in cells:
            wanted = {"CPU": _cpus(cell), "GPU": self.needed(cell)}
            if not any(all(node.get(kind, 0) >= number for kind, number in wanted.items()) for node in nodes):
                raise ValueError(f"expected a machine with {wanted} in the Ray cluster, got none among {len(nodes)}")

    def _submit(self, ray: Any, cells: deque[Cell], starts: Any) -> deque[Cell]:
        """Submit cells to Ray and return those that another runner works on."""
        elsewhere = deque[Cell]()
        for cell in cells:
            keyed = self.key(cell)
            claim = self.recorder.claim(keyed.id)
            if claim is Taken.ELSEWHERE:
                elsewhere.append(cell)
            elif isinstance(claim, Lock):
                gpus = self.needed(cell)
                # Ray retries the work of a lost worker; an error in our own code would only recur.
                options = {"max_retries": RETRIES, "retry_exceptions": False, "name": keyed.id}
                task = ray.remote(evaluate).options(num_cpus=_cpus(cell), num_gpus=gpus, **options)
                self._working[task.remote(keyed, gpus, starts.add)] = _RayWork(keyed, claim)
        return elsewhere

    def _settle(self, ray: Any, starts: Any) -> None:
        over, _ = ray.wait(list(self._working), timeout=POLL_SECONDS) if self._working else ([], [])
        for cell, _host in _new(ray, starts):
            self.recorder.watcher.started(cell)
        for reference in over:
            work = self._working[reference]
            self._record(ray, reference, work.keyed)
            del self._working[reference]
            work.lock.release()

    def _record(self, ray: Any, reference: Any, keyed: Keyed) -> None:
        folder = self.recorder.folder.begin(keyed.id)
        try:
            delivered = ray.get(reference)
        # The worker was lost more often than Ray retries, or our own code failed there.
        except ray.exceptions.RayError as error:
            delivered = _refused(f"no worker finished it: {error}", folder)
        with tarfile.open(fileobj=io.BytesIO(delivered.archive)) as archive:
            archive.extractall(folder, filter="data")
        self.recorder.record(keyed, delivered.outcome, self.needed(keyed.cell))


def _new(ray: Any, starts: Any) -> list[tuple[str, str]]:
    """Return the cells that have started; empty if the actor's machine is lost, since they are only for display."""
    try:
        new: list[tuple[str, str]] = ray.get(starts.take.remote(), timeout=_SHOWN_SECONDS)
    except ray.exceptions.RayError:
        return []
    return new


class Cluster(NamedTuple):
    """Resources of a cluster.

    Attributes:
        gpus: Total number of GPUs.
        cpus: Total number of cores.
    """

    gpus: int
    cpus: int

    def at_once(self, cells: Sequence[Cell]) -> int:
        """Return how many such cells run at a time."""
        return max(1, self.cpus // max(map(_cpus, cells), default=1))


def connect(address: str) -> Cluster:
    """Connect to a Ray cluster.

    Args:
        address: Address as in `ray.init`: `auto`, `host:6379`, `ray://host:10001`.

    Returns:
        Resources of the cluster.

    Raises:
        ImportError: Ray is not installed; names the command.
        ConnectionError: There is no cluster at that address.
    """
    ray = require("ray", extra="ray", user="study run --ray")
    if not ray.is_initialized():
        environment = {"env_vars": forwarded(os.environ)}
        # Workers first search the folder in which Ray is started, where a checkout would hide the installed package.
        with tempfile.TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere):
            ray.init(address=address, log_to_driver=False, runtime_env=environment)
    has = ray.cluster_resources()
    return Cluster(int(has.get("GPU", 0)), int(has.get("CPU", 0)))


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that workers need; secrets are not forwarded."""
    named = {name for name in environment if name.startswith(PREFIX)} - {API_KEY, LENT_SERVER} | set(_FORWARDED)
    return {name: environment[name] for name in sorted(named) if name in environment}


def _cpus(cell: Cell) -> int:
    return cell.resources.cpus or cell.resources.processes


def _here(ray: Any) -> Any:
    strategies = require("ray.util.scheduling_strategies", extra="ray", user="study run --ray")
    return strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
