"""What is said to people: counts, commands, errors in one line."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from lmms_plugin.utils.messages import command_line, counted, one_line


@pytest.mark.parametrize(("number", "said"), [(0, "0 runs"), (1, "1 run"), (2, "2 runs"), (1000, "1000 runs")], ids=str)
def test_one_is_singular(number, said):
    assert counted(number, "run") == said


def test_some_nouns_have_plurals_of_their_own():
    assert (counted(1, "box", "boxes"), counted(3, "box", "boxes")) == ("1 box", "3 boxes")


@pytest.mark.parametrize("part", ["two words", "$HOME", "it's", 'say "x"', "", "a\\b", "*", "~/x", "ü;rm"])
def test_a_command_can_be_pasted(part):
    line = command_line(("printf", "%s|", part, Path("x y")))
    shown = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert shown == f"{part}|x y|"
    assert shlex.split(line) == ["printf", "%s|", part, "x y"]


def test_errors_of_the_system_name_path_fault_and_remedy(tmp_path):
    (tmp_path / "file").touch()
    said = []
    for work in (
        lambda: (tmp_path / "none" / "x").write_text(""),
        lambda: tmp_path.write_text(""),
        lambda: (tmp_path / "file" / "x").mkdir(),
        lambda: (tmp_path / "file").mkdir(),
        lambda: os.rename(tmp_path / "file", tmp_path / "none" / "x"),
    ):
        with pytest.raises(OSError) as failure:  # noqa: PT011 - any error of the system
            work()
        said.append(one_line(failure.value))
    assert said == [
        f"{tmp_path}/none/x: no such file or directory; check how it is written, and that the folder it is to lie in is"
        " there",
        f"{tmp_path}: is a directory; name a file",
        f"{tmp_path}/file/x: not a directory; name a folder, below folders alone",
        f"{tmp_path}/file: file exists; name another place, or remove what is there",
        f"{tmp_path}/none/x: no such file or directory; check how it is written, and that the folder it is to lie in is"
        " there",
    ]


def test_other_errors_say_what_they_say_in_one_line():
    assert one_line(OSError("our own\n words")) == "our own words"
    assert one_line(ValueError("a\n\n b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
