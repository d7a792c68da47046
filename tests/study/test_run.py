"""`lmms-plugin study` through the real lmms-eval: what is missing is run, failures are told, kills cost nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_studies import CELL, STUDY

from lmms_plugin.analysis import logs
from lmms_plugin.analysis.study_files import DONE, LOG
from lmms_plugin.study.file.expansion import cells
from lmms_plugin.study.file.identity import Keyed
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.run import attempt
from lmms_plugin.study.run.attempt import Attempt
from lmms_plugin.utils.files import read_json
from lmms_plugin.utils.hashing import of_files
from lmms_plugin.utils.processes import installed

PLUGIN = Path(sys.executable).parent / "lmms-plugin"
# Offline there is no RefCOCO+; the last line of the log says so.
FAILING = """cells: [{method: none, tasks: [refcocoplus_rec_val]}]
analysis: {kind: components, question: Which one, metrics: [ece]}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "study.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def start(file: Path, output: Path) -> subprocess.Popen[str]:
    command = [str(PLUGIN), "study", "run", str(file), "--output", str(output), "--jobs", "2"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=output.parent,
        # A shell has its background jobs ignore interrupts, and the tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"expected {words!r} in {''.join(seen)}")


def table(output: Path) -> dict[str, Any]:
    """Model arguments → answers of every document, their scores and confidences."""
    runs = [logs.read(file) for file in logs.find(output)]
    return {
        run.label: {
            name: (records.ids.tolist(), records.score.tolist(), {k: v.tolist() for k, v in records.confidence.items()})
            for name, records in run.tasks.items()
        }
        for run in runs
    }


def finished(output: Path) -> dict[str, int]:
    """Finished cells, each with the moment it was finished; all of them are whole."""
    found = {}
    for cell in sorted((output / "cells").iterdir()):
        expected = read_json(cell / DONE)["files"]
        assert {name: value for name, value in of_files(cell).items() if name != DONE} == expected
        found[cell.name] = (cell / DONE).stat().st_mtime_ns
    return found


def working_in(output: Path) -> list[int]:
    """Processes whose working directory is below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            where = os.readlink(process / "cwd")
        except OSError:
            continue
        if where.startswith(str(output)):
            found.append(int(process.name))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "out").mkdir()
    for name in ("study.yaml", "verdict.json", "verdict.md"):
        (folder / "out" / name).write_text("Of an earlier study.", encoding="utf-8")
    process = start(write(folder, STUDY + FAILING), folder / "out")
    said, _ = process.communicate()
    assert process.returncode == 1, said
    assert "FAILED" in said
    assert "The analysis was not made: of 3 cells 1 failed." in said
    assert f"study analyse {folder / 'out'} --partial" in said
    assert not list((folder / "out").glob("verdict.*"))
    return folder / "out"


@pytest.mark.slow
def test_cells_are_kept_as_they_are_documented(undisturbed: Path) -> None:
    cells = {cell.name.rpartition("-")[0]: cell for cell in (undisturbed / "cells").iterdir()}
    assert set(cells) == {"demo_none_16bit", "demo_rtn_3bit_g128"}
    about = read_json(cells["demo_rtn_3bit_g128"] / "cell.json")
    assert about["axes"] == {
        "model": "demo",
        "method": "rtn",
        "bits": 3,
        "group_size": 128,
        "components": "language",
        "calibration": None,
        "seed": None,
    }
    assert about["id"].endswith(about["key"][:12])
    assert about["command"][:3] == ["lmms-eval", "--model", "quant_rtn"]
    assert read_json(cells["demo_rtn_3bit_g128"] / "quant_report.json")
    assert not any((undisturbed / ".running").iterdir())


@pytest.mark.slow
def test_a_cell_answers_as_in_a_process_of_its_own(undisturbed: Path, tmp_path: Path) -> None:
    (cell,) = (undisturbed / "cells").glob("demo_rtn*")
    # The study has imported libraries for it and the others once.
    assert (undisturbed / ".libraries.log").is_file()
    first, *rest = read_json(cell / "cell.json")["command"]
    # As the study sets it for two cells at a time.
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)), **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [installed.command(first), *rest]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_equal(table(tmp_path), table(cell))


@pytest.mark.slow
def test_cells_share_what_they_take_of_the_unquantized_model(tmp_path: Path) -> None:
    text = (
        "models: [demo]\ntasks: [shapes_rec]\nlimit: 8\nmethods: [awq]\ncalibration: {source: self, samples: 4}\nbits: "
    )
    output = tmp_path / "out"
    output.mkdir()
    for bits in ("[4]", "[4, 3]"):
        process = start(write(tmp_path, text + bits + "\n"), output)
        said, _ = process.communicate()
        assert process.returncode == 0, said
    first, second = (next((output / "cells").glob(f"demo_awq_{bits}bit*")) for bits in (4, 3))
    taken = [read_json(cell / "quant_report.json")["calibration"]["taken"] for cell in (first, second)]
    assert taken[0] == {}
    assert taken[1]["answers"] == 4
    assert taken[1]["statistics"] > 4
    assert any((output / ".shared" / "calibration").iterdir())
    command = read_json(second / "cell.json")["command"]
    assert "shared_folder" not in " ".join(command)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)), **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "alone").mkdir()
    alone = [installed.command(command[0]), *command[1:]]
    subprocess.run(alone, cwd=tmp_path / "alone", env=environment, capture_output=True, text=True, check=True)
    np.testing.assert_equal(list(table(tmp_path / "alone").values()), list(table(second).values()))
    # Every layer has the same errors, of weights and of outputs.
    mine, whole = (read_json(folder / "quant_report.json") for folder in (second, tmp_path / "alone"))
    assert mine["modules"] == whole["modules"]


@pytest.mark.slow
def test_a_failure_is_recorded_with_the_end_of_its_log(undisturbed: Path) -> None:
    (failed,) = (undisturbed / "failed").iterdir()
    said = read_json(failed / "failed.json")
    assert said["returncode"] == 2
    assert said["problem"].startswith("lmms-eval ended with status 2; last error: ")
    assert "RefCOCOplus" in said["problem"]
    assert "RefCOCOplus" in said["tail"].splitlines()[-1]
    assert sorted(file.name for file in failed.iterdir()) == ["cell.json", "failed.json", "log.txt"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "left no results (it exits with 0 after an error)"),
        (137, "was ended by SIGKILL"),
        (1, "ended with status 1"),
    ],
)
def test_a_failure_quotes_the_last_error(tmp_path: Path, status: int, words: str) -> None:
    (tmp_path / LOG).write_text("Traceback\nRuntimeError: why\nbye\n")
    problem = attempt.problem_of(CELL, tmp_path, status)
    assert problem is not None
    assert problem.startswith(f"lmms-eval {words}")
    assert problem.endswith("; last error: RuntimeError: why")


@pytest.mark.slow
def test_an_interrupt_ends_the_cells_and_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    process = start(write(tmp_path, STUDY), tmp_path / "out")
    read_until(process, "start")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = [line for line in said.splitlines() if "start" not in line]
    assert lines == ["lmms-plugin: interrupted"]
    assert not working_in(tmp_path / "out")


@pytest.mark.slow
def test_a_rerun_does_nothing_that_is_done_and_leaves_failures_alone(undisturbed: Path) -> None:
    before = finished(undisturbed)
    plan = subprocess.run(
        [str(PLUGIN), "study", "plan", "study.yaml", "--output", "out", "--json"],
        cwd=undisturbed.parent,
        stdout=subprocess.PIPE,
        check=True,
    )
    states = [cell["state"] for cell in json.loads(plan.stdout)["cells"]]
    assert states == ["done", "done", "failed"]
    process = start(undisturbed.parent / "study.yaml", undisturbed)
    said, _ = process.communicate()
    assert process.returncode == 1
    assert "start" not in said
    assert finished(undisturbed) == before


@pytest.mark.slow
def test_kills_cost_nothing_that_was_finished_and_change_no_number(undisturbed: Path, tmp_path: Path) -> None:
    file, output = write(tmp_path, STUDY), tmp_path / "out"
    moments = random.Random(7)
    before: dict[str, int] = {}
    for words in ("start", "done"):
        process = start(file, output)
        read_until(process, words)
        time.sleep(moments.uniform(0.0, 6.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        while working_in(output):
            time.sleep(0.1)
        after = finished(output)
        assert before.items() <= after.items()
        before = after
    # Two runners at once share what is left.
    runners = [start(file, output) for _ in range(2)]
    said = [runner.communicate()[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], said
    assert before.items() <= finished(output).items()
    assert len(finished(output)) == 2
    assert not any((output / ".running").iterdir())
    expected, found = table(undisturbed), table(output)
    assert expected.keys() == found.keys()
    for label, tasks in expected.items():
        np.testing.assert_equal(found[label], tasks)


@pytest.mark.parametrize("timeout", [1, None])
def test_a_cell_that_takes_longer_than_its_timeout_has_failed(tmp_path, monkeypatch, timeout):
    (tmp_path / "study.yaml").write_text(
        "models: [demo]\ntasks: [shapes_rec]\nmethods: [none]\nlimit: 2\n"
        + ("" if timeout is None else f"resources: {{timeout: {timeout}}}\n")
    )
    (cell,) = cells(read(tmp_path / "study.yaml"))
    assert cell.resources.timeout == timeout
    program = [sys.executable, "-P", "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(attempt, "command", lambda *_: program)
    monkeypatch.setattr(attempt.installed, "command", lambda first: first)
    keyed = Keyed(cell, {}, {})
    monkeypatch.setattr(attempt.identity, "keyed", lambda *_, **__: keyed)
    work = tmp_path / "work"
    work.mkdir()
    one = Attempt.start(keyed, work, gpus=())
    one.expire()
    assert not one.over
    deadline = time.monotonic() + 3
    while not one.over and time.monotonic() < deadline:
        time.sleep(0.1)
        one.expire()
    assert one.over == one.timed_out == (timeout is not None)
    outcome = one.outcome()
    assert ("timeout of 1 s" in (outcome.problem or "")) == (timeout is not None)
    assert 1 <= outcome.done["seconds"] < 30


def test_a_clock_that_is_set_back_changes_no_duration(tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-P", "-c", ""], stdin=subprocess.PIPE)
    process.wait()
    keyed = Keyed(cells(read(_study_of_one(tmp_path)))[0], {}, {})
    monkeypatch.setattr(attempt.identity, "keyed", lambda *_, **__: keyed)
    (tmp_path / "log.txt").write_text("")
    one = Attempt(keyed, tmp_path, (), process, time.time() + 3600)
    assert 0 <= one.outcome().done["seconds"] < 60


def _study_of_one(folder):
    (folder / "study.yaml").write_text("models: [demo]\ntasks: [shapes_rec]\nmethods: [none]\nlimit: 2\n")
    return folder / "study.yaml"
