"""Notes of what a command does: on a terminal alone, never on standard output."""

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lmms_plugin.cli.terminal import Working, each


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """A terminal as standard error, and a function that returns what it was sent until now."""
    master, slave = os.openpty()
    monkeypatch.setenv("TERM", "xterm")

    def shown() -> str:
        found = b""
        while select.select([master], [], [], 0.5)[0]:
            found += os.read(master, 10_000)
        return found.decode()

    with os.fdopen(slave, "w") as written, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", written)
        yield shown
    os.close(master)


def test_a_terminal_is_told_what_takes_time_and_gets_its_line_back(monkeypatch, capsys) -> None:
    with terminal(monkeypatch) as shown:
        with Working("counting"):
            time.sleep(0.3)
            print("to a file")
        said = shown()
    assert "counting (0 s)" in said
    # The line is erased after the last note.
    assert "\x1b[2K" in said.rpartition("counting")[2]
    assert capsys.readouterr().out == "to a file\n"


def test_items_are_printed_where_they_belong(monkeypatch, capsys) -> None:
    with terminal(monkeypatch) as shown:
        for item in each(iter([None, "b"]), "checking"):
            print(item)
        assert shown().count("checking") >= 3
    assert capsys.readouterr().out == "None\nb\n"


def test_elsewhere_nothing_is_said(capsys) -> None:
    assert not sys.stderr.isatty()
    with Working("counting"):
        assert list(each(range(3), "checking")) == [0, 1, 2]
    with pytest.raises(ValueError, match="as it was"), Working("counting"):
        raise ValueError("as it was")
    assert capsys.readouterr() == ("", "")
