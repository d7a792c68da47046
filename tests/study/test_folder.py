"""A study's folder: finished means whole, and one runner per cell."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lmms_plugin.analysis.study_files import CELL, DONE, FAILED
from lmms_plugin.study.run import cost
from lmms_plugin.study.run.recording import Recorder, Taken
from lmms_plugin.study.store.folder import Lock, StudyFolder
from lmms_plugin.study.store.storage import Storage
from lmms_plugin.utils import files, hashing
from lmms_plugin.utils.files import read_json
from lmms_plugin.utils.processes import guard

ABOUT = {"model": "quant_rtn", "model_args": {"bits": 4}, "tasks": ["t"], "limit": None, "axes": {"bits": 4}}


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    file = tmp_path / "s.yaml"
    file.write_text("models: [demo]\n")
    found = StudyFolder(tmp_path / "study")
    found.open(file)
    return found


def work(folder: StudyFolder, cell: str, text: str = "r") -> None:
    path = folder.begin(cell) / "demo"
    path.mkdir()
    (path / "1_results.json").write_text(text)


def test_a_cell_is_finished_by_one_rename(folder: StudyFolder) -> None:
    work(folder, "a-1")
    assert not folder.is_done("a-1")
    folder.finish("a-1", ABOUT, {"seconds": 3.0})
    assert folder.is_done("a-1")
    assert folder.finished() == ["a-1"]
    done = folder.done("a-1")
    assert set(done["files"]) == {CELL, "demo/1_results.json"}
    assert done["files"]["demo/1_results.json"] == "454349e422f05297191ead13e21d3db520e5abef52055e4964b82fb213f593a1"
    assert not (folder.running / "a-1").exists()


def test_a_failure_keeps_the_log_alone_and_success_removes_it(folder: StudyFolder) -> None:
    work(folder, "a-1")
    (folder.running / "a-1" / "log.txt").write_text("why")
    folder.fail("a-1", ABOUT, {"problem": "p", "returncode": 1, "tail": "why", "seconds": 1.0})
    assert folder.has_failed("a-1")
    assert sorted(file.name for file in folder.failed_path("a-1").rglob("*")) == [CELL, FAILED, "log.txt"]
    work(folder, "a-1")
    folder.finish("a-1", ABOUT, {"seconds": 3.0})
    assert not folder.failed_path("a-1").exists()


def test_success_removes_failures_under_other_keys_but_not_those_of_other_cells(folder: StudyFolder) -> None:
    others = {"a-1": ABOUT, "a-2": {**ABOUT, "batch_size": 8}, "b-1": {**ABOUT, "tasks": ["u"]}}
    for cell, about in others.items():
        folder.begin(cell)
        folder.fail(cell, about, {"problem": "p", "returncode": 1, "tail": "", "seconds": 1.0})
    work(folder, "a-3")
    folder.finish("a-3", ABOUT, {"seconds": 3.0})
    assert [cell for cell in others if folder.has_failed(cell)] == ["b-1"]
    assert not folder.failed_path("a-1").exists()


def test_a_newer_answer_to_the_same_question_supersedes_and_can_be_taken_back(folder: StudyFolder) -> None:
    several = {**ABOUT, "tasks": ["t", "v"]}
    for cell, about in (
        ("a-1", several),
        ("b-1", {**ABOUT, "tasks": ["u"]}),
        ("a-2", {**several, "tasks": ["v", "t"]}),
    ):
        work(folder, cell)
        folder.finish(cell, about, {"seconds": 3.0})
    assert folder.finished() == ["a-2", "b-1"]
    assert folder.restore("a-1")
    assert folder.finished() == ["a-1", "b-1"]
    assert not folder.restore("c-1")


@pytest.mark.parametrize("how", ["finished", "restored"])
def test_half_a_cell_in_the_place_of_a_finished_one_is_put_aside(folder: StudyFolder, how: str) -> None:
    if how == "restored":
        for cell in ("a-1", "a-2"):
            work(folder, cell)
            folder.finish(cell, ABOUT, {"seconds": 3.0})
    folder.done_path("a-1").mkdir()
    (folder.done_path("a-1") / CELL).write_text("{}")
    assert not folder.is_done("a-1")
    if how == "restored":
        assert folder.restore("a-1")
    else:
        work(folder, "a-1")
        folder.finish("a-1", ABOUT, {"seconds": 3.0})
    assert folder.finished() == ["a-1"]
    assert (folder.done_path("a-1") / "demo" / "1_results.json").is_file()
    assert (folder.superseded / "a-1.unfinished" / CELL).is_file()


def test_what_killed_runners_left_is_cleared_but_not_what_others_work_on(folder: StudyFolder, tmp_path: Path) -> None:
    work(folder, "left-1")
    held = folder.lock("busy-1")
    assert held is not None
    work(folder, "busy-1")
    folder.open(tmp_path / "s.yaml")
    assert not (folder.running / "left-1").exists()
    assert (folder.running / "busy-1").exists()
    assert folder.lock("busy-1") is None
    assert folder.is_running("busy-1")
    held.release()
    assert not folder.is_running("busy-1")


def test_a_lock_ends_with_the_process_that_held_it(folder: StudyFolder) -> None:
    program = f"""
import sys, time
from pathlib import Path
from lmms_plugin.study.store.folder import StudyFolder
lock = StudyFolder(Path({str(folder.path)!r})).lock("a-1")
print("held", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert folder.lock("a-1") is None
        other.kill()
    mine = folder.lock("a-1")
    assert mine is not None
    mine.release()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"empty folder or one of a study"):
        StudyFolder(tmp_path).open(tmp_path / "thesis.tex")


def test_a_folder_in_which_a_runner_was_killed_at_its_start_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("models: [demo]\n")
    study = tmp_path / "study"
    for name in ("cells", "failed", ".running"):
        (study / name).mkdir(parents=True)
    (study / ".study.yaml.1").write_text("mod")
    StudyFolder(study).open(file)
    assert (study / "study.yaml").read_text() == "models: [demo]\n"
    (study / "study.yaml").unlink()
    (study / "cells" / "holidays.jpg").write_text("x")
    with pytest.raises(ValueError, match=r"empty folder or one of a study"):
        StudyFolder(study).open(file)


def test_the_study_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second finds a folder with a study file in it, or an empty one."""
    file, study, made = tmp_path / "s.yaml", tmp_path / "study", []
    file.write_text("models: [demo]\n")
    mkdir = Path.mkdir

    def noted(path: Path, *arguments: Any, **named: Any) -> None:
        made.append((path.name, (study / "study.yaml").is_file()))
        mkdir(path, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", noted)
    StudyFolder(study).open(file)
    assert made == [("study", False), ("cells", True), ("failed", True), (".running", True)]


class Vanishing(StudyFolder):
    """Lists a cell that another runner has just put aside."""

    def finished(self) -> list[str]:
        return [*super().finished(), "gone-1"]

    def is_done(self, cell: str) -> bool:
        return cell in self.finished()

    def has_failed(self, cell: str) -> bool:
        return not self.is_done(cell)


def test_a_cell_that_vanishes_meanwhile_stops_nobody(folder: StudyFolder) -> None:
    other = Vanishing(folder.path)
    work(other, "a-1")
    other.finish("a-1", ABOUT, {"seconds": 3.0})
    work(other, "a-2")
    other.finish("a-2", ABOUT, {"seconds": 4.0})
    assert folder.finished() == ["a-2"]
    assert [one.seconds for one in cost.past(other)] == [4.0]
    assert other.failure("b-1") is None


def test_putting_aside_leaves_what_another_runner_put_there(folder: StudyFolder) -> None:
    work(folder, "a-1")
    folder.finish("a-1", ABOUT, {"seconds": 3.0})
    shutil.copytree(folder.done_path("a-1"), folder.superseded / "a-1")
    before = (folder.superseded / "a-1" / DONE).stat().st_ino
    work(folder, "a-2")
    folder.finish("a-2", ABOUT, {"seconds": 3.0})
    assert folder.finished() == ["a-2"]
    assert (folder.superseded / "a-1" / DONE).stat().st_ino == before


def test_what_is_removed_stops_counting_first(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that is killed while it removes a cell leaves nothing that looks whole."""
    work(folder, "a-1")
    (folder.begin("a-1") / DONE).write_text("{}")

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.discard("a-1")
    assert not (folder.running / "a-1" / DONE).exists()


def test_storage_gives_back_what_was_put(folder: StudyFolder, tmp_path: Path) -> None:
    storage = Storage.at(f"file://{tmp_path / 'shared'}")
    work(folder, "a-1")
    folder.finish("a-1", ABOUT, {"seconds": 3.0})
    storage.put("a-1", folder)
    other = StudyFolder(tmp_path / "elsewhere")
    other.open(tmp_path / "s.yaml")
    assert storage.fetch("a-1", other)
    assert other.done("a-1") == folder.done("a-1")
    assert not storage.fetch("a-2", other)


@pytest.mark.parametrize("damage", ["edited", "missing"])
def test_storage_that_was_tampered_with_is_refused(folder: StudyFolder, tmp_path: Path, damage: str) -> None:
    storage = Storage.at("memory://study")
    work(folder, "a-1")
    folder.finish("a-1", ABOUT, {"seconds": 3.0})
    storage.put("a-1", folder)
    path = "/study/cells/a-1/demo/1_results.json"
    if damage == "edited":
        storage.system.pipe_file(path, b"x")
    else:
        done = json.loads(storage.system.cat_file("/study/cells/a-1/done.json"))
        done["files"]["demo/2_results.json"] = "0" * 64
        storage.system.pipe_file("/study/cells/a-1/done.json", json.dumps(done).encode())
    other = StudyFolder(tmp_path / "elsewhere")
    other.open(tmp_path / "s.yaml")
    with pytest.raises((ValueError, FileNotFoundError), match=r"as it was finished|2_results"):
        storage.fetch("a-1", other)
    assert not other.is_done("a-1")


@pytest.mark.parametrize("damage", ["gone", "emptied", "truncated", "changed in place", "another's link"])
@pytest.mark.parametrize("name", ["demo/1_results.json", CELL])
def test_a_cell_whose_files_are_not_as_they_were_is_run_again(folder: StudyFolder, name: str, damage: str) -> None:
    work(folder, "a-1", "what was measured")
    folder.finish("a-1", ABOUT, {"seconds": 3.0})
    assert folder.is_done("a-1")
    assert folder.damaged() == {}
    file = folder.done_path("a-1") / name
    content = file.read_bytes()
    if damage in ("gone", "another's link"):
        file.unlink()
    else:
        file.write_bytes({"emptied": b"", "truncated": content[:-3]}.get(damage, content.replace(b"a", b"b")))
    if damage == "another's link":
        (folder.path / "copy").write_bytes(content)
        file.symlink_to(folder.path / "copy")
    assert not folder.is_done("a-1")
    assert folder.finished() == []
    assert Path(name).name in (folder.damage("a-1") or "")
    assert "a-1" in (folder.damage("a-1") or "")
    assert cost.past(folder) == []
    recorder = Recorder(folder, Told())
    lock = recorder.claim("a-1")
    assert isinstance(lock, Lock)
    work(folder, "a-1", "measured again")
    folder.finish("a-1", ABOUT, {"seconds": 4.0})
    lock.release()
    assert folder.finished() == ["a-1"]
    assert folder.done("a-1")["seconds"] == 4.0


def test_files_that_are_as_they_were_are_hashed_once(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    work(folder, "a-1")
    folder.finish("a-1", ABOUT, {"seconds": 3.0})
    monkeypatch.setattr(files, "SETTLED_NANOSECONDS", -1)
    assert folder.is_done("a-1")
    hashed: list[Path] = []
    of_file = hashing.of_file
    monkeypatch.setattr(hashing, "of_file", lambda file: hashed.append(file) or of_file(file))
    assert folder.is_done("a-1")
    assert hashed == []
    (folder.done_path("a-1") / "demo" / "1_results.json").write_text("x")
    assert not folder.is_done("a-1")
    assert [file.name for file in hashed] == ["1_results.json"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (DONE, "{}", "seconds"),
        (DONE, "[]", "JSON object"),
        (DONE, '{"seconds": "long", "files": {}}', "seconds"),
        (DONE, '{"seconds": 1, "files": {"../../x": "%s"}}' % ("0" * 64), r"inside the folder, got '../../x'"),
        (DONE, '{"seconds": %s, "files": {}}' % ("9" * 5000), "damaged"),
        (DONE, "[" * 100_000, "damaged"),
        (CELL, '{"axes": {"bits": "four"}}', "axes: bits must be a whole number, got 'four'"),
        (CELL, '{"axes": {"seed": {}}}', "axes: seed must be a whole number, got {}"),
        (CELL, '{"axes": null}', "axes"),
    ],
)
def test_one_cell_with_nonsense_in_its_accounts_stops_no_other(
    folder: StudyFolder, name: str, content: str, told: str
) -> None:
    for cell in ("a-1", "b-1"):
        work(folder, cell)
        folder.finish(cell, {**ABOUT, "tasks": [cell]}, {"seconds": 3.0})
    (folder.done_path("a-1") / name).write_text(content)
    assert folder.finished() == ["b-1"]
    damage = folder.damage("a-1") or ""
    assert re.search(told, damage)
    assert name in damage
    assert "\n" not in damage
    assert [one.seconds for one in cost.past(folder)] == [3.0]


def test_a_failure_whose_account_is_damaged_is_still_one(folder: StudyFolder) -> None:
    folder.begin("a-1")
    folder.fail("a-1", ABOUT, {"problem": "p", "returncode": 1, "tail": "", "seconds": 1.0})
    (folder.failed_path("a-1") / FAILED).write_text("")
    assert folder.has_failed("a-1")
    assert FAILED in (folder.failure("a-1") or {})["problem"]


@pytest.mark.parametrize(
    "name", ["../../../../victim/.bashrc", "/victim/.bashrc", "demo/../../../x", "C:x", "..\\x", ""]
)
def test_storage_writes_nothing_outside_of_the_cell(folder: StudyFolder, tmp_path: Path, name: str) -> None:
    storage = Storage.at("memory://outside")
    work(folder, "a-1")
    folder.finish("a-1", ABOUT, {"seconds": 3.0})
    storage.put("a-1", folder)
    done = json.loads(storage.system.cat_file("/outside/cells/a-1/done.json"))
    done["files"][name] = "0" * 64
    storage.system.pipe_file("/outside/cells/a-1/done.json", json.dumps(done).encode())
    other = StudyFolder(tmp_path / "elsewhere")
    other.open(tmp_path / "s.yaml")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="inside the folder"):
        storage.fetch("a-1", other)
    assert {file.name for file in {*tmp_path.rglob("*")} - {*before}} <= {"a-1", DONE}


@pytest.mark.parametrize("place", [".running", ".running/a-1", "failed/a-1", "cells/a-1", ".measured/a-1", "cells"])
def test_nothing_behind_a_link_is_removed(folder: StudyFolder, tmp_path: Path, place: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in (DONE, FAILED, "files.json", "x.bin", "photo.jpg"):
        (precious / name).write_text("{}")
    link = folder.path / place
    if link.is_dir():
        link.rmdir()
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(precious, target_is_directory=True)
    with contextlib.suppress(ValueError):
        folder.open(tmp_path / "s.yaml")
        folder.discard("a-1")
        work(folder, "a-1")
        folder.finish("a-1", ABOUT, {"seconds": 3.0})
        folder.begin("a-1")
        folder.fail("a-1", ABOUT, {"problem": "p", "returncode": 1, "tail": "", "seconds": 1.0})
    assert len([*precious.iterdir()]) == 5


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / DONE).write_text('{"seconds": ')
    with pytest.raises(ValueError, match=r"expected JSON in .*done\.json"):
        read_json(tmp_path / DONE)


def test_the_guard_passes_the_status_on() -> None:
    command = [sys.executable, "-P", "-m", guard.__name__, "0", sys.executable, "-P", "-c", "raise SystemExit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait() == 7


@pytest.mark.parametrize("which", ["runner", "guard"])
def test_nothing_outlives_a_killed_runner(tmp_path: Path, which: str) -> None:
    grandchild = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    child = "import os, subprocess, sys; print(os.getpid(), flush=True); "
    child += f"subprocess.run([sys.executable, '-c', {grandchild!r}])"
    runner = f"""
import subprocess, sys
guard = subprocess.Popen([sys.executable, "-P", "-m", {guard.__name__!r}, "0", sys.executable, "-P", "-c", {child!r}],
                         stdin=subprocess.PIPE, start_new_session=True)
print(guard.pid, flush=True)
guard.wait()
"""
    with subprocess.Popen([sys.executable, "-P", "-c", runner], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(3)]
        os.kill(process.pid if which == "runner" else pids[0], signal.SIGKILL)
        # A guard that is killed takes its command with it; what that started itself is the system's to end.
        expected = pids if which == "runner" else pids[:2]
        while any(_lives(pid) for pid in expected):
            time.sleep(0.05)
        if which == "guard":
            os.kill(pids[2], signal.SIGKILL)


def _lives(pid: int) -> bool:
    try:
        # A process that is over but not yet waited for still has its number.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Told:
    """Keeps what a watcher is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def started(self, cell: str) -> None:
        self.lines.append(("started", cell))

    def done(self, cell: str, seconds: float | None) -> None:
        self.lines.append(("done", cell, seconds))

    def failed(self, cell: str, problem: str) -> None:
        self.lines.append(("failed", cell, problem))

    def waiting(self, cell: str, reason: str) -> None:
        self.lines.append(("waiting", cell, reason))

    def tick(self) -> None:
        pass


def fail(folder: StudyFolder, cell: str, moment: float) -> None:
    folder.begin(cell)
    folder.fail(cell, ABOUT, {"problem": "p", "returncode": 1, "tail": "", "seconds": moment})


def test_a_failure_of_another_runner_is_not_tried_again_but_one_from_before_is(folder: StudyFolder) -> None:
    told = Told()
    recorder = Recorder(folder, told)
    fail(folder, "a-1", 1.0)
    lock = recorder.claim("a-1")
    assert isinstance(lock, Lock)
    lock.release()
    other = folder.lock("a-1")
    assert other is not None
    assert recorder.claim("a-1") is Taken.ELSEWHERE
    fail(folder, "a-1", 2.0)
    other.release()
    assert recorder.claim("a-1") is Taken.SETTLED
    assert told.lines == [("failed", "a-1", "p")]


def test_what_another_runner_finished_is_taken_for_done(folder: StudyFolder) -> None:
    told = Told()
    recorder = Recorder(folder, told)
    other = folder.lock("a-1")
    assert other is not None
    assert recorder.claim("a-1") is Taken.ELSEWHERE
    work(folder, "a-1")
    folder.finish("a-1", ABOUT, {"seconds": 3.0})
    other.release()
    assert recorder.claim("a-1") is Taken.SETTLED
    assert told.lines == [("done", "a-1", None)]
