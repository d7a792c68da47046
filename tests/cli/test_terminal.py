"""Notes of what a command does: on a terminal alone, never on standard output."""

import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from lmms_plugin.cli.terminal import Working, each


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[int]:
    """A terminal as standard error; what is written there can be read from this descriptor."""
    # After `capsys`, which replaces standard error as well.
    del capsys
    master, slave = os.openpty()
    os.set_blocking(master, False)
    with os.fdopen(slave, "w") as written:
        monkeypatch.setattr(sys, "stderr", written)
        monkeypatch.setenv("TERM", "xterm")
        yield master
    os.close(master)


def test_a_terminal_is_told_what_takes_time_and_gets_its_line_back(terminal: int, capsys) -> None:
    with Working("counting"):
        time.sleep(0.4)
        print("to a file")
    shown = os.read(terminal, 10_000).decode()
    assert "counting (0 s)" in shown
    assert shown.endswith("\x1b[2K") or "\x1b[2K" in shown.rpartition("counting")[2]
    assert capsys.readouterr().out == "to a file\n"


def test_items_are_printed_where_they_belong(terminal: int, capsys) -> None:
    for item in each(iter([None, "b"]), "checking"):
        print(item)
    assert os.read(terminal, 10_000).decode().count("checking") >= 3
    assert capsys.readouterr().out == "None\nb\n"


@pytest.mark.parametrize("failing", [False, True])
def test_elsewhere_nothing_is_said(capsys, failing: bool) -> None:
    written: TextIO = sys.stderr
    assert not written.isatty()
    try:
        with Working("counting"):
            list(each(range(3), "checking"))
            if failing:
                raise ValueError
    except ValueError:
        assert failing
    assert capsys.readouterr() == ("", "")
