"""Commands that start servers: read as a shell reads them, and refused before anything is started."""

import shlex
import sys
from pathlib import Path

import pytest

from lmms_plugin.arguments import read_arguments
from lmms_plugin.utils.processes.launch_command import LaunchCommand

PROGRAM = shlex.quote(sys.executable)


def test_words_variables_and_the_port():
    command = LaunchCommand.parse(f"A=1 HOST=127.0.0.1:{{port}} {PROGRAM} -m 'a b' --x=y")
    assert command.words == (sys.executable, "-m", "a b", "--x=y")
    assert command.environment == {"A": "1", "HOST": "127.0.0.1:{port}"}
    assert command.port is None
    assert LaunchCommand.parse(command.text) == command


@pytest.mark.parametrize("option", ["--port 8123", "--port=8123", "--server-port 8123", "--server_port=8123"])
def test_a_port_of_its_own(option):
    assert LaunchCommand.parse(f"{PROGRAM} {option}").port == 8123


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_a_command_among_model_arguments(quote):
    command = f"{sys.executable} --sizes 1{',2' if quote else ''} --port {{port}}"
    given = read_arguments(f"pretrained=demo,launch={quote}{command}{quote},timeout=5")
    assert given["timeout"] == 5
    assert LaunchCommand.parse(given["launch"]).words == tuple(command.split())


def test_a_command_from_a_file(tmp_path: Path):
    file = tmp_path / "serve.txt"
    file.write_text(f"# two lines, and quotes\n{PROGRAM} --json '{{\"image\": 1}}' \\\n  --port {{port}}  # free\n")
    assert LaunchCommand.parse(str(file)).words == (sys.executable, "--json", '{"image": 1}', "--port", "{port}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a command"),
        ("A=1", "expected a command"),
        ("vllm-of-nobody serve --port {port}", "expected a program on PATH, got 'vllm-of-nobody'"),
        ("/nowhere/python --port {port}", "/nowhere/python does not exist"),
        (f"{__file__} --port {{port}}", "is no program"),
        (f"{PROGRAM} serve", r"expected \{port\} where the server's port goes"),
        (f"{PROGRAM} serve --port many", r"expected \{port\} where"),
        (f"{PROGRAM} --name 'a --port {{port}}", "quotes that are closed"),
        (f"cd /tmp && {PROGRAM} --port {{port}}", "no shell reads, got '&&'"),
        (f"{PROGRAM} --port {{port}} --api-key secret", "expected no key"),
        (f"{PROGRAM} --port {{port}} --api-key=secret", "expected no key"),
    ],
)
def test_what_cannot_be_started_is_refused_in_one_line(text, said):
    with pytest.raises(ValueError, match=said) as raised:
        LaunchCommand.parse(text)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_script_is_no_command(tmp_path: Path):
    file = tmp_path / "serve.sh"
    file.write_text("#!/bin/sh\nexec vllm serve --port $1\n")
    with pytest.raises(ValueError, match=r"is a script.*launch='sh .*serve\.sh \{port\}'"):
        LaunchCommand.parse(str(file))
