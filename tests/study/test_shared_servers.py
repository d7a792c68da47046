"""Servers that cells of one command share: one for all of them, with its GPUs, for as long as one of them needs it."""

import os
import shlex
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.small_studies import CELL

from lmms_plugin.study.file.grid import Cell, Resources
from lmms_plugin.study.run.shared_servers import SharedServers
from lmms_plugin.utils.processes.launch_command import LaunchCommand
from lmms_plugin.utils.processes.lent_servers import LentServer

WAITING = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.getpid(), flush=True); time.sleep(600)"


def served(name: str, *tasks: str, gpus: int = 1) -> Cell:
    launch = f"{shlex.quote(sys.executable)} -c {shlex.quote(WAITING)} {name} {{port}}"
    arguments = {"pretrained": "demo", "launch": launch}
    return replace(CELL, backend="served", arguments=arguments, tasks=tasks, resources=Resources(gpus=gpus))


def said(server: LentServer) -> list[str]:
    while "\n" not in server.log.read_text():
        time.sleep(0.02)
    return server.log.read_text().split()


def borrowed(cell: Cell, variables: dict[str, str]) -> LentServer:
    assert isinstance(cell.launch, LaunchCommand)
    found = LentServer.of(variables, cell.launch)
    assert found is not None
    return found


def test_one_server_for_all_cells_of_a_command(tmp_path: Path) -> None:
    servers = SharedServers(tmp_path)
    first, second, other = served("a", "shapes_rec"), served("a", "shapes_rejection"), served("b", "shapes_rec")
    try:
        one = borrowed(first, dict(servers.lend(first, ("2", "3"))))
        assert said(one)[0] == "2,3"
        assert servers.gpus_of(second) == ("2", "3")
        assert servers.gpus_of(other) is None
        assert servers.gpus_of(served("a", "shapes_rec", gpus=2)) is None
        assert borrowed(second, dict(servers.lend(second, ()))).port == one.port
        assert borrowed(other, dict(servers.lend(other, ("0",)))).port != one.port
        assert servers.gpus == {"0", "2", "3"}
        servers.end_unused([second])
        assert servers.gpus == {"2", "3"}
        assert one.ended is None
    finally:
        servers.end_unused(())
    assert one.ended is not None
    assert not servers.gpus
    assert {path.suffix for path in tmp_path.iterdir()} == {".log"}


def test_a_server_that_has_died_gives_its_gpus_back_and_is_started_again(tmp_path: Path) -> None:
    servers, cell = SharedServers(tmp_path), served("a", "shapes_rec")
    try:
        one = borrowed(cell, dict(servers.lend(cell, ("1",))))
        os.kill(int(said(one)[1]), signal.SIGKILL)
        while one.ended is None:
            time.sleep(0.02)
        assert servers.gpus_of(cell) is None
        assert not servers.gpus
        assert borrowed(cell, dict(servers.lend(cell, ("0",)))).ended is None
        assert servers.gpus == {"0"}
    finally:
        servers.end_unused(())


def test_cells_find_it_from_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    servers, cell = SharedServers(Path("servers")), served("a", "shapes_rec")
    try:
        variables = dict(servers.lend(cell, ()))
        monkeypatch.chdir("/")
        assert borrowed(cell, variables).ended is None
    finally:
        servers.end_unused(())


def test_cells_without_a_command_and_with_a_taken_port_are_lent_nothing(tmp_path: Path) -> None:
    servers = SharedServers(tmp_path)
    assert servers.lend(CELL, ("0",)) == {}
    with socket.create_server(("127.0.0.1", 0)) as other:
        launch = f"{shlex.quote(sys.executable)} --port {other.getsockname()[1]}"
        cell = replace(CELL, backend="served", arguments={"launch": launch})
        assert servers.lend(cell, ("0",)) == {}
    assert not servers.gpus
