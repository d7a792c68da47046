"""Studies on a Ray cluster of two machines, one of which is lost on the way."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_studies import STUDY

from lmms_plugin.analysis import logs
from lmms_plugin.analysis.study_files import DONE
from lmms_plugin.cli.study_display import Display
from lmms_plugin.study.run import execution, on_ray
from lmms_plugin.study.run.local import visible_gpus


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """Two machines with one core each, which are processes of this one: the cluster, and the machine that may go."""
    ray = pytest.importorskip("ray")
    utils = pytest.importorskip("ray.cluster_utils")
    # Ray's workers step back behind everything else that runs, which takes them ages where tests run beside them.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    memory = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    head = {"include_dashboard": False, **memory}
    found = patiently(lambda: utils.Cluster(initialize_head=True, head_node_args=head))
    yield found, patiently(lambda: found.add_node(**memory))
    ray.shutdown()
    found.shutdown()


def patiently(start: Callable[[], Any]) -> Any:
    """Start a machine; Ray gives it 30 seconds for that, which is short where other tests run beside it."""
    for _ in range(4):
        # Ray raises nothing more special.
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    pytest.skip("Ray does not get started in 30 seconds here")


def table(output: Path) -> dict[str, Any]:
    runs = [logs.read(file) for file in logs.find(output)]
    records = {run.label: run.tasks["shapes_rec"] for run in runs}
    return {label: (one.ids.tolist(), one.score.tolist(), dict(one.confidence)) for label, one in records.items()}


def lose_when_busy(cluster: Any, machine: Any, lost: list[str]) -> None:
    """Kill a machine as soon as lmms-eval runs on it."""
    session = {one.process.pid for kind in machine.all_processes.values() for one in kind}
    while not any(_descends(int(entry.name), session) for entry in _evaluations()):
        time.sleep(0.2)
    lost.append(machine.unique_id)
    cluster.remove_node(machine, allow_graceful=False)


def _evaluations() -> list[Path]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"lmms_plugin.utils.processes.guard" in command:
            found.append(process)
    return found


def _descends(pid: int, ancestors: set[int]) -> bool:
    while pid > 1:
        if pid in ancestors:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


@pytest.mark.slow
def test_a_lost_machine_changes_no_number(cluster: tuple[Any, Any], tmp_path: Path) -> None:
    machines, machine = cluster
    file = tmp_path / "study.yaml"
    file.write_text(STUDY, encoding="utf-8")
    here = execution.run(file, execution.Work.on(tmp_path / "here", Display, jobs=2))
    assert here.complete, here.problems
    lost: list[str] = []
    threading.Thread(target=lose_when_busy, args=(machines, machine, lost), daemon=True).start()
    shared = f"file://{tmp_path / 'shared'}"
    there = execution.run(file, execution.Work.on(tmp_path / "there", Display, ray=machines.address, storage=shared))
    assert lost
    assert there.complete, there.problems
    assert not there.problems
    expected, found = table(tmp_path / "here"), table(tmp_path / "there")
    assert expected.keys() == found.keys()
    np.testing.assert_equal(found, expected)
    stored = sorted(done.parent.name for done in (tmp_path / "shared" / "cells").glob(f"*/{DONE}"))
    assert stored == sorted(one.keyed.id for one in there.plan.cells)
    assert not any((tmp_path / "there" / ".running").iterdir())


def test_a_missing_ray_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r'study run --ray needs ray, .*pip install "lmms-plugin\[ray\]"'):
        on_ray.connect("auto")


def test_secrets_stay_here() -> None:
    environment = {"HF_TOKEN": "hf_x", "LMMS_PLUGIN_REFCOCOPLUS": "/data", "HF_HUB_OFFLINE": "1", "PATH": os.defpath}
    environment["LMMS_PLUGIN_API_KEY"] = "sk-x"
    assert on_ray.forwarded(environment) == {"LMMS_PLUGIN_REFCOCOPLUS": "/data", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(("variable", "gpus"), [("", []), ("-1", []), ("0,3", ["0", "3"])])
def test_gpus_are_those_that_may_be_seen(monkeypatch: pytest.MonkeyPatch, variable: str, gpus: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == gpus
