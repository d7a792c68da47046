"""The client on the wire: which address it connects to, and what it sends there."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lmms_plugin.vlm.served.client import Client

FOREIGN = "http://served.example:8000/v1"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def listener():
    """Address of a server that answers everything, and the request lines and headers that it gets."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            got.append((self.requestline.split()[1], dict(self.headers)))
            content = b'{"fine": true}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}", got
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxies(monkeypatch):
    """A function that sets the variables of proxies, and no others."""

    def put(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
@pytest.mark.parametrize("scheme", ["", "http://"])
def test_the_proxy_of_the_environment_is_used(listener, proxies, variable, scheme):
    address, got = listener
    proxies(**{variable: scheme + address})
    assert Client(FOREIGN, key="sk-secret").get(f"{FOREIGN}/models") == {"fine": True}
    ((target, headers),) = got
    assert target == f"{FOREIGN}/models"
    assert headers["Host"] == "served.example:8000"
    assert headers["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("exempt", ["served.example", ".example", "*", "elsewhere.example,served.example:8000"])
def test_no_proxy_where_the_environment_says_so(proxies, exempt):
    proxies(http_proxy="http://127.0.0.1:9", no_proxy=exempt)
    assert Client(FOREIGN).proxy is None
    proxies(http_proxy="http://127.0.0.1:9", no_proxy="elsewhere.example")
    assert Client(FOREIGN).proxy == "http://127.0.0.1:9"


def test_no_proxy_stands_before_our_own_machine(listener, proxies):
    address, got = listener
    proxies(http_proxy="http://127.0.0.1:9", all_proxy="http://127.0.0.1:9")
    url = f"http://{address}/v1"
    assert Client(url).get(f"{url}/models") == {"fine": True}
    assert got[0][0] == "/v1/models"


def test_one_connection_serves_one_request_after_the_other(listener):
    address, _ = listener
    url = f"http://{address}/v1"
    client = Client(url)
    for _ in range(3):
        client.get(f"{url}/models")
    assert len(client.connections) == 1
    client.end()
    assert client.connections[0].fileno() == -1
