"""The demo job: what lmms-eval's log tells of a run, the time left, the table in a narrow terminal, and its ends."""

import io
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tqdm import tqdm

from lmms_plugin import harness_log
from lmms_plugin.cli.demo_display import QUIET_SECONDS, DemoProgress, show
from lmms_plugin.demo import run as demo
from lmms_plugin.demo.pace import Pace, seconds_left
from lmms_plugin.shifts.image.corruptions import SHIFTS
from lmms_plugin.utils.processes import process_log

PLUGIN = Path(sys.executable).parent / "lmms-plugin"
TRACEBACK = """Traceback (most recent call last):
  File "decoding.py", line 9, in generate
    raise OutOfMemory("no room for a batch of 1")
lmms_plugin.utils.processes.out_of_memory.OutOfMemory: no room for a batch of 1
"""


def bar(title: str, done: int, total: int) -> str:
    """What tqdm writes while it counts."""
    stream = io.StringIO()
    drawn = tqdm(total=total, desc=title, file=stream, mininterval=0, miniters=1)
    for _ in range(done):
        drawn.update()
    if done == total:
        drawn.close()
    return stream.getvalue()


@pytest.mark.parametrize(
    ("log", "share"),
    [
        ("", None),
        (bar("Loading weights", 9, 9), None),
        (bar("Answering", 0, 8), None),
        (bar("Answering", 2, 8), 2 / 16),
        (bar("Answering", 8, 8), 8 / 16),
        (bar("Answering", 8, 8) + bar("Postprocessing", 0, 4), 8 / 16),
        (bar("Answering", 8, 8) + bar("Postprocessing", 1, 4), 9 / 16),
        (bar("Answering", 8, 8) + bar("Postprocessing", 4, 4) + bar("Postprocessing", 2, 4), 14 / 16),
        (bar("Answering", 8, 8) + "2026 | INFO | 3/4\n" + bar("Postprocessing", 4, 4), 12 / 16),
        (bar("Answering", 8, 8) + 2 * bar("Postprocessing", 4, 4), 1.0),
    ],
)
@pytest.mark.parametrize("pieces", [1, 7, 10_000])
def test_the_share_of_the_work_is_read_from_the_bars_of_a_log_as_it_grows(
    tmp_path: Path, log: str, share: float | None, pieces: int
) -> None:
    file = tmp_path / "log.txt"
    file.touch()
    followed = harness_log.Followed(file)
    content = log.encode()
    step = max(1, len(content) // pieces)
    for start in range(0, len(content), step):
        with file.open("ab") as stream:
            stream.write(content[start : start + step])
        seen = followed.share()
    assert (seen if content else followed.share()) == share


def test_no_byte_of_a_log_is_read_twice(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    first = bar("Answering", 2, 8)
    file.write_text(first)
    followed = harness_log.Followed(file)
    assert followed.share() == 2 / 16
    # What was read is gone, and what is appended counts on.
    file.write_text(" " * len(first.encode()) + bar("Answering", 8, 8))
    assert followed.share() == 8 / 16
    assert followed.share() == 8 / 16


def test_a_log_reads_as_a_terminal_shows_it() -> None:
    log = "\x1b[32mgreen\x1b[0m\r\n" + bar("Answering", 3, 3) + "last"
    first, answering, last = process_log.lines(log)
    assert (first, last) == ("green", "last")
    assert answering.count("Answering") == 1
    assert "3/3" in answering


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", None),
        ("Killed\n\n", "Killed"),
        (TRACEBACK + "bye\n", "lmms_plugin.utils.processes.out_of_memory.OutOfMemory: no room for a batch of 1"),
        (
            TRACEBACK + "\x1b[31mERROR\x1b[0m | Error during evaluation: no room. Please set `--verbosity=DEBUG` to get"
            " more information.\x1b[0m\n",
            "no room",
        ),
        (
            "NotADirectoryError: [Errno 20] Not a directory: '/x'\n\nTraceback (most recent call last):\n"
            "tenacity.RetryError: RetryError[<Future>]\n"
            "ERROR | Error during evaluation: RetryError[<Future>]. Please set `--verbosity=DEBUG`\n",
            "NotADirectoryError: [Errno 20] Not a directory: '/x'",
        ),
    ],
)
def test_the_last_error_of_a_log(log: str, said: str | None) -> None:
    assert harness_log.last_error(log) == said


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "left no results (it exits with 0 after an error); last error: why"),
        (1, "ended with status 1; last error: why"),
        (255, "ended with status 255; last error: why"),
        (137, "was ended by SIGKILL, as systems do when memory runs out; last error: why"),
        (143, "was ended by SIGTERM; last error: why"),
    ],
)
def test_a_failure_is_told_in_one_line(status: int, words: str) -> None:
    assert harness_log.failure("why\n", status) == f"lmms-eval {words}"


class TestTimeLeft:
    """A run that starts in 10 s and then works at an even pace for 40 s."""

    @staticmethod
    def at(now: float, started: float = 0.0) -> Pace:
        one = Pace("quant_none", started)
        for moment in range(int(started), int(now) + 1):
            done = (moment - started - 10) / 40
            one.see(done if done > 0 else None, moment)
        if now - started >= 50:
            one.ended = started + 50
        return one

    def test_nothing_is_said_before_anything_was_measured(self) -> None:
        assert seconds_left([self.at(10)], 3, 10.0) is None
        assert seconds_left([], 4, 0.0) is None

    def test_one_run_by_its_pace(self) -> None:
        assert seconds_left([self.at(20)], 0, 20.0) == pytest.approx(30.0)

    @pytest.mark.parametrize("now", [15, 30, 49])
    def test_those_that_wait_take_their_turn_on_the_place_that_is_free_first(self, now: int) -> None:
        # Two at once: the third starts at 50, when the first ends, the fourth at 55 with the second.
        runs = [self.at(now), self.at(now, 5.0)]
        assert seconds_left(runs, 2, float(now)) == pytest.approx(105.0 - now)
        assert seconds_left(runs[:1], 2, float(now)) == pytest.approx(150.0 - now)

    def test_a_run_that_only_starts_is_taken_to_be_like_those_that_are_over(self) -> None:
        assert seconds_left([self.at(53), Pace("quant_awq", 50.0)], 0, 53.0) == pytest.approx(47.0)

    def test_never_less_than_nothing_and_nothing_when_all_is_over(self) -> None:
        assert seconds_left([self.at(60), Pace("quant_awq", 0.0)], 0, 60.0) == 0.0
        assert seconds_left([self.at(60)], 0, 60.0) == 0.0


def test_without_a_terminal_the_line_comes_now_and_then() -> None:
    stream, moments = io.StringIO(), itertools.count()
    with DemoProgress(4, Console(file=stream, width=80), clock=lambda: float(next(moments))) as progress:
        one = progress.start("quant_awq", ("lmms-eval", "--model", "quant_awq"))
        for k in range(60):
            progress.see(one, None if k < 20 else (k - 19) / 80)
            progress.tick()
    command, *lines = stream.getvalue().splitlines()
    assert command == "$ lmms-eval --model quant_awq"
    assert lines[0] == "0 of 4 done; quant_awq starting; time left not known yet"
    assert re.fullmatch(r"0 of 4 done; quant_awq \d+ %; about .+ left", lines[-1])
    # Every look at the clock is a second.
    assert 2 <= len(lines) <= next(moments) / QUIET_SECONDS


def test_on_a_terminal_the_line_is_drawn_in_place() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True)
    with DemoProgress(4, console) as progress:
        one = progress.start("quant_awq", ("lmms-eval",))
        progress.see(one, 0.25)
        progress.tick()
    assert "0 of 4 done; quant_awq 25 %" in stream.getvalue()
    # Whatever was drawn last is wiped: cursor up or to the front, and the line erased.
    assert stream.getvalue().endswith(("\x1b[2K", "\x1b[?25h"))


def a_run(model: str, tasks: tuple[str, ...]) -> demo.DemoRun:
    """Finished, with numbers that follow from the place of their task."""
    numbers = {name: k for k, name in enumerate(demo.COLUMNS)}
    table: dict[str, Any] = {
        task: {f"{name},none": 0.125 * (k + 1) + 0.001 * place for name, place in numbers.items()}
        for k, task in enumerate(tasks)
    }
    samples = {task: {"original": 488, "effective": 488} for task in reversed(tasks)}
    results = {"results": table, "n-samples": samples, "throughput": {"avg_bits_per_weight": 32.0}}
    return demo.DemoRun(model, ("lmms-eval",), Path("x_results.json"), results)


def test_commands_of_the_demo_can_be_pasted() -> None:
    folder = Path("it's $HOME/my runs")
    command = demo.command_of("rtn", folder, 3, 2, full=False)
    one = demo.DemoRun("quant_rtn", command, Path("x"), a_run("quant_rtn", QUICK).results)
    stream = io.StringIO()
    DemoProgress(1, Console(file=stream, width=80)).start("quant_rtn", command)
    shown = stream.getvalue().removeprefix("$ ")
    (kept,) = [line for line in demo.report([one], [], 2).splitlines() if line.startswith("lmms-eval ")]
    assert shlex.split(shown) == shlex.split(kept) == list(command)
    assert str(folder / "quant_rtn") in command


def test_one_expression_is_one() -> None:
    one = a_run("quant_none", QUICK)
    one.results["n-samples"][demo.CLEAN]["effective"] = 1
    assert demo.scope(one).startswith("1 expression; ")
    assert "**Only the first expression of each task was used.**" in demo.report([one], [], 1)


QUICK = (demo.CLEAN, *(f"shapes_shift_{name}_3" for name in demo.QUICK))


def test_shifted_is_the_mean_over_the_corruptions_that_ran_which_are_named() -> None:
    one = a_run("quant_none", QUICK)
    assert one.clean("ece") == pytest.approx(0.125 + 0.002)
    assert one.shifted("ece") == pytest.approx(0.125 * (2 + 3 + 4 + 5) / 4 + 0.002)
    assert "488 expressions; shifted: mean over gaussian_noise, defocus_blur, snow, contrast at" in demo.scope(one)
    full = a_run("quant_none", (demo.CLEAN, *(f"shapes_shift_{name}_3" for name in SHIFTS)))
    assert full.shifted("acc@0.5") == pytest.approx(0.125 * sum(range(2, 20)) / 18)
    assert "mean over all 18 corruptions at severity 3" in demo.scope(full)


def test_a_mean_over_a_number_that_is_missing_is_none() -> None:
    one = a_run("quant_none", QUICK)
    del one.results["results"][QUICK[2]]["ece,none"]
    assert math.isnan(one.shifted("ece"))
    assert not math.isnan(one.shifted("acc@0.5"))


@pytest.mark.parametrize("columns", ["80", "40"])
def test_the_table_is_whole_in_a_narrow_terminal(monkeypatch, capsys, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    runs = [a_run(f"quant_{method}", QUICK) for method in demo.METHODS]
    show(demo.HEADINGS, [demo.cells(one) for one in runs], demo.scope(runs[0]))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in "".join(lines)
    rows = [line.split() for line in lines]
    assert ["bits", "per", *demo.COLUMNS, *demo.COLUMNS] in rows
    assert ["model", "weight", *["clean"] * 3, *["shifted"] * 3] in rows
    for one in runs:
        assert demo.cells(one) in rows


def working_for(folder: Path) -> list[int]:
    """Processes of lmms-eval that were told to write into a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(part.startswith(str(folder)) for part in command) and "--tasks" in command:
            found.append(int(process.name))
    return found


def begin(folder: Path, **environment: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A demo at the moment at which its runs of lmms-eval exist, and these with their guards."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [str(PLUGIN), "demo", "--output", str(folder), "--limit", "2"]
    process = subprocess.Popen(
        command,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has its background jobs ignore interrupts, and the tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("$ lmms-eval")
    for _ in range(200):
        working = [one for one in working_for(folder) if b"guard" not in Path(f"/proc/{one}/cmdline").read_bytes()]
        if working:
            return process, working
        time.sleep(0.1)
    raise AssertionError(f"no run of lmms-eval began: {process.poll()}")


def gone(folder: Path) -> bool:
    """Whether no process works into a folder, or soon none does."""
    for _ in range(100):
        if not working_for(folder):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
class TestEnds:
    """However the demo ends, no run of lmms-eval outlives it, and one line says why."""

    def test_an_interrupt_from_the_keyboard(self, tmp_path: Path) -> None:
        process, _ = begin(tmp_path)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (130, "lmms-plugin: interrupted\n")
        assert gone(tmp_path)

    def test_a_run_that_the_system_kills(self, tmp_path: Path) -> None:
        process, working = begin(tmp_path)
        os.kill(working[0], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert re.fullmatch(
            rf"lmms-plugin: quant_\w+: lmms-eval was ended by SIGKILL, as .*; its log: {tmp_path}/runs/.*/log.txt\n",
            said,
        )
        assert gone(tmp_path)

    @pytest.mark.slow
    def test_a_run_that_fails_and_says_it_did_not(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        process, _ = begin(tmp_path / "out", HF_DATASETS_CACHE=str(tmp_path / "file" / "below"))
        _, said = process.communicate(timeout=600)
        assert process.returncode == 2
        assert said.count("\n") == 1
        assert "lmms-eval left no results (it exits with 0 after an error); last error: " in said
        assert "Not a directory" in said
        assert (Path(said.rpartition("its log: ")[2].strip())).is_file()
        assert gone(tmp_path)
