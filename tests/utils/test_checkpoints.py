"""Where a checkpoint is looked for, and what is said where there is none."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.environments import run

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.utils import checkpoints

ID = "some-owner/some-model"
REMEDIES = "name a folder that holds the checkpoint, set HF_HOME to a cache that does, or try pretrained=demo"
CODES = {"gated": (403, "GatedRepo"), "none": (404, "RepoNotFound"), "bare": (404, "EntryNotFound"), "ill": (503, "")}
ASK = """
import sys
from lmms_plugin.utils.checkpoints import expect_fetchable
try:
    expect_fetchable(sys.argv[1])
except ValueError as error:
    print(error)
"""
COMMAND = str(Path(sys.executable).parent / "lmms-plugin")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{here}/nowhere", "there is no folder {here}/nowhere: read as a path, for an id on the hub is owner/name"),
        ("./nowhere", "there is no folder nowhere: read as a path"),
        ("a/b/c", "there is no folder a/b/c: read as a path"),
        ("{here}/file", "{here}/file is a file; expected the folder of a checkpoint"),
        ("file", "file is a file; expected the folder of a checkpoint"),
        ("{here}/empty", "the folder {here}/empty holds no config.json"),
        ("my model", "'my model' is no folder here, and no id on the hub, which is owner/name of letters"),
        ("-model", "'-model' is no folder here, and no id on the hub"),
        ("ü/\n", r"'ü/\n' is no folder here, and no id on the hub"),
        ("x" * 300, "is no folder here, and no id on the hub"),
    ],
)
def test_what_is_no_checkpoint_is_told_by_how_it_was_read(tmp_path, monkeypatch, name, said):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as failure:
        checkpoints.find(name.format(here=tmp_path))
    line = str(failure.value)
    assert line.startswith("pretrained: ")
    assert said.format(here=tmp_path) in line
    assert "\n" not in line
    assert "; " in line


def test_folders_and_ids_are_found_without_a_question(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "owner" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert checkpoints.find("owner/model") == "owner/model"
    assert checkpoints.find(str(CHECKPOINT)) == str(CHECKPOINT)
    assert checkpoints.find(ID) == ID


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, by the owner that is asked for."""

    def do_HEAD(self):
        self.server.asked.append(self.path)
        status, code = CODES[self.path.split("/")[1]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def said_of(name, cache, **environment):
    """What is said of an id, by a process of its own: the hub's address is read once."""
    settings = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", **environment}
    command = [sys.executable, "-P", "-c", ASK, name]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=cache, check=True)
    (line,) = done.stdout.splitlines()
    assert "Retry" not in done.stderr
    return line


@pytest.mark.parametrize(
    ("owner", "said"),
    [
        ("gated", "where it is gated; accept its terms at {endpoint}/gated/model, and log in \\(hf auth login\\)"),
        ("none", f"where there is none of this name, or it is private; check how it is written, .*{REMEDIES}"),
        ("bare", "where it holds no config.json; expected a checkpoint of transformers"),
        ("ill", f"but {{endpoint}} answers with an error \\(.*503.*\\); {REMEDIES}"),
    ],
)
def test_what_the_hub_answers_is_told_after_one_question(hub, tmp_path, owner, said):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    hub.asked.clear()
    line = said_of(f"{owner}/model", tmp_path, HF_ENDPOINT=endpoint)
    begun = f"pretrained: {owner}/model is no folder here, so it was read as an id on the hub, "
    assert line.startswith(begun)
    assert re.search(said.format(endpoint=endpoint), line), line
    assert hub.asked == [f"/{owner}/model/resolve/main/config.json"]


def test_a_hub_out_of_reach_is_told_at_once_with_remedies(tmp_path):
    # Nobody listens there.
    line = said_of(ID, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert line.startswith(f"pretrained: {ID} is no folder here, so it was read as an id on the hub, but ")
    assert "http://127.0.0.1:9 cannot be reached (" in line
    assert line.endswith(REMEDIES)


def test_a_hub_that_accepts_and_never_answers_is_told_within_20_seconds(monkeypatch):
    """As behind a firewall that drops what it does not like."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/{{revision}}/{{filename}}"
        )
        checkpoints.expect_fetchable.cache_clear()
        started = time.monotonic()
        with pytest.raises(ValueError, match=f"{endpoint} cannot be reached \\(.*timed out.*\\); {REMEDIES}"):
            checkpoints.expect_fetchable("silent/model")
    assert time.monotonic() - started < 20


def test_offline_without_a_copy_is_told(tmp_path):
    line = said_of(ID, tmp_path, HF_HUB_OFFLINE="1")
    assert f"which HF_HUB_OFFLINE forbids to ask, and the cache {tmp_path}/hub does not hold it" in line
    assert line.endswith(REMEDIES)


@pytest.mark.slow
def test_a_copy_in_the_cache_is_taken_where_the_hub_is_out_of_reach(tmp_path):
    revision = "0" * 40
    folder = tmp_path / "hub" / f"models--{ID.replace('/', '--')}"
    for path, text in (
        (folder / "refs" / "main", revision),
        (folder / "snapshots" / revision / "config.json", '{"model_type": "qwen2_vl"}'),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    code = f"from lmms_plugin.utils.checkpoints import config_of; print(config_of({ID!r}).model_type)"
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        settings = {**os.environ, "HF_HOME": str(tmp_path), **environment}
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=settings, check=True)
        assert done.stdout == "qwen2_vl\n"


def test_commands_say_so_in_one_line(tmp_path):
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    with pytest.raises(RuntimeError, match=r"exited with 2") as failure:
        run([COMMAND, "inspect", f"pretrained={ID},method=rtn"], tmp_path, **settings)
    # The library alone says of each of six tries for each file that it failed.
    (line,) = str(failure.value).splitlines()[1:]
    assert line.startswith(f"lmms-plugin: pretrained: {ID} is no folder here")
    assert line.endswith(REMEDIES)
