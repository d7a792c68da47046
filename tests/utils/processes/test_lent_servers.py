"""Servers that one process starts and others use: they are found by their command, and their end is noticed."""

import os
import shlex
import signal
import sys
import time

import pytest

from lmms_plugin.utils.processes import lent_servers
from lmms_plugin.utils.processes.launch_command import LaunchCommand
from lmms_plugin.utils.processes.lent_servers import LentServer
from lmms_plugin.utils.processes.servers import Server, ServerFailed

WAITING = "import os, time; print('at', os.getpid(), flush=True); time.sleep(600)"
COMMAND = LaunchCommand.parse(f"{shlex.quote(sys.executable)} -c {shlex.quote(WAITING)} {{port}}")


@pytest.fixture
def lent(tmp_path):
    server, file = Server.of(COMMAND, tmp_path / "log"), tmp_path / "server.json"
    yield server, file, lent_servers.lend(server, COMMAND, file)
    lent_servers.end(server, file)


def test_borrowers_find_it_by_its_command(lent):
    server, _, variables = lent
    borrowed = LentServer.of(variables, COMMAND)
    assert (borrowed.port, borrowed.log, borrowed.ended) == (server.port, server.log, None)
    borrowed.stop()
    assert server.ended is None
    assert LentServer.of(variables, LaunchCommand.parse(f"{COMMAND.text} --more")) is None
    assert LentServer.of({}, COMMAND) is None


def test_borrowers_notice_its_end(lent):
    server, file, variables = lent
    borrowed = LentServer.of(variables, COMMAND)
    while "at" not in server.log.read_text():
        time.sleep(0.02)
    os.kill(int(server.log.read_text().split()[1]), signal.SIGKILL)
    while server.ended is None:
        time.sleep(0.02)
    with pytest.raises(ServerFailed, match=r"the server has ended; it says: at \d+ \(log: "):
        borrowed.expect_running()
    lent_servers.end(server, file)
    assert borrowed.ended == "has been ended by the study that started it"
    assert [path.name for path in file.parent.iterdir()] == ["log"]
