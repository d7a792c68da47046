"""Files and folders that are whole or not there."""

from pathlib import Path

import pytest

from lmms_plugin.utils import files


def left(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_file_is_as_it_was_until_its_successor_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("before")
    with files.replacing(file) as unfinished:
        unfinished.write_text("after")
        assert file.read_text() == "before"
    assert left(tmp_path) == {"a.json": b"after"}
    with pytest.raises(TypeError), files.replacing(file) as unfinished, unfinished.open("w") as half:
        half.writelines(["half", None])
    assert left(tmp_path) == {"a.json": b"after"}


def test_of_several_files_none_is_replaced_where_one_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(FileNotFoundError):
        files.replace_all({tmp_path / "a": b"after", tmp_path / "nowhere" / "b": b"after"})
    assert left(tmp_path) == {"a": b"before"}
    longest = "b" * 255, "ü" * 127
    files.replace_all({tmp_path / "a": b"after"} | {tmp_path / name: b"too" for name in longest})
    assert left(tmp_path) == {"a": b"after"} | dict.fromkeys(longest, b"too")


def test_a_folder_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "in" / "new") as unfinished:
        (unfinished / "sub").mkdir()
        (unfinished / "sub" / "a").write_text("a")
        assert not (tmp_path / "in" / "new").exists()
    assert (tmp_path / "in" / "new" / "sub" / "a").read_text() == "a"
    with pytest.raises(OSError, match="not empty"), files.new_folder(tmp_path / "in" / "new") as unfinished:
        (unfinished / "b").write_text("b")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["new"]
    assert (tmp_path / "in" / "new" / "sub" / "a").read_text() == "a"


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "", "C:\\a", "a\0b", "x" * 256])
def test_paths_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected the path of a file inside the folder"):
        files.expect_inside(name)
