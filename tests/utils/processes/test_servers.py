"""Servers as child processes: they start, are waited for, and nothing of them stays, whatever ends us."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lmms_plugin.utils.processes.servers import Server, ServerFailed, expect_free

SERVE = """
import http.server, os, signal, subprocess, sys
# Two more processes: one of this group, and one that has left it.
near, far = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=new)
             for new in (False, True))
print(os.getpid(), near.pid, far.pid, flush=True)
def end(*_):
    print("asked to end", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end if polite else signal.SIG_IGN)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["WORD"].encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def command(*, polite=True):
    return [sys.executable, "-c", f"polite = {polite}{SERVE}", "{port}"]


class NotYet(Exception):
    """Of the test's own request."""


def asking(server):
    def ask(seconds):
        assert seconds > 0
        try:
            with urllib.request.urlopen(server.address, timeout=seconds) as response:
                return response.read().decode()
        except OSError as error:
            raise NotYet(error) from error

    return ask


def pids(log: Path):
    while not (log.is_file() and log.read_text().count("\n")):
        time.sleep(0.02)
    return [int(word) for word in log.read_text().splitlines()[0].split()]


def living(numbers):
    found = []
    for number in numbers:
        try:
            # A process that has ended and was not waited for still has its number.
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            continue
        if state != "Z":
            found.append(number)
    return found


def expect_gone(numbers, seconds=20):
    ends = time.monotonic() + seconds
    while living(numbers) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not living(numbers)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def test_it_answers_and_is_ended_with_all_that_it_started(log):
    server = Server(command(), log, environment={"WORD": "port {port}"})
    with server:
        assert server.wait(asking(server), 60, NotYet) == f"port {server.port}"
        started = pids(log)
        assert living(started) == started
    assert not living(started)
    assert "asked to end" in log.read_text()
    expect_free(server.port)


def test_what_does_not_end_when_asked_is_killed(log):
    server = Server(command(polite=False), log, environment={"WORD": ""}, grace=0.5).start()
    server.wait(asking(server), 60, NotYet)
    server.stop()
    assert not living(pids(log))


def _ours(log):
    """A process that starts a server, forks once, and waits."""
    code = f"""
import os, sys, time
from pathlib import Path
from lmms_plugin.utils.processes.servers import Server
server = Server({command()!r}, Path({str(log)!r}), environment={{"WORD": ""}}, grace=2).start()
if not (child := os.fork()):
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""
    return subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_of_it_stays_when_we_are_killed(log, number):
    # The fork holds the pipe to the guard, as workers of data loaders do: that must not keep the server alive.
    with _ours(log) as ours:
        fork = int(ours.stdout.readline())
        started = pids(log)
        assert living(started) == started
        os.kill(ours.pid, number)
        expect_gone(started)
        os.kill(fork, signal.SIGKILL)


def test_a_server_that_ends_is_told_with_its_last_words(log):
    code = "import sys; print('loading'); print('(Engine) ERROR ValueError: no memory'); "
    code += "print('RuntimeError: it failed. See root cause above.'); sys.exit(7)"
    server = Server([sys.executable, "-c", code, "{port}"], log).start()
    with pytest.raises(ServerFailed, match=r"^the server ended with status 7; it says: ValueError: no memory \(log: "):
        server.wait(asking(server), 60, NotYet)
    with pytest.raises(ServerFailed) as raised:
        server.expect_running()
    assert raised.value.log_end.splitlines()[0] == "loading"
    assert "\n" not in str(raised.value)


def test_a_server_that_never_listens_is_given_up(log):
    said = r"did not answer within 0.5 s of its start \(nothing listens on port \d+\)"
    with (
        Server([sys.executable, "-c", "import time; time.sleep(600)"], log) as server,
        pytest.raises(ServerFailed, match=said),
    ):
        server.wait(asking(server), 0.5, NotYet)


def test_a_taken_port_is_told_before_anything_starts(log):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of this machine cannot be used .*write \{{port\}}"):
            Server([sys.executable], log, port=port).start()
    assert not log.exists()
    expect_free(port)


@pytest.mark.parametrize("last", ["x" * 60_000, "x." * 30_000, "at " * 20_000], ids=["word", "dots", "words"])
def test_a_log_of_one_endless_line_is_told_at_once(tmp_path, last):
    words = f"print('ValueError: no model'); print({last[:3]!r} * {len(last) // 3}); raise SystemExit(3)"
    server = Server([sys.executable, "-c", words], tmp_path / "log").start()
    while server.ended is None:
        time.sleep(0.02)
    begun = time.process_time()
    with pytest.raises(ServerFailed, match="ended with status 3; it says: ValueError: no model") as failed:
        server.expect_running()
    assert time.process_time() - begun < 1
    assert max(map(len, failed.value.log_end.splitlines())) <= 1000
