"""A command line that starts a server, as a user writes it."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmms_plugin.utils.messages import command_line
from lmms_plugin.utils.reading.located import text_of

PORT = "{port}"
"""What stands for the port in a command."""
_VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_PORT_OPTION = re.compile(r"--(?:server[-_])?port(?:=(\d+))?")
_KEY_OPTION = re.compile(r"--api[-_]keys?(?:=.*)?", re.DOTALL)
_OF_A_SHELL = frozenset(("|", "||", "&", "&&", ";", ">", ">>", "<", "2>&1"))
_LONGEST_PATH = 1024


@dataclass(frozen=True)
class LaunchCommand:
    """A command that starts a server.

    Attributes:
        words: Program and arguments; `{port}` stands for the port.
        environment: Variables that the command sets for itself, as `NAME=VALUE` in front of the program.
        port: Port that the command itself names; None where it has `{port}`.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> LaunchCommand:
        """Read a command as a shell would, without its operators; nothing is started.

        Args:
            text: Command line, or path of a file that holds one (comments and line breaks are allowed there).

        Raises:
            ValueError: There is no program, it does not exist, no port is named, or a key is in plain sight.
        """
        words = _split(_written(text))
        variables = 0
        while variables < len(words) and _VARIABLE.fullmatch(words[variables]):
            variables += 1
        environment = dict(word.split("=", 1) for word in words[:variables])
        command = tuple(words[variables:])
        if not command:
            raise ValueError(f"launch: expected a command such as 'vllm serve MODEL --port {PORT}', got {text!r:.200}")
        _expect_plain(command)
        _expect_program(command[0], environment.get("PATH"))
        return cls(command, environment, _port(command, environment))

    @property
    def text(self) -> str:
        """The command in one line, as it can be given again."""
        set_here = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*set_here, command_line(self.words)]).replace(f"'{PORT}'", PORT)


def _written(text: str) -> str:
    """Return the command itself, read from its file if the text names one."""
    path = Path(text).expanduser() if text and len(text) < _LONGEST_PATH else None
    if path is None or not path.is_file():
        return text
    content = text_of(path)
    if content.startswith("#!"):
        raise ValueError(
            f"launch: {path} is a script, and a file must hold one command: launch='sh {path} {PORT}' runs a script"
        )
    return content


def _split(text: str) -> list[str]:
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
        # A command in quotes of its own, which keep lmms-eval from splitting it at commas.
        return shlex.split(words[0]) if len(words) == 1 and words[0].split()[1:] else words
    except ValueError as error:
        raise ValueError(
            f"launch: expected quotes that are closed, got {text!r:.200} (launch=FILE takes a command from a file)"
        ) from error


def _expect_plain(command: tuple[str, ...]) -> None:
    operators = [word for word in command if word in _OF_A_SHELL]
    if operators:
        raise ValueError(
            f"launch: expected one command, which no shell reads, got {operators[0]!r}: sh -c '...' is a command with a"
            " shell of its own"
        )
    if any(_KEY_OPTION.fullmatch(word) for word in command):
        raise ValueError(
            "launch: expected no key, since the command goes into logs: give it to the server by an environment "
            "variable (VLLM_API_KEY, LLAMA_API_KEY), or leave it out, as nobody else reaches 127.0.0.1"
        )


def _expect_program(word: str, path: str | None) -> None:
    if shutil.which(word, path=path) is not None:
        return
    if "/" not in word:
        raise ValueError(
            f"launch: expected a program on PATH, got {word!r}: give its path, such as ENVIRONMENT/bin/{word}"
        )
    told = "is no program (no file that may be executed)" if Path(word).exists() else "does not exist"
    raise ValueError(f"launch: expected a program, but {word} {told}")


def _port(command: tuple[str, ...], environment: Mapping[str, str]) -> int | None:
    """Return the port that a command names; None where a free one is filled in."""
    if any(PORT in word for word in (*command, *environment.values())):
        return None
    for place, word in enumerate(command):
        option = _PORT_OPTION.fullmatch(word)
        number = option and (option[1] or "".join(command[place + 1 : place + 2]))
        if number and number.isdecimal() and 0 < int(number) < 2**16:
            return int(number)
    raise ValueError(
        f"launch: expected {PORT} where the server's port goes (--port {PORT}), got {command_line(command)!r:.200}"
    )
