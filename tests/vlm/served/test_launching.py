"""A server that is started for a run: it is waited for, its death is told with its log, and it ends with the run."""

import re
import socket
import sys
from pathlib import Path

import pytest
from helpers import imitation

from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.vlm.served.client import ServerError
from lmms_plugin.vlm.served.model import QuantServed

IMITATION = f"{sys.executable} {imitation.__file__} --port {{port}}"
COUNT = 10
CANNED = """
import http.server, json, sys
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def reply(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def do_GET(self):
        known = self.path == "/v1/models"
        self.reply(200 if known else 404, {"data": [{"id": "demo"}]} if known else {})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(500, {"error": {"message": "image input is not supported"}})
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def listens(url):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(re.search(r":(\d+)/", url)[1]))) == 0


def test_a_server_that_dies_in_the_middle_is_told_and_the_next_run_goes_on(documents, instances, tmp_path):
    log = tmp_path / "server.log"
    options = {"pretrained": "demo", "concurrency": 1, "resume_folder": str(tmp_path / "kept")}
    asked = instances(comprehension.doc_to_messages, COUNT)
    vlm = QuantServed(launch=f"{IMITATION} --dies-at 5", launch_log=str(log), **options)
    vlm.task_dict = documents
    with pytest.raises(RequestError, match=r"document \d+: the server ended with status 3; it says: RuntimeError: no "):
        vlm.generate_until(asked)
    assert "no kernel image" in log.read_text()
    (answers,) = (tmp_path / "kept").iterdir()
    assert answers.read_bytes().count(b"\n") == 4
    again = QuantServed(launch=IMITATION, **options).make_ready()
    account = again.account()
    assert account["launch"] == IMITATION
    again.task_dict = documents
    assert all(Response.decode(answer).tokens for answer in again.generate_until(asked))
    assert listens(account["base_url"])
    assert Path(account["log"]).exists()
    again.clean()
    assert not listens(account["base_url"])
    assert not Path(account["log"]).exists()


def test_a_server_that_dies_of_its_first_image_is_told():
    with pytest.raises(
        ServerError, match=r"^the server ended with status 3; it says: RuntimeError: no kernel"
    ) as raised:
        QuantServed(pretrained="demo", launch=f"{IMITATION} --dies-at 0").make_ready()
    (log,) = re.findall(r"\(log: (.*)\)$", str(raised.value))
    assert "no kernel image" in Path(log).read_text()
    Path(log).unlink()


def test_a_server_without_eyes_is_not_waited_for_until_the_limit(tmp_path):
    file = tmp_path / "canned.py"
    file.write_text(CANNED)
    log = tmp_path / "log"
    with pytest.raises(ServerError, match=r"500: image input is not supported \(10 times in a row; log: "):
        QuantServed(pretrained="demo", launch=f"{sys.executable} {file} {{port}}", launch_log=str(log)).make_ready()


def test_a_server_is_not_started_before_there_is_a_request(tmp_path):
    log = tmp_path / "server.log"
    vlm = QuantServed(pretrained="demo", launch=IMITATION, launch_log=str(log))
    assert not vlm.is_ready
    assert vlm.generate_until([]) == []
    vlm.clean()
    assert not log.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"launch": "vllm-of-nobody serve --port {port}"}, "expected a program on PATH"),
        ({"launch": f"{sys.executable} serve"}, r"expected \{port\} where"),
        ({"launch": IMITATION, "base_url": "http://127.0.0.1:1/v1"}, "base_url and launch are both given"),
        ({"launch_log": "log", "base_url": "http://127.0.0.1:1/v1"}, "launch_log says nothing without launch"),
        ({}, "base_url is missing"),
        ({"launch": IMITATION, "launch_timeout": 0}, "launch_timeout must be at least"),
        ({"launch": IMITATION, "launch_timeout": float("nan")}, "launch_timeout must be at least 0.001 and finite"),
        ({"launch": IMITATION, "timeout": float("inf")}, "timeout must be at least 0.001 and finite, got inf"),
    ],
)
def test_what_cannot_be_started_is_told_before_anything_is_loaded(arguments, said):
    with pytest.raises(ValueError, match=said):
        QuantServed(pretrained="demo", **arguments)


def test_a_taken_port_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of this machine cannot be used"):
            QuantServed(pretrained="demo", launch=f"{sys.executable} --port {port}")
